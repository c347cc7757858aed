"""Events of a training run: the frozen dataclasses that `Trainer.train` yields.

`nanogpt.run_folder` writes the fields of some of them as lines of metrics.jsonl, samples.jsonl
and ranks.jsonl. Losses are in nats per token, and `seconds` are seconds of training so far.
"""

from dataclasses import dataclass
from typing import Any

from nanogpt.config import Config
from nanogpt.diagnosis import Diagnosis
from nanogpt.evaluate import EvalLoss


class Event:
    """Base class of all events."""


@dataclass(frozen=True)
class TrainStart(Event):
    """A run starts, or resumes after `step`.

    Attributes:
        run: Run folder.
        step: Completed steps; 0 for a new run.
        config: Resolved settings.
        parameters: Number of parameters.
        data: Metadata of the prepared data.
        machine: Description of the device.
        flops_per_token: FLOPs to train on one token.
        peak_flops: Measured matmul throughput, in FLOP/s.
        choices: Settings that were chosen automatically, with the reasons.
        required_bytes: Estimated memory of a step.
        free_bytes: Free memory; None if the system does not report it.
    """

    run: str
    step: int
    config: Config
    parameters: int
    data: dict[str, Any]
    machine: str
    flops_per_token: float
    peak_flops: float
    choices: list[Any]
    required_bytes: float
    free_bytes: float | None


@dataclass(frozen=True)
class InitialEval(Event):
    """The initial checkpoint was evaluated on `val_tokens` tokens, before the first step."""

    step: int
    val_loss: float
    bits_per_byte: float
    val_tokens: int
    seconds: float


@dataclass(frozen=True)
class StepEnd(Event):
    """An optimizer step is complete.

    Attributes:
        step: Number of the step, from 1.
        progress: Fraction of the run that is complete, in [0, 1].
        train_loss: Mean loss of the step's batch, before the update.
        learning_rate: Learning rate of AdamW in this step.
        grad_norm: Norm of all gradients, before clipping.
        tokens: Target tokens of the batch, over all ranks.
        tokens_per_second: Throughput of this step.
        seconds: Seconds of training so far.
    """

    step: int
    progress: float
    train_loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float


@dataclass(frozen=True)
class EvalEnd(Event):
    """The model was evaluated during the run.

    Attributes:
        step: Completed steps.
        train_loss: Mean training loss since the last evaluation.
        val_loss: Validation loss.
        bits_per_byte: Validation loss in bits per byte of text.
        val_tokens: Validation tokens of this evaluation.
        best: True if no earlier evaluation had a lower loss.
        seconds: Seconds of training so far.
    """

    step: int
    train_loss: float
    val_loss: float
    bits_per_byte: float
    val_tokens: int
    best: bool
    seconds: float


@dataclass(frozen=True)
class RankTimings(Event):
    """The speed of every rank was compared.

    Attributes:
        step: Completed steps.
        seconds: By rank, mean compute seconds per step since the last evaluation, without
            waiting for other ranks.
        comm_fraction: Fraction of forward and backward spent in communication; measured once
            per run, None otherwise.
    """

    step: int
    seconds: list[float]
    comm_fraction: float | None


@dataclass(frozen=True)
class SampleEnd(Event):
    """The model generated `text` after `step`."""

    step: int
    text: str


@dataclass(frozen=True)
class SaveStart(Event):
    """The state of `step` will be written next; listeners flush their files now."""

    step: int


@dataclass(frozen=True)
class SaveEnd(Event):
    """The state of `step` is on disk, and the run can resume from it."""

    step: int


@dataclass(frozen=True)
class StopRequested(Event):
    """A signal requested a stop after this step. Emitted from inside the signal handler."""


@dataclass(frozen=True)
class Interrupted(Event):
    """The run stopped on request after `step`, and is saved."""

    step: int


@dataclass(frozen=True)
class TrainEnd(Event):
    """The run is complete.

    Attributes:
        step: Completed steps.
        best_step: Step of the best model, which the run keeps.
        loss: Loss of the best model on the full validation split.
        baselines: Loss of each n-gram baseline.
        diagnosis: Judgement of the run.
        seconds: Seconds of training.
        initial_val_loss: Loss of the initial checkpoint; None without one.
        initial_val_tokens: Tokens that `initial_val_loss` was measured on.
    """

    step: int
    best_step: int
    loss: EvalLoss
    baselines: dict[str, float]
    diagnosis: Diagnosis
    seconds: float
    initial_val_loss: float | None
    initial_val_tokens: int = 0
