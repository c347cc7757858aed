"""The Python interface: `train`, `load` and `Model`."""

import os
import secrets
import shlex
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint
from nanogpt import evaluate as evaluation
from nanogpt.baselines import ngram_losses
from nanogpt.config import DeviceConfig, ModelConfig, resolve, resolve_sampling
from nanogpt.data.batches import MemmapTokens
from nanogpt.data.prepare import PreparedData
from nanogpt.data.sources import absolute_source, is_prepared, resolve_sources
from nanogpt.device.device import Machine, select_device
from nanogpt.diagnosis import Diagnosis
from nanogpt.errors import Notice, UserError
from nanogpt.files import remove
from nanogpt.generate import decoder, quantize
from nanogpt.generate.decoder import Decoder, create_decoder
from nanogpt.generate.engine import Engine
from nanogpt.generate.prompts import encode_prompt
from nanogpt.generate.sequence import Request, StepOutput
from nanogpt.inspection.fingerprint_index import FingerprintIndex, open_index
from nanogpt.inspection.inspector import Inspector
from nanogpt.model import GPT
from nanogpt.render.report import write_report
from nanogpt.run_folder import RunFolder
from nanogpt.sizes import token_dtype
from nanogpt.tokenizer.tokenizer import Tokenizer
from nanogpt.trackers import Trackers
from nanogpt.training.events import Event
from nanogpt.training.resolve import TrainRequest
from nanogpt.training.run import TrainResult, run_training
from nanogpt.training.run_data import find_run_data, iter_run_documents

# Sequences that `generate_many` decodes in one batch.
MAX_BATCH_SIZE = 64
# Training text up to which the last sample is checked for memorization, in less than a second.
MAX_MEMORIZATION_CHECK_BYTES = 20_000_000


