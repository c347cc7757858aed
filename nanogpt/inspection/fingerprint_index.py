"""An index of the training text that finds passages of it quickly.

The index is a sorted list of fingerprints. One is taken of every 16-byte window that starts at a
multiple of 16 bytes. It takes half a byte per byte of the text and does not contain the text.
Blocks of tokens are detokenized when they are compared with a query.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanogpt.data.batches import MemmapTokens, random_bits
from nanogpt.files import atomic_write
from nanogpt.tokenizer.tokenizer import Tokenizer

VERSION = 1  # of the index file
WINDOW_BYTES = 16  # size of a fingerprinted window, and distance of two windows
MAX_INDEXED_BYTES = 200_000_000  # only the start of a longer training text is indexed
CHUNK_TOKENS = 1 << 20  # tokens detokenized at a time while indexing; a multiple of BLOCK_TOKENS
BLOCK_TOKENS = 4096
# Separates documents. It never occurs in UTF-8, so that no match extends across documents.
DOC_SEPARATOR = 0xFF
PADDING = 2 * WINDOW_BYTES  # separator bytes before and after the text


class BulkDetokenizer:
    """Detokenizer of long token arrays into UTF-8 bytes, vectorized."""

    def __init__(self, tokenizer: Tokenizer):
        token_bytes = list(tokenizer.token_bytes)
        token_bytes[tokenizer.eot_id] = bytes([DOC_SEPARATOR])
        self.lengths = np.array([len(token) for token in token_bytes])  # (V,)
        self._starts = self.lengths.cumsum() - self.lengths
        self._all_bytes = np.frombuffer(b"".join(token_bytes), np.uint8)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """Return the bytes of ids (N,), uint8."""
        lengths = self.lengths[ids]
        # Add the shift to an index into the result to get an index into _all_bytes.
        shift = self._starts[ids] - (lengths.cumsum() - lengths)
        return self._all_bytes[np.repeat(shift, lengths) + np.arange(lengths.sum())]


class FingerprintIndex:
    """Fingerprints of the training text, and access to its bytes.

    A position is a byte offset in the training text.

    Attributes:
        tokens: Token ids of the training text.
        held_out: Token ids of the validation split.
        detokenizer: Converts ids into bytes.
        keys: Sorted uint64 (M,): fingerprint in the upper half, number of the window in the lower.
        block_counts: int64 (3, B + 1): bytes, characters and line ends before each block of tokens
            and in total.
        document_starts: Position of the first byte of each document, int64 (D,).
        num_bytes: Size of the indexed text.
    """

    def __init__(
        self,
        tokens: MemmapTokens | np.ndarray,
        held_out: MemmapTokens | np.ndarray,
        tokenizer: Tokenizer,
        tables: dict[str, np.ndarray],
    ):
        self.tokens = tokens
        self.held_out = held_out
        self.detokenizer = BulkDetokenizer(tokenizer)
        self.keys = tables["keys"]
        self.block_counts = tables["block_counts"]
        self.document_starts = tables["document_starts"]
        self.num_bytes = int(self.block_counts[0, -1])
        # The system allocates memory of zeros only where it is written to.
        self._bytes = np.zeros(self.num_bytes + 2 * PADDING, np.uint8)
        self._bytes[:PADDING] = DOC_SEPARATOR
        self._bytes[PADDING + self.num_bytes :] = DOC_SEPARATOR
        self._is_detokenized = np.zeros(self.block_counts.shape[1] - 1, bool)

    @property
    def is_complete(self) -> bool:
        """Return True if all of the training text is indexed."""
        return (self.block_counts.shape[1] - 1) * BLOCK_TOKENS >= len(self.tokens)

    def bytes_at(self, positions: np.ndarray) -> np.ndarray:
        """Return the bytes at rows of nearby positions (n, m), up to `PADDING` outside the text."""
        self._detokenize_blocks(np.unique(self._block_of(positions[:, [0, -1]])))
        return self._bytes[PADDING + positions]

    def bytes_between(self, start: int, stop: int) -> np.ndarray:
        """Return the bytes in [start, stop), clipped to the text."""
        start, stop = max(0, start), min(stop, self.num_bytes)
        if start >= stop:
            return self._bytes[:0]
        first, last = self._block_of(np.array([start, stop - 1])).tolist()
        self._detokenize_blocks(np.arange(first, last + 1))
        return self._bytes[PADDING + start : PADDING + stop]

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return document and line of a position (both from 1) and its offset in characters."""
        document = int(np.searchsorted(self.document_starts, position, side="right"))
        chars, lines = self._counts_before(position)
        start_chars, start_lines = self._counts_before(int(self.document_starts[document - 1]))
        return document, 1 + lines - start_lines, chars - start_chars

    def _counts_before(self, position: int) -> tuple[int, int]:
        """Return the numbers of characters and of line ends before a position."""
        block = int(self._block_of(np.array([position]))[0])
        block_start, chars, lines = self.block_counts[:, block].tolist()
        rest = self.bytes_between(block_start, position)
        return chars + int(char_starts(rest).sum()), lines + int((rest == ord("\n")).sum())

    def _block_of(self, positions: np.ndarray) -> np.ndarray:
        blocks = np.searchsorted(self.block_counts[0], positions, side="right") - 1
        return blocks.clip(0, len(self._is_detokenized) - 1)

    def _detokenize_blocks(self, blocks: np.ndarray) -> None:
        for block in blocks[~self._is_detokenized[blocks]].tolist():
            start = PADDING + int(self.block_counts[0, block])
            text = self.detokenizer(self.tokens[block * BLOCK_TOKENS : (block + 1) * BLOCK_TOKENS])
            self._bytes[start : start + len(text)] = text
            self._is_detokenized[block] = True


