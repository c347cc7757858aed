"""Several decode steps of a single sequence in one call of the decoder ("multi-step" in vLLM).

This is not speculative decoding: the same weights run every step. A call returns the logits of
all steps, the engine samples each token from them, and the decoder rolls back at the first token
that it had sampled otherwise. The results are those of single steps, bit for bit.
"""

from dataclasses import dataclass, field

import numpy as np

from nanogpt.generate.decoder import MultiStepDecoder
from nanogpt.generate.sampling import MIN_TEMPERATURE, make_logit_bias
from nanogpt.generate.sequence import Sequence


@dataclass
class ModelOutput:
    """The logits of a step and the rows they belong to.

    Attributes:
        sequences: The sequence of each row; in a multi-step call, the same one in all rows.
        uniforms: The random number that samples each row's token.
        logits: (B, V) float32.
        decoded: Tokens that a multi-step call has sampled and appended itself: `decoded[i]` is
            its choice for row `i`. The last row has none.
    """

    sequences: list[Sequence]
    uniforms: list[float]
    logits: np.ndarray
    decoded: list[int] = field(default_factory=list)


class MultiStepRunner:
    """Runs multi-step calls and rolls them back.

    Args:
        decoder: The decoder.
        logit_mask: Added to the logits of all sequences, (V,) float32.
    """

    def __init__(self, decoder: MultiStepDecoder, logit_mask: np.ndarray):
        self.decoder = decoder
        self.logit_mask = logit_mask

    def num_steps(self, sequence: Sequence) -> int:
        """Return the number of steps for the next call, 1 if the sequence needs single steps."""
        s = sequence.request.settings
        has_filters = s.top_k is not None or s.top_p != 1 or s.min_p != 0
        if sequence.needs_prefill or has_filters or s.repetition_penalty != 1:
            return 1  # the decoder samples by temperature only
        num_cached = len(sequence.window) - 1
        return min(
            self.decoder.max_steps,
            s.max_tokens - sequence.num_generated,
            self.decoder.context_length - num_cached,
        )

    def run(self, sequence: Sequence, num_steps: int) -> ModelOutput:
        """Run `num_steps` decode steps in one call."""
        settings = sequence.request.settings
        uniforms = sequence.uniforms(num_steps)
        logits, decoded = self.decoder.decode_steps(
            sequence.slot,
            sequence.token_ids[-1],
            uniforms,
            max(settings.temperature, MIN_TEMPERATURE),
            self.logit_mask + make_logit_bias(settings, len(self.logit_mask)),
        )
        return ModelOutput([sequence] * num_steps, uniforms, logits, decoded)

    def accept(self, output: ModelOutput, row: int, is_finished: bool) -> bool:
        """Return True if the next row is valid after this one's token; roll back if not.

        Args:
            output: The result of `run`.
            row: The row whose token was just appended to the sequence.
            is_finished: True if this token ends the sequence.
        """
        sequence = output.sequences[row]
        num_unchecked = len(output.decoded) - row
        if num_unchecked <= 0 or not (is_finished or sequence.token_ids[-1] != output.decoded[row]):
            return True
        self.decoder.rollback(sequence.slot, num_unchecked)
        return False
