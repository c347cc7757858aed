"""A run learns, goes on exactly where it stopped, however it stopped, and refuses to go on as another run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

import nanogpt
from nanogpt import checkpoint, config, data, evaluate, library, machine, plan, recipe, trainer
from nanogpt.config import ModelConfig, TextConfig
from nanogpt.errors import Notice, UserError
from nanogpt.files import cache_dir
from nanogpt.model import GPT
from nanogpt.prepare import prepare_folder
from nanogpt.report import Evaluated, Finished, Sampled, Saved, Saving, Started, Stepped
from nanogpt.tokenizer import train_tokenizer

RUN = TINY | {"dropout": 0.1, "steps": 100, "eval_every": 20, "device": "cpu"}


def timeless(run):
    """metrics.jsonl without its timings."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "tokens_per_second")} for row in rows]


def same(run, other):
    assert timeless(run) == timeless(other)
    assert (run / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    for name in ("weights", "optimizer"):
        a, b = (path / "state" / str(checkpoint.latest_step(path)) / f"{name}.safetensors" for path in (run, other))
        assert a.read_bytes() == b.read_bytes()


def stop_at(step, number):
    """What sends a signal to a run after a step."""
    return lambda event: signal.raise_signal(number) if isinstance(event, Stepped) and event.step == step else None


@pytest.fixture
def whole(story, tmp_path):
    """An undisturbed run of 100 steps."""
    nanogpt.train(story, tmp_path / "whole", **RUN)
    return tmp_path / "whole"


def test_it_learns_and_tells_what_happens(story, tmp_path):
    events = []
    model = nanogpt.train(story, tmp_path / "run", on_event=events.append, **RUN | {"steps": 200, "dropout": 0.0})
    kinds = [type(event) for event in events]
    assert kinds[0] is Started
    assert kinds.count(Stepped) == 200
    assert kinds[-5:] == [Evaluated, Sampled, Saving, Saved, Finished]
    finished = events[-1]
    assert finished.loss.val_loss < finished.baselines["unigram"] < finished.baselines["uniform"]
    assert model.summary["val_loss"] == finished.loss.val_loss == pytest.approx(model.evaluate().val_loss)
    assert "The " in "".join(model.stream("The cat", seed=1, max_tokens=200))
    best = min((event for event in events if isinstance(event, Evaluated)), key=lambda event: event.val_loss)
    assert finished.best_step == best.step


def test_two_runs_of_one_seed_are_identical_and_of_two_are_not(story, tmp_path, whole):
    nanogpt.train(story, tmp_path / "again", **RUN)
    same(tmp_path / "again", whole)
    nanogpt.train(story, tmp_path / "other", seed=5, **RUN)
    assert timeless(tmp_path / "other") != timeless(whole)


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16", "attention": "plain"}], ids=["float32", "bfloat16"])
def test_every_kind_of_run_resumes_exactly(story, tmp_path, arch, optimizer, how):
    short = RUN | {"arch": arch, "optimizer": optimizer, "steps": 30, "eval_every": 10, "dropout": 0.3, "cooldown": 0.5} | how
    resumed_equals_whole(story, tmp_path, short)


@pytest.mark.skipif(not machine.has_compiler(torch.device("cpu")), reason="there is no C++ compiler")
@pytest.mark.parametrize("arch", ["classic", "modern"])
def test_a_compiled_run_resumes_exactly_and_learns_as_an_eager_one(story, tmp_path, arch):
    short = RUN | {"arch": arch, "optimizer": "muon", "steps": 30, "eval_every": 10, "n_layer": 1}
    compiled = resumed_equals_whole(story, tmp_path, short | {"compile": True})
    eager = nanogpt.train(story, tmp_path / "eager", **short)
    assert compiled.summary["val_loss"] == pytest.approx(eager.summary["val_loss"], rel=1e-3)
    figures = json.loads((cache_dir() / "machine.json").read_text())
    assert any(f"compiled gain {arch} 16 wide with dropout" in name for name in figures)


def resumed_equals_whole(story, tmp_path, settings):
    whole = nanogpt.train(story, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(13, signal.SIGINT), **settings)
    nanogpt.train(out=tmp_path / "run", resume=True)
    same(tmp_path / "run", tmp_path / "whole")
    return whole


def test_a_compiler_that_fails_is_done_without(story, tmp_path, monkeypatch):
    def compiled(place, model, nats):
        calls = iter([RuntimeError("g++: error: no such thing\nand more")])

        def fails_once(*inputs):
            if error := next(calls, None):
                raise error
            raise AssertionError("it was tried again")

        return fails_once

    monkeypatch.setattr(machine, "compiled", compiled)
    with pytest.warns(Notice, match=r"torch.compile failed.*more slowly \(g\+\+: error: no such thing and more\)"):
        nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 4, "compile": True})
    nanogpt.train(story, tmp_path / "eager", **RUN | {"steps": 4})
    assert timeless(tmp_path / "run") == timeless(tmp_path / "eager")


