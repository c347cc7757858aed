"""What a program does with Nano-GPT: `train` a text into a `Model`, or `load` one.

In: paths and settings by name. Out: a `Model`, which streams text, evaluates and gives logits. Silent: progress goes to `on_event`.
"""

import json
import os
import secrets
import shlex
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, finetune, generate, machine, recipe
from nanogpt.config import (
    Config,
    MachineConfig,
    PlaceConfig,
    TrainingConfig,
    differing,
    flatten,
    is_path,
    preset_settings,
    read_toml,
    resolve,
    resolve_sampling,
    to_toml,
)
from nanogpt.corpus import expand, findable
from nanogpt.data import Tokens, token_dtype
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import Loss, PositionLoss, Size, Verdict, evaluate, loss_by_position, ngram_losses
from nanogpt.files import locked, require_space, sweep, write_text
from nanogpt.plan import SHARE, flops_per_token
from nanogpt.prepare import Prepared, is_prepared, open_prepared, prepare
from nanogpt.recipe import Choice
from nanogpt.report import Event, Interrupted, RunLog, Started, Stopping
from nanogpt.tokenizer import Tokenizer
from nanogpt.trainer import Position, Trainer, build, fitted

DEFAULT_MINUTES = 5.0
ROWS = 64  # texts that are written side by side
ENDS = ("steps", "minutes")  # the settings of which one ends a run
MAY_CHANGE = {
    *ENDS,
    "eval_every",
    "patience",
    "micro_batch_size",
    "checkpoint_activations",
} | MachineConfig.model_fields.keys()  # when a run goes on; all else would make it another run

SAME_TEXT = ("fingerprint", "val_fingerprint", "train_tokens", "val_tokens")  # by which a text is known again: what it says, and how it was cut


@dataclass(frozen=True)
class Evaluation(Loss):
    """A loss, with the n-gram baselines on the same text (none, where the training text is gone) and the verdict on the training."""

    baselines: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    by_position: list[PositionLoss] = field(default_factory=list)


