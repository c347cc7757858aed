"""Tests of the comparison of runs: grouping over seeds, damaged runs, table and plot."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
from helpers import TINY

import nanogpt
from nanogpt import checkpoint
from nanogpt.checkpoint import save_model
from nanogpt.cli.main import main
from nanogpt.compare import compare
from nanogpt.config import read_toml, resolve, to_toml
from nanogpt.errors import UserError
from nanogpt.render.comparison import plot, table

STORY = "The cat saw the bird in the barn. A fox met the mouse in the wood.\n" * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run of 4 steps, with 2 evaluations on the whole validation split."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "story.txt").write_text(STORY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        nanogpt.train(
            folder / "story.txt",
            folder / "run",
            **TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0},
        )
    return folder / "run"


@pytest.fixture
def make_run(trained, tmp_path):
    """Return a function that copies the trained run with other settings and results."""

    def make(name, bits=None, data=None, summary=None, **settings):
        run = tmp_path / "runs" / name
        shutil.copytree(trained, run)
        (run / "config.toml").write_text(
            to_toml(resolve(read_toml(run) | settings)), encoding="utf-8"
        )
        metadata = json.loads((run / "data.json").read_text(encoding="utf-8"))
        (run / "data.json").write_text(json.dumps(metadata | (data or {})), encoding="utf-8")
        loaded = checkpoint.load(run)
        changed = loaded.summary | (summary or {})
        if bits is not None:
            changed["bits_per_byte"] = bits
        save_model(run / "model.safetensors", loaded.model, loaded.tokenizer, changed)
        return run

    return make


def run(*args):
    """Run a command and return its exit code."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(arg) for arg in args])
    return exit_info.value.code or 0


def test_compare_counts_a_copied_run_once(make_run):
    first, copy, other = (
        make_run("first", bits=2.0),
        make_run("copy", bits=2.0),
        make_run("other", bits=2.2, seed=5),
    )
    found = compare([first, copy, other])
    (group,) = found.groups
    assert (group.num_runs, group.bits_per_byte) == (2, pytest.approx(2.1))
    assert [run.notes for run in found.runs] == [
        [],
        [f"Duplicate of {first}; counted once."],
        [],
    ]


def test_summary_has_the_results_of_the_run(trained):
    found = compare([trained])
    (run,), model = found.runs, nanogpt.load(trained)
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert (run.val_loss, run.bits_per_byte) == (
        model.summary["val_loss"],
        model.summary["bits_per_byte"],
    )
    assert run.parameters == sum(p.numel() for p in model.module.parameters())
    assert run.tokens_per_second == statistics.median(
        record["tokens_per_second"] for record in records if "tokens" in record
    )
    assert (run.steps, run.seconds, run.finished, run.full_split, run.notes) == (
        4,
        records[-1]["seconds"],
        True,
        True,
        [],
    )
    assert [(point["step"], point["tokens"]) for point in run.evaluations] == [
        (2, 2 * 4 * 16),
        (4, 4 * 4 * 16),
    ]
    assert run.diagnosis == model.summary["diagnosis"]["kind"]
    assert found.differing_settings == []
    assert (found.groups[0].num_runs, found.groups[0].std) == (1, None)


def test_compare_averages_over_seeds_only(make_run):
    runs = [
        make_run("a", 2.0, seed=1),
        make_run("b", 1.0, seed=1, dropout=0.1),
        make_run("c", 2.3, seed=2),
    ]
    runs.append(make_run("d", 2.6, seed=3, micro_batch_size=2))
    found = compare(runs)
    assert [run.run for run in found.runs] == [str(runs[i]) for i in (1, 0, 2, 3)]
    assert [group.runs for group in found.groups] == [
        [str(runs[1])],
        [str(runs[i]) for i in (0, 2, 3)],
    ]
    assert found.groups[1].bits_per_byte == pytest.approx(2.3)
    assert found.groups[1].std == pytest.approx(0.3)
    assert found.differing_settings == ["dropout", "micro_batch_size", "seed"]
    shown = table(found, 80)
    rows = {line[: line.find("  ")]: line.split("  ")[1:] for line in shown.splitlines()}
    assert [cell.strip() for cell in rows["seed"] if cell] == ["1", "1, 2, 3"]
    assert [cell.strip() for cell in rows["bits per byte"] if cell] == ["1.0000", "2.3000"]
    assert [cell.strip() for cell in rows["std over seeds"] if cell.strip()] == ["0.3000"]
    assert "n_layer" not in shown


