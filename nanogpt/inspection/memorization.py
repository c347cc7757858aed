"""Memorization: passages of a text that occur verbatim in the training text.

Every window of 16 bytes of the text is looked up in the index of the training text. Candidates
are compared byte by byte and extended to both sides, as in rsync (Tridgell 1999, "Efficient
Algorithms for Sorting and Synchronization", section 3.2). A passage of 31 bytes or more contains
an indexed window, so none is missed. The exception is a window with more than `MAX_CANDIDATES`
candidates: only that many, evenly spread over the training text, are compared.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from nanogpt.inspection.fingerprint_index import (
    BLOCK_TOKENS,
    DOC_SEPARATOR,
    WINDOW_BYTES,
    FingerprintIndex,
    char_starts,
    fingerprints,
)
from nanogpt.inspection.results import Result

# Held-out text rarely shares longer passages by chance, and every passage of 31 bytes is found.
MIN_PASSAGE_BYTES = 32
MAX_CANDIDATES = 64  # positions compared per window
LOOKUP_CHUNK = 2048  # windows looked up at a time
BASELINE_WINDOWS = 21  # maximum number of windows of held-out text
MAX_BASELINE_BYTES = 2_000_000  # maximum size of all these windows together
# A held-out window in a common passage of this size belongs to a duplicated document.
DUPLICATE_BYTES = 500
CONTEXT_BYTES = 48  # of the training text, before and after a passage
PADDING_BYTE = DOC_SEPARATOR - 1  # not in UTF-8, and never equal to a byte of the index


@dataclass(frozen=True)
class Passage:
    """A passage of a text that occurs verbatim in the training text.

    If it occurs more than once there, the position that was found first is given.

    Attributes:
        start: Offset of the first character in the text.
        end: Offset of the first character after the passage.
        num_bytes: Size of the passage in UTF-8.
        document: Number of the training document, from 1.
        line: Line of the document, from 1.
        char_offset: Characters of the document before the passage.
        context_before: Text before the passage in the document.
        context_after: Text after the passage in the document.
        source: Name of the document, if its source is available.
    """

    start: int
    end: int
    num_bytes: int
    document: int
    line: int
    char_offset: int
    context_before: str
    context_after: str
    source: str = ""


@dataclass(frozen=True)
class HeldOutBaseline:
    """Overlap of held-out text with the training text, which is not due to memorization.

    Attributes:
        num_windows: Number of windows of held-out text.
        window_bytes: Size of a window.
        median_fraction: Median fraction of a window that occurs in the training text.
        median_longest: Median size of the longest passage of a window, in bytes.
        num_copying_as_much: Windows with at least the text's fraction and longest passage.
        num_duplicated: Windows excluded because the training text also contains their surroundings.
    """

    num_windows: int
    window_bytes: int
    median_fraction: float
    median_longest: float
    num_copying_as_much: int
    num_duplicated: int = 0


@dataclass(frozen=True)
class Memorization(Result):
    """Verbatim overlap of a text with the training text.

    Attributes:
        text: The text.
        passages: Passages in the training text, without overlaps, in descending order of size.
        fraction: Fraction of the text's bytes in passages, including overlapping ones.
        min_bytes: Minimum size of a passage.
        baseline: The same measurement on held-out text.
        indexed_bytes: Size of the training text that was searched.
        num_documents: Number of documents in it.
        index_complete: True if that is all of the training text.
    """

    text: str
    passages: list[Passage]
    fraction: float
    min_bytes: int
    baseline: HeldOutBaseline
    indexed_bytes: int
    num_documents: int
    index_complete: bool

    @property
    def longest(self) -> int:
        """Return the size of the longest passage in bytes, or 0."""
        return self.passages[0].num_bytes if self.passages else 0

    @property
    def is_memorizing(self) -> bool:
        """Return True if at most 5 % of held-out windows overlap as much as the text.

        The tolerance is for short texts that occur in both splits by chance.
        """
        baseline = self.baseline
        return bool(self.passages) and 20 * baseline.num_copying_as_much <= baseline.num_windows

    @property
    def summary(self) -> str:
        """Return the result in two or three sentences."""
        baseline = self.baseline
        searched = ""
        if not self.index_complete:
            searched = f" (only the first {self.indexed_bytes / 1e6:,.0f} MB were searched)"
        overlap = (
            f"{self.fraction:.1%} of the text occurs verbatim in the training text{searched}, "
            f"in passages of at least {self.min_bytes} bytes."
        )
        excluded = ""
        if baseline.num_duplicated:
            windows = "window was" if baseline.num_duplicated == 1 else "windows were"
            excluded = (
                f" {baseline.num_duplicated:,} {windows} excluded as duplicates of training text."
            )
        if not baseline.num_windows:
            return f"{overlap} No baseline: there is no held-out text of equal length.{excluded}"
        conclusion = "Memorized" if self.is_memorizing else "Not above the baseline"
        as_much = ""
        if self.passages:
            as_much = f"; windows with as much overlap: {baseline.num_copying_as_much:,}"
        return (
            f"{conclusion}: {overlap} Baseline: {baseline.num_windows:,} held-out windows of equal "
            f"length, median {baseline.median_fraction:.1%}{as_much}.{excluded}"
        )


def measure_memorization(index: FingerprintIndex, text: str) -> Memorization:
    """Find the passages of a text in the indexed training text, and measure the baseline."""
    utf8 = np.frombuffer(text.encode(), np.uint8)
    starts, stops, positions = find_matches(index, utf8)
    passages = [
        passage
        for start, stop, position in _remove_overlaps(starts, stops, positions, len(utf8))
        if (passage := _make_passage(index, utf8, start, stop, position)) is not None
    ]
    fraction, longest = coverage(starts, stops, len(utf8))
    return Memorization(
        text=text,
        passages=sorted(passages, key=lambda passage: (-passage.num_bytes, passage.start)),
        fraction=fraction,
        min_bytes=MIN_PASSAGE_BYTES,
        baseline=_measure_baseline(index, len(utf8), fraction, longest),
        indexed_bytes=index.num_bytes,
        num_documents=len(index.document_starts),
        index_complete=index.is_complete,
    )


def attach_sources(result: Memorization, sources: Iterable[tuple[str, str]]) -> Memorization:
    """Return the result with the name of the source of each passage.

    Args:
        result: The result.
        sources: Name and text of documents. The first document that contains a passage and its
            context at the same offset is its source.
    """
    unnamed = dict(enumerate(result.passages))
    names = [""] * len(result.passages)
    for name, text in sources:
        for i, passage in list(unnamed.items()):
            excerpt = result.text[passage.start : passage.end]
            expected = passage.context_before + excerpt + passage.context_after
            if text.startswith(expected, passage.char_offset - len(passage.context_before)):
                names[i] = name
                del unnamed[i]
        if not unnamed:
            break
    passages = [
        replace(passage, source=name) for passage, name in zip(result.passages, names, strict=True)
    ]
    return replace(result, passages=passages)


def coverage(starts: np.ndarray, stops: np.ndarray, num_bytes: int) -> tuple[float, int]:
    """Return the fraction of `num_bytes` bytes covered by matches, and the longest match."""
    if not num_bytes:
        return 0.0, 0
    change = np.bincount(starts, minlength=num_bytes + 1) - np.bincount(
        stops, minlength=num_bytes + 1
    )
    is_covered = change[:num_bytes].cumsum() > 0
    return float(is_covered.mean()), int((stops - starts).max(initial=0))


def _measure_baseline(
    index: FingerprintIndex, num_bytes: int, fraction: float, longest: int
) -> HeldOutBaseline:
    """Measure windows of `num_bytes` bytes, evenly spread over the held-out text."""
    held_out = index.held_out
    bytes_per_token = float(index.detokenizer.lengths[held_out[: 16 * BLOCK_TOKENS]].mean())
    held_out_bytes = int(bytes_per_token * len(held_out))
    window_bytes = min(num_bytes, MAX_BASELINE_BYTES)
    num_windows = 0
    if min(window_bytes, held_out_bytes) >= MIN_PASSAGE_BYTES:
        most = min(held_out_bytes, MAX_BASELINE_BYTES) // window_bytes
        num_windows = max(1, min(BASELINE_WINDOWS, most))
    # Tokens differ in size; 25 % and 64 tokens more than the mean reach `window_bytes`.
    window_tokens = min(len(held_out), int(1.25 * window_bytes / bytes_per_token) + 64)
    margin = int(DUPLICATE_BYTES / bytes_per_token)
    overlaps = [
        _measure_window(index, start, start + window_tokens, margin, window_bytes)
        for start in np.linspace(0, len(held_out) - window_tokens, num_windows).astype(int).tolist()
    ]
    measured = [overlap for overlap in overlaps if overlap is not None]
    num_duplicated = len(overlaps) - len(measured)
    if not measured:
        return HeldOutBaseline(0, 0, 0.0, 0.0, 0, num_duplicated)
    return HeldOutBaseline(
        num_windows=len(measured),
        window_bytes=min(window_bytes, held_out_bytes),
        median_fraction=statistics.median(each[0] for each in measured),
        median_longest=statistics.median(each[1] for each in measured),
        num_copying_as_much=sum(f >= fraction and n >= longest for f, n in measured),
        num_duplicated=num_duplicated,
    )


def _measure_window(
    index: FingerprintIndex, start: int, stop: int, margin: int, window_bytes: int
) -> tuple[float, int] | None:
    """Return the coverage of the first bytes of held-out tokens [start, stop).

    Returns None if the window overlaps a match of at least `DUPLICATE_BYTES` bytes. Matches may
    extend by `margin` tokens to both sides of the window.
    """
    before = index.held_out[max(0, start - margin) : start]
    window_start = len(index.detokenizer(before))
    text = index.detokenizer(index.held_out[max(0, start - margin) : stop + margin])
    # Separators must not match those of the index.
    text = np.where(text == DOC_SEPARATOR, PADDING_BYTE, text).astype(np.uint8)
    window_stop = min(window_start + window_bytes, len(text))
    starts, stops, _ = find_matches(index, text)
    overlapping = (stops - starts)[(starts < window_stop) & (stops > window_start)]
    if overlapping.max(initial=0) >= DUPLICATE_BYTES:
        return None
    starts = starts.clip(window_start, window_stop) - window_start
    stops = stops.clip(window_start, window_stop) - window_start
    is_passage = stops - starts >= MIN_PASSAGE_BYTES
    return coverage(starts[is_passage], stops[is_passage], window_stop - window_start)


def find_matches(
    index: FingerprintIndex, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the matches of at least `MIN_PASSAGE_BYTES` bytes, each extended as far as possible.

    Args:
        index: The index of the training text.
        text: UTF-8 bytes, uint8 (N,).

    Returns:
        Start and stop of each match in the text, and its position in the training text.
    """
    padding = np.full(MIN_PASSAGE_BYTES, PADDING_BYTE, np.uint8)
    padded = np.concatenate([padding[:WINDOW_BYTES], text, padding])
    num_windows = max(0, len(text) - WINDOW_BYTES + 1)
    chunks = [
        _match_windows(index, padded, start, min(start + LOOKUP_CHUNK, num_windows))
        for start in range(0, num_windows, LOOKUP_CHUNK)
    ]
    offsets, positions, left, right = np.concatenate([np.empty((4, 0), np.int64), *chunks], axis=1)
    # Windows of one passage are WINDOW_BYTES apart in both texts. Keep its first and last one.
    order = np.lexsort((offsets, positions - offsets))
    offsets, positions, left, right = np.stack([offsets, positions, left, right])[:, order]
    continues = np.zeros(len(offsets), bool)
    continues[1:] = (np.diff(offsets) == WINDOW_BYTES) & (np.diff(positions - offsets) == 0)
    is_last = np.append(~continues[1:], True)[: len(continues)]
    stops = (offsets + right)[is_last]
    # A match of all compared bytes may extend further.
    is_open = right[is_last] == MIN_PASSAGE_BYTES
    open_stops = zip(
        stops[is_open].tolist(), (positions + right)[is_last][is_open].tolist(), strict=True
    )
    stops[is_open] = [_extend_right(index, text, *each) for each in open_stops]
    return (offsets - left)[~continues], stops, (positions - left)[~continues]


