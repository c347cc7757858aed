"""Tokens on disk to batches, as a pure function of seed, step and row.

In: a file of token ids. Out: inputs and targets of one step, and a key for each row's dropout.
There is no loader to rewind and no generator to save: asking for step 70 gives step 70, on any machine, in any order.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PASSES = 2**40  # the second number of the random bits of a pass over the text, which no row reaches


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer that holds every token id."""
    return np.min_scalar_type(vocab_size - 1)


def open_tokens(path: Path, vocab_size: int) -> np.ndarray:
    """(N,) token ids, mapped from the file: only what is touched comes into memory."""
    return np.memmap(path, dtype=token_dtype(vocab_size), mode="r")


def random_bits(seed: int, *numbers: np.ndarray | int) -> np.ndarray:
    """uint64, independent for every seed and every tuple of numbers, which are broadcast: SplitMix64 (Steele et al. 2014, figure 17) of each in turn."""
    bits = np.array([seed], np.uint64)
    for number in numbers:
        bits = _mix64(bits + (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return bits


def batch(tokens: np.ndarray, seed: int, step: int, rows: range, batch_size: int, context_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Some `rows` of the `batch_size` of one step: windows of the text.

    Gives inputs (B, T) and targets (B, T), int64, the targets one token further on, and a dropout key (B,) int32 for each row.
    `tokens` holds at least `context_length + 1` ids.
    """
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)
    starts = window_starts(len(tokens), context_length, seed, np.uint64(step) * np.uint64(batch_size) + row)
    windows = np.stack([tokens[start : start + context_length + 1] for start in starts.tolist()]).astype(np.int64)
    keys = torch.from_numpy(random_bits(seed, step, row).astype(np.uint32).view(np.int32))
    block = torch.from_numpy(windows)  # (B, T + 1)
    return block[:, :-1], block[:, 1:], keys


def window_starts(tokens: int, context_length: int, seed: int, numbers: np.ndarray) -> np.ndarray:
    """Where in a text of so many tokens the windows with these numbers (uint64) begin.

    The text is read again and again. Each pass cuts it into windows side by side, from a random beginning, and takes them in a random order: nothing is
    read twice before the rest was read once, which teaches more than windows at random places (those leave out 1 / e of the text in as many draws).
    """
    count = max(1, (tokens - context_length) // context_length)  # windows in a pass
    turn, place = np.divmod(numbers, np.uint64(count))
    offset = random_bits(seed, turn, PASSES) % np.uint64(tokens - count * context_length)
    return offset + np.uint64(context_length) * _shuffled(place, count, [random_bits(seed, turn, PASSES + number) for number in range(1, 5)])


def _shuffled(places: np.ndarray, count: int, keys: list[np.ndarray]) -> np.ndarray:
    """Where a random permutation of `range(count)` takes `places`: a Feistel network with a round for each of the keys, walked until it comes out inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", section 4)."""
    half = np.uint64(max(1, (count - 1).bit_length() + 1 >> 1))  # bits of each half
    mask = (np.uint64(1) << half) - np.uint64(1)
    x, outside = places, np.ones(len(places), bool)
    while outside.any():
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix64(right ^ key) & mask)
        x = np.where(outside, left << half | right, x)
        outside = x >= count
    return x


def _mix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
