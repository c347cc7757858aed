"""The model file and the run folder: what a run leaves, and what it needs to go on.

In: a model, its tokenizer, an optimiser. Out: files that are whole or absent, and the same objects again from them.
Refuses: pickles, files that were cut short or changed, folders that hold something else.

Model file: `model.safetensors`, the weights, with one JSON object under "nanogpt" in its header: "format_version", "model" (the
settings), "tokenizer" (a tokenizer.json), "summary" (how training went) and "sha256" (of all that and the tensors).
Run folder: config.toml, text.json, metrics.jsonl, samples.jsonl, report.html, model.safetensors (the best by validation loss) and
state/STEP/ (the last: weights, optimiser, position), where state/latest names the STEP that is valid.
"""

import hashlib
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt.config import ModelConfig
from nanogpt.errors import UserError
from nanogpt.files import discard, replacing, write_text
from nanogpt.machine import Ranks
from nanogpt.machine.shards import load_shards, read_whole, save_shards, shapes
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.tokenizer import Tokenizer

FORMAT_VERSION = 1
RUN_FILES = {"config.toml", "text.json", "metrics.jsonl", "samples.jsonl", "ranks.jsonl", "model.safetensors", "copies.safetensors", "state", ".lock"}
RUN_FILES |= {"report.html", "copies.json", "tensorboard", "wandb"}
PICKLES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Parts:
    """What is in a model file: the model in evaluation mode, its tokenizer, and the summary of its training."""

    model: GPT
    tokenizer: Tokenizer
    summary: dict[str, Any]


def save_model(path: Path, model: GPT, tokenizer: Tokenizer, summary: dict[str, Any], ranks: Ranks = Ranks()) -> None:
    """Write the one file that is the whole model. The same model gives the same bytes, however many processes hold it."""
    about = {
        "format_version": FORMAT_VERSION,
        "model": model.config.model_dump(),
        "tokenizer": tokenizer.to_json(),
        "summary": summary,
    }
    _write_tensors(path, model.state_dict(), about, ranks)


def load(path: str | Path, device: torch.device | str = "cpu") -> Parts:
    """Read a model file, or the one in a run folder.

    Errors: `UserError` for what is missing, cut short, changed since it was written, a pickle, or of a newer version.
    """
    file = model_file(Path(path))
    about, tensors = _read_tensors(file)
    try:
        if about["format_version"] > FORMAT_VERSION:
            raise UserError(f"{file} was written by a newer nanogpt (format {about['format_version']}).", "pip install --upgrade nanogpt")
        tokenizer = Tokenizer.from_json(about["tokenizer"])
        model = empty_model(ModelConfig.model_validate(about["model"]), tokenizer.vocab_size, device)
        model.load_state_dict(tensors)
        summary = {"unused": [], **about["summary"]}
    except (KeyError, TypeError, RuntimeError, ValidationError) as error:
        raise UserError(f"{file} does not hold a model that this nanogpt understands: {str(error)[:300] or error!r}.") from error
    return Parts(model.eval(), tokenizer, summary)


def describe(path: str | Path) -> tuple[dict[str, Any], int]:
    """The summary in a model file, or in that of a run folder, and how many parameters it holds, without reading the weights and so without checking them.

    Errors: `UserError` where there is no model file or its header cannot be read.
    """
    file = model_file(Path(path))
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {})["nanogpt"])
            return about["summary"], sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"The header of {file.absolute()} cannot be read: {error}.") from error


def empty_model(config: ModelConfig, vocab_size: int, device: torch.device | str) -> GPT:
    """A model whose weights are still to be filled, so that building it draws no random numbers."""
    with torch.device("meta"):
        model = GPT(config, vocab_size)
    return model.to_empty(device=device)


@torch.no_grad()
def take_weights(model: GPT, earlier: GPT | None, ranks: Ranks = Ranks()) -> None:
    """Give a model the weights of an earlier one, which the first process has. They may differ in context: where positions are learned, it is no longer than
    before."""
    weights = earlier.state_dict() if earlier is not None else {}
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.context_length]
    for name, parameter in model.state_dict().items():
        ranks.fill(parameter, weights.get(name))


