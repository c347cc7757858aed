"""Training batches as a pure function of seed, step and row.

There is no data loader state to save: the batch of any step is computed directly, on any rank and
in any order. Each epoch cuts the tokens into adjacent windows of `context_length` tokens, starting
at a random offset, and visits every window once, in a random order. With `DocumentWindows`,
windows start with their document, and the last one of a document may be shorter. Random numbers
come from a counter-based generator (`nanogpt.splitmix`), random orders from a Feistel network.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nanogpt.sizes import token_dtype
from nanogpt.splitmix import mix64, random_bits

# The target after the end of a document; cross-entropy ignores it.
IGNORE_INDEX = -100
# Operating systems limit the files that a process may hold open.
MAX_OPEN_SHARDS = 64
# The third argument of `random_bits` is the row of a batch, or for an epoch a number from here on,
# which no row reaches. So the two never share random bits.
EPOCH_STREAM = 2**40
FEISTEL_ROUNDS = 4


class MemmapTokens:
    """A sequence of N token ids in memory-mapped shards, with `len()` and slices.

    Slices are arrays; only the pages they touch are read.

    Args:
        paths: Files of token ids, in order.
        vocab_size: Size of the vocabulary, which gives the integer type of a token id.

    Attributes:
        shard_offsets: Position of the first token of each shard, and the number of tokens.
    """

    def __init__(self, paths: Sequence[Path], vocab_size: int):
        self.paths = list(paths)
        self.dtype = token_dtype(vocab_size)
        sizes = [path.stat().st_size // self.dtype.itemsize for path in paths]
        self.shard_offsets = [0, *accumulate(sizes)]
        # The cache keeps the most recently used shards open.
        open_shard = partial(np.memmap, dtype=self.dtype, mode="r")
        self._open_shard = lru_cache(MAX_OPEN_SHARDS)(open_shard)

    def __len__(self) -> int:
        return self.shard_offsets[-1]

    def __getitem__(self, positions: slice) -> np.ndarray:
        start, stop, step = positions.indices(len(self))
        assert step == 1, "only contiguous slices"
        segments = []
        shard = bisect_right(self.shard_offsets, start) - 1
        while start < stop:
            offset = self.shard_offsets[shard]  # NumPy ends the slice at the end of the shard.
            segments.append(self._open_shard(self.paths[shard])[start - offset : stop - offset])
            shard += 1
            start = self.shard_offsets[shard]
        if len(segments) == 1:
            return segments[0]
        return np.concatenate(segments) if segments else np.empty(0, self.dtype)


def sample_batch(
    tokens: MemmapTokens | np.ndarray,
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
    context_length: int,
    documents: "DocumentWindows | None" = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return some rows of the batch of one optimizer step.

    Args:
        tokens: (N,) token ids, at least `context_length + 1`.
        seed: Seed of the run.
        step: Optimizer step, from 0.
        rows: The B rows to return, of the `batch_size` rows of the step.
        batch_size: Sequences per optimizer step, over all ranks.
        context_length: Tokens per sequence, T.
        documents: Windows that end where their document ends; by default windows cross documents.

    Returns:
        Inputs (B, T) int64, which are 0 after the end of a document.
        Targets (B, T) int64, the next tokens, which are `IGNORE_INDEX` after the end of a document.
        Dropout seeds (B,) int32, one for each row.
    """
    row_ids = np.arange(rows.start, rows.stop, dtype=np.uint64)
    dropout_seeds = random_bits(seed, step, row_ids).astype(np.uint32).view(np.int32)
    window_ids = np.uint64(step) * np.uint64(batch_size) + row_ids
    if documents is None:
        starts = window_starts(len(tokens), context_length, seed, window_ids).astype(np.int64)
        stops = starts + context_length + 1
    else:
        starts, document_ends = documents.locate(seed, window_ids)
        stops = np.minimum(starts + context_length + 1, document_ends)
    windows = np.full((len(rows), context_length + 1), IGNORE_INDEX, np.int64)
    for window, start, stop in zip(windows, starts.tolist(), stops.tolist(), strict=True):
        window[: stop - start] = tokens[start:stop]
    sequences = torch.from_numpy(windows)  # (B, T + 1)
    inputs = sequences[:, :-1].clamp(min=0)  # IGNORE_INDEX is no token id
    targets = sequences[:, 1:]
    return inputs, targets, torch.from_numpy(dropout_seeds)


