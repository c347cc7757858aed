"""A person's text, wherever it lies: files, folders, globs, standard input and the texts that are on every machine.

In: what stood on the command line. Out: `Document`s, each a name and a stream of decoded pieces; memory does not grow with the text.
Refuses: paths that are not there, files that are not text, and bytes that are not what the encoding says.

Line ends stay as they are. UTF-8, with or without its mark, and UTF-16 with its mark give the same characters.
"""

import codecs
import difflib
import glob
import hashlib
import io
import os
import shutil
import sys
import sysconfig
import tempfile
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir, replacing

CHUNK = 1 << 22  # bytes read at a time

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}  # byte order marks

SIGNATURES = {  # how files that are not plain text begin
    b"%PDF": "a PDF document", b"{\\rtf": "an RTF document", b"\xd0\xcf\x11\xe0": "an old Word or Excel document",
    b"PK\x03\x04": "a ZIP archive (DOCX, ODT, EPUB and XLSX are such archives too)", b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive", b"\x1f\x8b": "a gzip archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture", b"\x7fELF": "a program", b"SQLite format 3": "an SQLite database", b"PAR1": "a Parquet table",
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One text: a name, and a way to open its bytes as often as wanted."""

    name: str
    open: Callable[[], BinaryIO]
    encoding: str | None = None
    path: Path | None = None

    def chunks(self) -> Iterator[str]:
        """The text in pieces of at most some millions of characters; joined they are the whole.

        Errors: `UserError` for what is not text, with the byte, its offset, its line and the encoding it may be in.
        """
        with self.open() as stream:
            head = stream.read(CHUNK)
            encoding, skip = self._encoding(head)
            decoder = codecs.getincrementaldecoder(encoding)()
            offset, lines, data = skip, 1, head[skip:]
            while True:
                waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece cut in two
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    at = offset - waiting + error.start
                    raise self._undecodable(error, encoding, at, lines + error.object[: error.start].count(b"\n")) from error
                if text:
                    yield text
                if not data:
                    return
                offset, lines, data = offset + len(data), lines + text.count("\n"), stream.read(CHUNK)

    def _encoding(self, head: bytes) -> tuple[str, int]:
        """The encoding to read with, and the length of the mark to skip."""
        for mark, encoding in MARKS.items():
            if head.startswith(mark) and self.encoding in (None, encoding):
                return encoding, len(mark)
        if self.encoding is not None:
            try:
                codecs.getincrementaldecoder(self.encoding)
            except LookupError:
                raise UserError(f"Python knows no encoding {self.encoding!r}.", "Try --encoding utf-8, utf-16, cp1252, …") from None
            return self.encoding, 0
        if kind := not_text(head):
            raise UserError(f"{self.path or self.name} is {kind}, not plain text.", _cure(head))
        return "utf-8", 0

    def _undecodable(self, error: UnicodeDecodeError, encoding: str, at: int, line: int) -> UserError:
        byte = f"byte 0x{error.object[error.start]:02x}" if error.start < len(error.object) else "the end"
        likely = _likely_encoding(error.object[max(0, error.start - 2000) : error.start + 2000])
        return UserError(
            f"{self.path or self.name} is not {encoding.upper()}: {byte} at offset {at:,}, line {line:,} ({error.reason}).",
            f"It looks like {likely}: add --encoding {likely}.",
        )


def expand(sources: Iterable[str], encoding: str | None = None) -> list[Document]:
    """The documents that the words of a command line name, in a fixed order and each file once.

    A word is a file, a folder (every text file in it), a glob, `-` for standard input, or `python`, `python-docs` or `shakespeare`.
    Errors: `UserError` when a word names nothing, with where it looked and what has a similar name.
    """
    documents: dict[object, Document] = {}
    for source in sources:
        for document in _documents(source):
            documents.setdefault(document.path.resolve() if document.path else document, replace(document, encoding=encoding))
    return list(documents.values())


def not_text(head: bytes) -> str | None:
    """What a file is that begins with `head`, if it is not plain text; None if it may be."""
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    return "a binary file (it has zero bytes)" if b"\0" in head and not head.startswith(tuple(MARKS)) else None


def _documents(source: str) -> list[Document]:
    """The documents behind one word of the command line. A path that exists comes before a built-in text of the same name."""
    path = Path(source).expanduser()
    if source == "-":
        return [_standard_input()]
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [_file(path.name, path)]
    if glob.has_magic(source):
        matches = sorted(name for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
        if matches:
            return [_file(Path(name).name, Path(name)) for name in matches]
    elif source in BUILT_IN:
        return BUILT_IN[source]()
    raise _nothing_there(source, path)


def _file(name: str, path: Path) -> Document:
    return Document(name, lambda: path.open("rb"), path=path.absolute())


def _folder(folder: Path) -> list[Document]:
    """Every text file below a folder, by name; hidden ones are left out, others that are not text are left out and named."""
    texts: list[Document] = []
    left_out: list[Document] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            document = _file(Path(parent, name).relative_to(folder).as_posix(), Path(parent, name))
            with document.open() as stream:
                head = stream.read(8192)
            (left_out if not_text(head) else texts).append(document)
    if left_out:
        some = ", ".join(document.name for document in left_out[:3]) + (", …" if len(left_out) > 3 else "")
        warnings.warn(f"{len(left_out)} of {len(left_out) + len(texts)} files in {folder} are not text and are left out: {some}", Notice, stacklevel=2)
    if not texts:
        raise UserError(f"There is no text file in the folder {folder.absolute()} (looked at every file below it).")
    return texts


def _nothing_there(source: str, path: Path) -> UserError:
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    near = difflib.get_close_matches(path.name, [*os.listdir(parent), *BUILT_IN], n=3, cutoff=0.5)
    what = "No file matches the pattern" if glob.has_magic(source) else "There is no file or folder"
    hint = f"Similar names: {', '.join(near)}." if near else f"In {parent} nothing has a similar name."
    return UserError(f"{what} {path.absolute()}.", f"{hint} Built-in texts: {', '.join(BUILT_IN)}.")


def _standard_input() -> Document:
    """Standard input can be read but once: it is kept in a nameless file on disk, which goes with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the document)
    shutil.copyfileobj(sys.stdin.buffer, spool, CHUNK)
    spool.flush()

    def reopen() -> BinaryIO:
        copy = os.fdopen(os.dup(spool.fileno()), "rb")
        copy.seek(0)
        return copy

    return Document("standard input", reopen)


