"""Run folders as the page reads them: which there are, how far each is, and what its logs say since the last time.

In: the folder of runs, or one run's. Out: plain data for JSON, a bounded part of a log at a time, also while a training run writes it.
Refuses: every name but those of the folders that are right there, and whatever a link would lead out of them to.
"""

import json
import math
import os
import shlex
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanogpt.config import flatten, read_toml, resolve
from nanogpt.errors import UserError

PART = 1 << 22  # bytes of a log that are read at once: some 17,000 steps
LAST = 1 << 16  # bytes at its end in which the last step and the last evaluation are looked for
QUIET_SECONDS = 30.0  # a run that has not finished and has written within this time is taken to be going on
COLUMNS = ("step", "seconds", "tokens", "train_loss", "learning_rate", "grad_norm", "tokens_per_second")  # of a step; the page adds the tokens up


def find(runs: Path | None) -> dict[str, Path]:
    """The run folders in `runs`, or `runs` itself where that is one or its model file, by name: the one last written to first."""
    if runs is None or not runs.exists():
        return {}
    runs = runs.resolve()
    if runs.is_file():
        return find(runs.parent) if (runs.parent / "config.toml").is_file() else {}
    folders = [runs] if (runs / "config.toml").is_file() else [path for path in runs.iterdir() if (path / "config.toml").is_file()]
    inside = [path for path in folders if path.resolve().is_relative_to(runs) and _is_text(path.name)]
    return {path.name: path for path in sorted(inside, key=_last_written, reverse=True)}


def log(run: Path, name: str) -> Path | None:
    """A file of a run; None where it is not there, or is a link to elsewhere."""
    path = run / name
    return path if path.is_file() and path.resolve().parent == run.resolve() else None


def overview(run: Path) -> dict[str, Any]:
    """What a list of runs tells of one: its settings and text, how far it is, its last losses, its verdict."""
    settings, about, summary = _known(run, "config.toml"), _known(run, "text.json"), _known(run, "model.safetensors")
    steps, evaluations = _last(run)
    step = max((record["step"] for record in (steps, evaluations) if record), default=0)
    finished = summary.get("finished") == step and step > 0
    measured = summary if finished and "val_loss" in summary else evaluations
    val_bytes, train_bytes = about.get("val_bytes", 0), about.get("train_bytes", 0)
    sources = [os.path.basename(str(source)) for source in about.get("sources", [])]
    return _clean({
        "name": run.name, "folder": shlex.quote(str(run)),
        "state": "finished" if finished else "training" if time.time() - _last_written(run) < QUIET_SECONDS else "stopped",
        "step": step, "steps": settings.get("steps"), "progress": 1.0 if finished else steps.get("progress"), "seconds": steps.get("seconds"),
        "tokens_per_second": steps.get("tokens_per_second"), "train_loss": steps.get("train_loss"),
        "val_loss": measured.get("val_loss"), "bits_per_byte": measured.get("bits_per_byte"),
        "bits_per_nat": about["val_tokens"] / val_bytes / math.log(2) if val_bytes else None,
        "baselines": about.get("baselines", {}), "verdict": summary.get("verdict"), "has_model": bool(summary),
        "text": {"sources": sources, "bytes": train_bytes + val_bytes, "split": about.get("split")},
        "settings": settings,
    })  # fmt: skip


def news(path: Path | None, offset: int, file: str) -> dict[str, Any]:
    """The whole lines of a log from byte `offset` on, at most `PART` bytes: `records`, where to go on (`offset`), and whether there is `more`.

    `file` is what the last answer called the file. Where it has been replaced since, as when a run is resumed, or is shorter, the answer begins at its
    beginning, and `from` is 0.
    """
    if path is None:
        return {"file": "", "from": 0, "offset": 0, "more": False, "records": []}
    with path.open("rb") as stream:
        about = os.fstat(stream.fileno())
        now = f"{about.st_dev}-{about.st_ino}"
        start = offset if file == now and 0 <= offset <= about.st_size else 0
        if start:  # an answer ends with a line; if none ends here, this is another file under the same number
            stream.seek(start - 1)
            start = start if stream.read(1) == b"\n" else 0
        stream.seek(start)
        part = stream.read(PART)
    whole = part[: part.rfind(b"\n") + 1]
    more = bool(whole) and start + len(part) < about.st_size
    return {"file": now, "from": start, "offset": start + len(whole), "more": more, "records": list(_records(whole))}


def metrics(path: Path | None, offset: int, file: str) -> dict[str, Any]:
    """The same of a metrics.jsonl: `steps` as one list for each of `COLUMNS`, `evaluations` as they stand."""
    found = news(path, offset, file)
    records = found.pop("records")
    steps = [record for record in records if "grad_norm" in record]
    columns = {name: [_short(record.get(name)) for record in steps] for name in COLUMNS}
    return found | {"steps": columns, "evaluations": _clean([record for record in records if "val_loss" in record])}


def _last(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last step and the last evaluation that metrics.jsonl tells of; empty where there is none near its end."""
    path = log(run, "metrics.jsonl")
    if path is None:
        return {}, {}
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - LAST))
        records = list(_records(stream.read(LAST)))
    return tuple(next((record for record in reversed(records) if field in record), {}) for field in ("grad_norm", "best"))  # type: ignore[return-value]


def _records(lines: bytes) -> Iterator[dict[str, Any]]:
    """The JSON objects with a step among some lines; a line that is cut or damaged is none."""
    for line in lines.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _known(run: Path, name: str) -> dict[str, Any]:
    """What a file of a run says, read again only when it has changed; empty where it is missing or damaged."""
    path = log(run, name)
    if path is None:
        return {}
    about = path.stat()
    return _read(path, about.st_mtime_ns, about.st_size, about.st_ino)


@lru_cache(maxsize=1024)
def _read(path: Path, *version: int) -> dict[str, Any]:
    try:
        if path.suffix == ".toml":
            found: Any = flatten(resolve(read_toml(path)))
        elif path.suffix == ".safetensors":  # its header alone
            with safe_open(path, "np") as file:
                found = json.loads((file.metadata() or {})["nanogpt"])["summary"]
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, UserError, SafetensorError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_written(run: Path) -> float:
    """When a run last wrote a step, or at least its settings."""
    return max(path.stat().st_mtime for path in (run / "config.toml", run / "metrics.jsonl") if path.exists())


def _is_text(name: str) -> bool:
    """Whether a file's name can be told to others: a system may have bytes in it that are no text."""
    return name.encode(errors="surrogateescape") == name.encode(errors="ignore")


def _short(value: Any) -> float | None:
    """A number as a curve needs it; None for what JSON cannot tell."""
    return float(f"{value:.6g}") if isinstance(value, int | float) and math.isfinite(value) else None


def _clean(value: Any) -> Any:
    """The same without numbers that JSON does not have: they become None."""
    if isinstance(value, dict):
        return {key: _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
