"""The report of a run: one self-contained HTML page, made from the files of the run folder.

Parts whose files are missing or damaged are left out. The curves are SVG instead of plotly, whose
script has 4.7 MB: a report should be small enough to mail and to print.
"""

import math
import os
import re
import shlex
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from markupsafe import Markup, escape

from nanogpt import __version__
from nanogpt.config import Config, Section
from nanogpt.errors import Notice, UserError
from nanogpt.files import write_text
from nanogpt.formatting import format_duration, format_flags
from nanogpt.render.charts import Chart, Curve, downsample, render_chart_page
from nanogpt.render.html import printable
from nanogpt.run_folder import RunFolder

# Steps read from the metrics, which takes about 20 ms.
MAX_STEPS = 4000
MAX_SAMPLES = 100
MAX_PASSAGES = 10
# Fields of a training step that are drawn, and their names in a legend.
CURVES = {"train_loss": "training", "learning_rate": "", "grad_norm": "", "tokens_per_second": ""}
STEP_FIELDS = ("step", *CURVES, "tokens", "seconds", "progress")
EVAL_FIELDS = ("step", "val_loss", "bits_per_byte")
UNKNOWN_DIAGNOSIS = {"kind": "unknown", "summary": "Not evaluated yet."}
T = TypeVar("T")


@dataclass(frozen=True)
class ReportData:
    """The readable content of a run folder; what cannot be read is empty."""

    run: Path
    config: Config
    data: dict[str, Any]
    summary: dict[str, Any]
    num_parameters: int
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    memorization: dict[str, Any]

    @property
    def step(self) -> int:
        """The last recorded step."""
        return max((record["step"] for record in (*self.steps, *self.evaluations)), default=0)

    @property
    def is_finished(self) -> bool:
        """True if the run reached its end and was not resumed since."""
        return self.summary.get("finished") == self.step and self.step > 0

    @property
    def sources(self) -> list[str]:
        """The sources of the text."""
        sources = self.data.get("sources")
        return [str(source) for source in sources] if isinstance(sources, list) else []

    @property
    def baselines(self) -> dict[str, float]:
        """The losses of the n-gram baselines in nats per token."""
        losses = self.summary.get("baselines") or self.data.get("baselines") or {}
        return {name: loss for name, loss in losses.items() if isinstance(loss, int | float)}


def report(run: Path) -> str:
    """Return the report of a run as HTML; it depends on the run folder alone."""
    data = read_run(RunFolder(run))
    folder = shlex.quote(str(data.run))
    progress = f", {data.steps[-1]['progress']:.0%} complete" if data.steps else ""
    diagnosis = data.summary.get("diagnosis") or UNKNOWN_DIAGNOSIS
    return render_chart_page(
        "report.html",
        _charts(data),
        assets="report",
        title=data.run.resolve().name,
        lead=_lead(data),
        diagnosis=diagnosis | {"summary": _nowrap_flags(diagnosis["summary"])},
        stopped="" if data.is_finished else f"Stopped after step {data.step:,}{progress}.",
        resume_command=f"nanogpt train --resume --out {folder}",
        figures=_figures(data),
        curves_note=_curves_note(data),
        baselines=_baseline_rows(data),
        baselines_note=_baselines_note(data),
        samples=_samples(data),
        memorization=data.memorization,
        passages=_passages(data),
        data=_data_properties(data),
        machine=_machine_properties(data),
        settings=_settings(data.config),
        commands=_commands(data),
        steps_flag=format_flags({"steps": data.step}) if data.config.training.minutes else "",
        version=__version__,
    )


def write_report(run: Path) -> None:
    """Write the report into the run folder; warn if that fails, because the run itself is saved."""
    try:
        write_text(RunFolder(run).report_path, report(run))
    except (UserError, OSError) as error:
        warnings.warn(f"The report could not be written: {error}", Notice, stacklevel=2)


def read_run(run: RunFolder) -> ReportData:
    """Read the files of a run folder, and drop records that a chart or a table cannot show."""
    records = _try_read(lambda: run.read_metrics(MAX_STEPS)) or []
    samples = [
        record
        for record in _try_read(run.read_samples) or []
        if _has_numbers(record, ["step"]) and isinstance(record.get("text"), str)
    ]
    summary, num_parameters = _try_read(run.read_model_header) or ({}, 0)
    memorization = _try_read(run.read_memorization) or {}
    if not memorization.keys() >= {"step", "text", "summary", "passages"}:
        memorization = {}
    return ReportData(
        run=run.path,
        config=_try_read(run.read_config) or Config(),
        data=_try_read(run.read_data) or {},
        summary=summary,
        num_parameters=num_parameters,
        steps=[record for record in records if _has_numbers(record, STEP_FIELDS)],
        evaluations=[record for record in records if _has_numbers(record, EVAL_FIELDS)],
        samples=[samples[i] for i in _evenly_spaced(len(samples), MAX_SAMPLES)],
        memorization=memorization,
    )


