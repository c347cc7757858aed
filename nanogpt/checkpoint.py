"""The model file and the saved training state; every file is complete or absent.

Model file: `model.safetensors` holds the weights and, in its header under "nanogpt", one JSON
object: "format_version", "model" (the settings), "tokenizer" (a tokenizer.json), "summary" (of the
training) and "sha256" (of the object and the tensors). No pickle is ever read.

Run folder: config.toml, data.json, metrics.jsonl, samples.jsonl, report.html, the best model by
validation loss, and state/STEP/ with weights, optimizer state and train_state.json. The file
state/latest names the valid STEP.
"""

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt import run_folder
from nanogpt.config import ModelConfig
from nanogpt.distributed.context import DistContext
from nanogpt.distributed.sharded_io import dcp_load, dcp_save, load_full_state, tensor_shapes
from nanogpt.errors import UserError
from nanogpt.files import atomic_write, remove, write_text
from nanogpt.model import GPT, rms_normalize
from nanogpt.optim import Optimizer
from nanogpt.run_folder import FORMAT_VERSION, RunFolder
from nanogpt.tokenizer.tokenizer import Tokenizer

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}
PICKLE_MAGIC = (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
OVERWRITE_FIX = "Train again: set overwrite, or another folder as out."

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LoadedModel:
    """The contents of a model file: a model in evaluation mode, its tokenizer and summary."""

    model: GPT
    tokenizer: Tokenizer
    summary: dict[str, Any]


def save_model(
    path: Path,
    model: GPT,
    tokenizer: Tokenizer,
    summary: dict[str, Any],
    ranks: DistContext = DistContext(),
) -> None:
    """Write the model file.

    The bytes depend on the model only, not on the number of processes that hold it. If the model
    normalizes its embeddings as it reads them, the file holds normalized embeddings.
    """
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": model.config.model_dump(),
        "tokenizer": tokenizer.to_json(),
        "summary": summary,
    }

    def fold_norm(name: str, tensor: Tensor) -> Tensor:
        is_folded = model.normalize_embedding and name == "wte.weight"
        return rms_normalize(tensor) if is_folded else tensor

    _write_tensors(path, model.state_dict(), metadata, ranks, fold_norm)


def load(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Read a model file, or the model file of a run folder.

    Raises:
        UserError: The file is missing, damaged, a pickle, or has another format version.
    """
    file = resolve_model_path(Path(path))
    metadata, tensors = _read_tensors(file)
    try:
        run_folder.check_format_version(file, metadata)
        tokenizer = Tokenizer.from_json(metadata["tokenizer"])
        config = ModelConfig.model_validate(metadata["model"])
        model = build_uninitialized(config, tokenizer.vocab_size, device)
        model.normalize_embedding = False  # The rows in the file are normalized.
        model.load_state_dict(tensors)
        summary = metadata["summary"]
        summary.setdefault("unseen_token_ranges", [])
    except (KeyError, TypeError, RuntimeError, ValidationError) as error:
        reason = str(error)[:300] or repr(error)
        raise UserError(f"{file} holds no model that this nanogpt can read: {reason}.") from error
    return LoadedModel(model.eval(), tokenizer, summary)


def read_metadata(path: str | Path) -> tuple[dict[str, Any], int]:
    """Read the summary and the number of parameters of a model file, but not its weights.

    The checksum is thus not verified.

    Raises:
        UserError: There is no model file, its header cannot be read, or it has another format
            version.
    """
    return run_folder.read_model_header(resolve_model_path(Path(path)))


def build_uninitialized(config: ModelConfig, vocab_size: int, device: torch.device | str) -> GPT:
    """Build a model without drawing any weights."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    return model.to_empty(device=device)


@torch.no_grad()
def load_weights(model: GPT, source: GPT | None, ranks: DistContext = DistContext()) -> None:
    """Copy the weights of a model into another one, on all processes.

    Args:
        model: The model to fill. With learned positions its context may be shorter than that of
            the source.
        source: The model to copy, on the main process; None on the others.
        ranks: The processes that hold the model.
    """
    weights = source.state_dict() if source is not None else {}
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.context_length]
    for name, parameter in model.state_dict().items():
        ranks.broadcast_tensor_into(parameter, weights.get(name))


@torch.no_grad()
def load_best_weights(run: Path, model: GPT, ranks: DistContext = DistContext()) -> dict[str, Any]:
    """Fill a model from the run's model file, and return the file's summary.

    With FSDP each process reads its shard.

    Raises:
        UserError: As in `load`.
    """
    if ranks.is_fsdp:
        try:
            dcp_load(run, model.state_dict())
        except ValueError as error:
            raise UserError(f"{run / 'model.safetensors'} is damaged: {error}.") from error
        summary = ranks.run_on_main(lambda: read_metadata(run)[0])
    else:
        best = ranks.run_on_main(lambda: load(run))
        load_weights(model, best.model if best else None, ranks)
        summary = best.summary if best else None
    model.normalize_embedding = False  # The rows in the file are normalized.
    return ranks.broadcast_object(summary)


