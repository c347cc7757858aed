"""The forward pass of a GPT, compiled by Numba: one call reads some new tokens of several texts and gives the logits of what follows.

In: weights in panels, keys and values of what was read before, tokens. Out: logits.

Every matrix W (N, K) is stored as panels (N / 64, K, 64): 64 outputs side by side, the last panel filled up with zeros. So a product needs no sum across
a vector, memory is read in order, and each output is one chain of multiply-adds in the order of K, whatever is computed beside it: a text comes out the
same, bit for bit, alone or among others, read at once or token by token. Keys are such a matrix too (an output for each position), and so are values.

N tokens at once, C channels, H query heads, G of them for each head of keys and values, D channels per head, S positions, V vocabulary; R rows of a tile.
"""

import math
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from nanogpt.files import cache_dir

PANEL = 64  # outputs side by side
LANES = 16  # numbers in a vector: one of AVX-512's, and two or four where vectors are shorter
TOGETHER = 8  # rows that share each weight that is read; with half a panel that fills AVX-512's registers
AHEAD = 2048  # bytes by which weights are asked for before they are used: about what arrives during the delay of the memory
BLOCK = 8  # tokens of a text whose queries meet its keys together

one, half, zero = np.float32(1), np.float32(0.5), np.float32(0)


class Shape(NamedTuple):
    """What distinguishes one model from another, beyond the shapes of its weights."""

    modern: bool
    n_head: int
    n_kv_head: int
    head_dim: int
    window: int  # the context's length where there is none
    epsilon: float


Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]  # one of each layer: panels (L, P, K, 64), scales (L, 64 P), biases (L, 64 P)


class Weights(NamedTuple):
    """All of a model of L layers."""

    embedding: np.ndarray  # (V, C)
    positions: np.ndarray  # (S, C); zeros in modern
    turn: np.ndarray  # (2, S, D / 2): cosines and sines, for modern
    head_norms: np.ndarray  # (L, 2, D): of queries and keys, for modern
    norms: np.ndarray  # (2 L + 1, 2, C): weight and bias of each normalisation of the stream, in order
    qkv: Matrices
    proj: Matrices
    fc: Matrices
    mlp_proj: Matrices
    head: Matrices  # of one layer


class Texts(NamedTuple):
    """Which tokens are new: those of text m are tokens[starts[m] : starts[m + 1]], and come behind past[m] others in row rows[m] of the cache."""

    rows: np.ndarray  # (M,)
    starts: np.ndarray  # (M + 1,)
    past: np.ndarray  # (M,)


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """`numba.njit`, with what it compiles kept in our cache for the next process, where that can be written."""
    if function is None:
        return lambda function: compiled(function, **options)
    elsewhere, folder = numba.config.CACHE_DIR, cache_dir() / ("numba-parallel" if "parallel" in options else "numba")  # which Numba would mix up
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    numba.config.CACHE_DIR = str(folder)  # read where a function is decorated
    try:
        return numba.njit(function, cache=os.access(folder, os.W_OK), nogil=True, error_model="numpy", **options)
    finally:
        numba.config.CACHE_DIR = elsewhere


