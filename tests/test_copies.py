"""Every copied passage is found, where it stands is right to the character, and fresh text is not accused."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run

import nanogpt
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir
from nanogpt.library import training
from nanogpt.look import copies as module
from nanogpt.look import html, terminal
from nanogpt.look import index as index_module
from nanogpt.look.copies import LEAST, TRIED, copies
from nanogpt.look.index import open_index
from nanogpt.tokenizer import train_tokenizer

ENDS = "..,,;;\n"
WORDS = ["the", "cat", "saw", "dög", "barn", "фонарь", "猫の本", "🙂", "mouse", "wood", "yard", "met", "bird", "fox"]
LARGE = {"n_layer": 1, "n_head": 1, "n_embd": 8, "steps": 2, "eval_every": 2, "dropout": 0.0}


def prose(seed: int, words: int) -> str:
    """Text that repeats nothing for long: words at random, with random numbers between them."""
    chance = random.Random(seed)
    return "".join(f"{chance.choice(WORDS)} {chance.randrange(10**6)}{chance.choice(ENDS)} " for _ in range(words))


def index_of(documents: list[str], kind: str = "byte", held_out: str = "", path=None, ends: bool = True):
    """An index over some documents, and their tokenizer."""
    tokenizer = train_tokenizer(kind, documents)
    tokens = np.array([i for document in documents for i in (*tokenizer.encode(document), *[tokenizer.end] * ends)], np.uint32)
    return open_index(path, tokens, np.array([*tokenizer.encode(held_out), tokenizer.end], np.uint32), tokenizer)


def slow_copies(documents: list[str], text: str) -> tuple[float, int]:
    """The share of a text's bytes in passages of at least `LEAST` bytes of a document, and the bytes of the longest, by trying all."""
    utf8, covered, longest = text.encode(), set(), 0
    for begin in range(len(utf8)):
        end = begin
        for document in documents:
            while end < len(utf8) and utf8[begin : end + 1] in document.encode():
                end += 1
        if end - begin >= LEAST:
            covered |= set(range(begin, end))
            longest = max(longest, end - begin)
    return len(covered) / len(utf8), longest


def check_places(found, documents: list[str]) -> None:
    """Each passage stands where it is said to stand, and none overlaps another."""
    taken = set()
    for passage in found.passages:
        text, document = found.text[passage.start : passage.end], documents[passage.document - 1]
        assert document[passage.characters :].startswith(text + passage.after)
        assert document[: passage.characters].endswith(passage.before)
        assert document[: passage.characters].count("\n") + 1 == passage.line
        assert len(text.encode()) == passage.bytes >= LEAST
        assert not taken & set(range(passage.start, passage.end))
        taken |= set(range(passage.start, passage.end))
    assert [passage.bytes for passage in found.passages] == sorted((passage.bytes for passage in found.passages), reverse=True)


alphabets = st.sampled_from(["ab", "abcdefgh ", "аб日🙂\n"])
pieces = st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 150), st.text("ab日\n", max_size=9)), min_size=1, max_size=5)