def train(  # noqa: PLR0913
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    out: str | os.PathLike[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    preset: str | None = None,
    init_from: str | os.PathLike[str] | None = None,
    track: str | Sequence[str] = (),
    start_time: float | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **settings: Any,
) -> "Model":
    """Train a model on a text, and return the best one by validation loss.

    With several processes and `parallel="fsdp"`, each process gets a shard of the model. Use it on
    all of them together, or load the model file in one process.

    Args:
        text: Paths, globs, or the name of a built-in text. A resumed run needs none.
        out: The run folder. Without one, only the returned model is kept.
        config: A TOML file of settings, such as the config.toml of another run.
        resume: Continue the run in `out` from its last saved state.
        overwrite: Replace the run in `out`.
        preset: A named configuration.
        init_from: A run folder or model file to start from. Shape and tokenizer stay; the context
            length may change.
        track: Trackers that also log the run: "tensorboard", "trackio", "wandb". They work offline
            unless WANDB_MODE says otherwise.
        start_time: The `time.monotonic()` at which the time budget starts. [default: now]
        on_event: Called with each `nanogpt.training.events.Event`, on rank 0.
        **settings: Settings of `nanogpt.config.Config` by name. They override `config`, which
            overrides `preset`. Without `minutes`, `steps`, `preset` and `config`, a run takes five
            minutes.

    Raises:
        UserError: If a setting, the text, the run folder or the machine does not allow the run.
        KeyboardInterrupt: After Ctrl-C, when the state is saved to `out`.
        SystemExit: After SIGTERM, when the state is saved to `out`.
    """
    texts = [text] if isinstance(text, str | os.PathLike) else text
    request = TrainRequest(
        sources=[os.fspath(name) for name in texts],
        out=None if out is None else Path(out),
        settings=settings,
        config=config,
        preset=preset,
        init_from=None if init_from is None else os.fspath(init_from),
        resume=resume,
        overwrite=overwrite,
        start_time=time.monotonic() if start_time is None else start_time,
    )
    request.validate()
    trackers = Trackers([track] if isinstance(track, str) else track)
    if track and out is None:
        raise UserError("A tracked run needs a folder.", "Name one in out.")
    try:
        result = run_training(request, (trackers, on_event), _write_results)
    finally:
        trackers.finish()
    return _to_model(result)


def load(path: str | os.PathLike[str], **settings: Any) -> "Model":
    """Load a trained model from a run folder or a model file.

    Args:
        path: A run folder or a model file.
        **settings: `device`, `dtype`, `threads` and `deterministic`, as in
            `nanogpt.config.DeviceConfig`. With `dtype="int8"` the weights of all matrix products,
            keys and values are rounded to int8, also for `evaluate`. With `deterministic=True` the
            text for a seed does not depend on the other sequences in a batch.

    Raises:
        UserError: If there is no model, the file is damaged or a pickle, a setting is unknown, or
            the device is not available.
    """
    if unknown := [name for name in settings if name not in DeviceConfig.model_fields]:
        raise UserError(
            f"These settings cannot change when loading a model: {', '.join(unknown)}.",
            f"load takes {', '.join(DeviceConfig.model_fields)}.",
        )
    dtype = settings.get("dtype", "auto")
    compute_dtype = "float32" if dtype == "int8" else dtype
    machine = select_device(resolve(settings | {"dtype": compute_dtype}).device)
    loaded = checkpoint.load(os.fspath(path), machine.device)
    if dtype == "int8":
        loaded = replace(loaded, model=quantize.fake_quantize(loaded.model, dtype))
    return Model(loaded, machine, Path(path), dtype=dtype)


def new_seed() -> int:
    """Return a random seed."""
    return secrets.randbelow(2**31)


def check_memorization(run: Path, model: "Model", train_bytes: int) -> None:
    """Write memorization.json: how much of the run's last sample is copied from the training text.

    A training text larger than MAX_MEMORIZATION_CHECK_BYTES is skipped, because the check would
    take too long. Failures are ignored: by then the run itself is saved.
    """
    folder = RunFolder(run)
    remove(folder.memorization_path)
    with suppress(UserError, OSError):
        samples = folder.read_samples()
        if samples and train_bytes <= MAX_MEMORIZATION_CHECK_BYTES:
            result = model.inspect(samples[-1]["text"]).memorization()
            folder.write_memorization(samples[-1]["step"], result.asdict())


def _write_results(run: Path, result: TrainResult | None) -> None:
    """Write the report; after a finished run, also check its last sample for memorization."""
    if result is not None:
        check_memorization(run, _to_model(result), result.prepared.metadata["train_bytes"])
    write_report(run)


def _to_model(result: TrainResult) -> "Model":
    return Model(result.model, result.machine, result.run, result.prepared)


@dataclass(frozen=True)
class EvalResult(evaluation.EvalLoss):
    """A loss, with n-gram baselines on the same text and the diagnosis of the training.

    Attributes:
        baselines: Loss of each n-gram model, in nats per token; empty without the training text.
        diagnosis: How the training went; None for any text but the validation split.
        by_position: Loss by position in the context, if requested.
    """

    baselines: dict[str, float] = field(default_factory=dict)
    diagnosis: Diagnosis | None = None
    by_position: list[evaluation.LossByPosition] = field(default_factory=list)


class Model:
    """A trained model with its tokenizer, as returned by `train` and `load`.

    Attributes:
        module: The torch module.
        config: The model settings.
        tokenizer: The tokenizer.
        summary: What the model file says about the training.
        machine: The device, precision and threads that the model runs on.
    """

    def __init__(
        self,
        loaded: checkpoint.LoadedModel,
        machine: Machine,
        path: Path,
        prepared: PreparedData | None = None,
        dtype: str = "auto",
    ):
        self.module: GPT = loaded.model
        self.config: ModelConfig = loaded.model.config
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.summary: dict[str, Any] = loaded.summary
        self._unseen_token_ranges = self.summary["unseen_token_ranges"]
        self.machine = machine
        self._path = path
        # The folder of the model file, which may be its run folder.
        self._folder = RunFolder(path if path.is_dir() else path.parent)
        self._prepared = prepared
        self._dtype = dtype
        self._index: FingerprintIndex | None = None
        # Idle decoders, by their batch size.
        self._decoders: dict[int, Decoder] = {}

    def __repr__(self) -> str:
        c = self.config
        shape = f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.context_length}"
        return f"Model({shape}, step {self.summary['step']}, from {self._path})"

    def _repr_html_(self) -> str:
        from nanogpt.render import inspection_html

        return inspection_html.model(repr(self), self.summary)

    def stream(
        self,
        prompt: str | None = None,
        *,
        seed: int | None = None,
        error_on_unknown: bool = False,
        **sampling: Any,
    ) -> Iterator[str]:
        """Generate text that continues `prompt`, in chunks as they are decoded.

        Args:
            prompt: The text to continue. [default: the start of a text]
            seed: The same seed gives the same text. [default: a random seed]
            error_on_unknown: Raise an error for characters that the model has not seen in training,
                instead of a warning.
            **sampling: Settings of `nanogpt.config.SamplingConfig` by name.

        Raises:
            UserError: If a setting is wrong, or for unseen characters with `error_on_unknown`.
        """
        request = self.make_request(
            prompt, seed=seed, error_on_unknown=error_on_unknown, **sampling
        )
        return (output.text for _, output in self.generate_many([request]) if output.text)

    def make_request(
        self,
        prompt: str | None = None,
        *,
        seed: int | None = None,
        error_on_unknown: bool = False,
        n_top: int = 0,
        **sampling: Any,
    ) -> Request:
        """Make a request for `generate_many` or for an engine.

        Args:
            prompt: The text to continue. [default: the start of a text]
            seed: The same seed gives the same text. [default: a random seed]
            error_on_unknown: Raise an error for characters that the model has not seen in training,
                instead of a warning.
            n_top: Number of most probable tokens to report at each position.
            **sampling: Settings of `nanogpt.config.SamplingConfig` by name.

        Raises:
            UserError: If a setting is wrong, or for unseen characters with `error_on_unknown`.
        """
        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = (sampling["stop"],)
        settings = resolve_sampling(sampling)
        seed = new_seed() if seed is None else seed
        if not 0 <= seed < 2**63:
            what = f"The seed is out of range: {seed} (limit 0 to {2**63 - 1})."
            raise UserError(what, "Use a seed in that range.")
        unseen, max_context = self._unseen_token_ranges, self.config.context_length
        ids = encode_prompt(self.tokenizer, prompt, unseen, max_context, error_on_unknown)
        return Request(ids, settings, seed, n_top)

    def generate_many(self, requests: Sequence[Request]) -> Iterator[tuple[int, StepOutput]]:
        """Generate several sequences in a batch, and yield outputs as they are decoded.

        Yields:
            The index of a request, and a new output of its sequence.
        """
        batch_size = min(len(requests), MAX_BATCH_SIZE)
        decoder = self._decoders.pop(batch_size, None) or self._create_decoder(batch_size)
        engine = Engine(decoder, self.tokenizer, self._unseen_token_ranges)
        index_of = {engine.add(request): i for i, request in enumerate(requests)}
        try:
            while engine.has_work:
                yield from ((index_of[output.sequence], output) for output in engine.step())
        finally:
            self._decoders[batch_size] = decoder

    def create_engine(self, max_batch_size: int) -> Engine:
        """Create an engine that decodes up to `max_batch_size` sequences at a time."""
        decoder = self._create_decoder(max_batch_size)
        return Engine(decoder, self.tokenizer, self._unseen_token_ranges)

    @property
    def startup_notice(self) -> str | None:
        """A note for the user on decoding speed or start-up time, if there is one."""
        return decoder.startup_notice(self.machine)

    def _create_decoder(self, batch_size: int) -> Decoder:
        return create_decoder(self.module, self.machine, self._dtype, batch_size)

    def evaluate(
        self,
        *text: str | os.PathLike[str],
        context_length: int | None = None,
        encoding: str | None = None,
        text_field: str | None = None,
        by_position: bool = False,
    ) -> EvalResult:
        """Compute the loss on a text, by default on the validation split of the model's run.

        Args:
            *text: Names of texts. [default: the validation split]
            context_length: Tokens of context. [default: as the model was trained]
            encoding: Encoding of the text files.
            text_field: Field or column that holds the text of a table. [default: as in training]
            by_position: Also compute the loss by position in the context.

        Returns:
            The loss in nats per token, bits per byte, and n-gram baselines.

        Raises:
            UserError: If there is no such text, or the context is longer than the model's.
        """
        max_context = self.config.context_length
        if context_length is not None and not 1 <= context_length <= max_context:
            raise UserError(
                f"The context length is out of range: {context_length} (limit {max_context}).",
                {"context_length": max_context},
            )
        tokens, size, baselines = self._evaluation_data(text, encoding, text_field)
        loss = evaluation.evaluate(self.module, tokens, size, self.machine, context_length)
        result = EvalResult(**vars(loss), baselines=baselines)
        if not text and "diagnosis" in self.summary:
            result = replace(result, diagnosis=Diagnosis(**self.summary["diagnosis"]))
        if by_position:
            buckets = evaluation.loss_by_position(self.module, tokens, self.machine, context_length)
            result = replace(result, by_position=buckets)
        return result

    def _evaluation_data(
        self,
        text: Sequence[str | os.PathLike[str]],
        encoding: str | None,
        text_field: str | None,
    ) -> tuple[MemmapTokens | np.ndarray, evaluation.TextSize, dict[str, float]]:
        """Return the tokens of a text, its size, and its n-gram baselines."""
        try:
            prepared = self._find_training_data()
        except UserError as error:
            if not text:
                raise
            warnings.warn(f"No baselines: {error}", Notice, stacklevel=3)
            prepared = None
        if text:
            names = [os.fspath(name) for name in text]
            if not text_field and self._folder.config_path.is_file():
                text_field = self._folder.read_config().data.text_field
            tokens, size = self._encode(names, encoding, text_field)
            return tokens, size, ngram_losses(prepared.train, tokens) if prepared else {}
        if prepared is None:
            raise UserError(
                f"There is no validation text: {self._path} is not in its run folder.",
                f"Name a text: nanogpt eval {shlex.quote(str(self._path))} TEXT",
            )
        metadata = prepared.metadata
        size = evaluation.TextSize(metadata["val_bytes"], metadata.get("val_words", 0))
        return prepared.val, size, metadata["baselines"]

    @torch.inference_mode()
    def logits(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        """Compute the logits of the next token at every position.

        Args:
            ids: Token ids, (B, T), with T at most the context length.

        Returns:
            Logits before the softmax, (B, T, V), float32.

        Raises:
            UserError: If rows differ in length, are too long, or hold values that are no tokens.
        """
        max_context, vocab_size = self.config.context_length, self.tokenizer.vocab_size
        lengths = {len(row) for row in ids}
        are_tokens = all(0 <= i < vocab_size for row in ids for i in row)
        if len(lengths) != 1 or not 1 <= max(lengths) <= max_context or not are_tokens:
            raise UserError(
                f"logits takes rows of one length, 1 to {max_context}, of token ids below "
                f"{vocab_size}; the rows have lengths {sorted(lengths)}."
            )
        with self.machine.autocast():
            logits = self.module(torch.tensor(ids, device=self.machine.device))
        return logits.float().cpu().numpy()

    def inspect(self, text: str) -> Inspector:
        """Return an inspector of the model on `text`; its methods return plain data."""
        from nanogpt.render import inspection_html

        inspection_html.attach_notebook_displays()
        unseen = self._unseen_token_ranges
        start = encode_prompt(self.tokenizer, None, unseen, self.config.context_length)[0]
        return Inspector(
            text=text,
            model=self.module,
            tokenizer=self.tokenizer,
            machine=self.machine,
            start_token=start,
            unseen_token_ranges=unseen,
            load_index=self._open_index,
            load_held_out=lambda: self._training_data().val,
            read_sources=lambda: iter_run_documents(self._training_data()),
        )

    def _open_index(self) -> FingerprintIndex:
        """Return the index of the training text, opened once and kept in the run folder."""
        if self._index is None:
            prepared = self._training_data()
            has_run = self._folder.data_path.is_file()
            path = self._folder.memorization_index_path if has_run else None
            self._index = open_index(path, prepared.train, prepared.val, self.tokenizer)
        return self._index

    def _training_data(self) -> PreparedData:
        """Return the data that the model was trained on.

        Raises:
            UserError: If it is gone or has changed.
        """
        try:
            prepared = self._find_training_data()
        except UserError as error:
            raise UserError(f"The training text of the model is gone: {error}") from error
        if prepared is None:
            raise UserError(
                f"The training text of the model is not at hand: {self._path} is not in its run "
                "folder, or the folder holds another run.",
                "Load the run folder that the training made.",
            )
        self._prepared = prepared
        return prepared

    def _find_training_data(self) -> PreparedData | None:
        """Open or prepare the training data; None if the model is not in its run folder."""
        return self._prepared or find_run_data(self._folder.path, self.summary, self.tokenizer)

    def _encode(
        self, names: Sequence[str], encoding: str | None, text_field: str | None
    ) -> tuple[np.ndarray, evaluation.TextSize]:
        """Return the tokens of a text, and its size.

        An end-of-text token separates documents if the model has seen that token.
        """
        for name in names:
            if is_prepared(Path(absolute_source(name))):
                raise UserError(
                    f"{name} holds tokens prepared for training.",
                    "Name the text itself, or none for the validation split.",
                )
        dtype, eot_id = token_dtype(self.tokenizer.vocab_size), self.tokenizer.eot_id
        has_seen_eot = not any(start <= eot_id < stop for start, stop in self._unseen_token_ranges)
        counter = evaluation.TextCounter()
        documents: list[np.ndarray] = []
        for source in resolve_sources(names, encoding, text_field):
            for chunks in source.iter_documents():
                ids = self.tokenizer.encode_chunks(counter.count(chunks))
                parts = [chunk_ids.astype(dtype) for chunk_ids in ids]
                eot = np.array([eot_id] * has_seen_eot, dtype)
                documents.append(np.concatenate([*parts, eot]))
        if has_seen_eot and len(documents) == 1:
            documents[0] = documents[0][:-1]
        tokens = np.concatenate(documents) if documents else np.empty(0, np.uint8)
        if len(tokens) < 2:
            raise UserError(
                f"The text is too short for a loss: {len(tokens)} tokens in {', '.join(names)} "
                "(limit 2)."
            )
        return tokens, evaluation.TextSize(counter.bytes, counter.words)
