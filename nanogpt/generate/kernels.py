"""The forward pass of a GPT, compiled by Numba: one call reads some new tokens of several texts and gives the logits of what follows.

In: weights in panels, keys and values of what was read before, tokens. Out: logits.

Every matrix W (N, K) is stored as panels (N / 64, K, 64): 64 outputs side by side, the last panel filled up with zeros. So a product needs no sum across
a vector, memory is read in order, and each output is one chain of multiply-adds in the order of K, whatever is computed beside it: a text comes out the
same, bit for bit, alone or among others, read at once or token by token. Keys are such a matrix too (an output for each position), and so are values.

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
    """All of a model of L layers. Each matrix is panels (L, P, K, 64), and what comes after the product: a scale and a bias for each output, (L, 2, 64 P)."""

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


class Work(NamedTuple):
    """What goes from stage to stage, for N tokens; widths are filled up to whole panels."""

    x: np.ndarray  # (N, C or more): the stream
    normed: np.ndarray  # (N, C)
    qkv: np.ndarray  # (N, (H + 2 K) D or more)
    mixed: np.ndarray  # (N, C): values, as attention mixes them
    hidden: np.ndarray  # (N, 4 C or so)
    logits: np.ndarray  # (M, V or more)


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


@compiled
def normalize(shape, norm, x, out):
    """x (N, C or more) -> out (N, C), with the norm's weight and bias (2, C)."""
    for n in range(len(out)):
        if shape.modern:
            rms_norm(x[n, : out.shape[1]], norm[0], shape.epsilon, out[n])
        else:
            layer_norm(x[n, : out.shape[1]], norm[0], norm[1], shape.epsilon, out[n])


@compiled
def product(panel, x, y, at):
    """y (N, 64) = x (N, K) @ panel (K, 64), where y is the columns from `at` on, and x may have more of them than K."""
    n, behind, middle = 0, at + PANEL, PANEL // 2
    while n + TOGETHER <= len(x):
        several = x[n : n + TOGETHER]
        some_rows(panel, several, y[n : n + TOGETHER, at:behind])
        some_rows(panel[:, middle:], several, y[n : n + TOGETHER, at + middle : behind])
        n += TOGETHER
    while n < len(x):
        one_row(panel, x[n : n + 1], y[n : n + 1, at:behind])
        n += 1


@compiled(fastmath={"contract"})
def linear(panel, after, x, y, at):
    """y (N, 64) = x (N, K) @ panel (K, 64) * scale + bias, where y is the columns from `at` on, and so are those of after, (2, N)."""
    product(panel, x, y, at)
    for n in range(len(y)):
        row = y[n]
        for j in range(at, at + PANEL):
            row[j] = row[j] * after[0, j] + after[1, j]


