"""What a program does with Nano-GPT: `train` a text into a `Model`, or `load` one.

In: paths and settings by name. Out: a `Model`, which streams text, evaluates and gives logits. Silent: progress goes to `on_event`.
"""

import json
import os
import secrets
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, generate, machine
from nanogpt.config import Config, flatten, read_toml, resolve, resolve_sampling, to_toml
from nanogpt.corpus import expand
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import Loss, Verdict, evaluate, ngram_losses
from nanogpt.files import require_space, write_text
from nanogpt.optim import make_optimizer
from nanogpt.prepare import Prepared, open_prepared, prepare
from nanogpt.report import Event, Interrupted, RunLog, Started, say_stopping
from nanogpt.tokenizer import Tokenizer
from nanogpt.trainer import Position, Trainer

MAY_CHANGE = {"steps", "eval_every", "patience", "device", "dtype", "threads"}  # when a run goes on; all else would make it another run


@dataclass(frozen=True)
class Evaluation(Loss):
    """A loss, with what counting reaches on the same text (nothing, where the training text is gone) and the verdict on the training."""

    baselines: dict[str, float]
    verdict: Verdict | None


class Model:
    """A trained model: what `train` and `load` give."""

    def __init__(self, parts: checkpoint.Parts, place: machine.Machine, path: Path, prepared: Prepared | None = None):
        self._model, self._machine, self._path, self._text = parts.model, place, path, prepared
        self.tokenizer: Tokenizer = parts.tokenizer
        self.summary: dict[str, Any] = parts.summary

    def stream(self, prompt: str | None = None, *, seed: int | None = None, strict: bool = False, **sampling: Any) -> Iterator[str]:
        """Pieces of text that continue `prompt`, as they are made; together at most `max_tokens` tokens.

        `sampling` takes the fields of `SamplingConfig`. Same seed, same text; without a seed, another text each time.
        Errors: `UserError` for a wrong setting and, with `strict`, for characters the model never saw (else it warns).
        """
        settings = resolve_sampling(sampling)
        unused = self.summary["unused"]
        ids = generate.encode_prompt(self.tokenizer, prompt, unused, self._model.config.context_length, strict)
        drawn = generate.tokens(self._model, ids, settings, new_seed() if seed is None else seed, self._machine, unused)
        return generate.text(self.tokenizer, drawn, settings.stop)

    def evaluate(self, *text: str | os.PathLike[str], context_length: int | None = None) -> Evaluation:
        """The loss on a text, or without one on the validation split of the run that made the model.

        Errors: `UserError` when there is no such text, or when the context is longer than the model's.
        """
        own = self._model.config.context_length
        if context_length is not None and not 1 <= context_length <= own:
            raise UserError(f"The model looks back on at most {own} tokens, not {context_length}.", f"Use --context-length {own} or less.")
        prepared = self._text or self._find_text()
        if text:
            tokens, n_bytes = self._encode([os.fspath(path) for path in text])
            baselines = ngram_losses(prepared.train, tokens) if prepared else {}
        elif prepared:
            tokens, n_bytes, baselines = prepared.val, prepared.about["val_bytes"], prepared.about["baselines"]
        else:
            raise UserError(
                f"{self._path} is a model without its run folder, so its validation text is not at hand.", f"Name a text: nanogpt eval {self._path} TEXT"
            )
        loss = evaluate(self._model, tokens, n_bytes, self._machine, context_length)
        judged = None if text or "verdict" not in self.summary else Verdict(**self.summary["verdict"])
        return Evaluation(loss.nats, loss.tokens, loss.bytes, baselines, judged)

    @torch.inference_mode()
    def logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """ids (B, T), T at most the context -> (B, T, V) float32: what the model expects after each token, before the softmax."""
        with self._machine.autocast():
            return self._model(torch.tensor(ids, device=self._machine.device)).float().cpu().numpy()

    def _find_text(self) -> Prepared | None:
        """The text the model was trained on, made again from its sources if need be; None where nothing is known of it."""
        run = self._path if self._path.is_dir() else self._path.parent
        if not (run / "text.json").is_file():
            return None
        return _text_of(run, resolve(read_toml(run / "config.toml")))

    def _encode(self, sources: Sequence[str]) -> tuple[np.ndarray, int]:
        pieces, n_bytes = [], 0
        for document in (documents := expand(sources)):
            for chunk in document.chunks():
                pieces.append(self.tokenizer.encode_array(chunk))
                n_bytes += len(chunk.encode())
            if len(documents) > 1:
                pieces.append(np.array([self.tokenizer.end], np.uint32))
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.uint32)
        if len(tokens) < 2:
            raise UserError(f"There are {len(tokens)} tokens in {', '.join(sources)}; a loss needs at least 2.")
        return tokens, n_bytes


def load(path: str | os.PathLike[str], **settings: Any) -> Model:
    """Open a run folder or a model file. `settings` may name `device`, `dtype` and `threads`.

    Errors: `UserError` for a path that holds no model, a damaged file, a pickle, or a device that is not there.
    """
    place = machine.choose(resolve(settings).machine)
    return Model(checkpoint.load(os.fspath(path), place.device), place, Path(path))


