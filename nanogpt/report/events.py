"""What happens in a run, as values: `trainer` yields them, and whoever tells of a run takes them one by one.

In: nothing. Out: frozen dataclasses, whose fields are those of a line in metrics.jsonl or samples.jsonl where they become one.
"""

from dataclasses import dataclass
from typing import Any

from nanogpt.config import Config
from nanogpt.evaluate import Loss, Verdict


@dataclass(frozen=True)
class Started:
    """A run begins, or goes on after `step`."""

    run: str
    step: int
    config: Config
    parameters: int
    text: dict[str, Any]
    machine: str
    flops_per_token: float
    peak: float  # FLOP/s
    choices: list[Any]
    memory: float  # bytes that a step is estimated to take,
    free_memory: float | None  # and that are free, where the system tells


@dataclass(frozen=True)
class Began:
    """The loss of the earlier model that a run begins from, over `val_tokens` tokens, before its first step."""

    step: int
    val_loss: float
    bits_per_byte: float
    val_tokens: int
    seconds: float


@dataclass(frozen=True)
class Stepped:
    """An update of the weights, with which `progress` of the run is over: `train_loss` (nats per token) is of its batch, before it."""

    step: int
    progress: float
    train_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class Evaluated:
    """A validation loss over `val_tokens` tokens; `train_loss` is the mean since the last evaluation."""

    step: int
    train_loss: float
    val_loss: float
    bits_per_byte: float
    val_tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class Paced:
    """How many processes keep step: the seconds of a step, by rank, in which each computed without waiting for others, as means since the last evaluation; and
    once in a run, what share of forward and backward it takes to add up the gradients."""

    step: int
    seconds: list[float]
    exchange: float | None


@dataclass(frozen=True)
class Sampled:
    """Text that the model wrote after `step`."""

    step: int
    text: str


@dataclass(frozen=True)
class Saving:
    """The state of `step` is about to be written: what was told so far must be on disk before it."""

    step: int


@dataclass(frozen=True)
class Saved:
    """The run can go on from `step`, whatever happens now."""

    step: int


@dataclass(frozen=True)
class Stopping:
    """A signal asked the run to stop after this step. It comes from inside the signal's handler."""


@dataclass(frozen=True)
class Interrupted:
    """The run was asked to stop, and has been saved."""

    step: int


@dataclass(frozen=True)
class Finished:
    """The run is over: `loss` is of the model that was kept (of `best_step`), on the whole validation split."""

    step: int
    best_step: int
    loss: Loss
    baselines: dict[str, float]
    verdict: Verdict
    seconds: float
    before: float | None  # nats per token of the earlier model that the run began from, if it did,
    before_tokens: int = 0  # over so many tokens of the split


Event = Started | Began | Stepped | Evaluated | Paced | Sampled | Saving | Saved | Stopping | Interrupted | Finished


@dataclass(frozen=True)
class Speed:
    """How fast a machine trains and writes, measured: times are medians of `steps` training steps (optimiser included) and of `tokens` written one by one."""

    machine: str
    attention: str
    compiled: bool
    parameters: int
    tokens_per_step: int
    step_seconds: float
    train_tokens_per_second: float
    train_flops_per_second: float
    peak_flops_per_second: float
    share_of_peak: float
    write_tokens_per_second: float
    ready_seconds: float  # to compile and to take a first step
    steps: int
    tokens: int