def _match_windows(
    index: FingerprintIndex, padded: np.ndarray, start: int, stop: int
) -> np.ndarray:
    """Compare the windows [start, stop) of a padded text with their candidates.

    Returns:
        Offset, position, and equal bytes to the left and to the right of these, of each window in a
        match, int64 (4, n).
    """
    shifts = np.arange(1 - WINDOW_BYTES, MIN_PASSAGE_BYTES)  # (47,)
    chunk = padded[start + WINDOW_BYTES : stop + 2 * WINDOW_BYTES - 1]
    windows = np.lib.stride_tricks.sliding_window_view(chunk, WINDOW_BYTES)
    prints = fingerprints(np.ascontiguousarray(windows).reshape(-1))
    numbers, positions = _candidates(index.keys, prints)
    offsets = start + numbers
    is_equal = padded[offsets[:, None] + shifts + WINDOW_BYTES] == index.bytes_at(
        positions[:, None] + shifts
    )  # (n, 47)
    left = np.logical_and.accumulate(is_equal[:, WINDOW_BYTES - 2 :: -1], axis=1).sum(axis=1)
    right = np.logical_and.accumulate(is_equal[:, WINDOW_BYTES - 1 :], axis=1).sum(axis=1)
    is_match = (right >= WINDOW_BYTES) & (left + right >= MIN_PASSAGE_BYTES)
    return np.stack([offsets, positions, left, right])[:, is_match]