class Model:
    """A trained model: what `train` and `load` give."""

    def __init__(self, parts: checkpoint.Parts, place: machine.Machine, path: Path, prepared: Prepared | None = None, dtype: str = "auto"):
        """`dtype` is the precision that was asked for, which is that of writing too."""
        self._model, self._machine, self._path, self._text = parts.model, place, path, prepared
        self._dtype = dtype
        self._decoders: dict[int, generate.Decoder] = {}  # that nobody uses, by their rows
        self.tokenizer: Tokenizer = parts.tokenizer
        self.summary: dict[str, Any] = parts.summary

    def __repr__(self) -> str:
        c = self._model.config
        return f"Model({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.context_length}, step {self.summary['step']}, from {self._path})"

    def stream(self, prompt: str | None = None, *, seed: int | None = None, strict: bool = False, **sampling: Any) -> Iterator[str]:
        """Pieces of text that continue `prompt`, as they are made; together at most `max_tokens` tokens.

        `sampling` takes the fields of `SamplingConfig`. Same seed, same text; without a seed, another text each time.
        Errors: `UserError` for a wrong setting and, with `strict`, for characters the model never saw (else it warns).
        """
        request = self.request(prompt, seed=seed, strict=strict, **sampling)
        return (piece.text for _, piece in self.write([request]) if piece.text)

    def request(self, prompt: str | None = None, *, seed: int | None = None, strict: bool = False, n_top: int = 0, **sampling: Any) -> generate.Request:
        """What `write` and an engine take: the same as for `stream`, and how many alternatives to name beside each token."""
        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = (sampling["stop"],)
        settings = resolve_sampling(sampling)
        unused = self.summary["unused"]
        seed = new_seed() if seed is None else seed
        if not 0 <= seed < 2**63:
            raise UserError(f"The seed {seed} is out of range.", "Use a whole number from 0 to 9223372036854775807.")
        ids = generate.encode_prompt(self.tokenizer, prompt, unused, self._model.config.context_length, strict)
        return generate.Request(ids, settings, seed, n_top)

    def write(self, requests: Sequence[generate.Request]) -> Iterator[tuple[int, generate.Piece]]:
        """The pieces of several texts as they are made, side by side, each with the number of its request."""
        rows = min(len(requests), ROWS)
        decoder = self._decoders.pop(rows, None) or self._decoder(rows)
        engine = generate.Engine(decoder, self.tokenizer, self.summary["unused"])
        number = {engine.add(request): i for i, request in enumerate(requests)}
        try:
            while engine.busy:
                yield from ((number[piece.of], piece) for piece in engine.step())
        finally:
            self._decoders[rows] = decoder

    def engine(self, rows: int) -> generate.Engine:
        """An engine for up to `rows` texts at a time, which join and leave as they come."""
        return generate.Engine(self._decoder(rows), self.tokenizer, self.summary["unused"])

    @property
    def remark(self) -> str | None:
        """What a person should know of the pace at which it writes, if anything."""
        return generate.remark(self._machine)

    def _decoder(self, rows: int) -> generate.Decoder:
        return generate.open_decoder(self._model, self._machine, self._dtype, rows)

    def evaluate(
        self, *text: str | os.PathLike[str], context_length: int | None = None, encoding: str | None = None, field: str | None = None, by_position: bool = False
    ) -> Evaluation:
        """The loss on a text, or without one on the validation split of the run that made the model; also by the position in the context, if asked for.

        `field` is what holds the text in a table's records: without it, what held that of the run.
        Errors: `UserError` when there is no such text, or when the context is longer than the model's.
        """
        own = self._model.config.context_length
        if context_length is not None and not 1 <= context_length <= own:
            raise UserError(f"The model looks back on at most {own} tokens, not {context_length}.", f"Use --context-length 1 to {own}.")
        try:
            prepared = self._text or self._find_text()
        except UserError as error:  # without the training text there are no baselines, but still a loss
            if not text:
                raise
            warnings.warn(f"No baselines: {error}", Notice, stacklevel=2)
            prepared = None
        tokens: Tokens | np.ndarray
        if text:
            tokens, n_bytes, n_words = self._encode([os.fspath(path) for path in text], encoding, field or self._field())
            baselines = ngram_losses(prepared.train, tokens) if prepared else {}
        elif prepared:
            tokens, baselines = prepared.val, prepared.about["baselines"]
            n_bytes, n_words = prepared.about["val_bytes"], prepared.about.get("val_words", 0)
        else:
            raise UserError(
                f"{self._path} is a model without its run folder, so its validation text is not at hand.",
                f"Name a text: nanogpt eval {shlex.quote(str(self._path))} TEXT",
            )
        loss = evaluate(self._model, tokens, n_bytes, self._machine, context_length, n_words=n_words)
        judged = None if text or "verdict" not in self.summary else Verdict(**self.summary["verdict"])
        buckets = loss_by_position(self._model, tokens, self._machine, context_length) if by_position else []
        return Evaluation(loss.nats, loss.tokens, loss.bytes, loss.words, baselines=baselines, verdict=judged, by_position=buckets)

    @torch.inference_mode()
    def logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """ids (B, T), T at most the context -> (B, T, V) float32: what the model expects after each token, before the softmax.

        Errors: `UserError` when rows differ in length, are longer than the context, or hold what is no token.
        """
        context, vocab_size = self._model.config.context_length, self.tokenizer.vocab_size
        lengths = {len(row) for row in ids}
        if len(lengths) != 1 or not 1 <= max(lengths) <= context or not all(0 <= i < vocab_size for row in ids for i in row):
            raise UserError(f"logits takes rows of one length, 1 to {context}, of token ids below {vocab_size}; the rows have lengths {sorted(lengths)}.")
        with self._machine.autocast():
            return self._model(torch.tensor(ids, device=self._machine.device)).float().cpu().numpy()

    @property
    def _run(self) -> Path:
        """The folder that the model lies in, which may be that of its run."""
        return self._path if self._path.is_dir() else self._path.parent

    def _field(self) -> str | None:
        """What held the text of the run in a table's records."""
        config = self._run / "config.toml"
        return resolve(read_toml(config)).text.field if config.is_file() else None

    def _find_text(self) -> Prepared | None:
        """The text the model was trained on, made again from its sources if need be; None where nothing is known of it."""
        run = self._run
        if not (run / "text.json").is_file():
            return None
        prepared = _text_of(run, resolve(read_toml(run / "config.toml")))
        same = prepared.about["fingerprint"] == self.summary["text"] and prepared.tokenizer.to_json() == self.tokenizer.to_json()
        return prepared if same else None

    def _encode(self, sources: Sequence[str], encoding: str | None, field: str | None) -> tuple[np.ndarray, int, int]:
        """The tokens of a text, its bytes and its words. Documents end with a token if there are several, and the model has seen such ends."""
        for source in sources:
            if is_prepared(Path(findable(source))):
                raise UserError(f"{source} holds a text that was prepared for training.", "Name the text itself, or none for what the model's run held out.")
        size, end = Size(), self.tokenizer.end
        knows_ends = not any(first <= end < behind for first, behind in self.summary["unused"])
        documents: list[np.ndarray] = []
        for texts in (texts for source in expand(sources, encoding, field) for texts in source.documents()):
            pieces = [piece.astype(token_dtype(self.tokenizer.vocab_size)) for piece in self.tokenizer.encode_chunks(size.counting(texts))]
            documents.append(np.concatenate([*pieces, np.array([end] * knows_ends, token_dtype(self.tokenizer.vocab_size))]))
        if knows_ends and len(documents) == 1:
            documents[0] = documents[0][:-1]
        tokens = np.concatenate(documents) if documents else np.empty(0, np.uint8)
        if len(tokens) < 2:
            raise UserError(f"There are {len(tokens)} tokens in {', '.join(sources)}; a loss needs at least 2.")
        return tokens, size.bytes, size.words