def test_groups_are_sorted_by_mean(make_run):
    found = compare(
        [
            make_run("lucky", 1.0, seed=1),
            make_run("unlucky", 3.0, seed=2),
            make_run("steady", 1.5, dropout=0.1),
        ]
    )
    assert [group.bits_per_byte for group in found.groups] == [1.5, 2.0]


def test_time_limited_runs_may_differ_in_fitted_settings(make_run):
    time_limited = [
        make_run(str(i), 2.0, seed=i, steps=None, minutes=1.0, eval_every=every)
        for i, every in enumerate((100, 105, 150))
    ]
    found = compare(time_limited)
    assert sorted(group.num_runs for group in found.groups) == [1, 2]
    assert found.differing_settings == ["seed", "eval_every"]
    steps = [make_run(f"steps-{every}", 2.0, seed=every, eval_every=every) for every in (100, 105)]
    assert [group.num_runs for group in compare(steps).groups] == [1, 1]


def test_initial_checkpoint_separates_runs_and_is_no_evaluation(make_run):
    run = make_run("a", data={"init_from": "runs/old"})
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "val_loss": 0.1, "bits_per_byte": 0.2, "val_tokens": 9, "seconds": 0.0}\n'
        + lines
    )
    found = compare([run, make_run("b", seed=2)])
    assert [group.num_runs for group in found.groups] == [1, 1]
    assert found.differing_settings == ["seed", "init_from"]
    assert found.runs[0].evaluations[0]["tokens"] == 0
    (run / "model.safetensors").unlink()
    assert compare([run]).runs[0].bits_per_byte > 1


def test_runs_with_different_validation_texts_are_not_ranked(make_run):
    runs = [
        make_run("a", 2.0),
        make_run("other", 1.0, data={"fingerprint": "f00", "sources": ["/x/other.txt"]}),
        make_run("b", 1.5),
    ]
    found = compare(runs)
    assert [run.run for run in found.runs] == [str(runs[i]) for i in (2, 0, 1)]
    shown = table(found, 80)
    assert "Not comparable, because the validation texts differ: b, a; other." in shown
    assert "story.txt" in shown
    assert "other.txt" in shown


def test_shared_validation_text_makes_runs_comparable(make_run):
    runs = [
        make_run(name, val_text="val.txt", data={"fingerprint": name, "val_fingerprint": "v"})
        for name in ("a", "b")
    ]
    found = compare(runs)
    assert "Not comparable" not in table(found, 80)
    assert [group.num_runs for group in found.groups] == [1, 1]


def test_unfinished_run_is_not_grouped(make_run):
    resumed = make_run("resumed", 2.0, seed=1, summary={"finished": 2})
    part = make_run("part", 2.0, seed=2, summary={"val_tokens": 100})
    found = compare([resumed, part, make_run("complete", 2.0, seed=3)])
    assert [group.num_runs for group in found.groups] == [1, 1, 1]
    shown = table(found, 80)
    assert "resumed: Not finished: 100% complete, 4 steps." in shown
    assert "part: Measured on a part of the validation split only, 100 of" in shown


def test_damaged_run_is_listed_with_its_readable_results(make_run, tmp_path):
    good, cut, broken, bare = (
        make_run("good", 2.0),
        make_run("cut"),
        make_run("broken"),
        make_run("bare"),
    )
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:500])
    metrics = (cut / "metrics.jsonl").read_bytes()
    (cut / "metrics.jsonl").write_bytes(metrics[:-30])  # within the last evaluation
    (broken / "config.toml").write_text("[model\n")
    for name in ("config.toml", "data.json", "metrics.jsonl"):
        (bare / name).unlink()
    runs = {run.run: run for run in compare([good, cut, broken, bare]).runs}
    first = json.loads((good / "metrics.jsonl").read_text().splitlines()[2])
    assert (runs[str(cut)].bits_per_byte, runs[str(cut)].parameters) == (
        first["bits_per_byte"],
        None,
    )
    assert "is damaged" in runs[str(cut)].notes[0]
    assert "cannot be read" in runs[str(broken)].notes[0]
    assert runs[str(broken)].steps == 4
    assert runs[str(bare)].bits_per_byte == runs[str(broken)].bits_per_byte
    assert len(runs[str(bare)].notes) == 3
    assert table(compare([good, cut, broken, bare]), 80)


