"""Whether a text recites the training text: the longest passages that stand there verbatim, next to what fresh text shows.

In: the tokens a model was trained on and those that were held out, and any text. Out: `Copies`, with each passage's place in both texts.
Refuses: nothing; where the training text is gone, there is no index to ask.

Of the text that is asked about, the windows at every byte are looked up in the index of the training text, and what has the same fingerprint is compared
byte by byte and extended to both sides. A passage of 31 bytes or more holds one of the index's windows whole, so none is missed. (This is how rsync finds
what two files share: Tridgell 1999, "Efficient Algorithms for Sorting and Synchronization", section 3.2.)
The one exception: of a window that stands in more than `TRIED` places, only so many, evenly spread over the training text, are tried.
"""

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nanogpt.look.index import BLOCK, GAP, WINDOW, Index, begins, fingerprints

LEAST = 32  # bytes of a passage that counts: few that fresh text shares by chance, names and idioms, are as long, and none of this length is missed
TRIED = 64  # places that are tried for one window
OFFSETS = 2048  # of the text that are looked up at a time
FRESH_WINDOWS = 21  # of held-out text,
FRESH_BYTES = 2_000_000  # and together at most so many bytes of it
DOUBLED = 500  # bytes of it in one passage of the training text, with what surrounds it: a document that is there twice, and not fresh
AROUND = 48  # bytes of the training text that are shown before and after a passage


@dataclass(frozen=True)
class Passage:
    """Characters `start` to `end` of a text, which stand verbatim in the training text; they are `bytes` bytes of UTF-8.

    Where: in the training document number `document` (from 1), in its line `line` (from 1), behind `characters` characters. Of several places it is the first
    that was found. `before` and `after` is what stands around it there. `source` names the document, where its source is still at hand (see `named`).
    """

    start: int
    end: int
    bytes: int
    document: int
    line: int
    characters: int
    before: str
    after: str
    source: str = ""


@dataclass(frozen=True)
class Fresh:
    """What held-out text shows, which the model never saw: of `windows` stretches of `bytes` bytes, the median `share` that stands in the training text, the
    median of their `longest` passages in bytes, and how many of them copy `as_much` as the text in both respects. As many as `doubled` more do not count:
    they lie in documents that stand in the training text too."""

    windows: int
    bytes: int
    share: float
    longest: float
    as_much: int
    doubled: int = 0


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
        """Whether the text copies more than fresh text does: as much as no more than one in twenty held-out stretches. (A short text that the training text
        holds twice by chance is such a stretch.)"""
        return bool(self.passages) and 20 * self.fresh.as_much <= self.fresh.windows

    @property
    def sentence(self) -> str:
        """All of that in words."""
        fresh, searched = self.fresh, "" if self.whole else f" (of which the first {self.indexed_bytes / 1e6:,.0f} MB were searched)"
        found = f"{self.share:.1%} of it stands verbatim in the training text{searched}, in passages of {self.least} bytes and more"
        doubled = f" {fresh.doubled:,} more did not count: they stand in the training text too, with what surrounds them." if fresh.doubled else ""
        if not fresh.windows:
            return f"{found}. There is no fresh text as long to compare with.{doubled.replace(' more did', ' stretches did')}"
        judged = "It recites" if self.recites else "No more than fresh text"
        as_much = f"; {fresh.as_much or 'none'} of them {'copies' if fresh.as_much < 2 else 'copy'} as much" if self.passages else ""
        return f"{judged}: {found}. In {fresh.windows:,} stretches of fresh text as long it is {fresh.share:.1%} (median){as_much}.{doubled}"

    def asdict(self) -> dict[str, Any]:
        """For JSON: the fields, and `longest`, `recites` and `sentence`."""
        return asdict(self) | {"longest": self.longest, "recites": self.recites, "sentence": self.sentence}

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.copies(self)


def copies(index: Index, text: str) -> Copies:
    """The passages of a text that stand in the indexed training text, and what held-out text shows by the same measure."""
    utf8 = np.frombuffer(text.encode(), np.uint8)
    starts, ends, places = _matches(index, utf8)
    found = [_passage(index, utf8, *each) for each in _apart(starts, ends, places, len(utf8))]
    passages = sorted((passage for passage in found if passage is not None), key=lambda passage: (-passage.bytes, passage.start))
    measured = _measure(starts, ends, len(utf8))
    return Copies(text, passages, measured[0], LEAST, _fresh(index, len(utf8), measured), index.size, len(index.documents), index.whole)