class Clock:
    """A clock for which every look takes ten milliseconds."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    timing = SimpleNamespace(monotonic=clock, perf_counter=clock)
    monkeypatch.setattr(trainer, "time", timing)
    monkeypatch.setattr(library.training, "time", timing)
    monkeypatch.setattr(library.settle, "time", timing)
    monkeypatch.setattr(recipe, "MOST_EPOCHS", 10**6)  # the clock ends the run
    return clock


def test_a_run_by_the_clock_ends_within_its_minutes_with_a_whole_schedule(story, tmp_path, clock):
    events = []
    settings = {name: value for name, value in RUN.items() if name != "steps"} | {"minutes": 0.5, "cooldown": 0.5, "eval_every": 100}
    nanogpt.train(story, tmp_path / "run", on_event=events.append, **settings)
    assert 25 < clock.now < 30
    steps = [event for event in events if isinstance(event, Stepped)]
    rates = [step.learning_rate for step in steps]
    assert len(steps) > 100
    assert steps[-1].progress == pytest.approx(1.0, abs=0.01)
    assert rates[-1] < 0.03 * max(rates)
    assert max(rates) == rates[len(rates) // 4] == settings["learning_rate"]
    assert isinstance(events[-1], Finished)


def test_a_run_by_the_clock_goes_on_where_it_stopped_for_the_rest_of_its_time(story, tmp_path, clock):
    settings = {name: value for name, value in RUN.items() if name != "steps"} | {"minutes": 0.5, "eval_every": 100}
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(100, signal.SIGINT), **settings)
    events = []
    nanogpt.train(out=tmp_path / "run", resume=True, on_event=events.append)
    assert clock.now < 30 + 2
    steps = [event for event in events if isinstance(event, Stepped)]
    assert steps[0].step == 101
    assert 0.1 < steps[0].progress < steps[-1].progress
    assert steps[-1].progress == pytest.approx(1.0, abs=0.02)
    nanogpt.train(out=tmp_path / "run", resume=True, minutes=1.0, on_event=events.append)
    assert clock.now > 50


def test_the_recipe_fills_in_what_was_not_given(story, tmp_path, clock):
    events = []
    model = nanogpt.train(story, minutes=0.2, n_layer=1, n_embd=32, n_head=1, dtype="float32", compile=False, on_event=events.append)
    started = events[0]
    chosen = {choice.name: choice.value for choice in started.choices}
    assert (started.config.model.n_layer, started.config.model.n_embd, started.config.model.arch) == (1, 32, "modern")
    assert chosen.keys() >= {"optimizer", "batch_size", "learning_rate", "attention"}
    assert not chosen.keys() & {"n_layer", "n_embd", "minutes", "dtype", "compile"}
    assert started.config.training.optimizer == "muon"
    assert model.summary["val_loss"] > 0


@pytest.mark.parametrize(
    ("settings", "minutes", "steps"),
    [
        ({}, 5.0, None),
        ({"steps": 7}, None, 7),
        ({"minutes": 2.0}, 2.0, None),
        ({"preset": "classic"}, None, 5000),
        ({"preset": "classic", "minutes": 2.0}, 2.0, None),
    ],
)
def test_what_ends_a_run(story, settings, minutes, steps):
    """A run that is asked for nothing takes five minutes."""

    class Enough(Exception):
        pass

    def look(event):
        assert event.config.training.minutes == minutes
        assert steps in (None, event.config.training.steps)  # the recipe may end a run by the clock sooner, on so short a text
        raise Enough

    with pytest.raises(Enough):
        nanogpt.train(story, on_event=look, n_embd=16, n_head=1, n_layer=1, context_length=16, dtype="float32", compile=False, attention="fused", **settings)


def test_an_unknown_preset_is_refused(story):
    with pytest.raises(UserError, match=r"no preset 'gpt9'.\n.*classic"):
        nanogpt.train(story, preset="gpt9")


@pytest.mark.parametrize(("steps", "minutes", "last"), [(20, 100.0, range(20, 21)), (10**6, 0.5, range(100, 10**4))])
def test_of_steps_and_minutes_the_first_to_come_ends_the_run(story, clock, steps, minutes, last):
    events = []
    nanogpt.train(story, on_event=events.append, **RUN | {"steps": steps, "minutes": minutes, "eval_every": 1000, "cooldown": 0.5})
    steps = [event for event in events if isinstance(event, Stepped)]
    assert steps[-1].step in last
    assert steps[-1].progress == pytest.approx(1.0, abs=0.01)
    assert steps[-1].learning_rate < 0.1 * max(step.learning_rate for step in steps)


def test_settings_that_fit_the_recipe_but_not_the_defaults_are_taken(story, clock):
    """The seed's recipe has six heads, which do not share a width of 128."""

    class Enough(Exception):
        pass

    def look(event):
        assert (event.config.model.n_embd, event.config.model.n_kv_head) == (128, 2)
        raise Enough

    with pytest.raises(Enough):
        nanogpt.train(story, on_event=look, minutes=0.1, n_embd=128, n_kv_head=2, n_layer=1, dtype="float32", compile=False, attention="fused")


