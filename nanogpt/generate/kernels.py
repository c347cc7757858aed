"""The forward pass of a GPT, compiled by Numba: one call reads some new tokens of several texts and gives the logits of what follows.

In: weights in panels, keys and values of what was read before, tokens. Out: logits.

Every matrix W (N, K) is stored as panels (N / 64, K, 64): 64 outputs side by side, the last panel filled up with zeros. So a product needs no sum across
a vector, memory is read in order, and each output is one chain of multiply-adds in the order of K, whatever is computed beside it: a text comes out the
same, bit for bit, alone or among others, read at once or token by token. Keys are such a matrix too (an output for each position), and so are values.

Where weights are int8, all of it is: keys and values are int8 with a scale for each position, and what they and the weights are multiplied by is int16 with
a scale for each row, so that a product is a sum of integers, which is exact. Panels are then (N / 64, K / 2, 128), in pairs: see `tile`.

N tokens at once, C channels, H query heads, G of them for each head of keys and values, D channels per head, S positions, V vocabulary; R rows of a tile.
"""

import math
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from nanogpt.generate.tile import PANEL, TOGETHER, as_float, compiled, one_row, some_rows

BLOCK = 8  # tokens of a text whose queries meet its keys together

one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)


class Shape(NamedTuple):
    """What distinguishes one model from another, beyond the shapes of its weights."""

    modern: bool
    n_head: int
    n_kv_head: int
    head_dim: int
    window: int  # the context's length where there is none
    epsilon: np.float32


class Weights(NamedTuple):
    """All of a model of L layers. Each matrix is panels (L, P, K, 64) or those of int8, and what comes after the product: a scale and a bias for each
    output, (L, 2, 64 P)."""

    embedding: np.ndarray  # (V, C)
    positions: np.ndarray  # (S, C); zeros in modern
    turn: np.ndarray  # (2, S, D / 2): cosines and sines, for modern
    head_norms: np.ndarray  # (L, 2, D): of queries and keys, for modern
    norms: np.ndarray  # (2 L + 1, 2, C): weight and bias of each normalisation of the stream, in order
    qkv: np.ndarray
    qkv_after: np.ndarray
    proj: np.ndarray
    proj_after: np.ndarray
    fc: np.ndarray
    fc_after: np.ndarray
    mlp_proj: np.ndarray
    mlp_proj_after: np.ndarray
    head: np.ndarray  # of one layer: (P, C, 64)
    head_after: np.ndarray


MATRICES = ("qkv", "proj", "fc", "mlp_proj", "head")


class Texts(NamedTuple):
    """Which tokens are new: those of text m are tokens[starts[m] : starts[m + 1]], and come behind past[m] others in row rows[m] of the cache."""

    rows: np.ndarray  # (M,)
    starts: np.ndarray  # (M + 1,)
    past: np.ndarray  # (M,)


class Cache(NamedTuple):
    """What was read, of each layer, row of texts, and head of keys and values; panels as those of weights, and for int8 a scale of each position, else 1."""

    keys: np.ndarray  # (L, rows, K, S / 64, D, 64)
    key_scales: np.ndarray  # (L, rows, K, S)
    values: np.ndarray  # (L, rows, K, D / 64, S, 64)
    value_scales: np.ndarray


class Rows(NamedTuple):
    """What products multiply: a row of numbers for each token, as `settle` makes them."""

    numbers: np.ndarray  # (N, K), float32 or int16
    scales: np.ndarray  # (N,)


class Work(NamedTuple):
    """What goes from stage to stage, for N tokens; widths are filled up to whole panels. Three are there as numbers and scales of Rows too."""

    x: np.ndarray  # (N, C or more): the stream
    normed: np.ndarray  # (N, C): only as Rows
    normed_scales: np.ndarray
    qkv: np.ndarray  # (N, (H + 2 K) D or more)
    mixed: np.ndarray  # (N, C): values, as attention mixes them
    mixed_numbers: np.ndarray
    mixed_scales: np.ndarray
    hidden: np.ndarray  # (N, 4 C or so)
    hidden_numbers: np.ndarray
    hidden_scales: np.ndarray
    logits: np.ndarray  # (M, V or more)