def load(path: str | os.PathLike[str], **settings: Any) -> Model:
    """Open a run folder or a model file. `settings` may name `device`, `dtype`, `threads` and `deterministic`.

    With `dtype` int8 the weights of all products are rounded to it, also for `evaluate`, which so tells what that costs. `deterministic`: the text of a
    seed is the same bit for bit whatever is written beside it.

    Errors: `UserError` for a path that holds no model, a damaged file, a pickle, or a device that is not there.
    """
    if wrong := [name for name in settings if name not in PlaceConfig.model_fields]:
        raise UserError(f"A model that is loaded keeps its settings: {', '.join(wrong)} cannot be given.", f"load takes {', '.join(PlaceConfig.model_fields)}.")
    dtype = settings.get("dtype", "auto")
    place = machine.choose(resolve(settings | {"dtype": "float32" if dtype == "int8" else dtype}).machine)
    parts = checkpoint.load(os.fspath(path), place.device)
    if dtype == "int8":
        parts = replace(parts, model=generate.dequantized(parts.model, dtype))
    return Model(parts, place, Path(path), dtype=dtype)


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
        given = _given(settings, config, preset, resuming)
        earlier = finetune.earlier_model(init_from, given) if init_from is not None and not resuming else None
        settled, prepared, place, choices = _settle(run, sources, given, resuming, begun if preset is None else None, earlier)
        open_ones, (settled, needed, free) = settled.training, fitted(settled, prepared.tokenizer.vocab_size, place)
        choices += _smaller(open_ones, settled.training, free)
        with machine.memory_for(f"a model of this shape: {settled.model}"):
            model, optimizer = build(settled, prepared.tokenizer.vocab_size, place)
        require_space(run, 8 * sum(p.nbytes for p in model.parameters()))  # model and state, each also while it is replaced
        stack.enter_context(locked(run / ".lock"))
        checkpoint.require_run_folder(run, resume=resume, overwrite=overwrite)  # again: another process may have been here meanwhile
        if resuming:
            position = Position.from_json(checkpoint.load_state(run, model, optimizer))
            began_from = prepared.about.get("init_from")
            if init_from is not None and findable(os.fspath(init_from)) != began_from:
                raise UserError(f"The run in {run} began from {began_from or 'no earlier model'}, not from {init_from}.", "Leave out --init-from.")
            used = (position.seconds + position.overhead) / 60
            if given.get("minutes") is not None and given["minutes"] < used:
                raise UserError(f"The run in {run} took {used:.2g} minutes already, more than --minutes {given['minutes']:g}.", "Give it more.")
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


