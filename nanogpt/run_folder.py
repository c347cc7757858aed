"""The run folder runs/NAME: the paths of its files, its metadata and its JSONL logs.

This module is the only reader and writer of these files. The weights and the training state are
written by `nanogpt.checkpoint`. No torch is imported, so that the server starts fast.
"""

import json
import math
import os
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nanogpt.config import Config, read_toml, resolve, to_toml
from nanogpt.errors import UserError
from nanogpt.files import disk_full_error, is_disk_full, remove, write_text

# Written last into a saved state, so that its presence marks a complete one.
TRAIN_STATE_FILE = "train_state.json"
# The format of model files.
FORMAT_VERSION = 2


class RunFolder:
    """The files of one run; the folder does not need to exist.

    Args:
        path: The folder of the run.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.config_path = self.path / "config.toml"
        self.data_path = self.path / "data.json"
        self.model_path = self.path / "model.safetensors"
        self.metrics_path = self.path / "metrics.jsonl"
        self.samples_path = self.path / "samples.jsonl"
        self.ranks_path = self.path / "ranks.jsonl"
        self.state_path = self.path / "state"
        self.lock_path = self.path / ".lock"
        self.run_id_path = self.path / ".run_id"
        self.report_path = self.path / "report.html"
        self.memorization_path = self.path / "memorization.json"
        self.memorization_index_path = self.path / "memorization.safetensors"

    def is_run(self) -> bool:
        """Return True if the folder holds any file that only a run writes."""
        marks = (self.config_path, self.metrics_path, self.model_path)
        return any(path.is_file() for path in marks)

    def latest_step(self) -> int | None:
        """Return the step of the state to resume from, None if there is none."""
        try:
            step = int((self.state_path / "latest").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return step if (self.state_path / str(step) / TRAIN_STATE_FILE).is_file() else None

    def check_writable(self, *, resume: bool, overwrite: bool) -> None:
        """Check that a run may write into the folder.

        The folder may be absent or empty, or hold a run to resume or to overwrite.

        Raises:
            UserError: The folder is not usable; nothing was changed.
        """
        path = self.path.absolute()
        other_folder = "Choose another folder with the setting `out`."
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a folder.", other_folder)
        names = {file.name for file in path.iterdir()} if path.is_dir() else set()
        names -= {self.lock_path.name, self.run_id_path.name}
        if not names:
            return
        if self.config_path.name not in names:
            listed = ", ".join(sorted(names)[:5])
            what = f"{path} is not a nanogpt run: it contains {listed}. Nothing was changed."
            raise UserError(what, other_folder)
        step = self.latest_step()
        if not (resume or overwrite):
            saved = "" if step is None else f", saved at step {step:,}"
            raise UserError(
                f"{path} already holds a run{saved}.",
                "Set `resume` to continue it, `overwrite` to replace it, or another `out`.",
            )
        if resume and step is None and names & {self.model_path.name, self.state_path.name}:
            raise UserError(
                f"The run in {path} cannot be resumed: its saved state is missing or damaged.",
                "Set `overwrite` to replace it, or another `out` to keep it.",
            )

    def clear(self) -> None:
        """Remove all files of the run except its lock; other files in the folder stay."""
        files = [self.config_path, self.data_path, self.model_path, self.metrics_path]
        files += [self.samples_path, self.ranks_path, self.state_path, self.report_path]
        files += [self.memorization_path, self.memorization_index_path, self.run_id_path]
        for path in (*files, self.path / "tensorboard", self.path / "wandb"):
            remove(path)

    def read_config(self) -> Config:
        """Return the settings of the run; raise UserError if they cannot be read."""
        return resolve(read_toml(self.config_path))

    def write_config(self, config: Config) -> None:
        """Write the resolved settings of the run."""
        write_text(self.config_path, to_toml(config))

    def read_data(self) -> dict[str, Any]:
        """Return the metadata of the prepared data; raise OSError or ValueError if unreadable."""
        return _read_json(self.data_path)

    def write_data(self, metadata: Mapping[str, Any]) -> None:
        """Write the metadata of the prepared data, with the keys of `PreparedData.metadata`."""
        write_text(self.data_path, json.dumps(metadata, indent=1))

    def read_model_header(self) -> tuple[dict[str, Any], int]:
        """Return the training summary and the number of parameters, without reading weights."""
        return read_model_header(self.model_path)

    def read_memorization(self) -> dict[str, Any]:
        """Return what the last sample copied; raise OSError or ValueError if unreadable."""
        return _read_json(self.memorization_path)

    def write_memorization(self, step: int, result: Mapping[str, Any]) -> None:
        """Write which passages the sample of `step` copied, from `Memorization.asdict()`."""
        write_text(self.memorization_path, json.dumps({"step": step} | dict(result)))

    def read_metrics(self, max_steps: int | None = None) -> list[dict[str, Any]]:
        """Return the steps and evaluations of the run, see `read_jsonl`."""
        return read_jsonl(self.metrics_path, max_steps)

    def read_samples(self) -> list[dict[str, Any]]:
        """Return the sampled texts of the run, see `read_jsonl`."""
        return read_jsonl(self.samples_path)

    def truncate_logs(self, step: int) -> None:
        """Drop the records after `step`, and those that a crash left incomplete."""
        _truncate_jsonl(self.metrics_path, step)
        _truncate_jsonl(self.samples_path, step)
        if self.ranks_path.exists():
            _truncate_jsonl(self.ranks_path, step)

    def sync_logs(self) -> None:
        """Flush metrics and samples to disk, before a state that follows them is saved."""
        for path in (self.metrics_path, self.samples_path):
            with path.open("a") as file:
                os.fsync(file.fileno())


def read_model_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the training summary and the number of parameters of a model file.

    Raises:
        UserError: The file is missing, its header is damaged, or its format is another version.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = json.loads((file.metadata() or {})["nanogpt"])
            check_format_version(path, metadata)
            summary = metadata["summary"]
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The header of {path.absolute()} cannot be read: {error}.") from error
    return summary, sum(math.prod(shape) for shape in shapes)


def check_format_version(path: Path, metadata: Mapping[str, Any]) -> None:
    """Raise `UserError` for a model file of another format version."""
    version = metadata["format_version"]
    if version != FORMAT_VERSION:
        is_newer = version > FORMAT_VERSION
        writer = "a newer nanogpt" if is_newer else "an older nanogpt"
        what = f"{path} was written by {writer} (format {version}, not {FORMAT_VERSION})."
        raise UserError(what, "Upgrade nanogpt." if is_newer else "Train the model again.")


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Append one record as a line; raise UserError if the disk is full."""
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise (disk_full_error(path) if is_disk_full(error) else error) from error


