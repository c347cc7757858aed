"""A training run from its first word to its last: `train`.

In: texts and settings by name. Out: a `Model`, and a run folder if one was named. Refuses: what its parts refuse, before anything is written.
"""

import json
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nanogpt import checkpoint, finetune, machine
from nanogpt.config import Config, to_toml
from nanogpt.corpus import findable
from nanogpt.errors import Notice, UserError
from nanogpt.files import locked, require_space, sweep, write_text
from nanogpt.library.model import Model
from nanogpt.library.settle import chosen_settings, settle, smaller
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.plan import flops_per_token
from nanogpt.recipe import Choice
from nanogpt.report import Event, Interrupted, RunLog, Started, Stopping
from nanogpt.trainer import Position, Trainer, build, fitted


def train(
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    preset: str | None = None,
    init_from: str | os.PathLike[str] | None = None,
    begun: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Model:
    """Train a model on a text: paths, globs, or a built-in name. Gives the best model by validation loss.

    `out` is the run folder; without one nothing is kept but the model. `settings` are those of the command line, with underscores; they
    override those in the TOML file `config`, and those the `preset`. With `resume` a run goes on from its last state, and then needs no text.
    `init_from`, a run folder or a model file, is an earlier model that the run begins from: its shape and tokenizer stay, its context may change.
    Where neither `minutes` nor `steps`, `preset` or `config` is given, the run takes five minutes; the minutes begin at `begun` (by `time.monotonic`), or now.
    Errors: `UserError`, see its message. Ctrl-C and SIGTERM save to `out` before they raise `KeyboardInterrupt` and `SystemExit`.
    """
    sources = [os.fspath(text)] if isinstance(text, str | os.PathLike) else [os.fspath(path) for path in text]
    begun = time.monotonic() if begun is None else begun
    if resume and out is None:
        raise UserError("There is no run to go on with.", "Name its folder: --out RUN, in Python out=RUN.")
    if resume and overwrite:
        raise UserError("A run cannot be resumed and overwritten at once.", "Leave out --resume or --overwrite.")
    with ExitStack() as stack:
        run = Path(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-")))
        checkpoint.require_run_folder(run, resume=resume, overwrite=overwrite)
        resuming = resume and checkpoint.latest_step(run) is not None
        if resume and not resuming:
            warnings.warn(f"There is no saved state in {run}: starting afresh.", Notice, stacklevel=2)
        given = chosen_settings(settings, config, preset, resuming)
        earlier = finetune.earlier_model(init_from, given) if init_from is not None and not resuming else None
        settled, prepared, place, choices = settle(run, sources, given, resuming, begun if preset is None else None, earlier)
        open_ones, (settled, needed, free) = settled.training, fitted(settled, prepared.tokenizer.vocab_size, place)
        choices += smaller(open_ones, settled.training, free)
        with machine.memory_for(f"a model of this shape: {settled.model}"):
            model, optimizer = build(settled, prepared.tokenizer.vocab_size, place)
        require_space(run, 8 * sum(p.nbytes for p in model.parameters()))  # model and state, each also while it is replaced
        stack.enter_context(locked(run / ".lock"))
        checkpoint.require_run_folder(run, resume=resume, overwrite=overwrite)  # again: another process may have been here meanwhile
        if resuming:
            position = _go_on(run, model, optimizer, prepared.about.get("init_from"), init_from, given.get("minutes"))
        else:
            if earlier is not None:
                checkpoint.take_weights(model, earlier.model)
                prepared.about["init_from"] = findable(os.fspath(init_from or ""))
                earlier = None  # which would take memory
            checkpoint.clear_run_folder(run)
            position = Position()
        sweep(run, older_than=0)
        write_text(run / "config.toml", to_toml(settled))
        write_text(run / "text.json", json.dumps(prepared.about, indent=1))
        asked = stack.enter_context(_stop_signals(on_event)) if out is not None else []
        trainer = Trainer(model, optimizer, prepared, settled.training, place, run, position, lambda: bool(asked), begun)
        log, event = RunLog(run), None
        for event in _events(trainer, settled, place, choices, needed, free):
            log(event)
            on_event(event)
        if isinstance(event, Interrupted):
            raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])
        return Model(checkpoint.load(run, place.device), place, run, prepared)


def _go_on(run: Path, model: GPT, optimizer: Optimizer, began_from: str | None, init_from: str | os.PathLike[str] | None, minutes: float | None) -> Position:
    """Put the last state of the run back. Errors: `UserError` where it began from another model than is named now, or has used up its minutes."""
    position = Position.from_json(checkpoint.load_state(run, model, optimizer))
    if init_from is not None and findable(os.fspath(init_from)) != began_from:
        raise UserError(f"The run in {run} began from {began_from or 'no earlier model'}, not from {init_from}.", "Leave out --init-from.")
    used = (position.seconds + position.overhead) / 60
    if minutes is not None and minutes < used:
        raise UserError(f"The run in {run} took {used:.2g} minutes already, more than --minutes {minutes:g}.", "Give it more.")
    return position


def _events(trainer: Trainer, settled: Config, place: machine.Machine, choices: list[Choice], needed: float, free: float | None) -> Iterator[Event]:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    flops = flops_per_token(settled.model, trainer.text.tokenizer.vocab_size)
    peak = machine.peak(place.device, place.dtype)
    yield Started(str(trainer.run), trainer.position.step, settled, parameters, trainer.text.about, str(place), flops, peak, choices, needed, free)
    yield from trainer.events()


@contextmanager
def _stop_signals(on_event: Callable[[Event], None]) -> Iterator[list[int]]:
    """Collect the signals that ask to stop in a list instead of dying of them; a second one kills the process."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield asked
        return
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        restore()
        on_event(Stopping())

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        restore()
