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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nanogpt import __version__, checkpoint, finetune, machine
from nanogpt.config import Config, to_toml
from nanogpt.corpus import findable
from nanogpt.errors import Notice, UserError
from nanogpt.files import discard, locked, require_space, sweep, write_text
from nanogpt.library.model import Model
from nanogpt.library.settle import chosen_settings, settle, smaller
from nanogpt.library.text import SAME_TEXT
from nanogpt.model import GPT
from nanogpt.plan import flops_per_token
from nanogpt.prepare import Prepared, open_prepared, prepare
from nanogpt.recipe import Choice
from nanogpt.report import Event, Interrupted, RunLog, Started, Stopping, Trackers, read_records, write_report
from nanogpt.tokenizer import Tokenizer
from nanogpt.trainer import Position, Trainer, build, fitted

CHECKED_BYTES = 20_000_000  # of training text that the last sample is looked for in, which takes less than a second


def train(
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    preset: str | None = None,
    init_from: str | os.PathLike[str] | None = None,
    track: str | Sequence[str] = (),
    begun: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> Model:
    """Train a model on a text: paths, globs, or a built-in name. Gives the best model by validation loss.

    `out` is the run folder; without one nothing is kept but the model. `settings` are those of the command line, with underscores; they
    override those in the TOML file `config`, and those the `preset`. With `resume` a run goes on from its last state, and then needs no text.
    `init_from`, a run folder or a model file, is an earlier model that the run begins from: its shape and tokenizer stay, its context may change.
    `track` names trackers that get the numbers too: tensorboard, trackio, wandb, offline unless WANDB_MODE says otherwise.
    Where neither `minutes` nor `steps`, `preset` or `config` is given, the run takes five minutes; the minutes begin at `begun` (by `time.monotonic`), or now.
    Of many processes with `parallel="fsdp"` each gets its part of the model: all of them use it together, or one loads the file.
    Errors: `UserError`, see its message. Ctrl-C and SIGTERM save to `out` before they raise `KeyboardInterrupt` and `SystemExit`.
    """
    asked = _Asked(
        sources=[os.fspath(text)] if isinstance(text, str | os.PathLike) else [os.fspath(path) for path in text],
        out=None if out is None else Path(out),
        settings=settings,
        config=config,
        preset=preset,
        init_from=None if init_from is None else os.fspath(init_from),
        resume=resume,
        overwrite=overwrite,
        begun=time.monotonic() if begun is None else begun,
    )
    asked.require_sense()
    trackers = Trackers([track] if isinstance(track, str) else track)
    if track and out is None:
        raise UserError("A run that is tracked needs a folder.", "Name one, in Python out=RUN.")
    ranks = machine.join(str(asked.chosen(resuming=True).get("device", "auto")))
    with ranks.connected():
        return _train(asked, trackers, on_event, ranks)


@dataclass(frozen=True)
class _Asked:
    """What somebody asked for."""

    sources: list[str]
    out: Path | None
    settings: dict[str, Any]
    config: str | os.PathLike[str] | None
    preset: str | None
    init_from: str | None
    resume: bool
    overwrite: bool
    begun: float

    def require_sense(self) -> None:
        """Errors: `UserError` for what contradicts itself."""
        if self.resume and self.out is None:
            raise UserError("There is no run to go on with.", "Name its folder: --out RUN, in Python out=RUN.")
        if self.resume and self.overwrite:
            raise UserError("A run cannot be resumed and overwritten at once.", "Leave out --resume or --overwrite.")

    def chosen(self, resuming: bool) -> dict[str, Any]:
        """The settings, with those of the preset and the TOML file."""
        return chosen_settings(self.settings, self.config, self.preset, resuming)

    def words(self) -> dict[str, Any]:
        """Versions and settings, which are the same in all processes of a run."""
        words = {"text": self.sources, "init_from": self.init_from, "resume": self.resume, "overwrite": self.overwrite}
        return {"nanogpt": __version__, "torch": torch.__version__} | {name: str(value) for name, value in (self.chosen(resuming=True) | words).items()}


@dataclass(frozen=True)
class _Beginning:
    """What the first process has decided before a model is built."""

    settled: Config
    prepared: Prepared
    place: machine.Machine
    choices: list[Choice]
    needed: float
    free: float | None
    resuming: bool
    earlier: checkpoint.Parts | None
    again: dict[str, bool]  # whether to resume, and whether to overwrite
    given: dict[str, Any]


def _train(asked: _Asked, trackers: Trackers, on_event: Callable[[Event], None], ranks: machine.Ranks) -> Model:
    """The run as each process goes through it: agree, build, take the folder, begin or go on, train, and give the model that stays."""
    with ExitStack() as stack:
        ranks.require_same(asked.words())
        run = asked.out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanogpt-")))
        first = ranks.decided(lambda: _begin(run, asked, ranks))
        settled, prepared, place, resuming, fine_tuning = _shared(first, ranks)
        ranks = replace(ranks, sharded=ranks.size > 1 and settled.machine.parallel == "fsdp")
        with machine.memory_for(f"a model of this shape: {settled.model}"):
            model, optimizer = build(settled, prepared.tokenizer.vocab_size, place, ranks)
        ranks.decided(lambda: first and stack.enter_context(_folder_taken(run, asked, first, model)))
        position = Position.from_json(checkpoint.load_state(run, model, optimizer, ranks)) if resuming else Position()
        if fine_tuning:
            checkpoint.take_weights(model, first.earlier.model if first and first.earlier else None, ranks)
            prepared.about["init_from"] = findable(asked.init_from or "")
        if first:
            first = replace(first, earlier=None)  # which would take memory
            _write_beginning(run, settled, prepared, ranks)
        tell = on_event if first else lambda event: None
        stops = stack.enter_context(_stop_signals(tell, once=ranks.launch == "")) if asked.out else []
        trainer = Trainer(model, optimizer, prepared, settled.training, place, run, position, lambda: bool(stops), asked.begun, ranks)
        stack.callback(trackers.finish)
        log, event = RunLog(run), None
        for event in _events(trainer, settled, first):
            for listener in (log, trackers, on_event) if first else ():
                listener(event)
        if first and asked.out and isinstance(event, Interrupted):
            write_report(run)
        if isinstance(event, Interrupted):
            number = stops[0] if stops else signal.SIGTERM  # another process was asked
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        kept = Model(_kept(run, place, ranks, trainer), place, run, prepared)
        if first and asked.out:
            _look_for_copies(run, kept, prepared.about["train_bytes"])
            write_report(run)
        return kept


def _look_for_copies(run: Path, model: Model, train_bytes: int) -> None:
    """What the run's last sample has copied, for the report. In a text so large that this takes long, it is left to whoever asks."""
    discard(run / "copies.json")
    with suppress(UserError, OSError):  # the run itself is safe
        samples = read_records(run / "samples.jsonl")
        if samples and train_bytes <= CHECKED_BYTES:
            found = model.look(samples[-1]["text"]).copies()
            write_text(run / "copies.json", json.dumps({"step": samples[-1]["step"]} | found.asdict()))


def _begin(run: Path, asked: _Asked, ranks: machine.Ranks) -> _Beginning:
    """See that the folder may be used, and settle everything that a model is built by."""
    again = _after_restart(run, ranks, asked.resume, asked.overwrite)
    checkpoint.require_run_folder(run, **again)
    resuming = again["resume"] and checkpoint.latest_step(run) is not None
    if asked.resume and not resuming:
        if not asked.sources:
            others = sorted(str(path.parent.parent) for path in run.parent.glob("*/state/latest"))
            there = f"Runs that can go on: {', '.join(others[:10])}." if others else "Begin one: nanogpt train TEXT"
            raise UserError(f"There is no run in {run} to go on with.", there)
        warnings.warn(f"There is no saved state in {run}: starting afresh.", Notice, stacklevel=2)
    given = asked.chosen(resuming)
    earlier = finetune.earlier_model(asked.init_from, given) if asked.init_from is not None and not resuming else None
    begun = asked.begun if asked.preset is None else None
    settled, prepared, place, choices = settle(run, asked.sources, given, resuming, begun, earlier, ranks)
    open_ones, (settled, needed, free) = settled.training, fitted(settled, prepared.tokenizer.vocab_size, place, ranks)
    choices += smaller(open_ones, settled.training, free, len(ranks.rows(open_ones.batch_size)))
    return _Beginning(settled, prepared, place, choices, needed, free, resuming, earlier, again, given)


@contextmanager
def _folder_taken(run: Path, asked: _Asked, first: _Beginning, model: GPT) -> Iterator[None]:
    """The folder as this run's own, with room in it, and without the files of an older run."""
    require_space(run, 8 * sum(p.numel() * p.element_size() for p in model.parameters()))  # model and state, each also while it is replaced
    with locked(run / ".lock"):
        checkpoint.require_run_folder(run, **first.again)  # again: another process may have been here meanwhile
        if first.resuming:
            _require_right_resume(run, first.given, asked.init_from, first.prepared.about.get("init_from"))
        else:
            checkpoint.clear_run_folder(run)
        yield


def _write_beginning(run: Path, settled: Config, prepared: Prepared, ranks: machine.Ranks) -> None:
    """What tells of a run from its first moment on."""
    sweep(run, older_than=0)
    write_text(run / "config.toml", to_toml(settled))
    write_text(run / "text.json", json.dumps(prepared.about, indent=1))
    if ranks.launch:
        (run / ".lock").write_text(ranks.launch, encoding="utf-8")


def _after_restart(run: Path, ranks: machine.Ranks, resume: bool, overwrite: bool) -> dict[str, bool]:
    """Whether to resume and to overwrite: as asked, or where torchrun has begun this very run again after a process had died, on from its last save, if any."""
    with suppress(OSError):
        if ranks.restarted and (run / ".lock").read_text(encoding="utf-8") == ranks.launch:
            resume = checkpoint.latest_step(run) is not None
            overwrite = not resume
    return {"resume": resume, "overwrite": overwrite}


def _shared(first: _Beginning | None, ranks: machine.Ranks) -> tuple[Config, Prepared, machine.Machine, bool, bool]:
    """What the first process has decided, in every one: settings, text, machine, and whether the run goes on, or begins from an earlier model. Only names
    travel: the text is opened where it lies, or prepared again on a machine that does not see it."""
    if ranks.size == 1:
        assert first is not None
        return first.settled, first.prepared, first.place, first.resuming, first.earlier is not None
    told = first and [first.settled.model_dump(), first.prepared.about, first.resuming, first.earlier and first.earlier.tokenizer.to_json()]
    settings, about, resuming, tokenizer = ranks.of_first(told)
    settled = Config.model_validate(settings)
    prepared = ranks.in_turn(lambda: first.prepared if first else _same_text(about, settled, tokenizer, ranks))
    chosen = settled.machine
    place = replace(machine.choose(chosen, ranks), attention=str(chosen.attention), compile=bool(chosen.compile))
    return settled, prepared, place, resuming, tokenizer is not None


def _same_text(about: dict[str, Any], settled: Config, tokenizer: str | None, ranks: machine.Ranks) -> Prepared:
    try:
        prepared = open_prepared(Path(about["folder"]))
    except UserError:
        prepared = prepare(about["sources"], settled.text, Tokenizer.from_json(tokenizer) if tokenizer else None)
    if wrong := [name for name in SAME_TEXT if prepared.about[name] != about[name]]:
        what = ", ".join(f"{name} {prepared.about[name]}, but {about[name]} on rank 0" for name in wrong)
        raise UserError(f"Rank {ranks.rank} of {ranks.size} finds another text: {what}.", "Copy the same text to every machine.")
    prepared = replace(prepared, about=about | {"folder": prepared.about["folder"]})
    return prepared if settled.text.cross_documents else prepared.within_documents(settled.model.context_length)


def _require_right_resume(run: Path, given: dict[str, Any], init_from: str | None, began_from: str | None) -> None:
    """Errors: `UserError` where a run that goes on is to have begun from another model, or to take less time than it took."""
    if init_from is not None and findable(init_from) != began_from:
        raise UserError(f"The run in {run} began from {began_from or 'no earlier model'}, not from {init_from}.", "Leave out --init-from.")
    used = checkpoint.seconds_used(run) / 60
    if given.get("minutes") is not None and given["minutes"] < used:
        raise UserError(f"The run in {run} took {used:.2g} minutes already, more than --minutes {given['minutes']:g}.", "Give it more.")


def _kept(run: Path, place: machine.Machine, ranks: machine.Ranks, trainer: Trainer) -> checkpoint.Parts:
    """The model that stays, whole in every process: only the first needs to see its file. A sharded one stays in parts, for it may be whole in no memory."""
    if ranks.sharded:
        summary = ranks.of_first(ranks.decided(lambda: checkpoint.describe(run)[0]))
        return checkpoint.Parts(trainer.model.eval(), trainer.text.tokenizer, summary)
    parts = ranks.decided(lambda: checkpoint.load(run, place.device))
    if ranks.size == 1:
        assert parts is not None
        return parts
    summary = ranks.of_first(parts and parts.summary)
    model = parts.model if parts else checkpoint.empty_model(trainer.model.config, trainer.model.vocab_size, place.device).eval()
    checkpoint.take_weights(model, model if parts else None, replace(ranks, sharded=False))
    return checkpoint.Parts(model, trainer.text.tokenizer, summary)


def _events(trainer: Trainer, settled: Config, first: _Beginning | None) -> Iterator[Event]:
    if first:
        place, ranks = first.place, trainer.ranks
        parameters = sum(p.numel() for p in trainer.model.parameters())
        flops = flops_per_token(settled.model, trainer.text.tokenizer.vocab_size)
        peak = ranks.size * machine.peak(place.device, place.dtype)
        where = str(place) + (f", {ranks.size} processes ({ranks}, {settled.machine.parallel})" if ranks.size > 1 else "")
        about = trainer.text.about
        yield Started(
            str(trainer.run), trainer.position.step, settled, parameters, about, where, flops, peak, first.choices, first.needed, first.free
        )  # fmt: skip
    yield from trainer.events()


@contextmanager
def _stop_signals(on_event: Callable[[Event], None], once: bool = True) -> Iterator[list[int]]:
    """Collect the signals that ask to stop in a list instead of dying of them; a second one kills the process, unless they come `once` from a person and once
    more from torchrun, which has its own way to end who does not stop."""
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
        if once:
            restore()
        if len(asked) == 1:
            on_event(Stopping())

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield asked
    finally:
        restore()
