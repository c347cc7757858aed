"""Trackers get the numbers of metrics.jsonl, and cannot end a run. Each is tried with the real program where it is installed, and otherwise with a stand-in."""

import sys
import types

import pytest
from conftest import TINY

import nanogpt
from nanogpt import cli
from nanogpt.errors import Notice, UserError
from nanogpt.report import Evaluated, Stepped, read_records
from nanogpt.report.trackers import NUMBERS, TRACKERS

SETTINGS = TINY | {"steps": 4, "eval_every": 2, "dropout": 0.0}


class Recorder(types.ModuleType):
    """Stands in for any of the three packages, and keeps what it was told."""

    def __init__(self):
        super().__init__("recorder")
        self.begun, self.told, self.finished, self.fails = {}, [], 0, False

    def init(self, **settings):
        self.begun = settings
        return self

    def SummaryWriter(self, folder, purge_step):
        self.begun = {"folder": folder, "purge_step": purge_step}
        return self

    def Settings(self, **settings):
        return settings

    def log(self, values, step):
        if self.fails:
            raise RuntimeError("the disk of the tracker is full")
        self.told.append((step, dict(values)))

    def add_scalar(self, name, value, step):
        self.log({name: value}, step)

    def finish(self):
        self.finished += 1

    close = finish


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    for module, _ in TRACKERS.values():
        monkeypatch.setitem(sys.modules, module, recorder)
    return recorder


def wanted(run):
    """Every number that a tracker is to get, in order."""
    for record in read_records(run / "metrics.jsonl"):
        yield from ((record["step"], name, record[name]) for name in NUMBERS[Evaluated if "val_loss" in record else Stepped])


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_every_number_and_is_told_of_the_end(story, tmp_path, recorder, name, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    nanogpt.train(story, tmp_path / "run", track=name, **SETTINGS)
    assert [(step, key, value) for step, values in recorder.told for key, value in values.items()] == list(wanted(tmp_path / "run"))
    assert len(recorder.told) > 4
    assert recorder.finished == 1
    if name == "tensorboard":
        assert recorder.begun == {"folder": tmp_path / "run" / "tensorboard", "purge_step": None}
    else:
        assert (recorder.begun["project"], recorder.begun["name"], recorder.begun["config"]["n_embd"]) == ("nanogpt", "run", 16)
    if name == "wandb":
        assert recorder.begun["mode"] == "offline"


def test_what_a_person_set_for_wandb_stands(story, tmp_path, recorder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    nanogpt.train(story, tmp_path / "run", track=["wandb"], **SETTINGS)
    assert recorder.begun["mode"] == "disabled"


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(story, tmp_path, recorder):
    recorder.fails = True
    with pytest.warns(Notice, match="trackio failed, so the run goes on without it: the disk of the tracker is full") as warned:
        nanogpt.train(story, tmp_path / "run", track=["trackio"], **SETTINGS)
    assert len(warned) == 1
    assert recorder.finished == 0
    assert read_records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4


def test_a_tracker_is_told_of_the_end_also_when_the_run_fails(story, tmp_path, recorder):
    def fail(event):
        if getattr(event, "step", 0) == 3:
            raise RuntimeError("the program's own")

    with pytest.raises(RuntimeError, match="the program's own"):
        nanogpt.train(story, tmp_path / "run", track=["wandb", "trackio"], on_event=fail, **SETTINGS)
    assert recorder.finished == 2


@pytest.mark.parametrize(("name", "module"), [(name, module) for name, (module, _) in TRACKERS.items()])
def test_a_tracker_that_is_not_installed_is_refused_before_any_work(story, tmp_path, monkeypatch, capsys, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(story), "--out", str(tmp_path / "run"), "--track", name])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"--track {name} takes a package that is not installed" in said
    assert f"pip install {name}" in said
    assert not (tmp_path / "run").exists()


def test_there_are_three_trackers(story, tmp_path):
    with pytest.raises(UserError, match=r"no tracker 'mlflow'.\nThe trackers: tensorboard, trackio, wandb"):
        nanogpt.train(story, tmp_path / "run", track="mlflow", **SETTINGS)


def test_a_run_that_is_tracked_needs_a_folder(story, recorder):
    with pytest.raises(UserError, match="needs a folder"):
        nanogpt.train(story, track="tensorboard", **SETTINGS)


def test_tensorboard_reads_what_was_written(story, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    nanogpt.train(story, tmp_path / "run", track="tensorboard", **SETTINGS)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_loss", "learning_rate"):
        told = [(step, value) for step, key, value in wanted(tmp_path / "run") if key == name]
        assert [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)] == told


def test_trackio_has_what_was_written(story, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    monkeypatch.setattr(storage, "TRACKIO_DIR", tmp_path / "trackio")
    nanogpt.train(story, tmp_path / "run", track="trackio", **SETTINGS)
    told = [(record["step"], name, value) for record in storage.SQLiteStorage.get_logs("nanogpt", "run") for name, value in record.items()]
    assert [entry for entry in told if entry[1] not in ("step", "timestamp")] == list(wanted(tmp_path / "run"))
    assert not capsys.readouterr().out
