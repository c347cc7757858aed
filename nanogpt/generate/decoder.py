"""A model that continues several texts: what the engine asks of one, and the one that PyTorch runs.

In: token ids, for each text in its own row. Out: logits of the token that follows. A row that is full can only be begun anew.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from nanogpt.generate.quantize import Precision, head_matrix, product
from nanogpt.machine import Machine, free_memory
from nanogpt.model import GPT, KVCache


class Decoder(Protocol):
    """A model and room for the keys and values of several texts, one in each row."""

    rows: int
    context_length: int
    vocab_size: int

    def prefill(self, row: int, ids: Sequence[int]) -> np.ndarray:
        """Begin the row anew with ids, 1 to context_length of them -> (V,) float32, the logits of what follows."""
        ...

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """One more id for each of the rows, which are different ones, begun and not full, in rising order -> (len(rows), V) float32."""
        ...


@runtime_checkable
class Drafter(Decoder, Protocol):
    """A decoder that goes on with a text by itself for some tokens, faster than when it is told each; who draws them says which were right.

    Its own drawing may round otherwise, and so what comes out does not depend on it (Leviathan et al. 2023, "Speculative decoding": guess, then verify).
    """

    ahead: int  # the most tokens in a call

    def draft(self, row: int, token: int, chances: Sequence[float], temperature: float, added: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Read `token` in a row, and then, but for the last, what each of the chances (T,) draws: from the logits with `added` (V,) float32, by temperature.

        -> the logits (T, V) float32 from which they are drawn, without what is added, and the T - 1 tokens that were read.
        """
        ...

    def take_back(self, row: int, n: int) -> None:
        """Have the last n tokens that the row holds not be read."""
        ...


class TorchDecoder:
    """The reference, on any device. With `deterministic`, a row is computed as if it were alone: slower, but what else is there changes no bit of it."""

    def __init__(self, model: GPT, machine: Machine, rows: int = 1, deterministic: bool = False):
        self.model, self.machine, self.rows, self.deterministic = model, machine, rows, deterministic
        self.context_length, self.vocab_size = model.config.context_length, model.vocab_size
        self.cache = KVCache.empty(model.config, rows, machine.device, machine.dtype)
        self.begun: list[tuple[tuple[int, ...], np.ndarray] | None] = [None] * rows  # with which ids, and what logits followed

    def prefill(self, row: int, ids: Sequence[int]) -> np.ndarray:
        """As in `Decoder`."""
        ids = tuple(ids)
        same = next((other for other, begun in enumerate(self.begun) if begun is not None and begun[0] == ids), None)
        if same is None:
            self.cache.lengths[row], self.begun[row] = 0, None  # until it is read: an interrupt may come between
            self.begun[row] = ids, self._read([ids], row)[0]
        else:  # texts of one prompt share the reading of it
            for part in (self.cache.k, self.cache.v):
                part[:, row, :, : len(ids)] = part[:, same, :, : len(ids)]
            self.cache.lengths[row], self.begun[row] = len(ids), self.begun[same]
        return self.begun[row][1].copy()  # type: ignore[index]

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """As in `Decoder`."""
        if self.deterministic:
            return np.concatenate([self._read([[token]], row) for row, token in zip(rows, ids, strict=True)])
        first, behind = rows[0], rows[-1] + 1
        if len(rows) == behind - first:
            return self._read([[token] for token in ids], first)
        # To cut others out of the cache would copy it, so rows between the first and the last are computed along, behind what they hold, which stays.
        new, places, lengths = np.zeros((behind - first, 1), np.int64), np.subtract(rows, first), self.cache.lengths[first:behind]
        new[places, 0] = ids
        others = np.delete(np.arange(behind - first), places)
        held = lengths[others]
        lengths[others] = np.minimum(held, self.context_length - 1)  # a full row is never gone on with
        logits = self._read(new, first)[places]
        lengths[others] = held
        return logits

    @torch.inference_mode()
    def _read(self, ids: Sequence[Sequence[int]] | np.ndarray, first: int) -> np.ndarray:
        """ids (B, T) behind what the B rows from `first` on hold -> (B, V)."""
        idx = torch.tensor(ids, device=self.machine.device)
        with self.machine.autocast():
            return self.model.next_logits(idx, self.cache[first : first + len(idx)]).float().cpu().numpy()


def bare(model: GPT, precision: Precision = "float32") -> GPT:
    """The same network, whose blocks' layers are just the functions that they call: for one row of tokens, what PyTorch does around a function to make it a
    module takes a fifth of the time.

    Products are in `precision`, with which the weights are copies, but for float32: `Machine.autocast` would cast all of them anew for every token. Keys and
    values stay as they come, also of a `dequantized` model.
    """
    model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    model.logits = product(head_matrix(model), None, precision)  # type: ignore[method-assign, assignment]
    for module in list(model.blocks.modules()):
        module.__dict__.pop("heads", None)  # that of `dequantized` would call the layers of the other network
        for name, layer in list(module.named_children()):
            function: Callable[[Tensor], Tensor]
            if isinstance(layer, nn.Linear):
                function = product(layer.weight, layer.bias, precision)
            elif isinstance(layer, nn.LayerNorm):
                function = partial(torch.layer_norm, normalized_shape=layer.normalized_shape, weight=layer.weight, bias=layer.bias, eps=layer.eps)
            elif isinstance(layer, nn.RMSNorm):
                function = partial(torch.rms_norm, normalized_shape=layer.normalized_shape, weight=layer.weight, eps=layer.eps)
            else:
                continue
            delattr(module, name)
            setattr(module, name, function)
    return model


def open_decoder(model: GPT, machine: Machine, dtype: str = "auto", rows: int = 1) -> Decoder:
    """The fastest decoder for the machine: on a CPU the one that Numba compiles, where it is installed, else PyTorch's. `dtype` is that of the settings;
    auto is int8 on a CPU.

    It has fewer rows where the keys and values of so many would take more than half of the memory that is free.
    """
    c, fast = model.config, machine.device.type == "cpu" and without_numba() is None
    precision = cast(Precision, "int8" if dtype == "auto" else dtype)
    row = 2 * c.n_layer * c.context_length * (c.n_kv_head or c.n_head) * (c.n_embd // c.n_head) * (1 if fast and precision == "int8" else 4)  # bytes
    free = free_memory(machine.device)
    rows = rows if free is None else min(rows, max(1, int(free / 2 / row)))
    if fast:
        from nanogpt.generate.fast import FastDecoder

        return FastDecoder(model, precision, rows, machine.threads)
    machine = machine.for_single_rows() if dtype == "auto" else machine
    if machine.device.type != "cpu":
        precision = cast(Precision, str(machine.dtype).removeprefix("torch."))
    return TorchDecoder(bare(model, precision), machine, rows, machine.deterministic)


def remark(machine: Machine) -> str | None:
    """What a person should know of the decoder that `open_decoder` gives: that its first token takes long, or what would make it faster."""
    if machine.device.type != "cpu":
        return None
    if reason := without_numba():
        return reason
    from nanogpt.generate import tile

    return None if any(tile.kept_in().rglob("*.nbi")) else "Compiling for this processor, which is kept for the next time: about 20 seconds."


def without_numba() -> str | None:
    """Why Numba is not used, for a person to read; None where it is."""
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        return "It would write several times as fast with Numba: pip install 'nanogpt[fast]'"
    except ImportError as error:  # it refuses, say, a NumPy that is newer than it knows
        return f"It would write several times as fast, but Numba does not start: {error}"
    return None
