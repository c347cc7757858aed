"""Sizes that several parts go by: of layers, of what is there at a time, and of tokens on the disk. Without torch, so that what only counts answers at once."""

import numpy as np

QUERIES = 1024  # that attend at a time where their probabilities or masks are held
SCORES = 2**25  # logits that are held at a time
UNIT = 64 << 20  # bytes of text that are encoded into one shard,
MOST_UNITS = 4096  # or more, so that there are not many more shards than this


def swiglu_width(n_embd: int) -> int:
    """Channels inside a SwiGLU with the parameters of a four times wider layer: 8/3 of the width, rounded up to a multiple of 32."""
    return -(-8 * n_embd // 3 // 32) * 32


def unit_bytes(text_bytes: int) -> int:
    """Bytes of a text of so many that make a shard of tokens."""
    return max(UNIT, text_bytes // MOST_UNITS)


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token id."""
    return np.min_scalar_type(vocab_size - 1)