def resolve_model_path(path: Path) -> Path:
    """Return the model file at a path, which may be a run folder.

    Raises:
        UserError: There is none.
    """
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        files = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        what = f"The folder {path.absolute()} holds no model.safetensors (it holds: {files})."
        resume = f"resume with nanogpt train --resume --out {path}"
        fix = f"Training stopped before the first evaluation: {resume}"
        raise UserError(what, "" if latest_step(path) is None else fix)
    if not path.is_file():
        models = path.absolute().parent.glob("*/model.safetensors")
        runs = sorted(str(file.parent) for file in models)
        fix = f"Other models: {', '.join(runs[:5])}." if runs else "Train one: nanogpt train TEXT"
        raise UserError(f"There is no model at {path.absolute()}.", fix)
    return path


def save_state(
    run: Path,
    step: int,
    model: GPT,
    optimizer: Optimizer,
    train_state: dict[str, Any],
    ranks: DistContext = DistContext(),
) -> Future[None] | None:
    """Write the training state after `step`, make it the latest, and remove older ones.

    If the process is killed at any moment, `latest` still names a complete state.

    Returns:
        None if the state is written. With FSDP, each process copies its shard, a thread writes the
        copy, and this is the future of the thread.
    """
    states = run / "state"

    def make_latest() -> None:
        if not ranks.is_main_process:
            return
        write_text(states / "latest", str(step))
        for other in states.iterdir():
            if other.name not in ("latest", str(step)):
                remove(other)

    if ranks.broadcast_object(latest_step(run)) == step:
        return None
    if ranks.is_main_process:
        remove(states / str(step))  # A killed process may have left it without making it latest.
    with ExitStack() as stack:
        folder = run
        if ranks.is_main_process:
            folder = stack.enter_context(atomic_write(states / str(step)))
            folder.mkdir()
            (folder / run_folder.TRAIN_STATE_FILE).write_text(
                json.dumps(train_state), encoding="utf-8"
            )
        if ranks.is_fsdp:
            tensors = {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in (model.state_dict() | optimizer.state_dict()).items()
            }
            folder = Path(ranks.broadcast_object(str(folder)))
            group = ranks.side_group()
            rename_folder = stack.pop_all()

            def write() -> None:
                with rename_folder:
                    dcp_save(folder, tensors, group)
                make_latest()

            pool = ThreadPoolExecutor(1)
            future = pool.submit(write)
            pool.shutdown(wait=False)
            return future
        _write_tensors(folder / "weights.safetensors", model.state_dict(), {}, ranks)
        _write_tensors(folder / "optimizer.safetensors", optimizer.state_dict(), {}, ranks)
    make_latest()
    return None


@torch.no_grad()
def load_state(
    run: Path, model: GPT, optimizer: Optimizer, ranks: DistContext = DistContext()
) -> dict[str, Any]:
    """Fill a model and its optimizer from the latest state, and return the saved `train_state`.

    The number of processes and the sharding may differ from those that saved it. With FSDP each
    process reads its shard, else the main process reads and broadcasts.

    Raises:
        UserError: A file is damaged or does not fit the model.
    """
    folder = run / "state" / str(ranks.broadcast_object(latest_step(run)))

    def read() -> tuple[Tensors, dict[str, list[int]], dict[str, Any]]:
        try:
            full = {} if ranks.is_fsdp else _read_full_state(folder)
            full_shapes = {name: list(tensor.shape) for name, tensor in full.items()}
            shapes = tensor_shapes(folder) if ranks.is_fsdp else full_shapes
            _check_shapes(shapes, model)
            return full, shapes, _read_train_state(folder)
        except (OSError, ValueError, RuntimeError) as error:
            raise _corrupt_state_error(folder, error) from error

    full, shapes, train_state = ranks.run_on_main(read) or ({}, {}, {})
    shapes, train_state = ranks.broadcast_object([shapes, train_state])
    weights = model.state_dict()
    state = {
        name: optimizer.empty_state_tensor(name, shape)
        for name, shape in shapes.items()
        if name not in weights
    }
    if ranks.is_fsdp:
        try:
            dcp_load(folder, weights | state)
        except ValueError as error:
            raise _corrupt_state_error(folder, error) from error
    else:
        for name, tensor in (weights | state).items():
            ranks.broadcast_tensor_into(tensor, full.get(name))
    optimizer.load_state_dict(state)
    return train_state


def elapsed_seconds(run: Path) -> float:
    """Return the seconds that a saved run has taken, setup included.

    Raises:
        UserError: The state is damaged.
    """
    try:
        train_state = _read_train_state(run / "state" / str(latest_step(run)))
        return train_state["seconds"] + train_state["setup_seconds"]
    except (OSError, ValueError, KeyError) as error:
        what = f"The state in {run.absolute()} is damaged: {error}."
        raise UserError(what, OVERWRITE_FIX) from error


