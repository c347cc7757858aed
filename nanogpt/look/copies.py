"""Whether a text recites the training text: the longest passages that stand there verbatim, next to what fresh text shows.

In: the tokens a model was trained on and those that were held out, and any text. Out: `Copies`, with each passage's place in both texts.
Refuses: nothing; where the training text is gone, there is no index to ask.

Every 16th window of 16 bytes of the training text has a fingerprint in a sorted list. Of the text that is asked about, the windows at every byte are looked
up, and what has the same fingerprint is compared byte by byte and extended to both sides. A passage of 31 bytes or more holds one of those windows
whole, so none is missed. (This is how rsync finds what two files share: Tridgell 1999, "Efficient Algorithms for Sorting and Synchronization", section 3.2.)
The one exception: of a window that stands in more than `TRIED` places, only so many, evenly spread over the training text, are tried.

The list lies in the run folder, half a byte for each byte of the text; the text itself does not. Of its tokens only the blocks in question are spelled out.
"""

import hashlib
import json
import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nanogpt.data import Tokens, random_bits
from nanogpt.files import replacing
from nanogpt.tokenizer import Tokenizer

VERSION = 1  # of the index file
WINDOW = 16  # bytes that a fingerprint is taken of, and between two windows
LEAST = 32  # bytes of a passage that counts: few that fresh text shares by chance, names and idioms, are as long, and none of this length is missed
TRIED = 64  # places that are tried for one window
MOST_BYTES = 200_000_000  # of the training text that are indexed: the first ones
PIECE = 1 << 20  # tokens that are spelled out at a time while the index is made; a multiple of
BLOCK = 4096  # tokens, at every so many of which it is noted how far the text has come
OFFSETS = 2048  # of the text that are looked up at a time
FRESH_WINDOWS = 21  # of held-out text,
FRESH_BYTES = 2_000_000  # and together at most so many bytes of it
GAP = 0xFF  # stands between documents, and is a byte of no UTF-8, so that nothing matches across it
AROUND = 48  # bytes of the training text that are shown before and after a passage


@dataclass(frozen=True)
class Passage:
    """Characters `start` to `end` of a text, which stand verbatim in the training text; they are `bytes` bytes of UTF-8.

    Where: in the training document number `document` (from 1), in its line `line` (from 1), behind `characters` characters. Of several places it is the first
    that was found. `before` and `after` is what stands around it there.
    """

    start: int
    end: int
    bytes: int
    document: int
    line: int
    characters: int
    before: str
    after: str


@dataclass(frozen=True)
class Fresh:
    """What held-out text shows, which the model never saw: of `windows` stretches of `bytes` bytes, the median `share` that stands in the training text, the
    median of their `longest` passages in bytes, and how many of them copy `as_much` as the text in both respects."""

    windows: int
    bytes: int
    share: float
    longest: float
    as_much: int


@dataclass(frozen=True)
class Copies:
    """The `passages` of a text that stand verbatim in the training text and are `least` bytes long or more, longest first; they do not overlap.

    `share` of the text's bytes lies in such passages, also those that overlap. `fresh` is the yardstick. `indexed_bytes` of the training text were
    searched, which has `documents` documents as far as it was searched; `whole` says whether that is all of it.
    """

    text: str
    passages: list[Passage]
    share: float
    least: int
    fresh: Fresh
    indexed_bytes: int
    documents: int
    whole: bool

    @property
    def longest(self) -> int:
        """Bytes of the longest passage; 0 where there is none."""
        return self.passages[0].bytes if self.passages else 0

    @property
    def recites(self) -> bool:
        """Whether the text copies more than fresh text does: as much as no more than one in twenty held-out stretches. (A text may hold whole documents twice,
        and then some stretch that was held out is a copy itself.)"""
        return bool(self.passages) and 20 * self.fresh.as_much <= self.fresh.windows

    @property
    def sentence(self) -> str:
        """All of that in words."""
        fresh, searched = self.fresh, "" if self.whole else f" (of which the first {self.indexed_bytes / 1e6:,.0f} MB were searched)"
        found = f"{self.share:.1%} of it stands verbatim in the training text{searched}, in passages of {self.least} bytes and more"
        if not fresh.windows:
            return f"{found}. There is no fresh text as long to compare with."
        judged = "It recites" if self.recites else "No more than fresh text"
        also = f"{fresh.as_much:,} of them {'copies' if fresh.as_much == 1 else 'copy'} as much" if self.passages else f"{fresh.longest:,.0f} bytes at a time"
        return f"{judged}: {found}. In {fresh.windows:,} stretches of fresh text as long it is {fresh.share:.1%} (median); {also}."

    def asdict(self) -> dict[str, Any]:
        """For JSON: the fields, and `longest`, `recites` and `sentence`."""
        return asdict(self) | {"longest": self.longest, "recites": self.recites, "sentence": self.sentence}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.copies(self)


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
        return int(self.blocks[1, block] + _begins(part).sum()), int(self.blocks[2, block] + (part == 10).sum())

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
        marks = np.stack([_begins(text), text == 10]).cumsum(axis=1)[:, ends - 1]
        blocks.append(blocks[-1][:, -1:] + np.concatenate([ends[None], marks]))
        documents.append(done + np.flatnonzero(text == GAP) + 1)
        done += len(text)
        text = np.concatenate([rest, text])
        whole = len(text) // WINDOW * WINDOW
        prints.append(_fingerprints(text[:whole]))
        rest = text[whole:]
    starts = np.concatenate(documents)
    fingerprints = np.concatenate(prints).astype(np.uint64)
    keys = np.sort(fingerprints << np.uint64(32) | np.arange(len(fingerprints), dtype=np.uint64))
    so_far = np.ascontiguousarray(np.concatenate(blocks, axis=1))  # the file's library writes whatever order is in memory
    return {"keys": keys, "blocks": so_far, "documents": starts[: max(1, np.searchsorted(starts, done))]}


