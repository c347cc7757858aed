"""Tests of generation from the user's side: printed samples, JSON and the interactive mode."""

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
from nanogpt import checkpoint
from nanogpt.cli import interactive
from nanogpt.config import SamplingConfig
from nanogpt.errors import UserError
from nanogpt.generate import decoder
from nanogpt.generate.decoder import create_decoder
from nanogpt.generate.torch_decoder import TorchDecoder
from nanogpt.tokenizer.tokenizer import train_tokenizer

TEXT = "The cat saw the dog.\n"


@pytest.fixture
def file(make_model, tmp_path):
    """A model file that generates characters of TEXT and never the end-of-text token."""
    tokenizer = train_tokenizer("char", [TEXT])
    model = make_model(vocab_size=tokenizer.vocab_size, scale=1.0, context_length=32)
    path = tmp_path / "model.safetensors"
    unseen = [(len(set(TEXT)), tokenizer.vocab_size)]
    summary = {"step": 1, "text": "", "unseen_token_ranges": unseen}
    checkpoint.save_model(path, model, tokenizer, summary)
    return path


@pytest.fixture
def model(file):
    return nanogpt.load(file, dtype="float32")


def test_stream_to_stdout_prints_samples_in_their_order(model, capsys):
    settings = SamplingConfig(max_tokens=20, stop=("t", "T"))
    requests = interactive.make_requests(model, "cat", 5, 7, False, settings)
    interactive.stream_to_stdout(model, "cat", requests)
    samples = [
        "cat" + "".join(model.stream("cat", seed=seed, max_tokens=20, stop=("t", "T"))) + "\n"
        for seed in range(7, 12)
    ]
    heads = [f"--- {i + 1} of 5, seed {i + 7} ---\n" for i in range(5)]
    expected = "".join(head + sample for head, sample in zip(heads, samples, strict=True))
    assert capsys.readouterr().out == expected
    assert len({len(sample) for sample in samples}) > 1  # some ended before others


def test_stream_to_stdout_streams_the_first_sample(model, monkeypatch):
    printed = []
    monkeypatch.setattr("builtins.print", lambda *args, **_: printed.append("".join(args)))
    settings = SamplingConfig(max_tokens=20)
    requests = interactive.make_requests(model, "cat", 1, 7, False, settings)
    interactive.stream_to_stdout(model, "", requests)
    assert len([chunk for chunk in printed if len(chunk) == 1]) == 20


def test_print_json_has_tokens_logprobs_and_finish_reasons(model, capsys):
    settings = SamplingConfig(max_tokens=9, stop=("d", "e"), temperature=2.0)
    requests = interactive.make_requests(model, "cat", 6, 7, False, settings)
    interactive.print_json(model, "cat", requests)
    output = json.loads(capsys.readouterr().out)
    assert output["prompt"] == "cat"
    assert [sample["seed"] for sample in output["samples"]] == list(range(7, 13))
    assert {sample["finish_reason"] for sample in output["samples"]} == {"stop", "length"}
    for sample in output["samples"]:
        decoded = model.tokenizer.decode(sample["tokens"])
        assert sample["text"] == (decoded[:-1] if sample["finish_reason"] == "stop" else decoded)
        assert len(sample["logprobs"]) == len(sample["tokens"]) <= 9
        assert all(value < 0 for value in sample["logprobs"])


def without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)


@pytest.mark.parametrize("numba", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "float32", "int8"])
def test_deterministic_samples_do_not_depend_on_the_batch(file, monkeypatch, numba, dtype):
    if numba:
        pytest.importorskip("numba")
    else:
        without_numba(monkeypatch)
    model = nanogpt.load(file, dtype=dtype, deterministic=True)
    requests = [
        model.make_request(prompt, seed=seed, max_tokens=40)
        for seed, prompt in enumerate(["cat", "The dog saw", "cat", "a"] * 5)
    ]

    def outputs(requests):
        found = [[] for _ in requests]
        for i, step in model.generate_many(requests):
            found[i].append((step.text, step.token_id, step.logprob, step.finish_reason))
        return found

    assert outputs(requests) == [outputs([request])[0] for request in requests]
    decoder = create_decoder(model.module, model.machine, dtype, len(requests))
    assert type(decoder).__name__ == ("NumbaDecoder" if numba else "TorchDecoder")
    torch.use_deterministic_algorithms(False)


def test_streams_of_one_model_are_independent(model):
    alone = ["".join(model.stream("cat", seed=seed, max_tokens=30)) for seed in (1, 2)]
    abandoned = model.stream("dog", seed=3)
    next(abandoned)
    streams = [model.stream("cat", seed=seed, max_tokens=30) for seed in (1, 2)]
    interleaved = zip(*streams, strict=True)
    assert ["".join(chunks) for chunks in zip(*interleaved, strict=True)] == alone


def test_both_decoders_generate_the_same_text_in_float32(file, monkeypatch):
    pytest.importorskip("numba")

    def texts():
        return [
            "".join(nanogpt.load(file, dtype="float32").stream("The", seed=seed, max_tokens=60))
            for seed in range(4)
        ]

    compiled = texts()
    without_numba(monkeypatch)
    assert compiled == texts()


def test_evaluation_in_int8_is_that_of_the_quantized_weights(file, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 5)
    losses = {}
    for dtype in ("float32", "int8"):
        model = nanogpt.load(file, dtype=dtype)
        losses[dtype] = model.evaluate(tmp_path / "text.txt").loss
        ids = [model.tokenizer.encode(TEXT)]
        request = model.make_request(TEXT, seed=1, max_tokens=1, temperature=0)
        logprobs = [step.logprob for _, step in model.generate_many([request])]
        logits = model.logits(ids)[0, -1, : len(set(TEXT))]  # without unseen tokens
        expected = float(logits.max() - np.log(np.exp(logits).sum()))
        tolerance = 1e-4 if dtype == "float32" else 1e-3
        assert logprobs[0] == pytest.approx(expected, abs=tolerance)
    assert losses["int8"] != losses["float32"]
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.02)