def train(
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Model:
    """Train a model on a text: paths, globs, or a built-in name. Gives the best model by validation loss.

    `out` is the run folder; without one nothing is kept but the model. `settings` are those of the command line, with underscores; they go
    before those in the TOML file `config`. With `resume` a run goes on from its last state, and then needs no text.
    Errors: `UserError`, see its message. Ctrl-C (or SIGTERM) saves, and then raises `KeyboardInterrupt` (`SystemExit`).
    """
    sources = [os.fspath(text)] if isinstance(text, str | os.PathLike) else [os.fspath(path) for path in text]
    given = (read_toml(Path(config)) if config else {}) | settings
    with ExitStack() as stack:
        run = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-")))
        checkpoint.require_run_folder(run, resume=resume, overwrite=overwrite)
        resuming = resume and checkpoint.latest_step(run) is not None
        if resume and not resuming:
            warnings.warn(f"There is no saved state in {run}: starting afresh.", Notice, stacklevel=2)
        if resuming:
            saved = read_toml(run / "config.toml")
            _require_unchanged(saved, given)
            given = saved | given
        settled = resolve(given)
        prepared = _text_of(run, settled, sources) if resuming else _new_text(sources, settled)
        settled = _fit_context(settled, given, len(prepared.train))
        place = machine.choose(settled.machine)
        settled = settled.model_copy(update={"machine": place.settings()})
        asked = stack.enter_context(_stop_signals())
        trainer = _trainer(run, settled, prepared, place, resuming, lambda: bool(asked))
        log, event = RunLog(run), None
        for event in _events(trainer, settled, place):
            log(event)
            on_event(event)
        if isinstance(event, Interrupted):
            raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])
        return Model(checkpoint.load(run, place.device), place, run, prepared)


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)


def _new_text(sources: Sequence[str], settled: Config) -> Prepared:
    if not sources:
        raise UserError("There is no text to train on.", "Name a file, a folder or a built-in text, for example: nanogpt train python-docs")
    return prepare(sources, settled.text)


def _text_of(run: Path, settled: Config, sources: Sequence[str] = ()) -> Prepared:
    """The text that a run was begun with: as it was prepared, or prepared again from where it lay or lies now."""
    about = json.loads((run / "text.json").read_text(encoding="utf-8"))
    if not sources and (Path(about["folder"]) / "about.json").is_file():
        return replace(open_prepared(Path(about["folder"])), about=about)
    prepared = prepare(sources or about["sources"], settled.text)
    if prepared.about["fingerprint"] != about["fingerprint"]:
        sizes = [f"{text['train_bytes'] + text['val_bytes']:,} bytes, SHA-256 {text['fingerprint'][:16]}…" for text in (about, prepared.about)]
        raise UserError(
            f"The text is not the one the run in {run} began with: then {sizes[0]}; now {sizes[1]}.", "Give it the same text, or train anew with --out FOLDER."
        )
    return prepared


def _require_unchanged(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Errors: `UserError` with a table of what was asked to change and cannot in a run that goes on."""
    before, asked = flatten(resolve(saved)), flatten(resolve(saved | given))
    changed = [name for name in given if asked[name] != before[name] and name not in MAY_CHANGE]
    if changed:
        rows = [("setting", "saved", "asked"), *((name, str(before[name]), str(asked[name])) for name in changed)]
        table = "\n".join(f"  {name:16} {old:>12} {new:>12}" for name, old, new in rows)
        raise UserError(
            f"A run that goes on keeps its settings, or it would be another run:\n{table}",
            f"Leave them out, or train anew with --out FOLDER. What may change: {', '.join(sorted(MAY_CHANGE))}.",
        )


def _fit_context(settled: Config, given: dict[str, Any], tokens: int) -> Config:
    """A short text gets a shorter context, so that there are different windows to learn from; one that was asked for stays if it can."""
    asked = settled.model.context_length
    if "context_length" in given and asked >= tokens:
        raise UserError(
            f"A context of {asked} tokens needs a longer text: there are {tokens:,} to train on, so it can be {tokens - 1} at most.",
            f"Use --context-length {max(1, tokens // 4)}, or leave it out.",
        )
    if "context_length" in given or asked <= tokens // 4:
        return settled
    fitting = max(1, tokens // 4)
    warnings.warn(f"The text is short ({tokens:,} tokens to train on): the context is {fitting} tokens instead of {asked}.", Notice, stacklevel=2)
    return settled.model_copy(update={"model": settled.model.model_copy(update={"context_length": fitting})})


def _trainer(run: Path, settled: Config, prepared: Prepared, place: machine.Machine, resuming: bool, asked_to_stop: Callable[[], bool]) -> Trainer:
    """Everything a run needs, in place: a new one in an empty folder, or the old one as it was saved."""
    model = checkpoint.empty_model(settled.model, prepared.tokenizer.vocab_size, "cpu")
    if not resuming:
        model.init_weights(torch.Generator().manual_seed(settled.training.seed))
        checkpoint.clear_run_folder(run)
    model.to(place.device)
    optimizer = make_optimizer(model, settled.training.weight_decay)
    position = Position.from_json(checkpoint.load_state(run, model, optimizer)) if resuming else Position()
    require_space(run, 8 * sum(p.nbytes for p in model.parameters()))  # the model and two states of three times its size, and one of them being written
    write_text(run / "config.toml", to_toml(settled))
    write_text(run / "text.json", json.dumps(prepared.about, indent=1))
    return Trainer(model, optimizer, prepared, settled.training, place, run, position, asked_to_stop)


def _events(trainer: Trainer, settled: Config, place: machine.Machine) -> Iterator[Event]:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    yield Started(str(trainer.run), trainer.position.step, settled, parameters, trainer.text.about, str(place))
    yield from trainer.events()


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of dying of them; of the second one the process does die."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        say_stopping()
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
