"""Distribute Muon's matrix updates over the ranks of a data-parallel run."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanogpt.distributed.context import DistContext


class DistributedMuon:
    """Computes each matrix update on one rank, its owner, and shares the result with all.

    Muon needs the full matrix. With DDP every rank has it; with FSDP its shards are sent to the
    owner. Owners are assigned round-robin in the order of decreasing work.
    """

    def __init__(self, context: DistContext):
        self.context = context

    def __call__(
        self,
        directions: Sequence[Tensor],
        compute: Callable[[list[int], list[Tensor]], list[Tensor]],
    ) -> list[Tensor]:
        """Return the updates of all directions, sharded like the directions.

        Args:
            directions: The momentum matrices, each (rows, columns).
            compute: Maps indices and full directions to the updates of these directions.
        """
        indices = self._assign_owners(directions)
        owned = indices[self.context.rank]
        if not self.context.is_fsdp:
            updates = compute(owned, [directions[i] for i in owned])
            return self._all_gather_updates(directions, indices, updates)
        updates = compute(owned, self._gather_full(directions, indices))
        return self._scatter_updates(directions, indices, updates)

    def _assign_owners(self, matrices: Sequence[Tensor]) -> list[list[int]]:
        """Return, for each rank, the indices of the matrices that it owns."""
        work = [matrix.numel() * min(matrix.shape) for matrix in matrices]
        by_work = sorted(range(len(matrices)), key=lambda i: -work[i])
        num_ranks = self.context.world_size
        return [sorted(by_work[rank::num_ranks]) for rank in range(num_ranks)]

    def _all_gather_updates(
        self, directions: Sequence[Tensor], indices: list[list[int]], updates: list[Tensor]
    ) -> list[Tensor]:
        """Return all updates, given those of this rank."""
        sizes = [[directions[i].numel() for i in owned] for owned in indices]
        # gloo and NCCL gather buffers of equal size fastest.
        flat = directions[0].new_empty(max(map(sum, sizes)))
        if updates:
            num_elements = sum(sizes[self.context.rank])
            torch.cat([update.flatten() for update in updates], out=flat[:num_elements])
        buffers = [torch.empty_like(flat) for _ in sizes]
        dist.all_gather(buffers, flat)
        gathered: list[Tensor] = list(directions)
        for owned, buffer, owned_sizes in zip(indices, buffers, sizes, strict=True):
            chunks = buffer[: sum(owned_sizes)].split(owned_sizes)
            for i, chunk in zip(owned, chunks, strict=True):
                gathered[i] = chunk.view(directions[i].shape)
        return gathered

    def _shard_rows(self, num_rows: int) -> list[int]:
        """Return the number of rows in each rank's shard, cut as by `torch.chunk`."""
        num_ranks = self.context.world_size
        max_rows = -(-num_rows // num_ranks)
        return [max(0, min(max_rows, num_rows - rank * max_rows)) for rank in range(num_ranks)]

    def _gather_full(self, directions: Sequence[Any], indices: list[list[int]]) -> list[Tensor]:
        """Return the full directions that this rank owns."""
        sent = [[directions[i].to_local() for i in owned] for owned in indices]
        owned = [directions[i] for i in indices[self.context.rank]]
        shapes: list[list[tuple[int, ...]]] = [
            [(self._shard_rows(len(matrix))[rank], matrix.shape[1]) for matrix in owned]
            for rank in range(self.context.world_size)
        ]
        received = self._all_to_all(sent, shapes)
        return [torch.cat(shards) for shards in zip(*received, strict=True)]

    def _scatter_updates(
        self, directions: Sequence[Any], indices: list[list[int]], updates: list[Tensor]
    ) -> list[Tensor]:
        """Return this rank's shards of all updates, as DTensors placed like the directions."""
        from torch.distributed.tensor import DTensor

        shards_of_updates = [update.split(self._shard_rows(len(update))) for update in updates]
        ranks = range(self.context.world_size)
        sent = [[shards[rank] for shards in shards_of_updates] for rank in ranks]
        shapes = [[directions[i].to_local().shape for i in owned] for owned in indices]
        received = self._all_to_all(sent, shapes)
        scattered: list[Tensor] = list(directions)
        for owned, shards in zip(indices, received, strict=True):
            for i, shard in zip(owned, shards, strict=True):
                mesh, placements = directions[i].device_mesh, directions[i].placements
                shape, stride = directions[i].shape, directions[i].stride()
                scattered[i] = DTensor.from_local(
                    shard, mesh, placements, run_check=False, shape=shape, stride=stride
                )
        return scattered

    def _all_to_all(
        self, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Send a list of tensors to each rank; `shapes` are those received from each rank."""
        flat = torch.cat([tensor.flatten() for of_rank in sent for tensor in of_rank])
        sizes = [[math.prod(shape) for shape in of_rank] for of_rank in shapes]
        received_sizes = [sum(of_rank) for of_rank in sizes]
        sent_sizes = [sum(tensor.numel() for tensor in of_rank) for of_rank in sent]
        received = flat.new_empty(sum(received_sizes))
        dist.all_to_all_single(received, flat, received_sizes, sent_sizes)
        chunks = iter(received.split([size for of_rank in sizes for size in of_rank]))
        return [[next(chunks).view(shape) for shape in of_rank] for of_rank in shapes]
