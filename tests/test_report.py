"""Tests of the report: completeness, numbers, escaping, size, and its charts."""

import json
import os
import re
import shlex
import shutil
import signal
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers import TINY

import nanogpt
from nanogpt import api, checkpoint
from nanogpt.cli.app import app
from nanogpt.errors import Notice
from nanogpt.render import report
from nanogpt.render.charts import MAX_POINTS, Axis, Chart, Curve, downsample, format_tick
from nanogpt.render.report import write_report
from nanogpt.run_folder import read_jsonl, read_last_records

HOSTILE = '<img src=x onerror="alert(1)"> & \'"'
SCRIPT = "</pre></script><script>alert(2)</script>\x00\x1b[2J\ud800 end"


class Page(HTMLParser):
    """Parser that collects the elements of a page, their attributes and their text."""

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
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def text(self, tag):
        return "".join(self.texts.get(tag, []))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp(HOSTILE.replace("/", ""))
    (folder / "text.txt").write_text("The cat saw the dog in the barn.\n" * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        nanogpt.train(
            folder / "text.txt",
            folder / "run",
            **TINY | {"steps": 30, "eval_every": 10, "dropout": 0.0},
        )
    return folder / "run"


@pytest.fixture
def page(run):
    return Page((run / "report.html").read_text(encoding="utf-8"))


def test_report_is_written_and_reproducible(run):
    assert (run / "report.html").read_text(encoding="utf-8") == report.report(run)
    assert len(report.report(run).encode()) < 100_000


def test_report_has_all_sections_and_numbers(run, page):
    assert page.open == []
    assert page.text("h2") == "".join(
        (
            "Curves",
            "N-gram baselines",
            "Samples",
            "Memorization",
            "Data",
            "Machine",
            "Settings",
            "Reproduce this run",
        )
    )
    summary, parameters = checkpoint.read_metadata(run)
    assert parameters == sum(p.numel() for p in checkpoint.load(run).model.parameters())
    assert f"{parameters / 1e6:.3g} million parameters" in page.text("p")
    assert (
        re.sub(
            "<[^>]*>",
            "",
            re.findall('(?s)<div class="diagnosis .*?<p>(.*?)</p>', report.report(run))[0],
        )
        == summary["diagnosis"]["summary"]
    )
    assert summary["machine"] in page.text("td")
    cells = page.texts["td"]
    assert f"{summary['bits_per_byte']:.4f}" in cells
    assert all(f"{loss:.4f}" in cells for loss in summary["baselines"].values())
    assert [text for text in page.texts["h3"] if text.startswith("Step")] == [
        f"Step {record['step']}, validation loss {record['val_loss']:.3f}"
        for record in read_jsonl(run / "metrics.jsonl")
        if "val_loss" in record
    ]
    samples = [record["text"] for record in read_jsonl(run / "samples.jsonl")]
    assert "".join(samples) in page.text("pre")


def test_report_shows_memorized_passages(run, tmp_path):
    """Plant a sample as the last one; exactly its memorized part is found, with its source."""
    with (run / "samples.jsonl").open() as file:
        lines = file.readlines()
    planted = (
        "Nobody wrote this. The cat saw the dog in the barn.\n"
        "The cat saw the dog in the barn.\n But this neither."
    )
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "samples.jsonl").write_text(
        "".join(lines) + json.dumps({"step": 30, "text": planted}) + "\n"
    )
    model = nanogpt.load(tmp_path / "run")
    api.check_memorization(tmp_path / "run", model, 3000)
    found = json.loads((tmp_path / "run" / "memorization.json").read_text())
    assert [planted[p["start"] : p["end"]] for p in found["passages"]] == [
        " The cat saw the dog in the barn.\nThe cat saw the dog in the barn.\n"[1:]
    ]
    page = Page(report.report(tmp_path / "run"))
    assert found["summary"] in page.text("p")
    assert page.texts["q"] == [
        "The cat saw the dog in the barn.\nThe cat saw the dog in the barn.\n"
    ]
    assert "text.txt, line 1" in page.text("td")
    too_large = api.MAX_MEMORIZATION_CHECK_BYTES + 1
    api.check_memorization(tmp_path / "run", model, too_large)
    assert "Memorization" not in Page(report.report(tmp_path / "run")).text("h2")


