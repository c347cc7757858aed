"""Runs side by side: what differs between them, and what came of it.

In: run folders. Out: plain data, and from it a table in words and a page with the curves.
Refuses: what is no run, and runs of which none has been evaluated. Of a run that is damaged or not finished it tells what is known.
"""

import difflib
import io
import json
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from nanogpt import checkpoint
from nanogpt.config import flatten, read_toml, resolve
from nanogpt.errors import UserError
from nanogpt.report import duration, printable, read_records

RUN_MARKS = ("config.toml", "metrics.jsonl", "model.safetensors")  # any of them makes a folder a run
PACED = ("steps", "eval_every", "learning_rate", "matrix_learning_rate")  # what the recipe fits to the steps that it foresees in a run by the clock,
PACE = 0.1  # and how far that may be apart between runs which differ in nothing else
ALIKE = ("seed", "micro_batch_size", "checkpoint_activations")  # settings that set no run apart: chance, and how a step is cut to fit into memory
ABOUT = {"fingerprint": str, "val_fingerprint": str, "sources": list, "val_bytes": int, "val_tokens": int}  # what is needed of a text.json,
LINES = ({"step", "seconds", "progress", "tokens", "tokens_per_second"}, {"step", "seconds", "val_loss", "bits_per_byte", "val_tokens"})  # and of a line
Known = TypeVar("Known")


