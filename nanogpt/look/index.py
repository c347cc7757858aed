"""An index over the training text, by which a passage of it is found in a moment.

In: the tokens a model was trained on and those that were held out, and its tokenizer. Out: an `Index`, which lies in a file. Refuses: nothing; a file that is
damaged, or of another text, is made again.

Every 16th window of 16 bytes of the training text has a fingerprint in a sorted list, half a byte for each byte of the text; the text itself is not in it.
Of its tokens only the blocks in question are spelled out.
"""

import hashlib
import json
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanogpt.data import Tokens, random_bits
from nanogpt.files import replacing
from nanogpt.tokenizer import Tokenizer

VERSION = 1  # of the index file
WINDOW = 16  # bytes that a fingerprint is taken of, and between two windows
MOST_BYTES = 200_000_000  # of the training text that are indexed: the first ones
PIECE = 1 << 20  # tokens that are spelled out at a time while the index is made; a multiple of
BLOCK = 4096  # tokens, at every so many of which it is noted how far the text has come
GAP = 0xFF  # stands between documents, and is a byte of no UTF-8, so that nothing matches across it


class Spelling:
    """The bytes of many tokens at once."""

    def __init__(self, tokenizer: Tokenizer):
        of_token = [bytes([GAP]) if i == tokenizer.end else spelled for i, spelled in enumerate(tokenizer.token_bytes)]
        self.lengths = np.array([len(spelled) for spelled in of_token])  # (V,)
        self._first = self.lengths.cumsum() - self.lengths
        self._all = np.frombuffer(b"".join(of_token), np.uint8)

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """ids (N,) -> their bytes, uint8."""
        lengths = self.lengths[ids]
        shift = self._first[ids] - (lengths.cumsum() - lengths)  # from a byte's place in the text to its place in `_all`
        return self._all[np.repeat(shift, lengths) + np.arange(lengths.sum())]


class Index:
    """The training text, to be searched: see the head of this file.

    `keys` (M,) uint64, sorted: a window's fingerprint in the upper half, its number in the lower. `blocks` (3, B + 1) int64: bytes, characters and line ends
    before each block of tokens, and in all. `documents` (D,) int64: the byte at which each begins.
    """

    def __init__(self, tokens: Tokens | np.ndarray, held_out: Tokens | np.ndarray, tokenizer: Tokenizer, tables: dict[str, np.ndarray]):
        self.tokens, self.held_out, self.spelling = tokens, held_out, Spelling(tokenizer)
        self.keys, self.blocks, self.documents = tables["keys"], tables["blocks"], tables["documents"]
        self.size = int(self.blocks[0, -1])
        self._bytes = np.zeros(self.size + 4 * WINDOW, np.uint8)  # which take memory as they are written to
        self._bytes[: 2 * WINDOW] = self._bytes[self.size + 2 * WINDOW :] = GAP  # before and behind the text
        self._spelled = np.zeros(self.blocks.shape[1] - 1, bool)

    @property
    def whole(self) -> bool:
        """Whether all of the training text is in it."""
        return (self.blocks.shape[1] - 1) * BLOCK >= len(self.tokens)

    def at(self, places: np.ndarray) -> np.ndarray:
        """The bytes at rows of places (n, m), each a short stretch, from 2 * WINDOW before the text to as far behind it."""
        self._spell(np.unique(self._block(places[:, [0, -1]])))
        return self._bytes[places + 2 * WINDOW]

    def stretch(self, first: int, behind: int) -> np.ndarray:
        """The bytes from one place to another, as far as the text goes."""
        first, behind = max(0, first), min(behind, self.size)
        if first >= behind:
            return self._bytes[:0]
        begin, end = self._block(np.array([first, behind - 1])).tolist()
        self._spell(np.arange(begin, end + 1))
        return self._bytes[first + 2 * WINDOW : behind + 2 * WINDOW]

    def where(self, place: int) -> tuple[int, int, int]:
        """The number of the document that holds a byte, from 1; there its line, from 1, and the characters before it."""
        document = int(np.searchsorted(self.documents, place, side="right"))
        here, begin = self._so_far(place), self._so_far(int(self.documents[document - 1]))
        return document, 1 + here[1] - begin[1], here[0] - begin[0]

    def _so_far(self, place: int) -> tuple[int, int]:
        """Characters and line ends before a byte."""
        block = int(self._block(np.array([place]))[0])
        part = self.stretch(int(self.blocks[0, block]), place)
        return int(self.blocks[1, block] + begins(part).sum()), int(self.blocks[2, block] + (part == 10).sum())

    def _block(self, places: np.ndarray) -> np.ndarray:
        return (np.searchsorted(self.blocks[0], places, side="right") - 1).clip(0, len(self._spelled) - 1)

    def _spell(self, blocks: np.ndarray) -> None:
        for block in blocks[~self._spelled[blocks]].tolist():
            begin = 2 * WINDOW + int(self.blocks[0, block])
            spelled = self.spelling(self.tokens[block * BLOCK : (block + 1) * BLOCK])
            self._bytes[begin : begin + len(spelled)] = spelled
            self._spelled[block] = True


