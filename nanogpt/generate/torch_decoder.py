"""The reference decoder in PyTorch, for every device."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.device.device import Machine
from nanogpt.generate.quantize import Precision, make_linear
from nanogpt.model import GPT, KVCache


class TorchDecoder:
    """Runs a model with `torch`, with a KV cache of `num_slots` sequences.

    Args:
        model: The model, or a copy of it by `strip_modules`.
        machine: The device to run on.
        num_slots: Sequences that the KV cache holds.
        deterministic: Decode each sequence by itself, so that the results do not depend on the
            rest of the batch; slower.
    """

    def __init__(
        self, model: GPT, machine: Machine, num_slots: int = 1, deterministic: bool = False
    ):
        self.model = model
        self.machine = machine
        self.num_slots = num_slots
        self.deterministic = deterministic
        self.context_length = model.config.context_length
        self.vocab_size = model.vocab_size
        self.cache = KVCache.empty(model.config, num_slots, machine.device, machine.dtype)
        # The prompt that each slot was prefilled with, and the logits after it.
        self.prefill_cache: list[tuple[tuple[int, ...], np.ndarray] | None] = [None] * num_slots

    def prefill(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """Implement `Decoder.prefill`; a prompt that another slot holds is copied from there."""
        ids = tuple(ids)
        entries = enumerate(self.prefill_cache)
        cached_row = next((row for row, entry in entries if entry and entry[0] == ids), None)
        if cached_row is None:
            self.cache.lengths[slot] = 0
            # Set only after the forward pass, which an interrupt may end.
            self.prefill_cache[slot] = None
            logits = self._forward([ids], slot)[0]
            self.prefill_cache[slot] = ids, logits
            return logits.copy()
        for buffer in (self.cache.k, self.cache.v):
            buffer[:, slot, :, : len(ids)] = buffer[:, cached_row, :, : len(ids)]
        self.cache.lengths[slot] = len(ids)
        cached = self.prefill_cache[slot] = self.prefill_cache[cached_row]
        assert cached is not None
        return cached[1].copy()

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """Implement `Decoder.decode`."""
        if self.deterministic:
            pairs = zip(slots, ids, strict=True)
            return np.concatenate([self._forward([[token]], slot) for slot, token in pairs])
        start = slots[0]
        stop = slots[-1] + 1
        if len(slots) == stop - start:
            return self._forward([[token] for token in ids], start)
        # Selecting slots would copy the cache. The slots between are computed too: their lengths
        # stay, and the tokens written past them are ignored.
        padded = np.zeros((stop - start, 1), np.int64)
        rows = np.subtract(slots, start)
        padded[rows, 0] = ids
        lengths = self.cache.lengths[start:stop]
        other_rows = np.delete(np.arange(stop - start), rows)
        other_lengths = lengths[other_rows]
        # A full slot takes no further tokens, so its last one may be overwritten.
        lengths[other_rows] = np.minimum(other_lengths, self.context_length - 1)
        logits = self._forward(padded, start)[rows]
        lengths[other_rows] = other_lengths
        return logits

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]] | np.ndarray, slot: int) -> np.ndarray:
        """Append ids (B, T) to the B slots from `slot` on and return the logits (B, V)."""
        idx = torch.tensor(ids, device=self.machine.device)
        with self.machine.autocast():
            logits = self.model.last_token_logits(idx, self.cache[slot : slot + len(idx)])
            return logits.float().cpu().numpy()


def strip_modules(model: GPT, precision: Precision = "float32") -> GPT:
    """Return the same network with the layers of its blocks replaced by plain functions.

    For a single token, calling modules costs a fifth of the time. Linear layers compute in
    `precision`, with weights copied to it once: `Machine.autocast` would cast them for every
    token. float32 weights are shared. Keys and values are not quantized.
    """
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    logits: Any = make_linear(model.head_weight(), None, precision)
    model.compute_logits = logits  # type: ignore[method-assign]
    for module in list(model.blocks.modules()):
        # The wrapper that `fake_quantize` installs would call the layers of the original model.
        module.__dict__.pop("project_qkv", None)
        for name, layer in list(module.named_children()):
            function = _layer_function(layer, precision)
            if function is not None:
                delattr(module, name)
                setattr(module, name, function)
    return model


def _layer_function(layer: nn.Module, precision: Precision) -> Callable[[Tensor], Tensor] | None:
    """Return the function that a layer computes, or None if it is not a linear layer or norm."""
    if isinstance(layer, nn.Linear):
        return make_linear(layer.weight, layer.bias, precision)
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        norm: Callable[..., Tensor] = torch.rms_norm
        parameters: dict[str, Any] = {"weight": layer.weight, "eps": layer.eps}
        if isinstance(layer, nn.LayerNorm):
            norm = torch.layer_norm
            parameters["bias"] = layer.bias
        return partial(norm, normalized_shape=layer.normalized_shape, **parameters)
    return None