@compiled(fastmath={"contract"})
def add_linear(panel, after, x, y, at):
    """The same, added to what is in y."""
    new = np.empty((len(y), PANEL), np.float32)
    product(panel, x, new, np.int64(0))
    for n in range(len(y)):
        row, more = y[n, at : at + PANEL], new[n]
        for j in range(PANEL):
            row[j] += more[j] * after[0, at + j] + after[1, at + j]


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
    product(panels[(hidden + at) // PANEL], x, value, np.int64(0))
    for n in range(len(y)):
        row, factor = y[n, at : at + PANEL], value[n]
        for j in range(PANEL):
            row[j] = silu(row[j]) * (factor[j] * after[0, hidden + at + j] + after[1, hidden + at + j])


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


@compiled
def attend(shape, head_norms, turn, qkv, head, past, keys, values, y):
    """One head of keys and values, and the G queries that share it, for the T new tokens of a text.

    qkv (T, (H + 2 K) D) -> y (T, H D), of which these queries' columns; keys (S / 64, D, 64) and values (D / 64, S, 64) hold `past` tokens, then T more.
    """
    D, G = shape.head_dim, shape.n_head // shape.n_kv_head
    at_key, at_value = (shape.n_head + head) * D, (shape.n_head + shape.n_kv_head + head) * D
    key = np.empty(D, np.float32)
    for t in range(len(qkv)):
        position = past + t
        turned(shape, head_norms[1], turn, qkv[t, at_key : at_key + D], position, key)
        for d in range(D):
            keys[position // PANEL, d, position % PANEL] = key[d]
            values[d // PANEL, position, d % PANEL] = qkv[t, at_value + d]
    for t in range(0, len(qkv), BLOCK):
        T = min(BLOCK, len(qkv) - t)
        q = np.empty((T * G, D), np.float32)
        for i in range(T * G):
            at_query = (head * G + i % G) * D
            turned(shape, head_norms[0], turn, qkv[t + i // G, at_query : at_query + D], past + t + i // G, q[i])
            for d in range(D):
                q[i, d] *= one / np.sqrt(np.float32(D))
        begin, end = max(0, past + t - shape.window + 1) // PANEL * PANEL, past + t + T  # of what these tokens see
        seen = np.empty((T * G, (end - begin + PANEL - 1) // PANEL * PANEL), np.float32)
        for s in range(begin, end, PANEL):
            product(keys[s // PANEL], q, seen, s - begin)
        totals = np.empty(T * G, np.float32)
        for i in range(T * G):
            last = past + t + i // G - begin
            first = max(0, last - shape.window + 1)
            seen[i, :first] = zero
            totals[i] = softmax(seen[i, first : last + 1])
            seen[i, last + 1 :] = zero
        mixed = np.empty((T * G, PANEL), np.float32)
        for p in range(len(values)):
            product(values[p, begin:end], seen, mixed, np.int64(0))
            for i in range(T * G):
                at = (head * G + i % G) * D + p * PANEL
                for d in range(min(PANEL, D - p * PANEL)):
                    y[t + i // G, at + d] = mixed[i, d] / totals[i]


QKV, ATTEND, PROJ, FC, MLP_PROJ, HEAD = np.arange(
    6
)  # the stages of a pass, each of many parts that can be computed at once (Numba compiles anew for each int, not for these)


@compiled
def part(stage, i, layer, shape, weights, keys, values, texts, work):
    """Part i of a stage: a panel of outputs, or one head of one text."""
    at = i * PANEL
    if stage == QKV:
        linear(weights.qkv[layer, i], weights.qkv_after[layer], work.normed, work.qkv, at)
    elif stage == ATTEND:
        m, head = i // shape.n_kv_head, i % shape.n_kv_head
        row, past, new = texts.rows[m], texts.past[m], slice(texts.starts[m], texts.starts[m + 1])
        attend(shape, weights.head_norms[layer], weights.turn, work.qkv[new], head, past, keys[layer, row, head], values[layer, row, head], work.mixed[new])
    elif stage == PROJ:
        add_linear(weights.proj[layer, i], weights.proj_after[layer], work.mixed, work.x, at)
    elif stage == FC and shape.modern:
        linear_swiglu(weights.fc[layer], weights.fc_after[layer], work.normed, work.hidden, at)
    elif stage == FC:
        linear_gelu(weights.fc[layer, i], weights.fc_after[layer], work.normed, work.hidden, at)
    elif stage == MLP_PROJ:
        add_linear(weights.mlp_proj[layer, i], weights.mlp_proj_after[layer], work.hidden, work.x, at)
    else:
        last = work.normed[len(work.normed) - len(work.logits) :]
        linear(weights.head[i], weights.head_after, last, work.logits, at)


@compiled(parallel=PRANGE_ONLY)
def parts(threads, n, stage, layer, shape, weights, keys, values, texts, work):
    """All n parts of a stage."""
    if threads > 1:
        for i in prange(n):
            part(stage, i, layer, shape, weights, keys, values, texts, work)
    else:
        for i in range(n):
            part(stage, i, layer, shape, weights, keys, values, texts, work)


@compiled
def read(shape, weights, keys, values, texts, tokens, threads):
    """Read new tokens (N,) of M texts -> the logits (M, V or more) of what follows each, if there is one token of each, or all are of one text.

    keys (L, rows, K, S / 64, D, 64) and values (L, rows, K, D / 64, S, 64) hold what was read, and take what is.
    """
    N, C, M = len(tokens), weights.embedding.shape[1], len(texts.rows)
    hidden = weights.fc_after.shape[2] // (2 if shape.modern else 1)
    work = Work(
        x=np.zeros((N, weights.proj_after.shape[2]), np.float32),
        normed=np.empty((N, C), np.float32),
        qkv=np.empty((N, weights.qkv_after.shape[2]), np.float32),
        mixed=np.empty((N, C), np.float32),
        hidden=np.empty((N, hidden), np.float32),
        logits=np.empty((M, weights.head_after.shape[1]), np.float32),
    )
    for m in range(M):
        for n in range(texts.starts[m], texts.starts[m + 1]):
            for c in range(C):
                work.x[n, c] = weights.embedding[tokens[n], c] + weights.positions[texts.past[m] + n - texts.starts[m], c]
    for layer in range(len(keys)):
        normalize(shape, weights.norms[2 * layer], work.x, work.normed)
        parts(threads, weights.qkv.shape[1], QKV, layer, shape, weights, keys, values, texts, work)
        parts(threads, M * shape.n_kv_head, ATTEND, layer, shape, weights, keys, values, texts, work)
        parts(threads, weights.proj.shape[1], PROJ, layer, shape, weights, keys, values, texts, work)
        normalize(shape, weights.norms[2 * layer + 1], work.x, work.normed)
        parts(threads, hidden // PANEL, FC, layer, shape, weights, keys, values, texts, work)
        parts(threads, weights.mlp_proj.shape[1], MLP_PROJ, layer, shape, weights, keys, values, texts, work)
    normalize(shape, weights.norms[2 * len(keys)], work.x, work.normed)
    parts(threads, len(weights.head), HEAD, np.int64(0), shape, weights, keys, values, texts, work)
    return work.logits


def most_threads() -> int:
    """As many as Numba has, which is one for each core."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def use_threads(threads: int) -> None:
    """How many of them `read` takes when this thread calls it."""
    numba.set_num_threads(threads)
