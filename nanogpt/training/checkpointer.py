"""Saves of a run: the training state, also in the background, and the model file."""

import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanogpt import checkpoint
from nanogpt.distributed.context import DistContext
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.tokenizer.tokenizer import Tokenizer
from nanogpt.training.events import SaveEnd
from nanogpt.training.state import TrainState

# Longest time between two saves, in seconds, if evaluations are further apart.
SAVE_INTERVAL = 300.0


@dataclass(eq=False)
class Checkpointer:
    """Writes the training state and the model file of a run.

    Sharded states are written in the background while training continues; each save first
    waits for the previous one.
    """

    run_dir: Path
    model: GPT
    optimizer: Optimizer
    tokenizer: Tokenizer
    dist: DistContext
    last_save_time: float = field(init=False, default_factory=time.monotonic)
    pending_save: tuple[int, Future[None]] | None = field(init=False, default=None)

    def is_due(self) -> bool:
        """Return whether the last save is longer ago than `SAVE_INTERVAL`."""
        return time.monotonic() - self.last_save_time > SAVE_INTERVAL

    def save_state(self, state: TrainState) -> list[SaveEnd]:
        """Save all that resuming needs; return no event if the save continues in background."""
        future = checkpoint.save_state(
            self.run_dir, state.step, self.model, self.optimizer, asdict(state), self.dist
        )
        self.last_save_time = time.monotonic()
        if future is None:
            return [SaveEnd(state.step)]
        self.pending_save = (state.step, future)
        return []

    def wait_for_pending_save(self) -> list[SaveEnd]:
        """Wait for the save in the background, if any, and raise its error."""
        if self.pending_save is None:
            return []
        step, future = self.pending_save
        self.pending_save = None
        future.result()
        return [SaveEnd(step)]

    def save_model(self, summary: dict[str, Any]) -> None:
        """Write the current weights and a training summary as the model file of the run."""
        path = self.run_dir / "model.safetensors"
        checkpoint.save_model(path, self.model, self.tokenizer, summary, self.dist)
