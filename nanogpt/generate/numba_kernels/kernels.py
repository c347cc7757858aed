"""The forward pass of a GPT as kernels that Numba compiles.

Each output of a matmul is one chain of multiply-adds in the order of K, because panels hold 64
outputs side by side (see `structs`). So a sequence gets the same results bit for bit, alone or
in a batch, prefilled or decoded token by token. Cached keys and values are panels too.

With int8 weights, keys and values are int8 with a scale for each position. The left operands of
all matmuls are int16 with a scale for each row, so that sums of products are exact integers.
"""

import threading

import numba
import numpy as np
from numba import prange

from nanogpt.generate.numba_kernels import rowwise
from nanogpt.generate.numba_kernels.microkernel import (
    MR,
    NR,
    atomic_add,
    atomic_load_acquire,
    gemm_8x32,
    gemv_64,
    njit_cached,
)
from nanogpt.generate.numba_kernels.structs import (
    QUERY_BLOCK,
    Batch,
    KVCache,
    QuantizedRows,
    Workspace,
)

INT64_ZERO = np.int64(0)  # a literal 0 would have a type of its own, and compile the kernel again

# The stages of a layer, then those of a whole pass. The tasks of a stage are independent.
NORM_1 = 0
QKV = 1
WRITE_KV = 2
ATTENTION = 3
QUANT_ATTN = 4
O_PROJ = 5
NORM_2 = 6
UP_PROJ = 7
QUANT_HIDDEN = 8
DOWN_PROJ = 9
LM_HEAD = 10
EMBED = 11
LAYER_STAGES = LM_HEAD

# Index of the counter of completed tasks: not on the cache line of the counter of taken ones.
DONE_SLOT = 8
COUNTERS = 16

PRANGE_ONLY = dict.fromkeys(
    ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False
) | {"prange": True}


@njit_cached
def normalize(shape, norm, x, out, out_q):
    """Normalize x (C,) into out by norm (2, C) and quantize to out_q; return the scale."""
    if shape.is_qwen3:
        rowwise.rms_norm(x, norm[0], shape.norm_eps, out)
    else:
        rowwise.layer_norm(x, norm[0], norm[1], shape.norm_eps, out)
    return rowwise.quantize_int16(out, out_q)