def test_a_run_whose_steps_end_soon_is_not_compiled_for_all_of_its_time(story):
    events = []
    nanogpt.train(story, minutes=1000.0, on_event=events.append, **RUN | {"steps": 2, "compile": None})
    assert not events[0].config.machine.compile


def test_a_run_may_go_on_by_the_clock_that_began_by_steps(story, tmp_path, clock, whole):
    events = []
    nanogpt.train(out=whole, resume=True, minutes=1.0, on_event=events.append)
    assert events[-1].step > 100
    with pytest.raises(UserError, match=r"took .* minutes already, more than --minutes 0\.01"):
        nanogpt.train(out=whole, resume=True, minutes=0.01)


def test_a_run_by_the_clock_that_is_over_stays_over(story, tmp_path, clock):
    settings = {name: value for name, value in RUN.items() if name != "steps"} | {"minutes": 0.5, "eval_every": 100}
    nanogpt.train(story, tmp_path / "run", **settings)
    events = []
    with pytest.warns(Notice, match=r"nothing is left for training. Use --minutes 1"):
        nanogpt.train(out=tmp_path / "run", resume=True, on_event=events.append)
    assert not any(isinstance(event, Stepped) for event in events)


def test_a_run_by_the_clock_that_its_steps_ended_stays_over(story, tmp_path):
    settings = RUN | {"steps": 3, "minutes": 5}
    expected = nanogpt.train(story, tmp_path / "run", **settings).summary
    assert nanogpt.train(out=tmp_path / "run", resume=True).summary == expected


def test_too_little_time_is_said(story, tmp_path):
    settings, rates = {name: value for name, value in RUN.items() if name != "steps"}, []

    def note(event):
        if isinstance(event, Stepped):
            rates.append(event.learning_rate)

    with pytest.warns(Notice, match=r"nothing is left for training but one step. Use --minutes"):
        model = nanogpt.train(story, minutes=0.0001, on_event=note, **settings | {"cooldown": 0.5})
    assert model.summary["step"] == 1
    assert rates == [pytest.approx(RUN["learning_rate"], rel=0.5)]


def test_a_preset_is_the_whole_recipe(story):
    class Enough(Exception):
        pass

    def look(event):
        assert event.config.model.model_dump() | {"context_length": 256} == ModelConfig().model_dump() | {"context_length": 256}
        raise Enough

    with pytest.raises(Enough):
        nanogpt.train(story, preset="classic", minutes=1.0, on_event=look, compile=False, dtype="float32")


@pytest.mark.parametrize("at", [1, 50, 60, 99])
def test_stopped_and_resumed_equals_never_stopped(story, tmp_path, whole, at):
    stop = stop_at(at, signal.SIGINT)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, run, on_event=stop, **RUN)
    assert checkpoint.latest_step(run) == at
    nanogpt.train(out=run, resume=True)
    same(run, whole)


def test_a_run_that_broke_off_between_saves_repeats_those_steps(story, tmp_path, whole):
    def fail(event):
        if isinstance(event, Stepped) and event.step == 57:
            raise RuntimeError("power cut")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        nanogpt.train(story, run, on_event=fail, **RUN)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 58, "train_lo')  # the last line of a killed process
    assert checkpoint.latest_step(run) == 40
    nanogpt.train(story, run, resume=True)
    same(run, whole)


SCRIPT = """
import sys, nanogpt
from nanogpt import report
nanogpt.train(sys.argv[1], sys.argv[2], resume=True, on_event=lambda e: print(type(e).__name__, flush=True), **{settings})
"""


