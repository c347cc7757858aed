"""What a person reads is right, fits, and cannot command the terminal."""

import errno
import io
import math
import os
import sys

import pytest

from nanogpt.config import Config, TextConfig
from nanogpt.errors import UserError
from nanogpt.evaluate import Loss, Verdict
from nanogpt.report import Evaluated, Finished, RunLog, Sampled, Started, Stepped, Terminal, duration, loss_table, printable

ABOUT = {"train_tokens": 100, "train_bytes": 100, "val_bytes": 10, "symbols": 7, "split": "the last 10 of 110 bytes are held out", "sources": ["/x/b[old].txt"]}


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
    terminal(Started("runs/my book [draft]", 0, Config(), 10_000_000, ABOUT, "CPU", 1e8, 1e12, [], 3e9, 16e9))
    yield terminal
    terminal.close()


def test_the_progress_line_fits_80_columns_and_tells_all(terminal):
    terminal(Stepped(4999, 0.9998, 1.2345, 1e-3, 1.0, 8192, 123_456.0, 1.0))
    terminal(Evaluated(4999, 1.2345, 1.4, 2.5, 100, True, 1.0))
    terminal.left = lambda: 5025.0
    line = terminal.describe(4999, 1.2345)
    assert line == "4,999/5,000  123,456 tok/s  train 1.234 (1.781)  val 1.400 (2.500)  1 h 23 min left"
    assert len(line) <= 84
    terminal.left = lambda: 59.0
    assert len(terminal.describe(4999, 1.2345)) <= 80


def test_names_are_shown_as_they_are_and_quoted_in_commands(terminal, screen):
    assert "b[old].txt: 110 bytes, 7 different chars" in screen.getvalue()
    loss = Loss(140.0, 100, 100.0)
    terminal(Finished(10, 5, loss, {"uniform": 2.0, "trigram": 1.0}, Verdict("healthy", "Healthy."), 90.0, 1.75))
    assert "nanogpt sample 'runs/my book [draft]'" in screen.getvalue()


def test_samples_cannot_command_the_terminal(terminal, screen):
    terminal(Sampled(1, "a\x1b]0;title\x07b [red]c\r\n"))
    assert "a\u241b]0;title\u2407b [red]c\u240d" in screen.getvalue()


def test_a_table_puts_the_model_between_what_it_beats_and_what_beats_it(capsys):
    from rich.console import Console

    Console(width=80).print(loss_table(Loss(150.0, 100, 50.0), {"uniform": 4.0, "unigram": 3.0, "bigram": 1.2}, "this model"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:5]] == ["uniform baseline", "unigram baseline", "this model", "bigram baseline"]
    assert lines[3].split()[-2:] == ["1.5000", f"{1.5 * 2 / math.log(2):.4f}"]
    Console(width=100).print(loss_table(Loss(150.0, 100, 50.0, 10.0), {"uniform": 400.0, "unigram": 10.0}, "this model"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("perplexity per word")
    assert [line.split()[-1] for line in lines[1:4]] == ["inf", "2.688e+43", f"{math.exp(15):,.0f}"]


@pytest.mark.parametrize(
    ("tokenizer", "said"), [("byte", "1,234 different bytes"), ("bpe", "1,234 different tokens (bpe)"), ("/x/tokenizer.json", "tokens (tokenizer.json)")]
)
def test_every_kind_of_token_has_a_name(terminal, screen, tokenizer, said):
    terminal(Started("run", 0, Config(text=TextConfig(tokenizer=tokenizer)), 1000, ABOUT | {"symbols": 1234}, "CPU", 1.0, 1.0, [], 1.0, None))
    assert said in screen.getvalue()


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (5025, "1 h 23 min")])
def test_durations_are_said_as_people_say_them(seconds, said):
    assert duration(seconds) == said


def test_printable_leaves_text_alone():
    assert printable("Grüße, 日本 👩‍👩‍👧\n\t") == "Grüße, 日本 👩\ufffd👩\ufffd👧\n\t"
    assert printable("\x00\x1b\x9b") == "\u2400\u241b\ufffd"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a broken pipe is another error on Windows")
def test_a_reader_who_leaves_ends_neither_the_run_nor_standard_output(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    before = os.fstat(sys.stdout.fileno())
    with os.fdopen(writing, "w", encoding="utf-8") as file:
        terminal = Terminal(file)
        terminal(Sampled(1, "nobody reads this"))
        terminal(Sampled(2, "nor this"))
        assert os.fstat(file.fileno()).st_ino == os.stat(os.devnull).st_ino
    assert os.fstat(sys.stdout.fileno()).st_ino == before.st_ino


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_record_that_finds_no_room_says_so(tmp_path, monkeypatch, number):
    def full(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    log = RunLog(tmp_path)
    monkeypatch.setattr(type(tmp_path), "open", full)
    with pytest.raises(UserError, match="The disk is full"):
        log(Sampled(1, "text"))
