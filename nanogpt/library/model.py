"""A trained model as a program holds it: it streams text, evaluates and gives logits.

In: a run folder or a model file. Out: a `Model`. Refuses: what holds no model, and settings that a trained model cannot change.
"""

import os
import secrets
import shlex
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, generate, machine
from nanogpt.config import PlaceConfig, read_toml, resolve, resolve_sampling
from nanogpt.corpus import expand, findable
from nanogpt.data import Tokens
from nanogpt.errors import Notice, UserError
from nanogpt.evaluate import Loss, PositionLoss, Size, Verdict, evaluate, loss_by_position, ngram_losses
from nanogpt.library.text import text_of
from nanogpt.look import Look
from nanogpt.look.index import Index, open_index
from nanogpt.prepare import Prepared, is_prepared
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer import Tokenizer

ROWS = 64  # texts that are written side by side


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
        self._index: Index | None = None
        self._decoders: dict[int, generate.Decoder] = {}  # that nobody uses, by their rows
        self.tokenizer: Tokenizer = parts.tokenizer
        self.summary: dict[str, Any] = parts.summary

    def __repr__(self) -> str:
        c = self._model.config
        return f"Model({c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.context_length}, step {self.summary['step']}, from {self._path})"

    def _repr_html_(self) -> str:
        from nanogpt.look import html

        return html.model(repr(self), self.summary)

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

    def look(self, text: str) -> Look:
        """What happens inside the model while it reads a text, and what of it stands in the training text: see `look.Look`, whose methods give plain data."""
        start = generate.encode_prompt(self.tokenizer, None, self.summary["unused"], self._model.config.context_length)[0]
        index, held_out = self._copies_index, lambda: self._training_text().val
        return Look(text, self._model, self.tokenizer, self._machine, start, self.summary["unused"], index, held_out, self._sources)

    def _sources(self) -> Iterator[tuple[str, str]]:
        """The names and the texts of the documents that the model was trained on, or that were held out, as they lie on the disk now."""
        about = self._training_text().about
        if "-" in about["sources"] or any(is_prepared(source) for source in about["sources"]):
            return
        with warnings.catch_warnings():  # what is left out was said when the run began
            warnings.simplefilter("ignore", Notice)
            sources = expand(about["sources"], about["text"]["encoding"], about["text"]["field"])
        for source in sources:
            yield from ((source.name, "".join(chunks)) for chunks in source.documents())

    def _copies_index(self) -> Index:
        """The index of the training text, which is opened once, and lies in the run folder."""
        if self._index is None:
            prepared = self._training_text()
            path = self._run / "copies.safetensors" if (self._run / "text.json").is_file() else None
            self._index = open_index(path, prepared.train, prepared.val, self.tokenizer)
        return self._index

    def _training_text(self) -> Prepared:
        """The text the model was trained on. Errors: `UserError` where it is gone, or another by now."""
        try:
            if self._text is None:
                self._text = self._find_text()
        except UserError as error:
            raise UserError(f"The text that the model was trained on is gone: {error}") from error
        if self._text is None:
            what = f"The text that the model was trained on is not at hand: {self._path} is not in its run folder, or the folder is another run's."
            raise UserError(what, "Give it the run folder that the training made.")
        return self._text

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
        prepared = text_of(run, resolve(read_toml(run / "config.toml")))
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

    With `dtype` int8 the weights of all products, keys and values are rounded to it, also for `evaluate`, which so tells what it costs. `deterministic`: the
    text of a seed is the same bit for bit whatever is written beside it.

    Errors: `UserError` for a path that holds no model, a damaged file, a pickle, or a device that is not there.
    """
    if wrong := [name for name in settings if name not in PlaceConfig.model_fields]:
        takes = ", ".join(PlaceConfig.model_fields)
        raise UserError(f"A model that is loaded keeps its settings: {', '.join(wrong)} cannot be given.", f"load takes {takes}.")
    dtype = settings.get("dtype", "auto")
    place = machine.choose(resolve(settings | {"dtype": "float32" if dtype == "int8" else dtype}).machine)
    parts = checkpoint.load(os.fspath(path), place.device)
    if dtype == "int8":
        parts = replace(parts, model=generate.dequantized(parts.model, dtype))
    return Model(parts, place, Path(path), dtype=dtype)


def new_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(2**31)
