"""Which token comes next: logits through a chain of small filters, and a draw.

In: logits (B, V) float32 of B texts, each with settings and random numbers of its own. Out: a token for each.

Every filter takes (B, V), and what it needs to know for each row, and gives (B, V): what may no longer be drawn is at -inf. B texts, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from nanogpt.config import SamplingConfig

COLDEST = 1e-4  # dividing logits by less overflows; the likeliest token has all the probability long before


def repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """The logits of tokens that occurred, seen (B, V), made smaller: divided by penalty (B, 1), or where they are negative multiplied by it.

    Keskar et al. 2019, "CTRL", section 4.1; as published it divides negative ones too, which would make them likelier.
    """
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: np.ndarray, k: np.ndarray) -> np.ndarray:
    """All but the k (B,) largest of each row at -inf; of equals the first ones stay, so that k are left."""
    least = np.take_along_axis(np.sort(logits, axis=1), logits.shape[1] - k[:, None], axis=1)  # (B, 1)
    above, equal = logits > least, logits == least
    room = k[:, None] - above.sum(axis=1, keepdims=True)
    return np.where(above | (equal & (equal.cumsum(axis=1) <= room)), logits, -np.inf)


def top_p(logits: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-inf outside the nucleus: the fewest likeliest tokens that reach probability p (B,) (Holtzman et al. 2020, section 3.1)."""
    falling = np.sort(softmax(logits), axis=1)[:, ::-1].astype(np.float64)
    before = falling.cumsum(axis=1) - falling  # the likeliest has 0 before it and always stays
    return top_k(logits, (before < p[:, None]).sum(axis=1))


def min_p(logits: np.ndarray, p: np.ndarray) -> np.ndarray:
    """-inf for tokens less than p (B,) times as likely as the likeliest (Nguyen et al. 2024, section 3)."""
    probabilities = softmax(logits)
    return np.where(probabilities < p[:, None] * probabilities.max(axis=1, keepdims=True), -np.inf, logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(B, V) -> (B, V), rows that add up to 1."""
    weights = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))
    return weights / np.add.reduce(weights, axis=1, keepdims=True)


def draw(logits: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """The token (B,) of each row on whose share of the probability, laid out from 0 to 1, its chance (B,) falls."""
    weights = np.exp(logits - np.maximum.reduce(logits, axis=1, keepdims=True))  # for one text, what is around a ufunc takes longer than itself
    reached = np.add.accumulate(weights, axis=1, dtype=np.float64)
    return np.add.reduce(reached <= chances[:, None] * reached[:, -1:], axis=1)


def uniforms(seed: int, places: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each of places (N,), a pure function of the seed and the place: what else is drawn, and when, does not matter.

    The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 3).
    """
    key = _mix64(np.array([seed], np.uint64))
    return (_mix64(key + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def _mix64(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # of whole arrays, which wrap at 64 bits
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Draws the next token of B texts at once, each by its own settings: the filters that any of them asks for, in the order of the lines of `filtered`."""

    def __init__(self, settings: Sequence[SamplingConfig], vocab_size: int):
        def column(name: str, off: object, neutral: float) -> np.ndarray | None:
            """The setting of each text, `neutral` where it is off; None where it is off for all."""
            values = [getattr(one, name) for one in settings]
            return None if all(value == off for value in values) else np.array([neutral if value == off else value for value in values])

        self.n = len(settings)
        self.penalty = column("repetition_penalty", 1, 1.0)
        self.k = column("top_k", None, vocab_size)
        self.p = column("top_p", 1, np.inf)
        self.least = column("min_p", 0, 0.0)
        self.bias = np.stack([bias(one, vocab_size) for one in settings]) if any(one.logit_bias or one.allowed is not None for one in settings) else None
        temperature = np.array([one.temperature for one in settings], np.float32)
        self.cold = temperature < COLDEST
        self.any_cold, self.temperature = self.cold.any(), np.where(self.cold, 1, temperature)[:, None].astype(np.float32)

    def filtered(self, logits: np.ndarray, seen: np.ndarray | None) -> np.ndarray:
        """logits (B, V), and which tokens occurred, seen (B, V), where a penalty needs to know -> (B, V)."""
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
        return logits if self.least is None else min_p(logits, self.least)

    def __call__(self, logits: np.ndarray, chances: Sequence[float], seen: np.ndarray | None = None) -> np.ndarray:
        """logits (B, V), a chance in [0, 1) for each text, and `seen` as above -> the tokens, (B,)."""
        logits = self.filtered(logits, seen)
        tokens = draw(logits, np.array(chances))
        return np.where(self.cold, logits.argmax(axis=1), tokens) if self.any_cold else tokens


def bias(settings: SamplingConfig, vocab_size: int) -> np.ndarray:
    """What is added to the logits, (V,) float32: `logit_bias`, and -inf outside of `allowed`."""
    added = np.zeros(vocab_size, np.float32)
    if settings.allowed is not None:
        added[:] = -np.inf
        added[list(settings.allowed)] = 0
    for token, value in settings.logit_bias.items():
        added[token] += value
    return added
