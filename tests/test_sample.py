"""What a person sees of sampling: texts in their order, JSON, and prompts and texts in turn at a terminal."""

import json
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import nanogpt
from nanogpt import checkpoint, sample
from nanogpt.config import SamplingConfig
from nanogpt.errors import UserError
from nanogpt.generate import decoder
from nanogpt.tokenizer import train_tokenizer

TEXT = "The cat saw the dog.\n"


@pytest.fixture
def file(make_model, tmp_path):
    """A model file whose texts are letters of TEXT, and do not end by themselves."""
    tokenizer = train_tokenizer("char", [TEXT])
    model = make_model(vocab_size=tokenizer.vocab_size, scale=1.0, context_length=32)
    path = tmp_path / "model.safetensors"
    checkpoint.save_model(path, model, tokenizer, {"step": 1, "text": "", "unused": [(len(set(TEXT)), tokenizer.vocab_size)]})
    return path


@pytest.fixture
def model(file):
    return nanogpt.load(file, dtype="float32")


def test_texts_are_printed_in_their_order_though_they_are_made_together(model, capsys):
    requests = sample.requests_for(model, "cat", 5, 7, False, SamplingConfig(max_tokens=20, stop=("t", "T")))
    sample.print_texts(model, "cat", requests)
    expected = ["cat" + "".join(model.stream("cat", seed=seed, max_tokens=20, stop=("t", "T"))) + "\n" for seed in range(7, 12)]
    heads = [f"--- {i + 1} of 5, seed {i + 7} ---\n" for i in range(5)]
    assert capsys.readouterr().out == "".join(head + text for head, text in zip(heads, expected, strict=True))
    assert len({len(text) for text in expected}) > 1  # some ended before others


def test_the_first_text_streams(model, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.append("".join(words)))
    sample.print_texts(model, "", sample.requests_for(model, "cat", 1, 7, False, SamplingConfig(max_tokens=20)))
    assert len([piece for piece in printed if len(piece) == 1]) == 20


def test_json_has_tokens_log_probabilities_and_the_end(model, capsys):
    settings = SamplingConfig(max_tokens=9, stop=("d", "e"), temperature=2.0)
    sample.print_json(model, "cat", sample.requests_for(model, "cat", 6, 7, False, settings))
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "cat"
    assert [one["seed"] for one in answer["samples"]] == list(range(7, 13))
    assert {one["finish"] for one in answer["samples"]} == {"stop", "length"}
    for one in answer["samples"]:
        spelled = model.tokenizer.decode(one["tokens"])
        assert one["text"] == (spelled[:-1] if one["finish"] == "stop" else spelled)
        assert len(one["logprobs"]) == len(one["tokens"]) <= 9
        assert all(value < 0 for value in one["logprobs"])


def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float32", "int8"])
def test_deterministic_texts_are_the_same_alone_and_among_others(file, monkeypatch, numba, dtype):
    if numba:
        pytest.importorskip("numba")
    else:
        without_numba(monkeypatch)
    model = nanogpt.load(file, dtype=dtype, deterministic=True)
    requests = [model.request(prompt, seed=seed, max_tokens=40) for seed, prompt in enumerate(["cat", "The dog saw", "cat", "a"] * 5)]

    def pieces(some):
        found = [[] for _ in some]
        for i, piece in model.write(some):
            found[i].append((piece.text, piece.token, piece.logprob, piece.finish))
        return found

    assert pieces(requests) == [pieces([request])[0] for request in requests]
    assert type(next(iter(model._decoders.values()))).__name__ == ("FastDecoder" if numba else "TorchDecoder")
    torch.use_deterministic_algorithms(False)


def test_streams_of_one_model_do_not_disturb_each_other(model):
    alone = ["".join(model.stream("cat", seed=seed, max_tokens=30)) for seed in (1, 2)]
    abandoned = model.stream("dog", seed=3)
    next(abandoned)
    streams = [model.stream("cat", seed=seed, max_tokens=30) for seed in (1, 2)]
    together = ["".join(some) for some in zip(*(zip(*streams, strict=True)), strict=True)]
    assert together == alone


def test_fast_and_plain_write_the_same_in_float32(file, monkeypatch):
    pytest.importorskip("numba")
    texts = ["".join(nanogpt.load(file, dtype="float32").stream("The", seed=seed, max_tokens=60)) for seed in range(4)]
    without_numba(monkeypatch)
    assert texts == ["".join(nanogpt.load(file, dtype="float32").stream("The", seed=seed, max_tokens=60)) for seed in range(4)]


def test_an_evaluation_in_int8_is_of_the_rounded_weights(file, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 5)
    losses = {}
    for dtype in ("float32", "int8"):
        model = nanogpt.load(file, dtype=dtype)
        losses[dtype] = model.evaluate(tmp_path / "text.txt").val_loss
        ids = [model.tokenizer.encode(TEXT)]
        written = [piece.logprob for _, piece in model.write([model.request(TEXT, seed=1, max_tokens=1, temperature=0)])]
        logits = model.logits(ids)[0, -1, : len(set(TEXT))]  # of those that were learned
        assert written[0] == pytest.approx(float(logits.max() - np.log(np.exp(logits).sum())), abs=1e-4 if dtype == "float32" else 1e-3)
    assert losses["int8"] != losses["float32"]
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.02)