def latest_step(run: Path) -> int | None:
    """Return the step of the saved state that a run can resume from, or None."""
    return RunFolder(run).latest_step()


def _read_train_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / run_folder.TRAIN_STATE_FILE).read_text(encoding="utf-8"))


def _read_full_state(folder: Path) -> Tensors:
    """Read the weights and the optimizer state, both unsharded."""
    files = [folder / "weights.safetensors", folder / "optimizer.safetensors"]
    if not files[0].exists():  # It was saved in shards.
        return load_full_state(folder)
    return _read_tensors(files[0])[1] | _read_tensors(files[1])[1]


def _check_shapes(shapes: dict[str, list[int]], model: GPT) -> None:
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    # The name of an optimizer tensor is that of a parameter, a dot, and the quantity.
    wrong += [name for name in shapes if not {name, name.rpartition(".")[0]} & expected.keys()]
    if wrong:
        raise ValueError(f"unexpected tensor names or shapes: {', '.join(wrong[:3])}")


def _corrupt_state_error(folder: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    what = f"The state in {folder.absolute()} is damaged, or does not fit config.toml: {reason}."
    return UserError(what, OVERWRITE_FIX)


def _write_tensors(
    path: Path,
    tensors: Tensors,
    metadata: dict[str, Any],
    ranks: DistContext,
    transform: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> None:
    """Write float32 tensors as a safetensors file, one unsharded tensor at a time.

    All processes must call it; the main process writes.
    """
    entries: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32
        shape = list(tensors[name].shape)
        start = end
        end += 4 * tensors[name].numel()
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    digest = _Digest(metadata)
    with ExitStack() as stack:
        file = None
        if ranks.is_main_process:
            file = stack.enter_context(stack.enter_context(atomic_write(path)).open("wb"))
            # The digest is known after the tensors, and replaces zeros of the same length.
            file.write(_encode_header(metadata | {"sha256": "0" * 64}, entries))
        for name in sorted(tensors):
            tensor = ranks.full_tensor(tensors[name].detach())
            if file:
                file.write(digest.add(name, transform(name, tensor)))
        if file:
            file.seek(0)
            file.write(_encode_header(metadata | {"sha256": digest.hash.hexdigest()}, entries))


def _encode_header(metadata: dict[str, Any], entries: dict[str, Any]) -> bytes:
    header = {"__metadata__": {"nanogpt": json.dumps(metadata)}} | entries
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)  # Tensors start at multiples of 8.
    return len(content).to_bytes(8, "little") + content


def _read_tensors(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Read the metadata and the tensors of a file, and verify its checksum."""
    with path.open("rb") as stream:
        head = stream.read(9)
    fix = "Give a model.safetensors or a run folder that nanogpt wrote."
    if path.suffix in PICKLE_SUFFIXES or head.startswith(PICKLE_MAGIC):
        reason = "Loading one can run any code, so nanogpt never does."
        raise UserError(f"{path.absolute()} is a pickle. {reason}", fix)
    is_safetensors = path.suffix == ".safetensors" or head[8:9] == b"{"
    if not is_safetensors and not head.startswith(b"\x80"):
        raise UserError(f"{path.absolute()} is not a model file.", fix)
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get("nanogpt", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        num_bytes = path.stat().st_size
        reason = f"its {num_bytes:,} bytes are not a complete safetensors file ({error})"
        raise _corrupt_file_error(path, reason) from error
    if metadata is None:
        raise UserError(f"{path.absolute()} is a safetensors file that nanogpt did not write.", fix)
    expected = metadata.pop("sha256", "missing")
    digest = _Digest(metadata)
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    if (found := digest.hash.hexdigest()) != expected:
        reason = f"its SHA-256 is {found[:16]}…, not {expected[:16]}…"
        raise _corrupt_file_error(path, reason)
    return metadata, tensors


class _Digest:
    """The SHA-256 of the metadata and of the tensors, in the order of their names."""

    def __init__(self, metadata: dict[str, Any]):
        self.hash = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())

    def add(self, name: str, tensor: Tensor) -> memoryview:
        """Hash a tensor, and return its bytes."""
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.hash.update(name.encode())
        self.hash.update(content)
        return content


def _corrupt_file_error(path: Path, reason: str) -> UserError:
    folders = path.absolute().parents
    run = next((folder for folder in folders if (folder / "config.toml").is_file()), None)
    step = latest_step(run) if run and path.name == "model.safetensors" else None
    fix = "Copy it again, or train again."
    if step:
        command = f"nanogpt train --resume --out {run}"
        fix = f"The state of step {step:,} is intact: write the model again with {command}"
    return UserError(f"{path.absolute()} is damaged: {reason}.", fix)
