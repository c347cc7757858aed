"""What happens in a run, told: events to the terminal and to metrics.jsonl and samples.jsonl.

In: events from `trainer`. Out: a progress line and samples for a person, a line of JSON per event for every other reader.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nanogpt.config import Config
from nanogpt.evaluate import Loss, Verdict
from nanogpt.files import write_text

QUIET_SECONDS = 10.0  # without a terminal, at most this long between two lines


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on after `step`."""

    run: str
    step: int
    config: Config
    parameters: int
    text: dict[str, Any]
    machine: str


@dataclass(frozen=True)
class Stepped:
    """An update of the weights: `train_loss` (nats per token) is of its batch, before it; `tokens` are those of the batch."""

    step: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """A validation loss over `val_tokens` tokens; `train_loss` is the mean since the last evaluation."""

    step: int
    train_loss: float
    val_loss: float
    bits_per_byte: float
    val_tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class Sampled:
    """Text that the model wrote after `step`."""

    step: int
    text: str


@dataclass(frozen=True)
class Saved:
    """The run can go on from `step`, whatever happens now."""

    step: int


@dataclass(frozen=True)
class Interrupted:
    """The run was asked to stop, and has been saved."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run is over: `loss` is of the model that was kept (of `best_step`), on the whole validation split."""

    step: int
    best_step: int
    loss: Loss
    baselines: dict[str, float]
    verdict: Verdict
    seconds: float


Event = Started | Stepped | Evaluated | Sampled | Saved | Interrupted | Finished


class RunLog:
    """Writes metrics.jsonl (steps and evaluations) and samples.jsonl: the record that outlives the terminal."""

    def __init__(self, run: Path):
        self.metrics, self.samples = run / "metrics.jsonl", run / "samples.jsonl"

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for path in (self.metrics, self.samples):
                _cut(path, event.step)
        elif isinstance(event, Stepped | Evaluated):
            _append(self.metrics, event)
        elif isinstance(event, Sampled):
            _append(self.samples, event)


def _append(path: Path, event: Stepped | Evaluated | Sampled) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(json.dumps(asdict(event), ensure_ascii=False) + "\n")


def _cut(path: Path, step: int) -> None:
    """Drop what was written after `step`, which will happen again, and a last line that a killed process left unfinished."""
    whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    kept = [line + "\n" for line in whole_lines if json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))


