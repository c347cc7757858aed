"""A person's text, wherever it lies: files, folders, globs, standard input and the texts that are on every machine.

In: what stood on the command line. Out: `Source`s, each a name and a stream of pieces of text; memory does not grow with the text.
Refuses: paths that are not there.
"""

import difflib
import glob
import hashlib
import http.client
import io
import os
import shutil
import sys
import sysconfig
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import IO, Any, BinaryIO

from nanogpt.corpus import formats
from nanogpt.corpus.encoding import HEAD, not_text
from nanogpt.corpus.formats import Piece
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir, replacing

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Source:
    """A text, or a table of texts: a name, and a way to open its bytes as often as wanted."""

    name: str
    open: Callable[[], BinaryIO]
    encoding: str | None = None
    path: Path | None = None
    field: str | None = None

    @property
    def is_table(self) -> bool:
        """Whether it holds records, each a document of its own."""
        return formats.format_of(self._file_name) != "text"

    @property
    def size(self) -> int:
        """Bytes on the disk; 0 of what is no file."""
        return self.path.stat().st_size if self.path else 0

    @property
    def identity(self) -> Path | str:
        """What is the same only for the same text."""
        return self.path.resolve() if self.path else self.name

    def pieces(self, begin: int = 0, until: int | None = None) -> Iterator[Piece]:
        """The documents in pieces of at most some millions of characters, from the byte that is one piece's `place` to that of another, or the end.

        Errors: `UserError` for what is not text, for a record without its field, for an archive that is cut short, and for what cannot be read.
        """
        where = str(self.path or self.name)
        try:
            with self.open() as stream:
                yield from formats.pieces(stream, self._file_name, where, self.encoding, self.field, begin, until)
        except Exception as error:
            if isinstance(error, UserError) or not (isinstance(error, OSError) or formats.damage(error)):
                raise
            if damaged := formats.damage(error):
                raise UserError(f"{where} {damaged}.", "Copy or download it again.") from error
            raise UserError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}.") from error

    def documents(self) -> Iterator[Iterator[str]]:
        """The text of each document that is not empty, in pieces, which are to be read before the next document is asked for."""

        def numbered() -> Iterator[tuple[int, str]]:
            number = 0
            for piece in self.pieces():
                if piece.text:
                    yield number, piece.text
                number += piece.ends

        return ((text for _, text in group) for _, group in groupby(numbered(), key=lambda each: each[0]))

    def chunks(self) -> Iterator[str]:
        """The text of all documents in pieces; joined they are the whole."""
        return (piece.text for piece in self.pieces() if piece.text)

    @property
    def _file_name(self) -> str:
        return self.path.name if self.path else ""


def expand(words: Iterable[str], encoding: str | None = None, field: str | None = None) -> list[Source]:
    """The texts that the words of a command line name, in a fixed order and each of them once; `field` is what holds the text in a table's records.

    A word is a file, a folder (every text file in it), a glob, `-` for standard input, or `python`, `python-docs` or `shakespeare`.
    Errors: `UserError` when a word names nothing, with where it looked and what has a similar name.
    """
    found: dict[Path | str, Source] = {}
    for word in words:
        for source in _sources(word, encoding, field):
            found.setdefault(source.identity, replace(source, encoding=encoding, field=field))
    return list(found.values())


def findable(source: str) -> str:
    """A source's name that means the same from every folder."""
    return source if source == "-" or (source in BUILT_IN and not os.path.exists(source)) else os.path.abspath(os.path.expanduser(source))


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds prepared text, or the beginning of it; an index.json alone may be somebody else's."""
    if not os.path.isdir(folder):  # of what is too long for a name too
        return False
    whole = all(os.path.isfile(os.path.join(folder, name)) for name in ("index.json", "tokenizer.json"))
    return whole or next(Path(folder).glob("unit-[0-9][0-9][0-9][0-9][0-9].json"), None) is not None


def _sources(source: str, encoding: str | None, field: str | None) -> list[Source]:
    """The texts behind one word of the command line. A path that exists comes before a built-in text of the same name."""
    place = os.path.expanduser(source)
    if source == "-" and sys.stdin is None:
        raise UserError("Standard input is closed.", "Give it a text: nanogpt train - < book.txt")
    if source == "-":
        return [_spooled("standard input", sys.stdin.buffer)]
    if os.path.isdir(place):
        return _folder(Path(place), encoding, field)
    if os.path.isfile(place):
        return [_file(os.path.basename(place), Path(place))]
    if os.path.exists(place):
        with open(place, "rb") as pipe:
            return [_spooled(source, pipe)]
    if glob.has_magic(source):
        matches = sorted(name for name in glob.glob(place, recursive=True) if os.path.isfile(name))
        if matches:
            return [_file(os.path.basename(name), Path(name)) for name in matches]
    elif source in BUILT_IN:
        return BUILT_IN[source]()
    raise _nothing_there(source, Path(place or "."))


def _file(name: str, path: Path) -> Source:
    return Source(name, lambda: formats.open_bytes(path), path=path.absolute())


