"""Comparison of runs: the settings that differ, the results, and means over seeds; data only.

A damaged or unfinished run is listed with what can be read of it.
"""

import difflib
import math
import os
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from nanogpt import checkpoint
from nanogpt.config import flatten
from nanogpt.errors import UserError
from nanogpt.run_folder import RunFolder

# In a time-limited run these settings depend on the measured speed, from which the recipe predicts
# the number of steps. Runs whose values differ by at most the tolerance count as equal.
SPEED_DEPENDENT_SETTINGS = ("steps", "eval_every", "learning_rate", "muon_learning_rate")
SPEED_TOLERANCE = 0.1
# Runs that differ only in these are grouped: the seed, and how a step is split to fit into memory.
IGNORED_SETTINGS = ("seed", "micro_batch_size", "activation_checkpointing")
DATA_FIELDS = {
    "fingerprint": str,
    "val_fingerprint": str,
    "sources": list,
    "val_bytes": int,
    "val_tokens": int,
}
STEP_FIELDS = {"step", "seconds", "progress", "tokens", "tokens_per_second"}
EVAL_FIELDS = {"step", "seconds", "val_loss", "bits_per_byte", "val_tokens"}
T = TypeVar("T")


@dataclass(frozen=True)
class RunSummary:
    """The settings and results of a run; None for what is unknown.

    Attributes:
        run: Path of the run folder.
        settings: All settings by name; empty if config.toml cannot be read.
        text: Names of the training text.
        fingerprint: Identifier of the training text.
        validation_id: Identifier of the validation text.
        parameters: Number of parameters.
        val_loss: Loss of the best model in nats per token.
        bits_per_byte: Loss of the best model.
        full_split: True if these two cover the whole validation split.
        tokens_per_second: Median over the training steps.
        seconds: Time since the first step, evaluations included.
        steps: Number of training steps.
        diagnosis: Kind of the diagnosis, such as "healthy".
        finished: True if the run reached its end.
        notes: Sentences on what is missing or limits the comparison.
        evaluations: "step", "seconds", "tokens" (training tokens so far) and "bits_per_byte".
    """

    run: str
    settings: dict[str, Any]
    text: str | None
    fingerprint: str | None
    validation_id: str | None
    parameters: int | None
    val_loss: float | None
    bits_per_byte: float | None
    full_split: bool
    tokens_per_second: float | None
    seconds: float | None
    steps: int | None
    diagnosis: str | None
    finished: bool
    notes: list[str]
    evaluations: list[dict[str, float]]


@dataclass(frozen=True)
class Group:
    """Runs that differ only in `IGNORED_SETTINGS`.

    Attributes:
        runs: Paths of the runs, without duplicates.
        num_runs: Number of runs.
        bits_per_byte: Mean over the runs.
        std: Sample standard deviation (n - 1) of bits per byte; None for one run.
    """

    runs: list[str]
    num_runs: int
    bits_per_byte: float | None
    std: float | None


@dataclass(frozen=True)
class Comparison:
    """Runs and groups by validation text, the lowest bits per byte first.

    Attributes:
        runs: All runs.
        groups: The runs, grouped over seeds.
        differing_settings: Names of the settings that are not equal in all runs.
    """

    runs: list[RunSummary]
    groups: list[Group]
    differing_settings: list[str]

    def asdict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        return asdict(self)


def compare(runs: Sequence[str | os.PathLike[str]]) -> Comparison:
    """Compare runs by their settings and results.

    Args:
        runs: Run folders; a folder named twice counts once.

    Raises:
        UserError: A folder is no run, or no run has been evaluated.
    """
    if not runs:
        raise UserError("Which runs?", _list_runs(Path("runs")) or "nanogpt compare RUN RUN")
    folders = [RunFolder(path) for path in {Path(run).resolve(): run for run in runs}.values()]
    for folder in folders:
        _require_run(folder)
    summaries = [_summarize(folder) for folder in folders]
    if all(run.bits_per_byte is None for run in summaries):
        notes = "\n".join(f"{run.run}: {note}" for run in summaries for note in run.notes)
        raise UserError(
            f"There is nothing to compare: none of these runs has been evaluated.\n{notes}",
            "Resume one with: nanogpt train --resume --out RUN",
        )
    validation_ids = list(dict.fromkeys(run.validation_id for run in summaries))

    def sort_key(run: RunSummary | Group, validation_id: str | None) -> tuple[int, float]:
        bits = math.inf if run.bits_per_byte is None else run.bits_per_byte
        return validation_ids.index(validation_id), bits

    summaries.sort(key=lambda run: sort_key(run, run.validation_id))
    groups = [(_make_group(members), members[0].validation_id) for members in _split(summaries)]
    groups.sort(key=lambda pair: sort_key(*pair))
    return Comparison(summaries, [group for group, _ in groups], _differing_settings(summaries))


