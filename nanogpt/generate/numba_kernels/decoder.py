"""A decoder for CPUs with compiled kernels, much faster than PyTorch at small batch sizes.

At batch size 1, PyTorch's call overhead exceeds its computation. The results of a sequence do not
depend on the rest of the batch, nor on how its tokens are split over calls (see `kernels`).
Import this module only if Numba is installed (see `numba_missing_reason`).
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.generate.numba_kernels import kernels, structs
from nanogpt.generate.numba_kernels.microkernel import NR
from nanogpt.generate.quantize import Precision, quantize
from nanogpt.model import GPT, RMS_NORM_EPS, Block, rope_cos_sin

# Multiply-adds of a stage from which on several threads pay: sharing a stage costs 2 us.
MIN_PARALLEL_MACS = 100_000
# Prompt tokens per forward pass, so that activations stay in the processor's cache.
PREFILL_CHUNK = 256
# Limits of a multi-step call, about 10 ms, because new requests wait for it: decode steps, and
# bytes of weights that they read.
MAX_STEPS_PER_CALL = 16
MAX_BYTES_PER_CALL = 300e6


class NumbaDecoder:
    """Runs a model with compiled kernels; implements `MultiStepDecoder`.

    Args:
        model: The model, which is only read.
        precision: Precision of the weights; with int8, keys and values are int8 too.
        num_slots: Sequences that the KV cache holds.
        threads: Threads that compute each step together.
    """

    # Numba's thread pool runs one parallel kernel at a time in a process.
    _thread_lock = threading.Lock()

    def __init__(self, model: GPT, precision: Precision, num_slots: int = 1, threads: int = 1):
        config = model.config
        self.num_slots = num_slots
        self.context_length = config.context_length
        self.vocab_size = model.vocab_size
        self.threads = min(threads, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        self.lengths = [0] * num_slots  # cached tokens of each slot
        is_qwen3 = config.arch == "qwen3"
        self.shape = structs.ModelShape(
            is_qwen3=is_qwen3,
            n_head=config.n_head,
            n_kv_head=config.num_kv_heads,
            head_dim=config.head_size,
            window=min(config.sliding_window or config.context_length, config.context_length),
            norm_eps=np.float32(RMS_NORM_EPS if is_qwen3 else cast(nn.LayerNorm, model.ln_f).eps),
        )
        self.weights = pack_weights(model, precision)
        matrices = [getattr(self.weights, name) for name in structs.MATRICES]
        max_steps = int(MAX_BYTES_PER_CALL / sum(matrix.nbytes for matrix in matrices))
        self.max_steps = max(1, min(MAX_STEPS_PER_CALL, max_steps))
        # Average multiply-adds per token of a stage; a layer has four matmuls and attention.
        num_stages = 5 * config.n_layer + 1
        self.macs_per_stage = sum(matrix.size for matrix in matrices) / num_stages
        no_bias, probs = np.zeros((2, self.vocab_size), np.float32)
        self.no_sampling = structs.SamplingInputs(np.float32(1), no_bias, np.zeros(0), probs)
        self.cache = self.alloc_cache(precision)
        self.workspace = self.alloc_workspace(precision)
        with defer_sigint():  # compiles the kernels, or loads them from the cache
            self.prefill(0, [0])

    def prefill(self, slot: int, ids: Sequence[int]) -> np.ndarray:
        """Implement `Decoder.prefill`."""
        for start in range(0, len(ids), PREFILL_CHUNK):
            chunk = ids[start : start + PREFILL_CHUNK]
            self.lengths[slot] = start
            logits = self._forward_batch([slot], [0, len(chunk)], chunk)
        return logits[0]

    def decode(self, slots: Sequence[int], ids: Sequence[int]) -> np.ndarray:
        """Implement `Decoder.decode`."""
        return self._forward_batch(slots, range(len(slots) + 1), ids)

    def decode_steps(
        self,
        slot: int,
        token: int,
        uniforms: Sequence[float],
        temperature: float,
        logit_bias: np.ndarray,
    ) -> tuple[np.ndarray, list[int]]:
        """Implement `MultiStepDecoder.decode_steps`."""
        num_steps = len(uniforms)
        assert num_steps <= self.max_steps, "more steps than the workspace holds"
        length = self.lengths[slot]
        assert length + num_steps <= self.context_length, "more tokens than the context holds"
        tokens = np.zeros(num_steps, np.int64)
        tokens[0] = token
        probs, drawn = self.no_sampling.probs, np.array(uniforms[:-1], np.float64)
        sampling = structs.SamplingInputs(np.float32(temperature), logit_bias, drawn, probs)
        layout = structs.BatchLayout(tokens, np.array([slot]), np.array([0, 1]), np.array([length]))
        logits = self._forward(layout, sampling)
        self.lengths[slot] += num_steps
        return logits, tokens[1:].tolist()

    def rollback(self, slot: int, n: int) -> None:
        """Implement `MultiStepDecoder.rollback`."""
        self.lengths[slot] -= n

    def _forward_batch(
        self, slots: Sequence[int], starts: Sequence[int], ids: Sequence[int]
    ) -> np.ndarray:
        """Append ids[starts[m] : starts[m + 1]] to slots[m] and return logits (len(slots), V).

        There are several ids of one slot, or one of each of several slots.
        """
        assert 0 <= min(ids) <= max(ids) < self.vocab_size, "no token of this model"
        num_cached = [self.lengths[slot] for slot in slots]
        for m, slot in enumerate(slots):
            self.lengths[slot] += starts[m + 1] - starts[m]
            assert self.lengths[slot] <= self.context_length, "more tokens than the context holds"
        arrays = (np.array(values, np.int64) for values in (ids, slots, starts, num_cached))
        return self._forward(structs.BatchLayout(*arrays), self.no_sampling)

    def _forward(self, layout: structs.BatchLayout, sampling: structs.SamplingInputs) -> np.ndarray:
        """Call `kernels.forward` with the threads that the batch is worth; return the logits."""
        single = self.threads == 1 or layout.starts[-1] * self.macs_per_stage < MIN_PARALLEL_MACS
        batch = structs.Batch(
            self.shape, self.weights, self.cache, layout, sampling, self.workspace
        )
        with nullcontext() if single else self._thread_lock:
            kernels.set_threads(self.threads)
            kernels.forward(batch, 1 if single else self.threads)
        num_rows = len(layout.slots) + len(sampling.uniforms)
        return self.workspace.logits[:num_rows, : self.vocab_size].copy()

    def alloc_workspace(self, precision: Precision) -> structs.Workspace:
        """Allocate the buffers of a forward pass."""
        w = self.weights
        head_dim = self.shape.head_dim
        N = max(min(PREFILL_CHUNK, self.context_length), self.num_slots)
        S = _round_up(self.context_length, NR)
        C = w.embedding.shape[1]
        hidden = w.up_proj_scale_bias.shape[2]
        num_stages = len(w.qkv_proj) * kernels.LAYER_STAGES + 3
        # int8 matmuls read pairs of inputs: rows of odd length get one more column.
        queries = self.shape.n_head * _round_up(head_dim, 2)

        def floats(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.float32)

        def quantized(*shape: int) -> np.ndarray:
            return np.zeros(shape, np.int16 if precision == "int8" else np.float32)

        return structs.Workspace(
            x=floats(N, w.o_proj_scale_bias.shape[2]),
            norm_out_q=quantized(N, max(_round_up(C, 2), queries)),
            norm_out_scales=floats(N),
            qkv=floats(N, w.qkv_proj_scale_bias.shape[2]),
            attn_out=floats(N, C),
            attn_out_q=quantized(N, _round_up(C, 2)),
            attn_out_scales=floats(N),
            mlp_hidden=floats(N, hidden),
            mlp_hidden_q=quantized(N, hidden // 2 if self.shape.is_qwen3 else hidden),
            mlp_hidden_scales=floats(N),
            logits=floats(max(N, self.max_steps), w.lm_head_scale_bias.shape[1]),
            scores=floats(self.threads, structs.QUERY_BLOCK, S),
            attn_probs=quantized(self.threads, structs.QUERY_BLOCK, S),
            attn_scales=floats(self.threads, 2, structs.QUERY_BLOCK),
            attn_acc=floats(self.threads, structs.QUERY_BLOCK, NR),
            task_counters=np.zeros((self.max_steps * num_stages, kernels.COUNTERS), np.int64),
        )

    def alloc_cache(self, precision: Precision) -> structs.KVCache:
        """Allocate an empty KV cache, of panels like those of weights (see `structs`)."""
        dtype, pair = (np.int8, 2) if precision == "int8" else (np.float32, 1)
        S = _round_up(self.context_length, NR)
        D = self.shape.head_dim
        heads = (len(self.weights.qkv_proj), self.num_slots, self.shape.n_kv_head)

        def panels(num_outputs: int, num_inputs: int) -> np.ndarray:
            return np.zeros((*heads, num_outputs // NR, -(-num_inputs // pair), pair * NR), dtype)

        return structs.KVCache(
            keys=panels(S, D),
            key_scales=np.ones((*heads, S), np.float32),
            values=panels(_round_up(D, NR), S),
            value_scales=np.ones((*heads, S), np.float32),
        )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@contextmanager
def defer_sigint() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, because LLVM does not survive an exception.

    A second Ctrl-C ends the process.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets it
        yield
        return
    pressed: list[int] = []

    def handler(number: int, frame: object) -> None:
        if pressed:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        pressed.append(number)

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pressed:
        raise KeyboardInterrupt


@torch.no_grad()
def pack_weights(model: GPT, precision: Precision) -> structs.Weights:
    """Return the model's weights with the matrices quantized and packed into panels."""
    config = model.config
    is_qwen3 = config.arch == "qwen3"
    blocks = cast(list[Block], list(model.blocks))
    C = config.n_embd
    D = config.head_size
    lm_head, lm_head_scale = quantize(model.head_weight(), precision)
    if config.has_tied_embeddings:
        embedding = lm_head.float() * lm_head_scale[:, None]
    else:
        embedding = model.embedding_table()
    if is_qwen3:
        positions = torch.zeros(config.context_length, C)
        cos_sin = rope_cos_sin(torch.arange(config.context_length), D, config.rope_theta)
        norm_pairs = [(block.attn.q_norm.weight, block.attn.k_norm.weight) for block in blocks]
        qk_norms = torch.stack([torch.stack(pair) for pair in norm_pairs])
    else:
        positions = model.wpe.weight
        cos_sin = torch.zeros(2, 0, 0)
        qk_norms = torch.zeros(len(blocks), 2, D)
    norms: list[Any] = [norm for block in blocks for norm in (block.ln_1, block.ln_2)]
    norms.append(model.ln_f)
    no_bias = torch.zeros(C)
    tensors = {
        "embedding": embedding,
        "positions": positions,
        "cos_sin": cos_sin,
        "qk_norms": qk_norms,
        "norms": torch.stack(
            [torch.stack([norm.weight, no_bias if is_qwen3 else norm.bias]) for norm in norms]
        ),
    }
    layers = {
        "qkv_proj": [block.attn.qkv_proj for block in blocks],
        "o_proj": [block.attn.o_proj for block in blocks],
        "up_proj": [block.mlp.up_proj for block in blocks],
        "down_proj": [block.mlp.down_proj for block in blocks],
    }
    for name, linears in layers.items():
        num_parts = 2 if name == "up_proj" and is_qwen3 else 1  # gates and values
        matrices = [
            pack_panels(*quantize(linear.weight, precision), linear.bias, num_parts)
            for linear in linears
        ]
        panels, scale_biases = map(torch.stack, zip(*matrices, strict=True))
        tensors |= {name: panels, f"{name}_scale_bias": scale_biases}
    tensors["lm_head"], tensors["lm_head_scale_bias"] = pack_panels(lm_head, lm_head_scale, None)
    return structs.Weights(**{name: _to_numpy(tensor) for name, tensor in tensors.items()})


