"""Open a folder of prepared tokens, and verify its files.

File sizes are compared at every opening. Checksums, a second or two per gigabyte, are computed
once: `verified.json` stores the size, modification time and inode of each file whose checksum was
right.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.data.batches import DocumentWindows, MemmapTokens
from nanogpt.data.shards import tokenizer_id
from nanogpt.data.sources import is_prepared
from nanogpt.errors import UserError
from nanogpt.files import write_text
from nanogpt.tokenizer.tokenizer import Tokenizer

FORMAT_VERSION = 4  # of a folder of prepared tokens


@dataclass(frozen=True)
class PreparedData:
    """A text as tokens.

    Attributes:
        tokenizer: The tokenizer of the tokens.
        train: (N,) token ids of the training split.
        val: (M,) token ids of the validation split.
        metadata: The content of `data.json`; see `docs/files.md`.
        document_windows: Training windows that stay within a document, if they are to.
    """

    tokenizer: Tokenizer
    train: MemmapTokens
    val: MemmapTokens
    metadata: dict[str, Any]
    document_windows: DocumentWindows | None = None

    def with_document_windows(self, context_length: int) -> "PreparedData":
        """Return the same data with training windows that do not cross documents."""
        document_ends = []
        for path, offset in zip(self.train.paths, self.train.shard_offsets[:-1], strict=True):
            if (ends_path := path.with_suffix(".ends")).exists():
                document_ends.append(np.fromfile(ends_path, "<i8") + offset)
        # The last document has no end here if the validation split continues it, or if it is the
        # only one.
        if not document_ends or document_ends[-1][-1] < len(self.train):
            document_ends.append(np.array([len(self.train)]))
        windows = DocumentWindows(np.concatenate(document_ends), context_length)
        return replace(self, document_windows=windows)


def open_prepared(folder: Path) -> PreparedData:
    """Open a complete folder of prepared tokens.

    Raises:
        UserError: A file is missing or damaged, or another version of nanogpt wrote the folder.
    """
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if index["version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder} was prepared by another version of nanogpt: its format is "
                f"{index['version']}, not {FORMAT_VERSION}.",
                "Prepare the text again, into another folder.",
            )
        if index["tokenizer"] != tokenizer_id(tokenizer):
            raise UserError(
                f"{folder / 'tokenizer.json'} is not the tokenizer of the prepared tokens.",
                "Prepare the text again, into another folder.",
            )
        _verify_files(folder, index["files"])
        train, val = open_splits(folder, index["files"], tokenizer.vocab_size)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not (folder / "index.json").exists() and is_prepared(folder):
            raise UserError(
                f"The preparation of {folder} is incomplete: there is no index.json.",
                "Copy the units that were prepared elsewhere into it, and complete it: "
                f"nanogpt prepare TEXT --out {folder}",
            ) from error
        raise UserError(
            f"The prepared text in {folder} is damaged ({error}).",
            "Name the text itself to prepare it again.",
        ) from error
    return PreparedData(tokenizer, train, val, index["metadata"] | {"cache_dir": str(folder)})


def open_splits(
    folder: Path, files: Sequence[dict[str, Any]], vocab_size: int
) -> tuple[MemmapTokens, MemmapTokens]:
    """Return the training and the validation tokens in the `.bin` files of a folder."""
    names = [file["name"] for file in files if file["name"].endswith(".bin")]
    train = [folder / name for name in names if name.startswith("train")]
    val = [folder / name for name in names if name.startswith("val")]
    return MemmapTokens(train, vocab_size), MemmapTokens(val, vocab_size)


def mark_verified(folder: Path, names: Sequence[str]) -> None:
    """Record that the current contents of some files are right."""
    stamps = {name: _file_stamp(folder / name) for name in names}
    # The folder may be read-only.
    with suppress(OSError):
        if stamps:
            stamps = _verified_files(folder) | stamps
            write_text(folder / "verified.json", json.dumps(stamps))


def _verify_files(folder: Path, files: Sequence[dict[str, Any]]) -> None:
    """Compare files with the sizes and checksums of the index.

    Raises:
        UserError: A file is damaged.
        OSError: A file is missing.
    """
    verified = _verified_files(folder)
    newly_verified: list[str] = []
    for file in files:
        path = folder / file["name"]
        size = path.stat().st_size
        problem = ""
        if size != file["bytes"]:
            problem = f"it has {size:,} bytes, not {file['bytes']:,}"
        elif verified.get(file["name"]) != _file_stamp(path):
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if digest != file["sha256"]:
                problem = f"its SHA-256 is {digest[:16]}…, not {file['sha256'][:16]}…"
            newly_verified.append(file["name"])
        if problem:
            raise UserError(
                f"The shard {path} is damaged: {problem}.",
                "Remove this file and prepare the same text into the same folder: "
                "only missing files are written.",
            )
    mark_verified(folder, newly_verified)


def _verified_files(folder: Path) -> dict[str, list[int]]:
    with suppress(OSError, ValueError):
        return json.loads((folder / "verified.json").read_text(encoding="utf-8"))
    return {}


def _file_stamp(path: Path) -> list[int]:
    """Return numbers that change when a file changes.

    A copy that keeps the modification time still has another inode.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