def spawn(story, run):
    code = "import warnings; warnings.simplefilter('ignore')\n" + SCRIPT.replace("{settings}", repr(RUN))
    return subprocess.Popen([sys.executable, "-c", code, story, run], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(story, tmp_path, whole, number):
    run = tmp_path / "run"
    process = spawn(story, run)
    for line in process.stdout:
        if line == "Stepped\n":
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait() == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert 1 <= checkpoint.latest_step(run) < 100
    nanogpt.train(out=run, resume=True)
    same(run, whole)


def test_killed_again_and_again_it_still_ends_as_if_nothing_had_been(story, tmp_path, whole):
    """kill -9 in the middle of a step, of an evaluation, of a save: wherever the delays happen to lead."""
    run = tmp_path / "run"
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = spawn(story, run)
        for line in process.stdout:
            if line == "Saved\n":
                time.sleep(delay)
                break
        process.kill()
        process.wait()
        process.stdout.close()
    nanogpt.train(story, run, resume=True, **RUN)
    same(run, whole)


def test_killed_in_the_middle_of_a_save_it_goes_on_from_the_one_before(story, tmp_path, whole):
    code = """
import os, nanogpt.files as files
saves, real = [], files.os.replace
def replace(a, b):
    saves.append(b)
    if len([s for s in saves if "state" in str(s)]) == {n}: os.kill(os.getpid(), 9)
    real(a, b)
files.os.replace = replace
"""
    for n in (5, 7, 8):  # each save renames weights, optimiser, the folder, and `latest`
        run = tmp_path / f"run{n}"
        process = subprocess.run([sys.executable, "-c", code.replace("{n}", str(n)) + SCRIPT.replace("{settings}", repr(RUN)), story, run], capture_output=True)
        assert process.returncode == -signal.SIGKILL
        assert checkpoint.latest_step(run) == 20
        nanogpt.train(out=run, resume=True)
        same(run, whole)


def test_changed_settings_are_refused_with_a_table_and_others_may_change(story, tmp_path):
    run = tmp_path / "run"
    nanogpt.train(story, run, **RUN | {"steps": 20})
    with pytest.raises(UserError, match=r"n_layer +2 +3\n +dropout +0.1 +0.0"):
        nanogpt.train(story, run, resume=True, n_layer=3, dropout=0.0)
    nanogpt.train(story, run, resume=True, steps=30, n_layer=2)
    assert timeless(run)[-1]["step"] == 30


def test_another_text_is_refused(story, tmp_path):
    run = tmp_path / "run"
    nanogpt.train(story, run, **RUN | {"steps": 20})
    story.write_text(story.read_text() + "!")
    with pytest.raises(UserError, match=r"not the one the run .* began with"):
        nanogpt.train(story, run, resume=True)
    before = (run / "model.safetensors").read_bytes()
    nanogpt.train(out=run, resume=True, steps=21)  # what was prepared is still there
    assert (run / "model.safetensors").read_bytes() != before


def test_resuming_where_no_run_is_names_those_that_there_are(story, tmp_path):
    with pytest.raises(UserError, match="Begin one: nanogpt train TEXT"):
        nanogpt.train([], tmp_path / "typo", resume=True)
    nanogpt.train(story, tmp_path / "right", **TINY | {"steps": 2})
    with pytest.raises(UserError, match=f"There is no run in {tmp_path / 'typo'} to go on with.\nRuns that can go on: {tmp_path / 'right'}"):
        nanogpt.train([], tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


def test_without_state_resume_starts_afresh_and_says_so(story, tmp_path):
    with pytest.warns(Notice, match="starting afresh"):
        nanogpt.train(story, tmp_path / "new", resume=True, **RUN | {"steps": 2})


def test_a_run_that_is_over_stays_as_it_is(story, tmp_path, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()}
    nanogpt.train(out=whole, resume=True)
    assert {path.name: path.read_bytes() for path in whole.iterdir() if path.is_file()} == before


def test_an_occupied_folder_is_left_alone(story, tmp_path, whole):
    before = (whole / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"already holds a run, saved at step 100"):
        nanogpt.train(story, whole, **RUN)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").touch()
    with pytest.raises(UserError, match=r"not a run of nanogpt: it holds chapter1.tex"):
        nanogpt.train(story, foreign, overwrite=True, **RUN)
    with pytest.raises(UserError):  # nothing is overwritten for a run that cannot begin
        nanogpt.train(tmp_path / "nothing.txt", whole, overwrite=True, **RUN)
    assert (whole / "model.safetensors").read_bytes() == before
    nanogpt.train(story, whole, overwrite=True, **RUN | {"steps": 3})
    assert checkpoint.latest_step(whole) == 3


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_state(story, tmp_path):
    class Poisoned(trainer.Trainer):
        def save(self):
            saved = super().save()
            with torch.no_grad():
                self.model.wte.weight[:] = float("nan")
            return saved

    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanogpt.library.training.Trainer", Poisoned)
        with pytest.raises(UserError, match=r"no longer a number: nan in step 21, at learning rate .*, gradient norm nan\. The last good state, step 20"):
            nanogpt.train(story, run, **RUN)
    assert nanogpt.load(run).evaluate().val_loss < 10
    assert checkpoint.latest_step(run) == 20


def test_patience_stops_and_the_best_is_kept(tmp_path, monkeypatch, story):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: evaluate.Loss(next(losses) * 100, 100, 100.0))
    events = []
    nanogpt.train(story, tmp_path / "run", patience=2, on_event=events.append, **RUN | {"eval_every": 10})
    assert [event.step for event in events if isinstance(event, Evaluated)] == [10, 20, 30, 40]
    assert events[-1].best_step == 20


def test_a_300_byte_text_trains_with_a_shorter_context(tmp_path):
    (tmp_path / "small.txt").write_text(("We all live in a yellow submarine. " * 9)[:300])
    with pytest.warns(Notice, match="context is 67 tokens instead of 256"):
        model = nanogpt.train(tmp_path / "small.txt", n_layer=1, n_head=1, n_embd=8, batch_size=2, steps=3)
    assert 0 < model.evaluate().val_loss < 10
    with pytest.raises(UserError, match=r"270 to train on, so it can be 269 at most"):
        nanogpt.train(tmp_path / "small.txt", context_length=300)


def test_resume_never_replaces_a_model_whose_state_is_lost(story, tmp_path, whole):
    before = (whole / "model.safetensors").read_bytes()
    (whole / "state" / "latest").write_text("")
    with pytest.raises(UserError, match="state is missing or damaged"):
        nanogpt.train(story, whole, resume=True, **RUN)
    (whole / "state" / "latest").write_text("100")
    (whole / "state" / "100" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match=r"The state in .*100 is damaged"):
        nanogpt.train(out=whole, resume=True)
    assert (whole / "model.safetensors").read_bytes() == before


def test_an_old_run_is_replaced_only_when_the_new_one_fits_on_the_disk(story, whole, monkeypatch):
    before = sorted(path.name for path in whole.iterdir())
    monkeypatch.setattr("nanogpt.files.shutil.disk_usage", lambda path: type("Usage", (), {"total": 10**9, "free": 1000}))
    with pytest.raises(UserError, match="disk is full"):
        nanogpt.train(story, whole, overwrite=True, **RUN)
    assert sorted(path.name for path in whole.iterdir()) == before


def test_what_a_person_put_into_a_run_folder_stays(story, whole):
    (whole / "notes.txt").write_text("mine")
    nanogpt.train(out=whole, resume=True)
    nanogpt.train(story, whole, overwrite=True, **RUN | {"steps": 2})
    assert (whole / "notes.txt").read_text() == "mine"


def test_a_run_stopped_before_its_first_evaluation_has_a_model_to_look_at(story, tmp_path):
    stop = stop_at(5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        nanogpt.train(story, tmp_path / "run", on_event=stop, **RUN)
    model = nanogpt.load(tmp_path / "run")
    assert len("".join(model.stream("The", max_tokens=9, seed=1))) == 9
    assert model.evaluate().verdict is None
    assert "step 5" in repr(model)


def test_time_too_leads_to_saves_and_they_change_nothing(story, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    saved = []
    nanogpt.train(story, tmp_path / "run", on_event=lambda event: saved.append(event.step) if isinstance(event, Saved) else None, **RUN)
    assert saved == list(range(1, 101))
    same(tmp_path / "run", whole)


def test_two_processes_do_not_train_in_one_folder(story, tmp_path):
    run, refused = tmp_path / "run", []

    def second(event):
        if isinstance(event, Stepped) and event.step == 3:
            code = SCRIPT.replace("{settings}", repr(RUN))
            refused.append(subprocess.run([sys.executable, "-c", code, story, run], capture_output=True, text=True).stderr)

    nanogpt.train(story, run, on_event=second, **RUN | {"steps": 5})
    assert "Another process is training in" in refused[0]


def test_a_changed_validation_text_is_refused(story, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("The cat saw the dog.\n" * 20)
    nanogpt.train(story, tmp_path / "run", val=held_out, **RUN | {"steps": 2})
    held_out.write_text("The dog saw the cat.\n" * 20)
    with pytest.raises(UserError, match="not the one the run"):
        nanogpt.train(story, tmp_path / "run", resume=True, steps=4)


def test_samples_with_odd_line_ends_survive_a_resume(tmp_path):
    (tmp_path / "odd.txt").write_text("ab\u2028cd\x85ef" * 100)
    nanogpt.train(tmp_path / "odd.txt", tmp_path / "run", **RUN | {"steps": 10, "eval_every": 5})
    nanogpt.train(out=tmp_path / "run", resume=True, steps=20)
    assert [json.loads(line)["step"] for line in (tmp_path / "run" / "samples.jsonl").read_text().split("\n")[:-1]] == [5, 10, 15, 20]


def test_evaluations_of_a_longer_run_take_the_same_tokens(tmp_path, story):
    story.write_text(story.read_text() * 40)
    nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 10, "eval_every": 5})
    nanogpt.train(out=tmp_path / "run", resume=True, steps=400, eval_every=100)
    assert len({row["val_tokens"] for row in timeless(tmp_path / "run") if "val_loss" in row}) == 1


def test_out_of_memory_says_what_to_lower(story, tmp_path, monkeypatch):
    def nats(*args):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999 bytes")

    monkeypatch.setattr("nanogpt.model.GPT.nats", nats)
    expected = pytest.raises(UserError, match=r"not enough memory for one window of 16 tokens at a time: .*9999 bytes\nLower --context-length")
    with expected, pytest.warns(Notice, match="as many tokens as before"):
        nanogpt.train(story, tmp_path / "run", **RUN)


@pytest.mark.parametrize("arch", ["classic", "modern"])
@pytest.mark.parametrize("micro_batch_size", [8, 5])
def test_a_batch_in_parts_is_the_same_batch(story, tmp_path, arch, micro_batch_size):
    settings = RUN | {"arch": arch, "batch_size": 32, "steps": 5, "eval_every": 5, "dropout": 0.3}
    rows = []
    for name, more in (("whole", {}), ("parts", {"micro_batch_size": micro_batch_size})):
        nanogpt.train(story, tmp_path / name, **settings | more)
        rows.append([(row["train_loss"], row.get("grad_norm", 0.0), row.get("val_loss", 0.0)) for row in timeless(tmp_path / name)])
    assert rows[0] != rows[1]
    for whole, parts in zip(*rows, strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(("most", "written"), [(2, {"micro_batch_size": 2}), (0, {"micro_batch_size": 1, "checkpoint_activations": True})])
def test_where_memory_runs_out_fewer_windows_are_taken_at_once_and_resume_knows(story, tmp_path, monkeypatch, most, written):
    nats, freed = GPT.nats, []

    def short_of_memory(self, idx, targets, keys=None):
        if keys is not None and len(idx) > most and not self.checkpoints:
            freed.append(len(idx))
            raise RuntimeError("CUDA out of memory. Tried to allocate 9999 bytes")
        return nats(self, idx, targets, keys)

    monkeypatch.setattr("nanogpt.model.GPT.nats", short_of_memory)
    settings = RUN | {"steps": 20, "eval_every": 10}
    with pytest.warns(Notice, match="as many tokens as before"), pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(13, signal.SIGINT), **settings)
    assert freed == [4] if most else [4, 2, 1]
    assert written.items() <= config.read_toml(tmp_path / "run").items()
    monkeypatch.undo()
    nanogpt.train(out=tmp_path / "run", resume=True)
    nanogpt.train(story, tmp_path / "whole", **settings | written)
    same(tmp_path / "run", tmp_path / "whole")


def test_the_estimate_of_memory_chooses_before_the_first_step_and_resume_repeats_it(story, tmp_path, monkeypatch):
    settings = RUN | {"n_embd": 64, "context_length": 64, "batch_size": 32, "steps": 6, "eval_every": 3}
    whole, small = (memory_of_a_step(story, settings | {"micro_batch_size": rows}) for rows in (32, 8))
    monkeypatch.setattr(machine, "free_memory", lambda device: 1.21 * small)
    events = []
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=lambda event: events.append(event) or stop_at(4, signal.SIGINT)(event), **settings)
    assert events[0].config.training.micro_batch_size == 8
    assert events[0].memory == small < events[0].free_memory < whole
    assert [choice.value for choice in events[0].choices if choice.name == "micro_batch_size"] == [8]
    monkeypatch.undo()
    nanogpt.train(out=tmp_path / "run", resume=True)
    nanogpt.train(story, tmp_path / "whole", **settings | {"micro_batch_size": 8})
    same(tmp_path / "run", tmp_path / "whole")


def memory_of_a_step(story, settings):
    """The bytes of a step on the story, by the estimate."""
    settled = config.resolve(settings)
    vocab_size, rows = len(set(story.read_text())) + 257, settings["micro_batch_size"]
    return sum(plan.memory(settled.model, settled.training, vocab_size, rows, half=False, fused=True).values())


def test_too_little_memory_for_one_window_is_said_before_anything_is_written(story, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda device: 10_000.0)
    with pytest.raises(UserError, match=r"even with one window of 16 tokens at a time: it takes about .* GB, and 1e-05 GB are free.\nLower --context-length"):
        nanogpt.train(story, tmp_path / "run", **RUN)
    with pytest.raises(UserError, match=r"even with 4 windows .*\nLower --micro-batch-size"):
        nanogpt.train(story, tmp_path / "run", micro_batch_size=4, **RUN)
    assert not (tmp_path / "run").exists()


def test_a_model_is_not_measured_on_the_tokens_of_another(story, tmp_path, whole):
    (tmp_path / "other.txt").write_text("0123456789 " * 200)
    nanogpt.train(tmp_path / "other.txt", tmp_path / "run", **RUN | {"steps": 2})
    (whole / "stranger.safetensors").write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="Name a text"):
        nanogpt.load(whole / "stranger.safetensors").evaluate()


