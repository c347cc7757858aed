"""Text sources: plain text, JSONL, CSV and Parquet, optionally compressed, as streams of chunks.

A file's suffix decides the format. A record of a table is a document; a plain text is one
document. Memory does not grow with the file.
"""

import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path, PurePath
from typing import Any, BinaryIO, NamedTuple

from nanogpt.data.encoding import canonical_encoding, decode_error, decode_stream, detect_encoding
from nanogpt.errors import UserError

READ_BYTES = 1 << 18  # bytes per read
PARQUET_BATCH_ROWS = 256
MAX_CSV_FIELD_CHARS = 2**31 - 1  # the csv module's default is 131,072
COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst")
# A text may be split before white space, because tokenizers start a new token there.
WORD_END = re.compile(r"\S(?=[ \n])")
DEFAULT_TEXT_FIELD = "text"


class MissingFieldError(UserError):
    """A table or a record lacks the text field."""


class Chunk(NamedTuple):
    """Some text of one document.

    Attributes:
        text: The text, which may be empty.
        ends_document: True if the document ends after this chunk.
        resume_offset: The byte of the file where a later read may start with this chunk, if any.
    """

    text: str
    ends_document: bool
    resume_offset: int | None


@dataclass(frozen=True)
class Source:
    """A text or a table of texts, which can be read any number of times.

    Attributes:
        name: The name, which for a file in a folder is relative to that folder.
        open: Opens the decompressed bytes.
        encoding: The text encoding; by default detected.
        path: The file; None for standard input and for built-in texts that are not files.
        text_field: The field or column that holds the text of a table.
    """

    name: str
    open: Callable[[], BinaryIO]
    encoding: str | None = None
    path: Path | None = None
    text_field: str = DEFAULT_TEXT_FIELD

    @property
    def format(self) -> str:
        """Return the format: jsonl, csv, parquet or text."""
        return format_of(self.path.name) if self.path else "text"

    @property
    def is_table(self) -> bool:
        """Return whether the source is a table, whose records are documents."""
        return self.format != "text"

    @property
    def is_seekable(self) -> bool:
        """Return whether a read may start within the source."""
        return self.path is None or not is_compressed(self.path.name)

    @property
    def size(self) -> int:
        """Return the bytes on the disk, or 0 if the source is not a file."""
        return self.path.stat().st_size if self.path else 0

    @property
    def key(self) -> Path | str:
        """Return a key that is equal for two names of one source."""
        return self.path.resolve() if self.path else self.name

    @property
    def where(self) -> str:
        """Return the name for error messages."""
        return str(self.path or self.name)

    def iter_chunks(self, start: int = 0, stop: int | None = None) -> Iterator[Chunk]:
        """Iterate over the documents in chunks of a limited size.

        Args:
            start: The `resume_offset` of a chunk, or 0.
            stop: The `resume_offset` of a later chunk; by default the end.

        Raises:
            UserError: The source is not text, cannot be read, is a truncated archive, or has a
                record without the text field.
        """
        try:
            with self.open() as stream:
                if self.format == "text":
                    yield from _iter_text(stream, self, start, stop)
                elif self.format == "jsonl":
                    yield from _iter_jsonl(stream, self, start, stop)
                else:
                    iter_records = _iter_csv if self.format == "csv" else _iter_parquet
                    yield from (Chunk(text, True, None) for text in iter_records(stream, self))
        except UserError:
            raise
        except Exception as error:
            if corruption := corruption_message(error):
                what = f"{self.where} {corruption}."
                raise UserError(what, "Copy or download it again.") from error
            if not isinstance(error, OSError):
                raise
            raise UserError(f"{self.where} cannot be read: {error.strerror or error}.") from error

    def iter_documents(self) -> Iterator[Iterator[str]]:
        """Iterate over the documents that are not empty, each an iterator over its text.

        Read a document's text before advancing to the next document.
        """

        def numbered_texts() -> Iterator[tuple[int, str]]:
            document = 0
            for chunk in self.iter_chunks():
                if chunk.text:
                    yield document, chunk.text
                document += chunk.ends_document

        groups = groupby(numbered_texts(), key=lambda numbered: numbered[0])
        return ((text for _, text in group) for _, group in groups)

    def iter_text(self) -> Iterator[str]:
        """Iterate over the text of all documents."""
        return (chunk.text for chunk in self.iter_chunks() if chunk.text)


