"""What a file holds, by the end of its name: plain text, JSONL, CSV or Parquet, each also packed with gzip, xz or Zstandard.

In: a path, or a stream of bytes. Out: `Piece`s, in the order of the file; a record of a table is a document, and a text is one. Memory does not grow with
the file. Refuses: archives that are cut short, records without the field that was asked for, and what a missing package would read.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from nanogpt.corpus.encoding import codec, decoded, find_encoding, undecodable
from nanogpt.errors import UserError

CHUNK = 1 << 18  # bytes read at a time
ROWS = 256  # of a Parquet table, read at a time
LONGEST_CELL = 2**31 - 1  # characters of a CSV cell; the csv module allows 131,072 if nothing is said
PACKINGS = (".gz", ".xz", ".zst")
WORD_END = re.compile(r"\S(?=[ \n])")  # behind it a text may be cut: tokenizers begin something new at white space
DEFAULT_FIELD = "text"


class NoField(UserError):
    """A table, or a record of one, lacks the field that was asked for."""


class Piece(NamedTuple):
    """Some text of one document. With `ends` the document ends behind it. With `place`, a later reading may begin here: at that byte of the file."""

    text: str
    ends: bool
    place: int | None


def format_of(name: str) -> str:
    """jsonl, csv, parquet or text: what a file of this name holds."""
    path = PurePath(name.lower())
    suffix = PurePath(path.stem).suffix if path.suffix in PACKINGS else path.suffix
    return suffix[1:] if suffix in (".jsonl", ".csv", ".parquet") else "text"


def is_packed(name: str) -> bool:
    """Whether a file of this name is unpacked while it is read."""
    return PurePath(name.lower()).suffix in PACKINGS


def open_bytes(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked. Errors: `UserError` where that takes a package that is not installed; see `reading` for those of a damaged archive."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)  # type: ignore[return-value]
    return io.BufferedReader(_Zstandard(path), CHUNK) if suffix == ".zst" else path.open("rb")


def damage(error: Exception) -> str | None:
    """What is wrong with an archive or a table, if that is what an error in reading it means."""
    if isinstance(error, EOFError):
        return "is cut short: its archive ends before the end of the text"
    damaged = isinstance(error, gzip.BadGzipFile | lzma.LZMAError | zlib.error) or type(error).__module__.startswith(("zstandard", "zstd", "backend_c"))
    return f"is a damaged archive ({error})" if damaged else None


def pieces(stream: BinaryIO, name: str, where: str, encoding: str | None, field: str | None, begin: int, until: int | None) -> Iterator[Piece]:
    """What is in a stream of bytes that is called `name` and lies `where` a message says it does; from byte `begin` to byte `until`, which are
    the places of two pieces, or the beginning and, as None, the end."""
    kind = format_of(name)
    if kind == "text":
        return _text(stream, where, encoding, not is_packed(name), begin, until)
    if kind == "jsonl":
        return _jsonl(stream, where, encoding, field or DEFAULT_FIELD, not is_packed(name), begin, until)
    rows = _csv(stream, where, encoding, field or DEFAULT_FIELD) if kind == "csv" else _parquet(stream, where, field or DEFAULT_FIELD)
    return (Piece(text, True, None) for text in rows)


def blocks(stream: BinaryIO, length: int | None = None) -> Iterator[bytes]:
    """A stream in blocks, to its end or for so many bytes."""
    left = length
    while data := stream.read(CHUNK if left is None else min(CHUNK, left)):
        left = None if left is None else left - len(data)
        yield data


def _text(stream: BinaryIO, where: str, encoding: str | None, seekable: bool, begin: int, until: int | None) -> Iterator[Piece]:
    """One document. A reading may begin behind the first word in each block, where bytes can be found again: in UTF-8 that is not packed."""
    if seekable:
        found, skip = find_encoding(stream.read(CHUNK), where, encoding)
        stream.seek(begin)
        offset, seekable = begin or skip, found == "utf-8"
    for text in decoded(blocks(stream, until and until - begin), where, "utf-8" if begin else encoding):
        if not seekable:
            yield Piece(text, False, None)
            continue
        word = WORD_END.search(text)
        cut = word.end() if word else len(text)
        yield Piece(text[:cut], False, None)
        if word:
            yield Piece(text[cut:], False, offset + len(text[:cut].encode()))
        offset += len(text.encode())
    if until is None:
        yield Piece("", True, None)


def _jsonl(stream: BinaryIO, where: str, encoding: str | None, field: str, seekable: bool, begin: int, until: int | None) -> Iterator[Piece]:
    """A document a line. Lines of JSON are UTF-8 (RFC 8259, section 8.1), if nothing else is said."""
    offset, encoding = begin, codec(encoding) if encoding is not None else "utf-8"
    if begin:
        stream.seek(begin)
    for number, line in enumerate(stream, start=1):
        if offset == until:
            return
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 and not begin else line
        try:
            text = data.decode(encoding)
            record = json.loads(text) if not text.isspace() else None
        except UnicodeDecodeError as error:
            raise undecodable(error, where, encoding, offset + error.start, number) from error
        except (ValueError, RecursionError) as error:  # not JSON, a number of too many digits, or brackets in brackets in brackets
            what = f"{where} is not JSONL: line {number:,} is no JSON ({error})."
            raise UserError(what, "Each line is one JSON object. If the file was cut off, remove its last line; a plain text is to be named .txt.") from error
        if record is not None:
            yield Piece(_field(record, field, f"{where}, line {number:,}"), True, offset if seekable else None)
        offset += len(line)


def _field(record: Any, field: str, place: str) -> str:
    """The text of a record. Errors: `UserError` for a record without it."""
    if not isinstance(record, dict):
        raise UserError(f"{place}: this is no JSON object but a {type(record).__name__}.", 'Each line is to be like {"text": "…"}.')
    if field not in record:
        there = ", ".join(map(repr, record)) or "none"
        raise NoField(f"{place}: the record has no field {field!r}. Its fields: {there}.", "Name the field that holds the text with --field.")
    return _string(record[field], field, place)


def _string(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {field!r} is no text but {value!r:.60}.", "Name another field with --field, or remove the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{place}: {field!r} has half of a surrogate pair, which is no character ({error.reason}).", "Mend or remove the record.") from error
    return value


def _csv(stream: BinaryIO, where: str, encoding: str | None, field: str) -> Iterator[str]:
    """The cells of a column; the first row names the columns."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(_lines(decoded(blocks(stream), where, encoding)), strict=True)
    try:
        if (names := next(reader, None)) is None:
            return
        column = _column(names, field, where)
        for row in reader:
            if len(row) <= column and row:
                raise UserError(f"{where}, line {reader.line_num:,}: the row has {len(row)} of {len(names)} columns and no {field!r}.", "Mend or remove it.")
            if row:
                yield row[column]
    except csv.Error as error:
        raise UserError(f"{where} is not CSV: line {reader.line_num:,}: {error}.", "Mend the row; if the file was cut off, remove it.") from error