MOST, MOST_OF_ALL = np.float32(32767), np.float32(2e9 / 127)  # of a row of integers: each, and the sum of all
LOG2_E, LN_2_HIGH, LN_2_LOW = np.float32(1 / math.log(2)), np.float32(0.693359375), np.float32(math.log(2) - 0.693359375)
TAYLOR = tuple(np.float32(1 / math.factorial(n)) for n in range(8))
PRANGE_ONLY = dict.fromkeys(("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False) | {"prange": True}
SUMS = {"reassoc", "contract", "nsz", "nnan"}  # what a compiler may take for granted to add up, or find the largest, in vectors


@compiled(fastmath={"contract"})
def exp(x):
    """e^x, within 2 units in the last place, from 1e-38 to 1e38: a power of two and a Taylor series (Cody and Waite 1980, chapter 6).

    A loop over it becomes vectors, which one over the C library's does not.
    """
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * LOG2_E + half)
    r = x - n * LN_2_HIGH - n * LN_2_LOW  # at most ln(2) / 2 from 0
    series = TAYLOR[7]
    series = series * r + TAYLOR[6]
    series = series * r + TAYLOR[5]
    series = series * r + TAYLOR[4]
    series = series * r + TAYLOR[3]
    series = series * r + TAYLOR[2]
    series = series * r + one
    series = series * r + one
    return series * as_float(np.int32((np.int32(n) + 127) << 23))


@compiled(fastmath={"contract"})
def gelu(x):
    """See `model.gelu`."""
    return x / (one + exp(-x * (np.float32(1.5957691216057308) + np.float32(0.07135481627260025) * x * x)))


@compiled(fastmath={"contract"})
def silu(x):
    return x / (one + exp(-x))


@compiled(fastmath=SUMS)
def layer_norm(x, weight, bias, epsilon, out):
    """x (C,) -> out (C,)."""
    total = zero
    for c in range(x.size):
        total += x[c]
    mean = total / np.float32(x.size)
    square = zero
    for c in range(x.size):
        square += (x[c] - mean) * (x[c] - mean)
    scale = one / np.sqrt(square / np.float32(x.size) + epsilon)
    for c in range(x.size):
        out[c] = (x[c] - mean) * scale * weight[c] + bias[c]


@compiled(fastmath=SUMS)
def rms_norm(x, weight, epsilon, out):
    """x (C,) -> out (C,)."""
    square = zero
    for c in range(x.size):
        square += x[c] * x[c]
    scale = one / np.sqrt(square / np.float32(x.size) + epsilon)
    for c in range(x.size):
        out[c] = x[c] * scale * weight[c]


@compiled(fastmath=SUMS)
def settle(x, numbers):
    """x (K,) as it is, or as integers of 16 bits -> numbers (K,); their scale.

    No sum of products with weights, which are 127 at most, leaves 32 bits: if needed the integers are smaller.
    """
    if numbers.itemsize == 4:
        for k in range(x.size):
            numbers[k] = x[k]
        return one
    largest, total = zero, zero
    for k in range(x.size):
        largest = max(largest, abs(x[k]))
    for k in range(x.size):
        total += abs(x[k])
    scale = max(largest / MOST, total / MOST_OF_ALL)
    inverse = one / scale if scale > zero else zero
    for k in range(x.size):
        numbers[k] = np.int16(np.floor(x[k] * inverse + half))
    return scale


@compiled(fastmath=SUMS)
def shrink(x, together):
    """x (K,) becomes what is kept of it: itself, or where numbers lie together in pairs integers of 8 bits; their scale."""
    if together == 1:
        return one
    largest = zero
    for k in range(x.size):
        largest = max(largest, abs(x[k]))
    scale = largest / np.float32(127)
    inverse = one / scale if scale > zero else zero
    for k in range(x.size):
        x[k] = np.floor(x[k] * inverse + half)
    return scale


@compiled
def normalize(shape, norm, x, numbers):
    """x (C or more,) with the norm's weight and bias (2, C) -> numbers (C or more,), settled; their scale."""
    normed = np.empty(norm.shape[1], np.float32)
    if shape.modern:
        rms_norm(x[: normed.size], norm[0], shape.epsilon, normed)
    else:
        layer_norm(x[: normed.size], norm[0], norm[1], shape.epsilon, normed)
    return settle(normed, numbers[: normed.size])


@compiled
def product(panel, x, y, at):
    """y (N, 64) = x (N, K) @ panel (K, 64), where y is the columns from `at` on, and x may have more of them than K."""
    n, middle = 0, panel.shape[1] // 2
    while n + TOGETHER <= len(x):
        several = x[n : n + TOGETHER]
        some_rows(panel, several, y[n : n + TOGETHER, at:])
        some_rows(panel[:, middle:], several, y[n : n + TOGETHER, at + PANEL // 2 :])
        n += TOGETHER
    while n < len(x):
        one_row(panel, x[n : n + 1], y[n : n + 1, at:])
        n += 1


@compiled(fastmath={"contract"})
def linear(panel, after, x, y, at):
    """y (N, 64) = x (N, K) @ panel (K, 64) * scale + bias, where y is the columns from `at` on, and so are those of after, (2, N); x are Rows."""
    product(panel, x.numbers, y, at)
    for n in range(len(y)):
        row, scale = y[n], x.scales[n]
        for j in range(at, at + PANEL):
            row[j] = row[j] * (after[0, j] * scale) + after[1, j]


@compiled(fastmath={"contract"})
def add_linear(panel, after, x, y, at):
    """The same, added to what is in y."""
    new = np.empty((len(y), PANEL), np.float32)
    linear(panel, after[:, at : at + PANEL], x, new, np.int64(0))
    for n in range(len(y)):
        row, more = y[n, at : at + PANEL], new[n]
        for j in range(PANEL):
            row[j] += more[j]


@compiled(fastmath={"contract"})
def linear_gelu(panel, after, x, y, at):
    """The GELU of it."""
    linear(panel, after, x, y, at)
    for n in range(len(y)):
        row = y[n]
        for j in range(at, at + PANEL):
            row[j] = gelu(row[j])


@compiled(fastmath={"contract"})
def linear_swiglu(panels, after, x, y, at):
    """The SwiGLU of it: panels and after are those of all gates, and then of all values."""
    hidden = y.shape[1]
    value = np.empty((len(y), PANEL), np.float32)
    linear(panels[at // PANEL], after, x, y, at)
    linear(panels[(hidden + at) // PANEL], after[:, hidden + at : hidden + at + PANEL], x, value, np.int64(0))
    for n in range(len(y)):
        row, factor = y[n, at : at + PANEL], value[n]
        for j in range(PANEL):
            row[j] = silu(row[j]) * factor[j]


@compiled(fastmath=SUMS)
def softmax(scores):
    """scores (S,) become e^(score - largest); their sum."""
    largest = scores[0]
    for s in range(scores.size):
        largest = max(largest, scores[s])
    for s in range(scores.size):
        scores[s] = exp(scores[s] - largest)
    total = zero
    for s in range(scores.size):
        total += scores[s]
    return total


@compiled(fastmath={"contract"})
def rotate(x, cos, sin):
    """x (D,) with channels i and i + D / 2 turned as a pair by cos and sin (D / 2,)."""
    pairs = cos.size
    for i in range(pairs):
        a, b = x[i], x[pairs + i]
        x[i] = a * cos[i] - b * sin[i]
        x[pairs + i] = b * cos[i] + a * sin[i]


@compiled
def turned(shape, norm, turn, x, position, out):
    """A query's or a key's x (D,) as it meets the others, in out (D,)."""
    if shape.modern:
        rms_norm(x, norm, shape.epsilon, out)
        rotate(out, turn[0, position], turn[1, position])
    else:
        for d in range(x.size):
            out[d] = x[d]


@compiled(fastmath={"contract"})
def times(x, scale, scales):
    """Each of x (K,) times scale and its own of the scales (K,)."""
    for k in range(x.size):
        x[k] *= scale * scales[k]


@compiled
def keep(qkv, position, at_key, at_value, norm, shape, turn, cache):
    """Put the key and the value in qkv (...,) of the token at a position into the cache of their head."""
    D, together = shape.head_dim, cache.keys.shape[2] // PANEL
    x = np.empty(D, np.float32)
    turned(shape, norm, turn, qkv[at_key : at_key + D], position, x)
    cache.key_scales[position] = shrink(x, together)
    column = position % PANEL * together
    for d in range(D):
        cache.keys[position // PANEL, d // together, column + d % together] = x[d]
    x[:] = qkv[at_value : at_value + D]
    cache.value_scales[position] = shrink(x, together)
    for d in range(D):
        cache.values[d // PANEL, position // together, d % PANEL * together + position % together] = x[d]


@compiled
def attend(shape, head_norms, turn, qkv, head, past, cache, numbers, y):
    """One head of keys and values, and the G queries that share it, for the T new tokens of a text.

    qkv (T, (H + 2 K) D) -> y (T, H D), of which these queries' columns; the cache is that of the head, and holds `past` tokens, then T more; `numbers` says
    what products multiply.
    """
    D, G, together = shape.head_dim, shape.n_head // shape.n_kv_head, cache.keys.shape[2] // PANEL
    for t in range(len(qkv)):
        keep(qkv[t], past + t, (shape.n_head + head) * D, (shape.n_head + shape.n_kv_head + head) * D, head_norms[1], shape, turn, cache)
    query = np.empty(D, np.float32)
    for t in range(0, len(qkv), BLOCK):
        T = min(BLOCK, len(qkv) - t)
        q, scales = np.zeros((T * G, D + D % together), numbers.dtype), np.empty(T * G, np.float32)
        for i in range(T * G):
            at_query = (head * G + i % G) * D
            turned(shape, head_norms[0], turn, qkv[t + i // G, at_query : at_query + D], past + t + i // G, query)
            for d in range(D):
                query[d] *= one / np.sqrt(np.float32(D))
            scales[i] = settle(query, q[i, :D])
        begin, end = max(0, past + t - shape.window + 1) // PANEL * PANEL, past + t + T  # of what these tokens see
        width = (end - begin + PANEL - 1) // PANEL * PANEL
        seen, shares = np.empty((T * G, width), np.float32), np.zeros((T * G, width), numbers.dtype)
        for s in range(begin, end, PANEL):
            product(cache.keys[s // PANEL], q, seen, s - begin)
        for i in range(T * G):
            last = past + t + i // G - begin
            first = max(0, last - shape.window + 1)
            row, of = seen[i, first : last + 1], slice(begin + first, begin + last + 1)
            times(row, scales[i], cache.key_scales[of])
            total = softmax(row)
            times(row, one, cache.value_scales[of])
            scales[i] = settle(row, shares[i, first : last + 1]) / total
        mixed = np.empty((T * G, PANEL), np.float32)
        for p in range(len(cache.values)):
            product(cache.values[p, begin // together : (end + together - 1) // together], shares, mixed, np.int64(0))
            for i in range(T * G):
                at = (head * G + i % G) * D + p * PANEL
                for d in range(min(PANEL, D - p * PANEL)):
                    y[t + i // G, at + d] = mixed[i, d] * scales[i]


NORM_1, QKV, ATTEND, MIXED, PROJ, NORM_2, FC, HIDDEN, MLP_PROJ, HEAD = np.arange(
    10
)  # the stages of a pass, each of many parts that can be computed at once (Numba compiles anew for each int, not for these)


@compiled
def part(stage, i, layer, shape, weights, cache, texts, work):
    """Part i of a stage: a row, a panel of outputs, or one head of one text."""
    at = i * PANEL
    normed = Rows(work.normed, work.normed_scales)
    if stage == NORM_1:
        work.normed_scales[i] = normalize(shape, weights.norms[2 * layer], work.x[i], work.normed[i])
    elif stage == QKV:
        linear(weights.qkv[layer, i], weights.qkv_after[layer], normed, work.qkv, at)
    elif stage == ATTEND:
        m, head = i // shape.n_kv_head, i % shape.n_kv_head
        row, past, new = texts.rows[m], texts.past[m], slice(texts.starts[m], texts.starts[m + 1])
        keys, values = cache.keys[layer, row, head], cache.values[layer, row, head]
        of_head = Cache(keys, cache.key_scales[layer, row, head], values, cache.value_scales[layer, row, head])
        attend(shape, weights.head_norms[layer], weights.turn, work.qkv[new], head, past, of_head, work.normed, work.mixed[new])
    elif stage == MIXED:
        work.mixed_scales[i] = settle(work.mixed[i], work.mixed_numbers[i, : work.mixed.shape[1]])
    elif stage == PROJ:
        add_linear(weights.proj[layer, i], weights.proj_after[layer], Rows(work.mixed_numbers, work.mixed_scales), work.x, at)
    elif stage == NORM_2:
        work.normed_scales[i] = normalize(shape, weights.norms[2 * layer + 1], work.x[i], work.normed[i])
    elif stage == FC and shape.modern:
        linear_swiglu(weights.fc[layer], weights.fc_after[layer], normed, work.hidden, at)
    elif stage == FC:
        linear_gelu(weights.fc[layer, i], weights.fc_after[layer], normed, work.hidden, at)
    elif stage == HIDDEN:
        work.hidden_scales[i] = settle(work.hidden[i], work.hidden_numbers[i])
    elif stage == MLP_PROJ:
        add_linear(weights.mlp_proj[layer, i], weights.mlp_proj_after[layer], Rows(work.hidden_numbers, work.hidden_scales), work.x, at)
    else:
        first = len(work.normed) - len(work.logits)
        linear(weights.head[i], weights.head_after, Rows(work.normed[first:], work.normed_scales[first:]), work.logits, at)


@compiled(parallel=PRANGE_ONLY)
def parts(threads, n, stage, layer, shape, weights, cache, texts, work):
    """All n parts of a stage."""
    if threads > 1 and n > 1:
        for i in prange(n):
            part(stage, i, layer, shape, weights, cache, texts, work)
    else:
        for i in range(n):
            part(stage, i, layer, shape, weights, cache, texts, work)


@compiled
def read(shape, weights, cache, texts, tokens, numbers, threads):
    """Read new tokens (N,) of M texts -> the logits (M, V or more) of what follows each, if there is one token of each, or all are of one text.

    The cache holds what was read, and takes what is; `numbers`, of whatever shape, is of the type of what products multiply.
    """
    N, C, M = len(tokens), weights.embedding.shape[1], len(texts.rows)
    hidden = weights.fc_after.shape[2] // (2 if shape.modern else 1)
    work = Work(
        x=np.zeros((N, weights.proj_after.shape[2]), np.float32),
        normed=np.zeros((N, C + C % 2), numbers.dtype),
        normed_scales=np.empty(N, np.float32),
        qkv=np.empty((N, weights.qkv_after.shape[2]), np.float32),
        mixed=np.empty((N, C), np.float32),
        mixed_numbers=np.zeros((N, C + C % 2), numbers.dtype),
        mixed_scales=np.empty(N, np.float32),
        hidden=np.empty((N, hidden), np.float32),
        hidden_numbers=np.empty((N, hidden), numbers.dtype),
        hidden_scales=np.empty(N, np.float32),
        logits=np.empty((M, weights.head_after.shape[1]), np.float32),
    )
    for m in range(M):
        for n in range(texts.starts[m], texts.starts[m + 1]):
            for c in range(C):
                work.x[n, c] = weights.embedding[tokens[n], c] + weights.positions[texts.past[m] + n - texts.starts[m], c]
    for layer in range(len(weights.qkv)):
        parts(threads, N, NORM_1, layer, shape, weights, cache, texts, work)
        parts(threads, weights.qkv.shape[1], QKV, layer, shape, weights, cache, texts, work)
        parts(threads, M * shape.n_kv_head, ATTEND, layer, shape, weights, cache, texts, work)
        parts(threads, N, MIXED, layer, shape, weights, cache, texts, work)
        parts(threads, weights.proj.shape[1], PROJ, layer, shape, weights, cache, texts, work)
        parts(threads, N, NORM_2, layer, shape, weights, cache, texts, work)
        parts(threads, hidden // PANEL, FC, layer, shape, weights, cache, texts, work)
        parts(threads, N, HIDDEN, layer, shape, weights, cache, texts, work)
        parts(threads, weights.mlp_proj.shape[1], MLP_PROJ, layer, shape, weights, cache, texts, work)
    parts(threads, N, NORM_1, len(weights.qkv), shape, weights, cache, texts, work)
    parts(threads, len(weights.head), HEAD, np.int64(0), shape, weights, cache, texts, work)
    return work.logits


def most_threads() -> int:
    """As many as Numba has, which is one for each core."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def use_threads(threads: int) -> None:
    """How many of them `read` takes when this thread calls it."""
    numba.set_num_threads(threads)
