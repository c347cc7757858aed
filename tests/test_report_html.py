"""report.html: everything is on it, its numbers are those of the run, and nothing in it can act."""

import json
import os
import re
import shlex
import shutil
import signal
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from conftest import TINY

import nanogpt
from nanogpt import checkpoint
from nanogpt.cli import app
from nanogpt.errors import Notice
from nanogpt.library import training
from nanogpt.report import html, read_records, write_report
from nanogpt.report.curves import POOLS, Axis, Curve, chart, pooled, short

HOSTILE = '<img src=x onerror="alert(1)"> & \'"'
SCRIPT = "</pre></script><script>alert(2)</script>\x00\x1b[2J\ud800 end"


class Page(HTMLParser):
    """The elements of a page with their attributes, and the text of each."""

    VOID = ("meta", "path", "input")

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag  # or something was not closed

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, tag):
        return "".join(self.texts.get(tag, []))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp(HOSTILE.replace("/", ""))
    (folder / "text.txt").write_text("The cat saw the dog in the barn.\n" * 100)
    nanogpt.train(folder / "text.txt", folder / "run", **TINY | {"steps": 30, "eval_every": 10, "dropout": 0.0})
    return folder / "run"


@pytest.fixture
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_a_run_leaves_its_report_and_it_can_be_made_again(run):
    assert (run / "report.html").read_text(encoding="utf-8") == html.report(run)
    assert len(html.report(run).encode()) < 100_000


def test_it_has_all_its_parts_and_the_numbers_of_the_run(run, page):
    assert page.open == []
    assert page.text("h2") == "".join(("Curves", "Compared with counting", "What it wrote", "Does it copy?", "Text", "Machine", "Settings", "Again"))
    summary, parameters = checkpoint.describe(run)
    assert parameters == sum(p.numel() for p in checkpoint.load(run).model.parameters())
    assert f"{parameters / 1e6:.3g} million parameters" in page.text("p")
    assert re.sub("<[^>]*>", "", re.findall('<div class="verdict .*?<p>(.*?)</p>', html.report(run))[0]) == summary["verdict"]["sentence"]
    assert summary["machine"] in page.text("td")
    cells = page.texts["td"]
    assert f"{summary['bits_per_byte']:.4f}" in cells
    assert all(f"{loss:.4f}" in cells for loss in summary["baselines"].values())
    assert [text for text in page.texts["h3"] if text.startswith("Step")] == [
        f"Step {record['step']}, validation loss {record['val_loss']:.3f}" for record in read_records(run / "metrics.jsonl") if "val_loss" in record
    ]
    samples = [record["text"] for record in read_records(run / "samples.jsonl")]
    assert "".join(samples) in page.text("pre")


def test_it_shows_what_the_last_sample_copied(run, tmp_path):
    """A sample planted as the last one: what of it stands in the training text is found, where it stands there, and nothing else."""
    with (run / "samples.jsonl").open() as file:
        lines = file.readlines()
    planted = "Nobody wrote this. The cat saw the dog in the barn.\nThe cat saw the dog in the barn.\n But this neither."
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").write_text("".join(lines) + json.dumps({"step": 30, "text": planted}) + "\n")
    model = nanogpt.load(tmp_path / "run")
    training._look_for_copies(tmp_path / "run", model, 3000)
    found = json.loads((tmp_path / "run" / "copies.json").read_text())
    assert [planted[p["start"] : p["end"]] for p in found["passages"]] == [" The cat saw the dog in the barn.\nThe cat saw the dog in the barn.\n"[1:]]
    page = Page(html.report(tmp_path / "run"))
    assert found["sentence"] in page.text("p")
    assert page.texts["q"] == ["The cat saw the dog in the barn.\nThe cat saw the dog in the barn.\n"]
    assert "text.txt, line 1" in page.text("td")
    training._look_for_copies(tmp_path / "run", model, training.CHECKED_BYTES + 1)  # a text that takes too long
    assert "Does it copy?" not in Page(html.report(tmp_path / "run")).text("h2")


def test_the_command_repeats_the_run(run, page, tmp_path, monkeypatch):
    command = next(text for text in page.texts["code"] if text.startswith("nanogpt train"))
    words = [word.replace(f"{run}-again", str(tmp_path / "again")) for word in shlex.split(command)]
    app(words[1:], exit_on_error=False, print_error=False, result_action="return_value")
    losses = [[record["train_loss"] for record in read_records(folder / "metrics.jsonl")] for folder in (run, tmp_path / "again")]
    assert losses[0] == losses[1]


def test_it_asks_the_network_for_nothing_and_runs_only_its_own_script(run, page):
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "href", "srcset", "data", "action", "background"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text("style")
    assert "@import" not in page.text("style")
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert [tag for tag, _ in page.elements].count("script") == 2


