"""`DistContext`: the rank of this process, and the collectives that training needs.

Numbers and settings travel as CPU tensors and JSON over gloo, also when gradients use NCCL. No
pickle is involved, and no collective waits for a GPU.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.distributed.command import format_ranks, torchrun_command
from nanogpt.errors import UserError

# Rank 0 may prepare a large corpus while the others wait in a collective. A process that dies is
# noticed at once, whatever the timeout.
COLLECTIVE_TIMEOUT_HOURS = 24.0
# Parts of PyTorch's error messages that mean that another process died.
PEER_LOST_MESSAGES = ("gloo", "Connection closed", "Connection reset", "NCCL", "Broken pipe")

Value = TypeVar("Value")

# The side group of the current default process group. It must be shared by all contexts, since
# process groups are global in PyTorch, too.
_side_groups: dict[Any, Any] = {}


@dataclass(frozen=True)
class DistContext:
    """The place of this process in a launch; the defaults are a single process.

    A method is a collective if its result depends on other ranks: all ranks have to call it. With a
    single process no method communicates.

    Attributes:
        rank: Index of this process among all.
        world_size: Number of processes on all nodes.
        local_rank: Index of this process on its node.
        local_world_size: Number of processes on this node.
        backend: Name of the backend for gradients, for messages.
        run_id: Identifies the launch; stays the same when torchrun restarts the processes.
        is_restart: True if torchrun restarted the processes of this launch.
        is_fsdp: True if parameters are sharded.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    backend: str = ""
    run_id: str = ""
    is_restart: bool = False
    is_fsdp: bool = False

    @property
    def is_main_process(self) -> bool:
        """True in the process that prints, writes files and makes decisions."""
        return self.rank == 0

    def local_batch_slice(self, batch_size: int) -> range:
        """Return the rows of a global batch that this process computes.

        Raises:
            UserError: The batch size is not divisible by the number of processes.
        """
        if batch_size % self.world_size:
            divisible = -(-batch_size // self.world_size) * self.world_size
            divisor = next(n for n in range(self.world_size, 0, -1) if batch_size % n == 0)
            larger_batch = torchrun_command(self.world_size, batch_size=divisible)
            self.fail_on_all_ranks(
                f"The batch size {batch_size} is not divisible by the number of processes, "
                f"{self.world_size} ({self}).",
                f"Change the batch size: {larger_batch}\n"
                f"Or the number of processes: {torchrun_command(divisor)}",
            )
        local_batch_size = batch_size // self.world_size
        start = self.rank * local_batch_size
        return range(start, start + local_batch_size)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sum of each number over all ranks, in float64 and bit-identical."""
        if self.world_size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is True on any rank."""
        return [count > 0 for count in self.all_reduce_sum(*flags)]

    def broadcast_numbers(self, *numbers: float) -> list[float]:
        """Return the numbers of rank 0."""
        return self.all_reduce_sum(*(number if self.is_main_process else 0.0 for number in numbers))

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """Return the value of the rank `source`, which must be serializable as JSON."""
        if self.world_size == 1:
            return value
        content = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor(len(content))
        dist.broadcast(length, source)
        buffer = bytearray(content or int(length))
        dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), source)
        return json.loads(buffer)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, which must be serializable as JSON."""
        return [self.broadcast_object(value, rank) for rank in range(self.world_size)]

    def run_on_main(self, function: Callable[[], Value]) -> Value | None:
        """Run a function on rank 0 while the others wait.

        Returns:
            The function's result on rank 0, None on the others.

        Raises:
            SystemExit: The function failed on rank 0, which reports the error itself.
        """
        try:
            value = function() if self.is_main_process else None
        except BaseException:
            self.broadcast_object(False)
            raise
        if not self.broadcast_object(True):
            raise SystemExit(2)
        return value

    def local_main_process_first(self, function: Callable[[], Value]) -> Value:
        """Run a function first on local rank 0, then on the others, which find its files."""
        value = function() if self.local_rank == 0 else None
        self.all_reduce_sum(0)
        return value if value is not None else function()

    def fail_on_all_ranks(self, what: str, fix: str) -> None:
        """End all ranks for an error that all of them detect; only rank 0 reports it."""
        raise UserError(what, fix) if self.is_main_process else SystemExit(2)

    def check_same_on_all_ranks(self, settings: dict[str, Any]) -> None:
        """Check that all ranks were launched with the same versions and settings.

        Raises:
            UserError: Ranks differ; the message is a table of the differing values.
        """
        all_settings = self.all_gather_object(settings)
        rows = []
        for name in sorted(set().union(*all_settings)):
            ranks_of_value: dict[str, list[int]] = {}
            for rank, one in enumerate(all_settings):
                ranks_of_value.setdefault(json.dumps(one.get(name)), []).append(rank)
            if len(ranks_of_value) > 1:
                rows += [
                    f"  {name:16} {value}: {format_ranks(ranks)}"
                    for value, ranks in ranks_of_value.items()
                ]
        if rows:
            table = "\n".join(rows)
            self.fail_on_all_ranks(
                f"Processes were launched with different settings:\n{table}",
                "Run the same command with the same version of nanogpt on every node: "
                f"{torchrun_command(self.world_size)}",
            )

    def broadcast_tensor_into(self, target: Tensor, source: Tensor | None) -> None:
        """Copy a full tensor of rank 0 into a replicated or sharded tensor of every rank.

        Args:
            target: The tensor to fill in place.
            source: The full tensor; may be None except on rank 0.
        """
        if not self.is_sharded(target):
            if self.is_main_process:
                assert source is not None
                target.copy_(source)
            if self.world_size > 1:
                dist.broadcast(target, 0)
            return
        from torch.distributed.tensor import distribute_tensor

        if source is None:
            source = torch.empty(target.shape, dtype=target.dtype)
        source = source.to(target.device)
        target.copy_(distribute_tensor(source, target.device_mesh, target.placements))

    def full_tensor(self, tensor: Tensor) -> Tensor:
        """Return the full tensor, gathered from all ranks if it is sharded."""
        return tensor.full_tensor() if self.is_sharded(tensor) else tensor

    def side_group(self) -> dist.ProcessGroup | None:
        """Return a second process group, for collectives of a background thread.

        All ranks have to call this together. Later calls return the same group.
        """
        if dist.group.WORLD not in _side_groups:
            # A remaining entry belongs to a process group that was destroyed.
            _side_groups.clear()
            _side_groups[dist.group.WORLD] = dist.new_group(
                backend="gloo", timeout=timedelta(hours=COLLECTIVE_TIMEOUT_HOURS)
            )
        return _side_groups[dist.group.WORLD]

    @staticmethod
    def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
        """Return True if a tensor is a DTensor: this process holds a part of it."""
        return hasattr(tensor, "full_tensor")

    @contextmanager
    def peer_failure_guard(self) -> Iterator[None]:
        """Translate the errors that follow a lost peer into one `UserError`.

        The exit is a barrier, so that peers can finish reading, and destroys the process group.
        """
        try:
            yield
            self.all_reduce_sum(0)
        except RuntimeError as error:
            is_peer_failure = isinstance(error, dist.DistError) or any(
                message in str(error) for message in PEER_LOST_MESSAGES
            )
            if self.world_size == 1 or not is_peer_failure:
                raise
            first_line = str(error).strip().split("\n")[0]
            raise UserError(
                f"Rank {self.rank} of {self.world_size} ({self.backend}) lost its peers: another "
                f"process ended and reports the reason in its own output ({first_line[:200]}).",
                "Resume from the last checkpoint: "
                f"{torchrun_command(self.world_size, resume=True)}",
            ) from error
        finally:
            if self.world_size > 1:
                dist.destroy_process_group()

    def __str__(self) -> str:
        if self.world_size == 1:
            return "one process"
        return f"ranks 0 to {self.world_size - 1}, {self.backend}"