def test_an_unfinished_run_has_a_verdict_too(story, tmp_path):
    stop = stop_at(50, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop, **RUN)
    assert nanogpt.load(tmp_path / "run").evaluate().verdict.kind == "undertrained"


def test_the_library_refuses_in_words(story, tmp_path, whole):
    model = nanogpt.load(whole)
    for ids in ([], [[]], [[1] * 17], [[1, 2], [3]], [[10**6]], [[-1]]):
        with pytest.raises(UserError, match="logits takes rows"):
            model.logits(ids)
    for wrong in ({"stop": ["a", 3]}, {"stop": [""]}, {"temprature": 1}, {"top_p": 0}):
        with pytest.raises(UserError):
            model.stream("a", **wrong)
    for seed in (-1, 2**63):
        with pytest.raises(UserError, match="seed"):
            model.stream("a", seed=seed)
    with pytest.raises(UserError, match="load takes"):
        nanogpt.load(whole, steps=5)
    with pytest.raises(UserError, match="no run to go on with"):
        nanogpt.train(story, resume=True)
    with pytest.raises(UserError, match="at step 100 already"):
        nanogpt.train(out=whole, resume=True, steps=50)
    assert "".join(model.stream("The", stop=" ", seed=1)).count(" ") == 0
    with pytest.raises(UserError, match="at once"):
        nanogpt.train(story, whole, resume=True, overwrite=True)


