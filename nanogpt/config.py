"""Every setting of Nano-GPT, once: type, default, help and limits.

In: settings by name, from a TOML file, from flags or from Python. Out: a frozen `Config`.
Refuses: unknown names, values out of range and settings that contradict each other, all in one `UserError`.

The classes below are read by everyone: the command line makes its flags and its help from them, TOML files and model
files are written from them. The defaults are the seed's recipe. Names are unique across the sections, so settings
travel as one flat dictionary until `resolve` makes the `Config`. Nothing here imports torch.
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


class Section(BaseModel):
    """A named group of settings, frozen; the docstring under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class ModelConfig(Section):
    """The shape of the network."""

    arch: Literal["classic", "modern"] = "classic"
    """classic is shaped like GPT-2, modern like Qwen3; modern learns faster."""
    n_layer: Annotated[int, Field(ge=1)] = 6
    """Blocks of attention and feed-forward, one after another."""
    n_head: Annotated[int, Field(ge=1)] = 6
    """Attention heads in a block; must divide n_embd."""
    n_kv_head: Annotated[int | None, Field(ge=1)] = None
    """Heads of keys and values, for modern; must divide n_head. [default: n_head]"""
    n_embd: Annotated[int, Field(ge=1)] = 384
    """Width: channels of the vector that stands for a token."""
    context_length: Annotated[int, Field(ge=1)] = 256
    """Tokens the model looks back on."""
    dropout: Annotated[float, Field(ge=0, le=0.99)] = 0.2
    """Share of activations zeroed in training, against overfitting (in steps of 1/256)."""
    window: Annotated[int | None, Field(ge=1)] = None
    """Tokens that attention sees at a time, itself included, for modern; its cost is then linear in the context. [default: all]"""
    rope_base: Annotated[float, Field(gt=1)] = 10_000.0
    """Rotary positions of modern: the slowest turns once in 2 pi times so many tokens; a longer context wants a larger one."""


def is_path(tokenizer: str) -> bool:
    """Whether a tokenizer is named by where it lies, which a kind's name does not look like."""
    return tokenizer.endswith(".json") or "/" in tokenizer or "\\" in tokenizer


def _known_tokenizer(name: str) -> str:
    if name not in TOKENIZERS and not is_path(name):
        near = difflib.get_close_matches(name, TOKENIZERS, n=1)
        meant = f"; did you mean {near[0]}" if near else ""
        raise ValueError(f"neither a kind of tokenizer ({', '.join(TOKENIZERS)}) nor the path of a tokenizer.json{meant}")
    return name


class TextConfig(Section):
    """How text becomes tokens, and what is held out."""

    tokenizer: Annotated[str, AfterValidator(_known_tokenizer)] = "char"
    """What a token is: char, byte, word, bpe (parts of words), or what the tokenizer.json at this path says."""
    vocab_size: Annotated[int | None, Field(ge=1)] = None
    """Different tokens of word and bpe. [default: by the text's size, from 512 to 32768: 1 MB gets 1024 for bpe, 4096 for word]"""
    field: str | None = None
    """Field of a JSONL file, or column of a CSV or Parquet table, that holds the text. [default: text]"""
    cross_documents: bool = True
    """Whether a window of text to learn from may reach from one document into the next."""
    encoding: str | None = None
    """Encoding of the text files. [default: UTF-8, or UTF-16 where its mark is found]"""
    val: str | None = None
    """A file or folder to validate on. [default: the last tenth of the text, or a tenth of many files]"""
    val_bytes: Annotated[int, Field(ge=1)] = 1_000_000
    """The most that is held out of the text for validation, in bytes."""


class TrainingConfig(Section):
    """How the model learns."""

    batch_size: Annotated[int, Field(ge=1)] = 32
    """Windows of text in one step."""
    micro_batch_size: Annotated[int | None, Field(ge=1)] = None
    """Windows that are computed at once; the gradients of a step are added up. [default: as many as memory suffices for]"""
    checkpoint_activations: bool | None = None
    """Compute inner activations again in the backward pass instead of keeping them. [default: where not one window fits into the memory otherwise]"""
    steps: Annotated[int | None, Field(ge=1)] = 5000
    """Updates of the weights. [default: 5000, or as many as fit into the minutes; with both, whichever ends first]"""
    minutes: Annotated[float | None, Field(gt=0, le=525_600)] = None
    """Time for all of it; the recipe then chooses every setting that is not given. [default: 5, where nothing else ends the run]"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon moves the matrices of the blocks, and AdamW the rest; it needs fewer steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Highest learning rate of AdamW."""
    matrix_learning_rate: Annotated[float, Field(gt=0)] = 0.02
    """Highest learning rate of Muon."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the learning rate rises to its highest; at most a tenth of the run."""
    cooldown: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the run, at its end, in which the learning rate falls linearly to zero; 0 is a cosine to a tenth over the whole run."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Pull of the matrices towards zero."""
    grad_clip: Annotated[float, Field(ge=0)] = 1.0
    """Gradients longer than this are scaled down to it; 0 is off."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 1337
    """Fixes the initial weights, the order of the text, dropout and samples."""
    eval_every: Annotated[int, Field(ge=1)] = 250
    """Steps between evaluations; each also prints a sample and saves."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Stop after so many evaluations without a better one; 0 is off."""


