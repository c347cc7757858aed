"""Continuous batching: sequences join, decode one token per step together, and leave.

Follows Yu et al. 2022, "Orca", section 3 (iteration-level scheduling). Each running sequence has a
slot, a row of the decoder's KV cache. Its random numbers are a function of its seed and the index
of the token. So its text does not depend on the rest of the batch, except by rounding, which a
deterministic decoder excludes.

Once the context is full, its last half is prefilled again, so that the average cost of a token
is constant. An engine belongs to one thread.
"""

from collections import deque

import numpy as np

from nanogpt.errors import UserError
from nanogpt.generate.decoder import Decoder, MultiStepDecoder
from nanogpt.generate.multi_step import ModelOutput, MultiStepRunner
from nanogpt.generate.prompts import TokenRanges
from nanogpt.generate.sampling import Sampler
from nanogpt.generate.sequence import FinishReason, Request, Sequence, StepOutput
from nanogpt.tokenizer.tokenizer import Tokenizer


class Engine:
    """A queue of waiting sequences, and up to `decoder.num_slots` running ones.

    Args:
        decoder: The model and its KV cache.
        tokenizer: The model's tokenizer.
        unseen_tokens: Half-open ranges of tokens that never occurred in training; they are never
            sampled.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, unseen_tokens: TokenRanges = ()):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order of their slots
        self.sampler: Sampler | None = None  # for the running sequences
        self.logit_mask = np.zeros(tokenizer.vocab_size, np.float32)  # added to all logits
        for start, stop in unseen_tokens:
            self.logit_mask[start:stop] = -np.inf
        self.multi_step: MultiStepRunner | None = None
        if isinstance(decoder, MultiStepDecoder):
            self.multi_step = MultiStepRunner(decoder, self.logit_mask)

    @property
    def has_work(self) -> bool:
        """True if any sequence is waiting or running."""
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> Sequence:
        """Add a request to the waiting queue.

        Raises:
            UserError: A token id is out of range, or every allowed token is an unseen one.
        """
        assert request.prompt, "a prompt has at least one token"
        settings = request.settings
        allowed = settings.allowed_token_ids
        vocab_size = self.tokenizer.vocab_size
        for token in (*request.prompt, *settings.logit_bias, *(allowed or ())):
            if not 0 <= token < vocab_size:
                raise UserError(f"Token id out of range: {token} (limit {vocab_size - 1}).")
        if allowed is not None and not np.isfinite(self.logit_mask[list(allowed)]).any():
            raise UserError(f"None of the {len(allowed)} allowed tokens occurred in training.")
        sequence = Sequence(request, self.tokenizer)
        self.waiting.append(sequence)
        return sequence

    def step(self) -> list[StepOutput]:
        """Schedule sequences, run the model, and append a token to each running sequence.

        A sequence that runs alone may get several tokens.
        """
        outputs = self._evict_cancelled() + self._admit()
        if self.running:
            outputs += self._postprocess(self._run())
        return outputs

    def _evict_cancelled(self) -> list[StepOutput]:
        cancelled = [seq for seq in (*self.running, *self.waiting) if seq.is_cancelled]
        if cancelled:
            self.waiting = deque(seq for seq in self.waiting if not seq.is_cancelled)
            self._set_running([seq for seq in self.running if not seq.is_cancelled])
        return [self._empty_output(seq, "cancelled") for seq in cancelled]

    @staticmethod
    def _empty_output(seq: Sequence, finish_reason: FinishReason) -> StepOutput:
        return StepOutput(seq, text="", token_id=None, logprob=0.0, finish_reason=finish_reason)

    def _admit(self) -> list[StepOutput]:
        """Move waiting sequences into free slots, the lowest slot first.

        This keeps used slots close together: a decoder may have to compute the free slots between
        them too. A request for 0 tokens finishes here.
        """
        outputs: list[StepOutput] = []
        if not self.waiting:
            return outputs
        used = {seq.slot for seq in self.running}
        free = deque(slot for slot in range(self.decoder.num_slots) if slot not in used)
        while self.waiting and free:
            seq = self.waiting.popleft()
            if seq.request.settings.max_tokens == 0:
                outputs.append(self._empty_output(seq, "length"))
                continue
            seq.slot = free.popleft()
            self._set_running([*self.running, seq])
        return outputs

    def _set_running(self, sequences: list[Sequence]) -> None:
        self.running = sorted(sequences, key=lambda seq: seq.slot)
        self.sampler = None  # It holds the settings of each row; `_sample` makes a new one.

    def _run(self) -> ModelOutput:
        """Run one prefill or decode step of all running sequences, or several of a single one."""
        for seq in self.running:
            seq.slide_window(self.decoder.context_length)
        if self.multi_step is not None and len(self.running) == 1:
            # A sequence alone can take several steps in one call of the decoder, which then gives
            # the logits of each.
            num_steps = self.multi_step.num_steps(self.running[0])
            if num_steps > 1:
                return self.multi_step.run(self.running[0], num_steps)
        # One random number in [0, 1) per sequence decides which token is sampled.
        uniforms = [seq.uniforms(1)[0] for seq in self.running]
        return ModelOutput(self.running, uniforms, self._forward())

    def _forward(self) -> np.ndarray:
        """Return the logits of each running sequence's next token, (B, V)."""
        prefills = [seq for seq in self.running if seq.needs_prefill]
        decodes = [seq for seq in self.running if not seq.needs_prefill]
        logits: dict[Sequence, np.ndarray] = {}
        if decodes:
            slots = [seq.slot for seq in decodes]
            decoded = self.decoder.decode(slots, [seq.token_ids[-1] for seq in decodes])
            if not prefills:
                return decoded
            logits.update(zip(decodes, decoded, strict=True))
        logits |= {seq: self.decoder.prefill(seq.slot, seq.window) for seq in prefills}
        for seq in prefills:
            seq.needs_prefill = False
        return np.stack([logits[seq] for seq in self.running])

    def _postprocess(self, output: ModelOutput) -> list[StepOutput]:
        """Sample a token from each row, append it to its sequence, and drop finished sequences.

        A multi-step call has rows of one sequence, one for each step.
        """
        logits = output.logits  # changed in place
        logits += self.logit_mask
        tokens = self._sample(output)
        # Log-probabilities are logits - log_sums. Ufuncs have less overhead than np.max and np.sum.
        logits -= np.maximum.reduce(logits, axis=1, keepdims=True)
        log_sums = np.log(np.add.reduce(np.exp(logits), axis=1)).tolist()
        outputs: list[StepOutput] = []
        for row, (seq, token) in enumerate(zip(output.sequences, tokens, strict=True)):
            num_logprobs = seq.request.num_logprobs
            top = _top_logprobs(logits[row] - log_sums[row], num_logprobs) if num_logprobs else []
            outputs.append(seq.append(token, logits.item(row, token) - log_sums[row], top))
            # In a multi-step call the decoder chose the token after each row itself. If another
            # one is sampled here, or the sequence ends, the next rows are dropped.
            is_finished = outputs[-1].finish_reason is not None
            if self.multi_step and not self.multi_step.accept(output, row, is_finished):
                break
        finished = {step.sequence for step in outputs if step.finish_reason}
        if finished:
            self._set_running([seq for seq in self.running if seq not in finished])
        return outputs

    def _sample(self, output: ModelOutput) -> list[int]:
        """Sample a token per row by the settings of the row's sequence."""
        num_rows, vocab_size = output.logits.shape
        # The number of rows also changes between single and multi-step calls.
        if self.sampler is None or self.sampler.num_rows != num_rows:
            settings = [seq.request.settings for seq in output.sequences]
            self.sampler = Sampler(settings, vocab_size)
        seen = None
        if self.sampler.penalty is not None:
            none_seen = np.zeros(vocab_size, bool)
            rows = [seq.token_seen for seq in output.sequences]
            seen = np.stack([none_seen if row is None else row for row in rows])
        return self.sampler(output.logits, output.uniforms, seen).tolist()


def _top_logprobs(logprobs: np.ndarray, n: int) -> list[tuple[int, float]]:
    """Return the `n` most likely tokens of log-probabilities (V,), without impossible ones."""
    order = np.argsort(-logprobs, kind="stable")[:n]
    return [(int(token), float(logprobs[token])) for token in order if logprobs[token] > -np.inf]