def test_without_a_folder_nothing_is_kept_but_the_model(story, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nanogpt.train(story, **RUN | {"steps": 2})
    assert sorted(os.listdir(tmp_path)) == ["story.txt"]
    assert model.logits([[1, 2, 3]]).shape == (1, 3, model.tokenizer.vocab_size)


def test_evaluation_without_text_or_run_says_what_to_do(story, tmp_path):
    nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 2})
    lone = tmp_path / "elsewhere" / "m.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((tmp_path / "run" / "model.safetensors").read_bytes())
    model = nanogpt.load(lone)
    with pytest.raises(UserError, match="Name a text"):
        model.evaluate()
    assert model.evaluate(story).baselines == {}
    assert nanogpt.load(tmp_path / "run").evaluate(story).baselines["bigram"] > 0
    with pytest.raises(UserError, match="at most 16 tokens, not 17"):
        model.evaluate(story, context_length=17)


def test_prepared_text_that_is_gone_is_made_again(story, tmp_path):
    expected = nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 2}).evaluate().val_loss
    folder = Path(json.loads((tmp_path / "run" / "text.json").read_text())["folder"])
    next(folder.glob("val-*.bin")).unlink()  # a part of it
    assert nanogpt.load(tmp_path / "run", dtype="float32").evaluate().val_loss == expected
    shutil.rmtree(folder)  # and all of it
    assert nanogpt.load(tmp_path / "run", dtype="float32").evaluate().val_loss == expected


