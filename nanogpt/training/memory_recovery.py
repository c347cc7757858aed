"""Recovery from out-of-memory errors during a step."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nanogpt.config import TrainingConfig, read_toml, resolve, to_toml
from nanogpt.device.memory import is_oom_error
from nanogpt.errors import Notice
from nanogpt.files import write_text
from nanogpt.model import GPT


class MemoryRecovery:
    """Repeats a forward/backward pass with less memory after an out-of-memory error.

    The batch stays the same: it is split into smaller micro-batches, and at one sequence per
    micro-batch activation checkpointing is enabled.

    Args:
        model: The model that is trained.
        settings: Source of `micro_batch_size`.
        batch_size: Sequences per step on this rank.
        config_path: config.toml of the run, updated so that a resumed run repeats the changes.
        is_enabled: False raises every error at once. With several ranks the others wait for
            the gradients of this one, so it cannot start over.
    """

    def __init__(
        self,
        model: GPT,
        settings: TrainingConfig,
        batch_size: int,
        config_path: Path,
        is_enabled: bool,
    ):
        self.model = model
        self.micro_batch_size = min(settings.micro_batch_size or batch_size, batch_size)
        self.config_path = config_path
        self.is_enabled = is_enabled

    def run(self, forward_backward: Callable[[], Tensor]) -> Tensor:
        """Run `forward_backward`, again with less memory after each out-of-memory error."""
        while True:
            try:
                return forward_backward()
            except RuntimeError as error:
                if not (self.is_enabled and is_oom_error(error) and self.reduce_memory_use()):
                    raise

    def reduce_memory_use(self) -> bool:
        """Halve the micro-batches or enable checkpointing; return False if neither is left."""
        changes: dict[str, int | bool]
        if self.micro_batch_size > 1:
            old_size = self.micro_batch_size
            self.micro_batch_size = -(-old_size // 2)
            changes = {"micro_batch_size": self.micro_batch_size}
            change = f"micro_batch_size is now {self.micro_batch_size} instead of {old_size}"
        elif not self.model.activation_checkpointing:
            self.model.activation_checkpointing = True
            changes = {"activation_checkpointing": True}
            change = "activation_checkpointing is now on"
        else:
            return False
        self.model.zero_grad(set_to_none=True)
        if self.config_path.exists():
            config = resolve(read_toml(self.config_path) | changes)
            write_text(self.config_path, to_toml(config))
        message = f"Out of memory: {change}. A step has as many tokens as before."
        warnings.warn(message, Notice, stacklevel=2)
        return True