def _python_docs() -> list[Document]:
    """The language reference that CPython carries for its `help()`, a document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        fix = "Train on `python`, the standard library's source, or on a file of your own."
        raise UserError("This Python was installed without pydoc_data, which holds `python-docs`.", fix) from None
    return [
        Document(f"python-docs/{name}", lambda text=text: io.BytesIO(text.encode()))  # type: ignore[misc]
        for name, text in sorted(topics.items())
    ]


def _python_source() -> list[Document]:
    """The standard library's own modules, without its tests and what was installed beside it."""
    library = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    paths = [path.relative_to(library) for path in library.rglob("*.py")]
    return [_file(f"python/{path.as_posix()}", library / path) for path in sorted(paths) if not skip & set(path.parts)]


def _shakespeare() -> list[Document]:
    """Tiny Shakespeare, downloaded once into the cache and checked."""
    path = cache_dir() / "shakespeare.txt"
    if not path.exists():
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=20) as answer:
                content = answer.read()
        except OSError as error:
            raise UserError(
                f"Tiny Shakespeare could not be downloaded from {SHAKESPEARE_URL} ({error}).",
                f"Put the file at {path}, or train on `python-docs`, which is already on this machine.",
            ) from error
        with replacing(path) as unfinished:
            unfinished.write_bytes(content)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(f"{path} is not Tiny Shakespeare: its SHA-256 is {found[:16]}…, not {SHAKESPEARE_SHA256[:16]}….", f"Remove {path}.")
    return [_file("shakespeare", path)]


def _likely_encoding(sample: bytes) -> str:
    """A guess for a message: which encoding the bytes around an error may be in."""
    if sample.count(0) > len(sample) // 4:
        return "utf-16-le" if sample[1::2].count(0) >= sample[::2].count(0) else "utf-16-be"
    runs = "".join("x" if byte > 0x7F else " " for byte in sample).split()
    if sum(map(len, runs)) < 2 * len(runs):  # single accented letters between plain ones
        return "cp1252"
    for encoding, share in (("shift_jis", "\u3040\u30ff"), ("euc_kr", "\uac00\ud7a3"), ("gb18030", "\u4e00\u9fff")):
        letters = [letter for letter in sample.decode(encoding, errors="ignore") if letter > "\x7f"]
        if letters and sum(share[0] <= letter <= share[1] for letter in letters) > len(letters) / 3:
            return encoding
    return "cp1251"


def _cure(head: bytes) -> str:
    if b"\0" in head and not head.startswith(tuple(SIGNATURES)):
        encoding = _likely_encoding(head[:4000])
        if encoding.startswith("utf-16"):
            return f"If it is UTF-16 without its mark, add --encoding {encoding}."
    return "Convert it to plain text first (open it in its own program and save as .txt, UTF-8), then train on that file."


BUILT_IN: dict[str, Callable[[], list[Document]]] = {
    "python": _python_source,
    "python-docs": _python_docs,
    "shakespeare": _shakespeare,
}
