"""A person's text, wherever it lies: files, folders, globs, standard input and the texts that are on every machine.

In: what stood on the command line. Out: `Document`s, each a name and a stream of decoded pieces; memory does not grow with the text.
Refuses: paths that are not there, files that are not text, and bytes that are not what the encoding says.

Line ends stay as they are. UTF-8, with or without its mark, and UTF-16 with its mark give the same characters.
"""

import codecs
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
import urllib.request
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir, replacing

CHUNK = 1 << 22  # bytes read at a time
HEAD = 8192  # bytes that are looked at to see what a file is

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

MARKS = {  # byte order marks; that of UTF-32 begins with that of UTF-16
    b"\xff\xfe\0\0": "utf-32-le", b"\0\0\xfe\xff": "utf-32-be",
    b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be",
}  # fmt: skip

SIGNATURES = {  # how files that are not plain text begin
    b"%PDF": "a PDF document", b"{\\rtf": "an RTF document", b"\xd0\xcf\x11\xe0": "an old Word or Excel document",
    b"PK\x03\x04": "a ZIP archive (DOCX, ODT, EPUB and XLSX are such archives too)", b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive", b"\x1f\x8b": "a gzip archive", b"BZh": "a bzip2 archive", b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a Zstandard archive", b"\x89PNG": "a PNG picture", b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture", b"\x7fELF": "a program", b"SQLite format 3": "an SQLite database", b"PAR1": "a Parquet table",
}  # fmt: skip