def _split(runs: list[RunSummary]) -> list[list[RunSummary]]:
    """Split runs into groups that differ only in the seed; note and drop duplicates."""
    groups: list[list[RunSummary]] = []
    for run in runs:
        group = next((g for g in groups if _differs_only_in_seed(g[0], run)), [])
        duplicate = next((other for other in group if _is_duplicate(run, other)), None)
        if duplicate:
            run.notes.append(f"Duplicate of {duplicate.run}; counted once.")
        elif group:
            group.append(run)
        else:
            groups.append([run])
    return groups


def _require_run(folder: RunFolder) -> None:
    """Raise UserError, with similar runs as suggestion, if a folder is no run."""
    path = folder.path
    if folder.is_run():
        return
    if path.is_file():
        command = f"nanogpt compare {shlex.quote(str(path.parent))}"
        raise UserError(f"{path} is a file; compare takes run folders.", command)
    what = f"There is no run at {path.absolute()}."
    if path.is_dir():
        what = f"{path.absolute()} is not a run folder."
    suggestion = _list_runs(path) or _list_runs(path.parent, similar_to=path.name)
    raise UserError(what, suggestion or "Train one with: nanogpt train TEXT --out RUN")


def _list_runs(folder: Path, similar_to: str = "") -> str:
    """Return a sentence that names the runs in a folder, similar names first; "" without runs."""
    names = sorted(path.name for path in folder.glob("*/") if RunFolder(path).is_run())
    names = difflib.get_close_matches(similar_to, names) or names
    if not names:
        return ""
    paths = " ".join(shlex.quote(str(folder / name)) for name in names[:6])
    return f"Existing runs: {paths}{' and more' if len(names) > 6 else ''}"


