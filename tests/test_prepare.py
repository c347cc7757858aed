"""Preparation loses no text, splits it as described, and reuses tokens by the text's content."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt import sizes
from nanogpt.baselines import ngram_losses
from nanogpt.config import DataConfig
from nanogpt.data import formats, prepare
from nanogpt.data.prepared import PreparedData, open_prepared
from nanogpt.data.shards import write_unit
from nanogpt.errors import UserError
from nanogpt.files import cache_dir, remove_stale_temp_files
from nanogpt.tokenizer.tokenizer import train_tokenizer

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text(
    "a日é😀", max_size=200
)


def make(*sources: object, **config: object) -> PreparedData:
    return prepare.prepare([str(source) for source in sources], DataConfig(**config))


def write(folder: Path, *contents: str | bytes) -> list[Path]:
    paths = [folder / f"{i}.txt" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


def split_documents(tokens: np.ndarray, eot_id: int) -> list[list[int]]:
    """Return the documents in a sequence of tokens, without the tokens that end them."""
    documents, current = [], []
    for token in tokens.tolist():
        if token == eot_id:
            documents.append(current)
            current = []
        else:
            current.append(token)
    assert not current
    return documents


def expected_split(text: str, max_val_bytes: int) -> tuple[str, str]:
    """Hold out the characters that fit into the last `max_val_bytes` bytes."""
    val = text.encode()[len(text.encode()) - max_val_bytes :].decode(errors="ignore")
    return text[: len(text) - len(val)], val


@contextmanager
def empty_folder(tmp_path_factory, read_bytes: int = formats.READ_BYTES):
    """Yield an empty folder, with an empty cache, and read texts in blocks of `read_bytes`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "READ_BYTES", read_bytes)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("texts")


