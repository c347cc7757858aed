"""Trackers: TensorBoard, trackio and Weights & Biases, for people who watch their runs there.

In: events. Out: the numbers of metrics.jsonl, to each tracker that was asked for. They stay on this machine, without an account, unless WANDB_MODE says
otherwise. Refuses: a tracker that is not installed, before any work. One that fails later is left out from then on: no run ends for its sake.
"""

import importlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from nanogpt.config import flatten
from nanogpt.errors import Notice, UserError
from nanogpt.report.events import Evaluated, Event, Started, Stepped

PROJECT = "nanogpt"
NUMBERS: dict[type, tuple[str, ...]] = {
    Stepped: ("train_loss", "learning_rate", "grad_norm", "tokens_per_second"),
    Evaluated: ("val_loss", "bits_per_byte"),
}


class Tracker(Protocol):
    """What takes numbers by name, each at a step, and is told when there will be no more."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of a step; steps never go back."""

    def finish(self) -> None:
        """Write what is still in memory."""


class TensorBoard:
    """Files in the folder `tensorboard` of the run, for `tensorboard --logdir runs`."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        self.writer = module.SummaryWriter(run / "tensorboard", purge_step=step + 1 if step else None)

    def log(self, values: dict[str, float], step: int) -> None:
        """As scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the files."""
        self.writer.close()


class Trackio:
    """A run in trackio's own database on this machine, for `trackio show`."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        self.module, name = module, run.resolve().name
        with redirect_stdout(io.StringIO()):  # where it would praise itself
            module.init(project=PROJECT, name=name, config=settings, resume="allow" if step else "never", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def log(self, values: dict[str, float], step: int) -> None:
        """To the run that was begun."""
        self.module.log(values, step=step)

    def finish(self) -> None:
        """Wait until all is in the database."""
        with redirect_stdout(io.StringIO()):
            self.module.finish()


class Wandb:
    """A run of Weights & Biases: in the folder `wandb` of the run, for `wandb sync`, unless WANDB_MODE=online was set."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        mode = os.environ.get("WANDB_MODE", "offline")
        quiet = module.Settings(silent=True, console="off")
        self.run = module.init(project=PROJECT, name=run.resolve().name, dir=run, config=settings, mode=mode, settings=quiet)

    def log(self, values: dict[str, float], step: int) -> None:
        """To the run that was begun."""
        self.run.log(values, step=step)

    def finish(self) -> None:
        """Wait until all is written."""
        self.run.finish()


TRACKERS: dict[str, tuple[str, Callable[[ModuleType, Path, int, dict[str, Any]], Tracker]]] = {  # the module that each needs
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "trackio": ("trackio", Trackio),
    "wandb": ("wandb", Wandb),
}


class Trackers:
    """Gives what happens in a run to the trackers of these names.

    Errors: `UserError` for a name that is not one of `TRACKERS`, and for one whose package is not installed.
    """

    def __init__(self, names: Sequence[str]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which W&B would send to its makers, also offline
        self.modules = {name: _module(name) for name in names}
        self.open: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            settings = flatten(event.config) | {"parameters": event.parameters, "machine": event.machine}
            for name, module in self.modules.items():
                self.open[name] = TRACKERS[name][1](module, Path(event.run), event.step, settings)
        elif isinstance(event, Stepped | Evaluated):
            step, values = event.step, {name: getattr(event, name) for name in NUMBERS[type(event)]}
            self._each(lambda tracker: tracker.log(values, step))

    def finish(self) -> None:
        """Have each write what it still holds."""
        self._each(lambda tracker: tracker.finish())
        self.open.clear()

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever a tracker can come upon
                del self.open[name]
                warnings.warn(f"{name} failed, so the run goes on without it: {error}.", Notice, stacklevel=2)


def _module(name: str) -> ModuleType:
    if name not in TRACKERS:
        raise UserError(f"There is no tracker {name!r}.", f"The trackers: {', '.join(TRACKERS)}.")
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ImportError as error:
        raise UserError(f"--track {name} takes a package that is not installed ({error}).", f"pip install {name}") from error