class PlaceConfig(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Precision of the matrices; auto is the fastest that hardly changes a loss, float32 the exact one, int8 rounds their weights."""
    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    """CPU threads. [default: one per core, or fewer where that is faster]"""
    deterministic: Annotated[bool, Parameter(negative="")] = False
    """Only what repeats bit for bit, on GPUs too and whatever is computed beside it, where that is slower."""


class MachineConfig(PlaceConfig):
    """How the training step runs there."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products; auto is the faster."""
    compile: bool | None = None
    """Have torch.compile write the training step for this machine. [default: where that pays for itself within the run]"""
    attention: Literal["auto", "fused", "plain"] = "auto"
    """fused is one kernel, plain a softmax between two products; auto is the faster."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Of several processes: with ddp each holds the whole model, with fsdp its share of it, and fetches the rest as it goes."""


class Config(Section):
    """All the settings of a run."""

    model: Annotated[ModelConfig, Parameter(name="*", group="Model")] = ModelConfig()
    text: Annotated[TextConfig, Parameter(name="*", group="Text")] = TextConfig()
    training: Annotated[TrainingConfig, Parameter(name="*", group="Training")] = TrainingConfig()
    machine: Annotated[MachineConfig, Parameter(name="*", group="Machine")] = MachineConfig()


class SamplingConfig(Section):
    """How text is drawn from a model."""

    max_tokens: Annotated[int, Field(ge=0)] = 500
    """The most tokens to make; a model of many documents may end one sooner."""
    temperature: Annotated[float, Field(ge=0)] = 0.8
    """Below 1 plays it safe, above 1 is bold, 0 always takes the likeliest token."""
    top_k: Annotated[int | None, Field(ge=1)] = None
    """Draw from so many of the likeliest tokens. [default: all]"""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Draw from tokens at least this share as likely as the likeliest."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, tokens that occurred already are drawn less; 1 is off."""
    logit_bias: Annotated[dict[int, float], Parameter(parse=False)] = {}
    """What is added to the logits of tokens, by token; from programs only."""
    allowed: Annotated[tuple[int, ...] | None, Parameter(parse=False)] = None
    """The only tokens to draw, if given; from programs only."""
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Parameter(negative="", allow_leading_hyphen=True)] = ()
    """End before this text; may be given more than once."""


class ServeConfig(Section):
    """Where the server is reached, and how much it takes on."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address to listen at; one that other machines reach needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port to listen at; 0 is any that is free."""
    api_key: Annotated[str | None, Field(pattern="^[!-~]{8,}$"), Parameter(env_var="NANOGPT_API_KEY", show_env_var=True)] = None
    """A key, of eight signs or more, that every request must carry. On the command line other users of the machine can see it: better set NANOGPT_API_KEY."""
    rows: Annotated[int, Field(ge=1, le=4096)] = 64
    """Texts that each model writes at the same time."""
    queue: Annotated[int, Field(ge=0, le=100_000)] = 128
    """Texts that may wait for that; what comes beyond is told when to come again."""
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """The longest that one request may take; its texts then end where they are."""


def _gpt2(n_layer: int, n_head: int, n_embd: int, learning_rate: float, steps: int) -> dict[str, Any]:
    """A shape of GPT-2's (Radford et al. 2019, table 2), its batch and context (section 2.3); rate and warm-up of GPT-3's model of the size (Brown et al.
    2020, table 2.1 and appendix B), which GPT-2's authors did not tell; and 20 tokens for each parameter (Hoffmann et al. 2022, table 3)."""
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "context_length": 1024, "dropout": 0.1}
    return shape | {"batch_size": 512, "learning_rate": learning_rate, "warmup_steps": 700, "steps": steps}


# Whole recipes by name: the settings that differ from the defaults, which are the seed's.
PRESETS: dict[str, dict[str, Any]] = {
    "classic": {},
    "gpt2": _gpt2(12, 12, 768, 6e-4, 5_000),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4, 13_500),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4, 29_500),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4, 59_500),
}
_LEARNING = {"optimizer": "muon", "learning_rate": 3e-3, "matrix_learning_rate": 0.015, "cooldown": 0.7, "weight_decay": 0.05}
PRESETS |= {  # the same sizes in the other shape, so that the two can be compared; what suits its optimiser is what the recipe takes for long runs
    "modern": {"arch": "modern"} | _LEARNING,
    "modern-gpt2": PRESETS["gpt2"] | {"arch": "modern", "dropout": 0.0} | _LEARNING,
}
SECTION_OF = {name: section for section, field in Config.model_fields.items() for name in field.annotation.model_fields}  # type: ignore[union-attr]