def format_of(name: str) -> str:
    """Return the format of a file of this name: jsonl, csv, parquet or text."""
    path = PurePath(name.lower())
    suffix = PurePath(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix
    return suffix[1:] if suffix in (".jsonl", ".csv", ".parquet") else "text"


def is_compressed(name: str) -> bool:
    """Return whether a file of this name is decompressed while it is read."""
    return PurePath(name.lower()).suffix in COMPRESSED_SUFFIXES


def open_decompressed(path: Path) -> BinaryIO:
    """Open a file for reading its decompressed bytes.

    Errors of a corrupt archive come up while reading; see `corruption_message`.

    Raises:
        UserError: The package for this compression is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstandardReader(path), READ_BYTES)
    return path.open("rb")


def corruption_message(error: Exception) -> str | None:
    """Return what is wrong with a file, if the error means a truncated or corrupt archive."""
    if isinstance(error, EOFError):
        return "is truncated: its archive ends before the end of the text"
    from_zstandard = type(error).__module__.startswith(("zstandard", "zstd", "backend_c"))
    if from_zstandard or isinstance(error, gzip.BadGzipFile | lzma.LZMAError | zlib.error):
        return f"is a corrupt archive ({error})"
    return None


def iter_blocks(stream: BinaryIO, length: int = sys.maxsize) -> Iterator[bytes]:
    """Iterate over a stream in blocks, up to `length` bytes or the end."""
    while block := stream.read(min(READ_BYTES, length)):
        length -= len(block)
        yield block


def _iter_text(stream: BinaryIO, source: Source, start: int, stop: int | None) -> Iterator[Chunk]:
    """Iterate over one document, which may be resumed after the first word of each block.

    Only in uncompressed UTF-8 do the characters before a chunk give its byte offset.
    """
    has_offsets = source.is_seekable
    offset = start
    if has_offsets:
        encoding, bom_length = detect_encoding(
            stream.read(READ_BYTES), source.where, source.encoding
        )
        stream.seek(start)
        offset = start or bom_length
        has_offsets = encoding == "utf-8"
    blocks = iter_blocks(stream, sys.maxsize if stop is None else stop - start)
    for text in decode_stream(blocks, source.where, "utf-8" if start else source.encoding):
        word = WORD_END.search(text) if has_offsets else None
        split = word.end() if word else len(text)
        yield Chunk(text[:split], False, None)
        if word:
            yield Chunk(text[split:], False, offset + len(text[:split].encode()))
        if has_offsets:
            offset += len(text.encode())
    if stop is None:
        yield Chunk("", True, None)


def _iter_jsonl(stream: BinaryIO, source: Source, start: int, stop: int | None) -> Iterator[Chunk]:
    """Iterate over the documents of JSON lines, by default UTF-8 (RFC 8259, section 8.1)."""
    encoding = "utf-8" if source.encoding is None else canonical_encoding(source.encoding)
    if start:
        stream.seek(start)
    offset = start
    for number, line in enumerate(stream, start=1):
        if offset == stop:
            return
        data = line.removeprefix(codecs.BOM_UTF8) if number == 1 and not start else line
        try:
            text = data.decode(encoding)
            record = json.loads(text) if not text.isspace() else None
        except UnicodeDecodeError as error:
            error_offset = offset + error.start
            raise decode_error(error, source.where, encoding, error_offset, number) from error
        # Also for an integer of too many digits and for deeply nested brackets.
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{source.where} is not JSONL: line {number:,} is not JSON ({error}).",
                "Each line must be a JSON object. Remove the last line of a truncated file; "
                "rename a plain text to end in .txt.",
            ) from error
        if record is not None:
            text = _record_text(record, source.text_field, f"{source.where}, line {number:,}")
            yield Chunk(text, True, offset if source.is_seekable else None)
        offset += len(line)


def _record_text(record: Any, field: str, where: str) -> str:
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: not a JSON object but a {type(record).__name__}.",
            'Each line must be an object like {"text": "…"}.',
        )
    if field not in record:
        raise MissingFieldError(
            f"{where}: the record has no field {field!r}. "
            f"Its fields: {', '.join(map(repr, record)) or 'none'}.",
            "Set text_field to the field that holds the text.",
        )
    return _valid_text(record[field], field, where)


def _valid_text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {field!r} is not a text but {value!r:.60}.",
            "Set text_field to another field, or remove the record.",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {field!r} has an unpaired surrogate, which is not valid Unicode "
            f"({error.reason}).",
            "Correct or remove the record.",
        ) from error
    return value


def _iter_csv(stream: BinaryIO, source: Source) -> Iterator[str]:
    """Iterate over the text column of a CSV file, whose first row names the columns."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    texts = decode_stream(iter_blocks(stream), source.where, source.encoding)
    reader = csv.reader(_iter_lines(texts), strict=True)
    try:
        if (names := next(reader, None)) is None:
            return
        column = _column_index(names, source)
        for row in filter(None, reader):
            if len(row) <= column:
                raise UserError(
                    f"{source.where}, line {reader.line_num:,}: the row has {len(row)} of "
                    f"{len(names)} columns and no {source.text_field!r}.",
                    "Correct or remove the row.",
                )
            yield row[column]
    except csv.Error as error:
        raise UserError(
            f"{source.where} is not CSV: line {reader.line_num:,}: {error}.",
            "Correct the row, or remove it if the file is truncated.",
        ) from error


def _column_index(names: list[str], source: Source) -> int:
    if source.text_field not in names:
        raise MissingFieldError(
            f"{source.where} has no column {source.text_field!r}. "
            f"Its columns: {', '.join(map(repr, names))}.",
            "Set text_field to the column that holds the text.",
        )
    return names.index(source.text_field)


def _iter_lines(texts: Iterable[str]) -> Iterator[str]:
    r"""Split text after `\n` only; `str.splitlines` would split at other characters too."""
    parts: list[str] = []
    for text in texts:
        first, *lines = text.split("\n")
        parts.append(first)
        for line in lines:
            yield "".join(parts) + "\n"
            parts = [line]
    if last := "".join(parts):
        yield last


def _iter_parquet(stream: BinaryIO, source: Source) -> Iterator[str]:
    """Iterate over the text column of a Parquet file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{source.where} is a Parquet table, which needs the package pyarrow.",
            'pip install "nanogpt[parquet]"',
        ) from None
    is_stream = isinstance(stream, gzip.GzipFile | lzma.LZMAFile) or not stream.seekable()
    try:
        table = parquet.ParquetFile(spool(stream) if is_stream else stream)
        _column_index(table.schema_arrow.names, source)
        batches = table.iter_batches(PARQUET_BATCH_ROWS, columns=[source.text_field])
        values = chain.from_iterable(batch.column(0).to_pylist() for batch in batches)
        for row, value in enumerate(values, start=1):
            yield _valid_text(value, source.text_field, f"{source.where}, row {row:,}")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{source.where} cannot be read as a Parquet table: {error}.",
            "It may be truncated: copy or download it again.",
        ) from error


def spool(stream: BinaryIO) -> BinaryIO:
    """Copy a stream to a temporary file, where it can be read at any position."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller reads it)
    shutil.copyfileobj(stream, file, READ_BYTES)
    file.seek(0)
    return file  # type: ignore[return-value]


class _ZstandardReader(io.RawIOBase):
    """The decompressed bytes of a Zstandard file of one or more frames.

    The package's own reader does not report a file that ends within a frame.
    """

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError:
            raise UserError(
                f"{path} is compressed with Zstandard, which needs the package zstandard.",
                'pip install "nanogpt[zstd]"',
            ) from None
        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._within_frame = False
        self._buffer = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with decompressed bytes; raise `EOFError` at an incomplete frame."""
        while not self._buffer:
            data = b""
            if self._frame.eof:
                data = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._within_frame = False
            data = data or self._file.read(READ_BYTES)
            if not data:
                if self._within_frame:
                    raise EOFError
                return 0
            self._within_frame = True
            self._buffer = self._frame.decompress(data)
        size = min(len(buffer), len(self._buffer))
        buffer[:size] = self._buffer[:size]
        self._buffer = self._buffer[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()
