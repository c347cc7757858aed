"""Sources resolve to complete texts in every format, and errors name the file and the fix."""

import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from nanogpt.data import formats, sources
from nanogpt.data.formats import Chunk
from nanogpt.data.sources import resolve_sources
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir

FRENCH = (
    "Longtemps, je me suis couché de bonne heure. "
    "Parfois, à peine ma bougie éteinte, mes yeux se fermaient. "
)


def names(*sources: object) -> list[str]:
    return [document.name for document in resolve_sources(map(str, sources))]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.txt", "sub/deep/d", ".hidden/e.txt", "sub/.f.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    return tmp_path / "texts"


@pytest.fixture
def small_reads(monkeypatch):
    monkeypatch.setattr(formats, "READ_BYTES", 256)


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


def test_file_is_one_document(folder):
    (document,) = resolve_sources([str(folder / "b.txt")])
    assert (document.name, document.path, "".join(document.iter_text())) == (
        "b.txt",
        folder / "b.txt",
        "b.txt",
    )


def test_folder_yields_visible_files_in_fixed_order(folder):
    assert names(folder) == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d"]


def test_hidden_folder_can_be_named(folder):
    assert names(folder / ".hidden") == ["e.txt"]


def test_folder_skips_binary_files_with_one_notice(folder):
    for name, content in {
        "photo.jpg": b"\xff\xd8\xff\xe0",
        "data.bin": b"a\0b",
        "x.zip": b"PK\x03\x04",
        "y.7z": b"7z\xbc\xaf",
    }.items():
        (folder / name).write_bytes(content)
    with pytest.warns(Notice) as notices:
        assert names(folder) == ["a.md", "b.txt", "sub/c.txt", "sub/deep/d"]
    assert [str(notice.message) for notice in notices] == [
        f"4 of 8 files in {folder} are not text and are skipped: data.bin, photo.jpg, x.zip, …"
    ]


def test_folder_reads_utf_16_with_bom(folder):
    (folder / "b.txt").write_bytes(FRENCH.encode("utf-16"))
    assert [
        document
        for document in resolve_sources([str(folder)])
        if "".join(document.iter_text()) == FRENCH
    ]


def test_folder_uses_the_given_encoding(folder):
    (folder / "b.txt").write_bytes(FRENCH.encode("utf-16-le"))
    assert len(resolve_sources([str(folder)], "utf-16-le")) == 4


def test_folder_skips_broken_links(folder):
    (folder / "broken.txt").symlink_to("nowhere")
    with pytest.warns(Notice, match=r"broken\.txt"):
        assert "broken.txt" not in names(folder)


def test_zero_byte_after_the_sniffed_bytes_is_text(folder):
    (folder / "late.txt").write_bytes(b"a" * 10_000 + b"\0")
    assert "a" * 10_000 + "\0" in [
        "".join(document.iter_text()) for document in resolve_sources([str(folder)])
    ]


@pytest.mark.parametrize("content", [{}, {".hidden": b"text"}, {"picture": b"\x89PNG"}])
@pytest.mark.filterwarnings("ignore::nanogpt.errors.Notice")
def test_folder_without_text_is_an_error(tmp_path, content):
    for name, head in content.items():
        (tmp_path / name).write_bytes(head)
    with pytest.raises(UserError, match="no text file in the folder /"):
        resolve_sources([str(tmp_path)])


def test_glob_yields_matching_files(folder):
    assert names(folder / "*") == ["a.md", "b.txt"]
    assert names(folder / "**" / "*.txt") == ["b.txt", "c.txt"]
    with pytest.raises(UserError, match=r"No file matches the pattern .*/\*\.tex"):
        resolve_sources([str(folder / "*.tex")])


def test_file_named_like_a_glob_is_found(folder):
    (folder / "[ab].txt").write_text("itself", encoding="utf-8")
    assert names(folder / "[ab].txt") == ["[ab].txt"]


def test_duplicate_names_yield_a_file_once(folder, monkeypatch):
    (folder.parent / "link.txt").symlink_to(folder / "b.txt")
    monkeypatch.chdir(folder)
    assert names("b.txt", folder / "b.txt", "../link.txt", "*.txt", "sub/../b.txt", folder) == [
        "b.txt",
        "a.md",
        "sub/c.txt",
        "sub/deep/d",
    ]