def _fingerprints(windows: np.ndarray) -> np.ndarray:
    """Windows of `WINDOW` bytes, one behind the other -> (M,) uint32."""
    words = windows.view("<u8").reshape(-1, 2)
    return (random_bits(0, words[:, 0], words[:, 1]) >> np.uint64(32)).astype(np.uint32)


def copies(index: Index, text: str) -> Copies:
    """The passages of a text that stand in the indexed training text, and what held-out text shows by the same measure."""
    utf8 = np.frombuffer(text.encode(), np.uint8)
    starts, ends, places = _matches(index, utf8)
    found = [_passage(index, utf8, *each) for each in _apart(starts, ends, places, len(utf8))]
    passages = sorted((passage for passage in found if passage is not None), key=lambda passage: (-passage.bytes, passage.start))
    measured = _measure(starts, ends, len(utf8))
    return Copies(text, passages, measured[0], LEAST, _fresh(index, len(utf8), measured), index.size, len(index.documents), index.whole)


def _measure(starts: np.ndarray, ends: np.ndarray, size: int) -> tuple[float, int]:
    """Of matches in a text of `size` bytes: the share of it that they cover, and the bytes of the longest."""
    change = np.bincount(starts, minlength=size + 1) - np.bincount(ends, minlength=size + 1)
    return float((change[:size].cumsum() > 0).mean()) if size else 0.0, int((ends - starts).max(initial=0))


