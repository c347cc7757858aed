"""Progress of a run, saved as JSON with every training state."""

from dataclasses import dataclass, field
from typing import Any

from nanogpt.diagnosis import EvalPoint


@dataclass
class TrainState:
    """Progress of a run: with weights and optimizer state, all that resuming needs.

    Attributes:
        step: Completed optimizer steps.
        seconds: Seconds of training, evaluations included, over all parts of the run.
        setup_seconds: Seconds of setup, over all parts of the run.
        expected_steps: Length of the run in steps, as estimated when it started.
        train_loss_sum: Training loss since the last evaluation, in nats, summed over targets.
        train_tokens: Targets in `train_loss_sum`.
        initial_val_loss: Validation loss of the initial checkpoint, in nats per token; None
            without one.
        initial_val_tokens: Tokens that `initial_val_loss` was measured on.
        val_tokens: Tokens per evaluation during the run, None for all. Constant over the run,
            so that its evaluations are comparable.
        history: Evaluations so far.
    """

    step: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    expected_steps: float = 0.0
    train_loss_sum: float = 0.0
    train_tokens: int = 0
    initial_val_loss: float | None = None
    initial_val_tokens: int = 0
    val_tokens: int | None = None
    history: list[EvalPoint] = field(default_factory=list)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "TrainState":
        """Rebuild a state from its JSON."""
        return cls(**{**saved, "history": [EvalPoint(**point) for point in saved["history"]]})

    @property
    def best(self) -> EvalPoint | None:
        """Return the evaluation with the lowest validation loss; None before the first."""
        return min(self.history, key=lambda point: point.val_loss, default=None)
