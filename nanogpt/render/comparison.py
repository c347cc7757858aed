"""The table and the plot of `nanogpt compare`."""

import io
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from nanogpt.compare import Comparison, RunSummary
from nanogpt.errors import UserError
from nanogpt.formatting import format_duration, sanitize
from nanogpt.render.charts import Chart, Curve, render_chart_page

# Label, attribute of RunSummary, and the format of its mean over the runs of a group.
RESULTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("parameters", "parameters", "{:,.0f}".format),
    ("steps", "steps", "{:,.0f}".format),
    ("time", "seconds", format_duration),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ("nats per token", "val_loss", "{:.4f}".format),
    ("bits per byte", "bits_per_byte", "{:.4f}".format),
)
SEEDS_NOTE = "Columns of several seeds show means, and the standard deviation of bits per byte."
# Curve colours in page.css; further groups repeat them.
NUM_COLOURS = 8


def table(comparison: Comparison, width: int) -> str:
    """Return a table with a column per group, and the notes below it.

    The rows are the settings that differ and the results. Columns that do not fit into `width`
    characters continue below.
    """
    rows = _rows(comparison)
    num_columns = len(comparison.groups)
    widths = [
        max(cell_len(line) for cells in rows.values() for line in cells[i].split("\n"))
        for i in range(num_columns)
    ]
    output = io.StringIO()
    console = Console(file=output, width=width, highlight=False, markup=False, emoji=False)
    for block in _blocks(widths, width - max(map(len, rows))):
        lines = Table(show_header=False, box=None, pad_edge=False)
        lines.add_column()
        for _ in block:
            lines.add_column(justify="right", overflow="fold")
        for label, cells in rows.items():
            lines.add_row(label, *(cells[i] for i in block))
        console.print(lines)
        console.print()
    notes = _notes(comparison)
    if any(group.num_runs > 1 for group in comparison.groups):
        notes.append(SEEDS_NOTE)
    for note in notes:
        console.print(note, soft_wrap=True)
    return sanitize(output.getvalue())


def plot(comparison: Comparison) -> str:
    """Return a self-contained page with bits per byte over time and over tokens.

    Raises:
        UserError: No run has an evaluation in its metrics.jsonl.
    """
    runs = {run.run: run for run in comparison.runs if run.evaluations}
    if not runs:
        raise UserError(
            "There is no curve to plot: no run has an evaluation in its metrics.jsonl.",
            "Compare the runs without a plot.",
        )
    colours = {
        name: f"c{i % NUM_COLOURS}"
        for i, group in enumerate(comparison.groups)
        for name in group.runs
    }
    # A run that duplicates another belongs to no group.
    shown = [runs[name] for name in colours if name in runs]
    names = _display_names(comparison)

    def chart(description: str, field: str, x_name: str) -> Chart:
        curves = []
        for run in shown:
            x = [point[field] for point in run.evaluations]
            y = [point["bits_per_byte"] for point in run.evaluations]
            curves.append(Curve(names[run.run], colours[run.run], x, y, markers=True))
        x_max = max(max(curve.x) for curve in curves) or 1.0
        return Chart("Bits per byte", description, curves, x_max, x_name, large=True)

    charts = [
        chart("over seconds since the first step", "seconds", "second"),
        chart("over training tokens", "tokens", "token"),
    ]
    title, notes = "Comparison of runs", _notes(comparison)
    return render_chart_page("comparison.html", charts, assets="", title=title, notes=notes)


def _rows(comparison: Comparison) -> dict[str, list[str]]:
    """Return the cells of each row by label, without empty rows."""
    names = _display_names(comparison)
    by_name = {run.run: run for run in comparison.runs}
    groups = [[by_name[run] for run in group.runs] for group in comparison.groups]
    rows = {"": ["\n".join(names[run.run] for run in group) for group in groups]}
    if len({run.fingerprint for run in comparison.runs}) > 1:
        rows["text"] = [_distinct(run.text for run in group) for group in groups]
    for name in comparison.differing_settings:
        rows[name] = [_distinct(run.settings.get(name) for run in group) for group in groups]
    for label, field, format_value in RESULTS:
        means = [_mean(group, field) for group in groups]
        rows[label] = ["" if mean is None else format_value(mean) for mean in means]
    stds = [group.std for group in comparison.groups]
    rows["std over seeds"] = ["" if std is None else f"{std:.4f}" for std in stds]
    rows["diagnosis"] = [_distinct(run.diagnosis for run in group) for group in groups]
    return {label: cells for label, cells in rows.items() if any(cells)}


def _mean(runs: list[RunSummary], field: str) -> float | None:
    values = [value for run in runs if (value := getattr(run, field)) is not None]
    return statistics.fmean(values) if values else None


def _distinct(values: Iterable[Any]) -> str:
    """Join the distinct values; None means unset or unknown and is omitted."""
    texts = (
        f"{value:g}" if isinstance(value, float) else str(value)
        for value in values
        if value is not None
    )
    return ", ".join(dict.fromkeys(texts))


def _display_names(comparison: Comparison) -> dict[str, str]:
    """Return the folder names of the runs, or their paths if the names are not unique."""
    names = {run.run: Path(run.run).resolve().name for run in comparison.runs}
    return names if len(set(names.values())) == len(names) else {run: run for run in names}


def _blocks(widths: list[int], width: int) -> list[list[int]]:
    """Split columns into blocks that fit into `width`, with two spaces before each column."""
    blocks: list[list[int]] = []
    for i, column_width in enumerate(widths):
        if not blocks or sum(widths[j] + 2 for j in blocks[-1]) + column_width + 2 > width:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _notes(comparison: Comparison) -> list[str]:
    names = _display_names(comparison)
    notes = [f"{names[run.run]}: {note}" for run in comparison.runs for note in run.notes]
    by_validation: dict[str | None, list[str]] = {}
    for run in comparison.runs:
        by_validation.setdefault(run.validation_id, []).append(names[run.run])
    if len(by_validation) > 1:
        sets = "; ".join(", ".join(members) for members in by_validation.values())
        notes.append(f"Not comparable, because the validation texts differ: {sets}.")
    return notes
