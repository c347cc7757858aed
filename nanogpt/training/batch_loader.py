"""Batches on the device, one step ahead of training."""

from dataclasses import dataclass, field

from torch import Tensor

from nanogpt.config import TrainingConfig
from nanogpt.data import batches
from nanogpt.data.prepare import PreparedData
from nanogpt.device.device import Machine
from nanogpt.distributed.context import DistContext


@dataclass(frozen=True)
class Batch:
    """One rank's sequences of a step.

    Attributes:
        x: Token ids, (B, T).
        y: Target ids, (B, T); `IGNORE_INDEX` after the end of a document.
        dropout_seeds: One seed per sequence, (B,), so that micro-batches do not change dropout.
        num_targets: Targets of the step over all ranks.
    """

    x: Tensor
    y: Tensor
    dropout_seeds: Tensor
    num_targets: int

    def split(self, micro_batch_size: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Split into micro-batches of up to `micro_batch_size` sequences."""
        tensors = (self.x, self.y, self.dropout_seeds)
        return list(zip(*(tensor.split(micro_batch_size) for tensor in tensors), strict=True))


@dataclass(eq=False)
class BatchLoader:
    """Loads this rank's batches, and keeps the next one ready on the device."""

    data: PreparedData
    settings: TrainingConfig
    context_length: int
    machine: Machine
    dist: DistContext
    rows: range = field(init=False)
    next_batch: dict[int, Batch] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = self.dist.local_batch_slice(self.settings.batch_size)

    def prefetch(self, step: int) -> None:
        """Load the batch of a step in advance, and start its transfer to the device."""
        B, T = self.settings.batch_size, self.context_length
        x, y, dropout_seeds = batches.sample_batch(
            self.data.train, self.settings.seed, step, self.rows, B, T, self.data.document_windows
        )
        num_targets = B * T
        if self.data.document_windows is not None:
            # Counted before the transfer: reading the count from a GPU would wait for it.
            local_targets = int((y != batches.IGNORE_INDEX).sum())
            num_targets = int(*self.dist.all_reduce_sum(local_targets))
        x, y, dropout_seeds = map(self.machine.to_device, (x, y, dropout_seeds))
        self.next_batch = {step: Batch(x, y, dropout_seeds, num_targets)}

    def get(self, step: int) -> Batch:
        """Return the batch of a step."""
        if step not in self.next_batch:
            self.prefetch(step)
        return self.next_batch[step]