def test_path_expands_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names("~/b.txt") == ["b.txt"]


def test_stdin_can_be_read_repeatedly(stdin):
    (document,) = resolve_sources(["-"], stdin(FRENCH * 1000, "cp1252"))
    assert ["".join(document.iter_text()) for _ in range(3)] == [FRENCH * 1000] * 3


def test_stdin_readers_are_independent(stdin, small_reads):
    (document,) = resolve_sources(["-"], stdin(FRENCH * 100, "utf-8"))
    first, second = document.iter_text(), document.iter_text()
    start_of_first, start_of_second = next(first), next(second)
    assert start_of_first + next(first) + "".join(first) == FRENCH * 100
    assert start_of_second + "".join(second) == FRENCH * 100
    offset = next(chunk.resume_offset for chunk in document.iter_chunks() if chunk.resume_offset)
    rest = "".join(chunk.text for chunk in document.iter_chunks(offset))
    assert rest == (FRENCH * 100).encode()[offset:].decode()


@pytest.mark.parametrize("text", ["short", "x" * (1 << 22) + "tail"], ids=len)
def test_stdin_is_read_to_the_end(stdin, text):
    (document,) = resolve_sources(["-"], stdin(text, "utf-8"))
    assert "".join(document.iter_text()) == text


@pytest.mark.parametrize(
    ("name", "documents", "size"), [("python", 100, 1_000_000), ("python-docs", 50, 100_000)]
)
def test_built_in_texts_need_no_download(name, documents, size):
    found = resolve_sources([name])
    assert len({document.name for document in found}) == len(found) > documents
    assert sum(len(chunk) for document in found for chunk in document.iter_text()) > size


def test_duplicate_built_in_texts_come_once():
    assert len(resolve_sources(["python-docs", "python-docs"])) == len(
        resolve_sources(["python-docs"])
    )


def test_existing_path_precedes_built_in_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("python").write_text("a snake", encoding="utf-8")
    assert "".join(resolve_sources(["python"])[0].iter_text()) == "a snake"


def test_shakespeare_offline_error_names_the_cache_path(offline):
    with pytest.raises(UserError) as caught:
        resolve_sources(["shakespeare"])
    assert sources.SHAKESPEARE_URL in str(caught.value)
    assert str(cache_dir() / "shakespeare.txt") in str(caught.value)


def test_shakespeare_in_the_cache_is_verified(offline, monkeypatch):
    path = cache_dir() / "shakespeare.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"To be, or not to be")
    with pytest.raises(UserError, match=r"not Tiny Shakespeare: its SHA-256 is .*\n.*Remove"):
        resolve_sources(["shakespeare"])
    monkeypatch.setattr(
        sources, "SHAKESPEARE_SHA256", hashlib.sha256(b"To be, or not to be").hexdigest()
    )
    assert names("shakespeare") == ["shakespeare"]


def test_shakespeare_with_wrong_checksum_is_not_cached(monkeypatch):
    monkeypatch.setattr(
        urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>Please log in</html>")
    )
    with pytest.raises(UserError, match="SHA-256"):
        resolve_sources(["shakespeare"])
    assert not (cache_dir() / "shakespeare.txt").exists()


def test_missing_path_error_lists_similar_names(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError) as caught:
        resolve_sources(["b.tx"])
    assert str(caught.value) == (
        f"There is no file or folder {folder / 'b.tx'}.\n"
        "Similar names: b.txt. Built-in texts: python, python-docs, shakespeare."
    )
    with pytest.raises(UserError, match=r"Similar names: shakespeare\."):
        resolve_sources(["shakespear"])
    with pytest.raises(UserError, match=f"No similar name in {folder / 'sub'}"):
        resolve_sources(["sub/zzzzzzzz/zzzz"])


@pytest.mark.parametrize(
    "source", ["This is the text itself, not its name. " * 10, "~nobody-of-this-name/book.txt"]
)
def test_impossible_path_is_an_error(source):
    with pytest.raises(UserError, match="no file or folder"):
        resolve_sources([source])


def test_empty_name_is_an_error(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError):
        resolve_sources([""])


