"""The forward pass of a GPT, compiled by Numba: one call reads some new tokens of several texts and gives the logits of what follows; of a text that is
alone it can go on with what it draws.

In: weights in panels, keys and values of what was read before, tokens. Out: logits.

Every matrix W (N, K) is stored as panels (N / 64, K, 64): 64 outputs side by side, the last panel filled up with zeros. So a product needs no sum across
a vector, memory is read in order, and each output is one chain of multiply-adds in the order of K, whatever is computed beside it: a text comes out the
same, bit for bit, alone or among others, read at once or token by token. Keys are such a matrix too (an output for each position), and so are values.

Where weights are int8, all of it is: keys and values are int8 with a scale for each position, and what they and the weights are multiplied by is int16 with
a scale for each row, so that a product is a sum of integers, which is exact. Panels are then (N / 64, K / 2, 128), in pairs: see `tile`.

N tokens at once, C channels, H query heads, G of them for each head of keys and values, D channels per head, S positions, V vocabulary; R rows of a tile.
"""

import threading
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from nanogpt.generate.tile import PANEL, TOGETHER, add_together, as_others_left_it, compiled, one_row, some_rows
from nanogpt.generate.vectors import gelu, layer_norm, one, rms_norm, rotate, settle, shrink, silu, softmax, times

BLOCK = 8  # tokens of a text whose queries meet its keys together

FIRST = np.int64(0)  # for a plain 0, Numba would compile anew


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


class Draws(NamedTuple):
    """How the tokens are drawn with which a text goes on in the same call: T - 1 of them, or none."""

    temperature: np.float32
    added: np.ndarray  # (V,): to the logits
    chances: np.ndarray  # (T - 1,) in [0, 1)
    shares: np.ndarray  # (V,): room


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
    """What goes from stage to stage, for up to N tokens, and room for each thread; widths are filled up to whole panels."""

    x: np.ndarray  # (N, C or more): the stream
    normed: np.ndarray  # (N, C or more) with scales, which are Rows; then the queries, as Rows too
    normed_scales: np.ndarray
    qkv: np.ndarray  # (N, (H + 2 K) D or more); then what is to be added to the stream
    mixed: np.ndarray  # (N, C): values, as attention mixes them; and what is being normalised
    mixed_numbers: np.ndarray  # the same as Rows
    mixed_scales: np.ndarray
    hidden: np.ndarray  # (N, 4 C or so); in modern, gates and values
    hidden_numbers: np.ndarray  # (N, 4 C or so): as Rows
    hidden_scales: np.ndarray
    logits: np.ndarray  # (N or T, V or more)
    scores: np.ndarray  # (threads, BLOCK, S) of a head
    shares: np.ndarray  # the same as Rows
    scales: np.ndarray  # (threads, 2, BLOCK) of queries and shares
    mix: np.ndarray  # (threads, BLOCK, 64)
    counts: np.ndarray  # (T stages, COUNTS)


