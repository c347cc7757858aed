"""Trackers receive the numbers of metrics.jsonl, and cannot end a run.

All are tested with a fake package; TensorBoard and trackio also with the real one if installed.
"""

import sys
import types

import pytest
from helpers import TINY

import nanogpt
from nanogpt.cli.main import main
from nanogpt.errors import Notice, UserError
from nanogpt.run_folder import read_jsonl
from nanogpt.trackers import METRICS, TRACKERS
from nanogpt.training.events import EvalEnd, StepEnd

SETTINGS = TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0}


class Recorder(types.ModuleType):
    """A fake of all three packages that records its calls."""

    def __init__(self):
        super().__init__("recorder")
        self.init_args, self.logged, self.num_finished, self.fails = {}, [], 0, False

    def init(self, **settings):
        self.init_args = settings
        return self

    def SummaryWriter(self, folder, purge_step):  # noqa: N802 (TensorBoard's name)
        return self.init(folder=folder, purge_step=purge_step)

    def Settings(self, **settings):  # noqa: N802 (the name in wandb)
        return settings

    def log(self, values, step):
        if self.fails:
            raise RuntimeError("the disk of the tracker is full")
        self.logged.append((step, dict(values)))

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def finish(self):
        self.num_finished += 1

    close = finish


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    for module, _ in TRACKERS.values():
        monkeypatch.setitem(sys.modules, module, recorder)
    return recorder


def expected_numbers(run):
    """Yield every number that a tracker should receive: (step, name, value)."""
    for record in read_jsonl(run / "metrics.jsonl"):
        for name in METRICS[EvalEnd if "val_loss" in record else StepEnd]:
            yield record["step"], name, record[name]


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_receives_every_number_and_is_finished(
    story, tmp_path, recorder, name, monkeypatch
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    nanogpt.train(story, tmp_path / "run", track=name, **SETTINGS)
    logged = [(step, *item) for step, values in recorder.logged for item in values.items()]
    assert logged == list(expected_numbers(tmp_path / "run"))
    assert len(recorder.logged) > 4
    assert recorder.num_finished == 1
    if name == "tensorboard":
        folder = tmp_path / "run" / "tensorboard"
        assert recorder.init_args == {"folder": folder, "purge_step": None}
    else:
        init_args = recorder.init_args
        assert (init_args["project"], init_args["name"]) == ("nanogpt", "run")
        assert init_args["config"]["n_embd"] == 16
    if name == "wandb":
        assert recorder.init_args["mode"] == "offline"


def test_wandb_mode_of_the_environment_is_kept(story, tmp_path, recorder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    nanogpt.train(story, tmp_path / "run", track=["wandb"], **SETTINGS)
    assert recorder.init_args["mode"] == "disabled"


def test_tracker_failure_is_a_notice_and_the_run_continues(story, tmp_path, recorder):
    recorder.fails = True
    message = "trackio failed; the run continues without it: the disk of the tracker is full"
    with pytest.warns(Notice, match=message) as warnings:
        nanogpt.train(story, tmp_path / "run", track=["trackio"], **SETTINGS)
    assert len(warnings) == 1
    assert recorder.num_finished == 0
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_tracker_is_finished_when_the_run_fails(story, tmp_path, recorder):
    def fail(event):
        if getattr(event, "step", 0) == 3:
            raise RuntimeError("caller's error")

    with pytest.raises(RuntimeError, match="caller's error"):
        nanogpt.train(
            story, tmp_path / "run", track=["wandb", "trackio"], on_event=fail, **SETTINGS
        )
    assert recorder.num_finished == 2


@pytest.mark.parametrize(
    ("name", "module"), [(name, module) for name, (module, _) in TRACKERS.items()]
)
def test_tracker_not_installed_fails_before_any_work(
    story, tmp_path, monkeypatch, capsys, name, module
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as exit_info:
        main(["train", str(story), "--out", str(tmp_path / "run"), "--track", name])
    assert exit_info.value.code == 2
    stderr = capsys.readouterr().err
    assert f"Tracker {name} needs a package that is not installed" in stderr
    assert f"pip install {name}" in stderr
    assert not (tmp_path / "run").exists()


def test_tracker_unknown_name_fails(story, tmp_path):
    message = r"Unknown tracker: 'mlflow'.\nUse one of: tensorboard, trackio, wandb"
    with pytest.raises(UserError, match=message):
        nanogpt.train(story, tmp_path / "run", track="mlflow", **SETTINGS)


def test_tracker_requires_a_run_folder(story, recorder):
    with pytest.raises(UserError, match="needs a folder"):
        nanogpt.train(story, track="tensorboard", **SETTINGS)


def test_tensorboard_files_hold_every_number(story, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    nanogpt.train(story, tmp_path / "run", track="tensorboard", **SETTINGS)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_loss", "learning_rate"):
        numbers = expected_numbers(tmp_path / "run")
        expected = [(step, value) for step, key, value in numbers if key == name]
        scalars = [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]
        assert scalars == expected


def test_trackio_database_holds_every_number(story, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    nanogpt.train(story, tmp_path / "run", track="trackio", **SETTINGS)
    logged = [
        (record["step"], name, value)
        for record in storage.SQLiteStorage.get_logs("nanogpt", "run")
        for name, value in record.items()
    ]
    numbers = [entry for entry in logged if entry[1] not in ("step", "timestamp")]
    assert numbers == list(expected_numbers(tmp_path / "run"))
    assert not capsys.readouterr().out