def test_what_slows_writing_is_remarked(model, monkeypatch, tmp_path):
    tile = pytest.importorskip("nanogpt.generate.tile")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    for folder, told in ((tmp_path / "new" / "nanogpt" / "numba-of-before", True), (tile.kept_in(), False)):
        (folder / "some").mkdir(parents=True)
        (folder / "some" / "kernel.nbi").touch()
        assert ("Compiling" in (model.remark or "")) == told
    without_numba(monkeypatch)
    assert "nanogpt[fast]" in model.remark


def test_a_numba_that_does_not_start_is_done_without(model, monkeypatch, tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.4 or less. Got NumPy 2.6.')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert model.remark.endswith("Numba does not start: Numba needs NumPy 2.4 or less. Got NumPy 2.6.")
    assert isinstance(decoder.open_decoder(model._model, model._machine), decoder.TorchDecoder)


def test_rows_are_as_many_as_memory_holds(model, place, monkeypatch):
    monkeypatch.setattr(decoder, "free_memory", lambda device: 2 * 5.5 * 2 * 2 * 32 * 16 * 4)
    assert [decoder.open_decoder(model._model, place, "float32", rows).rows for rows in (1, 5, 6, 64)] == [1, 5, 5, 5]
    requests = [model.request("cat", seed=seed, max_tokens=3) for seed in range(9)]
    assert sum(piece.finish == "length" for _, piece in model.write(requests)) == 9


def test_lines_with_a_slash_change_settings():
    settings = SamplingConfig().model_dump() | {"n": 1, "seed": None}
    for line in ("/top-k 5", "/temperature 0.5", "/stop END ", "/seed 3", "/n 2", "/max_tokens 7"):
        settings = sample._changed(settings, line)
    assert {"top_k": 5, "temperature": 0.5, "stop": ("END",), "seed": 3, "n": 2, "max_tokens": 7}.items() <= settings.items()
    for line in ("/top-k", "/seed", "/n", "/stop"):
        settings = sample._changed(settings, line)
    assert {"top_k": None, "temperature": 0.5, "stop": (), "seed": None, "n": 1}.items() <= settings.items()
    for line in ("/top-k -1", "/top-k x", "/n 0", "/seed -1", "/nothing", "/logit-bias 3", "/"):
        with pytest.raises(UserError):
            sample._changed(settings, line)


class Terminal:
    """A person at a terminal with `nanogpt sample`."""

    def __init__(self, *words):
        self.own, theirs = os.openpty()
        command = [sys.executable, "-m", "nanogpt", "sample", *map(str, words)]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=self._own, env=os.environ | {"TERM": "dumb"})
        os.close(theirs)

    @staticmethod
    def _own():
        """Make it the terminal of the process, so that Ctrl-C reaches it."""
        import fcntl
        import termios

        signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored by what a shell began in the background
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read_until(self, end, seconds=300):
        """What appears on the screen until it ends so."""
        screen, until = "", time.monotonic() + seconds
        while not screen.endswith(end):
            ready, _, _ = select.select([self.own], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {end!r} within {seconds} s, but {screen!r}"
            screen += os.read(self.own, 1).decode("latin-1")
        return screen

    def type(self, keys):
        os.write(self.own, keys.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.own)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_prompts_and_texts_in_turn_at_a_terminal(file):
    for visit in range(2):
        terminal = Terminal(file, "--max-tokens", 30, "--dtype", "float32")
        try:
            assert "/help" in terminal.read_until("> ")
            if visit:
                terminal.type("\x10")  # the line before, of the last visit
                terminal.read_until("/quit")
                terminal.type("\x15\x04")  # emptied, and the end
                assert terminal.process.wait(30) == 0
                continue
            terminal.type("/seed 3\n")
            terminal.read_until("\n> ")
            terminal.type("The cat\n")
            expected = "The cat" + "".join(nanogpt.load(file, dtype="float32").stream("The cat", seed=3, max_tokens=30))
            assert expected.replace("\n", "\r\n") in terminal.read_until("\n> ")
            terminal.type("/nonsense\n")
            assert "There is no /nonsense" in terminal.read_until("\n> ")
            terminal.type("日\n")
            assert "U+65E5" in terminal.read_until("\n> ")
            terminal.type("/help\n")
            assert "/temperature" in terminal.read_until("\n> ")
            terminal.type("/max-tokens 100000000\n")
            terminal.read_until("\n> ")
            terminal.type("The cat\n")
            terminal.read_until("The cat\r\n")  # what was typed,
            terminal.read_until("The cat")  # and what is written
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.read_until("\n> ")
            terminal.type("/quit\n")
            assert terminal.process.wait(30) == 0
        finally:
            terminal.close()