def model_file(path: Path) -> Path:
    """The model file that `path` means: itself, or the one in it. Errors: `UserError` when there is none."""
    if path.is_dir():
        if (path / "model.safetensors").is_file():
            return path / "model.safetensors"
        there = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
        fix = f"Its training was stopped before the first evaluation: go on with nanogpt train --resume --out {path}" if latest_step(path) else ""
        raise UserError(f"The folder {path.absolute()} holds no model.safetensors (it holds: {there}).", fix)
    if not path.is_file():
        runs = sorted(str(file.parent) for file in path.absolute().parent.glob("*/model.safetensors"))
        fix = f"Models beside it: {', '.join(runs[:5])}." if runs else "Train one with: nanogpt train TEXT"
        raise UserError(f"There is no model at {path.absolute()}.", fix)
    return path


def require_run_folder(run: Path, *, resume: bool, overwrite: bool) -> None:
    """See that a run may write into the folder: a new or empty one, or one that holds a run to go on with or to replace.

    Errors: `UserError` when it may not, with what is there.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run.absolute()} is a file, not a folder.", "Choose another folder with --out FOLDER.")
    there = {file.name for file in run.iterdir()} - {".lock"} if run.is_dir() else set()
    if not there:
        return
    if "config.toml" not in there:
        raise UserError(
            f"{run.absolute()} is not a run of nanogpt: it holds {', '.join(sorted(there)[:5])}. Nothing was touched.",
            "Choose another folder with --out FOLDER.",
        )
    step = latest_step(run)
    if not (resume or overwrite):
        raise UserError(
            f"{run.absolute()} already holds a run" + (f", saved at step {step:,}." if step else "."),
            "Go on with it: --resume. Replace it: --overwrite. Keep it: --out ANOTHER_FOLDER.",
        )
    if resume and step is None and there & {"model.safetensors", "state"}:
        raise UserError(f"{run.absolute()} holds a run whose saved state is missing or damaged.", "Replace it: --overwrite. Keep it: --out ANOTHER_FOLDER.")


def clear_run_folder(run: Path) -> None:
    """Remove the files of an older run; what else is in the folder stays."""
    for name in RUN_FILES - {".lock"}:
        discard(run / name)


def save_state(run: Path, step: int, model: GPT, optimizer: Optimizer, position: dict[str, Any], ranks: Ranks = Ranks()) -> Future[None] | None:
    """Write all that the run needs to go on after `step`, make it the latest, and drop the older ones.

    Killed at any moment, the folder still has the state that `latest` names. Where each process holds a part, it copies it, and a thread writes the copy into
    the folder of the first while training goes on: the result comes when that is done, or has its error.
    """
    states = run / "state"

    def make_latest() -> None:
        if ranks.is_first:
            write_text(states / "latest", str(step))
            for other in states.iterdir():
                if other.name not in ("latest", str(step)):
                    discard(other)

    if ranks.of_first(latest_step(run)) == step:
        return None
    if ranks.is_first:
        discard(states / str(step))  # a killed process may have come this far, but not to naming it the latest
    with ExitStack() as stack:
        folder = stack.enter_context(replacing(states / str(step)) if ranks.is_first else nullcontext(run))
        if ranks.is_first:
            folder.mkdir()
            (folder / "position.json").write_text(json.dumps(position), encoding="utf-8")
        if ranks.sharded:
            parts = {name: tensor.detach().to("cpu", copy=True) for name, tensor in (model.state_dict() | optimizer.state_tensors()).items()}
            place, group, finish = Path(ranks.of_first(str(folder))), ranks.beside(), stack.pop_all()

            def write() -> None:
                with finish:
                    save_shards(place, parts, group)
                make_latest()

            pool = ThreadPoolExecutor(1)
            written = pool.submit(write)
            pool.shutdown(wait=False)
            return written
        _write_tensors(folder / "weights.safetensors", model.state_dict(), {}, ranks)
        _write_tensors(folder / "optimizer.safetensors", optimizer.state_tensors(), {}, ranks)
    make_latest()
    return None


@torch.no_grad()
def take_best(run: Path, model: GPT, ranks: Ranks = Ranks()) -> dict[str, Any]:
    """Fill a model with the weights of the run's model file, and give the file's summary. Each process that holds a part reads its part. Errors: as `load`."""
    if ranks.sharded:
        try:
            load_shards(run, model.state_dict())
        except ValueError as error:
            raise UserError(f"{run / 'model.safetensors'} is damaged: {error}.") from error
        return ranks.of_first(ranks.decided(lambda: describe(run)[0]))
    best = ranks.decided(lambda: load(run))
    take_weights(model, best.model if best else None, ranks)
    return ranks.of_first(best and best.summary)


@torch.no_grad()
def load_state(run: Path, model: GPT, optimizer: Optimizer, ranks: Ranks = Ranks()) -> dict[str, Any]:
    """Fill a model and its optimiser with the latest state, however many processes saved it, and in whatever parts; give the position that was saved with it.

    Where each process holds all, the first reads and tells the others; else each reads its parts. Errors: `UserError` when a file of it is damaged.
    """
    folder = run / "state" / str(ranks.of_first(latest_step(run)))
    if ranks.sharded:
        position, sizes = ranks.of_first(ranks.decided(lambda: _state_in_parts(folder, model)))
        tensors = model.state_dict() | {name: optimizer.room(name, size) for name, size in sizes.items() if name not in model.state_dict()}
        try:
            load_shards(folder, tensors)
        except ValueError as error:
            raise _damaged_state(folder, error) from error
        optimizer.load_state_tensors({name: tensors[name] for name in tensors if name not in model.state_dict()})
        return position
    weights, state, position = ranks.decided(lambda: _read_state(folder, model)) or ({}, {}, {})
    for name, parameter in model.state_dict().items():
        ranks.fill(parameter, weights.get(name))
    filled = {name: optimizer.room(name, shape) for name, shape in ranks.of_first({name: list(t.shape) for name, t in state.items()}).items()}
    for name, tensor in filled.items():
        ranks.fill(tensor, state.get(name))
    optimizer.load_state_tensors(filled)
    return ranks.of_first(position)


def seconds_used(run: Path) -> float:
    """How long the run that was saved has taken, getting ready included. Errors: `UserError` as for `load_state`."""
    try:
        position = json.loads((run / "state" / str(latest_step(run)) / "position.json").read_text(encoding="utf-8"))
        return position["seconds"] + position["overhead"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The state in {run.absolute()} is damaged: {error}.", "Train anew: --overwrite, or --out ANOTHER_FOLDER.") from error


def _read_state(folder: Path, model: GPT) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    try:
        if (folder / "weights.safetensors").exists():
            weights, state = (_read_tensors(folder / f"{name}.safetensors")[1] for name in ("weights", "optimizer"))
        else:  # it was saved in parts
            state = read_whole(folder)
            weights = {name: state.pop(name) for name in model.state_dict()}
        _require_fit({name: list(tensor.shape) for name, tensor in (weights | state).items()}, model)
        return weights, state, json.loads((folder / "position.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged_state(folder, error) from error


def _state_in_parts(folder: Path, model: GPT) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The position in a state, and the sizes of its tensors."""
    try:
        _require_fit(sizes := shapes(folder), model)
        return json.loads((folder / "position.json").read_text(encoding="utf-8")), sizes
    except (OSError, ValueError) as error:
        raise _damaged_state(folder, error) from error