@pytest.mark.parametrize("n", [20, 29, 70, 99, 1000, 4821, 1_115_394])
def test_split_holds_out_the_last_tenth(tmp_path, n):
    text = ("abcdefghij" * (n // 10 + 1))[:n]
    prepared = make(*write(tmp_path, text))
    assert prepared.tokenizer.decode(prepared.train[:]) == text[: int(0.9 * n)]
    assert prepared.tokenizer.decode(prepared.val[:]) == text[int(0.9 * n) :]
    assert (
        prepared.metadata["split_description"]
        == f"the last {n - int(0.9 * n):,} of {n:,} bytes are held out"
    )


def test_split_holds_out_at_most_max_val_bytes(tmp_path):
    (path,) = write(tmp_path, "abcde" * 1000)
    assert [len(make(path, max_val_bytes=n).val) for n in (2, 100, 499, 500, 501, 10**9)] == [
        2,
        100,
        499,
        500,
        500,
        500,
    ]


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(2, 50), st.integers(4, 20) | st.just(formats.READ_BYTES))
def test_split_loses_no_text(tmp_path_factory, body, max_val_bytes, read_bytes):
    text = "ab" * 10 + body + "ab"
    size = len(text.encode())
    with empty_folder(tmp_path_factory, read_bytes) as folder:
        prepared = make(*write(folder, text), max_val_bytes=max_val_bytes)
    train, val = expected_split(text, min(size - size * 9 // 10, max_val_bytes))
    metadata, tokenizer = prepared.metadata, prepared.tokenizer
    assert (tokenizer.decode(prepared.train[:]), tokenizer.decode(prepared.val[:])) == (train, val)
    assert (metadata["train_bytes"], metadata["val_bytes"]) == (
        len(train.encode()),
        len(val.encode()),
    )
    assert (metadata["train_tokens"], metadata["val_tokens"]) == (len(train), len(val))
    assert metadata["num_distinct_tokens"] == len(set(train))
    unseen = {token for pair in metadata["unseen_token_ranges"] for token in range(*pair)}
    assert unseen == set(range(tokenizer.vocab_size)) - set(prepared.train[:].tolist())


def test_split_within_a_character_holds_out_at_most_max_val_bytes(tmp_path):
    assert make(*write(tmp_path, "日本" * 1000), max_val_bytes=100).metadata["val_bytes"] <= 100


@settings(max_examples=60, deadline=None)
@given(
    st.lists(texts.filter(bool), min_size=2, max_size=12),
    st.integers(4, 20) | st.just(formats.READ_BYTES),
)
def test_split_holds_out_documents_or_the_last_tenth(tmp_path_factory, bodies, read_bytes):
    bodies = [f"{'ab' * 9}{i}{body}" for i, body in enumerate(bodies)]
    with empty_folder(tmp_path_factory, read_bytes) as folder:
        prepared = make(*write(folder, *bodies))
    eot_id = prepared.tokenizer.eot_id
    tokens = [prepared.tokenizer.encode(body) for body in bodies]
    size = sum(len(body.encode()) for body in bodies)
    budget = size - size * 9 // 10
    if "documents" in prepared.metadata["split_description"]:
        train, val = (
            split_documents(split, eot_id) for split in (prepared.train[:], prepared.val[:])
        )
        assert sorted(train + val) == sorted(tokens)
        assert (train, val) == ([t for t in tokens if t in train], [t for t in tokens if t in val])
        assert budget / 2 <= prepared.metadata["val_bytes"] <= budget
    else:
        assert [*prepared.train[:], *prepared.val[:]] == [
            token for document in tokens for token in [*document, eot_id]
        ]
        assert (
            prepared.tokenizer.decode(prepared.train[:][prepared.train[:] != eot_id])
            == expected_split("".join(bodies), budget)[0]
        )


@pytest.fixture
def library(tmp_path):
    """Forty documents of 100 bytes, each with its own character."""
    (tmp_path / "library").mkdir()
    write(tmp_path / "library", *(chr(0x4E00 + i) * 32 + "abc\n" for i in range(40)))
    return tmp_path / "library"


def test_split_of_documents_depends_on_names_only(library, monkeypatch, tmp_path):
    first = make(library)
    assert (
        first.metadata["split_description"]
        == "4 of 40 documents, chosen by a hash of their names, are held out"
    )
    assert first.metadata["val_bytes"] == 400
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert make(library).val[:].tolist() == first.val[:].tolist()
    for path in library.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("abc", "xyz"), encoding="utf-8")
    again = make(library)
    assert again.tokenizer.decode(again.val[:]) == first.tokenizer.decode(first.val[:]).replace(
        "abc", "xyz"
    )


@pytest.mark.parametrize("sizes", [(100, 100, 100), (1, 1000, 1000), (5000, 20)])
def test_split_of_few_or_uneven_documents_is_the_last_tenth(tmp_path, sizes):
    prepared = make(*write(tmp_path, *(("ab" * size)[:size] for size in sizes)))
    assert prepared.metadata["split_description"].startswith("the last ")
    assert prepared.metadata["val_bytes"] == sum(sizes) - sum(sizes) * 9 // 10
    assert len(prepared.train) + len(prepared.val) == sum(sizes) + len(sizes)


def test_single_document_has_no_end_token(tmp_path):
    prepared = make(*write(tmp_path, "hello world " * 20))
    assert prepared.tokenizer.eot_id not in prepared.train[:]
    assert prepared.tokenizer.eot_id not in prepared.val[:]
    assert [
        prepared.tokenizer.eot_id in range(*pair)
        for pair in prepared.metadata["unseen_token_ranges"]
    ][-1]


def test_empty_documents_are_skipped(tmp_path):
    prepared = make(*write(tmp_path, "", "ab" * 50, "", "ab" * 50, "\ufeff"))
    assert [*prepared.train[:], *prepared.val[:]] == [0, 1] * 50 + [258] + [0, 1] * 50 + [258]
    assert prepared.metadata["num_documents"] == 2


def test_val_text_leaves_all_text_for_training(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "help is on the way: 日本")
    prepared = make(text, val_text=str(val))
    assert prepared.tokenizer.decode(prepared.train[:]) == "hello world " * 20
    assert prepared.tokenizer.decode(prepared.val[:]) == "help is on the way: 日本"
    assert prepared.metadata["val_bytes"] == len("help is on the way: 日本".encode())
    assert prepared.metadata["split_description"] == "a separate validation text is held out"


def test_val_text_within_the_text_is_not_trained_on(library):
    prepared = make(library, val_text=str(library / "7.txt"))
    assert prepared.metadata["num_documents"] == 39
    assert not set(prepared.train[:].tolist()) >= set(prepared.val[:].tolist())
    with pytest.raises(UserError, match="held out by val_text"):
        make(library / "7.txt", val_text=str(library))


def test_val_text_folder_keeps_its_documents(tmp_path, library):
    prepared = make(*write(tmp_path, "hello world " * 20), val_text=str(library))
    assert len(split_documents(prepared.val[:], prepared.tokenizer.eot_id)) == 40
    assert prepared.metadata["val_bytes"] == 4000
    assert prepared.tokenizer.eot_id not in prepared.train[:]


def test_cache_ignores_the_encoding(tmp_path):
    text = "Grüße aus 日本, 👩‍👩‍👧\r\n" * 20
    encodings = ["utf-8", "utf-8-sig", "utf-16"]
    copies = [make(path) for path in write(tmp_path, *map(text.encode, encodings))]
    copies.append(make(*write(tmp_path, text.encode("utf-16-be")), encoding="utf-16-be"))
    assert len({copy.metadata["cache_dir"] for copy in copies}) == 1
    assert {copy.tokenizer.decode([*copy.train[:], *copy.val[:]]) for copy in copies} == {text}


def test_cache_is_reused_unchanged(story):
    first = make(story)
    files = sorted(Path(first.metadata["cache_dir"]).iterdir())
    assert [file.name for file in files] == [
        ".key",
        "index.json",
        "tokenizer.json",
        "train-00000.bin",
        "unit-00000.json",
        "val-00000.bin",
        "verified.json",
    ]
    before = [file.stat().st_mtime_ns for file in files]
    copy = shutil.copy(story, story.with_name("copy.txt"))
    second = make(copy)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert second.metadata == first.metadata | {"sources": [str(copy)]}
    assert (
        open_prepared(Path(first.metadata["cache_dir"])).train[:].tolist()
        == first.train[:].tolist()
    )
    assert [path.name for path in (cache_dir() / "tokens").iterdir()] == [
        Path(first.metadata["cache_dir"]).name
    ]


def test_cache_key_depends_on_text_split_and_order(tmp_path):
    a, b, both = write(
        tmp_path,
        "hello world " * 20,
        "the quick brown fox " * 20,
        "hello world " * 20 + "the quick brown fox " * 20,
    )
    several = [
        make(a),
        make(b),
        make(both),
        make(a, max_val_bytes=10),
        make(a, val_text=str(b)),
        make(a, b),
        make(b, a),
        make(b, val_text=str(a)),
    ]
    a.write_text("hello worlD " * 20, encoding="utf-8")
    several.append(make(a))
    assert len({prepared.metadata["cache_dir"] for prepared in several}) == len(several)


def test_cache_key_depends_on_the_names_of_many_documents(library, story):
    folder = make(library).metadata["cache_dir"]
    (library / "0.txt").rename(library / "renamed.txt")
    assert make(library).metadata["cache_dir"] != folder
    alone = make(story).metadata["cache_dir"]
    assert make(story.rename(story.with_name("renamed.txt"))).metadata["cache_dir"] == alone


def test_metadata_describes_the_text(story, monkeypatch):
    monkeypatch.chdir(story.parent)
    prepared = make(story.name)
    metadata = prepared.metadata
    assert metadata["sources"] == [str(story)]
    assert metadata["num_documents"] == 1
    assert metadata["baselines"] == ngram_losses(prepared.train[:], prepared.val[:])
    assert metadata["train_bytes"] + metadata["val_bytes"] == story.stat().st_size
    assert json.loads(json.dumps(metadata)) == metadata


def test_metadata_keeps_the_name_of_a_built_in_text():
    assert make("python-docs").metadata["sources"] == ["python-docs"]


@pytest.mark.parametrize(
    ("text", "train", "val"),
    [("", 0, 0), ("a", 0, 1), ("ab", 1, 1), ("abcdefghij", 9, 1), ("日" * 4, 4, 0)],
)
def test_short_text_error_has_the_token_counts(tmp_path, text, train, val):
    with pytest.raises(
        UserError, match=f"too short: {train} tokens to train on and {val} to validate on"
    ):
        make(*write(tmp_path, text))
    assert not list((cache_dir() / "tokens").iterdir())


def test_text_of_one_symbol_is_an_error(tmp_path):
    with pytest.raises(UserError, match="The 1,800 tokens to train on are all the same"):
        make(*write(tmp_path, "a" * 2000))


def test_empty_files_are_too_short(tmp_path):
    with pytest.raises(UserError, match="too short"):
        make(*write(tmp_path, "", "", ""))


def test_short_val_text_is_an_error(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "h")
    with pytest.raises(UserError, match="240 tokens to train on and 1 to validate on"):
        make(text, val_text=str(val))


def test_empty_val_text_is_an_error_with_a_cached_text(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "")
    make(text)
    with pytest.raises(UserError, match="too short"):
        make(text, val_text=str(val))


def test_full_disk_is_detected_before_writing(story, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    size = story.stat().st_size
    with pytest.raises(
        UserError,
        match=rf"The disk is full: 0\.0 MB are free for .*, {size * 2 / 1e6:,.1f} MB are needed",
    ):
        make(story)
    assert not (cache_dir() / "tokens").exists()


def test_disk_with_exactly_enough_space_suffices(story, monkeypatch):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=2 * story.stat().st_size)
    )
    make(story)


def test_missing_prepared_folder_is_named(story):
    folder = Path(make(story).metadata["cache_dir"])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"The prepared text in {folder} is damaged"):
        open_prepared(folder)
    assert make(story).metadata["cache_dir"] == str(folder)


