"""The training loop: it learns, and a resumed run equals one that never stopped, bit for bit."""

import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, assert_runs_equal, metrics_without_timings, stop_at

import nanogpt
from nanogpt import checkpoint
from nanogpt.data import batches
from nanogpt.device import compile
from nanogpt.distributed.context import DistContext
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import EvalLoss
from nanogpt.files import cache_dir
from nanogpt.training import checkpointer, stragglers, trainer
from nanogpt.training.batch_loader import BatchLoader
from nanogpt.training.events import (
    EvalEnd,
    SampleEnd,
    SaveEnd,
    SaveStart,
    StepEnd,
    TrainEnd,
    TrainStart,
)

RUN = TINY | {"dropout": 0.1, "steps": 100, "eval_every": 20, "device": "cpu"}


@pytest.fixture
def full_run(story, tmp_path):
    """A run of 100 steps that was never stopped."""
    nanogpt.train(story, tmp_path / "full_run", **RUN)
    return tmp_path / "full_run"


def test_train_learns_and_emits_all_events(story, tmp_path):
    events = []
    model = nanogpt.train(
        story, tmp_path / "run", on_event=events.append, **RUN | {"steps": 200, "dropout": 0.0}
    )
    kinds = [type(event) for event in events]
    assert kinds[0] is TrainStart
    assert kinds.count(StepEnd) == 200
    assert kinds[-5:] == [EvalEnd, SampleEnd, SaveStart, SaveEnd, TrainEnd]
    end = events[-1]
    assert end.loss.loss < end.baselines["unigram"] < end.baselines["uniform"]
    assert model.summary["val_loss"] == end.loss.loss == pytest.approx(model.evaluate().loss)
    assert "The " in "".join(model.stream("The cat", seed=1, max_tokens=200))
    evals = [event for event in events if isinstance(event, EvalEnd)]
    best = min(evals, key=lambda event: event.val_loss)
    assert end.best_step == best.step


def test_train_is_reproducible_by_seed(story, tmp_path, full_run):
    nanogpt.train(story, tmp_path / "same_seed", **RUN)
    assert_runs_equal(tmp_path / "same_seed", full_run)
    nanogpt.train(story, tmp_path / "other_seed", seed=5, **RUN)
    assert metrics_without_timings(tmp_path / "other_seed") != metrics_without_timings(full_run)


@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "precision", [{}, {"dtype": "bfloat16", "attention": "eager"}], ids=["float32", "bfloat16"]
)
def test_resume_is_bit_exact(story, tmp_path, arch, optimizer, precision):
    short = RUN | {"steps": 30, "eval_every": 10, "dropout": 0.3, "cooldown_fraction": 0.5}
    settings = short | {"arch": arch, "optimizer": optimizer} | precision
    assert_resume_is_exact(story, tmp_path, settings)


@pytest.mark.skipif(
    not compile.has_compiler(torch.device("cpu")), reason="there is no C++ compiler"
)
@pytest.mark.parametrize("arch", ["gpt2", "qwen3"])
def test_resume_compiled_is_bit_exact_and_close_to_eager(story, tmp_path, arch):
    short = RUN | {"arch": arch, "optimizer": "muon", "steps": 30, "eval_every": 10, "n_layer": 1}
    compiled = assert_resume_is_exact(story, tmp_path, short | {"compile": True})
    eager = nanogpt.train(story, tmp_path / "eager", **short)
    assert compiled.summary["val_loss"] == pytest.approx(eager.summary["val_loss"], rel=1e-3)
    measurements = json.loads((cache_dir() / "measurements.json").read_text())
    assert any(f"compile speedup {arch} n_embd 16 dropout" in name for name in measurements)


def assert_resume_is_exact(story, tmp_path, settings):
    """Compare a run that is stopped and resumed with one that is not; return the latter."""
    full_run = nanogpt.train(story, tmp_path / "full_run", **settings)
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(13, signal.SIGINT), **settings)
    nanogpt.train(out=tmp_path / "run", resume=True)
    assert_runs_equal(tmp_path / "run", tmp_path / "full_run")
    return full_run


