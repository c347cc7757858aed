"""Text becomes token files: nothing lost, split where it is said to be, found again by its content."""

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

from nanogpt import prepare, sizes
from nanogpt.config import TextConfig
from nanogpt.corpus import formats
from nanogpt.errors import UserError
from nanogpt.evaluate import ngram_losses
from nanogpt.files import cache_dir, sweep
from nanogpt.prepare import open_prepared
from nanogpt.prepare.shards import write_unit
from nanogpt.tokenizer import train_tokenizer

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text("a日é😀", max_size=200)


def make(*sources: object, **text: object) -> prepare.Prepared:
    return prepare.prepare([str(source) for source in sources], TextConfig(**text))


def write(folder: Path, *contents: str | bytes) -> list[Path]:
    paths = [folder / f"{i}.txt" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return paths


def whole_documents(tokens: np.ndarray, end: int) -> list[list[int]]:
    """The documents in a file of tokens, each without its end."""
    documents, rest = [], []
    for token in tokens.tolist():
        if token == end:
            documents.append(rest)
            rest = []
        else:
            rest.append(token)
    assert not rest
    return documents


def split_of(text: str, room: int) -> tuple[str, str]:
    """The reference: as many characters as fit into the last `room` bytes, and those before."""
    val = text.encode()[len(text.encode()) - room :].decode(errors="ignore")
    return text[: len(text) - len(val)], val


@contextmanager
def elsewhere(tmp_path_factory, chunk: int = formats.CHUNK):
    """An empty folder and an empty cache, and texts that are read in chunks of so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "CHUNK", chunk)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("texts")


@pytest.mark.parametrize("n", [20, 29, 70, 99, 1000, 4821, 1_115_394])
def test_the_last_tenth_is_held_out(tmp_path, n):
    text = ("abcdefghij" * (n // 10 + 1))[:n]
    prepared = make(*write(tmp_path, text))
    assert prepared.tokenizer.decode(prepared.train[:]) == text[: int(0.9 * n)]
    assert prepared.tokenizer.decode(prepared.val[:]) == text[int(0.9 * n) :]
    assert prepared.about["split"] == f"the last {n - int(0.9 * n):,} of {n:,} bytes are held out"


def test_at_most_so_many_bytes_are_held_out(tmp_path):
    (path,) = write(tmp_path, "abcde" * 1000)
    assert [len(make(path, val_bytes=n).val) for n in (2, 100, 499, 500, 501, 10**9)] == [2, 100, 499, 500, 500, 500]


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(2, 50), st.integers(4, 20) | st.just(formats.CHUNK))
def test_nothing_is_lost_between_the_splits(tmp_path_factory, body, val_bytes, chunk):
    text = "ab" * 10 + body + "ab"
    size = len(text.encode())
    with elsewhere(tmp_path_factory, chunk) as folder:
        prepared = make(*write(folder, text), val_bytes=val_bytes)
    train, val = split_of(text, min(size - size * 9 // 10, val_bytes))
    about, tokenizer = prepared.about, prepared.tokenizer
    assert (tokenizer.decode(prepared.train[:]), tokenizer.decode(prepared.val[:])) == (train, val)
    assert (about["train_bytes"], about["val_bytes"]) == (len(train.encode()), len(val.encode()))
    assert (about["train_tokens"], about["val_tokens"]) == (len(train), len(val))
    assert about["symbols"] == len(set(train))
    unused = {token for first, behind in about["unused"] for token in range(first, behind)}
    assert unused == set(range(tokenizer.vocab_size)) - set(prepared.train[:].tolist())


def test_no_more_is_held_out_than_was_allowed_where_the_cut_meets_a_character(tmp_path):
    assert make(*write(tmp_path, "日本" * 1000), val_bytes=100).about["val_bytes"] <= 100


@settings(max_examples=60, deadline=None)
@given(st.lists(texts.filter(bool), min_size=2, max_size=12), st.integers(4, 20) | st.just(formats.CHUNK))
def test_many_documents_are_held_out_whole_or_the_last_tenth_of_all_is(tmp_path_factory, bodies, chunk):
    bodies = [f"{'ab' * 9}{i}{body}" for i, body in enumerate(bodies)]
    with elsewhere(tmp_path_factory, chunk) as folder:
        prepared = make(*write(folder, *bodies))
    end, tokens = prepared.tokenizer.end, [prepared.tokenizer.encode(body) for body in bodies]
    size = sum(len(body.encode()) for body in bodies)
    room = size - size * 9 // 10
    if "documents" in prepared.about["split"]:
        train, val = (whole_documents(split, end) for split in (prepared.train[:], prepared.val[:]))
        assert sorted(train + val) == sorted(tokens)
        assert (train, val) == ([t for t in tokens if t in train], [t for t in tokens if t in val])
        assert room / 2 <= prepared.about["val_bytes"] <= room
    else:
        assert [*prepared.train[:], *prepared.val[:]] == [token for document in tokens for token in [*document, end]]
        assert prepared.tokenizer.decode(prepared.train[:][prepared.train[:] != end]) == split_of("".join(bodies), room)[0]


@pytest.fixture
def library(tmp_path):
    """Forty documents of 100 bytes, each of its own letter."""
    (tmp_path / "library").mkdir()
    write(tmp_path / "library", *(chr(0x4E00 + i) * 32 + "abc\n" for i in range(40)))
    return tmp_path / "library"


def test_the_same_documents_are_held_out_again_whatever_they_say(library, monkeypatch, tmp_path):
    first = make(library)
    assert first.about["split"] == "4 of 40 documents, chosen by a hash of their names, are held out"
    assert first.about["val_bytes"] == 400
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert make(library).val[:].tolist() == first.val[:].tolist()
    for path in library.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("abc", "xyz"), encoding="utf-8")
    again = make(library)
    assert again.tokenizer.decode(again.val[:]) == first.tokenizer.decode(first.val[:]).replace("abc", "xyz")


@pytest.mark.parametrize("sizes", [(100, 100, 100), (1, 1000, 1000), (5000, 20)])
def test_documents_that_are_too_few_or_too_uneven_give_the_last_tenth_of_all(tmp_path, sizes):
    prepared = make(*write(tmp_path, *(("ab" * size)[:size] for size in sizes)))
    assert prepared.about["split"].startswith("the last ")
    assert prepared.about["val_bytes"] == sum(sizes) - sum(sizes) * 9 // 10
    assert len(prepared.train) + len(prepared.val) == sum(sizes) + len(sizes)


def test_one_document_has_no_end(tmp_path):
    prepared = make(*write(tmp_path, "hello world " * 20))
    assert prepared.tokenizer.end not in prepared.train[:]
    assert prepared.tokenizer.end not in prepared.val[:]
    assert [prepared.tokenizer.end in range(*pair) for pair in prepared.about["unused"]][-1]


def test_empty_documents_are_left_out(tmp_path):
    prepared = make(*write(tmp_path, "", "ab" * 50, "", "ab" * 50, "\ufeff"))
    assert [*prepared.train[:], *prepared.val[:]] == [0, 1] * 50 + [258] + [0, 1] * 50 + [258]
    assert prepared.about["documents"] == 2


def test_a_text_to_validate_on_leaves_the_other_whole(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "help is on the way: 日本")
    prepared = make(text, val=str(val))
    assert prepared.tokenizer.decode(prepared.train[:]) == "hello world " * 20
    assert prepared.tokenizer.decode(prepared.val[:]) == "help is on the way: 日本"
    assert prepared.about["val_bytes"] == len("help is on the way: 日本".encode())
    assert prepared.about["split"] == "the text given with --val is held out"


def test_a_validation_text_within_the_text_is_not_trained_on(library):
    prepared = make(library, val=str(library / "7.txt"))
    assert prepared.about["documents"] == 39
    assert not set(prepared.train[:].tolist()) >= set(prepared.val[:].tolist())
    with pytest.raises(UserError, match="held out by --val"):
        make(library / "7.txt", val=str(library))


def test_a_folder_to_validate_on_gives_its_documents_whole(tmp_path, library):
    prepared = make(*write(tmp_path, "hello world " * 20), val=str(library))
    assert len(whole_documents(prepared.val[:], prepared.tokenizer.end)) == 40
    assert prepared.about["val_bytes"] == 4000
    assert prepared.tokenizer.end not in prepared.train[:]


def test_copies_in_other_encodings_are_the_same_text(tmp_path):
    text = "Grüße aus 日本, 👩‍👩‍👧\r\n" * 20
    encodings = ["utf-8", "utf-8-sig", "utf-16"]
    copies = [make(path) for path in write(tmp_path, *map(text.encode, encodings))]
    copies.append(make(*write(tmp_path, text.encode("utf-16-be")), encoding="utf-16-be"))
    assert len({copy.about["folder"] for copy in copies}) == 1
    assert {copy.tokenizer.decode([*copy.train[:], *copy.val[:]]) for copy in copies} == {text}


def test_what_was_prepared_is_found_again_and_not_touched(story):
    first = make(story)
    files = sorted(Path(first.about["folder"]).iterdir())
    assert [file.name for file in files] == [".key", "checked.json", "index.json", "tokenizer.json", "train-00000.bin", "unit-00000.json", "val-00000.bin"]
    before = [file.stat().st_mtime_ns for file in files]
    copy = shutil.copy(story, story.with_name("copy.txt"))
    second = make(copy)
    assert [file.stat().st_mtime_ns for file in files] == before
    assert second.about == first.about | {"sources": [str(copy)]}
    assert open_prepared(Path(first.about["folder"])).train[:].tolist() == first.train[:].tolist()
    assert [path.name for path in (cache_dir() / "tokens").iterdir()] == [Path(first.about["folder"]).name]


def test_another_text_another_split_or_another_order_is_prepared_anew(tmp_path):
    a, b, both = write(tmp_path, "hello world " * 20, "the quick brown fox " * 20, "hello world " * 20 + "the quick brown fox " * 20)
    several = [make(a), make(b), make(both), make(a, val_bytes=10), make(a, val=str(b)), make(a, b), make(b, a), make(b, val=str(a))]
    a.write_text("hello worlD " * 20, encoding="utf-8")
    several.append(make(a))
    assert len({prepared.about["folder"] for prepared in several}) == len(several)


def test_the_names_of_many_documents_matter_and_that_of_one_does_not(library, story):
    folder = make(library).about["folder"]
    (library / "0.txt").rename(library / "renamed.txt")
    assert make(library).about["folder"] != folder
    alone = make(story).about["folder"]
    assert make(story.rename(story.with_name("renamed.txt"))).about["folder"] == alone


def test_what_is_known_of_a_text_is_true(story, monkeypatch):
    monkeypatch.chdir(story.parent)
    about = (prepared := make(story.name)).about
    assert about["sources"] == [str(story)]
    assert about["documents"] == 1
    assert about["baselines"] == ngram_losses(prepared.train[:], prepared.val[:])
    assert about["train_bytes"] + about["val_bytes"] == story.stat().st_size
    assert json.loads(json.dumps(about)) == about


def test_a_built_in_text_keeps_its_name():
    assert make("python-docs").about["sources"] == ["python-docs"]


@pytest.mark.parametrize(("text", "train", "val"), [("", 0, 0), ("a", 0, 1), ("ab", 1, 1), ("abcdefghij", 9, 1), ("日" * 4, 4, 0)])
def test_a_text_that_is_too_short_is_refused_with_the_numbers(tmp_path, text, train, val):
    with pytest.raises(UserError, match=f"too short: {train} tokens to train on and {val} to validate on"):
        make(*write(tmp_path, text))
    assert not list((cache_dir() / "tokens").iterdir())


def test_a_text_of_one_symbol_is_refused(tmp_path):
    with pytest.raises(UserError, match="The 1,800 tokens to train on are all the same symbol"):
        make(*write(tmp_path, "a" * 2000))


def test_empty_files_are_too_short_however_many(tmp_path):
    with pytest.raises(UserError, match="too short"):
        make(*write(tmp_path, "", "", ""))


def test_a_validation_text_that_is_too_short_is_refused(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "h")
    with pytest.raises(UserError, match="240 tokens to train on and 1 to validate on"):
        make(text, val=str(val))


def test_an_empty_validation_text_is_refused_though_the_text_was_prepared_before(tmp_path):
    text, val = write(tmp_path, "hello world " * 20, "")
    make(text)
    with pytest.raises(UserError, match="too short"):
        make(text, val=str(val))


def test_a_full_disk_is_known_before_anything_is_written(story, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    size = story.stat().st_size
    with pytest.raises(UserError, match=rf"The disk is full: 0\.0 MB are free for .*, {size * 2 / 1e6:,.1f} MB are needed"):
        make(story)
    assert not (cache_dir() / "tokens").exists()


def test_a_disk_that_just_suffices_suffices(story, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=2 * story.stat().st_size))
    make(story)


def test_prepared_text_that_is_gone_is_named(story):
    folder = Path(make(story).about["folder"])
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"no longer whole in {folder}"):
        open_prepared(folder)
    assert make(story).about["folder"] == str(folder)


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-00000.bin", "unit-00000.json"])
def test_a_cache_that_lost_a_file_is_made_again(story, name):
    before = make(story)
    (Path(before.about["folder"]) / name).unlink()
    assert make(story).train[:].tolist() == before.train[:].tolist()


def test_a_killed_process_with_the_same_number_leaves_nothing_that_disturbs(story):
    folder = Path(make(story).about["folder"])
    shutil.rmtree(folder)
    folder.with_name(f".{folder.name}.{os.getpid()}.unfinished").mkdir()
    make(story)


def test_a_source_at_home_can_be_found_again(story, monkeypatch):
    monkeypatch.setenv("HOME", str(story.parent))
    assert make("~/story.txt").about["sources"] == [str(story)]


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Files that make many units: two that are cut, small ones that are grouped, a table and a packed one."""
    monkeypatch.setattr(sizes, "UNIT", 3000)
    monkeypatch.setattr(formats, "CHUNK", 512)
    folder = tmp_path / "large"
    folder.mkdir()
    sentences = "".join(f"Satz {i}: das Übliche,\nund {i * i} mehr.\n\n" for i in range(400))
    (folder / "a.txt").write_text(sentences, encoding="utf-8")
    (folder / "b.txt").write_text(sentences[::-1], encoding="utf-8")
    for i in range(30):
        (folder / f"c{i}.txt").write_text(f"A small one, {i}.", encoding="utf-8")
    (folder / "d.jsonl").write_text("".join(json.dumps({"text": f"Record {i}. " * (i % 9)}) + "\n" for i in range(150)), encoding="utf-8")
    (folder / "e.txt.gz").write_bytes(gzip.compress(sentences[:5000].encode()))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a prepared folder, but for the note of when they were checked."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "checked.json"}


def fill(large: Path, folder: Path, share: tuple[int, int] = (1, 1), **text: object) -> prepare.Prepared | list[int]:
    return prepare.prepare_folder([str(large)], TextConfig(**text), folder, share)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_many_units_hold_the_text_of_one(large, tmp_path, monkeypatch, tokenizer):
    many = fill(large, tmp_path / "many", tokenizer=tokenizer)
    assert len(list((tmp_path / "many").glob("unit-*"))) > 10
    monkeypatch.setattr(sizes, "UNIT", 10**9)
    one = fill(large, tmp_path / "one", tokenizer=tokenizer)
    assert len(list((tmp_path / "one").glob("unit-*"))) == 1
    assert many.train[:].tolist() == one.train[:].tolist()
    assert many.val[:].tolist() == one.val[:].tolist()
    differ = {"folder"}
    assert {name: many.about[name] for name in many.about if name not in differ} == {name: one.about[name] for name in one.about if name not in differ}
    assert many.within_documents(16).windows.ends.tolist() == one.within_documents(16).windows.ends.tolist()
    assert one.about["documents"] == 33 + 150 - 17
    assert many.about["val_words"] == len(many.tokenizer.decode(many.val[:]).replace("<|end|>", " ").split())


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_several_processes_make_the_same_bytes_as_one(large, tmp_path, order):
    fill(large, tmp_path / "one")
    for i in order[:-1]:
        assert fill(large, tmp_path / "shared", (i, 3))
        assert not (tmp_path / "shared" / "index.json").exists()
    assert fill(large, tmp_path / "shared", (order[-1], 3)).about["train_tokens"] > 0
    assert contents(tmp_path / "shared") == contents(tmp_path / "one")


def test_the_same_text_in_other_units_is_not_completed(large, tmp_path):
    records, key = [f"Record {i} and more of it. " for i in range(400)], {}
    tables = {"cut/t.jsonl": "".join(json.dumps({"text": record}) + "\n" for record in records), "whole/t.csv": "\n".join(["text", *records])}
    for name, table in tables.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(table, encoding="utf-8")
        text = prepare._Text([str(tmp_path / name)], TextConfig(tokenizer="byte"), None)
        key[name] = (text.scan.fingerprint, len(text.units), text.key)
    cut, whole = key["cut/t.jsonl"], key["whole/t.csv"]
    assert cut[0] == whole[0]
    assert cut[1] > whole[1] == 1
    assert cut[2] != whole[2]
    assert fill(tmp_path / "cut", tmp_path / "data", (1, 2), tokenizer="byte")
    with pytest.raises(UserError, match="holds the tokens of another text"):
        fill(tmp_path / "whole", tmp_path / "data", tokenizer="byte")


def test_units_that_are_not_the_whole_text_get_no_index(large, tmp_path):
    assert fill(large, tmp_path / "data", (1, 2))
    unit = tmp_path / "data" / "unit-00000.json"
    about = json.loads(unit.read_text(encoding="utf-8"))
    unit.write_text(json.dumps(about | {"text_bytes": about["text_bytes"] - 1}), encoding="utf-8")
    with pytest.raises(UserError, match=r"hold .* bytes of text, not"):
        fill(large, tmp_path / "data")
    assert not (tmp_path / "data" / "index.json").exists()


def test_the_parts_of_several_machines_are_completed_when_they_are_together(large, tmp_path):
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


@pytest.mark.parametrize("moment", [1, 4, 9])
def test_a_process_that_is_killed_goes_on_where_it_ended(large, tmp_path, monkeypatch, moment):
    fill(large, tmp_path / "one")
    code = (
        "import os, sys; from pathlib import Path; from nanogpt import prepare, sizes; from nanogpt.config import TextConfig\n"
        "from nanogpt.corpus import formats; from nanogpt.prepare import shards; sizes.UNIT, formats.CHUNK, prepare.MOST_THREADS = 3000, 512, 1\n"
        "write, left = shards._Shard.finish, [int(sys.argv[3])]\n"
        "def finish(shard):\n left[0] -= 1\n return write(shard) if left[0] else os._exit(9)\n"
        "shards._Shard.finish = finish; prepare.prepare_folder([sys.argv[1]], TextConfig(), Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, large, tmp_path / "killed", str(moment)], check=False)
    assert killed.returncode == 9
    done = len(list((tmp_path / "killed").glob("unit-*")))
    assert done == (moment - 1) // 2
    monkeypatch.setattr(prepare, "STILL_WRITTEN", 0.0)
    again = []
    monkeypatch.setattr(prepare, "write_unit", lambda folder, number, *rest: again.append(number) or write_unit(folder, number, *rest))
    fill(large, tmp_path / "killed")
    assert sorted(again) == list(range(done, len(list((tmp_path / "one").glob("unit-*")))))
    assert contents(tmp_path / "killed") == contents(tmp_path / "one")


def test_a_folder_that_was_prepared_is_trained_on(large, tmp_path):
    fill(large, tmp_path / "data", tokenizer="byte", val_bytes=2000)
    prepared = make(tmp_path / "data")
    assert prepared.about["sources"] == [prepared.about["folder"]] == [str(tmp_path / "data")]
    assert prepared.tokenizer.vocab_size == 257
    assert make(tmp_path / "data", tokenizer="byte", cross_documents=False).about == prepared.about
    with pytest.raises(UserError, match="tokenizer = 'char', but 'byte' in the folder"):
        make(tmp_path / "data", tokenizer="char")


def test_a_damaged_shard_is_found_and_made_anew(large, tmp_path):
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
    with pytest.raises(UserError, match="no longer whole"):
        make(tmp_path / "data")
    fill(large, tmp_path / "data")
    assert contents(tmp_path / "data") == good


def test_checksums_are_looked_at_once(large, tmp_path, monkeypatch):
    fill(large, tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)
    looked = []
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: looked.append(file.name) or hashlib.sha256(file.read()))
    for folder, first in (("data", False), ("copy", True)):
        make(tmp_path / folder)
        assert bool(looked) == first
    looked.clear()
    make(tmp_path / "copy")
    assert not looked


def test_a_cached_text_whose_shard_was_damaged_is_prepared_again(story):
    before = make(story)
    shard = Path(before.about["folder"]) / "train-00000.bin"
    good = shard.read_bytes()
    shard.write_bytes(bytes(len(good)))
    assert make(story).train[:].tobytes() == good


def test_a_folder_with_something_else_is_refused(large, tmp_path, story):
    fill(large, tmp_path / "data", (1, 2))
    for changed in ({"sources": [str(story)]}, {"settings": TextConfig(val_bytes=99)}):
        with pytest.raises(UserError, match="holds the tokens of another text"):
            prepare.prepare_folder(**{"sources": [str(large)], "settings": TextConfig(), "folder": tmp_path / "data"} | changed)
    with pytest.raises(UserError, match=r"no folder of prepared text: it holds a\.txt"):
        fill(large, large)
    with pytest.raises(UserError, match="is a file"):
        fill(large, story)
    for share in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(UserError, match="is no share"):
            fill(large, tmp_path / "other", share)


@pytest.mark.parametrize("name", ["tokenizer.json", "train-00000-of-00002.parquet", "index.json"])
def test_files_of_somebody_else_are_left_alone(story, tmp_path, name):
    foreign = tmp_path / "gpt2" / name
    foreign.parent.mkdir()
    foreign.write_text(train_tokenizer("byte", []).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=f"no folder of prepared text: it holds {name}"):
        prepare.prepare_folder([str(story)], TextConfig(), foreign.parent)
    assert foreign.read_text(encoding="utf-8") == train_tokenizer("byte", []).to_json()


def test_a_file_that_is_renamed_while_a_folder_is_swept_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter([folder / ".a.unfinished"]))
    sweep(tmp_path, older_than=0)


