"""The arrays that the kernels work on, as named tuples, which Numba can pass and return.

Every matrix W (N, K) is stored as panels (N/64, K, 64): 64 outputs side by side, the last panel
padded with zeros. int8 panels are (N/64, K/2, 128), two inputs of an output side by side (see
`microkernel`). Widths of activations are padded to whole panels.

Shapes: N new tokens, M sequences, T decode steps of a call, S positions, V vocabulary. L layers,
C channels, H query heads, K key-value heads, D channels per head, P panels.
"""

from typing import NamedTuple

import numpy as np

QUERY_BLOCK = 8  # queries of a sequence that are multiplied by its keys together

MATRICES = ("qkv_proj", "o_proj", "up_proj", "down_proj", "lm_head")


class ModelShape(NamedTuple):
    """Properties of a model that the shapes of its weights do not give."""

    is_qwen3: bool
    n_head: int
    n_kv_head: int
    head_dim: int
    window: int  # sliding window, or the context length without one
    norm_eps: np.float32


class Weights(NamedTuple):
    """Weights of a model: panels of each matrix, (L, P, K, 64), and (L, 2, 64 P) scale and bias."""

    embedding: np.ndarray  # (V, C)
    positions: np.ndarray  # (S, C), zeros in qwen3
    cos_sin: np.ndarray  # (2, S, D/2), empty in gpt2
    qk_norms: np.ndarray  # (L, 2, D), weights of the query and key norms of qwen3
    norms: np.ndarray  # (2 L + 1, 2, C), weight and bias of each residual-stream norm in order
    qkv_proj: np.ndarray
    qkv_proj_scale_bias: np.ndarray
    o_proj: np.ndarray
    o_proj_scale_bias: np.ndarray
    up_proj: np.ndarray
    up_proj_scale_bias: np.ndarray
    down_proj: np.ndarray
    down_proj_scale_bias: np.ndarray
    lm_head: np.ndarray  # (P, C, 64)
    lm_head_scale_bias: np.ndarray


class BatchLayout(NamedTuple):
    """The new tokens, and where they belong: tokens[starts[m] : starts[m + 1]] to sequence m."""

    tokens: np.ndarray  # (N,), or (T,) in a multi-step call
    slots: np.ndarray  # (M,), slot of the cache
    starts: np.ndarray  # (M + 1,)
    num_cached: np.ndarray  # (M,), tokens already in the cache


class SamplingInputs(NamedTuple):
    """Inputs for sampling the tokens between the T steps of a multi-step call."""

    temperature: np.float32
    logit_bias: np.ndarray  # (V,)
    uniforms: np.ndarray  # (T - 1,) in [0, 1)
    probs: np.ndarray  # (V,), workspace


class KVCache(NamedTuple):
    """Keys and values as panels, with a scale for each position (1 unless int8).

    Kernels of one head get the arrays without their first three axes.
    """

    keys: np.ndarray  # (L, slots, K, S/64, D, 64)
    key_scales: np.ndarray  # (L, slots, K, S)
    values: np.ndarray  # (L, slots, K, D/64, S, 64)
    value_scales: np.ndarray  # (L, slots, K, S)


class QuantizedRows(NamedTuple):
    """The left operand of a matmul, as `quantize_int16` makes it."""

    values: np.ndarray  # (N, K), int16, or float32 for float weights
    scales: np.ndarray  # (N,)


class Workspace(NamedTuple):
    """Buffers for the activations of up to N tokens, and for each thread."""

    x: np.ndarray  # (N, C), residual stream
    norm_out_q: np.ndarray  # (N, C) quantized norm output, later the quantized queries
    norm_out_scales: np.ndarray  # (N,)
    qkv: np.ndarray  # (N, (H + 2 K) D), later the branch that is added to the residual stream
    attn_out: np.ndarray  # (N, C), also the norm output before quantization
    attn_out_q: np.ndarray  # (N, C)
    attn_out_scales: np.ndarray  # (N,)
    mlp_hidden: np.ndarray  # (N, 4 C), in qwen3 the gates and then the values
    mlp_hidden_q: np.ndarray  # (N, 4 C)
    mlp_hidden_scales: np.ndarray  # (N,)
    logits: np.ndarray  # (max(N, T), V)
    scores: np.ndarray  # (threads, QUERY_BLOCK, S)
    attn_probs: np.ndarray  # (threads, QUERY_BLOCK, S), quantized
    attn_scales: np.ndarray  # (threads, 2, QUERY_BLOCK), of queries and probabilities
    attn_acc: np.ndarray  # (threads, QUERY_BLOCK, 64)
    task_counters: np.ndarray  # (stages of T steps, COUNTERS)


class Batch(NamedTuple):
    """Everything that a forward pass reads and writes."""

    shape: ModelShape
    weights: Weights
    cache: KVCache
    layout: BatchLayout
    sampling: SamplingInputs
    workspace: Workspace