@dataclass(frozen=True)
class Run:
    """What is known of a run; None where it is not known.

    `val_loss` (nats per token) and `bits_per_byte` are of the best model, on the whole validation split where `full_split` says so; `tokens_per_second` is the
    median over its training steps, `seconds` the time since the first of them, evaluations included. `evaluations` has "step", "seconds", "tokens" (read until
    then) and "bits_per_byte" of each. `text` names what it was trained on, `fingerprint` tells such texts apart, and `validation` those it was measured on.
    """

    run: str
    settings: dict[str, Any]
    text: str | None
    fingerprint: str | None
    validation: str | None
    parameters: int | None
    val_loss: float | None
    bits_per_byte: float | None
    full_split: bool
    tokens_per_second: float | None
    seconds: float | None
    steps: int | None
    verdict: str | None
    finished: bool
    remarks: list[str]
    evaluations: list[dict[str, float]]


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but `ALIKE`: the mean of their bits per byte and its standard deviation (n - 1; None for one run)."""

    runs: list[str]
    n: int
    bits_per_byte: float | None
    spread: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs and groups, the lowest bits per byte first, one validation text after another; `differ` names the settings that are not the same in all runs."""

    runs: list[Run]
    groups: list[Group]
    differ: list[str]

    def asdict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(runs: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Lay runs side by side. Errors: `UserError` when a folder is no run, and when none of them has been evaluated."""
    if not runs:
        raise UserError("Which runs?", _runs_in(Path("runs")) or "nanogpt compare RUN RUN")
    folders = {Path(run).resolve(): Path(run) for run in runs}.values()  # each once
    for folder in folders:
        _require_run(folder)
    found = [_read(folder) for folder in folders]
    if all(run.bits_per_byte is None for run in found):
        what = "\n".join(f"{run.run}: {remark}" for run in found for remark in run.remarks)
        raise UserError(f"None of these runs has been evaluated, so there is nothing to compare yet.\n{what}", "Go on with: nanogpt train --resume --out RUN")
    texts = list(dict.fromkeys(run.validation for run in found))

    def order(run: Run | Group, validation: str | None) -> tuple[int, float]:
        return texts.index(validation), math.inf if run.bits_per_byte is None else run.bits_per_byte

    found.sort(key=lambda run: order(run, run.validation))
    members: list[list[Run]] = []
    for run in found:
        for group in members:
            if _same_but_for_the_seed(group[0], run):
                twin = next((other for other in group if _is_copy(run, other)), None)
                if twin is None:
                    group.append(run)
                else:
                    run.remarks.append(f"the same run as {twin.run}, number for number; it counts once.")
                break
        else:
            members.append([run])
    groups = sorted(((_group(group), group[0].validation) for group in members), key=lambda pair: order(*pair))
    return Comparison(found, [group for group, _ in groups], _differing(found))


def _require_run(folder: Path) -> None:
    """Errors: `UserError` with the runs that may have been meant."""
    if any((folder / mark).is_file() for mark in RUN_MARKS):
        return
    if folder.is_file():
        raise UserError(f"{folder} is a file; compare takes the folders of runs.", f"nanogpt compare {shlex.quote(str(folder.parent))}")
    what = f"{folder.absolute()} is not the folder of a run." if folder.is_dir() else f"There is no run at {folder.absolute()}."
    raise UserError(what, _runs_in(folder) or _runs_in(folder.parent, near=folder.name) or "Train one with: nanogpt train TEXT --out RUN")


def _runs_in(folder: Path, near: str | None = None) -> str:
    """Advice that names the runs in a folder, or those whose names are near another's; empty where there are none."""
    names = sorted({file.parent.name for mark in RUN_MARKS for file in folder.glob(f"*/{mark}")})
    names = (difflib.get_close_matches(near, names) if near else []) or names
    words = " ".join(shlex.quote(str(folder / name)) for name in names[:6])
    return f"There {'is' if len(names) == 1 else 'are'}: {words}{' and more' if len(names) > 6 else ''}" if names else ""


def _read(folder: Path) -> Run:
    """All that a run folder tells; what it cannot tell becomes a remark."""
    remarks: list[str] = []

    def known(read: Callable[[], Known]) -> Known | None:
        try:
            return read()
        except (UserError, OSError, ValueError) as error:
            remarks.append(str(error))
            return None

    settings = known(lambda: flatten(resolve(read_toml(folder / "config.toml")))) or {}
    about = known(lambda: _about(folder / "text.json")) or {}
    records = known(lambda: _records(folder / "metrics.jsonl")) or []
    parts = known(lambda: checkpoint.load(folder))
    summary = parts.summary if parts else {}
    if settings:
        settings["init_from"] = about.get("init_from")  # no setting of config.toml, but what else could set two runs apart
    steps, evaluations = ([record for record in records if field in record] for field in ("tokens_per_second", "best"))
    best = summary if "val_loss" in summary else min(evaluations, key=lambda record: record["val_loss"], default={})
    last = records[-1]["step"] if records else summary.get("finished")
    finished = "finished" in summary and summary["finished"] == last  # or it went on since
    full_split = bool(best and about) and best["val_tokens"] == about["val_tokens"] - 1  # the first token has nothing before it
    if parts and not finished:
        remarks.append(f"Not finished: {steps[-1]['progress']:.0%} of it over, after {last:,} steps." if steps else "Not finished.")
    if best and about and not full_split:
        remarks.append(f"Measured on a part of the held-out text only, {best['val_tokens']:,} of {about['val_tokens']:,} tokens.")
    return Run(
        run=str(folder),
        settings=settings,
        text=", ".join(os.path.basename(source) for source in about["sources"][:3]) if about else None,
        fingerprint=about.get("fingerprint"),
        validation=_validation(settings, about) if settings and about else None,
        parameters=sum(p.numel() for p in parts.model.parameters()) if parts else None,
        val_loss=best.get("val_loss"),
        bits_per_byte=best.get("bits_per_byte"),
        full_split=full_split,
        tokens_per_second=statistics.median(record["tokens_per_second"] for record in steps) if steps else None,
        seconds=records[-1]["seconds"] if records else None,
        steps=last,
        verdict=summary["verdict"]["kind"] if "verdict" in summary else None,
        finished=finished,
        remarks=remarks,
        evaluations=_curve(records),
    )


def _about(path: Path) -> dict[str, Any]:
    """What a text.json tells. Errors: `ValueError` where it lacks something."""
    about = json.loads(path.read_text(encoding="utf-8"))
    right = isinstance(about, dict) and all(isinstance(about.get(name), kind) for name, kind in ABOUT.items())
    if not right or not all(isinstance(source, str) for source in about["sources"]):
        raise ValueError(f"{path} does not tell all of a text: {', '.join(ABOUT)}.")
    return about


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, up to the first that lacks something."""
    return list(takewhile(lambda record: any(all(isinstance(record.get(name), int | float) for name in names) for names in LINES), read_records(path)))


def _curve(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The evaluations among the records, each with the tokens that were read until then."""
    tokens, curve = 0, []
    for record in records:
        if "val_loss" in record:
            curve.append({"step": record["step"], "seconds": record["seconds"], "tokens": tokens, "bits_per_byte": record["bits_per_byte"]})
        else:
            tokens += record["tokens"]
    return curve


def _validation(settings: dict[str, Any], about: dict[str, Any]) -> str:
    """What tells apart the texts that runs were measured on: a file of its own, or so many bytes of the whole text."""
    return about["val_fingerprint"] if settings["val"] else f"{about['fingerprint']} {about['val_bytes']}"


def _same(name: str, one: Run, other: Run) -> bool:
    """Whether two runs share a setting. By the clock, what the recipe fitted to the machine's pace may be a little apart."""
    a, b = one.settings[name], other.settings[name]
    paced = name in PACED and one.settings["minutes"] is not None and other.settings["minutes"] is not None
    return a == b or (paced and None not in (a, b) and math.isclose(a, b, rel_tol=PACE))


def _same_but_for_the_seed(one: Run, other: Run) -> bool:
    """Whether a mean over two runs makes sense."""
    if not all(run.finished and run.full_split and run.settings for run in (one, other)):
        return False
    texts = (one.fingerprint, one.validation) == (other.fingerprint, other.validation)
    return texts and all(_same(name, one, other) for name in one.settings if name not in ALIKE)


def _is_copy(one: Run, other: Run) -> bool:
    """Whether two runs are one: chance says no more of it for being there twice."""
    same = (one.settings, one.bits_per_byte) == (other.settings, other.bits_per_byte)
    return same and [point["bits_per_byte"] for point in one.evaluations] == [point["bits_per_byte"] for point in other.evaluations]


def _differing(runs: list[Run]) -> list[str]:
    """The settings that are not the same in all runs, as far as these are known."""
    known = [run for run in runs if run.settings]
    return [name for name in (known[0].settings if known else ()) if not all(_same(name, known[0], run) for run in known)]


def _group(runs: list[Run]) -> Group:
    bits = [run.bits_per_byte for run in runs if run.bits_per_byte is not None]
    return Group([run.run for run in runs], len(runs), statistics.fmean(bits) if bits else None, statistics.stdev(bits) if len(bits) > 1 else None)


def table(found: Comparison, width: int) -> str:
    """The comparison in words, as wide as a terminal: a column for each group, a row for each setting that differs and each result; then the remarks."""
    names, by_name = _names(found), {run.run: run for run in found.runs}
    groups = [[by_name[run] for run in group.runs] for group in found.groups]
    rows = {"": ["\n".join(names[run.run] for run in group) for group in groups]}
    if len({run.fingerprint for run in found.runs}) > 1:
        rows["text"] = [_distinct(run.text for run in group) for group in groups]
    rows |= {name: [_distinct(run.settings.get(name) for run in group) for group in groups] for name in found.differ}
    for label, field, shown in RESULTS:
        means = [_mean(group, field) for group in groups]
        rows[label] = ["" if mean is None else shown(mean) for mean in means]
    rows["spread over seeds"] = ["" if group.spread is None else f"{group.spread:.4f}" for group in found.groups]
    rows["verdict"] = [_distinct(run.verdict for run in group) for group in groups]
    rows = {label: cells for label, cells in rows.items() if any(cells)}
    widths = [max(cell_len(line) for cells in rows.values() for line in cells[i].split("\n")) for i in range(len(groups))]
    page = io.StringIO()
    console = Console(file=page, width=width, highlight=False, markup=False, emoji=False)
    for block in _blocks(widths, width - max(map(len, rows))):
        lines = Table(show_header=False, box=None, pad_edge=False)
        lines.add_column()
        for _ in block:
            lines.add_column(justify="right", overflow="fold")
        for label, cells in rows.items():
            lines.add_row(label, *(cells[i] for i in block))
        console.print(lines)
        console.print()
    for remark in _remarks(found, names):
        console.print(remark, soft_wrap=True)
    return printable(page.getvalue())


RESULTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (  # label, field of a run, and how its mean over a group is shown
    ("parameters", "parameters", "{:,.0f}".format),
    ("steps", "steps", "{:,.0f}".format),
    ("time", "seconds", duration),
    ("tokens/s", "tokens_per_second", "{:,.0f}".format),
    ("nats per token", "val_loss", "{:.4f}".format),
    ("bits per byte", "bits_per_byte", "{:.4f}".format),
)


def _mean(runs: list[Run], field: str) -> float | None:
    values = [value for run in runs if (value := getattr(run, field)) is not None]
    return statistics.fmean(values) if values else None


def _distinct(values: Iterable[Any]) -> str:
    """Different values in a cell; None, where a setting is off or nothing is known, is not one."""
    shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in values if value is not None)
    return ", ".join(dict.fromkeys(shown))