RECORDS = ["one\nline", "", 'zwei, "drei"', "日本\r\n", "x" * 5000]


def compressed(path: Path, content: bytes) -> Path:
    """Write a file with this content, compressed as its suffix says."""
    compress = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": lambda data: zstandard.compress(data[:7]) + zstandard.compress(data[7:]),
    }
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


def table(kind: str, records: list[str], field: str = "text") -> bytes:
    """Return the records as a file of this kind, next to a column of numbers."""
    if kind == "jsonl":
        return "".join(
            json.dumps({"id": i, field: record}, ensure_ascii=i % 2 == 0) + "\n"
            for i, record in enumerate(records)
        ).encode()
    file = io.StringIO(newline="") if kind == "csv" else io.BytesIO()
    if kind == "csv":
        csv.writer(file).writerows([["id", field], *enumerate(records)])
        return file.getvalue().encode()
    parquet.write_table(
        pyarrow.table({"id": range(len(records)), field: records}), file, row_group_size=2
    )
    return file.getvalue()


def read_documents(path: Path, field: str | None = None) -> list[str]:
    """Return the documents in a file or a folder."""
    return [
        "".join(document)
        for source in resolve_sources([str(path)], text_field=field)
        for document in source.iter_documents()
    ]


def error_message(path: Path, field: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_documents(path, field)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "txt"])
def test_every_format_yields_its_documents(tmp_path, kind, suffix):
    path = tmp_path / f"a.{kind}{suffix}"
    if kind == "txt":
        assert read_documents(compressed(path, (FRENCH * 100).encode("utf-16"))) == [FRENCH * 100]
        return
    assert read_documents(compressed(path, table(kind, RECORDS))) == [
        record for record in RECORDS if record
    ]
    assert read_documents(compressed(path, table(kind, RECORDS, "body")), "body") == [
        record for record in RECORDS if record
    ]
    fields = "'body'" if kind == "jsonl" else "'id', 'body'"
    message = error_message(path)
    assert "'text'" in message
    assert fields in message
    assert "Set text_field to the " in message


def test_folder_may_mix_formats(tmp_path):
    for name in ("b.jsonl.gz", "c.csv", "d.parquet"):
        compressed(tmp_path / name, table(name.split(".")[1], [name]))
    compressed(tmp_path / "a.md.xz", b"a.md.xz")
    assert read_documents(tmp_path) == ["a.md.xz", "b.jsonl.gz", "c.csv", "d.parquet"]