def _require_fit(sizes: dict[str, list[int]], model: GPT) -> None:
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = [name for name, size in own.items() if sizes.get(name) != size]
    wrong += [name for name in sizes if name not in own and name.rpartition(".")[0] not in own]
    if wrong:
        raise ValueError(f"its tensors are others ({', '.join(wrong[:3])})")


def _damaged_state(folder: Path, error: Exception) -> UserError:
    why = str(error).partition("\n")[0]
    what = f"The state in {folder.absolute()} is damaged, or does not fit config.toml: {why}."
    return UserError(what, "Train anew: --overwrite, or --out ANOTHER_FOLDER.")


def latest_step(run: Path) -> int | None:
    """The step of the state that a run can go on from; None if there is none."""
    try:
        step = int((run / "state" / "latest").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return step if (run / "state" / str(step) / "position.json").is_file() else None


def _write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any], ranks: Ranks) -> None:
    """Write float32 tensors as a safetensors file: 8 bytes with the size of the header, the header, and one tensor after another. All processes come here,
    the first writes; of sharded tensors it holds one at a time."""
    header: dict[str, Any] = {"__metadata__": {"nanogpt": json.dumps(about | {"sha256": "0" * 64})}}  # the digest is known, and put in, at the end
    end = 0
    for name in sorted(tensors):
        assert tensors[name].dtype == torch.float32
        begin, end = end, end + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    digest = _Digest(about)
    with replacing(path) if ranks.is_first else nullcontext(path) as unfinished, unfinished.open("wb") if ranks.is_first else nullcontext() as file:
        if file:
            file.write(_header(header))
        for name in sorted(tensors):
            tensor = ranks.whole(tensors[name].detach())
            if file:
                file.write(digest.add(name, tensor))
        if file:
            header["__metadata__"]["nanogpt"] = json.dumps(about | {"sha256": digest.hexdigest()})
            file.seek(0)
            file.write(_header(header))


