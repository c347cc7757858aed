"""Every setting, defined once: type, default, help text and limits.

The command line, TOML files and model files are all derived from the sections below, whose defaults
are preset `nano`. Names are unique across sections, so settings travel as one flat dictionary until
`resolve` makes the `Config`. This module does not import torch.
"""

import difflib
import tomllib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from cyclopts import Parameter
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nanogpt.errors import UserError

TOKENIZERS = ("char", "byte", "word", "bpe")

# Sizes that bound the memory of a training step, for the model and for the memory estimate.
ATTN_CHUNK_SIZE = 1024  # queries per chunk, where masks or probabilities are stored
MAX_LOGITS_PER_CHUNK = 2**25


class Section(BaseModel):
    """A frozen group of settings; the docstring of each field is its help text."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


AnySection = TypeVar("AnySection", bound=Section)


class ModelConfig(Section):
    """Architecture of the model."""

    arch: Literal["gpt2", "qwen3"] = "gpt2"
    """Architecture: that of GPT-2 or that of Qwen3, which learns faster."""
    n_layer: Annotated[int, Field(ge=1)] = 6
    """Number of transformer blocks."""
    n_head: Annotated[int, Field(ge=1)] = 6
    """Attention heads per block; must divide n_embd unless head_dim is set."""
    n_kv_head: Annotated[int | None, Field(ge=1)] = None
    """Key and value heads per block (qwen3 only); must divide n_head. [default: n_head]"""
    head_dim: Annotated[int | None, Field(ge=1)] = None
    """Channels per attention head (qwen3 only). [default: n_embd / n_head]"""
    n_embd: Annotated[int, Field(ge=1)] = 384
    """Width of the residual stream, in channels."""
    context_length: Annotated[int, Field(ge=1)] = 256
    """Context length, in tokens."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.2
    """Dropout rate, rounded to a multiple of 1/256."""
    sliding_window: Annotated[int | None, Field(ge=1)] = None
    """Tokens that each token attends to, itself included (qwen3 only). [default: all]"""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    """RoPE base frequency (qwen3 only). Increase it for longer contexts."""
    tie_word_embeddings: bool | None = None
    """Use the token embeddings as output layer too. [default: yes for gpt2, no for qwen3]"""

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads per block."""
        return self.n_kv_head or self.n_head

    @property
    def head_size(self) -> int:
        """Channels per attention head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def intermediate_size(self) -> int:
        """Hidden channels of the MLP.

        A SwiGLU has three matrices. At 8/3 of the width, rounded up to a multiple of 32, it has the
        parameters of a GELU MLP at four times the width.
        """
        if self.arch == "qwen3":
            return -(-8 * self.n_embd // 3 // 32) * 32
        return 4 * self.n_embd

    @property
    def attention_window(self) -> int | None:
        """The sliding window, or None if it covers the context."""
        if self.sliding_window is None or self.sliding_window >= self.context_length:
            return None
        return self.sliding_window

    @property
    def has_tied_embeddings(self) -> bool:
        """True if the output layer uses the token embeddings."""
        tied = self.tie_word_embeddings
        return self.arch == "gpt2" if tied is None else tied


def is_path(tokenizer: str) -> bool:
    """Return whether a tokenizer setting is the path of a file, not a kind of tokenizer."""
    return tokenizer.endswith(".json") or "/" in tokenizer or "\\" in tokenizer


def _check_tokenizer(name: str) -> str:
    if name in TOKENIZERS or is_path(name):
        return name
    matches = difflib.get_close_matches(name, TOKENIZERS, n=1)
    hint = f"; did you mean {matches[0]}" if matches else ""
    kinds = ", ".join(TOKENIZERS)
    raise ValueError(f"neither a tokenizer ({kinds}) nor the path of a tokenizer.json{hint}")


class DataConfig(Section):
    """Tokenization and the validation split."""

    tokenizer: Annotated[str, AfterValidator(_check_tokenizer)] = "char"
    """Tokenizer: char, byte, word, bpe, or the path of a tokenizer.json."""
    vocab_size: Annotated[int | None, Field(ge=1)] = None
    """Vocabulary size of word and bpe. [default: by text size; 1 MB: bpe 1024, word 4096]"""
    text_field: str | None = None
    """JSONL field, or CSV or Parquet column, that holds the text. [default: text]"""
    cross_documents: bool = True
    """Let training sequences cross document boundaries."""
    encoding: str | None = None
    """Encoding of text files. [default: UTF-8, or UTF-16 with a byte order mark]"""
    val_text: str | None = None
    """Validation file or folder. [default: the last tenth of the text, or a tenth of many files]"""
    max_val_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """Maximum size of a validation split taken from the text, in bytes."""


class TrainingConfig(Section):
    """Optimization and the schedule of a run."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step."""
    micro_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Sequences per forward/backward pass (accumulated). [default: what fits in memory]"""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass. [default: if memory requires it]"""
    steps: Annotated[int | None, Field(ge=1)] = 5000
    """Optimizer steps; with minutes, whichever ends first. [default: 5000, or those in minutes]"""
    minutes: Annotated[float | None, Field(gt=0, le=525_600)] = None
    """Time limit; the recipe chooses open settings. [default: 5 if nothing else ends the run]"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer; muon updates the blocks' matrices and leaves the rest to AdamW."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Peak learning rate of Muon."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps of linear learning-rate warm-up; at most a tenth of the run."""
    cooldown_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of the run that decays linearly to zero at its end; 0 is a cosine to a tenth."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Weight decay (matrices only)."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Maximum gradient norm; 0 disables clipping."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1337
    """Seed of the initial weights, data order, dropout and samples."""
    eval_every: Annotated[int, Field(ge=1)] = 250
    """Steps between evaluations, each with a sample and a checkpoint."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Evaluations without improvement before training stops; 0 disables early stopping."""


class DeviceConfig(Section):
    """Device and precision."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device; auto selects a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Precision of matmuls: auto is the fastest at about the same loss, float32 is exact."""
    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    """CPU threads. [default: one per core, or fewer if that is faster]"""
    deterministic: Annotated[bool, Parameter(negative="")] = False
    """Use deterministic kernels and batch-invariant decoding; may be slower."""


class TrainDeviceConfig(DeviceConfig):
    """Device, precision and implementation of the training step."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of matrix products; auto is the faster one."""
    compile: bool | None = None
    """Compile the training step with torch.compile. [default: if that saves time overall]"""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention: sdpa is one fused kernel, eager is matmul and softmax; auto is the faster one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Data parallelism: ddp replicates the model on each process, fsdp shards it."""


class Config(Section):
    """All settings of a training run."""

    model: Annotated[ModelConfig, Parameter(name="*", group="Model")] = ModelConfig()
    data: Annotated[DataConfig, Parameter(name="*", group="Data")] = DataConfig()
    training: Annotated[TrainingConfig, Parameter(name="*", group="Training")] = TrainingConfig()
    device: Annotated[TrainDeviceConfig, Parameter(name="*", group="Device")] = TrainDeviceConfig()


class SamplingConfig(Section):
    """Sampling of text from a model."""

    max_tokens: Annotated[int, Field(ge=0)] = 500
    """Maximum number of tokens to generate; the end of a document may come earlier."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Sampling temperature; 0 always takes the most likely token."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Sample from the k most likely tokens only. [default: all]"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens whose probabilities add up to top_p."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Minimum probability of a token, relative to the most likely token."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Penalty on tokens that already occurred; 1 is off, above 1 makes them less likely."""
    logit_bias: Annotated[dict[int, float], Parameter(parse=False)] = {}
    """Values added to the logits, by token id; not on the command line."""
    allowed_token_ids: Annotated[tuple[int, ...] | None, Parameter(parse=False)] = None
    """The only token ids to sample from; not on the command line."""
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...],
        Parameter(negative="", allow_leading_hyphen=True),
    ] = ()
    """Text before which generation stops; repeatable."""


