"""Tests of terminal output: content, width and control characters."""

import errno
import io
import math
import os
import sys

import pytest

from nanogpt.config import Config, DataConfig
from nanogpt.diagnosis import Diagnosis
from nanogpt.errors import UserError
from nanogpt.evaluate import EvalLoss
from nanogpt.formatting import format_duration, sanitize
from nanogpt.render.terminal import Terminal, baseline_table
from nanogpt.run_folder import RunFolder
from nanogpt.training.events import EvalEnd, SampleEnd, StepEnd, TrainEnd, TrainStart
from nanogpt.training.jsonl_logger import log_event

DATA = {
    "train_tokens": 100,
    "train_bytes": 100,
    "val_bytes": 10,
    "num_distinct_tokens": 7,
    "split_description": "the last 10 of 110 bytes are held out",
    "sources": ["/x/b[old].txt"],
}


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return Screen()


@pytest.fixture
def terminal(screen):
    terminal = Terminal(screen)
    terminal(
        TrainStart(
            "runs/my book [draft]", 0, Config(), 10_000_000, DATA, "CPU", 1e8, 1e12, [], 3e9, 16e9
        )
    )
    yield terminal
    terminal.close()


def test_progress_line_fits_80_columns(terminal):
    terminal(StepEnd(4999, 0.9998, 1.2345, 1e-3, 1.0, 8192, 123_456.0, 1.0))
    terminal(EvalEnd(4999, 1.2345, 1.4, 2.5, 100, True, 1.0))
    terminal.seconds_left = lambda: 5025.0
    line = terminal.format_line(4999)
    assert (
        line
        == "4,999/5,000  123,456 tok/s  train 1.234 (1.781)  val 1.400 (2.500)  1 h 23 min left"
    )
    assert len(line) <= 84
    terminal.seconds_left = lambda: 59.0
    assert len(terminal.format_line(4999)) <= 80


def test_names_are_verbatim_and_quoted_in_commands(terminal, screen):
    assert "b[old].txt: 110 bytes, 7 distinct chars" in screen.getvalue()
    loss = EvalLoss(140.0, 100, 100.0)
    terminal(
        TrainEnd(
            10,
            5,
            loss,
            {"uniform": 2.0, "trigram": 1.0},
            Diagnosis("healthy", "Healthy."),
            90.0,
            1.75,
        )
    )
    assert "nanogpt sample 'runs/my book [draft]'" in screen.getvalue()


def test_samples_cannot_control_the_terminal(terminal, screen):
    terminal(SampleEnd(1, "a\x1b]0;title\x07b [red]c :cat:\r\n"))
    assert "a\u241b]0;title\u2407b [red]c :cat:\u240d" in screen.getvalue()


def test_baseline_table_is_sorted_by_loss(capsys):
    from rich.console import Console

    Console(width=80).print(
        baseline_table(
            EvalLoss(150.0, 100, 50.0),
            {"uniform": 4.0, "unigram": 3.0, "bigram": 1.2},
            "this model",
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == [
        "uniform baseline",
        "unigram baseline",
        "this model",
        "bigram baseline",
    ]
    assert lines[3].split()[-2:] == ["1.5000", f"{1.5 * 2 / math.log(2):.4f}"]
    Console(width=100).print(
        baseline_table(
            EvalLoss(150.0, 100, 50.0, 10.0), {"uniform": 400.0, "unigram": 10.0}, "this model"
        )
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("perplexity per word")
    assert [line.split()[-1] for line in lines[1:4]] == ["inf", "2.688e+43", f"{math.exp(15):,.0f}"]


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("byte", "1,234 distinct bytes"),
        ("bpe", "1,234 distinct tokens (bpe)"),
        ("/x/tokenizer.json", "tokens (tokenizer.json)"),
    ],
)
def test_tokens_are_named_by_tokenizer(terminal, screen, tokenizer, expected):
    terminal(
        TrainStart(
            "run",
            0,
            Config(data=DataConfig(tokenizer=tokenizer)),
            1000,
            DATA | {"num_distinct_tokens": 1234},
            "CPU",
            1.0,
            1.0,
            [],
            1.0,
            None,
        )
    )
    assert expected in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (5025, "1 h 23 min")],
)
def test_format_duration(seconds, expected):
    assert format_duration(seconds) == expected


def test_sanitize_replaces_only_control_characters():
    assert sanitize("Grüße, 日本 👩‍👩‍👧\n\t") == "Grüße, 日本 👩\ufffd👩\ufffd👧\n\t"
    assert sanitize("\x00\x1b\x9b") == "\u2400\u241b\ufffd"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a broken pipe is another error on Windows")
def test_terminal_survives_a_broken_pipe(tmp_path):
    read_end, write_end = os.pipe()
    os.close(read_end)
    before = os.fstat(sys.stdout.fileno())
    with os.fdopen(write_end, "w", encoding="utf-8") as file:
        terminal = Terminal(file)
        terminal(SampleEnd(1, "first"))
        terminal(SampleEnd(2, "second"))
        assert os.fstat(file.fileno()).st_ino == os.stat(os.devnull).st_ino
    assert os.fstat(sys.stdout.fileno()).st_ino == before.st_ino


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_jsonl_logger_reports_a_full_disk(tmp_path, monkeypatch, number):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(UserError, match="The disk is full"):
        log_event(RunFolder(tmp_path), SampleEnd(1, "text"))