def tile(R: int, width: int) -> Any:
    """Make the inner loop of every product: tile(panel, x, y) with y (R, width) = x (R, K or more) @ panel (K, width).

    It is written in LLVM's own language, with one accumulator for each row and each 16 outputs, since no compiler finds this loop by itself.
    The panel's type, int8, uint16 (the upper half of a float32, which is a bfloat16) or float32, says how 16 weights become floats.
    """
    vector, i32, i64 = ir.VectorType(ir.FloatType(), LANES), ir.IntType(32), ir.IntType(64)
    pointer = ir.IntType(8).as_pointer()

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, x, y = (make_array(kind)(context, builder, value) for kind, value in zip(signature.args, arguments, strict=True))
        item = signature.args[0].dtype.bitwidth // 8
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{LANES}f32")
        fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32]), "llvm.prefetch.p0")

        def at(array: Any, *offsets: tuple[Any, Any]) -> Any:
            """The address that lies so many (steps, bytes each) behind the array's begin."""
            address = builder.bitcast(array.data, pointer)
            for steps, size in offsets:
                address = builder.gep(address, [builder.mul(steps, size)])
            return address

        def weights(address: Any, kind: Any) -> Any:
            raw = {types.int8: ir.IntType(8), types.uint16: ir.IntType(16), types.float32: ir.FloatType()}[kind]
            loaded = builder.load(builder.bitcast(address, ir.VectorType(raw, LANES).as_pointer()), align=item)
            if kind == types.int8:
                return builder.sitofp(loaded, vector)
            if kind == types.uint16:
                wide = ir.VectorType(i32, LANES)
                return builder.bitcast(builder.shl(builder.zext(loaded, wide), ir.Constant(wide, [16] * LANES)), vector)
            return loaded

        rows, parts = [i64(r) for r in range(R)], [i64(part * LANES) for part in range(width // LANES)]
        x_row, x_item = cgutils.unpack_tuple(builder, x.strides)
        K = cgutils.unpack_tuple(builder, panel.shape)[0]
        before, loop, behind = builder.block, builder.append_basic_block("multiply"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(i64)
        k.add_incoming(i64(0), before)
        sums = {(r, part): builder.phi(vector) for r in range(R) for part in range(len(parts))}
        row = i64(PANEL * item)
        for line in range(0, width * item, 64):
            builder.call(fetch, [at(panel, (k, row), (i64(AHEAD + line), i64(1))), i32(0), i32(3), i32(1)])
        taken = [weights(at(panel, (k, row), (part, i64(item))), signature.args[0].dtype) for part in parts]
        for r in range(R):
            number = builder.load(builder.bitcast(at(x, (rows[r], x_row), (k, x_item)), ir.FloatType().as_pointer()))
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, i32(0))
            everywhere = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(i32, LANES), [0] * LANES))
            for part in range(len(parts)):
                total = sums[r, part]
                total.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                sums[r, part] = builder.call(fma, [everywhere, taken[part], total])
                total.add_incoming(sums[r, part], loop)
        following = builder.add(k, i64(1))
        k.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, K), loop, behind)
        builder.position_at_end(behind)
        y_row, y_item = cgutils.unpack_tuple(builder, y.strides)
        for (r, part), total in sums.items():
            builder.store(total, builder.bitcast(at(y, (rows[r], y_row), (parts[part], y_item)), vector.as_pointer()), align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile_of(typing_context, panel, x, y):  # type: ignore[no-untyped-def]
        return types.void(panel, x, y), generate

    return tile_of


one_row, some_rows = tile(1, PANEL), tile(TOGETHER, PANEL // 2)


@intrinsic
def as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 with these 32 bits."""
    return types.float32(types.int32), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], ir.FloatType())


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
def linear(panel, scale, bias, x, y, at):
    """y (N, 64) = x (N, K) @ panel (K, 64) * scale (64,) + bias (64,), where y, scale and bias are those from `at` on."""
    product(panel, x, y, at)
    for n in range(len(y)):
        row = y[n]
        for j in range(at, at + PANEL):
            row[j] = row[j] * scale[j] + bias[j]


@compiled(fastmath={"contract"})
def add_linear(panel, scale, bias, x, y, at):
    """The same, added to what is in y."""
    new = np.empty((len(y), PANEL), np.float32)
    product(panel, x, new, 0)
    for n in range(len(y)):
        row, more = y[n, at : at + PANEL], new[n]
        for j in range(PANEL):
            row[j] += more[j] * scale[at + j] + bias[at + j]


@compiled(fastmath={"contract"})
def linear_gelu(panel, scale, bias, x, y, at):
    """The GELU of it."""
    linear(panel, scale, bias, x, y, at)
    for n in range(len(y)):
        row = y[n]
        for j in range(at, at + PANEL):
            row[j] = gelu(row[j])


@compiled(fastmath={"contract"})
def linear_swiglu(panels, scale, bias, x, y, at):
    """The SwiGLU of it: panels, scale and bias are those of all gates and then of all values."""
    hidden = y.shape[1]
    value = np.empty((len(y), PANEL), np.float32)
    linear(panels[at // PANEL], scale, bias, x, y, at)
    linear(panels[(hidden + at) // PANEL], scale[hidden + at :], bias[hidden + at :], x, value, 0)
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
        out[:] = x


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
            product(values[p, begin:end], seen, mixed, 0)
            for i in range(T * G):
                at = (head * G + i % G) * D + p * PANEL
                for d in range(min(PANEL, D - p * PANEL)):
                    y[t + i // G, at + d] = mixed[i, d] / totals[i]


def read(shape, weights, keys, values, texts, tokens, n_logits):
    """Read new tokens (N,) of some texts -> the logits (n_logits, V or more) of what follows the last ones.

    keys (L, rows, K, S / 64, D, 64) and values (L, rows, K, D / 64, S, 64) hold what was read, and take what is.
    """
    N, C, items = len(tokens), weights.embedding.shape[1], len(texts.rows) * shape.n_kv_head
    rows, starts, past, turn = texts.rows, texts.starts, texts.past, weights.turn
    x = np.zeros((N, weights.proj[1].shape[1]), np.float32)  # the stream, filled up to whole panels
    for m in range(len(rows)):
        for n in range(starts[m], starts[m + 1]):
            for c in range(C):
                x[n, c] = weights.embedding[tokens[n], c] + weights.positions[past[m] + n - starts[m], c]
    normed, y = np.empty((N, C), np.float32), np.empty((N, C), np.float32)
    for layer in range(len(keys)):
        normalize(shape, weights.norms[2 * layer], x, normed)
        panels, scale, bias = weights.qkv[0][layer], weights.qkv[1][layer], weights.qkv[2][layer]
        qkv = np.empty((N, scale.size), np.float32)
        for p in prange(len(panels)):
            linear(panels[p], scale, bias, normed, qkv, p * PANEL)

        head_norms, layer_keys, layer_values = weights.head_norms[layer], keys[layer], values[layer]
        for item in prange(items):
            m, head = item // shape.n_kv_head, item % shape.n_kv_head
            begin, end = starts[m], starts[m + 1]
            own_keys, own_values = layer_keys[rows[m], head], layer_values[rows[m], head]
            attend(shape, head_norms, turn, qkv[begin:end], head, past[m], own_keys, own_values, y[begin:end])

        panels, scale, bias = weights.proj[0][layer], weights.proj[1][layer], weights.proj[2][layer]
        for p in prange(len(panels)):
            add_linear(panels[p], scale, bias, y, x, p * PANEL)

        normalize(shape, weights.norms[2 * layer + 1], x, normed)
        panels, scale, bias = weights.fc[0][layer], weights.fc[1][layer], weights.fc[2][layer]
        hidden = np.empty((N, scale.size // 2 if shape.modern else scale.size), np.float32)
        for p in prange(hidden.shape[1] // PANEL):
            if shape.modern:
                linear_swiglu(panels, scale, bias, normed, hidden, p * PANEL)
            else:
                linear_gelu(panels[p], scale, bias, normed, hidden, p * PANEL)

        panels, scale, bias = weights.mlp_proj[0][layer], weights.mlp_proj[1][layer], weights.mlp_proj[2][layer]
        for p in prange(len(panels)):
            add_linear(panels[p], scale, bias, hidden, x, p * PANEL)

    normalize(shape, weights.norms[2 * len(keys)], x, normed)
    panels, scale, bias = weights.head[0][0], weights.head[1][0], weights.head[2][0]
    logits = np.empty((n_logits, scale.size), np.float32)
    for p in prange(len(panels)):
        linear(panels[p], scale, bias, normed[N - n_logits :], logits, p * PANEL)
    return logits


read_alone, read_together = compiled(read), compiled(read, parallel=PRANGE_ONLY)


def most_threads() -> int:
    """As many as Numba has, which is one for each core."""
    return numba.config.NUMBA_NUM_THREADS


def use_threads(threads: int) -> None:
    """How many of them `read_together` takes when this thread calls it."""
    numba.set_num_threads(threads)