def _header(header: dict[str, Any]) -> bytes:
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)  # so that tensors lie at multiples of 8
    return len(content).to_bytes(8, "little") + content


def _read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with path.open("rb") as stream:
        head = stream.read(9)
    if path.suffix not in PICKLES and path.suffix != ".safetensors" and head[8:9] != b"{" and not head.startswith((b"PK", b"\x80")):
        raise UserError(f"{path.absolute()} is not a model file.", "Give it a model.safetensors or a run folder that nanogpt made.")
    if path.suffix in PICKLES or head[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):
        raise UserError(
            f"{path.absolute()} is a pickle. Loading one can run any program that its author put in, so nanogpt never does.",
            "Give it a model.safetensors or a run folder that nanogpt made.",
        )
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("nanogpt", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, f"{path.stat().st_size:,} bytes are there, but they are not a whole safetensors file ({error})") from error
    if about is None:
        raise UserError(f"{path.absolute()} is a safetensors file, but none that nanogpt made: its header lacks the model's settings and tokenizer.")
    written = about.pop("sha256", "missing")
    if (found := _digest(about, tensors)) != written:
        raise _damaged(path, f"its SHA-256 is {found[:16]}…, and was {written[:16]}… when it was written")
    return about, tensors


class _Digest:
    """The SHA-256 of what a file says and of its tensors, in the order of their names."""

    def __init__(self, about: dict[str, Any]):
        self.hash = hashlib.sha256(json.dumps(about, sort_keys=True).encode())

    def add(self, name: str, tensor: Tensor) -> memoryview:
        """Count a tensor in; give its bytes."""
        content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.hash.update(name.encode())
        self.hash.update(content)
        return content

    def hexdigest(self) -> str:
        """The digest of all so far."""
        return self.hash.hexdigest()


def _digest(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = _Digest(about)
    for name in sorted(tensors):
        digest.add(name, tensors[name])
    return digest.hexdigest()


def _damaged(path: Path, how: str) -> UserError:
    run = next((folder for folder in path.absolute().parents if (folder / "config.toml").is_file()), None)
    step = latest_step(run) if run and path.name == "model.safetensors" else None
    fix = f"The state of step {step:,} is there: nanogpt train --resume --out {run} writes the model anew." if step else "Copy it again, or train again."
    return UserError(f"{path.absolute()} is damaged: {how}.", fix)