def open_index(path: Path | None, tokens: Tokens | np.ndarray, held_out: Tokens | np.ndarray, tokenizer: Tokenizer) -> Index:
    """The index of training `tokens` that lies at `path`; if there is none, or it is of other tokens, it is made, and written there if that can be."""
    spelling = Spelling(tokenizer)
    count, digest = _counted(tokens, spelling)
    key = hashlib.sha256(json.dumps([VERSION, WINDOW, BLOCK, digest, tokenizer.to_json()]).encode()).hexdigest()
    tables = _read(path, key) if path is not None else None
    if tables is None:
        tables = _tables(tokens, count, spelling)
        if path is not None:
            with suppress(OSError), replacing(path) as unfinished:  # others may only read the folder
                save_file(tables, unfinished, metadata={"nanogpt": json.dumps({"key": key})})
                unfinished.chmod(0o644)  # the library makes files that only their owner can read
    return Index(tokens, held_out, tokenizer, tables)


def _read(path: Path, key: str) -> dict[str, np.ndarray] | None:
    try:
        with safe_open(path, "np") as file:
            if json.loads((file.metadata() or {}).get("nanogpt", "{}")).get("key") == key:
                return {name: file.get_tensor(name) for name in ("keys", "blocks", "documents")}
    except (OSError, SafetensorError, ValueError):
        pass
    return None


def _counted(tokens: Tokens | np.ndarray, spelling: Spelling) -> tuple[int, str]:
    """How many tokens, in whole blocks unless it is all, reach `MOST_BYTES`; and their SHA-256."""
    digest, size = hashlib.sha256(), 0
    for begin in range(0, len(tokens), PIECE):
        ids = tokens[begin : begin + PIECE]
        sizes = np.add.reduceat(spelling.lengths[ids], np.arange(0, len(ids), BLOCK)).cumsum()
        fitting = int(np.searchsorted(size + sizes, MOST_BYTES, side="left")) + 1  # blocks, the last of which reaches it
        part = ids[: fitting * BLOCK]
        digest.update(np.ascontiguousarray(part).data)
        if fitting <= len(sizes) and size + sizes[fitting - 1] >= MOST_BYTES:
            return begin + len(part), digest.hexdigest()
        size += int(sizes[-1])
    return len(tokens), digest.hexdigest()


def _tables(tokens: Tokens | np.ndarray, count: int, spelling: Spelling) -> dict[str, np.ndarray]:
    """The three tables of `Index`, of the first `count` tokens."""
    prints, blocks, documents = [np.empty(0, np.uint32)], [np.zeros((3, 1), np.int64)], [np.zeros(1, np.int64)]
    rest, done = np.empty(0, np.uint8), 0  # bytes that do not fill a window yet; bytes of the pieces before
    for begin in range(0, count, PIECE):
        ids = tokens[begin : min(begin + PIECE, count)]
        text = spelling(ids)
        borders = np.arange(0, len(ids), BLOCK)
        ends = np.add.reduceat(spelling.lengths[ids], borders).cumsum()  # of blocks, in bytes
        marks = np.stack([begins(text), text == 10]).cumsum(axis=1)[:, ends - 1]
        blocks.append(blocks[-1][:, -1:] + np.concatenate([ends[None], marks]))
        documents.append(done + np.flatnonzero(text == GAP) + 1)
        done += len(text)
        text = np.concatenate([rest, text])
        whole = len(text) // WINDOW * WINDOW
        prints.append(fingerprints(text[:whole]))
        rest = text[whole:]
    starts = np.concatenate(documents)
    upper = np.concatenate(prints).astype(np.uint64) << np.uint64(32)
    keys = np.sort(upper | np.arange(len(upper), dtype=np.uint64))
    so_far = np.ascontiguousarray(np.concatenate(blocks, axis=1))  # the file's library writes whatever order is in memory
    return {"keys": keys, "blocks": so_far, "documents": starts[: max(1, np.searchsorted(starts, done))]}


def fingerprints(windows: np.ndarray) -> np.ndarray:
    """Windows of `WINDOW` bytes, one behind the other -> (M,) uint32."""
    words = windows.view("<u8").reshape(-1, 2)
    return (random_bits(0, words[:, 0], words[:, 1]) >> np.uint64(32)).astype(np.uint32)


def begins(text: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 begin a character."""
    return (text & 0xC0) != 0x80