def test_table_fits_the_terminal(make_run):
    found = compare(
        [
            make_run(name, 2.0, dropout=i / 10)
            for i, name in enumerate(
                ("one", "two-with-a-longer-name", "日本語", "four", "five", "six")
            )
        ]
    )
    for width in (60, 80, 200):
        lines = table(found, width).splitlines()
        assert max(len(line) for line in lines) <= width
        assert all(
            any(name in line for line in lines)
            for name in ("one", "two-with-a-longer-name", "日本語", "four", "five", "six")
        )
    assert sum(line.startswith("bits per byte") for line in table(found, 60).splitlines()) > 1
    assert sum(line.startswith("bits per byte") for line in table(found, 200).splitlines()) == 1


def test_runs_with_equal_names_are_shown_by_path(make_run, tmp_path):
    run = make_run("a", 2.0)
    other = shutil.copytree(run, tmp_path / "b" / "a")
    assert str(other) in table(compare([run, other]), 400)
    assert len(compare([run, run / ".." / "a"]).runs) == 1


def test_plot_is_self_contained(make_run):
    page = plot(compare([make_run("<b>a", 2.0), make_run("b", 1.0, dropout=0.1)]))
    assert "<script src" not in page
    assert "<link" not in page
    assert len(page) < 50_000
    assert page.count("<svg") == 2
    assert page.count("&lt;b&gt;a <output>") == 2
    assert "<b>a" not in page
    for expected in ("over training tokens", "over seconds since the first step", "Bits per byte"):
        assert expected in page


def test_command_prints_a_table_or_json(make_run, tmp_path, capsys):
    runs = [str(make_run("a", 2.0)), str(make_run("b", 1.0, dropout=0.1))]
    assert run("compare", *runs, "--json", "--plot", tmp_path / "curves.html") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"runs", "groups", "differing_settings"}
    assert [run["run"] for run in answer["runs"]] == runs[::-1]
    assert [run["settings"]["dropout"] for run in answer["runs"]] == [0.1, 0.0]
    assert "<svg" in (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert run("compare", *runs) == 0
    out = capsys.readouterr().out
    assert out.index("dropout") < out.index("bits per byte")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "Which runs?\nExisting runs: runs/shake runs/spear"),
        (["runs/shaek"], "no run at"),
        (["runs/shaek"], "Existing runs: runs/shake"),
        (["runs"], "is not a run folder.\nExisting runs: runs/shake runs/spear"),
        (["elsewhere/x"], "no run at"),
        (["runs/shake/model.safetensors"], "is a file"),
        (["fresh"], "none of these runs has been evaluated"),
    ],
)
def test_mistakes_are_answered_with_suggestions(
    args, expected, make_run, tmp_path, monkeypatch, capsys
):
    make_run("shake")
    fresh = shutil.move(make_run("spear"), tmp_path / "fresh")
    make_run("spear")
    (fresh / "model.safetensors").unlink()
    (fresh / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run("compare", *args) == 2
    assert expected in capsys.readouterr().err


def test_plot_without_evaluations_is_an_error(make_run):
    found = compare([make_run("a", 2.0)])
    with pytest.raises(UserError, match="no curve"):
        plot(replace(found, runs=[replace(run, evaluations=[]) for run in found.runs]))


def test_invalid_fields_are_ignored(make_run):
    odd, strange = make_run("odd", 2.0), make_run("strange", 2.0)
    (odd / "data.json").write_text('{"sources": [1], "val_tokens": null}')
    with (odd / "metrics.jsonl").open("a") as file:
        file.write('{"step": "none"}\n[]\n')
    (strange / "data.json").write_text("[]")
    (strange / "metrics.jsonl").write_text("3\n")
    found = compare([odd, strange])
    assert [(run.bits_per_byte, run.text) for run in found.runs] == [(2.0, None), (2.0, None)]
    assert {run.run: run.steps for run in found.runs}[str(odd)] == 4
    notes = {run.run: run.notes[0] for run in found.runs}
    assert "does not describe a text" in notes[str(odd)]
    assert "does not contain a JSON object" in notes[str(strange)]
    assert table(found, 80)