def _folder(folder: Path, encoding: str | None, field: str | None) -> list[Source]:
    """Every text file below a folder, by name; hidden files are skipped, and skipped and listed is what is not text, what Nano-GPT wrote itself, and, where
    no `field` was asked for, tables without the usual one."""
    texts: list[Source] = []
    not_texts, written, tables = [], [], []
    for parent, folders, names in os.walk(folder):
        ours = [name for name in folders if is_prepared(path := os.path.join(parent, name)) or _is_run(path)]
        written += [Path(parent, name).relative_to(folder).as_posix() for name in sorted(ours) if not name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ours)
        for name in sorted(name for name in names if not name.startswith(".")):
            source = replace(_file(Path(parent, name).relative_to(folder).as_posix(), Path(parent, name)), encoding=encoding, field=field)
            if not _readable(source, encoding):
                not_texts.append(source.name)
            elif field is None and _lacks_field(source):
                tables.append(source.name)
            else:
                texts.append(source)
    total = len(texts) + len(not_texts) + len(tables)
    _leave_out(not_texts, f"{len(not_texts)} of {total} files in {folder} are not text")
    _leave_out(tables, f"{len(tables)} of {total} files in {folder} are tables without a field {formats.DEFAULT_FIELD!r} (--field names another)")
    _leave_out(written, f"{len(written)} of the folders in {folder} are runs or prepared text")
    if not texts:
        raise UserError(f"There is no text file in the folder {folder.absolute()} (looked at every file below it).")
    return texts


def _leave_out(names: list[str], why: str) -> None:
    if names:
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        warnings.warn(f"{why} and are left out: {some}", Notice, stacklevel=2)


def _is_run(folder: str) -> bool:
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("config.toml", "metrics.jsonl"))


def _lacks_field(source: Source) -> bool:
    """Whether a table's first record has no field of the name that was asked for, or the usual one. Whatever else is wrong is named when it is read."""
    if not source.is_table:
        return False
    try:
        next(source.pieces(), None)
    except formats.NoField:
        return True
    except UserError:
        pass
    return False


def _readable(source: Source, encoding: str | None) -> bool:
    """Whether a file of a folder is text or a table. What is only damaged counts as readable: it is named when it is read, and not lost in silence."""
    assert source.path is not None, "a file of a folder"
    if not source.path.is_file():  # a link that leads nowhere, a pipe
        return False
    if formats.format_of(source.name) == "parquet":
        return True
    try:
        with source.open() as stream:
            return not_text(stream.read(HEAD), encoding) is None
    except Exception as error:
        if isinstance(error, UserError):
            raise
        return formats.damage(error) is not None


def _nothing_there(source: str, path: Path) -> UserError:
    parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
    near = difflib.get_close_matches(path.name, [*os.listdir(parent), *BUILT_IN], n=3, cutoff=0.5)
    what = "No file matches the pattern" if glob.has_magic(source) else "There is no file or folder"
    name = f"{path.absolute()}" if len(source) < 300 else f"{source[:100]!r}… (a text itself? Give the path of a file)"
    if "://" in source:
        return UserError(f"{source} is an address, and nanogpt reads files.", "Download it first, then give the path of the file.")
    hint = f"Similar names: {', '.join(near)}." if near else f"In {parent} nothing has a similar name."
    return UserError(f"{what} {name}.", f"{hint} Built-in texts: {', '.join(BUILT_IN)}.")


def _spooled(name: str, stream: BinaryIO) -> Source:
    """A stream that can be read only once is spooled to a temporary file, which goes with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the text)
    shutil.copyfileobj(stream, spool, formats.CHUNK)
    spool.flush()

    lock = threading.Lock()
    return Source(name, lambda: io.BufferedReader(_Reading(spool, lock), formats.CHUNK))


class _Reading(io.RawIOBase):
    """A reading of a file that others read at the same time: with a place of its own, which copies of a descriptor have not."""

    def __init__(self, file: IO[bytes], lock: threading.Lock):
        self._file, self._lock, self._place = file, lock, 0

    def readable(self) -> bool:
        """As every stream that is read says."""
        return True

    def seekable(self) -> bool:
        """As every stream that has places says."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a byte of the file."""
        with self._lock:
            self._file.seek(self._place)
            self._place = self._file.seek(offset, whence)
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the file goes."""
        with self._lock:
            self._file.seek(self._place)
            size = self._file.readinto(buffer)  # type: ignore[attr-defined]
        self._place += size
        return size


def _python_docs() -> list[Source]:
    """The language reference that CPython carries for its `help()`, a text a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fix = "Train on `python`, the standard library's source, or on a file of your own."
        raise UserError("This Python was installed without pydoc_data, which holds `python-docs`.", fix) from None
    return [
        Source(f"python-docs/{name}", lambda text=text: io.BytesIO(text.encode()))  # type: ignore[misc]
        for name, text in sorted(topics.items())
    ]


def _python_source() -> list[Source]:
    """The standard library's own modules, without its tests and what was installed beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    return [_file(f"python/{path.as_posix()}", library / path) for path in sorted(paths) if not skip & set(path.parts)]


def _shakespeare() -> list[Source]:
    """Tiny Shakespeare, downloaded once into the cache and checked."""
    path = cache_dir() / "shakespeare.txt"
    if path.exists():
        _check_shakespeare(path.read_bytes(), f"{path} is", f"Remove {path}.")
    else:
        put = f"Put the file at {path}, or train on `python-docs`, which is already on this machine."
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({error}).", put) from error
        _check_shakespeare(content, f"{SHAKESPEARE_URL} gave what is", put)
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    return [_file("shakespeare", path)]


def _check_shakespeare(content: bytes, what: str, fix: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(f"{what} not Tiny Shakespeare: its SHA-256 is {found[:16]}…, not {SHAKESPEARE_SHA256[:16]}….", fix)


BUILT_IN: dict[str, Callable[[], list[Source]]] = {
    "python": _python_source,
    "python-docs": _python_docs,
    "shakespeare": _shakespeare,
}