def _fresh(index: Index, size: int, measured: tuple[float, int]) -> Fresh:
    """The same of stretches of the held-out text of `size` bytes, spread evenly over it; where it is shorter, of all of it."""
    size, held_out = min(size, FRESH_BYTES), index.held_out
    per_token = float(index.spelling.lengths[held_out[: 16 * BLOCK]].mean())
    there = int(per_token * len(held_out))
    windows = max(1, min(FRESH_WINDOWS, there // max(size, 1), FRESH_BYTES // max(size, 1))) if min(size, there) >= LEAST else 0
    tokens = min(len(held_out), int(1.25 * size / per_token) + 64)  # enough for so many bytes
    found: list[tuple[float, int]] = []
    for begin in np.linspace(0, len(held_out) - tokens, windows).astype(int).tolist():
        stretch = index.spelling(held_out[begin : begin + tokens])[:size]
        stretch = np.where(stretch == GAP, GAP - 1, stretch).astype(np.uint8)  # the end of a document is no text that could match another
        starts, ends, _ = _matches(index, stretch)
        found.append(_measure(starts, ends, len(stretch)))
    if not found:
        return Fresh(0, 0, 0.0, 0.0, 0)
    shares, longest = zip(*found, strict=True)
    as_much = sum(share >= measured[0] and most >= measured[1] for share, most in found)
    return Fresh(windows, min(size, there), statistics.median(shares), statistics.median(longest), as_much)


def _matches(index: Index, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text (N,) uint8 -> where matches of at least `LEAST` bytes begin and end in it, and where they begin in the training text; as long as they can be."""
    offsets, places, lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    padded = np.concatenate([np.full(WINDOW, GAP - 1, np.uint8), text, np.full(LEAST, GAP - 1, np.uint8)])
    around = np.arange(1 - WINDOW, LEAST)
    for begin in range(0, max(0, len(text) - WINDOW + 1), OFFSETS):
        windows = np.lib.stride_tricks.sliding_window_view(text[begin : begin + OFFSETS + WINDOW - 1], WINDOW)
        offset, place = _candidates(index.keys, _fingerprints(np.ascontiguousarray(windows).reshape(-1)))
        offset += begin
        same = padded[offset[:, None] + around + WINDOW] == index.at(place[:, None] + around)  # (candidates, 47)
        left = np.logical_and.accumulate(same[:, : WINDOW - 1][:, ::-1], axis=1).sum(axis=1)
        right = np.logical_and.accumulate(same[:, WINDOW - 1 :], axis=1).sum(axis=1)
        good = (right >= WINDOW) & (left + right >= LEAST)
        for kept, new in ((offsets, offset), (places, place), (lefts, left), (rights, right)):
            kept.append(new[good])
    offset, place, left, right = (np.concatenate(kept) for kept in (offsets, places, lefts, rights))
    # Windows of one passage follow each other at distance WINDOW in both texts: only its first and its last are needed.
    order = np.lexsort((offset, place - offset))
    offset, place, left, right = offset[order], place[order], left[order], right[order]
    follows = (np.diff(offset, prepend=-1) == WINDOW) & (np.diff(place - offset, prepend=-1) == 0)
    if len(follows):
        follows[0] = False
    last = np.append(~follows[1:], True)[: len(follows)]
    starts = (offset - left)[~follows]
    ends = np.array([_end(index, text, *each) for each in zip((offset + right)[last].tolist(), (place + right)[last].tolist(), strict=True)], np.int64)
    return starts, ends, (place - left)[~follows]


def _candidates(keys: np.ndarray, prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which windows of a text, by their fingerprints (n,), may stand where in the training text: numbers of windows, and bytes."""
    low = prints.astype(np.uint64) << np.uint64(32)
    first = np.searchsorted(keys, low)
    there = np.searchsorted(keys, low | np.uint64(0xFFFFFFFF), side="right") - first
    tried = np.minimum(there, TRIED)
    number = np.repeat(np.arange(len(prints)), tried)
    nth = np.arange(tried.sum()) - np.repeat(tried.cumsum() - tried, tried)
    chosen = keys[first[number] + nth * there[number] // np.maximum(tried[number], 1)]
    return number, (chosen & np.uint64(0xFFFFFFFF)).astype(np.int64) * WINDOW


def _end(index: Index, text: np.ndarray, offset: int, place: int) -> int:
    """Where a match that has come as far as `offset` and `place` ends in the text."""
    while True:
        mine = text[offset : offset + BLOCK]
        theirs = index.stretch(place, place + len(mine))
        different = np.flatnonzero(mine[: len(theirs)] != theirs)
        if len(different) or len(theirs) < BLOCK:
            return offset + int(different[0] if len(different) else len(theirs))
        offset, place = offset + BLOCK, place + BLOCK


def _apart(starts: np.ndarray, ends: np.ndarray, places: np.ndarray, size: int) -> list[tuple[int, int, int]]:
    """Of stretches those that do not overlap: the longest first, and of each further one the longest part that is free and still `LEAST` bytes long."""
    free, kept = np.ones(size, bool), []
    for i in np.lexsort((places, starts, starts - ends)).tolist():
        start, end = int(starts[i]), int(ends[i])
        edges = np.flatnonzero(np.diff(free[start:end].astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        first, behind = max(edges.tolist(), key=lambda edge: edge[1] - edge[0], default=(0, 0))
        if behind - first >= LEAST:
            free[start + first : start + behind] = False
            kept.append((start + first, start + behind, int(places[i]) + first))
    return kept


def _passage(index: Index, text: np.ndarray, start: int, end: int, place: int) -> Passage | None:
    """A stretch of the text as a passage of whole characters; None where it is then too short."""
    begins = np.append(_begins(text), True)
    first = start + int(np.argmax(begins[start : end + 1]))
    behind = end - int(np.argmax(begins[start : end + 1][::-1]))
    if behind - first < LEAST:
        return None
    place += first - start
    before = bytes(index.stretch(place - AROUND, place)).rpartition(bytes([GAP]))[2].decode(errors="ignore")
    after = bytes(index.stretch(place + behind - first, place + behind - first + AROUND)).partition(bytes([GAP]))[0].decode(errors="ignore")
    characters = int(begins[:first].sum()), int(begins[:behind].sum())
    return Passage(*characters, behind - first, *index.where(place), before, after)


def _begins(text: np.ndarray) -> np.ndarray:
    """Which bytes of UTF-8 begin a character."""
    return (text & 0xC0) != 0x80
