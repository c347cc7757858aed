"""Detect the encoding of text files and decode them exactly, and explain what is not text.

Line ends stay unchanged. UTF-8 with or without a byte order mark (BOM) and UTF-16 with one give the
same characters.
"""

import codecs
from collections.abc import Iterable, Iterator

from nanogpt.errors import UserError

SNIFF_BYTES = 8192  # bytes read to tell text from other files

# Byte order marks. The mark of UTF-32 comes first, because it starts with that of UTF-16.
BOMS = {
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}

# What to do with a file that is not plain text.
CONVERT = "Convert it to plain text (.txt, UTF-8) with the program that wrote it."
DECOMPRESS = "Rename it to end in .gz, .xz or .zst, or decompress it first."
EXTRACT = (
    "Extract it and name the folder; save a DOCX, ODT or EPUB document as plain text (.txt, UTF-8)."
)
RENAME_TABLE = "Rename it to end in .parquet; `text_field` names the column with the text."

# Formats by their first bytes, each with a description and advice.
SIGNATURES = {
    b"%PDF": ("a PDF document", CONVERT),
    b"{\\rtf": ("an RTF document", CONVERT),
    b"\xd0\xcf\x11\xe0": ("an old Word or Excel document", CONVERT),
    b"PK\x03\x04": ("a ZIP archive (DOCX, ODT, EPUB and XLSX are such archives too)", EXTRACT),
    b"PK\x05\x06": ("an empty ZIP archive", EXTRACT),
    b"PK\x07\x08": ("a part of a ZIP archive", EXTRACT),
    b"7z\xbc\xaf": ("a 7-Zip archive", EXTRACT),
    b"Rar!": ("a RAR archive", EXTRACT),
    b"\x1f\x8b": ("a gzip archive", DECOMPRESS),
    b"BZh": ("a bzip2 archive", EXTRACT),
    b"\xfd7zXZ": ("an xz archive", DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ("a Zstandard archive", DECOMPRESS),
    b"\x89PNG": ("a PNG picture", CONVERT),
    b"\xff\xd8\xff": ("a JPEG picture", CONVERT),
    b"GIF8": ("a GIF picture", CONVERT),
    b"\x7fELF": ("a program", CONVERT),
    b"SQLite format 3": ("an SQLite database", CONVERT),
    b"PAR1": ("a Parquet table", RENAME_TABLE),
}

# By encoding: frequent characters beyond ASCII, and their usual fraction of such characters.
JAPANESE = "のにはをたがでてとしれさいあるっくかもなこら、。"
CYRILLIC = "оеаинтсрвлкмдпуя"
FREQUENT_CHARS = {
    "cp1252": ("éèàâêîôûçäöüßñáíóúåøæãõ“”‘’–—…«»¿¡°", 0.9),
    "cp1250": ("ěščřžýáíéúůďťňąęłńóśźż„”–", 0.9),
    "cp1254": ("ışğçöüİâ’", 0.9),
    "cp1251": (CYRILLIC, 0.75),
    "koi8-r": (CYRILLIC, 0.75),
    "cp866": (CYRILLIC, 0.75),
    "cp1253": ("αοιετσνρκπμλη", 0.7),
    "cp1255": ("יוהלאתרבמנש", 0.75),
    "cp1256": ("اليمنرتبةعدسف", 0.7),
    "cp874": ("านรกเงอมย่ล", 0.5),
    "shift_jis": (JAPANESE, 0.4),
    "euc_jp": (JAPANESE, 0.4),
    "euc_kr": ("이다는을가의에고한로하은도지나서기를", 0.3),
    "gb18030": ("的一是不了在人有我他这中大来上国们到说和，。", 0.2),
    "big5": ("的一是不了在人有我他這中大來上國們到說和，。", 0.2),
}


def decode_stream(
    blocks: Iterable[bytes], where: str, encoding: str | None = None
) -> Iterator[str]:
    """Decode blocks of bytes to text, one string for each block.

    Args:
        blocks: The bytes of a file, in order.
        where: The file's name for error messages.
        encoding: The encoding; by default detected from the first block.

    Raises:
        UserError: The bytes are not text, or not in the encoding. The message has the byte, its
            offset and its line, and suggests another encoding.
    """
    blocks = iter(blocks)
    block = next(blocks, b"")
    encoding, bom_length = detect_encoding(block, where, encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    offset = bom_length
    line = 1
    ascii_only = True
    block = block[bom_length:] or next(blocks, b"")
    while True:
        # Bytes of a character that the end of the previous block has split.
        pending_bytes = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
            text.encode()  # some codecs accept unpaired surrogates
        except UnicodeDecodeError as error:
            good_bytes = error.object[: error.start]
            line += good_bytes.decode(encoding, errors="ignore").count("\n")
            cut_off = error.reason == "unexpected end of data" and not (
                ascii_only and good_bytes.isascii()
            )
            error_offset = offset - pending_bytes + error.start
            raise decode_error(error, where, encoding, error_offset, line, cut_off) from error
        except UnicodeError as error:
            raise UserError(
                f"{where} is not {encoding.upper()}: {error}.",
                "Set the encoding to utf-16-le or utf-16-be.",
            ) from error
        if text:
            yield text
        if not block:
            return
        offset += len(block)
        line += text.count("\n")
        ascii_only = ascii_only and text.isascii()
        block = next(blocks, b"")


def detect_encoding(head: bytes, where: str, encoding: str | None = None) -> tuple[str, int]:
    """Return the encoding of a text and the length of its byte order mark.

    Args:
        head: The first bytes of the file.
        where: The file's name for error messages.
        encoding: The encoding that the user has set, if any.

    Raises:
        UserError: The file is not text, or Python has no such encoding.
    """
    expected = None if encoding is None else canonical_encoding(encoding)
    for bom, bom_encoding in BOMS.items():
        if head.startswith(bom) and expected in (None, bom_encoding):
            return bom_encoding, len(bom)
    if binary := identify_binary(head[:SNIFF_BYTES], expected):
        kind, advice = binary
        what = f"{where} is {kind}, not plain text."
        if utf_16 := _guess_utf_16(head[:SNIFF_BYTES]):
            what += " It may be UTF-16 without a byte order mark."
            raise UserError(what, {"encoding": utf_16})
        raise UserError(what, advice)
    return expected or "utf-8", 0


def decode_error(
    error: UnicodeDecodeError,
    where: str,
    encoding: str,
    offset: int,
    line: int,
    cut_off: bool = False,
) -> UserError:
    """Return the error for a byte that is not in the encoding.

    Args:
        error: The codec's error.
        where: The file's name.
        encoding: The encoding that was used.
        offset: Offset of the byte in the file.
        line: Line of the byte, from 1.
        cut_off: True if the file seems to end within a character.
    """
    what = (
        f"{where} is not {encoding.upper()}: byte 0x{error.object[error.start]:02x} "
        f"at offset {offset:,}, line {line:,} ({error.reason})."
    )
    if cut_off:
        return UserError(what, "The file ends in the middle of a character: repair its end.")
    sample = error.object[max(0, error.start - 2000) : error.start + 2000]
    if guess := _guess_encoding(sample, encoding):
        context = error.object[max(0, error.start - 20) : error.start + 20]
        decoded = context.decode(guess, errors="ignore")
        return UserError(
            f"{what}\nIt may be {guess}, which reads {decoded!r} there.", {"encoding": guess}
        )
    return UserError(what, "Set the encoding, or repair the file.")


def identify_binary(head: bytes, encoding: str | None = None) -> tuple[str, str] | None:
    """Return what a file is that is not plain text and what to do, or None if it may be text.

    Args:
        head: The first bytes of the file.
        encoding: The encoding that the user has set; zero bytes are then allowed.
    """
    for signature, binary in SIGNATURES.items():
        if head.startswith(signature):
            return binary
    if encoding is not None or b"\0" not in head or head.startswith(tuple(BOMS)):
        return None
    if head[257:262] == b"ustar":
        return "a tar archive", EXTRACT
    return "a binary file (it has zero bytes)", CONVERT


def canonical_encoding(encoding: str) -> str:
    """Return Python's own name of a text encoding; raise `UserError` if it has none."""
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, ValueError):
        raise UserError(
            f"Python has no text encoding {encoding!r}.",
            "Set the encoding to utf-8, utf-16 or cp1252, for example.",
        ) from None


def _guess_encoding(sample: bytes, failed: str) -> str | None:
    """Guess the encoding of the bytes around an error from the frequency of their characters."""
    lines = [line for line in sample.split(b"\n")[1:-1] if not line.isascii()]
    # Without a complete line, the sample may start and end within a character.
    sample = b"\n".join(lines) or sample
    scores: dict[str, float] = {}
    for encoding, (frequent, usual_fraction) in FREQUENT_CHARS.items():
        chars = [char for char in sample.decode(encoding, errors="replace") if char > "\x7f"]
        if encoding != failed and "\ufffd" not in chars[1:-1]:
            fraction = sum(char in frequent for char in chars) / len(chars) if chars else 0.0
            scores[encoding] = min(1.0, fraction / usual_fraction)
    best = max(scores, key=lambda encoding: scores[encoding], default=None)
    return best if best and scores[best] > 0.3 else None


def _guess_utf_16(head: bytes) -> str | None:
    """Return the UTF-16 encoding in which a binary file has as many spaces as text has."""
    if head.startswith(tuple(SIGNATURES)):
        return None
    even = head[: len(head) // 2 * 2]
    spaces = {
        encoding: even.decode(encoding, errors="ignore").count(" ")
        for encoding in ("utf-16-le", "utf-16-be")
    }
    best = max(spaces, key=lambda encoding: spaces[encoding])
    return best if spaces[best] > len(even) / 60 else None
