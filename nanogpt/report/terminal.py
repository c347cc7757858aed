"""What a person reads in a terminal: a run as it goes, and what the other commands found.

In: events, or a result. Out: lines, one of which moves on with the run.
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from nanogpt.evaluate import Loss, PositionLoss, Verdict
from nanogpt.plan import duration, rounded
from nanogpt.report.events import Began, Evaluated, Event, Finished, Interrupted, Paced, Sampled, Speed, Started, Stepped, Stopping

QUIET_SECONDS = 10.0  # without a terminal, at most this long between two lines


class Lasting(Console):
    """A console whose reader may leave (`nanogpt train … | head`) without ending the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    """Tells a person how the run goes: one progress line that stays, samples above it; plain lines where there is no terminal."""

    def __init__(self, file: TextIO | None = None):
        self.console = Lasting(file=file or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        bar = [BarColumn(bar_width=20)] if self.console.width >= 110 else []
        self.progress = Progress(*bar, TextColumn("{task.description}"), console=self.console, transient=True, refresh_per_second=4)
        self.task = self.progress.add_task("", total=None)
        self.train_loss = self.val_loss = self.val_bits = math.nan
        self.last_line = self.begin = self.speed = self.done = 0.0
        self.first_progress = math.nan

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self.started(event)
            case Stopping():  # at once, and safe inside a signal's handler
                os.write(2, b"\nStopping after this step, and saving. (Once more: stop now, without saving.)\n")
            case Began():
                self.console.print(f"Before step 1: {event.val_loss:.4f} ({event.bits_per_byte:.4f}) on {event.val_tokens:,} tokens of the validation split.\n")
            case Stepped():
                self.stepped(event)
            case Evaluated():
                self.val_loss, self.val_bits = event.val_loss, event.bits_per_byte
                self.line(event.step, self.train_loss, "  best so far" if event.best else "")
            case Paced() if event.exchange is not None:
                self.console.print(f"Adding up the gradients of {len(event.seconds)} processes takes {event.exchange:.0%} of forward and backward.")
            case Sampled():
                self.console.print(printable(event.text) + "\n", style="dim")
            case Interrupted():
                self.close()
                self.console.print(f"Stopped and saved at step {event.step:,}. Go on with: nanogpt train --resume --out {shlex.quote(self.run)}")
            case Finished():
                self.close()
                self.finished(event)

    def started(self, event: Started) -> None:
        """Say what is about to happen: text, model, machine and folder."""
        model, text = event.config.model, event.text
        self.run, self.first, self.steps = event.run, event.step, event.config.training.steps
        self.bits = text["train_tokens"] / text["train_bytes"] / math.log(2)  # bits per byte for a nat per token
        self.flops_per_token, self.peak = event.flops_per_token, event.peak
        self.last_line = time.perf_counter()
        size = text["train_bytes"] + text["val_bytes"]
        tokens = {"char": "chars", "byte": "bytes"}.get(event.config.text.tokenizer) or f"tokens ({os.path.basename(event.config.text.tokenizer)})"
        if "init_from" in text:  # and so are they
            tokens = "tokens"
        names = ", ".join(os.path.basename(source) for source in text["sources"][:3])
        rows = {
            "Text": f"{names}: {size:,} bytes, {text['symbols']:,} different {tokens}; {text['split']}",
            "Model": f"{event.parameters / 1e6:.2f} M parameters: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
            f"context {model.context_length}, dropout {model.dropout:g}",
            "Machine": f"{event.machine}, {event.config.machine.attention} attention, {'compiled' if event.config.machine.compile else 'not compiled'}",
            "Memory": f"about {rounded(event.memory / 1e9)} GB for a step, {event.config.training.micro_batch_size} windows at a time"
            + (f"; {rounded(event.free_memory / 1e9)} GB are free" if event.free_memory else ""),
            "Run": event.run + (f", going on after step {event.step:,}" if event.step else f", from {text['init_from']}" if "init_from" in text else ""),
        }
        for name, value in rows.items():
            self.console.print(f"{name:8}", style="bold", end=" ")
            self.console.print(value)
        for reason, choices in groupby(event.choices, lambda choice: choice.reason):
            values = ", ".join(f"{choice.name} {choice.value:g}" if isinstance(choice.value, float) else f"{choice.name} {choice.value}" for choice in choices)
            self.console.print(f"         {values}: {reason}", style="dim")
        self.console.print("Losses are in nats per token, and in brackets in bits per byte.\n")
        if self.console.is_terminal:
            self.progress.start()

    def stepped(self, event: Stepped) -> None:
        """Move the progress line on, and after a few steps say how long the run will take."""
        fresh = math.isnan(self.train_loss)
        self.train_loss = event.train_loss if fresh else 0.8 * self.train_loss + 0.2 * event.train_loss
        self.speed = event.tokens_per_second if fresh else 0.95 * self.speed + 0.05 * event.tokens_per_second
        self.done, now = event.progress, time.perf_counter()
        if math.isnan(self.first_progress):
            self.begin, self.first_progress = now, event.progress
        if event.step == self.first + 5:
            self.expect(event)
        if self.console.is_terminal:
            self.progress.update(self.task, total=1.0, completed=event.progress, description=self.describe(event.step, self.train_loss))
        elif event.step > self.first + 5 and now - self.last_line > QUIET_SECONDS:
            self.line(event.step, self.train_loss)

    def expect(self, event: Stepped) -> None:
        """Say how fast it goes, and how long it will take."""
        speed = self.speed * self.flops_per_token
        self.console.print(
            f"{rounded(event.tokens / self.speed)} s a step: {self.speed:,.0f} tokens/s, {speed / 1e9:,.0f} GFLOP/s, {speed / self.peak:.0%} of "
            f"this machine's peak. About {duration(self.left())} to go.\n"
        )

    def left(self) -> float:
        """Seconds to the last step, at the pace so far, evaluations included."""
        return (time.perf_counter() - self.begin) / max(1e-9, self.done - self.first_progress) * (1 - self.done)

    def line(self, step: int, train_loss: float, note: str = "") -> None:
        """Print the progress line so that it stays."""
        self.console.print(self.describe(step, train_loss) + note)
        self.last_line = time.perf_counter()

    def describe(self, step: int, train_loss: float) -> str:
        """The progress line: in 80 columns, but for runs of many hours."""
        val = "" if math.isnan(self.val_loss) else f"  val {self.val_loss:.3f} ({self.val_bits:.3f})"
        steps = f"{step:,}/{self.steps:,}" if self.steps else f"{step:,} ({self.done:.0%})"
        return f"{steps}  {self.speed:,.0f} tok/s  train {train_loss:.3f} ({train_loss * self.bits:.3f}){val}  {duration(self.left())} left"

    def finished(self, event: Finished) -> None:
        """Place the model among the baselines, and give the verdict."""
        part = "" if event.before_tokens in (0, event.loss.tokens) else f" (on {event.before_tokens:,} tokens of these)"
        before = {} if event.before is None else {f"the model it began from{part}": event.before}
        self.console.print(loss_table(event.loss, event.baselines, f"this model (step {event.best_step:,})", before))
        self.console.print(f"\n{event.verdict.sentence}\n")
        self.console.print(f"{event.step:,} steps in {duration(event.seconds)}. Let it write: nanogpt sample {shlex.quote(self.run)}")
        self.console.print(f"The run on one page, with its curves: {os.path.join(self.run, 'report.html')}")

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        if self.progress.live.is_started:
            self.progress.stop()


def loss_table(loss: Loss, baselines: dict[str, float], name: str, others: dict[str, float] | None = None) -> Table:
    """The model among the n-gram baselines, and others by name, best last."""
    table = Table("", "nats per token", "bits per byte", *["perplexity per word"] * bool(loss.words), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {f"{key} baseline": value for key, value in baselines.items()} | (others or {}) | {name: loss.val_loss}
    for label, value in sorted(rows.items(), key=lambda row: -row[1]):
        of_all = replace(loss, nats=value * loss.tokens)
        perplexity = f"{of_all.word_perplexity:,.0f}" if of_all.word_perplexity < 1e7 else f"{of_all.word_perplexity:.3e}"
        cells = [f"{value:.4f}", f"{of_all.bits_per_byte:.4f}", perplexity]
        table.add_row(label, *cells[: len(table.columns) - 1], style="bold" if label == name else "")
    counted = " Baselines are counted on the training split (Witten-Bell smoothing)." if baselines else ""
    table.caption = f"On {loss.tokens:,} tokens.{counted}"
    table.caption_justify = "left"
    return table


def show_evaluation(loss: Loss, baselines: dict[str, float], judged: Verdict | None, name: str) -> None:
    """Print what `nanogpt eval` found."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(loss_table(loss, baselines, name))
    if judged:
        console.print(f"\n{printable(judged.sentence)}")


def show_by_position(buckets: Sequence[PositionLoss]) -> None:
    """Print the loss by the position of a token in its context."""
    table = Table("position in the context", "nats per token", "tokens", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in buckets:
        table.add_row(f"{bucket.first:,} to {bucket.last:,}", f"{bucket.nats_per_token:.4f}", f"{bucket.tokens:,}")
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(table)


def show_speed(speed: Speed) -> None:
    """Print what was measured of a machine."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    how = f"{speed.attention} attention, {'compiled' if speed.compiled else 'not compiled'}"
    console.print(f"Machine   {speed.machine}, {how}; a matrix product reaches {speed.peak_flops_per_second / 1e9:,.0f} GFLOP/s")
    console.print(
        f"Training  {speed.train_tokens_per_second:,.0f} tokens/s, {speed.train_flops_per_second / 1e9:,.0f} GFLOP/s, {speed.share_of_peak:.0%} of that; "
        f"{speed.step_seconds:.3g} s a step of {speed.tokens_per_step:,} tokens (median of {speed.steps}), ready in {speed.ready_seconds:.1f} s"
    )
    console.print(f"Writing   {speed.write_tokens_per_second:,.0f} tokens/s, one text (median of {speed.tokens})")


def printable(text: str) -> str:
    """Text with control characters made harmless to a terminal: all but line ends and tabs become pictures of themselves."""
    return "".join(letter if letter in "\n\t" or letter.isprintable() else chr(0x2400 + ord(letter)) if letter < " " else "\ufffd" for letter in text)