def _given(settings: dict[str, Any], config: str | os.PathLike[str] | None, preset: str | None, resuming: bool) -> dict[str, Any]:
    """The settings that somebody chose, by name: of the preset, over it those of the TOML file, over it the others. What ends the run is one of them."""
    given = preset_settings(preset) | (read_toml(Path(config)) if config else {})
    if _ends(settings):  # what ends the run here replaces what ends it in the file
        given = {name: value for name, value in given.items() if name not in ENDS}
    given |= settings
    if not (resuming or preset or config or _ends(given)):
        given["minutes"] = DEFAULT_MINUTES
    if isinstance(given.get("val"), str | os.PathLike):
        given["val"] = findable(os.fspath(given["val"]))
    if isinstance(given.get("tokenizer"), os.PathLike) or is_path(str(given.get("tokenizer", ""))):
        given["tokenizer"] = os.path.abspath(os.path.expanduser(given["tokenizer"]))
    return given


def _ends(settings: dict[str, Any]) -> bool:
    return any(settings.get(name) is not None for name in ENDS)


def _settle(
    run: Path, sources: Sequence[str], given: dict[str, Any], resuming: bool, begun: float | None, earlier: checkpoint.Parts | None
) -> tuple[Config, Prepared, machine.Machine, list[Choice]]:
    """Everything that is decided before a model is built: settings, text and machine, and why. With `begun` the recipe has a say in a new run by the clock."""
    if resuming:
        saved = read_toml(run / "config.toml")
        if _ends(given):
            saved = {name: value for name, value in saved.items() if name not in ENDS}
        _require_unchanged(saved, given)
        given = saved | given
    asked = given
    if earlier is not None:
        given = finetune.continuing(given, earlier.model.config) | {"tokenizer": earlier.tokenizer.kind}
    recipe_follows = begun is not None and given.get("minutes") is not None and not resuming
    settled = resolve(given, complete=not recipe_follows)
    steps = settled.training.steps
    if resuming and steps is not None and (checkpoint.latest_step(run) or 0) > steps:
        raise UserError(f"The run in {run} is at step {checkpoint.latest_step(run):,} already, past --steps {steps}.", "Give it more steps.")
    prepared = _text_of(run, settled, sources) if resuming else _new_text(sources, settled, earlier)
    if prepared.about["sources"] == [prepared.about["folder"]]:  # the settings of a text that was prepared before are those it was prepared with
        given = given | {name: value for name, value in prepared.about["text"].items() if name != "cross_documents"}
        settled = resolve(given, complete=not recipe_follows)
    place = machine.choose(settled.machine)
    choices: list[Choice] = []
    if begun is not None and recipe_follows:
        left = 60 * given["minutes"] - (time.monotonic() - begun)
        with machine.memory_for("a model of these settings"):
            choices = recipe.choose(left, len(prepared.train), prepared.tokenizer.vocab_size, place, given)
        settled = resolve(given | {choice.name: choice.value for choice in choices})
    if earlier is not None:
        gentler = finetune.gentler(settled, given)
        settled = resolve(flatten(settled) | {choice.name: choice.value for choice in gentler})
        choices = [choice for choice in choices if choice.name not in {other.name for other in gentler}] + gentler
    settled = _fit_context(settled, asked, len(prepared.train))
    seconds = _expected_seconds(settled, prepared, place)
    place, reasons = machine.for_training(place, settled.machine, settled.model, settled.training.batch_size, seconds)
    choices += [Choice(name, getattr(place.settings(), name), reason) for name, reason in reasons.items()]
    if not settled.text.cross_documents:
        prepared = prepared.within_documents(settled.model.context_length)
    return settled.model_copy(update={"machine": place.settings()}), prepared, place, choices