def _try_read(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (UserError, OSError, ValueError):
        return None


def _has_numbers(record: dict[str, Any], names: Iterable[str]) -> bool:
    """Return True if a record has all these fields as finite numbers."""
    values = (record.get(name) for name in names)
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _evenly_spaced(n: int, max_count: int) -> list[int]:
    """Return at most `max_count` of n indices, the first and the last included."""
    if n <= max_count:
        return list(range(n))
    return [round(i * (n - 1) / (max_count - 1)) for i in range(max_count)]


def _nowrap_flags(text: str) -> Markup:
    """Escape text, and prevent line breaks between a flag and its value."""
    flag = r"--[a-z-]+(?: [\d.]*\d)?"
    return Markup(re.sub(flag, r'<span class="flag">\g<0></span>', str(escape(printable(text)))))


def _lead(data: ReportData) -> str:
    model = data.config.model
    size = "A model"
    if data.num_parameters:
        size = f"{data.num_parameters / 1e6:.3g} million parameters"
    shape = f"{model.n_layer} layers, {model.n_head} heads, embedding {model.n_embd}"
    sources = ", ".join(os.path.basename(source) for source in data.sources[:3])
    trained_on = f"; trained on {sources}" if sources else ""
    return f"{size}: {shape}, context {model.context_length}{trained_on}"


def _figures(data: ReportData) -> dict[str, str]:
    """Return the main results by label; those that are unknown are empty."""
    summary = data.summary
    seconds = [record["seconds"] for record in data.steps + data.evaluations if "seconds" in record]
    speed = ""
    if data.steps:
        speed = f"{statistics.median_high(r['tokens_per_second'] for r in data.steps):,.0f}"
    return {
        "bits per byte": f"{summary['bits_per_byte']:.3f}" if "bits_per_byte" in summary else "",
        "nats per token": f"{summary['val_loss']:.3f}" if "val_loss" in summary else "",
        "steps": f"{data.step:,}",
        "training time": format_duration(max(seconds, default=0.0)),
        "tokens/s": speed,
        "epochs": _epochs(data),
    }


def _epochs(data: ReportData) -> str:
    if not data.steps or not data.data.get("train_tokens"):
        return ""
    tokens = sum(record["tokens"] for record in data.steps) / len(data.steps) * data.step
    epochs = tokens / data.data["train_tokens"]
    return f"{epochs:,.0f}" if epochs >= 10 else f"{epochs:.2g}"


def _charts(data: ReportData) -> list[Chart]:
    """Return the charts of the run; none before its second step."""
    if not data.steps or data.step < 2:
        return []
    steps = [record["step"] for record in data.steps]
    curves = {
        field: downsample(name, "c0", steps, [record[field] for record in data.steps])
        for field, name in CURVES.items()
    }
    losses = [curves["train_loss"]]
    right_unit, bits_per_nat = "", 1.0
    if points := data.evaluations:
        x, y = [p["step"] for p in points], [p["val_loss"] for p in points]
        losses.append(Curve("validation", "c1", x, y, markers=len(points) <= 60))
        if y[-1] > 0:
            right_unit, bits_per_nat = "bits per byte", points[-1]["bits_per_byte"] / y[-1]
    loss_chart = Chart(
        "Loss",
        "nats per token",
        losses,
        data.step,
        reference_lines=data.baselines,
        right_unit=right_unit,
        right_scale=bits_per_nat,
        log=True,
        large=True,
    )
    return [
        loss_chart,
        Chart("Learning rate", "", [curves["learning_rate"]], data.step, from_zero=True),
        Chart("Gradient norm", "", [curves["grad_norm"]], data.step, log=True),
        Chart("Speed", "tokens/s", [curves["tokens_per_second"]], data.step, from_zero=True),
    ]


def _curves_note(data: ReportData) -> str:
    note = (
        "Horizontal axis: steps. The training loss is that of each step's batch; the gradient "
        "norm is measured before clipping. Long curves are means of neighbouring steps, with a "
        "band from minimum to maximum."
    )
    evaluated = max((record.get("val_tokens", 0) for record in data.evaluations), default=0)
    val_tokens = data.data.get("val_tokens", 0)
    if 0 < evaluated < val_tokens - 1:
        note += (
            f" Evaluations during the run used {evaluated:,} of the {val_tokens:,} validation "
            "tokens, always the same ones."
        )
    return note


def _baseline_rows(data: ReportData) -> list[dict[str, Any]]:
    """Return the rows of the baseline table, the highest loss first."""
    model_loss = data.summary.get("val_loss")
    if model_loss is None or not data.baselines:
        return []
    bits_per_nat = data.summary["bits_per_byte"] / model_loss
    losses = [(name, loss, False) for name, loss in data.baselines.items()]
    losses = sorted([*losses, ("this model", model_loss, True)], key=lambda row: -row[1])
    return [
        {
            "name": name,
            "percent": f"{100 * loss / losses[0][1]:.1f}",
            "bits_per_byte": f"{loss * bits_per_nat:.4f}",
            "loss": f"{loss:.4f}",
            "is_model": is_model,
        }
        for name, loss, is_model in losses
    ]


def _baselines_note(data: ReportData) -> str:
    step = data.summary.get("step", 0)
    return (
        f"On {data.summary.get('val_tokens', 0):,} validation tokens. The model is the best of "
        f"the run, from step {step:,}. N-gram baselines are counted on the training split "
        "(Witten-Bell smoothing)."
    )


def _samples(data: ReportData) -> list[dict[str, str]]:
    losses = {record["step"]: record["val_loss"] for record in data.evaluations}
    samples = []
    for sample in data.samples:
        heading = f"Step {sample['step']:,}"
        if sample["step"] in losses:
            heading += f", validation loss {losses[sample['step']]:.3f}"
        samples.append({"heading": heading, "text": sample["text"].replace("\r\n", "\n")})
    return samples


def _passages(data: ReportData) -> list[dict[str, str]]:
    """Return the longest memorized passages of the last sample."""
    passages = []
    for passage in data.memorization.get("passages", [])[:MAX_PASSAGES]:
        source = passage["source"] or f"document {passage['document']:,}"
        passages.append(
            {
                "bytes": f"{passage['num_bytes']:,}",
                "source": f"{source}, line {passage['line']:,}",
                "text": data.memorization["text"][passage["start"] : passage["end"]],
            }
        )
    return passages


def _data_properties(data: ReportData) -> dict[str, str]:
    text = data.data
    if not _has_numbers(text, ("train_bytes", "val_bytes", "train_tokens", "val_tokens")):
        return {}
    num_documents = text.get("num_documents", 1)
    return {
        "Sources": ", ".join(data.sources),
        "Size": f"{text['train_bytes'] + text['val_bytes']:,} bytes in {num_documents:,} "
        f"document{'s' * (num_documents != 1)}",
        "Validation split": str(text.get("split_description", "")),
        "Tokens": f"{text['train_tokens']:,} for training, {text['val_tokens']:,} for validation; "
        f"{text.get('num_distinct_tokens', 0):,} distinct ({data.config.data.tokenizer})",
        "SHA-256": str(text.get("fingerprint", "")),
        "Initial checkpoint": str(text.get("init_from", "")),
    }


def _machine_properties(data: ReportData) -> dict[str, str]:
    device = data.config.device
    kernels = [f"{device.attention} attention", "compiled" if device.compile else "not compiled"]
    if device.deterministic:
        kernels.append("deterministic kernels")
    return {"Machine": str(data.summary.get("machine", "")), "Training step": ", ".join(kernels)}


def _settings(config: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the settings that have a value, by section."""
    groups = {}
    for name in Config.model_fields:
        section: Section = getattr(config, name)
        groups[name.capitalize()] = [
            {
                "name": setting,
                "value": _format_setting(value),
                "description": field.description or "",
                "changed": value != field.default,
            }
            for setting, field in type(section).model_fields.items()
            if (value := getattr(section, setting)) is not None
        ]
    return groups


def _format_setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _commands(data: ReportData) -> dict[str, str]:
    """Return the commands that repeat the run and use its model, by heading."""
    run = shlex.quote(str(data.run))
    sources = [_shell_path(source) for source in data.sources] or ["TEXT"]
    flags = format_flags({"config": RunFolder(data.run).config_path, "out": f"{data.run}-again"})
    train = f"nanogpt train {' '.join(sources)} {flags}"
    if init_from := data.data.get("init_from"):
        train += f" --init-from {_shell_path(str(init_from))}"
    if "-" in sources:
        train = f"cat TEXT | {train}"
    return {
        "Train again": train,
        "Generate text": f"nanogpt sample {run}",
        "Evaluate": f"nanogpt eval {run}",
        "Check a sample for memorized text": (
            f"nanogpt sample {run} | nanogpt inspect {run} - --memorization"
        ),
        "Open in the browser": f"nanogpt serve {run}",
    }


def _shell_path(path: str) -> str:
    """Quote a path for the shell, relative to the reader's home if it was in the user's."""
    home = str(Path.home())
    if path.startswith(home + os.sep):
        return "~/" + shlex.quote(path[len(home) + 1 :])
    return shlex.quote(path)
