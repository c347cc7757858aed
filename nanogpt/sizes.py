"""Sizes of token shards and types of token ids, without torch."""

import numpy as np

SHARD_BYTES = 64 << 20  # text per shard, or more so that there are at most MAX_SHARDS
MAX_SHARDS = 4096


def shard_bytes(text_bytes: int) -> int:
    """Return the bytes of text per shard, for a text of `text_bytes` bytes."""
    return max(SHARD_BYTES, text_bytes // MAX_SHARDS)


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned integer type that holds every token id."""
    return np.min_scalar_type(vocab_size - 1)