def _smaller(asked: TrainingConfig, chosen: TrainingConfig, free: float | None) -> list[Choice]:
    """What was chosen because memory does not suffice for a whole batch at once."""
    reason = f"all {asked.batch_size} windows at once would take more than the {(free or 0) / 1e9:.2g} GB that are free"
    found = []
    if asked.micro_batch_size is None and chosen.micro_batch_size != asked.batch_size:
        found.append(Choice("micro_batch_size", chosen.micro_batch_size, reason))
    if asked.checkpoint_activations is None and chosen.checkpoint_activations:
        found.append(Choice("checkpoint_activations", True, reason))
    return found


def _expected_seconds(settled: Config, prepared: Prepared, place: machine.Machine) -> float:
    """How long the run will take, as far as one can say before it."""
    if settled.training.minutes is not None:
        return 60 * settled.training.minutes
    tokens = (settled.training.steps or 0) * settled.training.batch_size * settled.model.context_length
    return tokens * flops_per_token(settled.model, prepared.tokenizer.vocab_size) / (SHARE * machine.peak(place.device, place.dtype))


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)


def _new_text(sources: Sequence[str], settled: Config, earlier: checkpoint.Parts | None) -> Prepared:
    if not sources:
        raise UserError("There is no text to train on.", "Name a file, a folder or a built-in text, for example: nanogpt train python-docs")
    if earlier is None:
        return prepare(sources, settled.text)
    prepared = prepare(sources, settled.text, earlier.tokenizer)
    pairs = [(a, b) for a in prepared.about["unused"] for b in earlier.summary["unused"]]  # of ranges of tokens
    unused = [[max(a[0], b[0]), min(a[1], b[1])] for a, b in pairs if max(a[0], b[0]) < min(a[1], b[1])]  # in the texts of both
    return replace(prepared, about=prepared.about | {"unused": unused})


def _text_of(run: Path, settled: Config, sources: Sequence[str] = ()) -> Prepared:
    """The text that a run was begun with: as it was prepared, or prepared again from where it lay or lies now."""
    try:
        about = json.loads((run / "text.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"What the run in {run} knew of its text is missing or damaged: {error}."
        raise UserError(what, "Train anew: --overwrite, or --out ANOTHER_FOLDER.") from error
    if not sources:
        with suppress(UserError):  # the cache may have been cleaned
            prepared = open_prepared(Path(about["folder"]))
            if all(prepared.about[name] == about[name] for name in SAME_TEXT):  # or a folder that a person named holds another text by now
                return replace(prepared, about=about)
    if not sources and "-" in about["sources"]:
        raise UserError(f"The text of {run} came from standard input, and its tokens are no longer in {about['folder']}.", "Give it the text again.")
    prepared = prepare(sources or about["sources"], settled.text, checkpoint.load(run).tokenizer if "init_from" in about else None)
    if any(prepared.about[name] != about[name] for name in SAME_TEXT[:2]):
        sizes = [f"{text['train_bytes'] + text['val_bytes']:,} bytes, SHA-256 {text['fingerprint'][:16]}…" for text in (about, prepared.about)]
        raise UserError(
            f"The text is not the one the run in {run} began with: then {sizes[0]}; now {sizes[1]}.", "Give it the same text, or train anew with --out FOLDER."
        )
    if any(prepared.about[name] != about[name] for name in SAME_TEXT[2:]):
        raise UserError(
            f"The tokenizer of {run} ({settled.text.tokenizer}) makes other tokens than when the run began: then {about['train_tokens']:,} of the same "
            f"text, now {prepared.about['train_tokens']:,}.",
            "Put the file back that it was, or train anew with --out FOLDER.",
        )
    return replace(prepared, about=about | {name: prepared.about[name] for name in ("sources", "folder")})


def _require_unchanged(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Errors: `UserError` with a table of what was asked to change and cannot in a run that goes on."""
    before, asked = flatten(resolve(saved, complete=False)), flatten(resolve(saved | given, complete=False))
    changed = [name for name in given if asked[name] != before[name] and name not in MAY_CHANGE]
    if changed:
        table = differing(("setting", "saved", "asked"), changed, before, asked)
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
