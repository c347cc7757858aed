"""Tokens on disk to batches, as a pure function of seed, step and row.

In: files of token ids. Out: inputs and targets of one step, and a key for each row's dropout.
There is no loader to rewind and no generator to save: asking for step 70 gives step 70, on any machine, in any order.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.sizes import token_dtype

IGNORED = -100  # a target that is none: behind the end of a document; cross-entropy leaves it out
MOST_OPEN = 64  # shards of a text that are mapped at a time: systems limit the files that a process may hold
PASSES = 2**40  # the second number of the random bits of a pass over the text, which no row reaches


class Tokens:
    """(N,) token ids that lie in shards on the disk, as one sequence: `len()` and slices, which are arrays. Only what is touched comes into memory."""

    def __init__(self, paths: Sequence[Path], dtype: np.dtype):
        self.paths, self.dtype = list(paths), dtype
        self._behind = np.cumsum([path.stat().st_size // dtype.itemsize for path in paths], dtype=np.int64)  # where in the sequence each shard ends
        self._mapped: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._behind[-1]) if len(self._behind) else 0

    @property
    def begins(self) -> list[int]:
        """Where in the sequence each shard begins."""
        return [0, *self._behind[:-1].tolist()] if self.paths else []

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        assert step == 1, "a stretch of the text"
        pieces = []
        shard = int(np.searchsorted(self._behind, start, side="right"))
        while start < stop:
            first, behind = int(self._behind[shard - 1]) if shard else 0, int(self._behind[shard])
            pieces.append(self._shard(shard)[start - first : min(stop, behind) - first])
            start, shard = behind, shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._mapped:
            if len(self._mapped) >= MOST_OPEN:
                self._mapped.pop(next(iter(self._mapped)))
            self._mapped[number] = np.memmap(self.paths[number], dtype=self.dtype, mode="r")
        return self._mapped[number]


def open_tokens(paths: Sequence[Path], vocab_size: int) -> Tokens:
    """The token ids in some files, in their order."""
    return Tokens(paths, token_dtype(vocab_size))


class Documents:
    """The windows of a text that stay within a document: each document is cut from its beginning into windows side by side, of which the last may be short.

    `ends` (D,) int64 says behind which token each document ends, in order. Two numbers a document are kept.
    """

    def __init__(self, ends: np.ndarray, context_length: int):
        self.ends = ends
        targets = np.diff(ends, prepend=0) - 1  # in each document
        self.behind = np.cumsum(-(-targets // context_length))  # the number of windows up to the end of each document
        self.count = int(self.behind[-1])
        assert self.count > 0, "some document has two tokens"

    def windows(self, context_length: int, seed: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the windows with these numbers (uint64) begin, and where their documents end. Each pass takes all windows in a random order."""
        turn, place = np.divmod(numbers, np.uint64(self.count))
        window = _shuffled(place, self.count, [random_bits(seed, turn, PASSES + number) for number in range(1, 5)]).astype(np.int64)
        document = np.searchsorted(self.behind, window, side="right")
        first = np.where(document > 0, self.behind[document - 1], 0)  # number of the document's first window
        begin = np.where(document > 0, self.ends[document - 1], 0)
        return begin + (window - first) * context_length, self.ends[document]


def random_bits(seed: int, *numbers: np.ndarray | int) -> np.ndarray:
    """uint64, independent for every seed and every tuple of numbers, which are broadcast: SplitMix64 (Steele et al. 2014, figure 17) of each in turn."""
    bits = np.array([seed], np.uint64)
    for number in numbers:
        bits = _mix64(bits + (np.atleast_1d(number).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    return bits


def batch(
    tokens: Tokens | np.ndarray, seed: int, step: int, rows: range, batch_size: int, context_length: int, documents: Documents | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Some `rows` of the `batch_size` of one step: windows of the text, or with `documents` windows within one document each.

    Gives inputs (B, T) and targets (B, T), int64, the targets one token further on, and a dropout key (B,) int32 for each row. Behind the end of a
    document the inputs are 0 and the targets `IGNORED`. `tokens` holds at least `context_length + 1` ids.
    """
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)
    numbers = np.uint64(step) * np.uint64(batch_size) + row
    keys = torch.from_numpy(random_bits(seed, step, row).astype(np.uint32).view(np.int32))
    if documents is None:
        starts = window_starts(len(tokens), context_length, seed, numbers)
        windows = np.stack([tokens[start : start + context_length + 1] for start in starts.tolist()]).astype(np.int64)
    else:
        windows = np.full((len(rows), context_length + 1), IGNORED, np.int64)
        starts, ends = documents.windows(context_length, seed, numbers)
        for window, start, end in zip(windows, starts.tolist(), ends.tolist(), strict=True):
            inside = tokens[start : min(start + context_length + 1, end)]
            window[: len(inside)] = inside
    block = torch.from_numpy(windows)  # (B, T + 1)
    return block[:, :-1].clamp(min=0), block[:, 1:], keys


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