@pytest.mark.parametrize(
    "name", ["index.json", "tokenizer.json", "train-00000.bin", "unit-00000.json"]
)
def test_cache_with_a_missing_file_is_prepared_again(story, name):
    before = make(story)
    (Path(before.metadata["cache_dir"]) / name).unlink()
    assert make(story).train[:].tolist() == before.train[:].tolist()


def test_temporary_folder_of_a_killed_process_is_harmless(story):
    folder = Path(make(story).metadata["cache_dir"])
    shutil.rmtree(folder)
    folder.with_name(f".{folder.name}.{os.getpid()}.unfinished").mkdir()
    make(story)


def test_metadata_has_absolute_sources(story, monkeypatch):
    monkeypatch.setenv("HOME", str(story.parent))
    assert make("~/story.txt").metadata["sources"] == [str(story)]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Files of many units: two that are divided, small ones, a table and a compressed file."""
    monkeypatch.setattr(sizes, "SHARD_BYTES", 3000)
    monkeypatch.setattr(formats, "READ_BYTES", 512)
    folder = tmp_path / "large"
    folder.mkdir()
    sentences = "".join(f"Satz {i}: das Übliche,\nund {i * i} mehr.\n\n" for i in range(400))
    (folder / "a.txt").write_text(sentences, encoding="utf-8")
    (folder / "b.txt").write_text(sentences[::-1], encoding="utf-8")
    for i in range(30):
        (folder / f"c{i}.txt").write_text(f"A small one, {i}.", encoding="utf-8")
    (folder / "d.jsonl").write_text(
        "".join(json.dumps({"text": f"Record {i}. " * (i % 9)}) + "\n" for i in range(150)),
        encoding="utf-8",
    )
    (folder / "e.txt.gz").write_bytes(gzip.compress(sentences[:5000].encode()))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a prepared folder, except for the record of verified files."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "verified.json"
    }


def fill(
    large: Path, folder: Path, shard: tuple[int, int] = (1, 1), **config: object
) -> PreparedData | list[int]:
    return prepare.prepare_folder([str(large)], DataConfig(**config), folder, shard)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_units_hold_the_same_tokens_as_one_unit(large, tmp_path, monkeypatch, tokenizer):
    many = fill(large, tmp_path / "many", tokenizer=tokenizer)
    assert len(list((tmp_path / "many").glob("unit-*"))) > 10
    monkeypatch.setattr(sizes, "SHARD_BYTES", 10**9)
    one = fill(large, tmp_path / "one", tokenizer=tokenizer)
    assert len(list((tmp_path / "one").glob("unit-*"))) == 1
    assert many.train[:].tolist() == one.train[:].tolist()
    assert many.val[:].tolist() == one.val[:].tolist()
    assert many.metadata | {"cache_dir": None} == one.metadata | {"cache_dir": None}
    assert (
        many.with_document_windows(16).document_windows.document_offsets.tolist()
        == one.with_document_windows(16).document_windows.document_offsets.tolist()
    )
    assert one.metadata["num_documents"] == 33 + 150 - 17
    assert many.metadata["val_words"] == len(
        many.tokenizer.decode(many.val[:]).replace("<|end|>", " ").split()
    )


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_of_several_processes_equal_those_of_one(large, tmp_path, order):
    fill(large, tmp_path / "one")
    for i in order[:-1]:
        assert fill(large, tmp_path / "shared", (i, 3))
        assert not (tmp_path / "shared" / "index.json").exists()
    assert fill(large, tmp_path / "shared", (order[-1], 3)).metadata["train_tokens"] > 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")


def test_folder_with_other_units_is_not_completed(large, tmp_path):
    records = [f"Record {i} and more of it. " for i in range(400)]
    jobs = {}
    tables = {
        "divided/t.jsonl": "".join(json.dumps({"text": record}) + "\n" for record in records),
        "whole/t.csv": "\n".join(["text", *records]),
    }
    for name, table in tables.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(table, encoding="utf-8")
        jobs[name] = prepare.PreparationJob([str(tmp_path / name)], DataConfig(tokenizer="byte"))
    divided, whole = jobs["divided/t.jsonl"], jobs["whole/t.csv"]
    assert divided.scan.fingerprint == whole.scan.fingerprint
    assert len(divided.units) > len(whole.units) == 1
    assert divided.key != whole.key
    assert fill(tmp_path / "divided", tmp_path / "data", (1, 2), tokenizer="byte")
    with pytest.raises(UserError, match="holds the tokens of another text"):
        fill(tmp_path / "whole", tmp_path / "data", tokenizer="byte")


def test_incomplete_units_get_no_index(large, tmp_path):
    assert fill(large, tmp_path / "data", (1, 2))
    unit = tmp_path / "data" / "unit-00000.json"
    metadata = json.loads(unit.read_text(encoding="utf-8"))
    changed = metadata | {"text_bytes": metadata["text_bytes"] - 1}
    unit.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(UserError, match=r"hold .* bytes of text, not"):
        fill(large, tmp_path / "data")
    assert not (tmp_path / "data" / "index.json").exists()


def test_shards_of_several_machines_are_merged_and_completed(large, tmp_path):
    fill(large, tmp_path / "one")
    for i in (1, 2):
        assert fill(large, tmp_path / f"part{i}", (i, 2))
    shutil.copytree(tmp_path / "part1", tmp_path / "part2", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"no index\.json.*\n.*nanogpt prepare"):
        make(tmp_path / "part2")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "part2").glob("*.bin")}
    fill(large, tmp_path / "part2")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(tmp_path / "part2") == contents(tmp_path / "one")


# Each unit renames two token files, one per split; the process ends at the n-th of them.
KILLED_PREPARATION = """
import os
import sys
from pathlib import Path