class ServeConfig(Section):
    """Address and limits of the server."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen on; one that other machines can reach needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 selects a free one."""
    api_key: Annotated[
        str | None,
        Field(pattern="^[!-~]{8,}$"),
        Parameter(env_var="NANOGPT_API_KEY", show_env_var=True),
    ] = None
    """API key of at least 8 characters; prefer NANOGPT_API_KEY, which other users cannot see."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Sequences that each model generates at a time."""
    max_queue: Annotated[int, Field(ge=0, le=100_000)] = 128
    """Maximum queued sequences; further requests get 429 with Retry-After."""
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Maximum seconds per request; generation then stops with the text so far."""


SECTION_OF = {
    name: section
    for section, field in Config.model_fields.items()
    for name in field.annotation.model_fields  # type: ignore[union-attr]
}


def resolve(settings: dict[str, Any], *, complete: bool = True) -> Config:
    """Validate settings and return the whole configuration, with defaults for all others.

    Args:
        settings: Settings by name.
        complete: Also refuse contradictions. False if the recipe will still choose settings.

    Raises:
        UserError: With every problem found: unknown names, wrong types, values out of range, and
            contradictions.
    """
    nested: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    for name, value in settings.items():
        if name in SECTION_OF:
            nested[SECTION_OF[name]][name] = value
    if settings.get("minutes") is not None:
        nested["training"].setdefault("steps", None)
    check = _contradictions if complete else None
    return _validate(Config, nested, settings, SECTION_OF, check)


def resolve_sampling(settings: dict[str, Any]) -> SamplingConfig:
    """Validate sampling settings, as `resolve` does."""
    fields = SamplingConfig.model_fields
    known = {name: value for name, value in settings.items() if name in fields}
    return _validate(SamplingConfig, known, settings, fields)


def _validate(
    section: type[AnySection],
    content: dict[str, Any],
    names: Iterable[str],
    known_names: Collection[str],
    check: Callable[[AnySection], list[str]] | None = None,
) -> AnySection:
    problems = [_unknown_setting(name, known_names) for name in names if name not in known_names]
    try:
        config = section.model_validate(content)
    except ValidationError as error:
        # Contradictions are found among the valid settings.
        problems += describe_validation_error(error)
        config = section.model_validate(_without_invalid(content, error))
    if check is not None:
        problems += check(config)
    if problems:
        fix = "All settings and defaults: `nanogpt train --help` and `nanogpt sample --help`."
        raise UserError("\n".join(problems), fix)
    return config


def describe_validation_error(error: ValidationError) -> list[str]:
    """Describe each problem in one line: the setting, the value and the limit."""
    lines = []
    for problem in error.errors():
        # Integers in a location are indices into a list.
        name = [part for part in problem["loc"] if isinstance(part, str)][-1]
        message = problem["msg"].lower().removeprefix("value error, ")
        lines.append(f"{name} = {problem['input']!r}: {message}.")
    return lines


def flatten(config: BaseModel, *, explicit: bool = False) -> dict[str, Any]:
    """Return the settings by name; with `explicit`, only those that were set."""
    sections = config.model_dump(exclude_unset=explicit)
    return {name: value for section in sections.values() for name, value in section.items()}


def format_differences(
    source: str, names: Iterable[str], before: dict[str, Any], requested: dict[str, Any]
) -> str:
    """Format a table of settings with their values in the source and as requested."""
    rows = [(name, str(before[name]), str(requested[name])) for name in names]
    rows.insert(0, ("setting", source, "requested"))
    return "\n".join(f"  {name:16} {old:>12} {new:>12}" for name, old, new in rows)


def read_toml(path: Path) -> dict[str, Any]:
    """Read the settings in a TOML file, or in the config.toml of a run folder, by name.

    Settings may be in their sections or at the top level.

    Raises:
        UserError: The file is missing or is not TOML, or it has a setting twice.
    """
    if path.is_dir():
        path = path / "config.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"The settings in {path.absolute()} cannot be read: {error}.") from error
    settings: dict[str, Any] = {}
    for key, content in document.items():
        is_section = key in Config.model_fields and isinstance(content, dict)
        for name, value in content.items() if is_section else [(key, content)]:
            if name in settings:
                values = f"{settings[name]!r} and {value!r}"
                what = f"{path.absolute()} sets {name!r} twice: to {values}."
                raise UserError(what, "Remove one of the two.")
            settings[name] = value
    return settings


def to_toml(config: Config) -> str:
    """Return the whole configuration as TOML; None has no TOML form and is left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _without_invalid(content: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    locations = {problem["loc"][:depth] for problem in error.errors() for depth in (1, 2)}
    valid = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = {name: v for name, v in value.items() if (key, name) not in locations}
        elif (key,) in locations:
            continue
        valid[key] = value
    return valid


def _unknown_setting(name: str, known_names: Collection[str]) -> str:
    matches = difflib.get_close_matches(name, known_names, n=1, cutoff=0.5)
    hint = f" Did you mean {matches[0]!r}?" if matches else ""
    return f"There is no setting {name!r}.{hint}"


def _contradictions(config: Config) -> list[str]:
    model = config.model
    problems = []
    if model.head_dim is None and model.n_embd % model.n_head:
        floor = model.n_embd // model.n_head * model.n_head
        widths = [width for width in (floor, floor + model.n_head) if width]
        nearest = min(widths, key=lambda width: abs(width - model.n_embd))
        problems.append(
            f"n_embd = {model.n_embd} is not divisible by n_head = {model.n_head}. "
            f"The nearest width is n_embd = {nearest}."
        )
    elif model.arch == "qwen3" and model.head_size % 2:
        problems.append(
            f"Heads of {model.head_size} channels cannot have rotary positions: "
            "head_dim, or n_embd / n_head, must be even."
        )
    elif model.arch == "gpt2" and model.head_size * model.n_head != model.n_embd:
        problems.append(
            f"head_dim = {model.head_dim} requires arch = 'qwen3'; gpt2 has n_embd / n_head."
        )
    if model.n_kv_head is not None and (model.arch == "gpt2" or model.n_head % model.n_kv_head):
        problems.append(
            f"n_kv_head = {model.n_kv_head} requires arch = 'qwen3' and must divide "
            f"n_head = {model.n_head}."
        )
    if model.sliding_window is not None and model.arch == "gpt2":
        problems.append(f"sliding_window = {model.sliding_window} requires arch = 'qwen3'.")
    if config.training.steps is None and config.training.minutes is None:
        problems.append("Neither steps nor minutes is set: the run would not end.")
    return problems