def test_targets_are_counted_before_they_leave_the_processor(make_model):
    text = SimpleNamespace(train=np.arange(8, dtype=np.uint8), windows=data.Documents(np.array([3, 8]), 8))
    settings = SimpleNamespace(batch_size=2, seed=1)
    place = SimpleNamespace(send=lambda tensor: tensor.to("meta"))
    run = SimpleNamespace(settings=settings, text=text, model=make_model(), machine=place, rows=range(2), ranks=machine.Ranks())
    x, y, _, count = trainer.Trainer.batch(run, 0)
    assert (x.device.type, y.shape, count) == ("meta", (2, 8), 2 + 4)  # meta tensors cannot be counted


def test_an_evaluation_ends_documents_as_the_training_did(story, tmp_path):
    lines = story.read_text().splitlines()
    table = tmp_path / "story.jsonl"
    table.write_text("".join(json.dumps({"body": line, "text": "The cat"}) + "\n" for line in lines))
    book = nanogpt.train(story, **RUN | {"steps": 1})  # saw no end
    assert book.evaluate(table, field="body").tokens == len("".join(lines)) - 1
    model = nanogpt.train(table, tmp_path / "run", field="body", **RUN | {"steps": 1})
    loaded = nanogpt.load(tmp_path / "run", dtype="float32")
    assert loaded.evaluate(table) == model.evaluate(table, field="body")  # by the field of its own run
    assert model.evaluate(table).tokens == len("".join(lines)) + len(lines) - 1
    assert model.evaluate(story).tokens == len(story.read_text()) - 1
    prepare_folder([str(story)], TextConfig(), tmp_path / "data")
    with pytest.raises(UserError, match="prepared for training"):
        model.evaluate(tmp_path / "data")