def open_index(
    path: Path | None,
    tokens: MemmapTokens | np.ndarray,
    held_out: MemmapTokens | np.ndarray,
    tokenizer: Tokenizer,
) -> FingerprintIndex:
    """Read the index of the training tokens from a file, or build and save it.

    Args:
        path: The index file. A missing or damaged file, or one of other tokens, is replaced; in a
            read-only folder the index is not saved. None keeps it in memory.
        tokens: Token ids of the training text.
        held_out: Token ids of the validation split.
        tokenizer: The tokenizer of both.
    """
    detokenizer = BulkDetokenizer(tokenizer)
    num_tokens, digest = _select_tokens(tokens, detokenizer)
    identity = [VERSION, WINDOW_BYTES, BLOCK_TOKENS, digest, tokenizer.to_json()]
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    tables = _read_tables(path, key) if path is not None else None
    if tables is None:
        tables = _build_tables(tokens, num_tokens, detokenizer)
        if path is not None:
            with suppress(OSError), atomic_write(path) as temporary:
                save_file(tables, temporary, metadata={"nanogpt": json.dumps({"key": key})})
                temporary.chmod(0o644)  # safetensors creates files readable by the owner only
    return FingerprintIndex(tokens, held_out, tokenizer, tables)


def _read_tables(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """Read the index file; None if it is missing, damaged or of another text."""
    try:
        with safe_open(path, "np") as file:
            if json.loads((file.metadata() or {}).get("nanogpt", "{}")).get("key") == key:
                names = ("keys", "block_counts", "document_starts")
                return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError):
        pass
    return None


def _select_tokens(
    tokens: MemmapTokens | np.ndarray, detokenizer: BulkDetokenizer
) -> tuple[int, str]:
    """Return the number of tokens to index and their SHA-256.

    These are all tokens, or the fewest blocks that reach `MAX_INDEXED_BYTES`.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        ids = tokens[start : start + CHUNK_TOKENS]
        block_bytes = np.add.reduceat(
            detokenizer.lengths[ids], np.arange(0, len(ids), BLOCK_TOKENS)
        )
        ends = num_bytes + block_bytes.cumsum()
        num_blocks = int(np.searchsorted(ends, MAX_INDEXED_BYTES, side="left")) + 1
        selected = ids[: num_blocks * BLOCK_TOKENS]
        digest.update(np.ascontiguousarray(selected).data)
        if num_blocks <= len(ends) and ends[num_blocks - 1] >= MAX_INDEXED_BYTES:
            return start + len(selected), digest.hexdigest()
        num_bytes = int(ends[-1])
    return len(tokens), digest.hexdigest()


def _build_tables(
    tokens: MemmapTokens | np.ndarray, num_tokens: int, detokenizer: BulkDetokenizer
) -> dict[str, np.ndarray]:
    """Build the three tables of `FingerprintIndex` for the first `num_tokens` tokens."""
    prints = [np.empty(0, np.uint32)]
    counts = [np.zeros((3, 1), np.int64)]
    starts = [np.zeros(1, np.int64)]
    pending = np.empty(0, np.uint8)  # bytes that do not fill a window yet
    num_bytes = 0
    for start in range(0, num_tokens, CHUNK_TOKENS):
        ids = tokens[start : min(start + CHUNK_TOKENS, num_tokens)]
        text = detokenizer(ids)
        block_bytes = np.add.reduceat(
            detokenizer.lengths[ids], np.arange(0, len(ids), BLOCK_TOKENS)
        )
        ends = block_bytes.cumsum()
        marks = np.stack([char_starts(text), text == ord("\n")]).cumsum(axis=1)[:, ends - 1]
        counts.append(counts[-1][:, -1:] + np.concatenate([ends[None], marks]))
        starts.append(num_bytes + np.flatnonzero(text == DOC_SEPARATOR) + 1)
        num_bytes += len(text)
        text = np.concatenate([pending, text])
        num_full = len(text) // WINDOW_BYTES * WINDOW_BYTES
        prints.append(fingerprints(text[:num_full]))
        pending = text[num_full:]
    upper = np.concatenate(prints).astype(np.uint64) << np.uint64(32)
    document_starts = np.concatenate(starts)
    return {
        "keys": np.sort(upper | np.arange(len(upper), dtype=np.uint64)),
        # safetensors ignores strides and writes the buffer.
        "block_counts": np.ascontiguousarray(np.concatenate(counts, axis=1)),
        "document_starts": document_starts[: max(1, np.searchsorted(document_starts, num_bytes))],
    }


def fingerprints(windows: np.ndarray) -> np.ndarray:
    """Return the fingerprints, uint32 (M,), of M consecutive windows, uint8 (16 M,)."""
    words = windows.view("<u8").reshape(-1, 2)
    return (random_bits(0, words[:, 0], words[:, 1]) >> np.uint64(32)).astype(np.uint32)


def char_starts(text: np.ndarray) -> np.ndarray:
    """Return a mask of the bytes of UTF-8 that start a character."""
    return (text & 0xC0) != 0x80
