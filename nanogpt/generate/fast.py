"""A decoder that Numba compiles for the processor at hand: many times as fast as PyTorch, whose products of one row take longer to begin than to do.

In: a model, a precision, rows, threads. Out: a `Decoder`. Refuses: to be imported without Numba (`decoder.without_numba`).

A text comes out the same, bit for bit, whatever the other rows hold and whether its tokens are read at once or one by one: see `kernels`.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.generate import kernels
from nanogpt.generate.quantize import Precision, head_matrix, rounded
from nanogpt.model import EPSILON, GPT, Block, turns

WORTH_SHARING = 100_000  # multiply-adds in a stage: sharing them among threads takes 2 us (measured, two cores), in which one thread does half of them
AT_ONCE = 256  # tokens of a prompt: what goes from layer to layer stays in the processor's cache
AHEAD, AHEAD_BYTES = 16, 300e6  # the most tokens that a text drafts in a call, and weights that are read for it: within some 10 ms, since others may come


class FastDecoder:
    """Room for `rows` texts, whose next tokens `threads` CPU threads compute together, with weights of `precision`. The model is only read, to build it."""

    _together = threading.Lock()  # of all decoders in the process: Numba's threads do one thing at a time

    def __init__(self, model: GPT, precision: Precision, rows: int = 1, threads: int = 1):
        config, P = model.config, kernels.PANEL
        self.rows, self.context_length, self.vocab_size = rows, config.context_length, model.vocab_size
        self.threads = min(threads, kernels.most_threads())
        self.lengths = [0] * rows
        kv_heads, D = config.n_kv_head or config.n_head, config.n_embd // config.n_head
        window = min(config.window or config.context_length, config.context_length)
        epsilon = np.float32(EPSILON if config.arch == "modern" else cast(nn.LayerNorm, model.ln_f).eps)
        self._shape = kernels.Shape(config.arch == "modern", config.n_head, kv_heads, D, window, epsilon)
        self._weights = packed(model, precision)
        self.ahead = max(1, min(AHEAD, int(AHEAD_BYTES / sum(getattr(self._weights, name).nbytes for name in kernels.MATRICES))))
        self._draws = kernels.Draws(np.float32(1), np.zeros(self.vocab_size, np.float32), np.zeros(0), np.zeros(self.vocab_size, np.float32))
        self._stage = sum(getattr(self._weights, name).size for name in kernels.MATRICES) / (5 * config.n_layer + 1)  # multiply-adds in one, for a token
        S = -(-config.context_length // P) * P
        kept, in_pairs = (np.int8, 2) if precision == "int8" else (np.float32, 1)
        of_heads = config.n_layer, rows, kv_heads
        keys, values = ((*of_heads, outputs // P, -(-inputs // in_pairs), in_pairs * P) for outputs, inputs in ((S, D), (-(-D // P) * P, S)))
        self._cache = kernels.Cache(np.zeros(keys, kept), np.ones((*of_heads, S), np.float32), np.zeros(values, kept), np.ones((*of_heads, S), np.float32))
        self._work = self._room(max(min(AT_ONCE, config.context_length), rows), S, np.int16 if precision == "int8" else np.float32)
        with interrupts_held():  # this compiles, or reads what was compiled
            self.prefill(0, [0])

    def prefill(self, row: int, ids: Sequence[int]) -> np.ndarray:
        """Begin the row anew with ids, 1 to context_length of them -> (V,) float32, the logits of what follows."""
        for begin in range(0, len(ids), AT_ONCE):
            part = ids[begin : begin + AT_ONCE]
            self.lengths[row] = begin
            logits = self._read([row], [0, len(part)], part)
        return logits[0]

    def decode(self, rows: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """One more id for each of the rows, which are different ones, begun and not full -> (len(rows), V) float32."""
        return self._read(rows, range(len(rows) + 1), ids)

    def draft(self, row: int, token: int, chances: Sequence[float], temperature: float, added: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """As in `Drafter`."""
        T, tokens = len(chances), np.array([token, *[0] * (len(chances) - 1)], np.int64)
        assert self.ahead >= T, "more tokens than there is room for"
        assert self.lengths[row] + T <= self.context_length, "more tokens than the context holds"
        draws = kernels.Draws(np.float32(temperature), added, np.array(chances[:-1], np.float64), self._draws.shares)
        logits = self._run(kernels.Texts(np.array([row]), np.array([0, 1]), np.array([self.lengths[row]])), tokens, draws)
        self.lengths[row] += T
        return logits, tokens[1:].tolist()

    def take_back(self, row: int, n: int) -> None:
        """As in `Drafter`."""
        self.lengths[row] -= n

    def _read(self, rows: Sequence[int], starts: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """Several ids behind what one row holds, or one behind what each of several holds: ids[starts[m] : starts[m + 1]] for rows[m] -> (len(rows), V)."""
        assert 0 <= min(ids) <= max(ids) < self.vocab_size, "no token of this model"
        past = [self.lengths[row] for row in rows]
        for m, row in enumerate(rows):
            self.lengths[row] += starts[m + 1] - starts[m]
            assert self.lengths[row] <= self.context_length, "more tokens than the context holds"
        texts = kernels.Texts(np.array(rows, np.int64), np.array(starts, np.int64), np.array(past, np.int64))
        return self._run(texts, np.array(ids, np.int64), self._draws)

    def _run(self, texts: kernels.Texts, tokens: np.ndarray, draws: kernels.Draws) -> np.ndarray:
        """`kernels.read`, by as many threads as it is worth -> its logits."""
        alone = self.threads == 1 or texts.starts[-1] * self._stage < WORTH_SHARING
        with nullcontext() if alone else self._together:
            kernels.use_threads(self.threads)
            kernels.read(self._shape, self._weights, self._cache, texts, tokens, draws, 1 if alone else self.threads, self._work)
        return self._work.logits[: len(texts.rows) + len(draws.chances), : self.vocab_size].copy()

    def _room(self, N: int, S: int, numbers: type) -> kernels.Work:
        """Room for what passes over up to N tokens make, of S positions, and of these numbers to multiply."""
        w, shape = self._weights, self._shape
        C, heads = w.embedding.shape[1], shape.n_head * (shape.head_dim + shape.head_dim % 2)

        def rows(*shape: int, kind: type = np.float32) -> np.ndarray:
            return np.zeros(shape, kind)

        return kernels.Work(
            x=rows(N, w.proj_after.shape[2]),
            normed=rows(N, max(C + C % 2, heads), kind=numbers),
            normed_scales=rows(N),
            qkv=rows(N, w.qkv_after.shape[2]),
            mixed=rows(N, C),
            mixed_numbers=rows(N, C + C % 2, kind=numbers),
            mixed_scales=rows(N),
            hidden=rows(N, w.fc_after.shape[2]),
            hidden_numbers=rows(N, w.fc_after.shape[2] // (1 + shape.modern), kind=numbers),
            hidden_scales=rows(N),
            logits=rows(max(N, self.ahead), w.head_after.shape[1]),
            scores=rows(self.threads, kernels.BLOCK, S),
            shares=rows(self.threads, kernels.BLOCK, S, kind=numbers),
            scales=rows(self.threads, 2, kernels.BLOCK),
            mix=rows(self.threads, kernels.BLOCK, kernels.PANEL),
            counts=rows(self.ahead * (len(w.qkv) * kernels.HEAD + 3), kernels.COUNTS, kind=np.int64),
        )


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Have Ctrl-C wait until the block has ended, for LLVM does not survive an exception. A second one ends the process."""
    if threading.current_thread() is not threading.main_thread():  # where none arrives
        yield
        return
    pressed: list[int] = []

    def note(number: int, frame: object) -> None:
        if pressed:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@torch.no_grad()