def test_startup_notice_of_compilation_and_missing_numba(model, monkeypatch, tmp_path):
    microkernel = pytest.importorskip("nanogpt.generate.numba_kernels.microkernel")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    outdated = tmp_path / "new" / "nanogpt" / "numba-outdated"
    for folder, is_compiling in ((outdated, True), (microkernel.cache_folder(), False)):
        (folder / "some").mkdir(parents=True)
        (folder / "some" / "kernel.nbi").touch()
        assert ("Compiling" in (model.startup_notice or "")) == is_compiling
    without_numba(monkeypatch)
    assert "nanogpt[fast]" in model.startup_notice


def test_create_decoder_works_without_a_broken_numba(model, monkeypatch, tmp_path):
    message = "Numba needs NumPy 2.4 or less. Got NumPy 2.6."
    (tmp_path / "numba.py").write_text(f"raise ImportError({message!r})")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    assert model.startup_notice.endswith(f"does not start: {message}")
    assert isinstance(create_decoder(model.module, model.machine), TorchDecoder)


def test_create_decoder_has_no_more_slots_than_memory_holds(model, machine, monkeypatch):
    # Twice the memory of 5.5 slots: 2 layers, keys and values, 32 positions of 16 float32.
    available = 2 * 5.5 * 2 * 2 * 32 * 16 * 4
    monkeypatch.setattr(decoder, "available_memory", lambda device: available)
    decoders = [create_decoder(model.module, machine, "float32", n) for n in (1, 5, 6, 64)]
    assert [decoder.num_slots for decoder in decoders] == [1, 5, 5, 5]
    requests = [model.make_request("cat", seed=seed, max_tokens=3) for seed in range(9)]
    assert sum(step.finish_reason == "length" for _, step in model.generate_many(requests)) == 9


def test_slash_commands_change_settings():
    settings = SamplingConfig().model_dump() | {"num_samples": 1, "seed": None}
    for line in (
        "/top-k 5",
        "/temperature 0.5",
        "/stop END ",
        "/seed 3",
        "/num-samples 2",
        "/max_tokens 7",
    ):
        settings = interactive.apply_setting_command(settings, line)
    assert {
        "top_k": 5,
        "temperature": 0.5,
        "stop": ("END",),
        "seed": 3,
        "num_samples": 2,
        "max_tokens": 7,
    }.items() <= settings.items()
    for line in ("/top-k", "/seed", "/num-samples", "/stop"):
        settings = interactive.apply_setting_command(settings, line)
    assert {
        "top_k": None,
        "temperature": 0.5,
        "stop": (),
        "seed": None,
        "num_samples": 1,
    }.items() <= settings.items()
    for line in (
        "/top-k -1",
        "/top-k x",
        "/num-samples 0",
        "/seed -1",
        "/nothing",
        "/logit-bias 3",
        "/",
    ):
        with pytest.raises(UserError):
            interactive.apply_setting_command(settings, line)


class Terminal:
    """A pseudo-terminal that runs `nanogpt sample`."""

    def __init__(self, *args):
        self.controller, terminal = os.openpty()
        command = [sys.executable, "-m", "nanogpt", "sample", *map(str, args)]
        self.process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            preexec_fn=self._make_controlling,
            env=os.environ | {"TERM": "dumb"},
        )
        os.close(terminal)

    @staticmethod
    def _make_controlling():
        """Make it the controlling terminal of the process, so that Ctrl-C reaches it."""
        import fcntl
        import termios

        # Background processes of a shell ignore SIGINT.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def read_until(self, end, seconds=300):
        """Read the output until it ends with `end`; return it."""
        output, deadline = "", time.monotonic() + seconds
        while not output.endswith(end):
            timeout = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.controller], [], [], timeout)
            assert ready, f"no {end!r} within {seconds} s, but {output!r}"
            output += os.read(self.controller, 1).decode("latin-1")
        return output

    def type(self, keys):
        os.write(self.controller, keys.encode())

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.controller)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_interactive_mode_at_a_terminal(file):
    for run in range(2):
        terminal = Terminal(file, "--max-tokens", 30, "--dtype", "float32")
        try:
            assert "/help" in terminal.read_until("> ")
            if run:
                terminal.type("\x10")  # the last line of the previous run, from the history
                terminal.read_until("/quit")
                terminal.type("\x15\x04")  # clear the line, then end of input
                assert terminal.process.wait(30) == 0
                continue
            terminal.type("/seed 3\n")
            terminal.read_until("\n> ")
            terminal.type("The cat\n")
            expected = "The cat" + "".join(
                nanogpt.load(file, dtype="float32").stream("The cat", seed=3, max_tokens=30)
            )
            assert expected.replace("\n", "\r\n") in terminal.read_until("\n> ")
            terminal.type("/nonsense\n")
            assert "Unknown setting: /nonsense" in terminal.read_until("\n> ")
            terminal.type("日\n")
            assert "U+65E5" in terminal.read_until("\n> ")
            terminal.type("/help\n")
            assert "/temperature" in terminal.read_until("\n> ")
            terminal.type("/max-tokens 100000000\n")
            terminal.read_until("\n> ")
            terminal.type("The cat\n")
            terminal.read_until("The cat\r\n")  # the echo
            terminal.read_until("The cat")  # the sample
            time.sleep(0.3)
            terminal.type("\x03")
            terminal.read_until("\n> ")
            terminal.type("/quit\n")
            assert terminal.process.wait(30) == 0
        finally:
            terminal.close()