def resolve(settings: dict[str, Any], *, complete: bool = True) -> Config:
    """Make the whole configuration of the settings that were given by name; all others get their defaults.

    Where the recipe is still to choose, they are not `complete`, and cannot contradict defaults that will not stay.

    Errors: `UserError` with every problem found: unknown names, wrong types, values out of range, contradictions.
    """
    nested: dict[str, dict[str, Any]] = {section: {} for section in Config.model_fields}
    for name, value in settings.items():
        if name in SECTION_OF:
            nested[SECTION_OF[name]][name] = value
    if settings.get("minutes") is not None:
        nested["training"].setdefault("steps", None)
    return _checked(Config, nested, settings, SECTION_OF, _contradictions if complete else lambda config: [])


def preset_settings(name: str | None) -> dict[str, Any]:
    """The settings of a preset; without a name, none. Errors: `UserError` for a name that is not there."""
    if name is not None and name not in PRESETS:
        raise UserError(f"There is no preset {name!r}.", f"The presets: {', '.join(PRESETS)}.")
    return dict(PRESETS.get(name or "", {}))


def resolve_sampling(settings: dict[str, Any]) -> SamplingConfig:
    """The same for the settings of sampling."""
    known = {name: value for name, value in settings.items() if name in SamplingConfig.model_fields}
    return _checked(SamplingConfig, known, settings, SamplingConfig.model_fields, lambda config: [])


def _checked(
    kind: type[AnySection], content: dict[str, Any], given: Iterable[str], known: Collection[str], contradictions: Callable[[AnySection], list[str]]
) -> AnySection:
    problems = [_unknown(name, known) for name in given if name not in known]
    try:
        config = kind.model_validate(content)
    except ValidationError as error:
        problems += explain(error)
        wrong = {part for problem in error.errors() for part in problem["loc"]} - Config.model_fields.keys()
        config = kind.model_validate({key: _without(value, wrong) for key, value in content.items() if key not in wrong})
    problems += contradictions(config)
    if problems:
        raise UserError("\n".join(problems), "`nanogpt train --help` and `nanogpt sample --help` list every setting with its default.")
    return config


def explain(error: ValidationError) -> list[str]:
    """Say what pydantic found in one line per problem: the setting, the value, the limit."""
    names = [[part for part in problem["loc"] if isinstance(part, str)][-1] for problem in error.errors()]  # other parts are places in a list
    said = [problem["msg"].lower().removeprefix("value error, ") for problem in error.errors()]
    return [f"{name} = {problem['input']!r}: {what}." for name, problem, what in zip(names, error.errors(), said, strict=True)]


def flatten(config: BaseModel, *, explicit: bool = False) -> dict[str, Any]:
    """The settings by name; with `explicit`, only those that somebody gave a value."""
    sections = config.model_dump(exclude_unset=explicit)
    return {name: value for section in sections.values() for name, value in section.items()}


def differing(head: tuple[str, str, str], names: Iterable[str], before: dict[str, Any], after: dict[str, Any]) -> str:
    """A table, for a person, of settings that were one thing and are now asked to be another."""
    rows = [head, *((name, str(before[name]), str(after[name])) for name in names)]
    return "\n".join(f"  {name:16} {old:>12} {new:>12}" for name, old, new in rows)


def read_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file (or in the config.toml of a run folder), by name; they may stand in their sections or at the top.

    Errors: `UserError` when the file is missing or is not TOML.
    """
    if path.is_dir():
        path = path / "config.toml"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"The settings in {path.absolute()} cannot be read: {error}.") from error
    settings: dict[str, Any] = {}
    for key, value in document.items():
        for name, setting in value.items() if key in Config.model_fields and isinstance(value, dict) else [(key, value)]:
            if name in settings:
                raise UserError(f"{path.absolute()} sets {name!r} twice: to {settings[name]!r} and to {setting!r}.", "Remove one of the two.")
            settings[name] = setting
    return settings


def to_toml(config: Config) -> str:
    """The whole configuration as TOML, which `--config` reads back. (TOML has no null: what is None is left out.)"""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _without(value: Any, names: Collection[str | int]) -> Any:
    return {name: inner for name, inner in value.items() if name not in names} if isinstance(value, dict) else value


def _unknown(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"There is no setting {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")


def _contradictions(config: Config) -> list[str]:
    model, found = config.model, []
    if model.n_embd % model.n_head:
        below, above = model.n_embd // model.n_head * model.n_head, -(-model.n_embd // model.n_head) * model.n_head
        nearest = min((width for width in (below, above) if width), key=lambda width: abs(width - model.n_embd))
        found.append(f"n_embd = {model.n_embd} cannot be shared among n_head = {model.n_head} heads. The nearest width is --n-embd {nearest}.")
    elif model.arch == "modern" and model.n_embd // model.n_head % 2:
        found.append(f"n_embd = {model.n_embd} over n_head = {model.n_head} gives heads of an odd width, and modern turns channels in pairs.")
    if model.n_kv_head is not None and (model.arch == "classic" or model.n_head % model.n_kv_head):
        found.append(f"n_kv_head = {model.n_kv_head} goes with arch = 'modern' and must divide n_head = {model.n_head}.")
    if model.window is not None and model.arch == "classic":
        found.append(f"window = {model.window} goes with arch = 'modern'.")
    if config.training.steps is None and config.training.minutes is None:
        found.append("Neither steps nor minutes: nothing would end the run.")
    return found
