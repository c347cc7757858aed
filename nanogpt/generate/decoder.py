"""The decoder interface that the engine drives, and the choice of its implementation."""

from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from nanogpt.device.device import Machine
from nanogpt.device.memory import available_memory
from nanogpt.generate.quantize import Precision
from nanogpt.generate.torch_decoder import TorchDecoder, strip_modules
from nanogpt.model import GPT

# Fraction of the free memory that keys and values may take.
MAX_CACHE_FRACTION = 0.5


class Decoder(Protocol):
    """A model with a KV cache of `num_slots` sequences."""

    num_slots: int
    context_length: int
    vocab_size: int

    def prefill(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """Replace the content of a slot by `ids` and return the next token's logits.

        Args:
            slot: Slot of the cache.
            ids: Token ids, 1 to `context_length`.

        Returns:
            Logits (V,) float32.
        """

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """Append one token to each of several slots and return the next tokens' logits.

        Args:
            slots: Distinct slots in rising order, prefilled and not full.
            ids: One token id per slot.

        Returns:
            Logits (len(slots), V) float32.
        """


@runtime_checkable
class MultiStepDecoder(Decoder, Protocol):
    """A decoder that can run several decode steps of one sequence in a single call.

    It samples the tokens between the steps itself, possibly with other rounding than the engine.
    The engine samples each token again from the logits and rolls back at the first mismatch.
    """

    max_steps: int

    def decode_steps(
        self,
        slot: int,
        token: int,
        uniforms: Sequence[float],
        temperature: float,
        logit_bias: np.ndarray,
    ) -> tuple[np.ndarray, list[int]]:
        """Append `token` to a slot, then T - 1 tokens that are sampled one after another.

        Args:
            slot: Slot of the cache, with space for T tokens.
            token: The first token to append.
            uniforms: Random numbers in [0, 1), one for each of the T steps.
            temperature: Sampling temperature, above 0.
            logit_bias: Added to the logits before sampling, (V,) float32.

        Returns:
            Logits after each appended token, (T, V) float32 without the bias, and the T - 1
            sampled tokens.
        """

    def rollback(self, slot: int, n: int) -> None:
        """Remove the last `n` tokens of a slot."""


def create_decoder(
    model: GPT, machine: Machine, dtype: str = "auto", num_slots: int = 1
) -> Decoder:
    """Return the fastest decoder: Numba's on a CPU where it is installed, else PyTorch's.

    Args:
        model: The model; its weights may be shared with the decoder.
        machine: The device to decode on.
        dtype: Precision of the weights; `auto` is int8 on a CPU and the device's own elsewhere.
        num_slots: Sequences to decode at once; fewer if their KV cache would exceed half of the
            free memory.
    """
    c = model.config
    # The kernels assume that the heads together are as wide as the model.
    use_numba = (
        machine.device.type == "cpu"
        and c.n_head * c.head_size == c.n_embd
        and numba_missing_reason() is None
    )
    precision = cast(Precision, "int8" if dtype == "auto" else dtype)
    element_bytes = 1 if use_numba and precision == "int8" else 4
    kv_channels = c.num_kv_heads * c.head_size
    slot_bytes = 2 * c.n_layer * c.context_length * kv_channels * element_bytes
    free = available_memory(machine.device)
    if free is not None:
        num_slots = min(num_slots, max(1, int(free * MAX_CACHE_FRACTION / slot_bytes)))
    if use_numba:
        from nanogpt.generate.numba_kernels.decoder import NumbaDecoder

        return NumbaDecoder(model, precision, num_slots, machine.threads)
    machine = machine.for_decoding() if dtype == "auto" else machine
    if machine.device.type != "cpu":
        precision = cast(Precision, str(machine.dtype).removeprefix("torch."))
    model = strip_modules(model, precision)
    return TorchDecoder(model, machine, num_slots, machine.deterministic)


def startup_notice(machine: Machine) -> str | None:
    """Return a notice if the decoder compiles at its first use or could be faster, else None."""
    if machine.device.type != "cpu":
        return None
    if reason := numba_missing_reason():
        return reason
    from nanogpt.generate.numba_kernels import microkernel

    if any(microkernel.cache_folder().rglob("*.nbi")):
        return None
    return "Compiling kernels for this processor: about 20 seconds, once."


def numba_missing_reason() -> str | None:
    """Return why Numba cannot be used and how to fix it, or None if it can."""
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        return "Numba makes generation several times faster: pip install 'nanogpt[fast]'"
    except ImportError as error:  # for example, if NumPy is too new for it
        return f"Numba would make generation several times faster, but does not start: {error}"
    return None
