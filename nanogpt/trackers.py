"""Experiment trackers: TensorBoard, trackio and Weights & Biases.

They receive the numbers of metrics.jsonl. Everything stays on this machine, without an account,
unless the environment variable WANDB_MODE says otherwise.
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
from nanogpt.training.events import EvalEnd, Event, StepEnd, TrainStart

PROJECT = "nanogpt"
# Fields of each event that are logged.
METRICS: dict[type, tuple[str, ...]] = {
    StepEnd: ("train_loss", "learning_rate", "grad_norm", "tokens_per_second"),
    EvalEnd: ("val_loss", "bits_per_byte"),
}


class Tracker(Protocol):
    """An open run of one tracker."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers by name; steps never decrease."""

    def finish(self) -> None:
        """Write what is still in memory, and close the run."""


class TensorBoard:
    """TensorBoard files in RUN/tensorboard, for `tensorboard --logdir runs`."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        # A resumed run removes all entries after its last save.
        purge_step = step + 1 if step else None
        self.writer = module.SummaryWriter(run / "tensorboard", purge_step=purge_step)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers as scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        """Close the files."""
        self.writer.close()


class Trackio:
    """A run in the local database of trackio, for `trackio show`."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        self.module = module
        with redirect_stdout(io.StringIO()):  # suppress the banner
            module.init(
                project=PROJECT,
                name=run.resolve().name,
                config=settings,
                resume="allow" if step else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers to the open run."""
        self.module.log(values, step=step)

    def finish(self) -> None:
        """Wait until everything is in the database."""
        with redirect_stdout(io.StringIO()):
            self.module.finish()


class Wandb:
    """A Weights & Biases run in RUN/wandb, for `wandb sync`, unless WANDB_MODE=online is set."""

    def __init__(self, module: ModuleType, run: Path, step: int, settings: dict[str, Any]):
        self.run = module.init(
            project=PROJECT,
            name=run.resolve().name,
            dir=run,
            config=settings,
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=module.Settings(silent=True, console="off"),
        )

    def log(self, values: dict[str, float], step: int) -> None:
        """Log numbers to the open run."""
        self.run.log(values, step=step)

    def finish(self) -> None:
        """Wait until everything is written."""
        self.run.finish()


OpenTracker = Callable[[ModuleType, Path, int, dict[str, Any]], Tracker]
# By name: the module that the tracker needs, and its adapter.
TRACKERS: dict[str, tuple[str, OpenTracker]] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard),
    "trackio": ("trackio", Trackio),
    "wandb": ("wandb", Wandb),
}


class Trackers:
    """An event listener that forwards metrics to trackers.

    A tracker that fails during the run is dropped with a notice, and the run continues.

    Args:
        names: Names of `TRACKERS`.

    Raises:
        UserError: A name is unknown, or its package is not installed.
    """

    def __init__(self, names: Sequence[str]):
        # W&B would report its own errors to its makers, even offline.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.modules = {name: _import_tracker(name) for name in names}
        self.open: dict[str, Tracker] = {}

    def __call__(self, event: Event) -> None:
        """Log one event to all trackers."""
        if isinstance(event, TrainStart):
            settings = flatten(event.config)
            settings |= {"parameters": event.parameters, "machine": event.machine}
            for name, module in self.modules.items():
                open_tracker = TRACKERS[name][1]
                self.open[name] = open_tracker(module, Path(event.run), event.step, settings)
        elif isinstance(event, StepEnd | EvalEnd):
            step = event.step
            values = {name: getattr(event, name) for name in METRICS[type(event)]}
            self._for_each(lambda tracker: tracker.log(values, step))

    def finish(self) -> None:
        """Finish all open trackers."""
        self._for_each(lambda tracker: tracker.finish())
        self.open.clear()

    def _for_each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            try:
                action(tracker)
            except Exception as error:  # third-party code may raise anything
                del self.open[name]
                message = f"Tracker {name} failed; the run continues without it: {error}."
                warnings.warn(message, Notice, stacklevel=2)


def _import_tracker(name: str) -> ModuleType:
    if name not in TRACKERS:
        raise UserError(f"Unknown tracker: {name!r}.", f"Use one of: {', '.join(TRACKERS)}.")
    try:
        return importlib.import_module(TRACKERS[name][0])
    except ImportError as error:
        raise UserError(
            f"Tracker {name} needs a package that is not installed ({error}).",
            f"Install it: pip install {name}",
        ) from error
