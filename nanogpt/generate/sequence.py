"""Generation requests, the sequences that the engine runs for them, and the outputs of a step."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from nanogpt.config import SamplingConfig
from nanogpt.generate.detokenizer import StreamingDetokenizer
from nanogpt.generate.sampling import uniform_hash
from nanogpt.tokenizer.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled"]

UNIFORMS_CHUNK = 128  # random numbers computed at a time


@dataclass(frozen=True)
class Request:
    """A prompt to continue, and the sampling settings.

    Attributes:
        prompt: Token ids, at least one.
        settings: Sampling settings.
        seed: Seed of the random numbers, 0 <= seed < 2^63.
        num_logprobs: Number of most likely tokens reported with each generated token.
    """

    prompt: list[int]
    settings: SamplingConfig
    seed: int
    num_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The token that one step added to a sequence, and the text that it completed.

    Log-probabilities are in nats and come from the model's own distribution: before temperature
    and filters, and without the tokens that never occurred in training.

    Attributes:
        sequence: The sequence that the token belongs to.
        text: New text, possibly empty: incomplete characters and possible stop strings are held.
        token_id: The new token, or None if the sequence ended without one.
        logprob: Log-probability of the token.
        top_logprobs: The most likely tokens with their log-probabilities, in falling order.
        finish_reason: Why the sequence ended, or None if it continues.
    """

    sequence: "Sequence"
    text: str
    token_id: int | None
    logprob: float
    top_logprobs: list[tuple[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Sequence:
    """The state of one request in the engine.

    Attributes:
        request: The request.
        token_ids: Prompt and generated tokens.
        window_start: Index in `token_ids` of the first token that the model sees.
        slot: Slot of the decoder's KV cache, -1 while the sequence waits.
        needs_prefill: True if the slot does not hold the tokens of the window.
        is_cancelled: True if the next step must evict the sequence.
        detokenizer: Converts generated tokens to text.
        token_seen: Tokens that occurred, (V,) bool, or None without a repetition penalty.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self.request = request
        self.token_ids = list(request.prompt)
        self.window_start = 0
        self.slot = -1
        self.needs_prefill = True
        self.is_cancelled = False
        self.detokenizer = StreamingDetokenizer(tokenizer, request.settings.stop)
        self.token_seen: np.ndarray | None = None
        if request.settings.repetition_penalty != 1:
            self.token_seen = np.zeros(tokenizer.vocab_size, bool)
            self.token_seen[self.token_ids] = True
        self._uniforms: list[float] = []

    @property
    def num_generated(self) -> int:
        """The number of generated tokens."""
        return len(self.token_ids) - len(self.request.prompt)

    @property
    def window(self) -> list[int]:
        """The tokens that the model sees."""
        return self.token_ids[self.window_start :]

    def uniforms(self, n: int) -> list[float]:
        """Return the random numbers in [0, 1) that sample the next `n` tokens."""
        while len(self._uniforms) < self.num_generated + n:
            start = len(self._uniforms)
            counters = np.arange(start, start + UNIFORMS_CHUNK)
            self._uniforms += uniform_hash(self.request.seed, counters).tolist()
        return self._uniforms[self.num_generated : self.num_generated + n]

    def slide_window(self, context_length: int) -> None:
        """Keep only the last half of the context if the window has outgrown it."""
        if len(self.token_ids) - self.window_start > context_length:
            self.window_start = len(self.token_ids) - max(1, context_length // 2)
            self.needs_prefill = True

    def append(
        self, token_id: int, logprob: float, top_logprobs: list[tuple[int, float]]
    ) -> StepOutput:
        """Append a generated token; return its text and, if it is the last, the finish reason."""
        self.token_ids.append(token_id)
        if self.token_seen is not None:
            self.token_seen[token_id] = True
        text = self.detokenizer.add(token_id)
        finish_reason: FinishReason | None = None
        if self.detokenizer.finished:
            finish_reason = "stop"
        elif self.num_generated == self.request.settings.max_tokens:
            text += self.detokenizer.flush()
            finish_reason = "length"
        return StepOutput(self, text, token_id, logprob, top_logprobs, finish_reason)

    def cancel(self) -> None:
        """Request that the next step evicts the sequence."""
        self.is_cancelled = True