def _summarize(run: RunFolder) -> RunSummary:
    """Read a run folder; what cannot be read becomes a note."""
    notes: list[str] = []

    def try_read(read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (UserError, OSError, ValueError) as error:
            notes.append(str(error))
            return None

    settings = try_read(lambda: flatten(run.read_config())) or {}
    data = try_read(lambda: _read_data(run)) or {}
    records = try_read(lambda: _read_metrics(run)) or []
    model = try_read(lambda: checkpoint.load(run.path))
    summary = model.summary if model else {}
    if settings:
        # The initial checkpoint is no setting of config.toml, but distinguishes runs as one does.
        settings["init_from"] = data.get("init_from")
    steps = [record for record in records if "tokens_per_second" in record]
    best = _best_result(summary, records)
    last_step = records[-1]["step"] if records else summary.get("finished")
    # A later step than the finished one means that the run was resumed since.
    finished = "finished" in summary and summary["finished"] == last_step
    # The first validation token has no context and is not predicted.
    full_split = bool(best and data) and best["val_tokens"] == data["val_tokens"] - 1
    if model and not finished:
        progress = f": {steps[-1]['progress']:.0%} complete, {last_step:,} steps" if steps else ""
        notes.append(f"Not finished{progress}.")
    if best and data and not full_split:
        notes.append(
            "Measured on a part of the validation split only, "
            f"{best['val_tokens']:,} of {data['val_tokens']:,} tokens."
        )
    sources = [os.path.basename(source) for source in data.get("sources", [])[:3]]
    speeds = [record["tokens_per_second"] for record in steps]
    return RunSummary(
        run=str(run.path),
        settings=settings,
        text=", ".join(sources) if data else None,
        fingerprint=data.get("fingerprint"),
        validation_id=_validation_id(settings, data) if settings and data else None,
        parameters=sum(p.numel() for p in model.model.parameters()) if model else None,
        val_loss=best.get("val_loss"),
        bits_per_byte=best.get("bits_per_byte"),
        full_split=full_split,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        seconds=records[-1]["seconds"] if records else None,
        steps=last_step,
        diagnosis=summary["diagnosis"]["kind"] if "diagnosis" in summary else None,
        finished=finished,
        notes=notes,
        evaluations=_learning_curve(records),
    )


def _best_result(summary: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the result of the saved model, or else the best evaluation; empty without both."""
    if "val_loss" in summary:
        return summary
    evaluations = [record for record in records if "best" in record]
    return min(evaluations, key=lambda record: record["val_loss"], default={})


def _read_data(run: RunFolder) -> dict[str, Any]:
    """Return the metadata of the data; raise ValueError if a needed field is missing."""
    data = run.read_data()
    is_valid = all(isinstance(data.get(name), kind) for name, kind in DATA_FIELDS.items())
    if not is_valid or not all(isinstance(source, str) for source in data["sources"]):
        raise ValueError(f"{run.data_path} does not describe a text: {', '.join(DATA_FIELDS)}.")
    return data


def _read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """Return the records up to the first that is neither a step nor an evaluation."""

    def is_valid(record: dict[str, Any]) -> bool:
        return any(
            all(isinstance(record.get(name), int | float) for name in fields)
            for fields in (STEP_FIELDS, EVAL_FIELDS)
        )

    return list(takewhile(is_valid, run.read_metrics()))


def _learning_curve(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the evaluations, each with the number of training tokens so far."""
    tokens, curve = 0, []
    for record in records:
        if "val_loss" in record:
            point = {name: record[name] for name in ("step", "seconds", "bits_per_byte")}
            curve.append(point | {"tokens": tokens})
        else:
            tokens += record["tokens"]
    return curve


def _validation_id(settings: dict[str, Any], data: dict[str, Any]) -> str:
    """Identify the validation text: a text of its own, or the last bytes of the training text."""
    if settings["val_text"]:
        return data["val_fingerprint"]
    return f"{data['fingerprint']} {data['val_bytes']}"


def _has_same_setting(name: str, one: RunSummary, other: RunSummary) -> bool:
    """Compare a setting, with a tolerance for what the recipe fitted to the machine's speed."""
    a, b = one.settings[name], other.settings[name]
    is_time_limited = None not in (one.settings["minutes"], other.settings["minutes"])
    if name in SPEED_DEPENDENT_SETTINGS and is_time_limited and None not in (a, b):
        return math.isclose(a, b, rel_tol=SPEED_TOLERANCE)
    return a == b


def _differs_only_in_seed(one: RunSummary, other: RunSummary) -> bool:
    """Return True if a mean over two runs is meaningful."""
    if not all(run.finished and run.full_split and run.settings for run in (one, other)):
        return False
    if (one.fingerprint, one.validation_id) != (other.fingerprint, other.validation_id):
        return False
    names = [name for name in one.settings if name not in IGNORED_SETTINGS]
    return all(_has_same_setting(name, one, other) for name in names)


def _is_duplicate(one: RunSummary, other: RunSummary) -> bool:
    """Return True if two runs are equal, as copies are, and so add no information on the spread."""

    def identity(run: RunSummary) -> tuple[Any, ...]:
        curve = [point["bits_per_byte"] for point in run.evaluations]
        return run.settings, run.bits_per_byte, curve

    return identity(one) == identity(other)


def _differing_settings(runs: list[RunSummary]) -> list[str]:
    readable = [run for run in runs if run.settings]
    return [
        name
        for name in (readable[0].settings if readable else ())
        if not all(_has_same_setting(name, readable[0], run) for run in readable)
    ]


def _make_group(runs: list[RunSummary]) -> Group:
    bits = [run.bits_per_byte for run in runs if run.bits_per_byte is not None]
    return Group(
        runs=[run.run for run in runs],
        num_runs=len(runs),
        bits_per_byte=statistics.fmean(bits) if bits else None,
        std=statistics.stdev(bits) if len(bits) > 1 else None,
    )
