"""Time and step limits: a run ends in time, with a complete schedule, also when resumed."""

import math
import signal
from types import SimpleNamespace

import pytest
from helpers import TINY, metrics_without_timings, stop_at

import nanogpt
from nanogpt import api
from nanogpt.config import TrainingConfig
from nanogpt.errors import Notice, UserError
from nanogpt.training import budget, recipe, resolve, trainer
from nanogpt.training.budget import TimeBudget, val_token_budget
from nanogpt.training.events import StepEnd, TrainEnd
from nanogpt.training.state import TrainState

RUN = TINY | {"dropout": 0.1, "steps": 100, "eval_every": 20, "device": "cpu"}
TIMED = {name: value for name, value in RUN.items() if name != "steps"}
TIMED |= {"minutes": 0.5, "eval_every": 100}


class EndRunError(Exception):
    """Ends a run at its first event."""


@pytest.fixture
def full_run(story, tmp_path):
    """A run of 100 steps."""
    nanogpt.train(story, tmp_path / "full_run", **RUN)
    return tmp_path / "full_run"


class Clock:
    """A clock that advances by 10 ms at every call."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.01
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    timing = SimpleNamespace(monotonic=clock, perf_counter=clock)
    for module in (trainer, budget, api, resolve):
        monkeypatch.setattr(module, "time", timing)
    # The clock ends the run, not the number of epochs.
    monkeypatch.setattr(recipe, "MAX_EPOCHS", 10**6)
    return clock


def test_minutes_end_the_run_in_time_with_a_complete_schedule(story, tmp_path, clock):
    events = []
    settings = TIMED | {"cooldown_fraction": 0.5}
    nanogpt.train(story, tmp_path / "run", on_event=events.append, **settings)
    assert 25 < clock.now < 30
    steps = [event for event in events if isinstance(event, StepEnd)]
    rates = [step.learning_rate for step in steps]
    assert len(steps) > 100
    assert steps[-1].progress == pytest.approx(1.0, abs=0.01)
    assert rates[-1] < 0.03 * max(rates)
    assert max(rates) == rates[len(rates) // 4] == settings["learning_rate"]
    assert isinstance(events[-1], TrainEnd)


def test_minutes_resume_trains_for_the_remaining_time(story, tmp_path, clock):
    with pytest.raises(KeyboardInterrupt):
        nanogpt.train(story, tmp_path / "run", on_event=stop_at(100, signal.SIGINT), **TIMED)
    events = []
    nanogpt.train(out=tmp_path / "run", resume=True, on_event=events.append)
    assert clock.now < 30 + 2
    steps = [event for event in events if isinstance(event, StepEnd)]
    assert steps[0].step == 101
    assert 0.1 < steps[0].progress < steps[-1].progress
    assert steps[-1].progress == pytest.approx(1.0, abs=0.02)
    nanogpt.train(out=tmp_path / "run", resume=True, minutes=1.0, on_event=events.append)
    assert clock.now > 50


@pytest.mark.parametrize(
    ("steps", "minutes", "last"), [(20, 100.0, range(20, 21)), (10**6, 0.5, range(100, 10**4))]
)
def test_steps_and_minutes_end_the_run_whichever_is_first(story, clock, steps, minutes, last):
    events = []
    nanogpt.train(
        story,
        on_event=events.append,
        **RUN | {"steps": steps, "minutes": minutes, "eval_every": 1000, "cooldown_fraction": 0.5},
    )
    steps = [event for event in events if isinstance(event, StepEnd)]
    assert steps[-1].step in last
    assert steps[-1].progress == pytest.approx(1.0, abs=0.01)
    assert steps[-1].learning_rate < 0.1 * max(step.learning_rate for step in steps)


def test_minutes_may_extend_a_run_limited_by_steps(story, tmp_path, clock, full_run):
    events = []
    nanogpt.train(out=full_run, resume=True, minutes=1.0, on_event=events.append)
    assert events[-1].step > 100
    with pytest.raises(UserError, match=r"has already taken .* minutes \(limit minutes = 0\.01\)"):
        nanogpt.train(out=full_run, resume=True, minutes=0.01)


def test_minutes_resume_of_a_complete_run_trains_no_step(story, tmp_path, clock):
    nanogpt.train(story, tmp_path / "run", **TIMED)
    events = []
    with pytest.warns(Notice, match=r"leaves no time for training: .* Set minutes to at least 1"):
        nanogpt.train(out=tmp_path / "run", resume=True, on_event=events.append)
    assert not any(isinstance(event, StepEnd) for event in events)


def test_minutes_resume_of_a_run_ended_by_steps_changes_nothing(story, tmp_path):
    settings = RUN | {"steps": 3, "minutes": 5}
    expected = nanogpt.train(story, tmp_path / "run", **settings).summary
    assert nanogpt.train(out=tmp_path / "run", resume=True).summary == expected


def test_minutes_too_short_warns(story, tmp_path):
    rates = []

    def add_rate(event):
        if isinstance(event, StepEnd):
            rates.append(event.learning_rate)

    settings = TIMED | {"minutes": 0.0001, "eval_every": 20, "cooldown_fraction": 0.5}
    message = r"leaves time for a single training step: .* Set minutes to at least"
    with pytest.warns(Notice, match=message):
        model = nanogpt.train(story, on_event=add_rate, **settings)
    assert model.summary["step"] == 1
    assert rates == [pytest.approx(RUN["learning_rate"], rel=0.5)]


def test_compile_choice_considers_the_number_of_steps(story):
    events = []
    nanogpt.train(
        story, minutes=1000.0, on_event=events.append, **RUN | {"steps": 2, "compile": None}
    )
    assert not events[0].config.device.compile


def test_recipe_fills_in_open_settings(story, tmp_path, clock):
    events = []
    model = nanogpt.train(
        story,
        minutes=0.2,
        n_layer=1,
        n_embd=32,
        n_head=1,
        dtype="float32",
        compile=False,
        on_event=events.append,
    )
    started = events[0]
    chosen = {choice.name: choice.value for choice in started.choices}
    assert (
        started.config.model.n_layer,
        started.config.model.n_embd,
        started.config.model.arch,
    ) == (1, 32, "qwen3")
    assert chosen.keys() >= {"optimizer", "batch_size", "learning_rate", "attention"}
    assert not chosen.keys() & {"n_layer", "n_embd", "minutes", "dtype", "compile"}
    assert started.config.training.optimizer == "muon"
    assert model.summary["val_loss"] > 0


def test_settings_valid_with_the_recipe_but_not_the_defaults(story, clock):
    """The default of 6 heads does not divide a width of 128."""

    def check(event):
        assert (event.config.model.n_embd, event.config.model.n_kv_head) == (128, 2)
        raise EndRunError

    with pytest.raises(EndRunError):
        nanogpt.train(
            story,
            on_event=check,
            minutes=0.1,
            n_embd=128,
            n_kv_head=2,
            n_layer=1,
            dtype="float32",
            compile=False,
            attention="sdpa",
        )


@pytest.mark.parametrize(
    ("settings", "minutes", "steps"),
    [
        ({}, 5.0, None),
        ({"steps": 7}, None, 7),
        ({"minutes": 2.0}, 2.0, None),
        ({"preset": "nano"}, None, 5000),
        ({"preset": "nano", "minutes": 2.0}, 2.0, None),
    ],
)
def test_default_limits_of_a_run(story, settings, minutes, steps):
    """Without any limit, a run takes five minutes."""

    def check(event):
        assert event.config.training.minutes == minutes
        # On a text this short, the recipe may also limit the steps of a timed run.
        assert steps in (None, event.config.training.steps)
        raise EndRunError

    with pytest.raises(EndRunError):
        nanogpt.train(
            story,
            on_event=check,
            n_embd=16,
            n_head=1,
            n_layer=1,
            context_length=16,
            dtype="float32",
            compile=False,
            attention="sdpa",
            **settings,
        )


def test_val_tokens_stay_the_same_when_a_run_is_extended(tmp_path, story):
    story.write_text(story.read_text() * 40)
    nanogpt.train(story, tmp_path / "run", **RUN | {"steps": 10, "eval_every": 5})
    nanogpt.train(out=tmp_path / "run", resume=True, steps=400, eval_every=100)
    assert (
        len(
            {
                row["val_tokens"]
                for row in metrics_without_timings(tmp_path / "run")
                if "val_loss" in row
            }
        )
        == 1
    )


@pytest.fixture
def fake_time():
    """A clock that stands still unless a test sets `now`."""
    time = SimpleNamespace(now=0.0)
    time.clock = lambda: time.now
    return time


def make_budget(fake_time, step=0, enforce=True, **limits):
    settings = TrainingConfig(**{"steps": None, "minutes": None} | limits)
    return TimeBudget(settings, TrainState(step=step), 0.0, fake_time.clock, enforce)


def test_time_budget_by_steps(fake_time):
    by_steps = make_budget(fake_time, steps=10)
    assert by_steps.estimate_num_steps() == 10
    by_steps.start_training(teardown_seconds=0.0)
    fake_time.now = 1e6
    assert (by_steps.progress(1.0), by_steps.is_done()) == (0.1, False)
    by_steps.state.step = 10
    assert (by_steps.progress(1.0), by_steps.is_done()) == (1.0, True)


def test_time_budget_by_minutes_reserves_setup_and_teardown(fake_time):
    timed = make_budget(fake_time, minutes=1.0)
    timed.add_step(2.0)
    fake_time.now = 10.0
    assert timed.estimate_num_steps() == 25
    timed.start_training(teardown_seconds=20.0)
    assert (timed.state.setup_seconds, timed.train_seconds_budget) == (10.0, 30.0)
    assert timed.progress(3.0) == pytest.approx(0.2)
    fake_time.now = 37.9
    assert not timed.is_done()
    fake_time.now = 38.0  # the next step would end 30 s after the start of training
    assert timed.is_done()
    timed.add_step(3.0)
    assert timed.ema_step_seconds == pytest.approx(2.2)


def test_time_budget_ignores_the_clock_unless_enforced(fake_time):
    other_rank = make_budget(fake_time, minutes=1.0, enforce=False)
    other_rank.add_step(1.0)
    other_rank.start_training(teardown_seconds=59.5)
    assert other_rank.train_seconds_budget == math.inf
    fake_time.now = 1e6
    assert not other_rank.is_done()


def test_val_token_budget_limits_the_cost_of_evaluations():
    settings = TrainingConfig(batch_size=8, eval_every=10)
    assert val_token_budget(settings, 64, 100, num_val_tokens=500) is None
    assert val_token_budget(settings, 64, 100, num_val_tokens=10**6) == budget.MIN_EVAL_TOKENS
    # One evaluation in 1000 steps: 2 % of their FLOPs, at three forward passes per step.
    rarely = settings.model_copy(update={"eval_every": 1000})
    assert val_token_budget(rarely, 64, 1000, num_val_tokens=10**6) == 3 * 0.02 * 1000 * 8 * 64