@pytest.mark.parametrize("step", [1, 50, 60, 99])
def test_resume_after_stop_equals_never_stopping(story, tmp_path, full_run, step):
    stop = stop_at(step, signal.SIGINT)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, run, on_event=stop, **RUN)
    assert checkpoint.latest_step(run) == step
    nanogpt.train(out=run, resume=True)
    assert_runs_equal(run, full_run)


def test_resume_after_crash_repeats_steps_since_last_save(story, tmp_path, full_run):
    def fail(event):
        if isinstance(event, StepEnd) and event.step == 57:
            raise RuntimeError("power cut")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="power cut"):
        nanogpt.train(story, run, on_event=fail, **RUN)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 58, "train_lo')  # the last line of a killed process
    assert checkpoint.latest_step(run) == 40
    nanogpt.train(story, run, resume=True)
    assert_runs_equal(run, full_run)


TRAIN_SCRIPT = f"""
import sys, warnings
import nanogpt

warnings.simplefilter("ignore")

def print_event(event):
    print(type(event).__name__, flush=True)

nanogpt.train(sys.argv[1], sys.argv[2], resume=True, on_event=print_event, **{RUN})
"""


def spawn(story, run):
    """Start a process that trains or resumes, and prints the names of its events."""
    command = [sys.executable, "-c", TRAIN_SCRIPT, story, run]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(story, tmp_path, full_run, number):
    run = tmp_path / "run"
    process = spawn(story, run)
    for line in process.stdout:
        if line == "StepEnd\n":
            process.send_signal(number)
            break
    process.stdout.read()
    assert process.wait() == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert 1 <= checkpoint.latest_step(run) < 100
    nanogpt.train(out=run, resume=True)
    assert_runs_equal(run, full_run)


def test_resume_after_kills_equals_never_stopping(story, tmp_path, full_run):
    """Kill the process during a step, an evaluation or a save, depending on the delay."""
    run = tmp_path / "run"
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = spawn(story, run)
        for line in process.stdout:
            if line == "SaveEnd\n":
                time.sleep(delay)
                break
        process.kill()
        process.wait()
        process.stdout.close()
    nanogpt.train(story, run, resume=True, **RUN)
    assert_runs_equal(run, full_run)


def test_resume_after_kill_during_save_uses_previous_save(story, tmp_path, full_run):
    kill_script = """
import os
import nanogpt.files

state_files = []
os_replace = os.replace

def replace(source, target):
    if "state" in str(target):
        state_files.append(target)
    if len(state_files) == {n}:
        os.kill(os.getpid(), 9)
    os_replace(source, target)

nanogpt.files.os.replace = replace
"""
    # Each save renames the weights, the optimizer state, the folder, and `latest`.
    for n in (5, 7, 8):
        run = tmp_path / f"run{n}"
        script = kill_script.replace("{n}", str(n)) + TRAIN_SCRIPT
        command = [sys.executable, "-c", script, story, run]
        process = subprocess.run(command, capture_output=True)
        assert process.returncode == -signal.SIGKILL
        assert checkpoint.latest_step(run) == 20
        nanogpt.train(out=run, resume=True)
        assert_runs_equal(run, full_run)


def test_compile_failure_falls_back_to_eager(story, tmp_path, monkeypatch):
    def compile_loss(machine, model, loss_sum):
        errors = iter([RuntimeError("g++: error: no such thing\nand more")])

        def fail_once(*inputs):
            if error := next(errors, None):
                raise error
            raise AssertionError("the compiled loss was called again")

        return fail_once

    monkeypatch.setattr(compile, "compile_loss", compile_loss)
    message = r"torch.compile failed.*slower \(g\+\+: error: no such thing and more\)"
    with pytest.warns(Notice, match=message):
        nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 4, "compile": True})
    nanogpt.train(story, tmp_path / "eager", **RUN | {"steps": 4})
    assert metrics_without_timings(tmp_path / "run") == metrics_without_timings(tmp_path / "eager")


