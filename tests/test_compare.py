"""Runs side by side: only what differs is shown, only what may be averaged is, and what is damaged or unfinished is said."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
from conftest import TINY

import nanogpt
from nanogpt import checkpoint, cli
from nanogpt.checkpoint import save_model
from nanogpt.compare import compare, plot, table
from nanogpt.config import read_toml, resolve, to_toml
from nanogpt.errors import UserError

STORY = "The cat saw the bird in the barn. A fox met the mouse in the wood.\n" * 40


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that is finished: 4 steps, 2 evaluations on the whole validation split."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "story.txt").write_text(STORY, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        nanogpt.train(folder / "story.txt", folder / "run", **TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0})
    return folder / "run"


@pytest.fixture
def make_run(trained, tmp_path):
    """A run like the trained one, with other settings and another result."""

    def make(name, bits=None, about=None, summary=None, **settings):
        run = tmp_path / "runs" / name
        shutil.copytree(trained, run)
        (run / "config.toml").write_text(to_toml(resolve(read_toml(run) | settings)), encoding="utf-8")
        known = json.loads((run / "text.json").read_text(encoding="utf-8"))
        (run / "text.json").write_text(json.dumps(known | (about or {})), encoding="utf-8")
        parts = checkpoint.load(run)
        changed = parts.summary | ({} if bits is None else {"bits_per_byte": bits}) | (summary or {})
        save_model(run / "model.safetensors", parts.model, parts.tokenizer, changed)
        return run

    return make


def run(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as leave:
        cli.main([str(word) for word in words])
    return leave.value.code or 0


def test_a_copied_run_is_no_second_seed(make_run):
    first, copy, other = make_run("first", bits=2.0), make_run("copy", bits=2.0), make_run("other", bits=2.2, seed=5)
    found = compare([first, copy, other])
    (group,) = found.groups
    assert (group.n, group.bits_per_byte) == (2, pytest.approx(2.1))
    assert [run.remarks for run in found.runs] == [[], [f"the same run as {first}, number for number; it counts once."], []]


def test_a_run_tells_its_result(trained):
    found = compare([trained])
    (run,), model = found.runs, nanogpt.load(trained)
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert (run.val_loss, run.bits_per_byte) == (model.summary["val_loss"], model.summary["bits_per_byte"])
    assert run.parameters == sum(p.numel() for p in model._model.parameters())
    assert run.tokens_per_second == statistics.median(record["tokens_per_second"] for record in records if "tokens" in record)
    assert (run.steps, run.seconds, run.finished, run.full_split, run.remarks) == (4, records[-1]["seconds"], True, True, [])
    assert [(point["step"], point["tokens"]) for point in run.evaluations] == [(2, 2 * 4 * 16), (4, 4 * 4 * 16)]
    assert run.verdict == model.summary["verdict"]["kind"]
    assert found.differ == []
    assert (found.groups[0].n, found.groups[0].spread) == (1, None)


def test_seeds_are_averaged_and_other_settings_are_not(make_run):
    runs = [make_run("a", 2.0, seed=1), make_run("b", 1.0, seed=1, dropout=0.1), make_run("c", 2.3, seed=2)]
    runs.append(make_run("d", 2.6, seed=3, micro_batch_size=2))  # with less memory, which changes no more than rounding
    found = compare(runs)
    assert [run.run for run in found.runs] == [str(runs[i]) for i in (1, 0, 2, 3)]
    assert [group.runs for group in found.groups] == [[str(runs[1])], [str(runs[i]) for i in (0, 2, 3)]]
    assert found.groups[1].bits_per_byte == pytest.approx(2.3)
    assert found.groups[1].spread == pytest.approx(0.3)
    assert found.differ == ["dropout", "micro_batch_size", "seed"]
    shown = table(found, 80)
    rows = {line[: line.find("  ")]: line.split("  ")[1:] for line in shown.splitlines()}
    assert [cell.strip() for cell in rows["seed"] if cell] == ["1", "1, 2, 3"]
    assert [cell.strip() for cell in rows["bits per byte"] if cell] == ["1.0000", "2.3000"]
    assert [cell.strip() for cell in rows["spread over seeds"] if cell.strip()] == ["0.3000"]
    assert "n_layer" not in shown  # which does not differ


def test_groups_are_in_the_order_of_their_means(make_run):
    found = compare([make_run("lucky", 1.0, seed=1), make_run("unlucky", 3.0, seed=2), make_run("steady", 1.5, dropout=0.1)])
    assert [group.bits_per_byte for group in found.groups] == [1.5, 2.0]


def test_by_the_clock_the_recipe_may_follow_the_machine_s_pace(make_run):
    clock = [make_run(str(i), 2.0, seed=i, steps=None, minutes=1.0, eval_every=every) for i, every in enumerate((100, 105, 150))]
    found = compare(clock)
    assert sorted(group.n for group in found.groups) == [1, 2]
    assert found.differ == ["seed", "eval_every"]
    steps = [make_run(f"steps-{every}", 2.0, seed=every, eval_every=every) for every in (100, 105)]
    assert [group.n for group in compare(steps).groups] == [1, 1]


def test_what_a_run_began_from_sets_it_apart_and_is_no_evaluation_of_it(make_run):
    run = make_run("a", about={"init_from": "runs/old"})
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "val_loss": 0.1, "bits_per_byte": 0.2, "val_tokens": 9, "seconds": 0.0}\n' + lines)
    found = compare([run, make_run("b", seed=2)])
    assert [group.n for group in found.groups] == [1, 1]
    assert found.differ == ["seed", "init_from"]
    assert found.runs[0].evaluations[0]["tokens"] == 0  # where its curve begins
    (run / "model.safetensors").unlink()
    assert compare([run]).runs[0].bits_per_byte > 1


def test_runs_on_different_texts_are_not_compared(make_run):
    runs = [make_run("a", 2.0), make_run("other", 1.0, about={"fingerprint": "f00", "sources": ["/x/other.txt"]}), make_run("b", 1.5)]
    found = compare(runs)
    assert [run.run for run in found.runs] == [str(runs[i]) for i in (2, 0, 1)]  # each text for itself
    shown = table(found, 80)
    assert "Not comparable, because they were measured on different texts: b, a; other." in shown
    assert "story.txt" in shown
    assert "other.txt" in shown


def test_one_validation_file_makes_runs_on_different_texts_comparable(make_run):
    runs = [make_run(name, val="val.txt", about={"fingerprint": name, "val_fingerprint": "v"}) for name in ("a", "b")]
    found = compare(runs)
    assert "Not comparable" not in table(found, 80)
    assert [group.n for group in found.groups] == [1, 1]  # but they are no seeds of one run


def test_an_unfinished_run_is_listed_for_itself(make_run):
    going_on = make_run("going-on", 2.0, seed=1, summary={"finished": 2})  # step 4 came after that
    part = make_run("part", 2.0, seed=2, summary={"val_tokens": 100})
    found = compare([going_on, part, make_run("whole", 2.0, seed=3)])
    assert [group.n for group in found.groups] == [1, 1, 1]
    shown = table(found, 80)
    assert "going-on: Not finished: 100% of it over, after 4 steps." in shown
    assert "part: Measured on a part of the held-out text only, 100 of" in shown


def test_a_damaged_run_is_listed_with_what_is_known(make_run, tmp_path):
    good, cut, broken, bare = make_run("good", 2.0), make_run("cut"), make_run("broken"), make_run("bare")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:500])
    (cut / "metrics.jsonl").write_bytes((cut / "metrics.jsonl").read_bytes()[:-30])  # within the last evaluation
    (broken / "config.toml").write_text("[model\n")
    for name in ("config.toml", "text.json", "metrics.jsonl"):
        (bare / name).unlink()
    runs = {run.run: run for run in compare([good, cut, broken, bare]).runs}
    first = json.loads((good / "metrics.jsonl").read_text().splitlines()[2])
    assert (runs[str(cut)].bits_per_byte, runs[str(cut)].parameters) == (first["bits_per_byte"], None)
    assert "is damaged" in runs[str(cut)].remarks[0]
    assert "cannot be read" in runs[str(broken)].remarks[0]
    assert runs[str(broken)].steps == 4
    assert runs[str(bare)].bits_per_byte == runs[str(broken)].bits_per_byte
    assert len(runs[str(bare)].remarks) == 3
    assert table(compare([good, cut, broken, bare]), 80)


def test_a_table_fits_the_terminal_however_many_runs(make_run):
    found = compare([make_run(name, 2.0, dropout=i / 10) for i, name in enumerate(("one", "two-with-a-longer-name", "日本語", "four", "five", "six"))])
    for width in (60, 80, 200):
        lines = table(found, width).splitlines()
        assert max(len(line) for line in lines) <= width
        assert all(any(name in line for line in lines) for name in ("one", "two-with-a-longer-name", "日本語", "four", "five", "six"))
    assert sum(line.startswith("bits per byte") for line in table(found, 60).splitlines()) > 1
    assert sum(line.startswith("bits per byte") for line in table(found, 200).splitlines()) == 1


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run, tmp_path):
    run = make_run("a", 2.0)
    other = shutil.copytree(run, tmp_path / "b" / "a")
    assert str(other) in table(compare([run, other]), 400)
    assert len(compare([run, run / ".." / "a"]).runs) == 1


def test_the_plot_needs_no_network(make_run):
    page = plot(compare([make_run("<b>a", 2.0), make_run("b", 1.0, dropout=0.1)]))
    assert "<script src" not in page
    assert "plotly.js v" in page  # it is in the page
    assert '"name":"&lt;b&gt;a"' in page  # plotly would take it for bold letters
    for expected in ("tokens read", "seconds since the first step", "bits per byte"):
        assert expected in page


def test_the_command_prints_a_table_or_one_object(make_run, tmp_path, capsys):
    runs = [str(make_run("a", 2.0)), str(make_run("b", 1.0, dropout=0.1))]
    assert run("compare", *runs, "--json", "--plot", tmp_path / "curves.html") == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"runs", "groups", "differ"}
    assert [run["run"] for run in answer["runs"]] == runs[::-1]
    assert [run["settings"]["dropout"] for run in answer["runs"]] == [0.1, 0.0]
    assert (tmp_path / "curves.html").stat().st_size > 1_000_000
    assert run("compare", *runs) == 0
    out = capsys.readouterr().out
    assert out.index("dropout") < out.index("bits per byte")


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([], "Which runs?\nThere are: runs/shake runs/spear"),
        (["runs/shaek"], "no run at"),
        (["runs/shaek"], "There is: runs/shake"),
        (["runs"], "is not the folder of a run.\nThere are: runs/shake runs/spear"),
        (["elsewhere/x"], "no run at"),
        (["runs/shake/model.safetensors"], "is a file"),
        (["fresh"], "None of these runs has been evaluated"),
    ],
)
def test_mistakes_are_answered_in_words(words, answer, make_run, tmp_path, monkeypatch, capsys):
    make_run("shake")
    fresh = shutil.move(make_run("spear"), tmp_path / "fresh")
    make_run("spear")
    (fresh / "model.safetensors").unlink()
    (fresh / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert run("compare", *words) == 2
    assert answer in capsys.readouterr().err


def test_without_evaluations_there_is_no_curve(make_run):
    found = compare([make_run("a", 2.0)])
    with pytest.raises(UserError, match="no curve"):
        plot(replace(found, runs=[replace(run, evaluations=[]) for run in found.runs]))


def test_what_a_file_tells_oddly_is_not_known(make_run):
    odd, strange = make_run("odd", 2.0), make_run("strange", 2.0)
    (odd / "text.json").write_text('{"sources": [1], "val_tokens": null}')
    with (odd / "metrics.jsonl").open("a") as file:
        file.write('{"step": "none"}\n[]\n')
    (strange / "text.json").write_text("[]")
    (strange / "metrics.jsonl").write_text("3\n")
    found = compare([odd, strange])
    assert [(run.bits_per_byte, run.text) for run in found.runs] == [(2.0, None), (2.0, None)]
    assert {run.run: run.steps for run in found.runs}[str(odd)] == 4
    assert all("does not tell all of a text" in run.remarks[0] for run in found.runs)
    assert table(found, 80)