def _names(found: Comparison) -> dict[str, str]:
    """What to call each run: by its folder alone, where that tells them apart."""
    names = {run.run: Path(run.run).resolve().name for run in found.runs}
    return names if len(set(names.values())) == len(names) else {run: run for run in names}


def _blocks(widths: list[int], width: int) -> list[list[int]]:
    """The columns in order, cut into blocks that fit beside each other with two spaces before each; at least one column in a block."""
    blocks: list[list[int]] = []
    for i, own in enumerate(widths):
        if not blocks or sum(widths[j] + 2 for j in blocks[-1]) + own + 2 > width:
            blocks.append([])
        blocks[-1].append(i)
    return blocks


def _remarks(found: Comparison, names: dict[str, str]) -> list[str]:
    """Sentences on what the numbers do not show."""
    remarks = [f"{names[run.run]}: {remark}" for run in found.runs for remark in run.remarks]
    measured: dict[str | None, list[str]] = {}
    for run in found.runs:
        measured.setdefault(run.validation, []).append(names[run.run])
    if len(measured) > 1:
        apart = "; ".join(", ".join(members) for members in measured.values())
        remarks.append(f"Not comparable, because they were measured on different texts: {apart}.")
    if any(group.n > 1 for group in found.groups):
        remarks.append("Of runs that differ only in the seed: means; the spread is the standard deviation of their bits per byte.")
    return remarks