def test_a_prepared_folder_that_holds_another_text_by_now_is_refused(story, tmp_path):
    other, data, run = tmp_path / "other.txt", tmp_path / "data", tmp_path / "run"
    prepare_folder([str(story)], TextConfig(), data)
    nanogpt.train(data, run, **RUN | {"steps": 2})
    before = (run / "text.json").read_bytes()
    shutil.rmtree(data)
    other.write_text(story.read_text().replace("fox", "dog"))
    prepare_folder([str(other)], TextConfig(), data)
    for go_on in (lambda: nanogpt.train(out=run, resume=True, steps=4), lambda: nanogpt.load(run).evaluate()):
        with pytest.raises(UserError, match="is not the one the run"):
            go_on()
    assert (run / "text.json").read_bytes() == before


@pytest.mark.parametrize("tokenizer", ["byte", "word", "bpe", "tokenizer.json"])
def test_every_kind_of_token_can_be_trained_on_and_goes_on(story, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tokenizer.json").write_text(train_tokenizer("bpe", [story.read_text()], 280).to_json(), encoding="utf-8")
    settings = RUN | {"tokenizer": tokenizer, "eval_every": 2}
    first = nanogpt.train(story, "run", **settings | {"steps": 2})
    assert first.evaluate().tokens == len(first._text.val) - 1
    whole = nanogpt.train(story, "whole", **settings | {"steps": 4})
    assert nanogpt.train((), "run", resume=True, steps=4).evaluate().tokens == whole.evaluate().tokens == len(whole._text.val) - 1
    assert first.tokenizer.to_json() == nanogpt.load("run").tokenizer.to_json()
    assert "".join(whole.stream("The cat", seed=1, max_tokens=20))
    loss = whole.evaluate(story)
    assert (loss.bytes, loss.words) == pytest.approx(np.array([len(story.read_text()), len(story.read_text().split())]) * loss.tokens / (loss.tokens + 1))
    assert set(loss.baselines) == {"uniform", "unigram", "bigram", "trigram"}


def test_a_tokenizer_that_has_changed_since_is_noticed(story, tmp_path):
    path, run = tmp_path / "tokenizer.json", tmp_path / "run"
    path.write_text(train_tokenizer("bpe", [story.read_text()], 280).to_json(), encoding="utf-8")
    nanogpt.train(story, run, **RUN | {"tokenizer": str(path), "steps": 2})
    shutil.rmtree(cache_dir() / "tokens")
    path.write_text(train_tokenizer("bpe", [story.read_text()], 270).to_json(), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer of .* makes other tokens than when the run began: then [\d,]+ of the same text, now [\d,]+\."):
        nanogpt.train((), run, resume=True, steps=4)
    path.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        nanogpt.load(run).evaluate()