@settings(max_examples=50)
@given(alphabets, st.lists(st.integers(1, 600), min_size=1, max_size=4), pieces, st.integers(0, 100), st.sampled_from(["char", "byte"]))
def test_all_passages_are_found_as_by_trying_all(alphabet, sizes, parts, seed, kind):
    chance = random.Random(seed)
    documents = ["".join(chance.choice(alphabet) for _ in range(size)) for size in sizes]
    text = ""
    for at, size, between in parts:
        document = documents[at % len(documents)]
        text += document[at % len(document) :][:size] + between
    index = index_of(documents, kind)
    found = copies(index, text)
    share, longest = slow_copies(documents, text)
    assert found.share == pytest.approx(share)
    assert module._measure(*module._matches(index, np.frombuffer(text.encode(), np.uint8))[:2], len(text.encode()))[1] == longest
    check_places(found, documents)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_a_planted_copy_is_found_to_the_character(kind, monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK", 16)
    monkeypatch.setattr(index_module, "PIECE", 64)
    documents = [prose(seed, 60) for seed in range(5)]
    index = index_of(documents, kind, prose(99, 200))
    planted = documents[3][417:700]
    found = copies(index, prose(50, 20) + "猫" + planted + "🙂" + prose(51, 20))
    (passage,) = found.passages
    begin = len(prose(50, 20)) + 1
    assert found.text[passage.start : passage.end].strip("🙂") in documents[3]
    assert (passage.start <= begin, passage.end >= begin + 283) == (True, True)
    assert passage.end - passage.start <= 283 + 2
    assert (passage.document, passage.characters) == (4, 417 - (begin - passage.start))
    check_places(found, documents)
    assert found.recites
    assert found.sentence.startswith("It recites: ")
    assert found.share == pytest.approx(passage.bytes / len(found.text.encode()))


def test_fresh_text_is_not_accused_even_where_all_text_repeats_itself():
    idiom = "as it was said in the beginning of the book, and will be said again: "
    documents = [idiom + prose(seed, 3) for seed in range(300)]
    index = index_of(documents, held_out="".join(idiom + prose(1000 + seed, 3) for seed in range(300)))
    fresh = copies(index, "".join(idiom + prose(2000 + seed, 3) for seed in range(9)))
    assert fresh.share > 0.3
    assert fresh.fresh.share == pytest.approx(fresh.share, abs=0.15)
    assert not fresh.recites
    assert fresh.sentence.startswith("No more than fresh text: ")
    assert copies(index, "".join(documents[40:46])).recites
    assert not copies(index, prose(5000, 100)).passages


@pytest.mark.parametrize("size", [LEAST - 1, LEAST])
def test_a_passage_counts_from_the_stated_length_on(size):
    document = prose(1, 50)
    at = next(at for at in range(len(document)) if document[at : at + size].isascii() and document[at - 1 : at].isascii())
    index = index_of([document])
    for shift in range(16):  # wherever its windows lie
        text = "~" * shift + document[at : at + size] + "~~~~"
        assert [passage.bytes for passage in copies(index, text).passages] == [size] * (size == LEAST)


def test_a_passage_does_not_reach_from_one_document_into_the_next():
    first, second = prose(1, 20), prose(2, 20)
    index = index_of([first, second])
    found = copies(index, first[-60:] + second[:60])
    assert sorted((passage.start, passage.end, passage.document) for passage in found.passages) == [(0, 60, 1), (60, 120, 2)]
    check_places(found, [first, second])
    assert index.documents.tolist() == [0, len(first.encode()) + 1]


def test_of_many_places_the_one_where_most_is_the_same_is_found():
    phrase = "and so it came to pass, as it had been written, that "
    document = "".join(f"{seed} times: {phrase}{prose(seed, 6)}" for seed in range(TRIED - 4))
    for seed in (0, 30, TRIED - 5):
        (passage,) = copies(index_of([document]), "~" + phrase + prose(seed, 6)[:-1] + "~").passages
        assert (passage.start, passage.end) == (1, 1 + len(phrase + prose(seed, 6)) - 1)


def test_the_end_of_a_held_out_document_is_no_part_of_a_passage():
    tail = "of which a hundred lines end so"
    assert len(tail) == LEAST - 1
    index = index_of([prose(1, 20) + "A" + tail], held_out=prose(2, 20) + "B" + tail)
    found = copies(index, prose(2, 20) + "B" + tail + "~~~~")
    assert (found.share, found.fresh.windows, found.fresh.share, found.fresh.longest) == (0, 1, 0, 0)


def test_a_window_that_stands_in_very_many_places_is_tried_in_some(monkeypatch):
    document = ("=" * 64 + "\n") * (4 * TRIED) + "x" * 7 + "=" * 90
    found = copies(index_of([document]), "=" * 80)
    (passage,) = found.passages
    assert passage.bytes >= 64
    assert found.share >= 64 / 80
    check_places(found, [document])


@pytest.mark.parametrize(("text", "share"), [("", 0.0), ("猫", 0.0), ("a" * 15, 0.0)])
def test_short_texts_have_no_copies(text, share):
    found = copies(index_of([prose(1, 20)], held_out=prose(2, 20)), text)
    assert (found.passages, found.share, found.recites, found.longest) == ([], share, False, 0)
    assert "There is no fresh text" in found.sentence


def test_fresh_text_is_measured_in_stretches_as_long_as_the_text():
    document = prose(1, 300)
    index = index_of([document], held_out=document[:400] + prose(2, 500))
    found = copies(index, prose(3, 10))
    assert (found.fresh.windows, found.fresh.bytes) == (21, len(prose(3, 10).encode()))
    assert (found.fresh.share, found.fresh.longest) == (0.0, 0.0)
    longer = copies(index, prose(3, 2000))
    assert longer.fresh.windows == 1
    assert longer.fresh.bytes == len((document[:400] + prose(2, 500)).encode()) + 1
    assert longer.fresh.share == pytest.approx(400 / longer.fresh.bytes, rel=0.2)


def test_documents_that_stand_in_both_parts_are_no_fresh_text():
    """A corpus that holds documents twice: those held out that were also trained on say nothing of how much fresh text copies."""
    documents = [prose(seed, 60) for seed in range(40)]
    held_out = "".join(document for seed in range(20) for document in (documents[seed], prose(1000 + seed, 60)))
    index = index_of(documents, held_out=held_out)
    recited = copies(index, documents[7][200:700])
    assert recited.fresh.doubled > 3
    assert recited.fresh.windows + recited.fresh.doubled == 21
    assert recited.fresh.share < 0.2
    assert recited.recites
    assert f"{recited.fresh.doubled} more did not count" in recited.sentence
    only = copies(index_of(documents, held_out=documents[0] * 3), documents[7][200:700])
    assert (only.fresh.windows, only.recites) == (0, True)
    assert "stretches did not count" in only.sentence
    assert copies(index_of(documents, held_out=prose(1000, 900)), prose(7, 9)).fresh.doubled == 0


def test_only_the_first_part_of_a_huge_text_is_indexed_and_that_is_said(monkeypatch):
    monkeypatch.setattr(index_module, "BLOCK", 16)
    monkeypatch.setattr(index_module, "PIECE", 64)
    monkeypatch.setattr(index_module, "MOST_BYTES", 1000)
    document = "".join(map(chr, range(33, 127))) * 3 + prose(1, 300)
    index = index_of([document], ends=False)
    assert (index.size, index.whole) == (1008, False)
    assert "(of which the first 0 MB were searched)" in copies(index, document[:60]).sentence
    utf8 = document.encode()
    assert copies(index, utf8[940:1000].decode(errors="ignore")).passages
    assert not copies(index, utf8[1000:1040].decode(errors="ignore")).passages
    monkeypatch.setattr(index_module, "MOST_BYTES", len(utf8))
    assert index_of([document], ends=False).whole


def test_the_index_is_stored_and_made_anew_for_another_text(tmp_path, monkeypatch):
    path, documents = tmp_path / "copies.safetensors", [prose(seed, 100) for seed in range(3)]
    made = index_of(documents, path=path)
    content, made_at = path.read_bytes(), path.stat().st_mtime_ns
    read = index_of(documents, path=path)
    assert path.stat().st_mtime_ns == made_at
    for name in ("keys", "blocks", "documents"):
        np.testing.assert_array_equal(getattr(made, name), getattr(read, name))
    assert copies(read, documents[2][50:200]) == copies(made, documents[2][50:200])
    for part in (documents[0][30:60], documents[1][30:60]):  # the text itself is not in the file
        assert part.encode() not in content
    index_of([*documents[:2], documents[2].replace("9", "8")], path=path)
    assert path.read_bytes() != content
    for damaged in (b"", content[: len(content) // 2], b"\x80\x04."):
        path.write_bytes(damaged)
        assert copies(index_of(documents, path=path), documents[1]).passages
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["copies.safetensors"]
    monkeypatch.setattr(index_module, "save_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "read only")))
    assert copies(index_of(documents[:2], path=path), documents[1]).passages


def test_a_run_knows_what_of_a_text_stands_in_its_training_part(tmp_path, capsys):
    text = prose(1, 400)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = nanogpt.train(tmp_path / "text.txt", tmp_path / "run", **TINY | LARGE)
    cut = len(text) - len(text) // 12
    found = model.look(text[1000:1400] + text[cut:]).copies()
    (passage,) = found.passages  # the end of the text is held out, and not in the index
    assert (passage.start, passage.end, passage.document, passage.characters) == (0, 400, 1, 1000)
    assert found.recites
    assert (tmp_path / "run" / "copies.safetensors").is_file()
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    assert run("look", alone, "--text", "x", "--copies") == 2
    assert "is not at hand" in capsys.readouterr().err
    assert run("look", tmp_path / "run", "--text", text[1000:1400], "--copies", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passages"][0]["line"] == text[:1000].count("\n") + 1


def test_a_passage_is_named_by_the_file_it_stands_in(tmp_path, capsys):
    for number in range(30):
        (tmp_path / "texts" / f"{number % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / f"{number % 3}" / f"{number}.txt").write_text(prose(number, 20) + prose(77, 20), encoding="utf-8")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\0\0")
    with pytest.warns(Notice, match="not text"):
        model = nanogpt.train(tmp_path / "texts", tmp_path / "run", **TINY | LARGE)
    for number in range(30):
        found = model.look(prose(number, 20)).copies()
        if not found.passages:  # held out
            continue
        assert {passage.source for passage in found.passages} == {f"{number % 3}/{number}.txt"}
    assert sum(bool(model.look(prose(number, 20)).copies().passages) for number in range(30)) > 20
    assert run("look", tmp_path / "run", tmp_path / "texts" / "1" / "4.txt", "--copies", "--html", tmp_path / "page.html") == 0
    assert "1/4.txt" in capsys.readouterr().out
    assert "1/4.txt" in (tmp_path / "page.html").read_text()
    shutil.rmtree(tmp_path / "texts")
    assert {passage.source for passage in model.look(prose(4, 20)).copies().passages} == {""}


def test_a_training_text_that_is_gone_is_said(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(prose(1, 400), encoding="utf-8")
    nanogpt.train(tmp_path / "text.txt", tmp_path / "run", **TINY | LARGE)
    shutil.rmtree(cache_dir() / "tokens")
    assert nanogpt.load(tmp_path / "run").look(prose(1, 400)).copies().recites  # its tokens are made again from the text
    shutil.rmtree(cache_dir() / "tokens")
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"The text that the model was trained on is gone: .*text\.txt"):
        nanogpt.load(tmp_path / "run").look("x").copies()
    assert run("look", tmp_path / "run", "--text", "The cat", "--neurons") == 0  # which can do without it
    assert "validation split" not in capsys.readouterr().out


def test_a_run_that_is_overwritten_loses_its_index(story, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "CHECKED_BYTES", 0)  # or the end of training would make it
    for overwrite in (False, True):
        nanogpt.train(story, tmp_path / "run", overwrite=overwrite, **TINY | LARGE)
        assert not (tmp_path / "run" / "copies.safetensors").exists()
        nanogpt.load(tmp_path / "run").look("x").copies()
        assert (tmp_path / "run" / "copies.safetensors").exists()


def test_pictures_of_copies_escape_the_texts_and_mark_the_passages():
    document = "<script>alert('it is here')</script> & so on \x1b[31m, for a while"
    found = copies(index_of([document + prose(1, 9)], held_out=prose(2, 20)), "<b>no</b> " + document + " <i>no</i>")
    page = html.page("<x>", html.copies(found))
    assert "<script" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    (marked,) = re.findall(r"<mark>(.*?)</mark>", page)
    assert marked.startswith(html.escaped(document))
    assert found._repr_html_() in page
    from rich.console import Console

    from nanogpt.report import printable

    console = Console(width=200)
    with console.capture() as capture:
        console.print(terminal.copies(found, printable))
    assert "It recites" in capture.get()
    assert "\x1b[31m" not in capture.get()
