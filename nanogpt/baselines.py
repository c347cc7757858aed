"""The loss of n-gram models, which a trained model is compared with."""

import math

import numpy as np

from nanogpt.data.batches import MemmapTokens

# Limits of the tokens that are counted and scored, to bound memory and time.
NGRAM_TOKENS = 10_000_000
NGRAM_SCORED = 2_000_000


def ngram_losses(
    train: MemmapTokens | np.ndarray, val: MemmapTokens | np.ndarray
) -> dict[str, float]:
    """Compute the loss of uniform, unigram, bigram and trigram models, in nats per token.

    Smoothing is that of Witten and Bell (1991; Chen and Goodman 1998, section 2.5). A context that
    occurs c times with u distinct successors weights its own counts with c / (c + u). The shorter
    context gets the rest. "uniform" is uniform over the tokens that occur.

    Args:
        train: The tokens to count, (M,); the first `NGRAM_TOKENS` are used.
        val: The tokens to score, (N,); the first `NGRAM_SCORED` are used.
    """
    train, val = train[:NGRAM_TOKENS], val[:NGRAM_SCORED]
    occurs = np.zeros(1 + max(int(train.max(initial=0)), int(val.max(initial=0))), bool)
    occurs[train] = True
    occurs[val] = True
    num_symbols = int(occurs.sum())
    dense_ids = (occurs.cumsum() - 1).astype(np.int32)  # token -> id below num_symbols
    train_ids = dense_ids[train]
    val_ids = dense_ids[val]
    losses = {"uniform": math.log(num_symbols)}
    # The probability of each validation token under the model of the order before.
    probs = np.full(len(val_ids), 1 / num_symbols)
    for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
        if len(train_ids) < order or len(val_ids) <= order:
            break
        ngrams, counts = _count_ngrams(train_ids, order, num_symbols)
        # The n-grams are sorted, so those with the same context are adjacent.
        contexts, starts, num_successors = _runs(ngrams // num_symbols)
        context_counts = np.add.reduceat(counts, starts)
        val_ngrams = encode_ngrams(val_ids, order, num_symbols)
        val_contexts = val_ngrams // num_symbols
        c = _lookup(contexts, context_counts, val_contexts)
        u = _lookup(contexts, num_successors, val_contexts)
        ngram_count = _lookup(ngrams, counts, val_ngrams)
        backoff_probs = probs[order - 1 :]
        interpolated = (ngram_count + u * backoff_probs) / np.maximum(c + u, 1)
        probs = probs.copy()
        probs[order - 1 :] = np.where(c > 0, interpolated, backoff_probs)
        losses[name] = float(-np.log(probs[1:]).mean())
    return losses


def _count_ngrams(ids: np.ndarray, order: int, num_symbols: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct n-grams in ascending order, and their counts."""
    codes = encode_ngrams(ids, order, num_symbols)
    codes.sort()  # in place, to save memory
    ngrams, _, counts = _runs(codes)
    return ngrams, counts


def encode_ngrams(ids: np.ndarray, order: int, num_symbols: int) -> np.ndarray:
    """Encode each n-gram as one int64 in base `num_symbols`, which may be up to two million."""
    num_ngrams = len(ids) - order + 1
    codes = np.zeros(num_ngrams, np.int64)
    for i in range(order):
        codes *= num_symbols
        codes += ids[i : num_ngrams + i]
    return codes


def _runs(ascending: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct values of a sorted array, the index where each starts, and its count."""
    starts = np.flatnonzero(np.concatenate([[True], ascending[1:] != ascending[:-1]]))
    return ascending[starts], starts, np.diff(np.append(starts, len(ascending)))


def _lookup(sorted_keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the value of each queried key, or 0 if there is no such key."""
    index = np.minimum(np.searchsorted(sorted_keys, queries), len(sorted_keys) - 1)
    return np.where(sorted_keys[index] == queries, values[index], 0)
