"""Tokens on disk to batches, as a pure function of seed, step and row.

In: a file of token ids. Out: inputs and targets of one step, and a key for each row's dropout.
There is no loader to rewind and no generator to save: asking for step 70 gives step 70, on any machine, in any order.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token id."""
    return np.min_scalar_type(vocab_size - 1)


def open_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """(N,) token ids, mapped from the file: only what is touched comes into memory."""
    return np.memmap(path, dtype=token_dtype(vocab_size), mode="r")


def random_bits(seed: int, step: int, rows: range) -> np.ndarray:
    """(rows,) uint64, independent for every seed, step and row: SplitMix64 (Steele et al. 2014, figure 17) of the three in turn."""
    bits = np.full(len(rows), seed, np.uint64)
    for value in (np.array([step], np.uint64), np.arange(rows.start, rows.stop, dtype=np.uint64)):
        bits = _mix64(bits + (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return bits


def batch(tokens: np.ndarray, seed: int, step: int, rows: range, context_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of one step's global batch: windows of the text at random places.

    Gives inputs (B, T) and targets (B, T), int64, the targets one token further on, and a dropout key (B,) int32 for each row.
    `tokens` holds at least `context_length + 1` ids.
    """
    bits = random_bits(seed, step, rows)
    starts = (bits >> np.uint64(1)) % np.uint64(len(tokens) - context_length)  # the modulo's bias is below 1e-9 for a GB of text
    windows = np.stack([tokens[start : start + context_length + 1] for start in starts.tolist()]).astype(np.int64)
    keys = torch.from_numpy(_mix64(bits).astype(np.uint32).view(np.int32))
    block = torch.from_numpy(windows)  # (B, T + 1)
    return block[:, :-1], block[:, 1:], keys


def _mix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