@njit_cached
def matmul_panel(panel, x, y, column):
    """Write x (N, K or more) @ panel (K, 64) to 64 columns of y, from `column` on."""
    n, middle = 0, panel.shape[1] // 2
    while n + MR <= len(x):
        rows = x[n : n + MR]
        gemm_8x32(panel, rows, y[n : n + MR, column:])
        gemm_8x32(panel[:, middle:], rows, y[n : n + MR, column + NR // 2 :])
        n += MR
    while n < len(x):
        gemv_64(panel, x[n : n + 1], y[n : n + 1, column:])
        n += 1


@njit_cached(fastmath={"contract"})
def linear(panel, scale_bias, x, y, column):
    """Compute 64 columns of a linear layer: x @ panel * scale + bias, from QuantizedRows x."""
    matmul_panel(panel, x.values, y, column)
    scales, biases = scale_bias[0, column : column + NR], scale_bias[1, column : column + NR]
    for n in range(len(y)):
        row, row_scale = y[n, column : column + NR], x.scales[n]
        for j in range(NR):
            row[j] = row[j] * (scales[j] * row_scale) + biases[j]


@njit_cached(fastmath={"contract"})
def add_linear(panel, scale_bias, x, branch, y, column):
    """Compute 64 columns of a linear layer into `branch` and add them to y."""
    linear(panel, scale_bias, x, branch, column)
    for n in range(len(y)):
        row, update = y[n, column : column + NR], branch[n, column : column + NR]
        for j in range(NR):
            row[j] += update[j]


@njit_cached(fastmath={"contract"})
def linear_gelu(panel, scale_bias, x, y, column):
    """Compute 64 columns of a linear layer followed by GELU."""
    linear(panel, scale_bias, x, y, column)
    for n in range(len(y)):
        row = y[n, column : column + NR]
        for j in range(NR):
            row[j] = rowwise.gelu(row[j])


@njit_cached(fastmath={"contract"})
def linear_swiglu(panels, scale_bias, x, y, column):
    """Compute 64 columns of SwiGLU; panels, scale_bias and y hold all gates, then all values."""
    hidden = y.shape[1] // 2
    linear(panels[column // NR], scale_bias, x, y, column)
    linear(panels[(hidden + column) // NR], scale_bias, x, y, hidden + column)
    for n in range(len(y)):
        row, values = y[n, column : column + NR], y[n, hidden + column : hidden + column + NR]
        for j in range(NR):
            row[j] = rowwise.silu(row[j]) * values[j]


@njit_cached
def sample(logits, sampling, uniform):
    """Sample a token from logits (V or more); rounding may differ from `sample_from_logits`."""
    probs, cumulative = sampling.probs, 0.0
    for v in range(probs.size):
        probs[v] = (logits[v] + sampling.logit_bias[v]) / sampling.temperature
    target = uniform * rowwise.softmax(probs)
    for v in range(probs.size):
        cumulative += probs[v]
        if cumulative > target:
            return v
    return probs.size - 1


@njit_cached
def norm_and_rope(shape, norm, cos_sin, position, x):
    """Normalize and rotate a query or key x (D,) in place, in qwen3."""
    if shape.is_qwen3:
        rowwise.rms_norm(x, norm, shape.norm_eps, x)
        rowwise.apply_rotary_emb(x, cos_sin[0, position], cos_sin[1, position])


@njit_cached
def write_kv(shape, norm, cos_sin, key, value, position, cache):
    """Write the key and value (D,) at a position to the cache of their head, changing both."""
    is_int8 = cache.keys.shape[2] // NR - 1  # 1 if panels hold pairs, else 0
    norm_and_rope(shape, norm, cos_sin, position, key)
    cache.key_scales[position] = rowwise.quantize_int8(key, is_int8)
    cache.value_scales[position] = rowwise.quantize_int8(value, is_int8)
    panel, column = cache.keys[position // NR], position % NR << is_int8
    for d in range(key.size):
        panel[d >> is_int8, column + (d & is_int8)] = key[d]
    row, column = position >> is_int8, position & is_int8
    for d in range(value.size):
        cache.values[d // NR, row, (d % NR << is_int8) + column] = value[d]


@njit_cached
def attention(rope, queries, queries_q, num_cached, cache, scratch, out):
    """Attend from the T new tokens of a sequence in one head.

    Args:
        rope: (ModelShape, query norm, cos_sin).
        queries: (T, D), changed in place.
        queries_q: (T, D or more), buffer of the quantized queries.
        num_cached: Tokens in the cache before these; the cache holds these too.
        cache: KVCache of the head.
        scratch: (scores, attn_probs, attn_scales, attn_acc) of the thread.
        out: (T, D or more).
    """
    shape, norm, cos_sin = rope
    scores, probs, scales, acc = scratch
    D, is_int8 = shape.head_dim, cache.keys.shape[2] // NR - 1
    inverse_sqrt = rowwise.ONE / np.sqrt(np.float32(shape.head_dim))
    for first in range(0, len(queries), QUERY_BLOCK):
        T = min(QUERY_BLOCK, len(queries) - first)
        for t in range(T):
            query = queries[first + t]
            norm_and_rope(shape, norm, cos_sin, num_cached + first + t, query)
            for d in range(query.size):
                query[d] *= inverse_sqrt
            scales[0, t] = rowwise.quantize_int16(query, queries_q[first + t, :D])
        # The positions that any of these queries sees, from a multiple of 64 on.
        start = max(0, num_cached + first - shape.window + 1) // NR * NR
        stop = num_cached + first + T
        for s in range(start, stop, NR):
            matmul_panel(cache.keys[s // NR], queries_q[first : first + T], scores[:T], s - start)
        for t in range(T):
            row_stop = num_cached + first + t + 1
            row_start = max(start, row_stop - shape.window)
            row = scores[t, row_start - start : row_stop - start]
            rowwise.scale(row, scales[0, t], cache.key_scales[row_start:row_stop])
            total = rowwise.softmax(row)
            rowwise.scale(row, rowwise.ONE, cache.value_scales[row_start:row_stop])
            probs[t, : row_start - start] = 0
            probs[t, row_stop - start : (stop - start + NR - 1) // NR * NR] = 0
            row_q = probs[t, row_start - start : row_stop - start]
            scales[1, t] = rowwise.quantize_int16(row, row_q) / total
        for p in range(len(cache.values)):
            panel = cache.values[p, start >> is_int8 : stop + is_int8 >> is_int8]
            matmul_panel(panel, probs[:T], acc[:T], INT64_ZERO)
            for t in range(T):
                row = out[first + t, p * NR : D]
                for d in range(min(NR, row.size)):
                    row[d] = acc[t, d] * scales[1, t]


@njit_cached
def num_tasks(stage, batch):
    """Return the number of tasks of a stage: rows, panels, sequences, or heads of sequences."""
    weights, num_sequences = batch.weights, len(batch.layout.slots)
    if stage == QKV:
        return weights.qkv_proj.shape[1]
    if stage == WRITE_KV:
        return num_sequences * batch.shape.n_kv_head
    if stage == ATTENTION:
        return num_sequences * batch.shape.n_head
    if stage in (O_PROJ, DOWN_PROJ):
        return weights.o_proj.shape[1]
    if stage == UP_PROJ:
        return batch.workspace.mlp_hidden_q.shape[1] // NR
    if stage == LM_HEAD:
        return len(weights.lm_head)
    if stage == EMBED:
        return num_sequences
    return len(batch.workspace.x)


@njit_cached
def run_head_task(stage, i, layer, thread, batch):
    """Write the keys and values of a head of one sequence, or attend in it."""
    shape, layout = batch.shape, batch.layout
    cache, work = batch.cache, batch.workspace
    norms, cos_sin = batch.weights.qk_norms[layer], batch.weights.cos_sin
    D = shape.head_dim
    heads = shape.n_kv_head if stage == WRITE_KV else shape.n_head
    m, head = i // heads, i % heads
    kv_head = head if stage == WRITE_KV else head // (shape.n_head // shape.n_kv_head)
    slot, num_cached = layout.slots[m], layout.num_cached[m]
    start, stop = layout.starts[m], layout.starts[m + 1]
    head_cache = KVCache(
        cache.keys[layer, slot, kv_head],
        cache.key_scales[layer, slot, kv_head],
        cache.values[layer, slot, kv_head],
        cache.value_scales[layer, slot, kv_head],
    )
    if stage == ATTENTION:
        queries = work.qkv[start:stop, head * D : head * D + D]
        queries_q = work.norm_out_q[start:stop, head * (D + D % 2) :]
        scratch = (
            work.scores[thread],
            work.attn_probs[thread],
            work.attn_scales[thread],
            work.attn_acc[thread],
        )
        out = work.attn_out[start:stop, head * D :]
        rope = (shape, norms[0], cos_sin)
        attention(rope, queries, queries_q, num_cached, head_cache, scratch, out)
        return
    key_start, value_start = (shape.n_head + head) * D, (shape.n_head + shape.n_kv_head + head) * D
    for n in range(start, stop):
        key = work.qkv[n, key_start : key_start + D]
        value = work.qkv[n, value_start : value_start + D]
        write_kv(shape, norms[1], cos_sin, key, value, num_cached + n - start, head_cache)


@njit_cached
def embed_task(m, step, batch):
    """Embed the tokens of sequence m; after the first step, sample the token to embed."""
    weights, layout = batch.weights, batch.layout
    x = batch.workspace.x
    if step > 0:
        logits, uniform = batch.workspace.logits[step - 1], batch.sampling.uniforms[step - 1]
        layout.tokens[step] = sample(logits, batch.sampling, uniform)
        layout.num_cached[0] += 1
    for n in range(layout.starts[m], layout.starts[m + 1]):
        token, position = layout.tokens[step + n], layout.num_cached[m] + n - layout.starts[m]
        for c in range(weights.embedding.shape[1]):
            x[n, c] = weights.embedding[token, c] + weights.positions[position, c]


@njit_cached
def up_proj_task(i, layer, x, batch):
    """Compute 64 columns of the MLP's hidden layer."""
    weights, hidden = batch.weights, batch.workspace.mlp_hidden
    scale_bias = weights.up_proj_scale_bias[layer]
    if batch.shape.is_qwen3:
        linear_swiglu(weights.up_proj[layer], scale_bias, x, hidden, i * NR)
    else:
        linear_gelu(weights.up_proj[layer, i], scale_bias, x, hidden, i * NR)


@njit_cached
def run_task(stage, i, step, layer, thread, batch):
    """Run task i of a stage."""
    weights, work = batch.weights, batch.workspace
    column, C = i * NR, work.attn_out.shape[1]
    norm_out = QuantizedRows(work.norm_out_q, work.norm_out_scales)
    if stage in (NORM_1, NORM_2):
        norm = weights.norms[2 * layer + (1 if stage == NORM_2 else 0)]
        out, out_q = work.attn_out[i], work.norm_out_q[i, :C]
        work.norm_out_scales[i] = normalize(batch.shape, norm, work.x[i, :C], out, out_q)
    elif stage == QKV:
        scale_bias = weights.qkv_proj_scale_bias[layer]
        linear(weights.qkv_proj[layer, i], scale_bias, norm_out, work.qkv, column)
    elif stage in (WRITE_KV, ATTENTION):
        run_head_task(stage, i, layer, thread, batch)
    elif stage == QUANT_ATTN:
        work.attn_out_scales[i] = rowwise.quantize_int16(work.attn_out[i], work.attn_out_q[i, :C])
    elif stage == O_PROJ:
        rows = QuantizedRows(work.attn_out_q, work.attn_out_scales)
        scale_bias = weights.o_proj_scale_bias[layer]
        add_linear(weights.o_proj[layer, i], scale_bias, rows, work.qkv, work.x, column)
    elif stage == UP_PROJ:
        up_proj_task(i, layer, norm_out, batch)
    elif stage == QUANT_HIDDEN:
        out_q = work.mlp_hidden_q[i]
        work.mlp_hidden_scales[i] = rowwise.quantize_int16(work.mlp_hidden[i, : out_q.size], out_q)
    elif stage == DOWN_PROJ:
        rows = QuantizedRows(work.mlp_hidden_q, work.mlp_hidden_scales)
        scale_bias = weights.down_proj_scale_bias[layer]
        add_linear(weights.down_proj[layer, i], scale_bias, rows, work.qkv, work.x, column)
    elif stage == LM_HEAD:
        M = len(batch.layout.slots)
        first = len(work.norm_out_q) - M
        rows = QuantizedRows(work.norm_out_q[first:], work.norm_out_scales[first:])
        logits = work.logits[step : step + M]
        linear(weights.lm_head[i], weights.lm_head_scale_bias, rows, logits, column)
    else:
        embed_task(i, step, batch)


@njit_cached
def run_stages(thread, batch):
    """Run all stages in one thread: take tasks that no other has taken, wait until all are done.

    No thread waits for one that has not started, so any number of threads may take part.
    """
    counters_of_stages = batch.workspace.task_counters
    last = len(batch.weights.qkv_proj) * LAYER_STAGES + 1  # EMBED, the layers and a final NORM_1
    for index in range(len(counters_of_stages)):
        counters = counters_of_stages[index]
        step, pass_stage = index // (last + 2), index % (last + 2) - 1
        layer, stage = pass_stage // LAYER_STAGES, pass_stage % LAYER_STAGES
        if pass_stage == last:
            stage = LM_HEAD
        elif pass_stage < 0:
            stage = EMBED
        n, num_done = num_tasks(stage, batch), 0
        # Small chunks, so that a thread that starts late leaves most of the tasks to the others.
        chunk = max(1, n // (4 * len(batch.workspace.scores)))
        i = atomic_add(counters, 0, chunk)
        while i < n:
            for task in range(i, min(n, i + chunk)):
                run_task(stage, task, step, layer, thread, batch)
                num_done += 1
            i = atomic_add(counters, 0, chunk)
        atomic_add(counters, DONE_SLOT, num_done)
        while atomic_load_acquire(counters, DONE_SLOT) < n:
            pass


@njit_cached(parallel=PRANGE_ONLY)
def parallel_run(threads, shape, weights, cache, layout, sampling, workspace):
    """Run all stages in several threads.

    The arguments are those of a Batch: a prange takes tuples of arrays, but no tuples of tuples.
    """
    if threads > 1:
        for thread in prange(threads):
            batch = Batch(shape, weights, cache, layout, sampling, workspace)
            run_stages(np.int64(thread), batch)
    else:
        run_stages(INT64_ZERO, Batch(shape, weights, cache, layout, sampling, workspace))


@njit_cached
def forward(batch, threads):
    """Append the new tokens to the cache and compute the logits that follow them.

    A batch has one new token of each sequence, or several of a single one: logits (M, V or more).
    In a multi-step call, of one sequence, there are T - 1 uniforms and space for T tokens. The
    first token is given, the others are sampled between the steps: logits (T, V or more).
    """
    N = batch.layout.starts[-1]
    num_steps = 1 + len(batch.sampling.uniforms)
    w = batch.workspace
    num_stages = num_steps * (len(batch.weights.qkv_proj) * LAYER_STAGES + 3)
    workspace = Workspace(
        w.x[:N],
        w.norm_out_q[:N],
        w.norm_out_scales[:N],
        w.qkv[:N],
        w.attn_out[:N],
        w.attn_out_q[:N],
        w.attn_out_scales[:N],
        w.mlp_hidden[:N],
        w.mlp_hidden_q[:N],
        w.mlp_hidden_scales[:N],
        w.logits,
        w.scores,
        w.attn_probs,
        w.attn_scales,
        w.attn_acc,
        w.task_counters[:num_stages],
    )
    workspace.task_counters[:] = 0
    weights, cache = batch.weights, batch.cache
    parallel_run(threads, batch.shape, weights, cache, batch.layout, batch.sampling, workspace)


_thread_state = threading.local()  # the thread count that was last set in this thread


def set_threads(threads: int) -> None:
    """Set the number of threads for calls of `forward` from this thread."""
    if getattr(_thread_state, "threads", None) != threads:  # setting it takes 10 us
        numba.set_num_threads(threads)
        _thread_state.threads = threads
