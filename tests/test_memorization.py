"""Memorized passages are found and located exactly, and unseen text is not reported."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from helpers import TINY, run
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape

import nanogpt
from nanogpt import api
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir
from nanogpt.inspection import fingerprint_index
from nanogpt.inspection.fingerprint_index import open_index
from nanogpt.inspection.memorization import (
    MAX_CANDIDATES,
    MIN_PASSAGE_BYTES,
    coverage,
    find_matches,
    measure_memorization,
)
from nanogpt.render import inspection_html, inspection_terminal
from nanogpt.render.html import printable
from nanogpt.tokenizer.tokenizer import train_tokenizer

PUNCTUATION = "..,,;;\n"
WORDS = [
    "the",
    "cat",
    "saw",
    "dög",
    "barn",
    "фонарь",
    "猫の本",
    "🙂",
    "mouse",
    "wood",
    "yard",
    "met",
    "bird",
    "fox",
]
SETTINGS = {"n_layer": 1, "n_head": 1, "n_embd": 8, "steps": 2, "eval_every": 2, "dropout": 0.0}


def prose(seed: int, num_words: int) -> str:
    """Return random words and numbers, without long repetitions."""
    chance = random.Random(seed)
    return "".join(
        f"{chance.choice(WORDS)} {chance.randrange(10**6)}{chance.choice(PUNCTUATION)} "
        for _ in range(num_words)
    )


def index_of(
    documents: list[str], kind: str = "byte", held_out: str = "", path=None, ends: bool = True
):
    """Return an index over some documents; `ends` adds the end-of-text token to each."""
    tokenizer = train_tokenizer(kind, documents)
    end = [tokenizer.eot_id] * ends
    tokens = [i for document in documents for i in (*tokenizer.encode(document), *end)]
    held_out_tokens = [*tokenizer.encode(held_out), tokenizer.eot_id]
    return open_index(
        path, np.array(tokens, np.uint32), np.array(held_out_tokens, np.uint32), tokenizer
    )


def naive_coverage(documents: list[str], text: str) -> tuple[float, int]:
    """Return fraction and longest passage of a text, by trying all passages."""
    utf8, covered, longest = text.encode(), set(), 0
    for start in range(len(utf8)):
        stop = start
        for document in documents:
            while stop < len(utf8) and utf8[start : stop + 1] in document.encode():
                stop += 1
        if stop - start >= MIN_PASSAGE_BYTES:
            covered |= set(range(start, stop))
            longest = max(longest, stop - start)
    return len(covered) / len(utf8), longest


def check_passages(result, documents: list[str]) -> None:
    """Check that passages are located correctly, sorted, and do not overlap."""
    covered = set()
    for passage in result.passages:
        text = result.text[passage.start : passage.end]
        document = documents[passage.document - 1]
        before, after = document[: passage.char_offset], document[passage.char_offset :]
        assert after.startswith(text + passage.context_after)
        assert before.endswith(passage.context_before)
        assert before.count("\n") + 1 == passage.line
        assert len(text.encode()) == passage.num_bytes >= MIN_PASSAGE_BYTES
        assert not covered & set(range(passage.start, passage.end))
        covered |= set(range(passage.start, passage.end))
    sizes = [passage.num_bytes for passage in result.passages]
    assert sizes == sorted(sizes, reverse=True)


ALPHABETS = st.sampled_from(["ab", "abcdefgh ", "аб日🙂\n"])
EXCERPTS = st.lists(
    st.tuples(st.integers(0, 10**6), st.integers(1, 150), st.text("ab日\n", max_size=9)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=50)
@given(
    ALPHABETS,
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    EXCERPTS,
    st.integers(0, 100),
    st.sampled_from(["char", "byte"]),
)
def test_memorization_equals_exhaustive_search(alphabet, sizes, excerpts, seed, kind):
    chance = random.Random(seed)
    documents = ["".join(chance.choice(alphabet) for _ in range(size)) for size in sizes]
    text = ""
    for i, size, separator in excerpts:
        document = documents[i % len(documents)]
        text += document[i % len(document) :][:size] + separator
    index = index_of(documents, kind)
    result = measure_memorization(index, text)
    fraction, longest = naive_coverage(documents, text)
    assert result.fraction == pytest.approx(fraction)
    starts, stops, _ = find_matches(index, np.frombuffer(text.encode(), np.uint8))
    assert coverage(starts, stops, len(text.encode()))[1] == longest
    check_passages(result, documents)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_memorization_locates_a_planted_passage(kind, monkeypatch):
    monkeypatch.setattr(fingerprint_index, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(fingerprint_index, "CHUNK_TOKENS", 64)
    documents = [prose(seed, 60) for seed in range(5)]
    index = index_of(documents, kind, prose(99, 200))
    planted = documents[3][417:700]
    text = prose(50, 20) + "猫" + planted + "🙂" + prose(51, 20)
    result = measure_memorization(index, text)
    (passage,) = result.passages
    start = len(prose(50, 20)) + 1
    assert result.text[passage.start : passage.end].strip("🙂") in documents[3]
    assert passage.start <= start
    assert passage.end >= start + 283
    assert passage.end - passage.start <= 283 + 2
    assert passage.document == 4
    assert passage.char_offset == 417 - (start - passage.start)
    check_passages(result, documents)
    assert result.is_memorizing
    assert result.summary.startswith("Memorized: ")
    assert result.fraction == pytest.approx(passage.num_bytes / len(result.text.encode()))


def test_memorization_is_relative_to_held_out_text():
    idiom = "as it was said in the beginning of the book, and will be said again: "

    def documents_of(*seeds):
        return [idiom + prose(seed, 3) for seed in seeds]

    documents = documents_of(*range(300))
    index = index_of(documents, held_out="".join(documents_of(*range(1000, 1300))))
    unseen = measure_memorization(index, "".join(documents_of(*range(2000, 2009))))
    assert unseen.fraction > 0.3
    assert unseen.baseline.median_fraction == pytest.approx(unseen.fraction, abs=0.15)
    assert not unseen.is_memorizing
    assert unseen.summary.startswith("Not above the baseline: ")
    assert measure_memorization(index, "".join(documents[40:46])).is_memorizing
    assert not measure_memorization(index, prose(5000, 100)).passages


@pytest.mark.parametrize("size", [MIN_PASSAGE_BYTES - 1, MIN_PASSAGE_BYTES])
def test_passages_have_a_minimum_size(size):
    document = prose(1, 50)
    start = next(
        i
        for i in range(len(document))
        if document[i : i + size].isascii() and document[i - 1 : i].isascii()
    )
    index = index_of([document])
    for shift in range(16):  # at any offset to the windows of the index
        text = "~" * shift + document[start : start + size] + "~~~~"
        passages = measure_memorization(index, text).passages
        assert [passage.num_bytes for passage in passages] == [size] * (size == MIN_PASSAGE_BYTES)


def test_passages_do_not_extend_across_documents():
    first, second = prose(1, 20), prose(2, 20)
    index = index_of([first, second])
    result = measure_memorization(index, first[-60:] + second[:60])
    ranges = [(passage.start, passage.end, passage.document) for passage in result.passages]
    assert sorted(ranges) == [(0, 60, 1), (60, 120, 2)]
    check_passages(result, [first, second])
    assert index.document_starts.tolist() == [0, len(first.encode()) + 1]


def test_passages_are_the_longest_among_candidates():
    phrase = "and so it came to pass, as it had been written, that "
    document = "".join(
        f"{seed} times: {phrase}{prose(seed, 6)}" for seed in range(MAX_CANDIDATES - 4)
    )
    for seed in (0, 30, MAX_CANDIDATES - 5):
        text = "~" + phrase + prose(seed, 6)[:-1] + "~"
        (passage,) = measure_memorization(index_of([document]), text).passages
        assert (passage.start, passage.end) == (1, 1 + len(phrase + prose(seed, 6)) - 1)


def test_baseline_does_not_match_ends_of_documents():
    tail = "of which a hundred lines end so"
    assert len(tail) == MIN_PASSAGE_BYTES - 1
    index = index_of([prose(1, 20) + "A" + tail], held_out=prose(2, 20) + "B" + tail)
    result = measure_memorization(index, prose(2, 20) + "B" + tail + "~~~~")
    assert result.fraction == 0
    assert result.baseline.num_windows == 1
    assert result.baseline.median_fraction == 0
    assert result.baseline.median_longest == 0


def test_passages_in_many_positions_are_found():
    document = ("=" * 64 + "\n") * (4 * MAX_CANDIDATES) + "x" * 7 + "=" * 90
    result = measure_memorization(index_of([document]), "=" * 80)
    (passage,) = result.passages
    assert passage.num_bytes >= 64
    assert result.fraction >= 64 / 80
    check_passages(result, [document])


@pytest.mark.parametrize("text", ["", "猫", "a" * 15])
def test_short_texts_have_no_passages(text):
    index = index_of([prose(1, 20)], held_out=prose(2, 20))
    result = measure_memorization(index, text)
    assert result.passages == []
    assert result.fraction == 0.0
    assert result.is_memorizing is False
    assert result.longest == 0
    assert "there is no held-out text of equal length" in result.summary


def test_baseline_windows_have_the_size_of_the_text():
    document = prose(1, 300)
    held_out = document[:400] + prose(2, 500)
    index = index_of([document], held_out=held_out)
    baseline = measure_memorization(index, prose(3, 10)).baseline
    assert (baseline.num_windows, baseline.window_bytes) == (21, len(prose(3, 10).encode()))
    assert (baseline.median_fraction, baseline.median_longest) == (0.0, 0.0)
    baseline = measure_memorization(index, prose(3, 2000)).baseline
    assert baseline.num_windows == 1
    assert baseline.window_bytes == len(held_out.encode()) + 1
    assert baseline.median_fraction == pytest.approx(400 / baseline.window_bytes, rel=0.2)


def test_baseline_excludes_documents_of_both_splits():
    """Duplicated documents in the held-out text must not raise the baseline."""
    documents = [prose(seed, 60) for seed in range(40)]
    held_out = "".join(
        document for seed in range(20) for document in (documents[seed], prose(1000 + seed, 60))
    )
    index = index_of(documents, held_out=held_out)
    planted = measure_memorization(index, documents[7][200:700])
    assert planted.baseline.num_duplicated > 3
    assert planted.baseline.num_windows + planted.baseline.num_duplicated == 21
    assert planted.baseline.median_fraction < 0.2
    assert planted.is_memorizing
    assert f"{planted.baseline.num_duplicated} windows were excluded" in planted.summary
    only_duplicates = index_of(documents, held_out=documents[0] * 3)
    result = measure_memorization(only_duplicates, documents[7][200:700])
    assert (result.baseline.num_windows, result.is_memorizing) == (0, True)
    assert "excluded" in result.summary
    unseen = measure_memorization(index_of(documents, held_out=prose(1000, 900)), prose(7, 9))
    assert unseen.baseline.num_duplicated == 0


def test_index_of_a_large_text_is_incomplete(monkeypatch):
    monkeypatch.setattr(fingerprint_index, "BLOCK_TOKENS", 16)
    monkeypatch.setattr(fingerprint_index, "CHUNK_TOKENS", 64)
    monkeypatch.setattr(fingerprint_index, "MAX_INDEXED_BYTES", 1000)
    document = "".join(map(chr, range(33, 127))) * 3 + prose(1, 300)
    index = index_of([document], ends=False)
    assert (index.num_bytes, index.is_complete) == (1008, False)
    summary = measure_memorization(index, document[:60]).summary
    assert "(only the first 0 MB were searched)" in summary
    utf8 = document.encode()
    assert measure_memorization(index, utf8[940:1000].decode(errors="ignore")).passages
    assert not measure_memorization(index, utf8[1000:1040].decode(errors="ignore")).passages
    monkeypatch.setattr(fingerprint_index, "MAX_INDEXED_BYTES", len(utf8))
    assert index_of([document], ends=False).is_complete


def test_index_file_is_reused_and_replaced(tmp_path, monkeypatch):
    path, documents = tmp_path / "memorization.safetensors", [prose(seed, 100) for seed in range(3)]
    built = index_of(documents, path=path)
    content, modified = path.read_bytes(), path.stat().st_mtime_ns
    loaded = index_of(documents, path=path)
    assert path.stat().st_mtime_ns == modified
    for name in ("keys", "block_counts", "document_starts"):
        np.testing.assert_array_equal(getattr(built, name), getattr(loaded, name))
    text = documents[2][50:200]
    assert measure_memorization(loaded, text) == measure_memorization(built, text)
    for excerpt in (documents[0][30:60], documents[1][30:60]):  # the file has no text
        assert excerpt.encode() not in content
    index_of([*documents[:2], documents[2].replace("9", "8")], path=path)
    assert path.read_bytes() != content
    for damaged in (b"", content[: len(content) // 2], b"\x80\x04."):
        path.write_bytes(damaged)
        index = index_of(documents, path=path)
        assert measure_memorization(index, documents[1]).passages
        assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["memorization.safetensors"]

    def fail(*_, **__):
        raise PermissionError(13, "read only")

    monkeypatch.setattr(fingerprint_index, "save_file", fail)
    index = index_of(documents[:2], path=path)
    assert measure_memorization(index, documents[1]).passages


def test_memorization_of_a_run(tmp_path, capsys):
    text = prose(1, 400)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    model = nanogpt.train(tmp_path / "text.txt", tmp_path / "run", **TINY | SETTINGS)
    train_chars = len(text) - len(text) // 12
    result = model.inspect(text[1000:1400] + text[train_chars:]).memorization()
    (passage,) = result.passages  # none in the held-out end of the text
    assert (passage.start, passage.end) == (0, 400)
    assert (passage.document, passage.char_offset) == (1, 1000)
    assert result.is_memorizing
    assert (tmp_path / "run" / "memorization.safetensors").is_file()
    model_file = tmp_path / "alone.safetensors"
    model_file.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    assert run("inspect", model_file, "--text", "x", "--memorization") == 2
    assert "is not at hand" in capsys.readouterr().err
    excerpt = text[1000:1400]
    assert run("inspect", tmp_path / "run", "--text", excerpt, "--memorization", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["passages"][0]["line"] == text[:1000].count("\n") + 1


def test_passages_name_their_source_file(tmp_path, capsys):
    for i in range(30):
        folder = tmp_path / "texts" / f"{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.txt").write_text(prose(i, 20) + prose(77, 20), encoding="utf-8")
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\0\0")
    with pytest.warns(Notice, match="not text"):
        model = nanogpt.train(tmp_path / "texts", tmp_path / "run", **TINY | SETTINGS)
    num_trained = 0
    for i in range(30):
        passages = model.inspect(prose(i, 20)).memorization().passages
        if passages:  # else the file is held out
            assert {passage.source for passage in passages} == {f"{i % 3}/{i}.txt"}
            num_trained += 1
    assert num_trained > 20
    path = tmp_path / "texts" / "1" / "4.txt"
    page = tmp_path / "page.html"
    assert run("inspect", tmp_path / "run", path, "--memorization", "--html", page) == 0
    assert "1/4.txt" in capsys.readouterr().out
    assert "1/4.txt" in page.read_text()
    shutil.rmtree(tmp_path / "texts")
    passages = model.inspect(prose(4, 20)).memorization().passages
    assert {passage.source for passage in passages} == {""}


def test_memorization_needs_the_training_text(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(prose(1, 400), encoding="utf-8")
    nanogpt.train(tmp_path / "text.txt", tmp_path / "run", **TINY | SETTINGS)
    shutil.rmtree(cache_dir() / "tokens")
    # The tokens are prepared again from the text.
    assert nanogpt.load(tmp_path / "run").inspect(prose(1, 400)).memorization().is_memorizing
    shutil.rmtree(cache_dir() / "tokens")
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UserError, match=r"The training text of the model is gone: .*text\.txt"):
        nanogpt.load(tmp_path / "run").inspect("x").memorization()
    # Neurons are shown without excerpts.
    assert run("inspect", tmp_path / "run", "--text", "The cat", "--neurons") == 0
    assert "validation split" not in capsys.readouterr().out


def test_overwriting_a_run_removes_its_index(story, tmp_path, monkeypatch):
    monkeypatch.setattr(
        api, "MAX_MEMORIZATION_CHECK_BYTES", 0
    )  # skip the check at the end of training
    for overwrite in (False, True):
        nanogpt.train(story, tmp_path / "run", overwrite=overwrite, **TINY | SETTINGS)
        assert not (tmp_path / "run" / "memorization.safetensors").exists()
        nanogpt.load(tmp_path / "run").inspect("x").memorization()
        assert (tmp_path / "run" / "memorization.safetensors").exists()


def test_renderings_escape_text_and_mark_passages():
    document = "<script>alert('it is here')</script> & so on \x1b[31m, for a while"
    index = index_of([document + prose(1, 9)], held_out=prose(2, 20))
    result = measure_memorization(index, "<b>no</b> " + document + " <i>no</i>")
    fragment = inspection_html.memorization(result)
    page = inspection_html.page("<x>", fragment)
    assert "<script" not in page
    assert "<b>" not in page
    assert "\x1b" not in page
    (marked,) = re.findall(r"<mark>(.*?)</mark>", page)
    assert marked.startswith(str(escape(printable(document))))
    assert fragment in page
    from rich.console import Console

    from nanogpt.render.terminal import sanitize

    console = Console(width=200)
    with console.capture() as capture:
        console.print(inspection_terminal.memorization(result, sanitize))
    assert "Memorized" in capture.get()
    assert "\x1b[31m" not in capture.get()