def read_jsonl(path: Path, max_steps: int | None = None) -> list[dict[str, Any]]:
    """Return the records of a JSONL log, up to the first line that a crash left damaged.

    Args:
        path: The log; a missing file raises OSError.
        max_steps: Maximum number of training steps to parse. A longer log is thinned evenly and
            keeps its last step, so that reading time does not grow with the run.
    """
    # Only the selected lines are decoded and parsed.
    lines = path.read_bytes().split(b"\n")
    if max_steps:
        steps = [i for i, line in enumerate(lines) if b'"tokens_per_second"' in line]
        if len(steps) > max_steps:
            selected = {steps[(k + 1) * len(steps) // max_steps - 1] for k in range(max_steps)}
            dropped = set(steps) - selected
            lines = [line for i, line in enumerate(lines) if i not in dropped]
    text_lines = (line.decode("utf-8", errors="replace") for line in lines)
    records = takewhile(lambda record: record is not None, map(_parse_record, text_lines))
    return [record for record in records if record is not None]


def read_new_records(path: Path, offset: int, file_id: str, max_bytes: int) -> dict[str, Any]:
    """Return the complete lines of a growing JSONL log after byte `offset`.

    A log that was replaced since (as on resume), or is shorter, is read from its start.

    Args:
        path: The log.
        offset: Where the previous answer ended, 0 for the first call.
        file_id: `file` of the previous answer, "" for the first call.
        max_bytes: Maximum number of bytes to read.

    Returns:
        `records`; `from` and `offset`, the bytes they span; `file`, an identifier of the file;
        `more`, True if further lines can be read at once.
    """
    with path.open("rb") as stream:
        status = os.fstat(stream.fileno())
        current_id = f"{status.st_dev}-{status.st_ino}"
        start = offset if file_id == current_id and 0 <= offset <= status.st_size else 0
        if start:
            # Answers end at a line end. If there is none, another file reused the inode.
            stream.seek(start - 1)
            start = start if stream.read(1) == b"\n" else 0
        stream.seek(start)
        chunk = stream.read(max_bytes)
    lines = chunk[: chunk.rfind(b"\n") + 1]
    return {
        "file": current_id,
        "from": start,
        "offset": start + len(lines),
        "more": bool(lines) and start + len(chunk) < status.st_size,
        "records": _parse_complete_records(lines),
    }


def read_last_records(path: Path, max_bytes: int) -> list[dict[str, Any]]:
    """Return the records in the last `max_bytes` bytes of a JSONL log."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - max_bytes))
        return _parse_complete_records(stream.read(max_bytes))


def _parse_complete_records(lines: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects that have a step; skip damaged and incomplete lines."""
    records = map(_parse_record, lines.split(b"\n"))
    return [record for record in records if record and isinstance(record.get("step"), int)]


def _parse_record(line: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object in a line, or None if the line is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _truncate_jsonl(path: Path, step: int) -> None:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = []
    for line in text.split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            break
    write_text(path, "".join(lines))


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not contain a JSON object.")
    return content