from nanogpt import sizes
from nanogpt.config import DataConfig
from nanogpt.data import formats, prepare, shards

sizes.SHARD_BYTES = 3000
formats.READ_BYTES = 512
prepare.MAX_THREADS = 1
finish = shards._ShardWriter.finish
remaining = int(sys.argv[3])


def finish_or_exit(shard):
    global remaining
    remaining -= 1
    return finish(shard) if remaining else os._exit(9)


shards._ShardWriter.finish = finish_or_exit
prepare.prepare_folder([sys.argv[1]], DataConfig(), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("moment", [1, 4, 9])
def test_killed_preparation_is_resumed(large, tmp_path, monkeypatch, moment):
    fill(large, tmp_path / "one")
    command = [sys.executable, "-c", KILLED_PREPARATION, large, tmp_path / "killed", str(moment)]
    killed = subprocess.run(command, check=False)
    assert killed.returncode == 9
    done = len(list((tmp_path / "killed").glob("unit-*")))
    assert done == (moment - 1) // 2
    monkeypatch.setattr(prepare, "STALE_TEMP_SECONDS", 0.0)
    written = []
    monkeypatch.setattr(
        prepare,
        "write_unit",
        lambda folder, number, *args: written.append(number) or write_unit(folder, number, *args),
    )
    fill(large, tmp_path / "killed")
    assert sorted(written) == list(range(done, len(list((tmp_path / "one").glob("unit-*")))))
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")


def test_prepared_folder_is_a_source(large, tmp_path):
    fill(large, tmp_path / "data", tokenizer="byte", max_val_bytes=2000)
    prepared = make(tmp_path / "data")
    assert (
        prepared.metadata["sources"] == [prepared.metadata["cache_dir"]] == [str(tmp_path / "data")]
    )
    assert prepared.tokenizer.vocab_size == 257
    assert (
        make(tmp_path / "data", tokenizer="byte", cross_documents=False).metadata
        == prepared.metadata
    )
    with pytest.raises(UserError, match="tokenizer = 'char', but 'byte' in the folder"):
        make(tmp_path / "data", tokenizer="char")


def test_damaged_shard_is_detected_and_replaced(large, tmp_path):
    fill(large, tmp_path / "data")
    good = contents(tmp_path / "data")
    shard = tmp_path / "data" / "train-00002.bin"
    shard.write_bytes(good[shard.name][:-2])
    with pytest.raises(UserError, match=r"train-00002\.bin is damaged: it has .* bytes, not"):
        make(tmp_path / "data")
    shard.write_bytes(bytes([good[shard.name][0] ^ 1]) + good[shard.name][1:])
    with pytest.raises(UserError, match=r"train-00002\.bin is damaged: its SHA-256"):
        make(tmp_path / "data")
    shard.unlink()
    with pytest.raises(UserError, match="is damaged"):
        make(tmp_path / "data")
    fill(large, tmp_path / "data")
    assert contents(tmp_path / "data") == good


def test_checksums_are_verified_once(large, tmp_path, monkeypatch):
    fill(large, tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    hashed = []
    monkeypatch.setattr(
        hashlib,
        "file_digest",
        lambda file, name: hashed.append(file.name) or hashlib.sha256(file.read()),
    )
    for folder, first in (("data", False), ("copy", True)):
        make(tmp_path / folder)
        assert bool(hashed) == first
    hashed.clear()
    make(tmp_path / "copy")
    assert not hashed


def test_cache_with_a_damaged_shard_is_prepared_again(story):
    before = make(story)
    shard = Path(before.metadata["cache_dir"]) / "train-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(bytes(len(good)))
    assert make(story).train[:].tobytes() == good


def test_folder_with_other_content_is_an_error(large, tmp_path, story):
    fill(large, tmp_path / "data", (1, 2))
    for changed in ({"sources": [str(story)]}, {"config": DataConfig(max_val_bytes=99)}):
        with pytest.raises(UserError, match="holds the tokens of another text"):
            prepare.prepare_folder(
                **{
                    "sources": [str(large)],
                    "config": DataConfig(),
                    "folder": tmp_path / "data",
                }
                | changed
            )
    with pytest.raises(UserError, match=r"not a folder of prepared text: it holds a\.txt"):
        fill(large, large)
    with pytest.raises(UserError, match="is a file"):
        fill(large, story)
    for shard in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(UserError, match="is out of range"):
            fill(large, tmp_path / "other", shard)


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000-of-00002.parquet", "index.json"])
def test_foreign_files_are_not_changed(story, tmp_path, name):
    foreign = tmp_path / "gpt2" / name
    foreign.parent.mkdir()
    foreign.write_text(train_tokenizer("byte", []).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=f"not a folder of prepared text: it holds {name}"):
        prepare.prepare_folder([str(story)], DataConfig(), foreign.parent)
    assert foreign.read_text(encoding="utf-8") == train_tokenizer("byte", []).to_json()


def test_temp_file_removed_by_another_process_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / ".a.unfinished"]))
    remove_stale_temp_files(tmp_path, older_than=0)