def pack_panels(
    weight: Tensor, scale: Tensor, bias: Tensor | None, num_parts: int = 1
) -> tuple[Tensor, Tensor]:
    """Pack a quantized matrix into panels, padded with zeros.

    Args:
        weight: (N, K) float32, bfloat16 or int8.
        scale: (N,).
        bias: (N,) or None.
        num_parts: Number of equal parts of the outputs that start with a panel of their own.

    Returns:
        Panels (P, K, 64), of int8 (P, K/2, 128), and their scale and bias (2, 64 P).
    """
    bias = torch.zeros(len(weight)) if bias is None else bias
    pair = 2 if weight.dtype == torch.int8 else 1
    padding = -(len(weight) // num_parts) % NR
    k_padding = weight.shape[1] % pair
    parts = [F.pad(part, (0, k_padding, 0, padding)) for part in weight.chunk(num_parts)]
    panels = (
        torch.cat(parts).unflatten(0, (-1, NR)).unflatten(2, (-1, pair))
    )  # (P, 64, K/pair, pair)
    scale_bias = torch.stack([scale, bias]).chunk(num_parts, dim=1)
    padded = torch.cat([F.pad(part, (0, padding)) for part in scale_bias], dim=1)
    return panels.transpose(1, 2).flatten(2), padded


def _to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a contiguous copy; bfloat16 as its 16 bits, because NumPy has no such type."""
    copied = tensor.clone(memory_format=torch.contiguous_format)
    return copied.view(torch.uint16).numpy() if copied.dtype == torch.bfloat16 else copied.numpy()