def test_folder_skips_runs_prepared_text_and_tables_without_field(folder):
    for name in (
        "runs/x/config.toml",
        "runs/x/metrics.jsonl",
        "data/index.json",
        "data/tokenizer.json",
        "part/unit-00003.json",
        "web/index.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n", encoding="utf-8")
    for kind in ("jsonl", "csv", "parquet"):
        (folder / f"other.{kind}").write_bytes(table(kind, RECORDS, "body"))
        (folder / f"table.{kind}").write_bytes(table(kind, RECORDS))
    with pytest.warns(Notice) as notices:
        assert names(folder) == [
            "a.md",
            "b.txt",
            "table.csv",
            "table.jsonl",
            "table.parquet",
            "sub/c.txt",
            "sub/deep/d",
            "web/index.json",
        ]
    messages = [str(notice.message) for notice in notices if issubclass(notice.category, Notice)]
    assert [message.split(" and are skipped: ")[1] for message in messages] == [
        "other.csv, other.jsonl, other.parquet",
        "data, part, runs/x",
    ]
    assert messages[0].startswith("3 of 11 files")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_table_without_the_set_text_field_is_an_error(folder, kind):
    (folder / f"table.{kind}").write_bytes(table(kind, RECORDS))
    with pytest.raises(UserError, match="'body'"):
        [
            document
            for source in resolve_sources([str(folder)], text_field="body")
            for document in source.iter_text()
        ]


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_truncated_archive_is_an_error_in_a_folder_too(tmp_path, suffix):
    path = compressed(
        tmp_path / f"a.txt{suffix}", "".join(f"{hash(str(i))} " for i in range(20_000)).encode()
    )
    whole = path.read_bytes()
    for size in (len(whole) - 3, len(whole) // 2):
        path.write_bytes(whole[:size])
        assert "is truncated" in error_message(path)
    with pytest.raises(UserError, match="is truncated"):
        read_documents(tmp_path)
    path.write_bytes(b"not an archive" * 10)
    assert "corrupt" in error_message(path)


def test_truncated_table_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(table("parquet", RECORDS)[:-20])
    assert "cannot be read as a Parquet table" in error_message(path)
    path = tmp_path / "a.csv"
    path.write_bytes(b'text\nfine\n"not closed\n')
    assert "line 3" in error_message(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "b"', "line 3 is not JSON"),
        (b"[" * 200_000, "line 3 is not JSON"),
        (b'["b"]', "line 3: not a JSON object but a list"),
        (
            b'{"body": 1, "id": 2}',
            "line 3: the record has no field 'text'. Its fields: 'body', 'id'.",
        ),
        (b'{"text": 7}', "line 3: 'text' is not a text but 7"),
        (b'{"text": "\\ud800"}', "line 3: 'text' has an unpaired surrogate"),
        (b'{"text": "caf\xe9 au lait"}', "byte 0xe9 at offset 28, line 3"),
    ],
)
def test_json_error_names_the_line(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    assert message in error_message(tmp_path / "a.jsonl")


def test_unknown_encoding_of_a_table_is_an_error(tmp_path):
    for kind in ("jsonl", "csv"):
        (tmp_path / f"a.{kind}").write_bytes(table(kind, RECORDS))
        with pytest.raises(UserError, match="no text encoding 'utf-9'"):
            list(resolve_sources([str(tmp_path / f"a.{kind}")], "utf-9")[0].iter_text())


def test_table_error_names_the_row(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"id,text\n1,a\n\n2\n")
    assert "line 4: the row has 1 of 2 columns and no 'text'" in error_message(tmp_path / "a.csv")
    (tmp_path / "a.parquet").write_bytes(table("parquet", ["a", None]))
    assert "row 2: 'text' is not a text but None" in error_message(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("a.zst", "zstandard", "zstd"), ("a.parquet", "pyarrow", "parquet")],
)
def test_missing_package_error_names_the_extra(tmp_path, monkeypatch, name, module, extra):
    (tmp_path / name).write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)
    assert f'pip install "nanogpt[{extra}]"' in error_message(tmp_path / name)


def test_archive_without_its_suffix_is_recognized(tmp_path):
    compressed(tmp_path / "a.gz", b"text").rename(tmp_path / "a.txt")
    assert "Rename it to end in .gz" in error_message(tmp_path / "a.txt")
    compressed(tmp_path / "b.tar.gz", b"name" + b"\0" * 253 + b"ustar\0")
    assert "a tar archive" in error_message(tmp_path / "b.tar.gz")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_read_may_start_and_stop_at_every_resume_offset(tmp_path, small_reads, name):
    records = [f"Größe {i}\r\nund {'mehr ' * (i % 90)}\nEnde" for i in range(200)]
    (tmp_path / name).write_bytes(
        codecs.BOM_UTF8
        + ("".join(records).encode() if name == "a.txt" else table("jsonl", records))
    )
    (source,) = resolve_sources([str(tmp_path / name)])
    chunks = list(source.iter_chunks())
    offsets = [chunk.resume_offset for chunk in chunks if chunk.resume_offset]
    assert len(offsets) > 40
    ranges = [
        (offsets[0], offsets[1]),
        (offsets[3], offsets[30]),
        (offsets[-1], None),
        (0, offsets[7]),
    ]
    for start, stop in ranges:
        first = index_of(chunks, start) if start else 0
        last = index_of(chunks, stop) if stop else len(chunks)
        part, expected = list(source.iter_chunks(start, stop)), chunks[first:last]
        assert "".join(chunk.text for chunk in part) == "".join(chunk.text for chunk in expected)
        num_ends = sum(chunk.ends_document for chunk in part)
        assert num_ends == sum(chunk.ends_document for chunk in expected)


def index_of(chunks: list[Chunk], resume_offset: int) -> int:
    return next(i for i, chunk in enumerate(chunks) if chunk.resume_offset == resume_offset)