def test_prepared_text_is_not_read_as_text(large, story, tmp_path):
    fill(large, tmp_path / "data", tokenizer="byte")
    for sources, text in (([tmp_path / "data", story], {}), ([story], {"val": str(tmp_path / "data")})):
        with pytest.raises(UserError, match="folder of prepared text, which cannot be joined"):
            make(*sources, **text)


def test_a_text_in_place_of_a_path_is_told_from_one():
    with pytest.raises(UserError, match="a text itself"):
        make("This is the text itself, not its name. " * 300)


def test_what_was_prepared_with_relative_paths_takes_the_same_flags(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("val.txt").write_text("held out, all of it", encoding="utf-8")
    Path("tokenizer.json").write_text(train_tokenizer("byte", []).to_json(), encoding="utf-8")
    flags = {"val": "val.txt", "tokenizer": "tokenizer.json"}
    prepare.prepare_folder([str(story)], TextConfig(**flags), tmp_path / "data")
    assert make(tmp_path / "data", **{name: str(tmp_path / path) for name, path in flags.items()}).about["text"]["val"] == str(tmp_path / "val.txt")


def test_a_folder_of_another_version_or_with_another_tokenizer_is_refused(story, tmp_path):
    prepare.prepare_folder([str(story)], TextConfig(tokenizer="byte"), tmp_path / "data")
    index, tokenizer = tmp_path / "data" / "index.json", tmp_path / "data" / "tokenizer.json"
    before = index.read_text(encoding="utf-8")
    index.write_text(json.dumps(json.loads(before) | {"version": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="another version of nanogpt: its format is 1"):
        make(tmp_path / "data")
    index.write_text(before, encoding="utf-8")
    tokenizer.write_text(train_tokenizer("char", ["abc"]).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match="is not the tokenizer that"):
        make(tmp_path / "data")


def test_a_copy_that_kept_its_times_is_checked_again(story, tmp_path):
    prepare.prepare_folder([str(story)], TextConfig(tokenizer="byte"), tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    shard = tmp_path / "copy" / "train-00000.bin"
    times = shard.stat()
    shard.write_bytes(bytes(times.st_size))
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match="is damaged"):
        make(tmp_path / "copy")


def test_a_text_that_changes_while_it_is_read_is_refused(story, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *rest: story.write_text("shorter " * 9) and train_tokenizer(*rest))
    with pytest.raises(UserError, match="changed while it was read"):
        make(story)


def test_a_table_is_held_out_by_whole_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:03} " + "word " * 19, "other": i}) + "\n" for i in range(100)))
    prepared = make(tmp_path / "a.jsonl")
    assert prepared.about["split"] == "10 of 100 documents, chosen by a hash of their names, are held out"
    train, val = (whole_documents(split[:], prepared.tokenizer.end) for split in (prepared.train, prepared.val))
    assert sorted(prepared.tokenizer.decode(document) for document in train + val) == [f"{i:03} " + "word " * 19 for i in range(100)]
    assert prepared.about["val_words"] == 10 * 20
    assert prepared.within_documents(8).windows.ends.tolist() == [100 * i for i in range(1, 91)]


MEMORY = """
import sys, threading, time
from pathlib import Path
import nanogpt.library
from nanogpt.config import TextConfig
from nanogpt.prepare import prepare_folder
most, status = [0], Path("/proc/self/status")
def watch():
    while True:
        most[0] = max(most[0], int(status.read_text().split("RssAnon:")[1].split()[0]))
        time.sleep(0.005)
before = int(status.read_text().split("RssAnon:")[1].split()[0])
threading.Thread(target=watch, daemon=True).start()
prepared = prepare_folder([sys.argv[1]], TextConfig(tokenizer=sys.argv[2]), Path(sys.argv[3]))
batch = nanogpt.data.batch(prepared.train, 1, 0, range(64), 64, 256)
print(most[0] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
def test_memory_does_not_grow_with_the_text(tmp_path):
    text = "".join(f"Line {i} of a long text, which goes on for some time.\n" for i in range(20_000))
    used = []
    for copies in (16, 64):
        (tmp_path / f"{copies}.txt").write_text(text * copies, encoding="utf-8")
        command = [sys.executable, "-c", MEMORY, tmp_path / f"{copies}.txt", "char", tmp_path / f"{copies}"]
        used.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert used[1] < used[0] + 40_000  # kilobytes: the second text has 55 MB more
