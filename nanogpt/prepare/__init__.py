"""Text to shards of tokens, read twice and never held whole: once to know it (`scan`), once to encode it (`shards`), and once between for its tokenizer.

In: sources and the `[text]` settings. Out: `Prepared`: the tokenizer, the mapped tokens and what is known of the text, in a folder that `prepare_folder` was
given, or one of the cache that is named by the content, so that the same text is never encoded twice.
Refuses: a text with too little to train on or to validate on, a folder that holds something else, and shards that are not what was written.

The folder fills up unit by unit, each under its name only when it is whole, so a killed process, or another one, goes on where it ended, and many may share the
work. Whoever finds all units done writes `index.json`. The sizes of the files are checked whenever it is opened, which costs nothing; their
checksums, a second or two for each gigabyte, once: `checked.json` remembers by size, time of change and number on the disk what this machine wrote or checked.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt.config import TextConfig, is_path
from nanogpt.corpus import expand, findable, is_prepared
from nanogpt.data import Documents, Tokens, open_tokens
from nanogpt.errors import UserError
from nanogpt.evaluate import ngram_losses
from nanogpt.files import cache_dir, discard, require_space, sweep, write_text
from nanogpt.prepare.scan import Scan, note_unknown
from nanogpt.prepare.shards import ranges, read_unit, tokenizer_id, write_unit
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer import Tokenizer, train_tokenizer

VERSION = 3  # of the prepared files
OWN = re.compile(r"(train|val)-\d{5}\.(bin|ends)|unit-\d{5}\.json|(tokenizer|index|checked)\.json")  # the names of a prepared folder's files
KEY = ".key"  # written first: says what text a folder is for before it holds any unit
MOST_THREADS = 8  # that encode at a time; each takes some 10 MB, and tokenizers that need more processors use them by themselves
STILL_WRITTEN = 86_400.0  # seconds since a file was last written to, by this clock or that of another machine, up to which somebody may be at it


@dataclass(frozen=True)
class Prepared:
    """A text as tokens.

    `about` is what text.json holds: "fingerprint" and "val_fingerprint" (of the text, and of that given with --val), "sources",
    "documents", "train_bytes", "val_bytes", "val_words" (of the validation text, between white space), "symbols" (different tokens in the training split),
    "train_tokens", "val_tokens", "split" (in words), "baselines" (nats per token, see `evaluate.ngram_losses`), "unused" (tokens the training split
    lacks, as [first, behind the last] pairs), "text" (the settings it was prepared with) and "folder" (where the tokens are).
    `windows` confines training to single documents.
    """

    tokenizer: Tokenizer
    train: Tokens
    val: Tokens
    about: dict[str, Any]
    windows: Documents | None = None

    def within_documents(self, context_length: int) -> "Prepared":
        """The same text, with training windows that end where documents end."""
        paths = [path.with_suffix(".ends") for path in self.train.paths]
        ends = [np.fromfile(path, "<i8") + first for path, first in zip(paths, self.train.begins, strict=True) if path.exists()]
        if not ends or ends[-1][-1] < len(self.train):  # the last document goes on in the validation split, or there is but one
            ends.append(np.array([len(self.train)]))
        return replace(self, windows=Documents(np.concatenate(ends), context_length))


def prepare(sources: Sequence[str], settings: TextConfig, tokenizer: Tokenizer | None = None) -> Prepared:
    """Make the tokens of a text, or reuse the cached ones; or open those in a folder that `prepare_folder` filled. They are those of a given `tokenizer`, of
    which it says what it lacks, or of one that is made from the text.

    Errors: `UserError` when a source is not there or not text, when the text is too short, or when the disk is full.
    """
    settings = settings.model_copy(update=findable_paths(settings.model_dump()))
    if len(sources) == 1 and is_prepared(folder := findable(sources[0])):
        prepared = open_prepared(Path(folder))
        _require_same_settings(prepared.about["text"], settings, sources[0], {"tokenizer", "vocab_size"} if tokenizer is not None else set())
        if tokenizer is not None and tokenizer.to_json() != prepared.tokenizer.to_json():
            raise UserError(f"{sources[0]} was prepared with another tokenizer than the model's.", "Name the text itself.")
    else:
        text = _Text(sources, settings, tokenizer)
        cached = cache_dir() / "tokens" / text.key
        try:
            prepared = open_prepared(cached)
        except UserError:  # not there, not all there, or no longer what it was
            if (cached / "index.json").exists():
                discard(cached)
            text.write(cached)
            prepared = open_prepared(cached)
    return replace(prepared, about=prepared.about | {"sources": [findable(source) for source in sources]})


def prepare_folder(sources: Sequence[str], settings: TextConfig, folder: Path, share: tuple[int, int] = (1, 1)) -> Prepared | list[int]:
    """Fill a folder with the tokens of a text, or with the i-th of n parts of them. Gives the units that other processes have still to do, if there are any.

    Errors: as `prepare`; and `UserError` for a share that is none, or a folder that holds something else.
    """
    i, n = share
    if not 1 <= i <= n:
        raise UserError(f"--shard {i}/{n} is no share of the work.", "Use --shard 1/2 in one process and --shard 2/2 in the other, for example.")
    missing = _Text(sources, settings.model_copy(update=findable_paths(settings.model_dump()))).write(folder, i, n)
    return missing or open_prepared(folder)


def open_prepared(folder: Path) -> Prepared:
    """Open what `prepare` wrote. Errors: `UserError` when it is no longer there, or no longer what it was."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        if index["version"] != VERSION:
            what = f"{folder} was prepared by another version of nanogpt: its format is {index['version']}, not {VERSION}."
            raise UserError(what, "Prepare the text again, into another folder.")
        if index["tokenizer"] != tokenizer_id(tokenizer):
            raise UserError(
                f"{folder / 'tokenizer.json'} is not the tokenizer that the text was prepared with.", "Prepare the text again, into another folder."
            )
        _check(folder, index["files"])
        names = [file["name"] for file in index["files"] if file["name"].endswith(".bin")]
        train, val = (open_tokens([folder / name for name in names if name.startswith(split)], tokenizer.vocab_size) for split in ("train", "val"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not (folder / "index.json").exists() and is_prepared(folder):
            fix = "Bring all units into this folder, if they were made in several, and run `nanogpt prepare TEXT --out` with it: it makes what is missing."
            raise UserError(f"Not all of the text in {folder} is prepared: there is no index.json.", fix) from error
        raise UserError(f"The prepared text is no longer whole in {folder} ({error}).", "Name the text again, and it is prepared again.") from error
    return Prepared(tokenizer, train, val, index["about"] | {"folder": str(folder)})


def _check(folder: Path, files: Sequence[dict[str, Any]]) -> None:
    """Compare the files of a folder with what the index says. Errors: `UserError` for one that is not the same, `OSError` for one that is not there."""
    checked = _checked(folder)
    new: list[str] = []
    for file in files:
        path = folder / file["name"]
        state = path.stat()
        problem = f"it has {state.st_size:,} bytes, not {file['bytes']:,}" if state.st_size != file["bytes"] else None
        if not problem and checked.get(file["name"]) != _state(path):
            with path.open("rb") as content:
                found = hashlib.file_digest(content, "sha256").hexdigest()
            problem = f"its SHA-256 is {found[:16]}…, not {file['sha256'][:16]}…" if found != file["sha256"] else None
            new.append(file["name"])
        if problem:
            fix = "Remove this file, and prepare the same text into the same folder again: only what is missing is made anew."
            raise UserError(f"The shard {path} is damaged: {problem}.", fix)
    _remember(folder, new)


def _checked(folder: Path) -> dict[str, list[int]]:
    with suppress(OSError, ValueError):
        return json.loads((folder / "checked.json").read_text(encoding="utf-8"))
    return {}


def _remember(folder: Path, names: Sequence[str]) -> None:
    """Note of some files that they are known to be right as they are."""
    states = {name: _state(folder / name) for name in names}
    with suppress(OSError):  # others may only read the folder
        if states:
            write_text(folder / "checked.json", json.dumps(_checked(folder) | states))


def _state(path: Path) -> list[int]:
    """What changes when a file does; its number on the disk changes also where a copy keeps the time."""
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def findable_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """Those of a text's settings that name a path, such that it means the same from every folder."""
    val, tokenizer = settings.get("val"), settings.get("tokenizer")
    paths = {"val": findable(os.fspath(val))} if val and isinstance(val, str | os.PathLike) else {}
    if isinstance(tokenizer, os.PathLike) or (isinstance(tokenizer, str) and is_path(tokenizer)):
        paths["tokenizer"] = os.path.abspath(os.path.expanduser(tokenizer))
    return paths


def _require_same_settings(before: dict[str, Any], settings: TextConfig, folder: str, free: set[str]) -> None:
    """Errors: `UserError` where a setting was given that a folder was not prepared with; `free` ones may differ."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set - {"cross_documents"} - free}
    if wrong := [f"{name} = {value!r}, but {before[name]!r} in the folder" for name, value in given.items() if value != before[name]]:
        raise UserError(f"{folder} was prepared with other settings: {'; '.join(wrong)}.", "Leave them out, or name the text itself.")


class _Text:
    """A text that was read once, on its way to a folder."""

    def __init__(self, sources: Sequence[str], settings: TextConfig, tokenizer: Tokenizer | None = None):
        self.settings, self.tokenizer = settings, tokenizer
        if folder := next((source for source in [*sources, settings.val or ""] if is_prepared(findable(source))), None):
            fix = "Name the texts that it was made of, or train on it alone: nanogpt train FOLDER."
            raise UserError(f"{folder} is a folder of prepared text, which cannot be joined with others or held out.", fix)
        named, held_out = (expand(words, settings.encoding, settings.field) for words in (sources, [settings.val] if settings.val else []))
        apart = {source.identity for source in held_out}
        if not (kept := [source for source in named if source.identity not in apart]) and named:
            raise UserError("All of the text is held out by --val: nothing is left to train on.", "Name another text to validate on, or leave out --val.")
        self.scan, self.held_out = Scan(kept), Scan(held_out)
        if tokenizer is not None:
            note_unknown(self.scan.texts(), tokenizer)
        made_by = [tokenizer.to_json()] if tokenizer is not None else [_identity(settings.tokenizer), settings.vocab_size]
        identity = [VERSION, self.scan.fingerprint, settings.val and self.held_out.fingerprint, *made_by]
        identity += [[unit.offset for unit in scan.units] for scan in (self.scan, self.held_out)]  # of the same text a table is cut elsewhere than an archive
        self.key = hashlib.sha256(json.dumps([*identity, settings.val_bytes]).encode()).hexdigest()[:20]
        self.split = self.scan.all_in("train") if settings.val else self.scan.split(settings.val_bytes)
        self.units = [(scan, unit) for scan in (self.scan, self.held_out) for unit in range(len(scan.units))]

    def write(self, folder: Path, i: int = 1, n: int = 1) -> list[int]:
        """Encode every n-th unit, from the i-th, that is not done; with all of them done write the index. Gives the units that are not.

        Errors: `UserError` for a folder with other content, a text that is too short, or a full disk.
        """
        begun = folder.exists()
        self._require_own(folder)
        sweep(folder, older_than=STILL_WRITTEN)
        tokenizer = self._tokenizer(folder)
        mine = [number for number in range(i - 1, len(self.units), n) if read_unit(folder, number) is None]
        size = sum(scan.bytes_of(unit) for scan, unit in (self.units[number] for number in mine))
        require_space(folder, size * token_dtype(tokenizer.vocab_size).itemsize)  # a token is a byte of the text or more of it
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / KEY, json.dumps({"key": self.key}))
        write_text(folder / "tokenizer.json", tokenizer.to_json())
        self._encode(folder, tokenizer, mine)
        units = [read_unit(folder, number) for number in range(len(self.units))]
        if missing := [number for number, unit in enumerate(units) if unit is None]:
            return missing
        try:
            about = self._about(folder, tokenizer, units)  # type: ignore[arg-type]
        except UserError:
            if not begun:
                discard(folder)
            raise
        files = [file for unit in units if unit for file in unit["files"]]
        index = {"version": VERSION, "key": self.key, "tokenizer": tokenizer_id(tokenizer), "about": about, "files": files}
        write_text(folder / "index.json", json.dumps(index, indent=1))
        sweep(folder, older_than=STILL_WRITTEN)
        return []

    def _tokenizer(self, folder: Path) -> Tokenizer:
        """The given one, or that of the units that are there already, or a new one, which is the same in every process."""
        if self.tokenizer is not None:
            return self.tokenizer
        if any(read_unit(folder, number) for number in range(len(self.units))):
            with suppress(OSError, UserError):
                return Tokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return train_tokenizer(self.settings.tokenizer, self.scan.texts(), self.settings.vocab_size, self.scan.total)

    def _encode(self, folder: Path, tokenizer: Tokenizer, mine: Sequence[int]) -> None:
        def work(number: int) -> list[str]:
            scan, unit = self.units[number]
            return write_unit(folder, number, scan, unit, self.split if scan is self.scan else self.held_out.all_in("val"), tokenizer, self.key)

        with ThreadPoolExecutor(max(1, min(MOST_THREADS, os.cpu_count() or 1, len(mine)))) as pool:
            running = [pool.submit(work, number) for number in mine]
            try:
                written = [name for each in running for name in each.result()]
            finally:  # after an error, or Ctrl-C, what was not begun is not begun
                pool.shutdown(wait=True, cancel_futures=True)
        _remember(folder, written)

    def _require_own(self, folder: Path) -> None:
        """Errors: `UserError` for a folder with anything but a part of what is to be written there."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder.absolute()} is a file.", "Choose another folder: --out FOLDER.")
        keys = {key for path in [folder / KEY, folder / "index.json", *folder.glob("unit-*.json")] if (key := _key_in(path)) is not None}
        if keys - {self.key}:
            what = f"{folder.absolute()} holds the tokens of another text, or of this one before it changed or with other settings."
            raise UserError(what, "Remove the folder, or choose another: --out FOLDER.")
        if foreign := sorted(path.name for path in folder.glob("[!.]*") if not (keys and OWN.fullmatch(path.name))):
            what = f"{folder.absolute()} is no folder of prepared text: it holds {', '.join(foreign[:3])}."
            raise UserError(what, "Choose another folder: --out FOLDER.")

    def _about(self, folder: Path, tokenizer: Tokenizer, units: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What is known of the text when all of it is encoded. Errors: `UserError` for a text that is too short, or units with other tokens."""
        if any(unit["tokenizer"] != tokenizer_id(tokenizer) for unit in units):
            what = f"The units in {folder.absolute()} were encoded with different tokenizers."
            raise UserError(what, "Remove the folder, and prepare all of it with the same version of nanogpt.")
        if (found := sum(unit["text_bytes"] for unit in units)) != (whole := self.scan.total + self.held_out.total):
            raise UserError(f"The units in {folder.absolute()} hold {found:,} bytes of text, not {whole:,}.", "Remove the folder, and prepare all of it again.")
        used = np.zeros(tokenizer.vocab_size, bool)
        for first, behind in (pair for unit in units for pair in unit["used"]):
            used[first:behind] = True
        names = [file["name"] for unit in units for file in unit["files"] if file["name"].endswith(".bin")]
        train, val = (open_tokens([folder / name for name in names if name.startswith(split)], tokenizer.vocab_size) for split in ("train", "val"))
        _require_enough(len(train), len(val), int(np.count_nonzero(used)))
        val_bytes = sum(unit["val_bytes"] for unit in units)
        sizes = {"train_bytes": self.scan.total + self.held_out.total - val_bytes, "val_bytes": val_bytes}
        return {
            "fingerprint": self.scan.fingerprint, "val_fingerprint": self.held_out.fingerprint, "documents": len(self.scan.sizes),
            "split": self.split.words.format(total=self.scan.total, **sizes), **sizes, "val_words": sum(unit["val_words"] for unit in units),
            "symbols": int(np.count_nonzero(used)), "train_tokens": len(train), "val_tokens": len(val),
            "baselines": ngram_losses(train, val), "unused": ranges(~used), "text": self.settings.model_dump(),
        }  # fmt: skip


def _key_in(path: Path) -> str | None:
    """The key of the text that a file of a prepared folder belongs to; None where it is not there, or no such file."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about.get("key") if isinstance(about, dict) else None


def _identity(tokenizer: str) -> str:
    """What tells a tokenizer from others before it is made: its kind, or what its file says."""
    path = Path(tokenizer).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else tokenizer


def _require_enough(train: int, val: int, symbols: int) -> None:
    """Refuse what cannot be learned from, by the number of tokens in both splits and of different ones in the first."""
    if train < 2 or val < 2:
        raise UserError(
            f"The text is too short: {train} tokens to train on and {val} to validate on; at least 2 of each are needed.",
            "Use a longer text (or a larger --val-bytes): 20 characters is the minimum, a few thousand is useful.",
        )
    if symbols < 2:
        raise UserError(f"The {train:,} tokens to train on are all the same symbol: there is nothing to learn.", "Use another text.")
