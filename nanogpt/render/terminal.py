"""Terminal output: the progress of a run, and the tables of evaluation and speed."""

import math
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

if TYPE_CHECKING:
    from nanogpt.bench import Speed

from nanogpt.diagnosis import Diagnosis
from nanogpt.evaluate import EvalLoss, LossByPosition
from nanogpt.formatting import format_duration, format_sig, sanitize
from nanogpt.training import events

# Maximum time between two lines of output that is not a terminal.
LINE_INTERVAL = 10.0
# The first steps are slower and are not used to estimate the remaining time.
WARMUP_STEPS = 5
STOP_MESSAGE = b"\nStopping after this step, then saving. Press again to stop without saving.\n"


class PlainConsole(Console):
    """A console that prints text unchanged, and goes silent when a reader such as `head` exits."""

    def __init__(self, file: TextIO | None = None):
        super().__init__(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Discard further output instead of ending the process."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Terminal:
    """Event listener that prints the progress of a run.

    A terminal gets a progress line that stays at the bottom; other output gets plain lines.

    Args:
        file: The output, standard output by default.
    """

    def __init__(self, file: TextIO | None = None):
        # Not looked up at each write: a tracker may redirect standard output meanwhile.
        self.console = PlainConsole(file or sys.stdout)
        bar = [BarColumn(bar_width=20)] if self.console.width >= 110 else []
        self.progress_bar = Progress(
            *bar,
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self.task = self.progress_bar.add_task("", total=None)
        self.train_start: events.TrainStart
        self.bits_per_nat = math.nan
        self.train_loss = math.nan
        self.last_eval: events.EvalEnd | None = None
        self.tokens_per_second = 0.0
        self.progress = 0.0
        self.first_progress = math.nan
        self.start_time = 0.0
        self.last_line_time = 0.0

    def __call__(self, event: events.Event) -> None:
        """Print one event of a training run."""
        match event:
            case events.TrainStart():
                self.on_start(event)
            case events.StopRequested():
                # A direct write is safe inside a signal handler and appears at once.
                os.write(2, STOP_MESSAGE)
            case events.InitialEval():
                loss = f"{event.val_loss:.4f} ({event.bits_per_byte:.4f})"
                self.console.print(
                    f"Before step 1: {loss} on {event.val_tokens:,} validation tokens.\n"
                )
            case events.StepEnd():
                self.on_step(event)
            case events.EvalEnd():
                self.last_eval = event
                self.print_line(event.step, "  best so far" if event.best else "")
            case events.RankTimings() if event.comm_fraction is not None:
                self.console.print(
                    f"Gradient reduction over {len(event.seconds)} processes takes "
                    f"{event.comm_fraction:.0%} of the forward and backward pass."
                )
            case events.SampleEnd():
                self.console.print(sanitize(event.text) + "\n", style="dim")
            case events.Interrupted():
                self.close()
                command = f"nanogpt train --resume --out {shlex.quote(self.train_start.run)}"
                self.console.print(f"Saved at step {event.step:,}. Resume with: {command}")
            case events.TrainEnd():
                self.close()
                self.on_end(event)

    def on_start(self, event: events.TrainStart) -> None:
        """Print the text, the model, the machine, the run folder and the recipe's choices."""
        self.train_start = event
        text = event.data
        self.bits_per_nat = text["train_tokens"] / text["train_bytes"] / math.log(2)
        self.last_line_time = time.perf_counter()
        for name, value in _describe_run(event).items():
            self.console.print(f"{name:8}", style="bold", end=" ")
            self.console.print(value)
        for reason, choices in groupby(event.choices, lambda choice: choice.reason):
            values = ", ".join(f"{choice.name} {_format_value(choice.value)}" for choice in choices)
            self.console.print(f"         {values}: {reason}", style="dim")
        self.console.print("Losses are in nats per token (bits per byte in brackets).\n")
        if self.console.is_terminal:
            self.progress_bar.start()

    def on_step(self, event: events.StepEnd) -> None:
        """Update the progress line, and estimate the remaining time after a few steps."""
        now = time.perf_counter()
        if math.isnan(self.train_loss):
            self.train_loss = event.train_loss
            self.tokens_per_second = event.tokens_per_second
        else:
            self.train_loss = 0.8 * self.train_loss + 0.2 * event.train_loss
            self.tokens_per_second = 0.95 * self.tokens_per_second + 0.05 * event.tokens_per_second
        self.progress = event.progress
        if math.isnan(self.first_progress):
            self.start_time = now
            self.first_progress = event.progress
        warmup_end = self.train_start.step + WARMUP_STEPS
        if event.step == warmup_end:
            self.print_eta(event)
        if self.console.is_terminal:
            line = self.format_line(event.step)
            self.progress_bar.update(
                self.task, total=1.0, completed=event.progress, description=line
            )
        elif event.step > warmup_end and now - self.last_line_time > LINE_INTERVAL:
            self.print_line(event.step)

    def print_eta(self, event: events.StepEnd) -> None:
        """Print the throughput and the estimated remaining time."""
        flops = self.tokens_per_second * self.train_start.flops_per_token
        self.console.print(
            f"{format_sig(event.tokens / self.tokens_per_second)} s per step: "
            f"{self.tokens_per_second:,.0f} tokens/s, {flops / 1e9:,.0f} GFLOP/s, "
            f"{flops / self.train_start.peak_flops:.0%} of this machine's peak. "
            f"About {format_duration(self.seconds_left())} left.\n"
        )

    def seconds_left(self) -> float:
        """Estimate the seconds to the last step from the average speed, evaluations included."""
        elapsed = time.perf_counter() - self.start_time
        return elapsed / max(1e-9, self.progress - self.first_progress) * (1 - self.progress)

    def print_line(self, step: int, note: str = "") -> None:
        """Print the progress line permanently."""
        self.console.print(self.format_line(step) + note)
        self.last_line_time = time.perf_counter()

    def format_line(self, step: int) -> str:
        """Return the progress line; it fits into 80 columns unless hours are left."""
        steps = f"{step:,} ({self.progress:.0%})"
        if num_steps := self.train_start.config.training.steps:
            steps = f"{step:,}/{num_steps:,}"
        train = f"train {self.train_loss:.3f} ({self.train_loss * self.bits_per_nat:.3f})"
        val = ""
        if self.last_eval:
            val = f"  val {self.last_eval.val_loss:.3f} ({self.last_eval.bits_per_byte:.3f})"
        speed = f"{self.tokens_per_second:,.0f} tok/s"
        return f"{steps}  {speed}  {train}{val}  {format_duration(self.seconds_left())} left"

    def on_end(self, event: events.TrainEnd) -> None:
        """Print the model among the baselines, the diagnosis and the next commands."""
        other_losses = {}
        if event.initial_val_loss is not None:
            name = "initial checkpoint"
            if event.initial_val_tokens not in (0, event.loss.tokens):
                name += f" (on {event.initial_val_tokens:,} of these tokens)"
            other_losses[name] = event.initial_val_loss
        name = f"this model (step {event.best_step:,})"
        self.console.print(baseline_table(event.loss, event.baselines, name, other_losses))
        self.console.print(f"\n{event.diagnosis.summary}\n")
        self.console.print(f"{event.step:,} steps in {format_duration(event.seconds)}.")
        self.console.print(f"Generate text: nanogpt sample {shlex.quote(self.train_start.run)}")
        self.console.print(f"Report: {os.path.join(self.train_start.run, 'report.html')}")

    def close(self) -> None:
        """Stop the progress line; safe to call more than once."""
        if self.progress_bar.live.is_started:
            self.progress_bar.stop()


def baseline_table(
    loss: EvalLoss,
    baselines: Mapping[str, float],
    name: str,
    other_losses: Mapping[str, float] | None = None,
) -> Table:
    """Return the table of a model among the n-gram baselines, the lowest loss last.

    Args:
        loss: Loss of the model.
        baselines: Losses of the n-gram baselines in nats per token.
        name: Name of the model.
        other_losses: Losses of other models by name, in nats per token.
    """
    table = _results_table("", "nats per token", "bits per byte")
    if loss.words:
        table.add_column("perplexity per word", justify="right")
    losses = {f"{key} baseline": value for key, value in baselines.items()}
    losses |= {**(other_losses or {}), name: loss.loss}
    for label, value in sorted(losses.items(), key=lambda row: -row[1]):
        row_loss = replace(loss, loss_sum=value * loss.tokens)
        perplexity = row_loss.word_perplexity
        cells = [
            f"{value:.4f}",
            f"{row_loss.bits_per_byte:.4f}",
            f"{perplexity:,.0f}" if perplexity < 1e7 else f"{perplexity:.3e}",
        ]
        style = "bold" if label == name else ""
        table.add_row(label, *cells[: len(table.columns) - 1], style=style)
    table.caption = f"On {loss.tokens:,} tokens."
    if baselines:
        table.caption += " Baselines are counted on the training split (Witten-Bell smoothing)."
    table.caption_justify = "left"
    return table


def show_evaluation(
    loss: EvalLoss, baselines: Mapping[str, float], diagnosis: Diagnosis | None, name: str
) -> None:
    """Print the result of `nanogpt eval`."""
    console = PlainConsole()
    console.print(baseline_table(loss, baselines, name))
    if diagnosis:
        console.print(f"\n{sanitize(diagnosis.summary)}")


def show_by_position(buckets: Sequence[LossByPosition]) -> None:
    """Print the loss by the position of a token in its context."""
    table = _results_table("position in the context", "nats per token", "tokens")
    for bucket in buckets:
        position = f"{bucket.first:,} to {bucket.last:,}"
        table.add_row(position, f"{bucket.loss:.4f}", f"{bucket.tokens:,}")
    console = PlainConsole()
    console.print()
    console.print(table)


def show_speed(speed: "Speed") -> None:
    """Print the result of `nanogpt bench`."""
    kernels = f"{speed.attention} attention, {'compiled' if speed.compiled else 'not compiled'}"
    console = PlainConsole()
    console.print(
        f"Machine   {speed.machine}, {kernels}; "
        f"matmul peak {speed.peak_flops_per_second / 1e9:,.0f} GFLOP/s"
    )
    console.print(
        f"Training  {speed.train_tokens_per_second:,.0f} tokens/s, "
        f"{speed.train_flops_per_second / 1e9:,.0f} GFLOP/s, {speed.mfu:.0%} of the peak; "
        f"{speed.step_seconds:.3g} s per step of {speed.tokens_per_step:,} tokens "
        f"(median of {speed.steps}), started in {speed.startup_seconds:.1f} s"
    )
    console.print(
        f"Decoding  {speed.decode_tokens_per_second:,.0f} tokens/s, one sequence "
        f"(median of {speed.tokens})"
    )


def _describe_run(event: events.TrainStart) -> dict[str, str]:
    """Return the lines at the start of a run by label."""
    config, text = event.config, event.data
    model, device = config.model, config.device
    tokenizer = config.data.tokenizer
    tokens = {"char": "chars", "byte": "bytes"}.get(tokenizer)
    tokens = tokens or f"tokens ({os.path.basename(tokenizer)})"
    run = event.run
    if event.step:
        run += f", resumed at step {event.step:,}"
    elif "init_from" in text:
        run += f", from {text['init_from']}"
    if "init_from" in text:
        # The initial checkpoint brought its own tokenizer.
        tokens = "tokens"
    names = ", ".join(os.path.basename(source) for source in text["sources"][:3])
    size = text["train_bytes"] + text["val_bytes"]
    memory = f"about {format_sig(event.required_bytes / 1e9)} GB per step"
    if event.free_bytes:
        memory += f" of {format_sig(event.free_bytes / 1e9)} GB free"
    return {
        "Text": f"{names}: {size:,} bytes, {text['num_distinct_tokens']:,} distinct {tokens}; "
        f"{text['split_description']}",
        "Model": f"{event.parameters / 1e6:.2f} M parameters: {model.n_layer} layers, "
        f"{model.n_head} heads, embedding {model.n_embd}, context {model.context_length}, "
        f"dropout {model.dropout:g}",
        "Machine": f"{event.machine}, {device.attention} attention, "
        f"{'compiled' if device.compile else 'not compiled'}",
        "Memory": f"{memory}, micro-batch size {config.training.micro_batch_size}",
        "Run": run,
    }


def _format_value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _results_table(first_column: str, *columns: str) -> Table:
    """Return an empty table without lines; all columns but the first are aligned right."""
    table = Table(first_column, box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right")
    return table