def _candidates(keys: np.ndarray, prints: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of windows with equal fingerprints.

    Args:
        keys: Keys of the index.
        prints: Fingerprints of the windows of a text (n,).

    Returns:
        The number of the window in the text, and the position in the training text, of each pair.
    """
    low = prints.astype(np.uint64) << np.uint64(32)
    first = np.searchsorted(keys, low)
    num_equal = np.searchsorted(keys, low | np.uint64(0xFFFFFFFF), side="right") - first
    num_tried = np.minimum(num_equal, MAX_CANDIDATES)
    numbers = np.repeat(np.arange(len(prints)), num_tried)
    nth = np.arange(num_tried.sum()) - np.repeat(num_tried.cumsum() - num_tried, num_tried)
    spread = nth * num_equal[numbers] // np.maximum(num_tried[numbers], 1)
    window = (keys[first[numbers] + spread] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return numbers, window * WINDOW_BYTES


def _extend_right(index: FingerprintIndex, text: np.ndarray, offset: int, position: int) -> int:
    """Return the end in the text of a match that reaches `offset` and `position`."""
    while True:
        query = text[offset : offset + BLOCK_TOKENS]
        found = index.bytes_between(position, position + len(query))
        unequal = np.flatnonzero(query[: len(found)] != found)
        if len(unequal) or len(found) < BLOCK_TOKENS:
            return offset + int(unequal[0] if len(unequal) else len(found))
        offset += BLOCK_TOKENS
        position += BLOCK_TOKENS


def _remove_overlaps(
    starts: np.ndarray, stops: np.ndarray, positions: np.ndarray, num_bytes: int
) -> list[tuple[int, int, int]]:
    """Select matches greedily, longest first, and cut them to their longest free part.

    Parts below `MIN_PASSAGE_BYTES` bytes are dropped.
    """
    is_free = np.ones(num_bytes, bool)
    selected = []
    for i in np.lexsort((positions, starts, starts - stops)).tolist():
        start, stop = int(starts[i]), int(stops[i])
        change = np.diff(is_free[start:stop].astype(np.int8), prepend=0, append=0)
        free_parts = np.flatnonzero(change).reshape(-1, 2).tolist()
        longest = max(free_parts, key=lambda part: part[1] - part[0], default=(0, 0))
        free_start, free_stop = start + longest[0], start + longest[1]
        if free_stop - free_start >= MIN_PASSAGE_BYTES:
            is_free[free_start:free_stop] = False
            selected.append((free_start, free_stop, int(positions[i]) + longest[0]))
    return selected


def _make_passage(
    index: FingerprintIndex, text: np.ndarray, start: int, stop: int, position: int
) -> Passage | None:
    """Cut a match to complete characters; return None if it is then too short."""
    is_char_start = np.append(char_starts(text), True)
    in_match = is_char_start[start : stop + 1]
    skipped = int(np.argmax(in_match))
    start, stop = start + skipped, stop - int(np.argmax(in_match[::-1]))
    num_bytes = stop - start
    if num_bytes < MIN_PASSAGE_BYTES:
        return None
    position += skipped
    end = position + num_bytes
    before = bytes(index.bytes_between(position - CONTEXT_BYTES, position))
    after = bytes(index.bytes_between(end, end + CONTEXT_BYTES))
    separator = bytes([DOC_SEPARATOR])
    document, line, char_offset = index.locate(position)
    return Passage(
        start=int(is_char_start[:start].sum()),
        end=int(is_char_start[:stop].sum()),
        num_bytes=num_bytes,
        document=document,
        line=line,
        char_offset=char_offset,
        context_before=before.rpartition(separator)[2].decode(errors="ignore"),
        context_after=after.partition(separator)[0].decode(errors="ignore"),
    )