def test_nan_loss_stops_and_keeps_the_last_state(story, tmp_path):
    save_state = checkpoint.save_state

    def save_state_and_poison(run, step, model, *args):
        future = save_state(run, step, model, *args)
        with torch.no_grad():
            model.wte.weight[:] = float("nan")
        return future

    run = tmp_path / "run"
    message = (
        r"not finite in step 21: loss nan, gradient norm nan, at learning rate .*\. "
        r"Step 20 is saved in .*\nSet learning_rate=0\.001"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_state", save_state_and_poison)
        with pytest.raises(UserError, match=message):
            nanogpt.train(story, run, **RUN)
    assert nanogpt.load(run).evaluate().loss < 10
    assert checkpoint.latest_step(run) == 20


def test_nan_validation_loss_is_named_with_its_step(story, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "evaluate", lambda *args, **kwargs: EvalLoss(math.nan, 100, 100.0))
    message = r"validation loss is not finite: nan after step 10\. Nothing is saved\."
    with pytest.raises(UserError, match=message):
        nanogpt.train(story, tmp_path / "run", **RUN | {"eval_every": 10})


def test_patience_stops_and_keeps_the_best_model(tmp_path, monkeypatch, story):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])

    def evaluate(*args, **kwargs):
        return EvalLoss(next(losses) * 100, 100, 100.0)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    events = []
    nanogpt.train(
        story, tmp_path / "run", patience=2, on_event=events.append, **RUN | {"eval_every": 10}
    )
    assert [event.step for event in events if isinstance(event, EvalEnd)] == [10, 20, 30, 40]
    assert events[-1].best_step == 20


def test_stop_before_first_evaluation_saves_a_model(story, tmp_path):
    stop = stop_at(5, signal.SIGTERM)
    with pytest.raises(SystemExit):
        nanogpt.train(story, tmp_path / "run", on_event=stop, **RUN)
    model = nanogpt.load(tmp_path / "run")
    assert len("".join(model.stream("The", max_tokens=9, seed=1))) == 9
    assert model.evaluate().diagnosis is None
    assert "step 5" in repr(model)


def test_save_interval_saves_without_changing_the_run(story, tmp_path, full_run, monkeypatch):
    monkeypatch.setattr(checkpointer, "SAVE_INTERVAL", 0.0)
    events = []
    nanogpt.train(story, tmp_path / "run", on_event=events.append, **RUN)
    saved_steps = [event.step for event in events if isinstance(event, SaveEnd)]
    assert saved_steps == list(range(1, 101))
    assert_runs_equal(tmp_path / "run", full_run)


def test_batch_loader_counts_targets_before_the_transfer():
    windows = batches.DocumentWindows(np.array([3, 8]), 8)
    data = SimpleNamespace(train=np.arange(8, dtype=np.uint8), document_windows=windows)
    settings = SimpleNamespace(batch_size=2, seed=1)
    # Meta tensors cannot be counted.
    machine = SimpleNamespace(to_device=lambda tensor: tensor.to("meta"))
    loader = BatchLoader(data, settings, 8, machine, DistContext())
    batch = loader.get(0)
    assert (batch.x.device.type, batch.y.shape, batch.num_targets) == ("meta", (2, 8), 2 + 4)
    assert loader.get(0) is batch
    assert [len(x) for x, _, _ in batch.split(1)] == [1, 1]


def test_straggler_detector_warns_of_slow_ranks(tmp_path):
    machine = SimpleNamespace(
        record_event=iter([0.0, 1.0, 5.0, 8.0]).__next__,
        elapsed_seconds=lambda start, end: end - start,
    )
    dist = SimpleNamespace(
        is_main_process=True, all_gather_object=lambda seconds: [1.0, 1.0, seconds]
    )
    detector = stragglers.StragglerDetector(machine, dist, tmp_path / "ranks.jsonl")
    for _ in range(2):
        detector.record_start()
        detector.record_end()
        detector.add_step()
    with pytest.warns(Notice, match=r"rank 2 \(2\.0x the median\).*ranks\.jsonl"):
        assert detector.check_stragglers() == [1.0, 1.0, 2.0]


def test_interrupted_run_has_a_diagnosis(story, tmp_path):
    stop = stop_at(50, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop, **RUN)
    assert nanogpt.load(tmp_path / "run").evaluate().diagnosis.kind == "undertrained"
