"""Bytes to characters, exactly, and what to say of bytes that are none.

In: blocks of bytes, and the encoding if one was given. Out: pieces of text; joined they are the whole. Line ends stay as they are. UTF-8, with or
without its mark, and UTF-16 with its mark give the same characters.
Refuses: what is not plain text, by its kind, and what is not in the encoding, with the place.
"""

import codecs
from collections.abc import Iterable, Iterator

from nanogpt.errors import UserError

HEAD = 8192  # bytes that are looked at to see what a file is

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

PACKED = (b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # of them, those that are unpacked where the name says so

FREQUENT = {  # encodings that text may turn out to be in: frequent letters beyond ASCII, and the share of such letters they usually make up
    "cp1252": ("éèàâêîôûçäöüßñáíóúåøæãõ“”‘’–—…«»¿¡°", 0.9), "cp1250": ("ěščřžýáíéúůďťňąęłńóśźż„”–", 0.9), "cp1254": ("ışğçöüİâ’", 0.9),
    "cp1251": ("оеаинтсрвлкмдпуя", 0.75), "koi8-r": ("оеаинтсрвлкмдпуя", 0.75), "cp866": ("оеаинтсрвлкмдпуя", 0.75),
    "cp1253": ("αοιετσνρκπμλη", 0.7), "cp1255": ("יוהלאתרבמנש", 0.75), "cp1256": ("اليمنرتبةعدسف", 0.7), "cp874": ("านรกเงอมย่ล", 0.5),
    "shift_jis": ("のにはをたがでてとしれさいあるっくかもなこら、。", 0.4), "euc_jp": ("のにはをたがでてとしれさいあるっくかもなこら、。", 0.4),
    "euc_kr": ("이다는을가의에고한로하은도지나서기를", 0.3), "gb18030": ("的一是不了在人有我他这中大来上国们到说和，。", 0.2),
    "big5": ("的一是不了在人有我他這中大來上國們到說和，。", 0.2),
}  # fmt: skip


def decoded(blocks: Iterable[bytes], where: str, encoding: str | None = None) -> Iterator[str]:
    """The text of some bytes, a piece for each block.

    Errors: `UserError`, which names the text by `where` it lies, for what is not text, with the byte, its offset, its line and the encoding it may be in.
    """
    blocks = iter(blocks)
    data = next(blocks, b"")
    encoding, skip = find_encoding(data, where, encoding)
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, lines, plain, data = skip, 1, True, data[skip:] or next(blocks, b"")
    while True:
        waiting = len(decoder.getstate()[0])  # bytes of a character that the last block cut in two
        try:
            text = decoder.decode(data, final=not data)
            text.encode()  # some codecs let halves of surrogate pairs pass
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding, errors="ignore").count("\n")
            cut_off = error.reason == "unexpected end of data" and not (plain and error.object[: error.start].isascii())
            raise undecodable(error, where, encoding, offset - waiting + error.start, lines + before, cut_off) from error
        except UnicodeError as error:
            raise UserError(f"{where} is not {encoding.upper()}: {error}.", "Try --encoding utf-16-le or utf-16-be.") from error
        if text:
            yield text
        if not data:
            return
        offset, lines, plain, data = offset + len(data), lines + text.count("\n"), plain and text.isascii(), next(blocks, b"")


def find_encoding(head: bytes, where: str, encoding: str | None = None) -> tuple[str, int]:
    """The encoding to read with, and the length of the mark to skip, for a text that begins with `head`. Errors: `UserError` for what is no text."""
    asked = None if encoding is None else codec(encoding)
    for mark, marked in MARKS.items():
        if head.startswith(mark) and asked in (None, marked):
            return marked, len(mark)
    if kind := not_text(head[:HEAD], asked):
        raise UserError(f"{where} is {kind}, not plain text.", _cure(head[:HEAD]))
    return asked or "utf-8", 0


def undecodable(error: UnicodeDecodeError, where: str, encoding: str, at: int, line: int, cut_off: bool = False) -> UserError:
    """What to say of a byte that is not in the encoding, with its offset in the file, its line, and whether the file seems to end within a character."""
    likely = _likely_encoding(error.object[max(0, error.start - 2000) : error.start + 2000], encoding)
    fix = "Name its encoding with --encoding, or repair the file."
    if cut_off:
        fix = "The file seems to be cut off in the middle of a character: repair its end."
    elif likely:
        there = error.object[max(0, error.start - 20) : error.start + 20].decode(likely, errors="ignore")
        fix = f"It may be {likely}; the place would then read {there!r}. If that is right, add --encoding {likely}."
    return UserError(f"{where} is not {encoding.upper()}: byte 0x{error.object[error.start]:02x} at offset {at:,}, line {line:,} ({error.reason}).", fix)


def not_text(head: bytes, encoding: str | None = None) -> str | None:
    """What a file is that begins with `head`, if it is not plain text (in the encoding that was given); None if it may be."""
    for signature, kind in SIGNATURES.items():
        if head.startswith(signature):
            return kind
    zeros = encoding is None and b"\0" in head and not head.startswith(tuple(MARKS))
    if zeros and head[257:262] == b"ustar":
        return "a tar archive"
    return "a binary file (it has zero bytes)" if zeros else None


def codec(encoding: str) -> str:
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
    if any(head.startswith(magic) for magic in PACKED):
        return "Name it .gz, .xz or .zst, as what it is, and it is unpacked while it is read; or unpack it first."
    if head[257:262] == b"ustar" or head.startswith((b"PK", b"7z", b"Rar!", b"BZh")):
        return "Unpack it first, and train on the folder; a DOCX, ODT or EPUB is to be saved as plain text (.txt, UTF-8) by its own program."
    if head.startswith(b"PAR1"):
        return "Name it .parquet, and its column is read (--field)."
    return "Convert it to plain text first (open it in its own program and save as .txt, UTF-8), then train on that file."