class Terminal:
    """Tells a person how the run goes: one progress line that stays, samples above it; plain lines where there is no terminal."""

    def __init__(self, file: TextIO | None = None):
        self.console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True)
        bar = [BarColumn(bar_width=20)] if self.console.width >= 110 else []
        self.progress = Progress(*bar, TextColumn("{task.description}"), console=self.console, transient=True, refresh_per_second=4)
        self.task = self.progress.add_task("", total=None)
        self.train_loss = self.val_loss = math.nan
        self.last_line = self.begin = self.speed = 0.0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.started(event)
            case Stepped():
                self.stepped(event)
            case Evaluated():
                self.val_loss = event.val_loss
                self.line(event.step, event.train_loss, self.left(event.step), "  best so far" if event.best else "")
            case Sampled():
                self.console.print(f"[dim]{escape(_printable(event.text))}[/dim]\n")
            case Interrupted():
                self.progress.stop()
                self.console.print(f"Stopped and saved at step {event.step:,}. Go on with: nanogpt train --resume --out {self.run}")
            case Finished():
                self.progress.stop()
                self.finished(event)

    def started(self, event: Started) -> None:
        model, text = event.config.model, event.text
        self.run, self.first, self.steps = event.run, event.step, event.config.training.steps
        self.bits = text["train_tokens"] / text["train_bytes"] / math.log(2)  # bits per byte for a nat per token
        self.begin = self.last_line = time.perf_counter()
        size = text["train_bytes"] + text["val_bytes"]
        rows = {
            "Text": f"{size:,} bytes, {text['symbols']} different {event.config.text.tokenizer}s; {text['split']}",
            "Model": f"{event.parameters / 1e6:.2f} M parameters: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
            f"context {model.context_length}, dropout {model.dropout:g}",
            "Machine": event.machine,
            "Run": event.run + (f", going on after step {event.step:,}" if event.step else ""),
        }
        for name, value in rows.items():
            self.console.print(f"[bold]{name:8}[/bold] {escape(value)}")
        self.console.print("Losses are in nats per token, and in brackets in bits per byte.\n")
        if self.console.is_terminal:
            self.progress.start()

    def stepped(self, event: Stepped) -> None:
        fresh = math.isnan(self.train_loss)
        self.train_loss = event.train_loss if fresh else 0.95 * self.train_loss + 0.05 * event.train_loss
        self.speed = event.tokens_per_second if fresh else 0.95 * self.speed + 0.05 * event.tokens_per_second
        left, now = self.left(event.step), time.perf_counter()
        if event.step == min(self.first + 4, self.steps):
            each = (now - self.begin) / (event.step - self.first)
            self.console.print(f"About {duration(left)} for {self.steps - event.step:,} more steps of {each:.2g} s.\n")
        if self.console.is_terminal:
            self.progress.update(self.task, total=self.steps, completed=event.step, description=self.describe(event.step, self.train_loss, left))
        elif now - self.last_line > QUIET_SECONDS:
            self.line(event.step, self.train_loss, left)

    def left(self, step: int) -> float:
        """Seconds to the last step, at the pace so far, evaluations included."""
        return (time.perf_counter() - self.begin) / (step - self.first) * (self.steps - step)

    def line(self, step: int, train_loss: float, left: float, note: str = "") -> None:
        self.console.print(self.describe(step, train_loss, left) + note)
        self.last_line = time.perf_counter()

    def describe(self, step: int, train_loss: float, left: float) -> str:
        val = "" if math.isnan(self.val_loss) else f"  val {self.val_loss:.3f} ({self.val_loss * self.bits:.3f})"
        return f"{step:,}/{self.steps:,}  {self.speed:,.0f} tok/s  train {train_loss:.3f} ({train_loss * self.bits:.3f}){val}  {duration(left)} left"

    def finished(self, event: Finished) -> None:
        self.console.print(loss_table(event.loss, event.baselines, f"this model (step {event.best_step:,})"))
        self.console.print(f"\n{event.verdict.sentence}\n")
        self.console.print(f"{event.step:,} steps in {duration(event.seconds)}. Let it write: nanogpt sample {self.run}")

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self.progress.stop()


def loss_table(loss: Loss, baselines: dict[str, float], name: str) -> Table:
    """The model between what counting reaches, best last."""
    table = Table("", "nats per token", "bits per byte", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    scale = loss.bits_per_byte / loss.val_loss
    rows = {f"{key} baseline": value for key, value in baselines.items()} | {name: loss.val_loss}
    for label, value in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(label, f"{value:.4f}", f"{value * scale:.4f}", style="bold" if label == name else "")
    table.caption = f"On {loss.tokens:,} validation tokens. Baselines count the training split (Witten-Bell smoothing)."
    table.caption_justify = "left"
    return table


def show_evaluation(loss: Loss, baselines: dict[str, float], judged: Verdict | None, name: str) -> None:
    """Print what `nanogpt eval` found."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(loss_table(loss, baselines, name))
    if judged:
        console.print(f"\n{judged.sentence}")


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def say_stopping() -> None:
    """Answer Ctrl-C at once, from inside a signal handler."""
    os.write(2, b"\nStopping after this step, and saving. (Once more: stop now, without saving.)\n")


def _printable(text: str) -> str:
    """Text that cannot command a terminal: control characters, other than line ends and tabs, as their pictures."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else chr(0x2400 + ord(letter)) if letter < " " else "\ufffd" for letter in text)
