"""Sampling of the next token: a chain of logit filters and an inverse-CDF draw, in NumPy.

Every filter maps logits (B, V) to logits (B, V) and takes one parameter per row. It sets tokens
that must not be sampled to -inf.
"""

from collections.abc import Sequence

import numpy as np

from nanogpt.config import SamplingConfig
from nanogpt.splitmix import GOLDEN_GAMMA, mix64

# Lower temperatures are greedy: the division would overflow float32.
MIN_TEMPERATURE = 1e-4


def repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Lower the logits of tokens that occurred already.

    Keskar et al. 2019, "CTRL", section 4.1. The paper divides negative logits too, which would
    raise them; here they are multiplied.

    Args:
        logits: (B, V).
        seen: Tokens that occurred, (B, V) bool.
        penalty: (B, 1), above 1 to penalise.
    """
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Keep the k (B,) largest logits of each row; of equal ones those with the lowest ids."""
    kth = logits.shape[1] - k[:, None]
    threshold = np.take_along_axis(np.sort(logits, axis=1), kth, axis=1)  # (B, 1)
    above = logits > threshold
    ties = logits == threshold
    num_ties = k[:, None] - above.sum(axis=1, keepdims=True)
    return np.where(above | (ties & (ties.cumsum(axis=1) <= num_ties)), logits, -np.inf)


def top_p(logits: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Keep the smallest set of most likely tokens whose probability reaches p (B,).

    Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.
    """
    probs = np.sort(softmax(logits), axis=1)[:, ::-1].astype(np.float64)
    # The mass before a token: 0 for the most likely one, which therefore always stays.
    mass_before = probs.cumsum(axis=1) - probs
    return top_k(logits, (mass_before < p[:, None]).sum(axis=1))


def min_p(logits: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Keep tokens at least p (B,) times as likely as the most likely (Nguyen et al. 2024)."""
    probs = softmax(logits)
    too_unlikely = probs < p[:, None] * probs.max(axis=1, keepdims=True)
    return np.where(too_unlikely, -np.inf, logits)


# For one row, the overhead of a NumPy method exceeds its computation: the functions below call the
# ufuncs' own `reduce` and `accumulate`.
def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities (B, V) of logits (B, V)."""
    weights = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    return weights / np.add.reduce(weights, axis=1, keepdims=True)


def sample_from_logits(logits: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Sample a token (B,) per row of logits (B, V) by inverting the CDF at `uniforms` (B,)."""
    weights = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    cdf = np.add.accumulate(weights, axis=1, dtype=np.float64)  # times the sum of the weights
    return np.add.reduce(cdf <= uniforms[:, None] * cdf[:, -1:], axis=1)


def uniform_hash(seed: int, counters: np.ndarray) -> np.ndarray:
    """Return random numbers in [0, 1) that are a pure function of the seed and the counters (N,).

    The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
    pseudorandom number generators", section 3).
    """
    key = mix64(np.array([seed], np.uint64))
    bits = mix64(key + counters.astype(np.uint64) * GOLDEN_GAMMA)
    return (bits >> np.uint64(11)) * 2.0**-53


class Sampler:
    """Samples the next tokens of B sequences, each with its own settings.

    A filter runs only if at least one sequence uses it. Its parameters are None otherwise, and
    neutral for the sequences that do not use it.
    """

    def __init__(self, settings: Sequence[SamplingConfig], vocab_size: int):
        def per_row(name: str, off: object, neutral: float) -> np.ndarray | None:
            """Collect a setting of all rows, `neutral` where it is off; None if all are off."""
            values = [getattr(row, name) for row in settings]
            if all(value == off for value in values):
                return None
            return np.array([neutral if value == off else value for value in values])

        self.num_rows = len(settings)
        self.penalty = per_row("repetition_penalty", 1, 1.0)
        self.k = per_row("top_k", None, vocab_size)
        self.p = per_row("top_p", 1, np.inf)
        self.min_p = per_row("min_p", 0, 0.0)
        self.bias: np.ndarray | None = None
        if any(row.logit_bias or row.allowed_token_ids is not None for row in settings):
            self.bias = np.stack([make_logit_bias(row, vocab_size) for row in settings])
        temperature = np.array([row.temperature for row in settings], np.float32)
        self.is_greedy = temperature < MIN_TEMPERATURE
        self.any_greedy = self.is_greedy.any()
        self.temperature = np.where(self.is_greedy, 1, temperature)[:, None].astype(np.float32)

    def process_logits(self, logits: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
        """Apply penalty, bias, temperature and filters to logits (B, V).

        Args:
            logits: (B, V) float32.
            seen: Tokens that occurred, (B, V) bool; needed only for the repetition penalty.
        """
        if self.penalty is not None:
            assert seen is not None
            logits = repetition_penalty(logits, seen, self.penalty[:, None].astype(np.float32))
        if self.bias is not None:
            logits = logits + self.bias
        logits = logits / self.temperature
        if self.k is not None:
            logits = top_k(logits, self.k.clip(max=logits.shape[1]))
        if self.p is not None:
            logits = top_p(logits, self.p)
        return logits if self.min_p is None else min_p(logits, self.min_p)

    def __call__(
        self, logits: np.ndarray, uniforms: Sequence[float], seen: np.ndarray | None = None
    ) -> np.ndarray:
        """Sample tokens (B,) from logits (B, V) with one random number in [0, 1) per row."""
        logits = self.process_logits(logits, seen)
        tokens = sample_from_logits(logits, np.array(uniforms))
        if self.any_greedy:
            tokens = np.where(self.is_greedy, logits.argmax(axis=1), tokens)
        return tokens


def make_logit_bias(settings: SamplingConfig, vocab_size: int) -> np.ndarray:
    """Return what to add to the logits, (V,) float32: `logit_bias`, and -inf if not allowed."""
    bias = np.zeros(vocab_size, np.float32)
    if settings.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(settings.allowed_token_ids)] = 0
    for token, value in settings.logit_bias.items():
        bias[token] += value
    return bias
