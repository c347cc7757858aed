"""The record of a run that outlives the terminal: metrics.jsonl and samples.jsonl, and of many processes ranks.jsonl.

In: events. Out: a line of JSON for each that has numbers or a text, which is all that a page, a plot or a report knows of a run.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanogpt.files import disk_full, is_full, write_text
from nanogpt.report.events import Began, Evaluated, Event, Paced, Sampled, Saving, Started, Stepped


class RunLog:
    """Writes metrics.jsonl (steps and evaluations), samples.jsonl, and ranks.jsonl where there are many processes."""

    def __init__(self, run: Path):
        self.metrics, self.samples, self.ranks = run / "metrics.jsonl", run / "samples.jsonl", run / "ranks.jsonl"

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            for path in (self.metrics, self.samples, *filter(Path.exists, [self.ranks])):
                _cut(path, event.step)
        elif isinstance(event, Began | Stepped | Evaluated):
            _append(self.metrics, event)
        elif isinstance(event, Sampled):
            _append(self.samples, event)
        elif isinstance(event, Paced):
            _append(self.ranks, event)
        elif isinstance(event, Saving):
            for path in (self.metrics, self.samples):
                with path.open("a") as file:
                    os.fsync(file.fileno())


def _append(path: Path, event: Began | Stepped | Evaluated | Paced | Sampled) -> None:
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(json.dumps(asdict(event), ensure_ascii=False) + "\n")
    except OSError as error:
        raise (disk_full(path) if is_full(error) else error) from error


def _cut(path: Path, step: int) -> None:
    """Drop what was written after `step`, which will happen again, and what a dying machine left unreadable."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_text(path, "".join(kept))


def read_records(path: Path, most_steps: int | None = None) -> list[dict[str, Any]]:
    """What metrics.jsonl or samples.jsonl tells, line by line, up to what a dying machine left unreadable.

    Of more than `most_steps` training steps only so many are read, spread evenly and with the last among them, so that it takes no longer for a long run.
    Errors: `OSError` where there is no such file.
    """
    lines = path.read_bytes().split(b"\n")  # which become text only if they are wanted
    steps = [i for i, line in enumerate(lines) if b'"tokens_per_second"' in line] if most_steps else []
    if most_steps and len(steps) > most_steps:
        left_out = set(steps) - {steps[(k + 1) * len(steps) // most_steps - 1] for k in range(most_steps)}
        lines = [line for i, line in enumerate(lines) if i not in left_out]
    found = []
    for line in lines:
        try:
            record = json.loads(line.decode("utf-8", errors="replace"))
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        found.append(record)
    return found
