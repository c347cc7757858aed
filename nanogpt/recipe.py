"""tmp"""

from dataclasses import dataclass
from typing import Any

from nanogpt.machine import Machine


@dataclass(frozen=True)
class Choice:
    """A setting that the recipe chose, and why, in a line."""

    name: str
    value: Any
    reason: str


def choose(minutes: float, text: Any, place: Machine, given: dict[str, Any]) -> list[Choice]:
    base = {
        "arch": "modern",
        "n_layer": 6,
        "n_head": 4,
        "n_embd": 256,
        "context_length": 256,
        "batch_size": 8,
        "dropout": 0.0,
        "optimizer": "muon",
        "learning_rate": 3e-3,
        "matrix_learning_rate": 0.02,
        "cooldown": 0.5,
        "warmup_steps": 20,
        "weight_decay": 0.05,
        "eval_every": 200,
    }
    return [Choice(k, v, "") for k, v in base.items() if k not in given]