FREQUENT = {  # encodings that text may turn out to be in: frequent letters beyond ASCII, and the share of such letters they usually make up
    "cp1252": ("éèàâêîôûçäöüßñáíóúåøæãõ“”‘’–—…«»¿¡°", 0.9), "cp1250": ("ěščřžýáíéúůďťňąęłńóśźż„”–", 0.9), "cp1254": ("ışğçöüİâ’", 0.9),
    "cp1251": ("оеаинтсрвлкмдпуя", 0.75), "koi8-r": ("оеаинтсрвлкмдпуя", 0.75), "cp866": ("оеаинтсрвлкмдпуя", 0.75),
    "cp1253": ("αοιετσνρκπμλη", 0.7), "cp1255": ("יוהלאתרבמנש", 0.75), "cp1256": ("اليمنرتبةعدسف", 0.7), "cp874": ("านรกเงอมย่ล", 0.5),
    "shift_jis": ("のにはをたがでてとしれさいあるっくかもなこら、。", 0.4), "euc_jp": ("のにはをたがでてとしれさいあるっくかもなこら、。", 0.4),
    "euc_kr": ("이다는을가의에고한로하은도지나서기를", 0.3), "gb18030": ("的一是不了在人有我他这中大来上国们到说和，。", 0.2),
    "big5": ("的一是不了在人有我他這中大來上國們到說和，。", 0.2),
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

        Errors: `UserError` for what is not text, with the byte, its offset, its line and the encoding it may be in, and for what cannot be read.
        """
        try:
            with self.open() as stream:
                yield from self._decode(stream)
        except OSError as error:
            raise UserError(f"{self.path or self.name} cannot be read: {error.strerror or error}.") from error

    def _decode(self, stream: BinaryIO) -> Iterator[str]:
        data = stream.read(CHUNK)
        encoding, skip = self._encoding(data)
        decoder = codecs.getincrementaldecoder(encoding)()
        offset, lines, plain, data = skip, 1, True, data[skip:] or stream.read(CHUNK)
        while True:
            waiting = len(decoder.getstate()[0])  # bytes of a character that the last piece cut in two
            try:
                text = decoder.decode(data, final=not data)
                text.encode()  # some codecs let halves of surrogate pairs pass
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, errors="ignore").count("\n")
                cut_off = error.reason == "unexpected end of data" and not (plain and error.object[: error.start].isascii())
                raise self._undecodable(error, encoding, offset - waiting + error.start, lines + before, cut_off) from error
            except UnicodeError as error:
                raise UserError(f"{self.path or self.name} is not {encoding.upper()}: {error}.", "Try --encoding utf-16-le or utf-16-be.") from error
            if text:
                yield text
            if not data:
                return
            offset, lines, plain, data = offset + len(data), lines + text.count("\n"), plain and text.isascii(), stream.read(CHUNK)

    def _encoding(self, head: bytes) -> tuple[str, int]:
        """The encoding to read with, and the length of the mark to skip."""
        asked = None if self.encoding is None else _codec(self.encoding)
        for mark, encoding in MARKS.items():
            if head.startswith(mark) and asked in (None, encoding):
                return encoding, len(mark)
        if kind := not_text(head[:HEAD], asked):
            raise UserError(f"{self.path or self.name} is {kind}, not plain text.", _cure(head[:HEAD]))
        return asked or "utf-8", 0

    def _undecodable(self, error: UnicodeDecodeError, encoding: str, at: int, line: int, cut_off: bool) -> UserError:
        likely = _likely_encoding(error.object[max(0, error.start - 2000) : error.start + 2000], encoding)
        fix = "Name its encoding with --encoding, or repair the file."
        if cut_off:
            fix = "The file seems to be cut off in the middle of a character: repair its end."
        elif likely:
            there = error.object[max(0, error.start - 20) : error.start + 20].decode(likely, errors="ignore")
            fix = f"It may be {likely}; the place would then read {there!r}. If that is right, add --encoding {likely}."
        return UserError(
            f"{self.path or self.name} is not {encoding.upper()}: byte 0x{error.object[error.start]:02x} at offset {at:,}, line {line:,} ({error.reason}).", fix
        )


def expand(sources: Iterable[str], encoding: str | None = None) -> list[Document]:
    """The documents that the words of a command line name, in a fixed order and each of them once.

    A word is a file, a folder (every text file in it), a glob, `-` for standard input, or `python`, `python-docs` or `shakespeare`.
    Errors: `UserError` when a word names nothing, with where it looked and what has a similar name.
    """
    documents: dict[object, Document] = {}
    for source in sources:
        for document in _documents(source, encoding):
            documents.setdefault(document.path.resolve() if document.path else document.name, replace(document, encoding=encoding))
    return list(documents.values())


def findable(source: str) -> str:
    """A source's name that means the same from every folder."""
    return source if source == "-" or (source in BUILT_IN and not os.path.exists(source)) else os.path.abspath(os.path.expanduser(source))


def not_text(head: bytes, encoding: str | None = None) -> str | None:
    """What a file is that begins with `head`, if it is not plain text (in the encoding that was given); None if it may be."""
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    zeros = encoding is None and b"\0" in head and not head.startswith(tuple(MARKS))
    return "a binary file (it has zero bytes)" if zeros else None


def _documents(source: str, encoding: str | None) -> list[Document]:
    """The documents behind one word of the command line. A path that exists comes before a built-in text of the same name."""
    place = os.path.expanduser(source)
    if source == "-" and sys.stdin is None:
        raise UserError("Standard input is closed.", "Give it a text: nanogpt train - < book.txt")
    if source == "-":
        return [_spooled("standard input", sys.stdin.buffer)]
    if os.path.isdir(place):
        return _folder(Path(place), encoding)
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


def _file(name: str, path: Path) -> Document:
    return Document(name, lambda: path.open("rb"), path=path.absolute())


def _folder(folder: Path, encoding: str | None) -> list[Document]:
    """Every text file below a folder, by name; hidden files are skipped, and what is not text is skipped and listed."""
    texts: list[Document] = []
    left_out: list[Document] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            document = _file(Path(parent, name).relative_to(folder).as_posix(), Path(parent, name))
            (texts if _readable_text(document, encoding) else left_out).append(document)
    if left_out:
        some = ", ".join(document.name for document in left_out[:3]) + (", …" if len(left_out) > 3 else "")
        count = f"{len(left_out)} of {len(left_out) + len(texts)}"
        warnings.warn(f"{count} files in {folder} are not text and are left out: {some}", Notice, stacklevel=2)
    if not texts:
        raise UserError(f"There is no text file in the folder {folder.absolute()} (looked at every file below it).")
    return texts


def _readable_text(document: Document, encoding: str | None) -> bool:
    assert document.path is not None, "a file of a folder"
    if not document.path.is_file():  # a link that leads nowhere, a pipe
        return False
    try:
        with document.open() as stream:
            return not_text(stream.read(HEAD), encoding) is None
    except OSError:
        return False


def _nothing_there(source: str, path: Path) -> UserError:
    parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
    near = difflib.get_close_matches(path.name, [*os.listdir(parent), *BUILT_IN], n=3, cutoff=0.5)
    what = "No file matches the pattern" if glob.has_magic(source) else "There is no file or folder"
    name = f"{path.absolute()}" if len(source) < 300 else f"{source[:100]!r}… (a text itself? Give the path of a file)"
    if "://" in source:
        return UserError(f"{source} is an address, and nanogpt reads files.", "Download it first, then give the path of the file.")
    hint = f"Similar names: {', '.join(near)}." if near else f"In {parent} nothing has a similar name."
    return UserError(f"{what} {name}.", f"{hint} Built-in texts: {', '.join(BUILT_IN)}.")


def _spooled(name: str, stream: BinaryIO) -> Document:
    """A stream that can be read only once is spooled to a temporary file, which goes with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the document)
    shutil.copyfileobj(stream, spool, CHUNK)
    spool.flush()

    def reopen() -> BinaryIO:
        copy = os.fdopen(os.dup(spool.fileno()), "rb")
        copy.seek(0)
        return copy

    return Document(name, reopen)


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


def _codec(encoding: str) -> str:
    """Python's own name of an encoding. Errors: `UserError` when it has none of that name for text."""
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UserError(f"Python knows no encoding {encoding!r}.", "Try --encoding utf-8, utf-16, cp1252, …") from None


def _likely_encoding(sample: bytes, failed: str) -> str | None:
    """A guess for a message: which encoding the bytes around an error may be in, by how many of its letters are frequent ones."""
    whole_lines = [line for line in sample.split(b"\n")[1:-1] if not line.isascii()]
    whole = b"\n".join(whole_lines) or sample  # which may begin and end within a character
    scores: dict[str, float] = {}
    for encoding, (frequent, usual) in FREQUENT.items():
        letters = [letter for letter in whole.decode(encoding, errors="replace") if letter > "\x7f"]
        if encoding != failed and "\ufffd" not in letters[1:-1]:
            share = sum(letter in frequent for letter in letters) / len(letters) if letters else 0.0
            scores[encoding] = min(1.0, share / usual)
    best = max(scores, key=lambda encoding: scores[encoding], default=None)
    return best if best and scores[best] > 0.3 else None


def _cure(head: bytes) -> str:
    """What to do with a file that is not plain text."""
    if not head.startswith(tuple(SIGNATURES)):
        even = head[: len(head) // 2 * 2]
        spaces = {encoding: even.decode(encoding, errors="ignore").count(" ") for encoding in ("utf-16-le", "utf-16-be")}
        likely = max(spaces, key=lambda encoding: spaces[encoding])
        if spaces[likely] > len(even) / 60:
            return f"If it is UTF-16 without its mark, add --encoding {likely}."
    return "Convert it to plain text first (open it in its own program and save as .txt, UTF-8), then train on that file."


BUILT_IN: dict[str, Callable[[], list[Document]]] = {
    "python": _python_source,
    "python-docs": _python_docs,
    "shakespeare": _shakespeare,
}