def packed(model: GPT, precision: Precision) -> kernels.Weights:
    """The model's weights, the matrices rounded and in panels, in the order in which they are read."""
    config, blocks = model.config, cast(list[Block], list(model.blocks))
    C, D = config.n_embd, config.n_embd // config.n_head
    norms: list[Any] = [norm for block in blocks for norm in (block.ln_1, block.ln_2)] + [model.ln_f]
    head = rounded(head_matrix(model), precision)
    if config.arch == "modern":
        embedding, positions = F.rms_norm(model.wte.weight, (C,), eps=EPSILON), torch.zeros(config.context_length, C)
        turn = turns(torch.arange(config.context_length), D, config.rope_base)
        head_norms = torch.stack([torch.stack([block.attn.q_norm.weight, block.attn.k_norm.weight]) for block in blocks])
    else:
        embedding, positions = head[0].float() * head[1][:, None], model.wpe.weight
        turn, head_norms = torch.zeros(2, 0, 0), torch.zeros(len(blocks), 2, D)
    tensors = {"embedding": embedding, "positions": positions, "turn": turn, "head_norms": head_norms}
    tensors["norms"] = torch.stack([torch.stack([norm.weight, torch.zeros(C) if config.arch == "modern" else norm.bias]) for norm in norms])
    layers: dict[str, list[nn.Linear]] = {"qkv": [], "proj": [], "fc": [], "mlp_proj": []}
    for block in blocks:
        for kind, layer in zip(layers, (block.attn.qkv, block.attn.proj, block.mlp.fc, block.mlp.proj), strict=True):
            layers[kind].append(layer)
    for kind, of_blocks in layers.items():
        parts = 2 if kind == "fc" and config.arch == "modern" else 1  # gates and values
        of_all = [panels(*rounded(layer.weight, precision), layer.bias, parts) for layer in of_blocks]
        tensors[kind], tensors[f"{kind}_after"] = (torch.stack(part) for part in zip(*of_all, strict=True))
    tensors["head"], tensors["head_after"] = panels(*head, None)
    return kernels.Weights(**{name: as_numpy(tensor) for name, tensor in tensors.items()})


def panels(weight: Tensor, scale: Tensor, bias: Tensor | None, parts: int = 1) -> tuple[Tensor, Tensor]:
    """A matrix (N, K) as panels (P, K, 64), or of int8 (P, K / 2, 128), and its scale and bias (2, 64 P); so many parts of the outputs, all of one width,
    each in panels of its own."""
    bias = torch.zeros(len(weight)) if bias is None else bias
    missing, together = -(len(weight) // parts) % kernels.PANEL, 2 if weight.dtype == torch.int8 else 1
    outputs = [F.pad(part, (0, weight.shape[1] % together, 0, missing)) for part in weight.chunk(parts)]  # (64 P / parts, K) each
    after = [F.pad(part, (0, missing)) for part in torch.stack([scale, bias]).chunk(parts, dim=1)]
    paneled = torch.cat(outputs).unflatten(0, (-1, kernels.PANEL)).unflatten(2, (-1, together))  # (P, 64, K / together, together)
    return paneled.transpose(1, 2).flatten(2), torch.cat(after, dim=1)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A copy, contiguous; of a bfloat16 its 16 bits, since NumPy has no such type."""
    own = tensor.clone(memory_format=torch.contiguous_format)
    return own.view(torch.uint16).numpy() if own.dtype == torch.bfloat16 else own.numpy()