def named(found: Copies, sources: Iterable[tuple[str, str]]) -> Copies:
    """The same, with a name for the source of each passage: of (name, text) pairs the first that has it there with the same around it."""
    open_ones, names = dict(enumerate(found.passages)), [""] * len(found.passages)
    for name, text in sources:
        for i, passage in list(open_ones.items()):
            begin = passage.characters - len(passage.before)
            there = passage.before + found.text[passage.start : passage.end] + passage.after
            if text.startswith(there, begin):
                names[i] = name
                del open_ones[i]
        if not open_ones:
            break
    return replace(found, passages=[replace(passage, source=name) for passage, name in zip(found.passages, names, strict=True)])


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
    margin, found, doubled = int(DOUBLED / per_token), [], 0
    for begin in np.linspace(0, len(held_out) - tokens, windows).astype(int).tolist():
        first = len(index.spelling(held_out[max(0, begin - margin) : begin]))
        around = index.spelling(held_out[max(0, begin - margin) : begin + tokens + margin])
        around = np.where(around == GAP, GAP - 1, around).astype(np.uint8)  # the end of a document is no text that could match another
        behind = min(first + size, len(around))
        starts, ends, _ = _matches(index, around)
        whole = (ends - starts)[(starts < behind) & (ends > first)]
        if whole.max(initial=0) >= DOUBLED:
            doubled += 1
            continue
        starts, ends = starts.clip(first, behind) - first, ends.clip(first, behind) - first  # what of them lies in the stretch
        counts = ends - starts >= LEAST
        found.append(_measure(starts[counts], ends[counts], behind - first))
    if not found:
        return Fresh(0, 0, 0.0, 0.0, 0, doubled)
    shares, longest = zip(*found, strict=True)
    as_much = sum(share >= measured[0] and most >= measured[1] for share, most in found)
    return Fresh(len(found), min(size, there), statistics.median(shares), statistics.median(longest), as_much, doubled)


def _matches(index: Index, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """text (N,) uint8 -> where matches of at least `LEAST` bytes begin and end in it, and where they begin in the training text; as long as they can be."""
    offsets, places, lefts, rights = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    padded = np.concatenate([np.full(WINDOW, GAP - 1, np.uint8), text, np.full(LEAST, GAP - 1, np.uint8)])
    around = np.arange(1 - WINDOW, LEAST)
    for begin in range(0, max(0, len(text) - WINDOW + 1), OFFSETS):
        windows = np.lib.stride_tricks.sliding_window_view(text[begin : begin + OFFSETS + WINDOW - 1], WINDOW)
        offset, place = _candidates(index.keys, fingerprints(np.ascontiguousarray(windows).reshape(-1)))
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
    follows = np.zeros(len(offset), bool)
    follows[1:] = (np.diff(offset) == WINDOW) & (np.diff(place - offset) == 0)
    last = np.append(~follows[1:], True)[: len(follows)]
    ends, far = (offset + right)[last], right[last] == LEAST  # which goes on beyond what was compared
    ends[far] = [_end(index, text, *each) for each in zip(ends[far].tolist(), (place + right)[last][far].tolist(), strict=True)]
    return (offset - left)[~follows], ends, (place - left)[~follows]


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
    letters = np.append(begins(text), True)
    first = start + int(np.argmax(letters[start : end + 1]))
    behind = end - int(np.argmax(letters[start : end + 1][::-1]))
    if behind - first < LEAST:
        return None
    place += first - start
    before = bytes(index.stretch(place - AROUND, place)).rpartition(bytes([GAP]))[2].decode(errors="ignore")
    after = bytes(index.stretch(place + behind - first, place + behind - first + AROUND)).partition(bytes([GAP]))[0].decode(errors="ignore")
    characters = int(letters[:first].sum()), int(letters[:behind].sum())
    return Passage(*characters, behind - first, *index.where(place), before, after)