def window_starts(
    num_tokens: int, context_length: int, seed: int, window_ids: np.ndarray
) -> np.ndarray:
    """Return the position of the first token of each window, (B,) uint64.

    An epoch reads each window once. It starts at a random offset, and leaves out the tokens before
    it and after the last window: less than two windows in all. As many windows at independent
    random positions would leave out a fraction 1/e of the text.

    Args:
        num_tokens: Tokens of the training split.
        context_length: Tokens per window.
        seed: Seed of the run.
        window_ids: (B,) uint64; window i is the i-th that training reads.
    """
    # One window fewer than would fit leaves room for the offset and for the last target.
    windows_per_epoch = max(1, (num_tokens - context_length) // context_length)
    epoch, index = _shuffled_position(seed, window_ids, windows_per_epoch)
    num_offsets = np.uint64(num_tokens - windows_per_epoch * context_length)
    epoch_offset = random_bits(seed, epoch, EPOCH_STREAM) % num_offsets
    return epoch_offset + np.uint64(context_length) * index


class DocumentWindows:
    """Training windows that stay within one document each.

    Each document is cut from its start into adjacent windows; the last one may be shorter.

    Args:
        document_ends: (num_documents,) int64, the position after the last token of each, in order.
        context_length: Tokens per window.
    """

    def __init__(self, document_ends: np.ndarray, context_length: int):
        self.document_offsets = np.append(0, document_ends)
        self.context_length = context_length
        num_targets = np.diff(self.document_offsets) - 1
        windows_per_document = -(-num_targets // context_length)  # rounded up
        # The index of each document's first window, and the number of windows.
        self.first_windows = np.append(0, windows_per_document.cumsum())
        self.windows_per_epoch = int(self.first_windows[-1])
        assert self.windows_per_epoch > 0, "no document has two tokens"

    def locate(self, seed: int, window_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where each window starts and where its document ends, both (B,) int64.

        Args:
            seed: Seed of the run.
            window_ids: (B,) uint64; window i is the i-th that training reads.
        """
        _, index = _shuffled_position(seed, window_ids, self.windows_per_epoch)
        window = index.astype(np.int64)
        document = np.searchsorted(self.first_windows, window, side="right") - 1
        window_in_document = window - self.first_windows[document]
        start = self.document_offsets[document] + window_in_document * self.context_length
        return start, self.document_offsets[document + 1]


def _shuffled_position(
    seed: int, window_ids: np.ndarray, windows_per_epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch of each window and its index in the unshuffled epoch, both (B,) uint64."""
    epoch, position = np.divmod(window_ids, np.uint64(windows_per_epoch))
    streams = range(EPOCH_STREAM + 1, EPOCH_STREAM + 1 + FEISTEL_ROUNDS)
    round_keys = [random_bits(seed, epoch, stream) for stream in streams]
    return epoch, _feistel_permutation(position, windows_per_epoch, round_keys)


def _feistel_permutation(
    indices: np.ndarray, size: int, round_keys: list[np.ndarray]
) -> np.ndarray:
    """Map indices (B,) through a random permutation of `range(size)`.

    Each round has one key per index, (B,). The network permutes all numbers of `2 * half_bits`
    bits, a range of at least `size`. Results of `size` and above are permuted again until they are
    below ("cycle walking"; Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
    section 4).
    """
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # rounded up
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = indices
    pending = np.ones(len(indices), bool)
    while pending.any():
        left = values >> half_bits
        right = values & half_mask
        for key in round_keys:
            left, right = right, left ^ (mix64(right ^ key) & half_mask)
        values = np.where(pending, (left << half_bits) | right, values)
        pending = values >= size
    return values
