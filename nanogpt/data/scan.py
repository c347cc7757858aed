"""The first pass over a text: its fingerprint, document sizes, validation split and work units.

A scan is a pure function of the sources, so that every process that prepares a part of the same
text computes the same one. Two numbers are kept per document.
"""

import hashlib
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from nanogpt.data.formats import READ_BYTES, Chunk, Source
from nanogpt.errors import Notice
from nanogpt.sizes import shard_bytes
from nanogpt.tokenizer.chunking import group_by_size
from nanogpt.tokenizer.tokenizer import Tokenizer


class WorkUnit(NamedTuple):
    """The start of a part of the text that is encoded as one shard; it ends at the next unit.

    Attributes:
        source: Index of the source.
        start: Byte of the source, a `resume_offset`.
        document: Index of the document, not counting empty ones.
        text_offset: Bytes of text before the unit.
    """

    source: int
    start: int
    document: int
    text_offset: int


class Split(NamedTuple):
    """The text that is held out for validation: some documents, and the end of all text.

    Attributes:
        is_held_out: (D,) bool, the documents that are held out.
        val_offset: Bytes of text before the part at the end that is held out.
        description: What is held out, with the placeholders `val_bytes` and `total`.
    """

    is_held_out: np.ndarray
    val_offset: int
    description: str


@dataclass(frozen=True)
class CorpusScan:
    """The result of the first pass over some sources.

    Attributes:
        sources: The sources, in order.
        units: The work units, in order.
        fingerprint: SHA-256 of the text and of the names and sizes of its documents.
        total_bytes: Bytes of text, as UTF-8.
        document_sizes: (D,) int64, bytes of each document that is not empty.
        name_hashes: (D,) uint64, hash of each document's name.
    """

    sources: Sequence[Source]
    units: list[WorkUnit]
    fingerprint: str
    total_bytes: int
    document_sizes: np.ndarray
    name_hashes: np.ndarray

    @classmethod
    def read(cls, sources: Sequence[Source]) -> "CorpusScan":
        """Read all sources once."""
        units: list[WorkUnit] = []
        sizes = array("Q")
        hashes = array("Q")
        digest = hashlib.sha256()
        total = 0
        unit_bytes = shard_bytes(sum(source.size for source in sources))
        for index, source in enumerate(sources):
            if not units or total - units[-1].text_offset >= unit_bytes:
                units.append(WorkUnit(index, 0, len(sizes), total))
            size = 0
            record = 0
            for chunk in source.iter_chunks():
                offset = chunk.resume_offset
                if offset is not None and total - units[-1].text_offset >= unit_bytes:
                    units.append(WorkUnit(index, offset, len(sizes), total))
                utf8 = chunk.text.encode()
                digest.update(utf8)
                size += len(utf8)
                total += len(utf8)
                if chunk.ends_document and size:
                    name = _document_name(source, record, is_only_source=len(sources) == 1)
                    # Names decide the split, so that they belong to the fingerprint. The name of
                    # a single text does not matter.
                    if name:
                        digest.update(f"\0{name}\0{size}".encode())
                    name_digest = hashlib.sha256(name.encode()).digest()
                    hashes.append(int.from_bytes(name_digest[:8], "big"))
                    sizes.append(size)
                    size = 0
                    record += 1
        document_sizes = np.frombuffer(sizes, np.uint64).astype(np.int64)
        name_hashes = np.frombuffer(hashes, np.uint64)
        return cls(sources, units, digest.hexdigest(), total, document_sizes, name_hashes)

    @property
    def has_many_documents(self) -> bool:
        """Return whether there is more than one document."""
        return len(self.document_sizes) > 1

    def unit_bytes(self, index: int) -> int:
        """Return the bytes of text in a unit."""
        is_last = index + 1 == len(self.units)
        stop = self.total_bytes if is_last else self.units[index + 1].text_offset
        return stop - self.units[index].text_offset

    def iter_text(self) -> Iterator[str]:
        """Read all of the text once more, in strings of at least `READ_BYTES / 2` characters."""
        texts = (text for source in self.sources for text in source.iter_text())
        return map("".join, group_by_size(texts, READ_BYTES // 2))

    def iter_unit(self, index: int) -> Iterator[Chunk]:
        """Iterate over the chunks of a unit; an empty document has none."""
        unit = self.units[index]
        next_unit = self.units[index + 1] if index + 1 < len(self.units) else None
        last_source = next_unit.source if next_unit else len(self.sources) - 1
        for source_index in range(unit.source, last_source + 1):
            source = self.sources[source_index]
            start = unit.start if source_index == unit.source else 0
            stop = next_unit.start if next_unit and source_index == next_unit.source else None
            if stop == 0:
                return
            is_empty = start == 0 or source.is_table
            for chunk in source.iter_chunks(start, stop):
                is_empty = is_empty and not chunk.text
                if not is_empty:
                    yield chunk
                is_empty = is_empty or (chunk.ends_document and source.is_table)

    def split(self, max_val_bytes: int) -> Split:
        """Hold out a tenth of the text, at most `max_val_bytes`.

        One document gives its end. Many give whole documents in the order of their names' hashes,
        unless these make up less than half of the budget; then the end of all text is held out.
        """
        budget = min(self.total_bytes - self.total_bytes * 9 // 10, max_val_bytes)
        if self.has_many_documents:
            is_held_out = self._choose_documents(budget)
            if is_held_out.any():
                description = (
                    f"{np.count_nonzero(is_held_out)} of {len(is_held_out)} documents, "
                    "chosen by a hash of their names, are held out"
                )
                return Split(is_held_out, self.total_bytes, description)
        description = "the last {val_bytes:,} of {total:,} bytes are held out"
        return Split(self._no_documents(), self.total_bytes - budget, description)

    def assign_all_to(self, name: str) -> Split:
        """Return the split that assigns all of the text to "train" or to "val"."""
        val_offset = self.total_bytes if name == "train" else 0
        return Split(self._no_documents(), val_offset, "a separate validation text is held out")

    def _choose_documents(self, budget: int) -> np.ndarray:
        """Choose documents of at most `budget` bytes, (D,) bool; none if they are under half."""
        is_held_out = self._no_documents()
        remaining = budget
        smallest = int(self.document_sizes.min())
        for document in np.argsort(self.name_hashes, kind="stable"):
            size = int(self.document_sizes[document])
            if size <= remaining:
                is_held_out[document] = True
                remaining -= size
                if remaining < smallest:
                    break
        return is_held_out if budget - remaining >= budget / 2 else self._no_documents()

    def _no_documents(self) -> np.ndarray:
        return np.zeros(len(self.document_sizes), bool)


def _document_name(source: Source, record: int, is_only_source: bool) -> str:
    return ("" if is_only_source else source.name) + (f"#{record}" if source.is_table else "")


def warn_unknown_chars(texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Warn of the characters of a text for which a tokenizer has no token."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    unknown_chars = tokenizer.unknown_chars("".join(sorted(counts)))
    unknown = Counter({char: counts[char] for _, char in unknown_chars})
    if unknown:
        examples = ", ".join(f"{char!r} {count:,} times" for char, count in unknown.most_common(5))
        warnings.warn(
            f"The model has no token for {len(unknown)} of the {len(counts)} distinct characters "
            f"of the text ({unknown.total():,} of {counts.total():,} characters), which are "
            f"encoded as bytes: {examples}{', …' if len(unknown) > 5 else ''}.",
            Notice,
            stacklevel=4,
        )