def test_train_command_repeats_the_run(run, page, tmp_path, monkeypatch):
    command = next(text for text in page.texts["code"] if text.startswith("nanogpt train"))
    args = [word.replace(f"{run}-again", str(tmp_path / "again")) for word in shlex.split(command)]
    app(args[1:], exit_on_error=False, print_error=False, result_action="return_value")
    losses = [
        [record["train_loss"] for record in read_jsonl(folder / "metrics.jsonl")]
        for folder in (run, tmp_path / "again")
    ]
    assert losses[0] == losses[1]


def test_report_loads_nothing_and_runs_only_its_script(run, page):
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "href", "srcset", "data", "action", "background"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text("style")
    assert "@import" not in page.text("style")
    policy = next(
        attributes["content"]
        for tag, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert [tag for tag, _ in page.elements].count("script") == 2


def test_report_escapes_hostile_text(run, tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    for name in ("config.toml", "metrics.jsonl", "model.safetensors"):
        (folder / name).write_bytes((run / name).read_bytes())
    data = json.loads((run / "data.json").read_text()) | {
        "sources": [HOSTILE, SCRIPT],
        "split_description": SCRIPT,
        "baselines": {SCRIPT: 1.0},
        "fingerprint": SCRIPT,
    }
    (folder / "data.json").write_text(json.dumps(data))
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 10, "text": SCRIPT})
        + "\n"
        + json.dumps({"step": 20, "text": HOSTILE})
        + "\n"
    )
    write_report(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.text("h1") == folder.name
    assert page.text("title") == folder.name
    assert "</pre></script><script>alert(2)</script>\u2400\u241b[2J\ufffd end" in page.text("pre")
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not any(
        tag == "img" or any(name.startswith("on") for name in attributes)
        for tag, attributes in page.elements
    )


@pytest.mark.parametrize(
    "name",
    [
        "config.toml",
        "data.json",
        "metrics.jsonl",
        "samples.jsonl",
        "model.safetensors",
        "memorization.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b'{"step": 1}\n',
        b"\xff\xfe[1]\n{",
        b'{"step": 3, "text": 3, "val_loss": "x", "bits_per_byte": NaN}\n',
    ],
)
def test_report_leaves_out_damaged_files(run, tmp_path, name, content):
    for path in run.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    page = Page(report.report(tmp_path))
    assert page.open == []
    assert "Settings" in page.text("h2")
    assert ("Curves" in page.text("h2")) == (name != "metrics.jsonl")


def test_report_of_an_empty_folder(tmp_path):
    assert "Not evaluated yet" in Page(report.report(tmp_path)).text("p")


def test_report_of_an_interrupted_run_has_the_resume_command(story, tmp_path):
    def stop(event):
        if getattr(event, "step", 0) == 12 and hasattr(event, "train_loss"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(
            story,
            tmp_path / "my run",
            on_event=stop,
            **TINY | {"steps": 30, "eval_every": 10, "dropout": 0.0},
        )
    page = Page((tmp_path / "my run" / "report.html").read_text())
    assert f"nanogpt train --resume --out '{tmp_path / 'my run'}'" in page.texts["code"]
    assert "Stopped after step 12, 40% complete." in page.text("p")


def test_report_that_cannot_be_written_is_a_warning(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "write_text", lambda path, text: (_ for _ in ()).throw(OSError("no room"))
    )
    with pytest.warns(Notice, match="no room"):
        write_report(tmp_path)


def test_report_of_a_long_run_is_small(tmp_path):
    step = {
        "progress": 0.5,
        "train_loss": 1.0,
        "learning_rate": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100,
        "tokens_per_second": 1e4,
        "seconds": 1.0,
    }
    lines = [json.dumps({"step": i} | step) for i in range(1, 50_001)]
    lines.insert(7_000, json.dumps({"step": 7_000, "val_loss": 1.0, "bits_per_byte": 1.0}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = read_jsonl(tmp_path / "metrics.jsonl", 400)
    steps = [record["step"] for record in records if "val_loss" not in record]
    assert len(steps) == 400
    assert steps[-1] == 50_000
    assert {b - a for a, b in pairwise(steps)} == {125}
    assert len(records) == 401
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 50_001
    assert len(report.report(tmp_path)) < 150_000


def test_read_jsonl_stops_at_a_damaged_line(tmp_path):
    (tmp_path / "samples.jsonl").write_text('{"step": 1, "text": "a\u2028b"}\n{"step": 2, "te')
    assert read_jsonl(tmp_path / "samples.jsonl") == [{"step": 1, "text": "a\u2028b"}]


def test_read_jsonl_keeps_empty_records_and_undecodable_bytes(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{}\n{"step": 1, "text": "\xff"}\n{"step": 2}\n')
    assert read_jsonl(path) == [{}, {"step": 1, "text": "\ufffd"}, {"step": 2}]
    assert read_last_records(path, 1000) == [{"step": 2}]


def test_downsample_keeps_means_and_extremes():
    x = list(range(1, 10_001))
    y = [float(i % 7) for i in x]
    curve = downsample("", "c0", x, y)
    assert len(curve.x) == MAX_POINTS
    assert curve.y[0] == pytest.approx(sum(y[:41]) / 41)
    assert (min(curve.low), max(curve.high)) == (0.0, 6.0)
    assert sum(curve.x) / MAX_POINTS == pytest.approx(5000.5, rel=1e-3)
    assert downsample("", "c0", [1, 2], [3.0, 4.0]) == Curve("", "c0", [1, 2], [3.0, 4.0])


@pytest.mark.parametrize(
    ("low", "high", "log", "ticks"),
    [
        (0, 1000, False, [0, 200, 400, 600, 800, 1000]),
        (1.4, 4.3, False, [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        (0.3, 40, True, [0.5, 1, 2, 5, 10, 20]),
        (1.2, 6, True, [1.5, 2, 3, 4, 5]),
    ],
)
def test_axis_ticks_are_round_numbers(low, high, log, ticks):
    assert Axis(low, high, log).ticks(6) == pytest.approx(ticks)


@pytest.mark.parametrize(("low", "high"), [(0.11, 0.19), (1, 1e9), (5, 5.001), (1e-6, 2e-6)])
@pytest.mark.parametrize("log", [False, True])
def test_axis_has_2_to_10_ticks(low, high, log):
    ticks = Axis(low, high, log).ticks(6)
    assert 2 <= len(ticks) <= 10
    assert all(low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9) for tick in ticks)


def test_chart_draws_each_point_at_its_position():
    curve = Curve("one", "c0", [0, 50, 100], [0.0, 1.0, 2.0])
    html = Chart("T", "u", [curve], 100, from_zero=True).to_html()
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', html)
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert [x for x, _ in points] == [0, 500, 1000]
    top = 2.1  # margin of 5 %
    assert [y for _, y in points] == pytest.approx(
        [1000, 1000 - 1000 / top, 1000 - 2000 / top], abs=0.1
    )
    assert 'aria-label="T, u. one: 0 at step 0, 2 at step 100."' in html


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (12.3456, "12.35"),
        (0.0003, "0.0003"),
        (0.00001, "1e-5"),
        (0.015, "0.015"),
        (1e-10, "1e-10"),
    ],
)
def test_format_tick(value, expected):
    assert format_tick(value) == expected
