"""Judges a training run by its losses: undertrained, healthy, overfitted or diverged."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation: the step, the mean training loss since the last one, and the val loss."""

    step: int
    train_loss: float
    val_loss: float


@dataclass(frozen=True)
class Diagnosis:
    """A judgement of a run.

    Attributes:
        kind: "undertrained", "healthy", "overfitted" or "diverged".
        summary: A sentence with the reason and the advice.
    """

    kind: str
    summary: str

    def asdict(self) -> dict[str, str]:
        """Return the fields as a dictionary."""
        return asdict(self)


def diagnose(
    history: Sequence[EvalPoint],
    baselines: dict[str, float],
    final_loss: float | None = None,
    minutes: float | None = None,
    initial_loss: float | None = None,
) -> Diagnosis:
    """Judge a run by its evaluations.

    Overfitted or diverged: the last validation loss is at least 1 % above the best, while the
    training loss kept falling, or rose too. Undertrained: by the trend of the second half, twice
    the steps would lower the loss by another 1 %, or the best baseline is not beaten. Healthy: none
    of these. A run that never beats its initial checkpoint is undertrained if validation still
    falls, else diverged.

    Args:
        history: The evaluations of the run, at least one.
        baselines: The losses of n-gram models on the validation split.
        final_loss: The loss of the best model on the whole validation split, if known.
        minutes: The time limit of the run, if it has one: advice is then in minutes, not steps.
        initial_loss: The validation loss of the initial checkpoint, if there is one.
    """
    last = history[-1]
    best = min(history, key=lambda point: point.val_loss)
    drop = _loss_drop_per_doubling(history)
    no_gain = ""
    if initial_loss is not None and best.val_loss > initial_loss:
        losses = f"{initial_loss:.3f}; {best.val_loss:.3f} at best"
        no_gain = f"it is still worse than its initial checkpoint ({losses})"
    if last.val_loss > 1.01 * best.val_loss:
        return _past_the_best(best, last, no_gain)
    if no_gain and drop is not None and drop <= 0.01 * last.val_loss:
        return Diagnosis("diverged", f"Diverged: {no_gain}; lower the learning rate.")
    if no_gain:
        return _undertrained(no_gain, last.step, 2 * last.step, minutes)
    loss = best.val_loss if final_loss is None else final_loss
    baseline = min(baselines, key=lambda name: baselines[name], default=None)
    if baseline and loss > baselines[baseline]:
        reason = f"it is still worse than the {baseline} baseline ({baselines[baseline]:.3f})"
        steps = max(2 * last.step, _steps_to_reach(baselines[baseline], history))
        return _undertrained(reason, last.step, steps, minutes)
    if drop is None:
        return _undertrained("one evaluation shows no trend", last.step, 2 * last.step, minutes)
    if drop > 0.01 * last.val_loss:
        drop = min(drop, last.val_loss)
        reason = f"validation still falls (about {drop:.2f} more for twice the steps)"
        return _undertrained(reason, last.step, 2 * last.step, minutes)
    return Diagnosis(
        "healthy",
        f"Healthy: validation has levelled off at {loss:.3f} without overfitting. To improve it, "
        "use a larger model or more text.",
    )


def _past_the_best(best: EvalPoint, last: EvalPoint, no_gain: str) -> Diagnosis:
    losses = f"(validation {best.val_loss:.3f} there, {last.val_loss:.3f} at the end)"
    kind, change = "diverged", "even the training loss gets worse"
    advice = "Lower the learning rate."
    if last.train_loss < best.train_loss:
        kind, change = "overfitted", "only the training loss improves"
        advice = "Use more text, more dropout or a smaller model."
    saved = f"The saved model is that of step {best.step:,}"
    if no_gain:
        saved += f", and {no_gain}"
    summary = f"{kind.title()}: since step {best.step:,} {change} {losses}. {saved}. {advice}"
    return Diagnosis(kind, summary)


def _undertrained(reason: str, done: int, steps: int, minutes: float | None) -> Diagnosis:
    setting = f"steps = {steps}"
    if minutes is not None:
        setting = f"minutes = {float(f'{minutes * steps / done:.2g}'):g}"
    advice = f"Resume with {setting}, about {steps / done:.0f} times as long."
    return Diagnosis("undertrained", f"Undertrained: {reason}. {advice}")


def _loss_drop_per_doubling(history: Sequence[EvalPoint]) -> float | None:
    """Return the expected drop of the validation loss if the steps are doubled.

    It extrapolates a line through the loss over log(step) in the second half of the run, and is
    None if there are fewer than two evaluations.
    """
    points = [point for point in history if point.step >= history[-1].step / 2]
    if len(points) < 2:
        points = list(history[-2:])
    if len(points) < 2:
        return None
    log_steps = [math.log(point.step) for point in points]
    slope = np.polyfit(log_steps, [point.val_loss for point in points], 1)[0]
    return float(-slope * math.log(2))


def _steps_to_reach(loss: float, history: Sequence[EvalPoint]) -> int:
    """Return the steps at which the trend reaches `loss`, at most 100 times those done."""
    drop = _loss_drop_per_doubling(history)
    last = history[-1]
    doublings = (last.val_loss - loss) / drop if drop and drop > 0 else 1.0
    steps = last.step * 2 ** min(doublings, math.log2(100))
    return int(float(f"{steps:.1e}"))  # two significant digits