def test_prepared_folder_cannot_be_joined_or_held_out(large, story, tmp_path):
    fill(large, tmp_path / "data", tokenizer="byte")
    for sources, config in (
        ([tmp_path / "data", story], {}),
        ([story], {"val_text": str(tmp_path / "data")}),
    ):
        with pytest.raises(UserError, match="folder of prepared text, which cannot be joined"):
            make(*sources, **config)


def test_text_instead_of_a_path_is_recognized():
    with pytest.raises(UserError, match="looks like a text itself"):
        make("This is the text itself, not its name. " * 300)


def test_relative_paths_are_equal_to_absolute_ones(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("val.txt").write_text("held out, all of it", encoding="utf-8")
    Path("tokenizer.json").write_text(train_tokenizer("byte", []).to_json(), encoding="utf-8")
    settings = {"val_text": "val.txt", "tokenizer": "tokenizer.json"}
    prepare.prepare_folder([str(story)], DataConfig(**settings), tmp_path / "data")
    absolute = {name: str(tmp_path / path) for name, path in settings.items()}
    data_config = make(tmp_path / "data", **absolute).metadata["data_config"]
    assert data_config["val_text"] == str(tmp_path / "val.txt")


def test_folder_of_another_version_or_tokenizer_is_an_error(story, tmp_path):
    prepare.prepare_folder([str(story)], DataConfig(tokenizer="byte"), tmp_path / "data")
    index, tokenizer = tmp_path / "data" / "index.json", tmp_path / "data" / "tokenizer.json"
    before = index.read_text(encoding="utf-8")
    index.write_text(json.dumps(json.loads(before) | {"version": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="another version of nanogpt: its format is 1"):
        make(tmp_path / "data")
    index.write_text(before, encoding="utf-8")
    tokenizer.write_text(train_tokenizer("char", ["abc"]).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="is not the tokenizer of"):
        make(tmp_path / "data")


def test_copy_with_the_same_times_is_verified(story, tmp_path):
    prepare.prepare_folder([str(story)], DataConfig(tokenizer="byte"), tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    shard = tmp_path / "copy" / "train-00000.bin"
    times = shard.stat()
    shard.write_bytes(bytes(times.st_size))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="is damaged"):
        make(tmp_path / "copy")


def test_text_that_changes_while_it_is_read_is_an_error(story, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare,
        "train_tokenizer",
        lambda *args: story.write_text("shorter " * 9) and train_tokenizer(*args),
    )
    with pytest.raises(UserError, match="changed while it was read"):
        make(story)


def test_split_of_a_table_holds_out_whole_records(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": f"{i:03} " + "word " * 19, "other": i}) + "\n" for i in range(100)
        )
    )
    prepared = make(tmp_path / "a.jsonl")
    assert (
        prepared.metadata["split_description"]
        == "10 of 100 documents, chosen by a hash of their names, are held out"
    )
    train, val = (
        split_documents(split[:], prepared.tokenizer.eot_id)
        for split in (prepared.train, prepared.val)
    )
    assert sorted(prepared.tokenizer.decode(document) for document in train + val) == [
        f"{i:03} " + "word " * 19 for i in range(100)
    ]
    assert prepared.metadata["val_words"] == 10 * 20
    assert prepared.with_document_windows(8).document_windows.document_offsets.tolist() == [
        100 * i for i in range(91)
    ]


MEMORY_USE = """
import sys
import threading
import time
from pathlib import Path

import nanogpt.api
from nanogpt.config import DataConfig
from nanogpt.data import batches
from nanogpt.data.prepare import prepare_folder


def anonymous_memory():  # kilobytes
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0])


def watch():
    global peak
    while True:
        peak = max(peak, anonymous_memory())
        time.sleep(0.005)


before = peak = anonymous_memory()
threading.Thread(target=watch, daemon=True).start()
prepared = prepare_folder([sys.argv[1]], DataConfig(tokenizer=sys.argv[2]), Path(sys.argv[3]))
batches.sample_batch(prepared.train, 1, 0, range(64), 64, 256)
print(peak - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc"
)
def test_prepare_memory_does_not_grow_with_the_text(tmp_path):
    text = "".join(
        f"Line {i} of a long text, which goes on for some time.\n" for i in range(20_000)
    )
    used = []
    for copies in (16, 64):
        (tmp_path / f"{copies}.txt").write_text(text * copies, encoding="utf-8")
        command = [
            sys.executable,
            "-c",
            MEMORY_USE,
            tmp_path / f"{copies}.txt",
            "char",
            tmp_path / f"{copies}",
        ]
        used.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    # In kilobytes; the second text is 55 MB longer.
    assert used[1] < used[0] + 40_000
