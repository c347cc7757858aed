"""The second reading: units of a text to shards of tokens.

In: a unit of a scan, a split and a tokenizer. Out: in a folder, `train-N.bin` and `val-N.bin`, token ids of the smallest type that holds
them; beside each, where there are many documents, a file `.ends`, int64, behind which token of the shard each document ends; and last `unit-N.json`, which
says what the unit has, with a checksum of each file. All of it is a pure function of the text and the settings.
Refuses: a text that changed since it was scanned.
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

from nanogpt.errors import UserError
from nanogpt.evaluate import Size
from nanogpt.files import replacing, write_text
from nanogpt.prepare.scan import Scan, Split
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer import Tokenizer

BUFFER = 1 << 16  # tokens that are written at a time, at least


class Stretch(NamedTuple):
    """Some text of one document in one split: a "part" of it, the "whole", or nothing but its "end"."""

    document: int
    split: str
    kind: str
    text: str


def write_unit(folder: Path, number: int, scan: Scan, unit: int, split: Split, tokenizer: Tokenizer, key: str) -> list[str]:
    """Encode a unit of a scan, the `number`th of all, into a folder that is there. Gives the names of its files. Errors: `UserError` also for a full disk."""
    size = Size()
    with ExitStack() as stack:
        shards = {name: _Shard(folder / f"{name}-{number:05}.bin", tokenizer.vocab_size, stack) for name in ("train", "val")}
        for (_, name, kind), group in groupby(_stretches(scan, unit, split), key=lambda stretch: stretch[:3]):
            shard, texts = shards[name], (stretch.text for stretch in group)
            if kind == "end":
                shard.end(tokenizer.end)
                continue
            if name == "val":
                texts = size.counting(texts)  # type: ignore[assignment]
            for ids in tokenizer.encode_chunks(texts) if kind == "part" else map(tokenizer.encode_array, texts):
                shard.write(ids)
        files = [file for shard in shards.values() for file in shard.finish()]
    about = {"key": key, "tokenizer": tokenizer_id(tokenizer), "files": files, "text_bytes": scan.bytes_of(unit)}  # which `_stretches` saw to
    about |= {"val_bytes": size.bytes, "val_words": size.words}
    about["used"] = ranges(shards["train"].used)  # different tokens of the training split
    write_text(folder / f"unit-{number:05}.json", json.dumps(about))
    return [file["name"] for file in files]


def read_unit(folder: Path, number: int) -> dict[str, Any] | None:
    """What `write_unit` wrote of a unit, if all its files are there in their sizes."""
    try:
        about = json.loads((folder / f"unit-{number:05}.json").read_text(encoding="utf-8"))
        whole = all((folder / file["name"]).stat().st_size == file["bytes"] for file in about["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if whole else None


def tokenizer_id(tokenizer: Tokenizer) -> str:
    """What is the same only for the same tokenizer."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:20]


def ranges(mask: np.ndarray) -> list[tuple[int, int]]:
    """Where a (V,) mask is true, as [first, behind the last] pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _stretches(scan: Scan, unit: int, split: Split) -> Iterator[Stretch]:
    """The text of a unit, cut where the split cuts it; between many documents, their ends."""
    document, offset = scan.units[unit].document, scan.units[unit].offset
    name = "train"
    for piece in scan.read(unit):
        if document >= len(scan.sizes):
            raise _changed()
        if text := piece.text:
            utf8 = text.encode()
            at = 0 if split.chosen[document] else min(max(split.cut - offset, 0), len(utf8))
            while 0 < at < len(utf8) and utf8[at] & 0xC0 == 0x80:  # within a character, which stays whole
                at += 1
            kind = "whole" if piece.ends else "part"
            for name, part in (("train", utf8[:at]), ("val", utf8[at:])) if 0 < at < len(utf8) else ():
                yield Stretch(document, name, "part", part.decode())
            if at in (0, len(utf8)):
                name = "train" if at else "val"
                yield Stretch(document, name, kind, text)
            offset += len(utf8)
        if piece.ends:
            if scan.many:
                yield Stretch(document, name, "end", "")
            document += 1
    if offset != scan.units[unit].offset + scan.bytes_of(unit):
        raise _changed()


def _changed() -> UserError:
    return UserError("The text changed while it was read.", "Try again, or train on a copy of it.")


class _Shard:
    """A file of tokens that is being written; without tokens there is none."""

    def __init__(self, path: Path, vocab_size: int, stack: ExitStack):
        self.path, self.dtype, self.stack = path, token_dtype(vocab_size), stack
        self.used = np.zeros(vocab_size, bool)
        self.tokens, self.ends, self.digest = 0, array("q"), hashlib.sha256()
        self.waiting: list[np.ndarray] = []
        self.waiting_tokens = 0
        self.file: BinaryIO | None = None

    def write(self, ids: np.ndarray) -> None:
        """Append tokens (T,)."""
        self.waiting.append(ids)
        self.tokens += len(ids)
        self.waiting_tokens += len(ids)
        if self.waiting_tokens >= BUFFER:
            self.flush()

    def end(self, token: int) -> None:
        """Append the token that ends a document, and note where."""
        self.write(np.array([token], np.uint32))
        self.ends.append(self.tokens)

    def flush(self) -> None:
        """Bring what waits into the file."""
        ids = self.waiting[0] if len(self.waiting) == 1 else np.concatenate(self.waiting)
        self.used[ids] = True
        data = ids.astype(self.dtype.newbyteorder("<")).data.cast("B")
        self.digest.update(data)
        if self.file is None:
            self.file = self.stack.enter_context(self.stack.enter_context(replacing(self.path)).open("wb"))
        self.file.write(data)
        self.waiting, self.waiting_tokens = [], 0

    def finish(self) -> list[dict[str, Any]]:
        """Write the rest; the files with their sizes and checksums. They get their names when the stack is closed."""
        if self.waiting_tokens:
            self.flush()
        if not self.tokens:
            return []
        files = [{"name": self.path.name, "bytes": self.tokens * self.dtype.itemsize, "sha256": self.digest.hexdigest()}]
        if self.ends:
            ends, place = np.frombuffer(self.ends, np.int64).astype("<i8").tobytes(), self.path.with_suffix(".ends")
            self.stack.enter_context(replacing(place)).write_bytes(ends)
            files.append({"name": place.name, "bytes": len(ends), "sha256": hashlib.sha256(ends).hexdigest()})
        return files
