"""Run folders for the dashboard: the list of runs, their state, and their logs as they grow.

Everything is plain data for JSON. Only folders directly in the served folder are read, and only
their own files, never the target of a link out of them.
"""

import math
import os
import shlex
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanogpt.config import flatten
from nanogpt.errors import UserError
from nanogpt.run_folder import RunFolder, read_last_records, read_new_records

# Bytes of a log per answer, some 17,000 steps.
MAX_CHUNK_BYTES = 1 << 22
# Bytes at the end of a log that are searched for the last step and the last evaluation.
TAIL_BYTES = 1 << 16
# An unfinished run that has written a step within this time counts as running.
IDLE_SECONDS = 30.0
# Fields of a step that the page draws.
COLUMNS = (
    "step",
    "seconds",
    "tokens",
    "train_loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
)


def list_runs(path: Path) -> dict[str, Path]:
    """Return run folders by name, the one written last first.

    Args:
        path: A folder of runs, a run folder, or the model file in one.
    """
    if not path.exists():
        return {}
    path = path.resolve()
    if path.is_file():
        return list_runs(path.parent) if _has_config(path.parent) else {}
    candidates = [path] if _has_config(path) else path.iterdir()
    runs = [
        run
        for run in candidates
        if _has_config(run) and run.resolve().is_relative_to(path) and _is_unicode(run.name)
    ]
    return {run.name: run for run in sorted(runs, key=_last_written, reverse=True)}


def fingerprint(path: Path) -> tuple[object, ...]:
    """Return a value that changes when a run, its logs or its model file change."""
    parts: list[object] = []
    for name, run in list_runs(path).items():
        folder = RunFolder(run)
        files = (folder.config_path, folder.metrics_path, folder.samples_path, folder.model_path)
        stats = [file.stat() for file in files if file.exists()]
        parts.append((name, [(stat.st_mtime_ns, stat.st_size) for stat in stats], is_active(run)))
    return tuple(map(repr, parts))


def is_active(run: Path) -> bool:
    """Return True if a run has been written to recently."""
    return time.time() - _last_written(run) < IDLE_SECONDS


def log_path(run: Path, name: str) -> Path | None:
    """Return a file of a run; None if it is missing or a link out of the folder."""
    path = run / name
    return path if path.is_file() and path.resolve().parent == run.resolve() else None


def summarize(run: Path) -> dict[str, Any]:
    """Return the entry of a run in the list: settings, text, progress, losses and diagnosis."""
    folder = RunFolder(run)
    settings = _read(folder.config_path)
    data = _read(folder.data_path)
    summary = _read(folder.model_path)
    path = log_path(run, folder.metrics_path.name)
    records = read_last_records(path, TAIL_BYTES)[::-1] if path else []
    last_step = next((record for record in records if "grad_norm" in record), {})
    last_eval = next((record for record in records if "best" in record), {})
    step = max((record["step"] for record in (last_step, last_eval) if record), default=0)
    is_finished = summary.get("finished") == step and step > 0
    loss = summary if is_finished and "val_loss" in summary else last_eval
    val_bytes = data.get("val_bytes", 0)
    bits_per_nat = data["val_tokens"] / val_bytes / math.log(2) if val_bytes else None
    text = {
        "sources": [os.path.basename(str(source)) for source in data.get("sources", [])],
        "bytes": data.get("train_bytes", 0) + val_bytes,
        "split": data.get("split_description"),
    }
    entry = {
        "name": run.name,
        "folder": shlex.quote(str(run)),
        "state": "finished" if is_finished else "training" if is_active(run) else "stopped",
        "step": step,
        "steps": settings.get("steps"),
        "progress": 1.0 if is_finished else last_step.get("progress"),
        "seconds": last_step.get("seconds"),
        "tokens_per_second": last_step.get("tokens_per_second"),
        "train_loss": last_step.get("train_loss"),
        "val_loss": loss.get("val_loss"),
        "bits_per_byte": loss.get("bits_per_byte"),
        "bits_per_nat": bits_per_nat,
        "baselines": data.get("baselines", {}),
        "diagnosis": summary.get("diagnosis"),
        "has_model": bool(summary),
        "text": text,
        "settings": settings,
    }
    return _replace_nan(entry)


def read_new_lines(path: Path | None, offset: int, file: str) -> dict[str, Any]:
    """Return the next records of a log, see `read_new_records`; none if there is no log."""
    if path is None:
        return {"file": "", "from": 0, "offset": 0, "more": False, "records": []}
    return read_new_records(path, offset, file, MAX_CHUNK_BYTES)


def read_new_metrics(path: Path | None, offset: int, file: str) -> dict[str, Any]:
    """Return the next lines of metrics.jsonl: `steps` as a list per column, and `evaluations`."""
    answer = read_new_lines(path, offset, file)
    records = answer.pop("records")
    steps = [record for record in records if "grad_norm" in record]
    columns = {name: [_round(record.get(name)) for record in steps] for name in COLUMNS}
    evaluations = [record for record in records if "val_loss" in record]
    return answer | {"steps": columns, "evaluations": _replace_nan(evaluations)}


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a file, cached until it changes; empty if missing or damaged."""
    if log_path(path.parent, path.name) is None:
        return {}
    status = path.stat()
    return _read_cached(path, status.st_mtime_ns, status.st_size, status.st_ino)


@lru_cache(maxsize=1024)
def _read_cached(path: Path, *version: int) -> dict[str, Any]:
    run = RunFolder(path.parent)
    readers: dict[Path, Callable[[], Any]] = {
        run.config_path: lambda: flatten(run.read_config()),
        run.data_path: run.read_data,
        run.model_path: lambda: run.read_model_header()[0],
    }
    try:
        content = readers[path]()
    except (OSError, ValueError, UserError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_config(run: Path) -> bool:
    return RunFolder(run).config_path.is_file()


def _last_written(run: Path) -> float:
    """Return when a run last wrote a step, or else its settings."""
    folder = RunFolder(run)
    paths = (folder.config_path, folder.metrics_path)
    return max(path.stat().st_mtime for path in paths if path.exists())


def _is_unicode(name: str) -> bool:
    """Return False for a file name with bytes that are not valid text."""
    return name.encode(errors="surrogateescape") == name.encode(errors="ignore")


def _round(value: Any) -> float | None:
    """Round a number to six significant digits; None for what JSON cannot represent."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def _replace_nan(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by None, at any depth."""
    if isinstance(value, dict):
        return {key: _replace_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
