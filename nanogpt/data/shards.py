"""The second pass over a text: encode its work units to shards of tokens.

Unit N has the files `train-N.bin` and `val-N.bin`, token ids of the smallest type that holds them.
If there are many documents, a file `.ends` next to each has the int64 positions after their last
tokens. `unit-N.json` is written last, with a checksum of each file. All files are a pure function
of the text and the settings.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from nanogpt.data.scan import CorpusScan, Split
from nanogpt.errors import UserError
from nanogpt.evaluate import TextCounter
from nanogpt.files import atomic_write, write_text
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer.tokenizer import Tokenizer

MIN_WRITE_TOKENS = 1 << 16


class Segment(NamedTuple):
    """Some text of one document in one split.

    Attributes:
        document: Index of the document.
        split: "train" or "val".
        kind: "part" or "whole" (of the document), or "end" (no text).
        text: The text.
    """

    document: int
    split: str
    kind: str
    text: str


def write_unit(
    folder: Path,
    number: int,
    scan: CorpusScan,
    unit: int,
    split: Split,
    tokenizer: Tokenizer,
    key: str,
) -> list[str]:
    """Encode a work unit into an existing folder and return the names of its files.

    Args:
        folder: The folder.
        number: Number of the unit in the file names.
        scan: The scan that the unit belongs to.
        unit: Index of the unit in the scan.
        split: The validation split of the scan.
        tokenizer: The tokenizer.
        key: Key of the text and the settings.

    Raises:
        UserError: The text has changed since the scan, or the disk is full.
    """
    counter = TextCounter()
    with ExitStack() as stack:
        shards = {
            name: _ShardWriter(folder / f"{name}-{number:05}.bin", tokenizer.vocab_size, stack)
            for name in ("train", "val")
        }
        segments = groupby(_iter_segments(scan, unit, split), key=lambda segment: segment[:3])
        for (_, name, kind), group in segments:
            if kind == "end":
                shards[name].end_document(tokenizer.eot_id)
                continue
            texts: Any = (segment.text for segment in group)
            if name == "val":
                texts = counter.count(texts)
            is_part = kind == "part"
            encode = (
                tokenizer.encode_chunks(texts) if is_part else map(tokenizer.encode_array, texts)
            )
            for ids in encode:
                shards[name].write(ids)
        files = [file for shard in shards.values() for file in shard.finish()]
    metadata = {
        "key": key,
        "tokenizer": tokenizer_id(tokenizer),
        "files": files,
        "text_bytes": scan.unit_bytes(unit),
        "val_bytes": counter.bytes,
        "val_words": counter.words,
        "used_token_ranges": true_ranges(shards["train"].used_tokens),
    }
    write_text(folder / f"unit-{number:05}.json", json.dumps(metadata))
    return [file["name"] for file in files]


def read_unit(folder: Path, number: int) -> dict[str, Any] | None:
    """Return the metadata of a unit, or None unless all its files exist with their sizes."""
    try:
        metadata = json.loads((folder / f"unit-{number:05}.json").read_text(encoding="utf-8"))
        for file in metadata["files"]:
            if (folder / file["name"]).stat().st_size != file["bytes"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return metadata


def tokenizer_id(tokenizer: Tokenizer) -> str:
    """Return a hash of the tokenizer."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:20]


def true_ranges(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return where a (V,) mask is true, as half-open ranges (start, stop)."""
    padded = np.concatenate([[False], mask, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded)).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _iter_segments(scan: CorpusScan, unit: int, split: Split) -> Iterator[Segment]:
    """Iterate over the text of a unit, divided where the split divides it.

    With many documents, an "end" segment follows each of them.
    """
    document = scan.units[unit].document
    offset = scan.units[unit].text_offset
    name = "train"
    for chunk in scan.iter_unit(unit):
        if document >= len(scan.document_sizes):
            raise _changed_error()
        if text := chunk.text:
            utf8 = text.encode()
            num_train = _num_train_bytes(utf8, offset, split, document)
            if 0 < num_train < len(utf8):
                yield Segment(document, "train", "part", utf8[:num_train].decode())
                yield Segment(document, "val", "part", utf8[num_train:].decode())
                name = "val"
            else:
                name = "train" if num_train else "val"
                yield Segment(document, name, "whole" if chunk.ends_document else "part", text)
            offset += len(utf8)
        if chunk.ends_document:
            if scan.has_many_documents:
                yield Segment(document, name, "end", "")
            document += 1
    if offset != scan.units[unit].text_offset + scan.unit_bytes(unit):
        raise _changed_error()


def _num_train_bytes(utf8: bytes, offset: int, split: Split, document: int) -> int:
    """Return how many bytes of a chunk at `offset` belong to the training split."""
    if split.is_held_out[document]:
        return 0
    num_train = min(max(split.val_offset - offset, 0), len(utf8))
    # A character is not split: its continuation bytes go to the training split, too.
    while 0 < num_train < len(utf8) and utf8[num_train] & 0xC0 == 0x80:
        num_train += 1
    return num_train


def _changed_error() -> UserError:
    return UserError("The text changed while it was read.", "Try again, or train on a copy of it.")


class _ShardWriter:
    """Writes a file of tokens; without tokens, no file is created."""

    def __init__(self, path: Path, vocab_size: int, stack: ExitStack):
        self.path = path
        self.dtype = token_dtype(vocab_size)
        self.used_tokens = np.zeros(vocab_size, bool)
        self._stack = stack
        self._num_tokens = 0
        self._document_ends = array("q")
        self._digest = hashlib.sha256()
        self._buffer: list[np.ndarray] = []
        self._buffered_tokens = 0
        self._file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        """Append tokens (T,)."""
        self._buffer.append(ids)
        self._num_tokens += len(ids)
        self._buffered_tokens += len(ids)
        if self._buffered_tokens >= MIN_WRITE_TOKENS:
            self._flush()

    def end_document(self, eot_id: int) -> None:
        """Append the token that ends a document, and record its position."""
        self.write(np.array([eot_id], np.uint32))
        self._document_ends.append(self._num_tokens)

    def finish(self) -> list[dict[str, Any]]:
        """Write the remaining tokens and return the name, size and checksum of each file.

        The files get their final names when the exit stack is closed.
        """
        if self._buffered_tokens:
            self._flush()
        if not self._num_tokens:
            return []
        num_bytes = self._num_tokens * self.dtype.itemsize
        files = [(self.path.name, num_bytes, self._digest)]
        if self._document_ends:
            ends = np.frombuffer(self._document_ends, np.int64).astype("<i8").tobytes()
            ends_path = self.path.with_suffix(".ends")
            self._stack.enter_context(atomic_write(ends_path)).write_bytes(ends)
            files.append((ends_path.name, len(ends), hashlib.sha256(ends)))
        return [
            {"name": name, "bytes": num_bytes, "sha256": digest.hexdigest()}
            for name, num_bytes, digest in files
        ]

    def _flush(self) -> None:
        ids = self._buffer[0] if len(self._buffer) == 1 else np.concatenate(self._buffer)
        self.used_tokens[ids] = True
        data = ids.astype(self.dtype.newbyteorder("<")).data.cast("B")
        self._digest.update(data)
        if self._file is None:
            tmp_path = self._stack.enter_context(atomic_write(self.path))
            self._file = self._stack.enter_context(tmp_path.open("wb"))
        self._file.write(data)
        self._buffer = []
        self._buffered_tokens = 0