def _column(names: list[str], field: str, where: str) -> int:
    if field not in names:
        raise NoField(f"{where} has no column {field!r}. Its columns: {', '.join(map(repr, names))}.", "Name the column that holds the text with --field.")
    return names.index(field)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Text cut behind its line feeds and nowhere else."""
    begun: list[str] = []
    for text in texts:
        first, *others = text.split("\n")
        begun.append(first)
        for line in others:
            yield "".join(begun) + "\n"
            begun = [line]
    if last := "".join(begun):
        yield last


def _parquet(stream: BinaryIO, where: str, field: str) -> Iterator[str]:
    """The cells of a column."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{where} is a Parquet table, which takes pyarrow to read.", 'pip install "nanogpt[parquet]"') from None
    try:
        table = parquet.ParquetFile(stream if stream.seekable() and not isinstance(stream, gzip.GzipFile | lzma.LZMAFile) else _spooled(stream))
        column = table.schema_arrow.names[_column(table.schema_arrow.names, field, where)]
        row = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _string(value, field, f"{where}, row {row:,}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where} cannot be read as a Parquet table: {error}.", "It may be cut short: copy or download it again.") from error


def _spooled(stream: BinaryIO) -> BinaryIO:
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as it is read)
    shutil.copyfileobj(stream, spool, CHUNK)
    spool.seek(0)
    return spool  # type: ignore[return-value]


class _Zstandard(io.RawIOBase):
    """The frames of a Zstandard file, one after another. (The package's own stream takes a file that is cut short for one that ends.)"""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path} is packed with Zstandard, which takes a package to read.", 'pip install "nanogpt[zstd]"') from None
        self._file, self._unpacker = path.open("rb"), zstandard.ZstdDecompressor()
        self._frame, self._waiting = self._unpacker.decompressobj(), b""
        self._fresh = True  # nothing of the frame was read yet

    def readable(self) -> bool:
        """As every stream that is read says."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as what is unpacked goes. Errors: `EOFError` for a file that ends within a frame."""
        while not self._waiting:
            if self._frame.eof:
                data, self._frame, self._fresh = self._frame.unused_data, self._unpacker.decompressobj(), True
            else:
                data = b""
            data = data or self._file.read(CHUNK)
            if not data and not self._fresh:
                raise EOFError
            if not data:
                return 0
            self._fresh = False
            self._waiting = self._frame.decompress(data)
        size = min(len(buffer), len(self._waiting))
        buffer[:size], self._waiting = self._waiting[:size], self._waiting[size:]
        return size

    def close(self) -> None:
        """Close the file too."""
        self._file.close()
        super().close()
