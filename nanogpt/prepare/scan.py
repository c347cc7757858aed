"""The first reading of a text: what it is, how large its documents are, which of them are held out, and how the work is divided.

In: sources. Out: a `Scan`: a fingerprint, the size of each document, `Unit`s of work, and the split. All of it is a pure function of the sources, so that
every process that prepares a part of the same text finds the same. Of a document two numbers are kept, and no object.

Split: one text gives its last tenth, in one piece; many give whole documents, taken in the order of their names' hashes while
they fit into a tenth, or the last tenth of all, where no such choice comes near it; never more than `val_bytes`.
"""

import hashlib
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from nanogpt.corpus import Source
from nanogpt.corpus.formats import CHUNK, Piece
from nanogpt.errors import Notice
from nanogpt.sizes import unit_bytes
from nanogpt.tokenizer import Tokenizer


class Unit(NamedTuple):
    """A stretch of the text, up to the next unit: where it begins."""

    source: int  # the number of the source,
    begin: int  # the byte of it,
    document: int  # the number of the document, of those that are not empty,
    offset: int  # and the bytes of text before it


class Split(NamedTuple):
    """What is held out: whole documents, and all that comes after so many bytes."""

    chosen: np.ndarray  # (D,) bool
    cut: int
    words: str


class Scan:
    """What is known of a text when it was read once."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources
        self.units: list[Unit] = []
        sizes, order = array("Q"), array("Q")  # of each document that is not empty: bytes of UTF-8, and the hash of its name
        digest, total, limit = hashlib.sha256(), 0, unit_bytes(sum(source.size for source in sources))
        for number, source in enumerate(sources):
            if not self.units or total - self.units[-1].offset >= limit:
                self.units.append(Unit(number, 0, len(sizes), total))
            size = records = 0
            for piece in source.pieces():
                if piece.place is not None and total - self.units[-1].offset >= limit:
                    self.units.append(Unit(number, piece.place, len(sizes), total))
                utf8 = piece.text.encode()
                digest.update(utf8)
                size, total = size + len(utf8), total + len(utf8)
                if piece.ends and size:
                    name = _name(source, records, alone=len(sources) == 1)
                    if name:  # names decide the split; a lone text may be called anything
                        digest.update(f"\0{name}\0{size}".encode())
                    order.append(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
                    sizes.append(size)
                    size, records = 0, records + 1
        self.fingerprint, self.total = digest.hexdigest(), total
        self.sizes, self._order = np.frombuffer(sizes, np.uint64).astype(np.int64), np.frombuffer(order, np.uint64)

    @property
    def many(self) -> bool:
        """Whether there is more than one document."""
        return len(self.sizes) > 1

    def bytes_of(self, unit: int) -> int:
        """Bytes of text in a unit."""
        return (self.units[unit + 1].offset if unit + 1 < len(self.units) else self.total) - self.units[unit].offset

    def texts(self) -> Iterator[str]:
        """All of the text again, in pieces that are not small."""
        waiting: list[str] = []
        size = 0
        for text in (text for source in self.sources for text in source.chunks()):
            waiting.append(text)
            size += len(text)
            if size >= CHUNK // 2:
                yield "".join(waiting)
                waiting, size = [], 0
        yield "".join(waiting)

    def read(self, number: int) -> Iterator[Piece]:
        """The pieces of one unit. An empty document gives none."""
        unit, behind = self.units[number], self.units[number + 1] if number + 1 < len(self.units) else None
        for place in range(unit.source, behind.source + 1 if behind else len(self.sources)):
            begin = unit.begin if place == unit.source else 0
            until = behind.begin if behind and place == behind.source else None
            if until == 0:
                return
            empty = begin == 0 or self.sources[place].is_table
            for piece in self.sources[place].pieces(begin, until):
                empty = empty and not piece.text
                if not empty:
                    yield piece
                empty = empty or (piece.ends and self.sources[place].is_table)

    def split(self, val_bytes: int) -> Split:
        """What is held out of the text."""
        room = min(self.total - self.total * 9 // 10, val_bytes)
        chosen = self._choose(room) if self.many else np.zeros(len(self.sizes), bool)
        if chosen.any():
            words = f"{np.count_nonzero(chosen)} of {len(chosen)} documents, chosen by a hash of their names, are held out"
            return Split(chosen, self.total, words)
        return Split(chosen, self.total - room, "the last {val_bytes:,} of {total:,} bytes are held out")

    def all_in(self, name: str) -> Split:
        """All of it for "train", or for "val", where there is a text for each."""
        return Split(np.zeros(len(self.sizes), bool), self.total if name == "train" else 0, "the text given with --val is held out")

    def _choose(self, room: int) -> np.ndarray:
        """(D,) whole documents in the order of their names' hashes, as many as fit into `room` bytes; none if that is not half of it."""
        chosen, left, smallest = np.zeros(len(self.sizes), bool), room, int(self.sizes.min())
        for i in np.argsort(self._order, kind="stable"):
            if self.sizes[i] <= left:
                chosen[i] = True
                left -= int(self.sizes[i])
                if left < smallest:
                    break
        return chosen if room - left >= room / 2 else np.zeros(len(self.sizes), bool)


def _name(source: Source, record: int, alone: bool) -> str:
    """What a document is called: as its source, and in a table by its number too."""
    return ("" if alone else source.name) + (f"#{record}" if source.is_table else "")


def note_unknown(chunks: Iterable[str], tokenizer: Tokenizer) -> None:
    """Read a text, and warn of the characters that a tokenizer has no token for."""
    counts: Counter[str] = Counter()
    for chunk in chunks:
        counts.update(chunk)
    unknown = {letter: counts[letter] for _, letter in tokenizer.unknown("".join(sorted(counts)))}
    if unknown:
        most = ", ".join(f"{letter!r} {count:,} times" for letter, count in Counter(unknown).most_common(5))
        warnings.warn(
            f"The model has no token for {len(unknown)} of the {len(counts)} different characters of the text, which are {sum(unknown.values()):,} of its "
            f"{sum(counts.values()):,} characters ({most}{', …' if len(unknown) > 5 else ''}): they are spelled by their bytes.", Notice, stacklevel=4
        )  # fmt: skip