PRANGE_ONLY = dict.fromkeys(("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False) | {"prange": True}


@compiled
def normalize(shape, norm, x, normed, numbers):
    """x (C,) with the norm's weight and bias (2, C) -> normed (C,), and settled in numbers (C,); their scale."""
    if shape.modern:
        rms_norm(x, norm[0], shape.epsilon, normed)
    else:
        layer_norm(x, norm[0], norm[1], shape.epsilon, normed)
    return settle(normed, numbers)


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
    scales, biases = after[0, at : at + PANEL], after[1, at : at + PANEL]
    for n in range(len(y)):
        row, scale = y[n, at : at + PANEL], x.scales[n]
        for j in range(PANEL):
            row[j] = row[j] * (scales[j] * scale) + biases[j]


@compiled(fastmath={"contract"})
def add_linear(panel, after, x, new, y, at):
    """The same, in new, and added to what is in y."""
    linear(panel, after, x, new, at)
    for n in range(len(y)):
        row, more = y[n, at : at + PANEL], new[n, at : at + PANEL]
        for j in range(PANEL):
            row[j] += more[j]


@compiled(fastmath={"contract"})
def linear_gelu(panel, after, x, y, at):
    """The GELU of it."""
    linear(panel, after, x, y, at)
    for n in range(len(y)):
        row = y[n, at : at + PANEL]
        for j in range(PANEL):
            row[j] = gelu(row[j])


@compiled(fastmath={"contract"})
def linear_swiglu(panels, after, x, y, at):
    """The SwiGLU of it: panels, after and y are those of all gates, and then of all values."""
    hidden = y.shape[1] // 2
    linear(panels[at // PANEL], after, x, y, at)
    linear(panels[(hidden + at) // PANEL], after, x, y, hidden + at)
    for n in range(len(y)):
        row, factor = y[n, at : at + PANEL], y[n, hidden + at : hidden + at + PANEL]
        for j in range(PANEL):
            row[j] = silu(row[j]) * factor[j]


@compiled
def draw(logits, draws, chance):
    """logits (V or more) -> the token that `filters.draw` gives for this chance, unless the chance falls within rounding of a border."""
    shares, reached = draws.shares, 0.0
    for v in range(shares.size):
        shares[v] = (logits[v] + draws.added[v]) / draws.temperature
    goal = chance * softmax(shares)
    for v in range(shares.size):
        reached += shares[v]
        if reached > goal:
            return v
    return shares.size - 1


@compiled
def turn_to(shape, norm, turn, position, x):
    """A query or a key x (D,) becomes what meets the others."""
    if shape.modern:
        rms_norm(x, norm, shape.epsilon, x)
        rotate(x, turn[0, position], turn[1, position])


@compiled
def keep(shape, norm, turn, key, value, position, cache):
    """Put the key and the value (D,) of the token at a position into the cache of their head; they become what is kept."""
    pairs = cache.keys.shape[2] // PANEL - 1  # 1 where numbers lie together in pairs, so that its bits divide by 2, else 0
    turn_to(shape, norm, turn, position, key)
    cache.key_scales[position], cache.value_scales[position] = shrink(key, pairs), shrink(value, pairs)
    panel, column = cache.keys[position // PANEL], position % PANEL << pairs
    for d in range(key.size):
        panel[d >> pairs, column + (d & pairs)] = key[d]
    row, column = position >> pairs, position & pairs
    for d in range(value.size):
        cache.values[d // PANEL, row, (d % PANEL << pairs) + column] = value[d]


@compiled
def attend(shape, norm, turn, queries, q, past, cache, thread, work, y):
    """One head for the T new tokens of a text: queries (T, D) -> y (T, D); the cache is that of their keys and values, and holds `past` tokens and these.

    q (T, D or more) takes the queries as Rows.
    """
    D, pairs, root = shape.head_dim, cache.keys.shape[2] // PANEL - 1, one / np.sqrt(np.float32(shape.head_dim))
    scores, shares, mix, scales = work.scores[thread], work.shares[thread], work.mix[thread], work.scales[thread]
    for first in range(0, len(queries), BLOCK):
        T = min(BLOCK, len(queries) - first)
        for t in range(T):
            query = queries[first + t]
            turn_to(shape, norm, turn, past + first + t, query)
            for d in range(query.size):
                query[d] *= root
            scales[0, t] = settle(query, q[first + t, :D])
        begin, end = max(0, past + first - shape.window + 1) // PANEL * PANEL, past + first + T  # of what these tokens see
        for s in range(begin, end, PANEL):
            product(cache.keys[s // PANEL], q[first : first + T], scores[:T], s - begin)
        for t in range(T):
            behind = past + first + t + 1
            seen = max(begin, behind - shape.window)
            row = scores[t, seen - begin : behind - begin]
            times(row, scales[0, t], cache.key_scales[seen:behind])
            total = softmax(row)
            times(row, one, cache.value_scales[seen:behind])
            shares[t, : seen - begin] = 0
            shares[t, behind - begin : (end - begin + PANEL - 1) // PANEL * PANEL] = 0
            scales[1, t] = settle(row, shares[t, seen - begin : behind - begin]) / total
        for p in range(len(cache.values)):
            product(cache.values[p, begin >> pairs : end + pairs >> pairs], shares[:T], mix[:T], FIRST)
            for t in range(T):
                row = y[first + t, p * PANEL : D]
                for d in range(min(PANEL, row.size)):
                    row[d] = mix[t, d] * scales[1, t]


# The stages of a layer, then the last and the first of a pass; each has many parts, which can be computed at once.
NORM_1, QKV, KEEP, ATTEND, MIXED, PROJ, NORM_2, FC, HIDDEN, MLP_PROJ, HEAD, EMBED = range(12)
DONE, COUNTS = 8, 16  # where parts that are done are counted, another cache line than that of those taken


@compiled
def size(stage, shape, weights, texts, work):
    """How many parts a stage has: rows, panels of outputs, texts, or heads of texts."""
    if stage == QKV:
        return weights.qkv.shape[1]
    if stage == KEEP:
        return len(texts.rows) * shape.n_kv_head
    if stage == ATTEND:
        return len(texts.rows) * shape.n_head
    if stage in (PROJ, MLP_PROJ):
        return weights.proj.shape[1]
    if stage == FC:
        return work.hidden_numbers.shape[1] // PANEL
    if stage == HEAD:
        return len(weights.head)
    if stage == EMBED:
        return len(texts.rows)
    return len(work.x)


@compiled
def part(stage, i, t, layer, thread, shape, weights, cache, texts, tokens, draws, work):
    """Part i of a stage of pass t."""
    at, C, D = i * PANEL, work.mixed.shape[1], shape.head_dim
    normed = Rows(work.normed, work.normed_scales)
    if stage in (NORM_1, NORM_2):
        norm = weights.norms[2 * layer + (1 if stage == NORM_2 else 0)]
        work.normed_scales[i] = normalize(shape, norm, work.x[i, :C], work.mixed[i], work.normed[i, :C])
    elif stage == QKV:
        linear(weights.qkv[layer, i], weights.qkv_after[layer], normed, work.qkv, at)
    elif stage in (KEEP, ATTEND):
        heads = shape.n_kv_head if stage == KEEP else shape.n_head
        m, head = i // heads, i % heads
        of = head if stage == KEEP else head // (shape.n_head // shape.n_kv_head)
        row, past, begin, end = texts.rows[m], texts.past[m], texts.starts[m], texts.starts[m + 1]
        keys, values = cache.keys[layer, row, of], cache.values[layer, row, of]
        kept = Cache(keys, cache.key_scales[layer, row, of], values, cache.value_scales[layer, row, of])
        if stage == ATTEND:
            queries, q = work.qkv[begin:end, head * D : head * D + D], work.normed[begin:end, head * (D + D % 2) :]
            attend(shape, weights.head_norms[layer, 0], weights.turn, queries, q, past, kept, thread, work, work.mixed[begin:end, head * D :])
            return
        key, value = (shape.n_head + head) * D, (shape.n_head + shape.n_kv_head + head) * D
        for n in range(begin, end):
            of_token = work.qkv[n]
            keep(shape, weights.head_norms[layer, 1], weights.turn, of_token[key : key + D], of_token[value : value + D], past + n - begin, kept)
    elif stage == MIXED:
        work.mixed_scales[i] = settle(work.mixed[i], work.mixed_numbers[i, :C])
    elif stage == PROJ:
        add_linear(weights.proj[layer, i], weights.proj_after[layer], Rows(work.mixed_numbers, work.mixed_scales), work.qkv, work.x, at)
    elif stage == FC and shape.modern:
        linear_swiglu(weights.fc[layer], weights.fc_after[layer], normed, work.hidden, at)
    elif stage == FC:
        linear_gelu(weights.fc[layer, i], weights.fc_after[layer], normed, work.hidden, at)
    elif stage == HIDDEN:
        numbers = work.hidden_numbers[i]
        work.hidden_scales[i] = settle(work.hidden[i, : numbers.size], numbers)
    elif stage == MLP_PROJ:
        add_linear(weights.mlp_proj[layer, i], weights.mlp_proj_after[layer], Rows(work.hidden_numbers, work.hidden_scales), work.qkv, work.x, at)
    elif stage == HEAD:
        M = len(texts.rows)
        first = len(work.normed) - M
        linear(weights.head[i], weights.head_after, Rows(work.normed[first:], work.normed_scales[first:]), work.logits[t : t + M], at)
    else:
        if t > 0:
            tokens[t] = draw(work.logits[t - 1], draws, draws.chances[t - 1])
            texts.past[0] += 1
        for n in range(texts.starts[i], texts.starts[i + 1]):
            token, position = tokens[t + n], texts.past[i] + n - texts.starts[i]
            for c in range(C):
                work.x[n, c] = weights.embedding[token, c] + weights.positions[position, c]


@compiled
def stages(thread, shape, weights, cache, texts, tokens, draws, work):
    """All passes, as each thread goes through them: it does those parts of a stage that no other has taken, and waits until all are done.

    So none waits for a thread that has not begun, and it does not matter how many there are.
    """
    last = len(weights.qkv) * HEAD + 1  # behind EMBED, the layers' stages and another NORM_1
    for at in range(len(work.counts)):
        t, step, counts = at // (last + 2), at % (last + 2) - 1, work.counts[at]
        layer, stage = step // HEAD, step % HEAD
        if step == last:
            stage = HEAD
        elif step < 0:
            stage = EMBED
        n, mine = size(stage, shape, weights, texts, work), 0
        some = max(1, n // (4 * len(work.scores)))  # parts at a time, so that a thread that is late leaves most of its own to others
        i = add_together(counts, 0, some)
        while i < n:
            for taken in range(i, min(n, i + some)):
                part(stage, taken, t, layer, thread, shape, weights, cache, texts, tokens, draws, work)
                mine += 1
            i = add_together(counts, 0, some)
        add_together(counts, DONE, mine)
        while as_others_left_it(counts, DONE) < n:
            pass


@compiled(parallel=PRANGE_ONLY)
def together(threads, shape, weights, cache, texts, tokens, draws, work):
    """All passes, by so many threads."""
    if threads > 1:
        for thread in prange(threads):
            stages(np.int64(thread), shape, weights, cache, texts, tokens, draws, work)
    else:
        stages(FIRST, shape, weights, cache, texts, tokens, draws, work)


@compiled
def read(shape, weights, cache, texts, tokens, draws, threads, work):
    """Read new tokens (N,) of M texts -> in work the logits (M, V or more) of what follows each, if there is one token of each, or all are of one text.

    With T - 1 chances, of one text, tokens are (T,): the first is read, each of the others is drawn from the logits before it, put there, and read; the
    logits of all are (T, V or more). The cache holds what was read, and takes what is; work has room for as many tokens, or more.
    """
    N, passes = texts.starts[-1], 1 + len(draws.chances)
    work = Work(
        work.x[:N], work.normed[:N], work.normed_scales[:N], work.qkv[:N], work.mixed[:N], work.mixed_numbers[:N], work.mixed_scales[:N],
        work.hidden[:N], work.hidden_numbers[:N], work.hidden_scales[:N], work.logits, work.scores, work.shares, work.scales, work.mix,
        work.counts[: passes * (len(weights.qkv) * HEAD + 3)],
    )  # fmt: skip
    work.counts[:] = 0
    together(threads, shape, weights, cache, texts, tokens, draws, work)


_used = threading.local()  # how many threads this thread was told to use


def most_threads() -> int:
    """As many as Numba has, which is one for each core."""
    return numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def use_threads(threads: int) -> None:
    """How many of them `read` takes when this thread calls it."""
    if getattr(_used, "threads", None) != threads:  # setting them takes 10 us
        numba.set_num_threads(threads)
        _used.threads = threads
