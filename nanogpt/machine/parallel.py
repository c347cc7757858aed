"""A model over many processes: gradients added up while the backward pass goes on, or every parameter in parts.

In: a model that knows nothing of it, and `Ranks`. Out: the same loss, as a function whose backward pass leaves the gradients of all rows; and the updates of
whole matrices, each computed in one process. The engine is PyTorch's: DistributedDataParallel (Li et al. 2020, "PyTorch Distributed") and
`fully_shard` (Zhao et al. 2023, "PyTorch FSDP"; its second version keeps each parameter as a DTensor, cut by rows).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanogpt.machine.ranks import Ranks

Loss = Callable[..., Tensor]
Context = Callable[[], AbstractContextManager]


class Nats(nn.Module):
    """A loss as the module that DistributedDataParallel takes."""

    def __init__(self, model: nn.Module, nats: Loss):
        super().__init__()
        self.model, self.nats = model, nats

    def forward(self, *inputs: Tensor) -> Tensor:
        """As `nats`."""
        return self.nats(*inputs)


def shard(model: nn.Module, methods: Sequence[str]) -> None:
    """Keep of each parameter only the rows of this process. Those of a block are gathered when it computes, the others when one of `methods` is called."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    for method in methods:
        register_fsdp_forward_method(model, method)


def spread(model: nn.Module, nats: Loss, ranks: Ranks) -> tuple[Loss, Context, Context]:
    """The loss such that its backward pass leaves in every process the mean over the processes of the gradients; the context for all micro-batches of a step
    but the last; and one in which this process exchanges nothing with the others, to see how long it takes alone. Weights become those of the first process.

    Whole gradients wait for the last micro-batch; those of sharded weights would not fit, so each micro-batch's are added up, and only the share is kept."""
    if ranks.size == 1:
        return nats, nullcontext, nullcontext
    if ranks.sharded:
        return nats, nullcontext, lambda: _alone(model)
    whole = nn.parallel.DistributedDataParallel(Nats(model, nats), gradient_as_bucket_view=True)
    return whole, whole.no_sync, whole.no_sync


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Sharded weights and gradients of the right size and of no use: in place of what the others have stands what this process has."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

    class Gather(DefaultAllGather):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
            for rank, part in enumerate(output_tensor.chunk(group.size())):
                if rank != group.rank():  # where it lies already
                    part.copy_(input_tensor)

    class Scatter(DefaultReduceScatter):
        def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> None:  # type: ignore[override]
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    def exchange_by(gather: DefaultAllGather, scatter: DefaultReduceScatter) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)

    exchange_by(Gather(), Scatter())
    try:
        yield
    finally:
        exchange_by(DefaultAllGather(), DefaultReduceScatter())


class Division:
    """The work of an optimiser that needs whole matrices, divided among processes: each gets some, whole, and gives their updates to all.

    Owners are dealt by the work of a matrix, the largest first, so that all have about as much of it.
    """

    def __init__(self, ranks: Ranks):
        self.ranks = ranks

    def owners(self, matrices: Sequence[Tensor]) -> list[int]:
        """The process that each of some parameters (rows, columns) belongs to."""
        by_work = sorted(range(len(matrices)), key=lambda i: (-matrices[i].numel() * min(matrices[i].shape), i))
        owner = [0] * len(matrices)
        for place, i in enumerate(by_work):
            owner[i] = place % self.ranks.size
        return owner

    def __call__(self, directions: Sequence[Tensor], compute: Callable[[list[int], list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """`compute(numbers, whole directions)` gives the updates of some of the directions, by their numbers; this gives those of all, or the parts of them
        that this process holds."""
        owner = self.owners(directions)
        mine = [i for i, rank in enumerate(owner) if rank == self.ranks.rank]
        if not self.ranks.sharded:
            updates = compute(mine, [directions[i] for i in mine])
            return self._gathered(directions, owner, updates)
        updates = compute(mine, self._collected(directions, owner, mine))
        return self._returned(directions, owner, mine, updates)

    def _gathered(self, directions: Sequence[Tensor], owner: list[int], updates: list[Tensor]) -> list[Tensor]:
        """Every update, in every process."""
        sizes = [sum(d.numel() for d, rank in zip(directions, owner, strict=True) if rank == other) for other in range(self.ranks.size)]
        flat = directions[0].new_empty(max(sizes))  # gloo and NCCL gather equal pieces fastest
        if updates:
            torch.cat([update.flatten() for update in updates], out=flat[: sizes[self.ranks.rank]])
        pieces = [torch.empty_like(flat) for _ in sizes]
        dist.all_gather(pieces, flat)
        found: list[Tensor] = list(directions)
        for rank, piece in enumerate(pieces):
            numbers = [i for i, other in enumerate(owner) if other == rank]
            parts = piece[: sizes[rank]].split([directions[i].numel() for i in numbers])
            for i, part in zip(numbers, parts, strict=True):
                found[i] = part.view(directions[i].shape)
        return found

    def _rows(self, whole: int, rank: int) -> int:
        """Rows of a parameter that a process holds: as `torch.chunk` cuts them."""
        most = -(-whole // self.ranks.size)
        return max(0, min(most, whole - rank * most))

    def _collected(self, directions: Sequence[Any], owner: list[int], mine: list[int]) -> list[Tensor]:
        """My directions whole, of the parts that all processes hold."""
        size = self.ranks.size
        sent = [[directions[i].to_local() for i, rank in enumerate(owner) if rank == other] for other in range(size)]
        received = self._exchanged(sent, [[(self._rows(len(directions[i]), other), directions[i].shape[1]) for i in mine] for other in range(size)])
        return [torch.cat([received[rank][place] for rank in range(size)]) for place in range(len(mine))]

    def _returned(self, directions: Sequence[Any], owner: list[int], mine: list[int], updates: list[Tensor]) -> list[Tensor]:
        """Of every update the part that this process holds, placed as its direction."""
        from torch.distributed.tensor import DTensor

        size = self.ranks.size
        cut = [update.split([self._rows(len(update), rank) for rank in range(size)]) for update in updates]
        numbers = [[i for i, rank in enumerate(owner) if rank == other] for other in range(size)]
        received = self._exchanged([[parts[other] for parts in cut] for other in range(size)], [[directions[i].to_local().shape for i in of] for of in numbers])
        found: list[Tensor] = list(directions)
        for of, parts in zip(numbers, received, strict=True):
            for i, part in zip(of, parts, strict=True):
                like = directions[i]
                found[i] = DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
        return found

    def _exchanged(self, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
        """Send to each process some matrices; what each sent here has these shapes."""
        like = next(part for parts in sent for part in parts)
        flat = torch.cat([part.flatten() for parts in sent for part in parts])
        sizes = [[torch.Size(shape).numel() for shape in of] for of in shapes]
        received = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(received, flat, list(map(sum, sizes)), [sum(part.numel() for part in parts) for parts in sent])
        pieces = iter(received.split([size for of in sizes for size in of]))
        return [[next(pieces).view(shape) for shape in of] for of in shapes]