COLOURS = ("#4c7fd9", "#d9722e", "#2f9e6e", "#b35bbf", "#b8942a", "#d6557a", "#3f9fb3", "#8d7257")  # which stand out from white and from black
INK, RULE = "#808790", "rgba(128, 135, 144, 0.25)"  # and so do these
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Runs side by side</title>
<style>:root { color-scheme: light dark } body { margin: 0 }</style></head><body>%s</body></html>
"""


def plot(found: Comparison) -> str:
    """A page with the curves: bits per byte at each evaluation, over time or over tokens. It holds all it needs, and asks the network for nothing.

    Errors: `UserError` where no run has evaluations in its metrics.jsonl.
    """
    import plotly.graph_objects as go

    names, runs = _names(found), {run.run: run for run in found.runs if run.evaluations}
    if not runs:
        raise UserError("None of these runs has evaluations in its metrics.jsonl, so there is no curve to plot.", "Leave out --plot.")
    figure = go.Figure()
    axes = {"time": ("seconds", "seconds since the first step"), "tokens": ("tokens", "tokens read")}
    over: dict[str, list[list[float]]] = {label: [] for label in axes}  # the x of each curve
    for group, colour in zip(found.groups, cycle(COLOURS), strict=False):
        for run in (runs[name] for name in group.runs if name in runs):
            for label, (field, _) in axes.items():
                over[label].append([point[field] for point in run.evaluations])
            bits = [point["bits_per_byte"] for point in run.evaluations]
            figure.add_scatter(x=over["time"][-1], y=bits, name=escape(names[run.run]), mode="lines+markers", line_color=colour)
    buttons = [{"label": f"over {label}", "method": "update", "args": [{"x": over[label]}, {"xaxis.title.text": title}]} for label, (_, title) in axes.items()]
    switch = {"type": "buttons", "direction": "right", "buttons": buttons, "showactive": False, "bgcolor": RULE, "bordercolor": RULE}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": INK, "family": "system-ui, sans-serif", "size": 14},
        margin={"l": 64, "r": 24, "t": 64, "b": 96},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": INK, "activecolor": COLOURS[0]},
        showlegend=True,
        legend={"orientation": "h", "yref": "container", "y": 0.01},
        updatemenus=[switch | {"x": 0, "xanchor": "left", "y": 1, "yanchor": "bottom", "pad": {"b": 12}}],
    )
    figure.update_xaxes(title=axes["time"][1], title_standoff=12, automargin=True, gridcolor=RULE, zeroline=False, rangemode="tozero")
    figure.update_yaxes(title="bits per byte", title_standoff=12, automargin=True, gridcolor=RULE, zeroline=False)
    config = {"displaylogo": False, "responsive": True}
    return PAGE % figure.to_html(full_html=False, include_plotlyjs=True, div_id="curves", default_height="100vh", config=config)
