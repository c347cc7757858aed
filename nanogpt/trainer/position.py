"""How far a run has come.

In: nothing, or what was saved. Out: a `Position`, which goes into a file as JSON.
"""

from dataclasses import dataclass, field
from typing import Any

from nanogpt.evaluate import Point


@dataclass
class Position:
    """How far a run has come: with the weights and the optimiser's state, all that it takes to go on."""

    step: int = 0
    seconds: float = 0.0  # of training, evaluations included
    overhead: float = 0.0  # and of getting ready, in each part of the run
    expected_steps: float = 0.0  # that the run was taken to have when it began: all of them, or as many as seemed to fit into its time
    nats: float = 0.0  # training loss since the last evaluation, as a sum
    tokens: int = 0  # and a count
    before: float | None = None  # validation loss of the earlier model that the run began from, if it did,
    before_tokens: int = 0  # and on how many tokens
    val_tokens: int | None = None  # that an evaluation during the run takes, None for all: always the same, or "best" would mean nothing
    history: list[Point] = field(default_factory=list)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Position":
        """The position that was saved as JSON."""
        return cls(**{**saved, "history": [Point(**point) for point in saved["history"]]})

    @property
    def best(self) -> Point | None:
        """The evaluation with the lowest validation loss; None before the first."""
        return min(self.history, key=lambda point: point.val_loss, default=None)
