"""Text comes in whole and unchanged, wherever it lies, and what is not text says what it is and how to mend it."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pyarrow
import pytest
import zstandard
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import parquet

from nanogpt.corpus import Source, expand, formats, sources
from nanogpt.corpus.encoding import MARKS, SIGNATURES
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir

FRENCH = "Longtemps, je me suis couché de bonne heure. Parfois, à peine ma bougie éteinte, mes yeux se fermaient. "
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему. "
SAMPLES = {
    "cp1252": FRENCH,
    "cp1251": RUSSIAN,
    "shift_jis": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。",
    "gb18030": "人类的历史是一部不断发展的历史。我们在学习语言模型的时候，需要大量的文本数据，然后把它们变成数字。",
    "euc_kr": "나는 고양이다. 이름은 아직 없다. 어디서 태어났는지 도무지 짐작이 가지 않는다. ",
}
LINES = "a\nb\r\nc\rd\x0be\x0cf\x1cg\x85h\u2028i\u2029j\n\n"


def read(content: bytes, encoding: str | None = None) -> str:
    return "".join(Source("text", lambda: io.BytesIO(content), encoding).chunks())


def names(*sources: object) -> list[str]:
    return [document.name for document in expand(map(str, sources))]


def refusal(content: bytes, encoding: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read(content, encoding)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d", ".hidden/e.txt", "sub/.f.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return tmp_path / "texts"


@contextmanager
def in_chunks_of(size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", size)
        yield


@pytest.fixture
def small_chunks():
    with in_chunks_of(256):
        yield


@pytest.fixture
def stdin(monkeypatch):
    def give(text, encoding):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode(encoding))))
        return encoding

    return give


@pytest.fixture
def offline(monkeypatch):
    def urlopen(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)


def test_a_file_is_one_document(folder):
    (document,) = expand([str(folder / "b.txt")])
    assert (document.name, document.path, "".join(document.chunks())) == ("b.txt", folder / "b.txt", "b.txt")


def test_a_folder_gives_every_visible_file_below_it_in_a_fixed_order(folder):
    assert names(folder) == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d"]


def test_a_hidden_folder_may_be_named(folder):
    assert names(folder / ".hidden") == ["e.txt"]


def test_what_is_not_text_is_left_out_of_a_folder_with_one_notice(folder):
    for name, content in {"photo.jpg": b"\xff\xd8\xff\xe0", "data.bin": b"a\0b", "x.zip": b"PK\x03\x04", "y.7z": b"7z\xbc\xaf"}.items():
        (folder / name).write_bytes(content)
    with pytest.warns(Notice) as notices:
        assert names(folder) == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d"]
    assert [str(notice.message) for notice in notices] == [f"4 of 8 files in {folder} are not text and are left out: data.bin, photo.jpg, x.zip, …"]


def test_utf_16_with_its_mark_is_text_in_a_folder_too(folder):
    (folder / "b.txt").write_bytes(FRENCH.encode("utf-16"))
    assert [document for document in expand([str(folder)]) if "".join(document.chunks()) == FRENCH]


def test_an_encoding_that_is_given_holds_for_folders_too(folder):
    (folder / "b.txt").write_bytes(FRENCH.encode("utf-16-le"))
    assert len(expand([str(folder)], "utf-16-le")) == 4


def test_a_link_that_leads_nowhere_is_left_out_of_a_folder(folder):
    (folder / "broken.txt").symlink_to("nowhere")
    with pytest.warns(Notice, match=r"broken\.txt"):
        assert "broken.txt" not in names(folder)


def test_a_zero_byte_far_behind_the_head_is_a_character_like_others(folder):
    (folder / "late.txt").write_bytes(b"a" * 10_000 + b"\0")
    assert "a" * 10_000 + "\0" in ["".join(document.chunks()) for document in expand([str(folder)])]


@pytest.mark.parametrize("content", [{}, {".hidden": b"text"}, {"picture": b"\x89PNG"}])
@pytest.mark.filterwarnings("ignore::nanogpt.errors.Notice")
def test_a_folder_without_text_is_refused(tmp_path, content):
    for name, head in content.items():
        (tmp_path / name).write_bytes(head)
    with pytest.raises(UserError, match="no text file in the folder /"):
        expand([str(tmp_path)])


def test_a_glob_gives_the_files_that_match(folder):
    assert names(folder / "*") == ["a.md", "b.txt"]
    assert names(folder / "**" / "*.txt") == ["b.txt", "c.txt"]
    with pytest.raises(UserError, match=r"No file matches the pattern .*/\*\.tex"):
        expand([str(folder / "*.tex")])


def test_a_file_with_a_glob_for_a_name_is_that_file(folder):
    (folder / "[ab].txt").write_text("itself", encoding="utf-8")
    assert names(folder / "[ab].txt") == ["[ab].txt"]


def test_each_file_comes_once_however_often_it_is_named(folder, monkeypatch):
    (folder.parent / "link.txt").symlink_to(folder / "b.txt")
    monkeypatch.chdir(folder)
    assert names("b.txt", folder / "b.txt", "../link.txt", "*.txt", "sub/../b.txt", folder) == ["b.txt", "a.md", "sub/c.txt", "sub/deep/d"]


def test_a_path_may_begin_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/b.txt") == ["b.txt"]


def test_standard_input_can_be_read_again(stdin):
    (document,) = expand(["-"], stdin(FRENCH * 1000, "cp1252"))
    assert ["".join(document.chunks()) for _ in range(3)] == [FRENCH * 1000] * 3


def test_readings_of_standard_input_do_not_disturb_each_other(stdin, small_chunks):
    (document,) = expand(["-"], stdin(FRENCH * 100, "utf-8"))
    first, second = document.chunks(), document.chunks()
    begun = [next(first), next(second), next(first)]
    same = [begun[0] + begun[2] + "".join(first) == FRENCH * 100, begun[1] + "".join(second) == FRENCH * 100]
    assert all(same)
    place = next(piece.place for piece in document.pieces() if piece.place)
    assert "".join(piece.text for piece in document.pieces(place)) == (FRENCH * 100).encode()[place:].decode()


@pytest.mark.parametrize("text", ["short", "x" * (1 << 22) + "tail"], ids=len)
def test_standard_input_is_read_to_its_end(stdin, text):
    (document,) = expand(["-"], stdin(text, "utf-8"))
    assert "".join(document.chunks()) == text


@pytest.mark.parametrize(("name", "documents", "size"), [("python", 100, 1_000_000), ("python-docs", 50, 100_000)])
def test_built_in_texts_are_on_every_machine(name, documents, size):
    found = expand([name])
    assert len({document.name for document in found}) == len(found) > documents
    assert sum(len(chunk) for document in found for chunk in document.chunks()) > size


def test_a_built_in_text_comes_once_however_often_it_is_named():
    assert len(expand(["python-docs", "python-docs"])) == len(expand(["python-docs"]))


def test_a_path_that_exists_comes_before_a_built_in_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python").write_text("a snake", encoding="utf-8")
    assert "".join(expand(["python"])[0].chunks()) == "a snake"


def test_shakespeare_offline_says_where_the_file_can_be_put(offline):
    with pytest.raises(UserError) as caught:
        expand(["shakespeare"])
    assert sources.SHAKESPEARE_URL in str(caught.value)
    assert str(cache_dir() / "shakespeare.txt") in str(caught.value)


def test_shakespeare_is_taken_from_the_cache_and_checked(offline, monkeypatch):
    path = cache_dir() / "shakespeare.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"To be, or not to be")
    with pytest.raises(UserError, match=r"not Tiny Shakespeare: its SHA-256 is .*\n.*Remove"):
        expand(["shakespeare"])
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(b"To be, or not to be").hexdigest())
    assert names("shakespeare") == ["shakespeare"]


def test_a_wrong_download_is_not_kept(monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>Please log in</html>"))
    with pytest.raises(UserError, match="SHA-256"):
        expand(["shakespeare"])
    assert not (cache_dir() / "shakespeare.txt").exists()


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
def test_utf_8_and_utf_16_give_the_same_characters_and_keep_line_ends(mark):
    encoding = MARKS.get(mark, "utf-8")
    assert read(mark + (LINES + "Grüße 日本 👩‍👩‍👧").encode(encoding)) == LINES + "Grüße 日本 👩‍👩‍👧"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-16", "utf-8-sig", "utf-32", "cp1252", "latin-1"])
def test_an_encoding_that_is_given_is_used_and_its_mark_is_no_text(encoding):
    assert read(FRENCH.encode(encoding), encoding) == FRENCH
    if mark := {name: mark for mark, name in MARKS.items()}.get(encoding):
        assert read(mark + FRENCH.encode(encoding), encoding) == FRENCH


@pytest.mark.parametrize("encoding", ["UTF-8", "utf8", "UTF-16LE"])
def test_a_mark_is_no_text_however_its_encoding_is_spelled(encoding):
    mark = codecs.BOM_UTF8 if "8" in encoding else codecs.BOM_UTF16_LE
    assert read(mark + "abc".encode(encoding), encoding) == "abc"


@pytest.mark.parametrize("encoding", ["utf-9", "", "french"])
def test_an_unknown_encoding_is_refused(encoding):
    assert f"Python knows no encoding {encoding!r}.\nTry --encoding utf-8" in refusal(b"abc", encoding)


@pytest.mark.parametrize("encoding", ["base64", "rot13", "undefined", "a\0b"])
def test_what_is_no_encoding_of_text_is_refused(encoding):
    assert repr(encoding) in refusal(b"abc", encoding)


@given(st.text(), st.integers(3, 9), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "gb18030", "utf-7"]))
def test_chunk_borders_change_nothing(text, size, encoding):
    with in_chunks_of(size):
        assert read(text.encode(encoding), encoding) == text.removeprefix("\ufeff" if encoding == "utf-8" else "")


@given(st.text(), st.integers(4, 9), st.sampled_from(sorted(MARKS)))
def test_chunk_borders_change_nothing_behind_a_mark(text, size, mark):
    assume(not (mark + text.encode(MARKS[mark])).startswith(b"\xff\xfe\0\0") or MARKS[mark] == "utf-32-le")  # UTF-16 that begins with a zero looks like UTF-32
    with in_chunks_of(size):
        assert read(mark + text.encode(MARKS[mark])) == text


def python_says(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return f"text is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}, line {line} ({error.reason})."


def nanogpt_says(content: bytes) -> str:
    try:
        return read(content)
    except UserError as error:
        return str(error).partition("\n")[0]


@given(st.binary(max_size=40), st.integers(1, 9))
def test_utf_8_is_read_as_python_reads_it_and_refused_where_python_refuses_it(content, size):
    content = b"x" * size + content
    with in_chunks_of(size):
        assert nanogpt_says(content) == python_says(content)


@pytest.mark.parametrize("before", [0, 1, 200, 256, 2000])
@pytest.mark.parametrize("encoding", ["cp1252", "shift_jis", "euc_kr"])
def test_an_undecodable_byte_is_named_with_its_line_and_the_likely_encoding(small_chunks, encoding, before):
    content = b"\n" * before + (SAMPLES[encoding] * 4).encode(encoding)
    at = next(i for i, byte in enumerate(content) if byte > 0x7F)
    said = refusal(content)
    assert f"text is not UTF-8: byte 0x{content[at]:02x} at offset {at:,}, line {before + 1:,} (" in said
    assert said.endswith(f"add --encoding {encoding}.")
    assert read(content, encoding) == "\n" * before + SAMPLES[encoding] * 4


@pytest.mark.parametrize(("text", "encoding"), [(RUSSIAN, "cp1251"), (SAMPLES["gb18030"], "gb18030"), ("word—“quoted", "cp1252"), ("blåøjet", "cp1252")])
def test_the_likely_encoding_is_found_for_more_languages(text, encoding):
    assert refusal(text.encode(encoding)).endswith(f"add --encoding {encoding}.")


def test_utf_8_that_ends_within_a_character_is_refused_there(small_chunks):
    assert "byte 0xe2 at offset 1,001, line 2 (unexpected end of data)" in refusal(b"x" * 1000 + "\n€".encode()[:-1])


def test_utf_8_that_ends_within_a_character_is_not_taken_for_another_encoding():
    assert "--encoding" not in refusal((FRENCH + "€").encode()[:-1])


def test_the_encoding_that_failed_is_not_advised():
    assert "add --encoding cp1252" not in refusal(b"abc \x81", "cp1252")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_without_its_mark_is_recognised(encoding):
    assert refusal(FRENCH.encode(encoding)).endswith(f"If it is UTF-16 without its mark, add --encoding {encoding}.")
    assert read(FRENCH.encode(encoding), encoding) == FRENCH


def test_utf_16_without_its_mark_is_recognised_in_russian():
    assert "--encoding utf-16-le" in refusal(RUSSIAN.encode("utf-16-le"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_an_encoding_that_needs_a_mark_says_so_where_there_is_none(encoding):
    refusal(FRENCH.encode(f"{encoding}-le"), encoding)


def test_utf_32_is_not_taken_for_utf_16():
    assert read(FRENCH.encode("utf-32")) == FRENCH


def test_lines_are_counted_in_characters():
    assert "line 1 (" in refusal(codecs.BOM_UTF16_LE + "\u010a".encode("utf-16-le") + b"\0\xd8a\0")


@pytest.mark.parametrize(("head", "kind"), SIGNATURES.items())
def test_what_is_not_plain_text_is_called_by_its_name(head, kind):
    said = refusal(head + b"\0\1\2" * 100)
    assert said.startswith(f"text is {kind}, not plain text.")
    assert "--encoding" not in said


def test_zero_bytes_are_no_text_unless_an_encoding_is_given():
    assert "text is a binary file (it has zero bytes), not plain text." in refusal(b"a\0b\1\2\3\4\5")
    assert read(b"a\0b", "utf-8") == "a\0b"


def test_an_empty_file_is_an_empty_text():
    assert read(b"") == read(codecs.BOM_UTF8) == ""


def test_a_path_that_leads_nowhere_is_answered_with_its_neighbours(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        expand(["b.tx"])
    assert str(caught.value) == (f"There is no file or folder {folder / 'b.tx'}.\nSimilar names: b.txt. Built-in texts: python, python-docs, shakespeare.")
    with pytest.raises(UserError, match=r"Similar names: shakespeare\."):
        expand(["shakespear"])
    with pytest.raises(UserError, match=f"In {folder / 'sub'} nothing has a similar name"):
        expand(["sub/zzzzzzzz/zzzz"])


@pytest.mark.parametrize("source", ["This is the text itself, not its name. " * 10, "~nobody-of-this-name/book.txt"])
def test_what_cannot_be_a_path_is_refused(source):
    with pytest.raises(UserError, match="no file or folder"):
        expand([source])


def test_an_empty_word_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError):
        expand([""])


RECORDS = ["one\nline", "", 'zwei, "drei"', "日本\r\n", "x" * 5000]


def packed(path: Path, content: bytes) -> Path:
    """A file with this content, packed as its name says."""
    pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:])}
    path.write_bytes(pack.get(path.suffix, bytes)(content))
    return path


def table(kind: str, records: list[str], field: str = "text") -> bytes:
    """The records as a file of this kind, beside a column of numbers."""
    if kind == "jsonl":
        return "".join(json.dumps({"id": i, field: record}, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()
    file = io.StringIO(newline="") if kind == "csv" else io.BytesIO()
    if kind == "csv":
        csv.writer(file).writerows([["id", field], *enumerate(records)])
        return file.getvalue().encode()
    parquet.write_table(pyarrow.table({"id": range(len(records)), field: records}), file, row_group_size=2)
    return file.getvalue()


def of(path: Path, field: str | None = None) -> list[str]:
    """The documents in a file, or everything in a folder."""
    return ["".join(document) for source in expand([str(path)], field=field) for document in source.documents()]


def complaint(path: Path, field: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        of(path, field)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("packing", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_every_format_gives_its_documents(tmp_path, kind, packing):
    path = tmp_path / f"a.{kind}{packing}"
    if kind == "txt":
        assert of(packed(path, (FRENCH * 100).encode("utf-16"))) == [FRENCH * 100]
        return
    assert of(packed(path, table(kind, RECORDS))) == [record for record in RECORDS if record]
    assert of(packed(path, table(kind, RECORDS, "body")), "body") == [record for record in RECORDS if record]
    there = "'body'" if kind == "jsonl" else "'id', 'body'"
    said = complaint(path)
    assert "'text'" in said
    assert there in said
    assert said.endswith("with --field.")


def test_a_folder_may_mix_them(tmp_path):
    for name in ("b.jsonl.gz", "c.csv", "d.parquet"):
        packed(tmp_path / name, table(name.split(".")[1], [name]))
    packed(tmp_path / "a.md.xz", b"a.md.xz")
    assert of(tmp_path) == ["a.md.xz", "b.jsonl.gz", "c.csv", "d.parquet"]


def test_what_nanogpt_wrote_and_tables_without_the_field_are_left_out_of_a_folder(folder):
    for name in ("runs/x/config.toml", "runs/x/metrics.jsonl", "data/index.json", "data/tokenizer.json", "part/unit-00003.json", "web/index.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n", encoding="utf-8")
    for kind in ("jsonl", "csv", "parquet"):
        (folder / f"other.{kind}").write_bytes(table(kind, RECORDS, "body"))
        (folder / f"table.{kind}").write_bytes(table(kind, RECORDS))
    with pytest.warns(Notice) as notices:
        assert names(folder) == ["a.md", "b.txt", "table.csv", "table.jsonl", "table.parquet", "sub/c.txt", "sub/deep/d", "web/index.json"]
    said = [str(notice.message) for notice in notices if issubclass(notice.category, Notice)]
    assert [each.split(" and are left out: ")[1] for each in said] == ["other.csv, other.jsonl, other.parquet", "data, part, runs/x"]
    assert said[0].startswith("3 of 11 files")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_without_a_field_that_was_asked_for_is_not_left_out(folder, kind):
    (folder / f"table.{kind}").write_bytes(table(kind, RECORDS))
    with pytest.raises(UserError, match="'body'"):
        [document for source in expand([str(folder)], field="body") for document in source.chunks()]


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_an_archive_that_is_cut_short_is_refused_also_in_a_folder(tmp_path, packing):
    path = packed(tmp_path / f"a.txt{packing}", "".join(f"{hash(str(i))} " for i in range(20_000)).encode())
    whole = path.read_bytes()
    for size in (len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert "is cut short" in complaint(path)
    with pytest.raises(UserError, match="cut short"):
        of(tmp_path)
    path.write_bytes(b"not an archive" * 10)
    assert "damaged" in complaint(path)


def test_a_table_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(table("parquet", RECORDS)[:-20])
    assert "cannot be read as a Parquet table" in complaint(path)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\nfine\n"not closed\n')
    assert "line 3" in complaint(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "b"', "line 3 is no JSON"),
        (b"[" * 200_000, "line 3 is no JSON"),
        (b'["b"]', "line 3: this is no JSON object but a list"),
        (b'{"body": 1, "id": 2}', "line 3: the record has no field 'text'. Its fields: 'body', 'id'."),
        (b'{"text": 7}', "line 3: 'text' is no text but 7"),
        (b'{"text": "\\ud800"}', "line 3: 'text' has half of a surrogate pair"),
        (b'{"text": "caf\xe9 au lait"}', "byte 0xe9 at offset 28, line 3"),
    ],
)
def test_a_wrong_line_of_json_is_named(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    assert said in complaint(tmp_path / "a.jsonl")


def test_an_unknown_encoding_of_a_table_is_refused(tmp_path):
    for kind in ("jsonl", "csv"):
        (tmp_path / f"a.{kind}").write_bytes(table(kind, RECORDS))
        with pytest.raises(UserError, match="no encoding 'utf-9'"):
            list(expand([str(tmp_path / f"a.{kind}")], "utf-9")[0].chunks())


def test_a_row_without_its_column_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n\n2\n")
    assert "line 4: the row has 1 of 2 columns and no 'text'" in complaint(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(table("parquet", ["a", None]))
    assert "row 2: 'text' is no text but None" in complaint(tmp_path / "a.parquet")


@pytest.mark.parametrize(("name", "module", "extra"), [("a.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, module, extra):
    (tmp_path / name).write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    assert f'pip install "nanogpt[{extra}]"' in complaint(tmp_path / name)


def test_an_archive_by_another_name_is_told_from_text(tmp_path):
    packed(tmp_path / "a.gz", b"text").rename(tmp_path / "a.txt")
    assert "Name it .gz" in complaint(tmp_path / "a.txt")
    packed(tmp_path / "b.tar.gz", b"name" + b"\0" * 253 + b"ustar\0")
    assert "a tar archive" in complaint(tmp_path / "b.tar.gz")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_reading_may_begin_and_end_at_every_place(tmp_path, small_chunks, name):
    records = [f"Größe {i}\r\nund {'mehr ' * (i % 90)}\nEnde" for i in range(200)]
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + ("".join(records).encode() if name == "a.txt" else table("jsonl", records)))
    (source,) = expand([str(tmp_path / name)])
    whole = list(source.pieces())
    places = [piece.place for piece in whole if piece.place]
    assert len(places) > 40
    for first, behind in [(places[0], places[1]), (places[3], places[30]), (places[-1], None), (0, places[7])]:
        part = list(source.pieces(first, behind))
        begin = next(i for i, piece in enumerate(whole) if piece.place == first) if first else 0
        end = next(i for i, piece in enumerate(whole) if piece.place == behind) if behind else len(whole)
        assert "".join(piece.text for piece in part) == "".join(piece.text for piece in whole[begin:end])
        assert sum(piece.ends for piece in part) == sum(piece.ends for piece in whole[begin:end])