def test_what_comes_from_outside_cannot_act(run, tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    for name in ("config.toml", "metrics.jsonl", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    about = json.loads((run / "text.json").read_text()) | {"sources": [HOSTILE, SCRIPT], "split": SCRIPT, "baselines": {SCRIPT: 1.0}, "fingerprint": SCRIPT}
    (folder / "text.json").write_text(json.dumps(about))
    (folder / "samples.jsonl").write_text(json.dumps({"step": 10, "text": SCRIPT}) + "\n" + json.dumps({"step": 20, "text": HOSTILE}) + "\n")
    write_report(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.text("h1") == folder.name
    assert page.text("title") == folder.name
    assert "</pre></script><script>alert(2)</script>\ufffd\ufffd[2J\ufffd end" in page.text("pre")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(tag == "img" or any(name.startswith("on") for name in attributes) for tag, attributes in page.elements)


@pytest.mark.parametrize("name", ["config.toml", "text.json", "metrics.jsonl", "samples.jsonl", "model.safetensors", "copies.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"step": 1}\n', b"\xff\xfe[1]\n{", b'{"step": 3, "text": 3, "val_loss": "x", "bits_per_byte": NaN}\n'])
def test_what_is_missing_or_damaged_is_left_out(run, tmp_path, name, content):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    page = Page(html.report(tmp_path))
    assert page.open == []
    assert "Settings" in page.text("h2")
    assert ("Curves" in page.text("h2")) == (name != "metrics.jsonl")


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    assert "Not evaluated yet" in Page(html.report(tmp_path)).text("p")


def test_an_interrupted_run_says_how_to_go_on(story, tmp_path):
    def stop(event):
        if getattr(event, "step", 0) == 12 and hasattr(event, "train_loss"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "my run", on_event=stop, **TINY | {"steps": 30, "eval_every": 10, "dropout": 0.0})
    page = Page((tmp_path / "my run" / "report.html").read_text())
    assert f"nanogpt train --resume --out '{tmp_path / 'my run'}'" in page.texts["code"]
    assert "stopped after step 12, 40% of it over" in page.text("p")


def test_a_report_that_cannot_be_written_is_no_end_of_a_run(run, tmp_path, monkeypatch):
    monkeypatch.setattr(html, "write_text", lambda path, text: (_ for _ in ()).throw(OSError("no room")))
    with pytest.warns(Notice, match="no room"):
        write_report(tmp_path)


def test_a_long_run_takes_no_longer(tmp_path):
    step = {"progress": 0.5, "train_loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 100, "tokens_per_second": 1e4, "seconds": 1.0}
    lines = [json.dumps({"step": i} | step) for i in range(1, 50_001)]
    lines.insert(7_000, json.dumps({"step": 7_000, "val_loss": 1.0, "bits_per_byte": 1.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = read_records(tmp_path / "metrics.jsonl", 400)
    steps = [record["step"] for record in records if "val_loss" not in record]
    assert len(steps) == 400
    assert steps[-1] == 50_000
    assert {b - a for a, b in pairwise(steps)} == {125}
    assert len(records) == 401
    assert len(read_records(tmp_path / "metrics.jsonl")) == 50_001
    assert len(html.report(tmp_path)) < 150_000


def test_records_end_where_a_dying_machine_ended_them(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "text": "a\u2028b"}\n{"step": 2, "te')
    assert read_records(tmp_path / "samples.jsonl") == [{"step": 1, "text": "a\u2028b"}]


def test_pools_are_means_with_their_extremes():
    x = list(range(1, 10_001))
    y = [float(i % 7) for i in x]
    curve = pooled("", "c0", x, y)
    assert len(curve.x) == POOLS
    assert curve.y[0] == pytest.approx(sum(y[:41]) / 41)
    assert (min(curve.low), max(curve.high)) == (0.0, 6.0)
    assert sum(curve.x) / POOLS == pytest.approx(5000.5, rel=1e-3)
    assert pooled("", "c0", [1, 2], [3.0, 4.0]) == Curve("", "c0", [1, 2], [3.0, 4.0])


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 1000, False, [0, 200, 400, 600, 800, 1000]),
        (1.4, 4.3, False, [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        (0.3, 40, True, [0.5, 1, 2, 5, 10, 20]),
        (1.2, 6, True, [1.5, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_numbers(low, high, log, ticks):
    assert Axis(low, high, log).ticks(6) == pytest.approx(ticks)


@pytest.mark.parametrize(("low", "high"), [(0.11, 0.19), (1, 1e9), (5, 5.001), (1e-6, 2e-6)])
@pytest.mark.parametrize("log", [False, True])
def test_there_are_always_a_few_ticks_on_the_scale(low, high, log):
    ticks = Axis(low, high, log).ticks(6)
    assert 2 <= len(ticks) <= 10
    assert all(low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9) for tick in ticks)


def test_a_chart_draws_each_point_at_its_place():
    drawn = chart("T", "u", [Curve("one", "c0", [0, 50, 100], [0.0, 1.0, 2.0])], 100, zero=True)
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', drawn)
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert [x for x, _ in points] == [0, 500, 1000]
    top = 2.1  # five hundredths of room
    assert [y for _, y in points] == pytest.approx([1000, 1000 - 1000 / top, 1000 - 2000 / top], abs=0.1)
    assert 'aria-label="T, u. one: 0 at step 0, 2 at step 100."' in drawn


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0"), (1234.5, "1,234"), (12.3456, "12.35"), (0.0003, "0.0003"), (0.00001, "1e-5"), (0.015, "0.015"), (1e-10, "1e-10")]
)
def test_numbers_are_short(value, said):
    assert short(value) == said
