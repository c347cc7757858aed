"""Apply DDP or FSDP to a model that knows nothing of either.

DDP is PyTorch's DistributedDataParallel (Li et al. 2020, "PyTorch Distributed"). FSDP is its
`fully_shard` (Zhao et al. 2023, "PyTorch FSDP"), which keeps each parameter as a DTensor sharded
by rows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from nanogpt.distributed.context import DistContext

LossFn = Callable[..., Tensor]
ContextFn = Callable[[], AbstractContextManager]


class LossModule(nn.Module):
    """A loss function as a module, which DistributedDataParallel requires."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the loss of the inputs."""
        return self.loss_fn(*inputs)


def apply_fsdp(model: nn.Module, methods: Sequence[str]) -> None:
    """Shard the parameters of a model by rows over all ranks.

    The parameters of a block are gathered when it computes.

    Args:
        model: A model with a list of `blocks`.
        methods: Names of the model's methods that gather the other parameters when called.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    for method in methods:
        register_fsdp_forward_method(model, method)


def parallelize(
    model: nn.Module, loss_fn: LossFn, context: DistContext
) -> tuple[LossFn, ContextFn, ContextFn]:
    """Return a loss function whose backward pass averages the gradients over all ranks.

    DDP copies the weights of rank 0 to all ranks. With FSDP, gradients are reduced after every
    micro-batch, since full gradients would not fit into memory.

    Returns:
        The loss function; the context for all micro-batches of a step but the last (`no_sync`); and
        a context without communication (`no_comm`), for timing this rank alone.
    """
    if context.world_size == 1:
        return loss_fn, nullcontext, nullcontext
    if context.is_fsdp:
        return loss_fn, nullcontext, lambda: _no_comm(model)
    loss_module = LossModule(model, loss_fn)
    ddp = nn.parallel.DistributedDataParallel(loss_module, gradient_as_bucket_view=True)
    return ddp, ddp.no_sync, ddp.no_sync


@contextmanager
def _no_comm(model: nn.Module) -> Iterator[None]:
    """Replace FSDP's collectives by local copies: right shapes, wrong values."""
    # The setters below are public, but the default collectives and their base classes are not.
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import (
        DefaultAllGather,
        DefaultReduceScatter,
    )

    class LocalAllGather(DefaultAllGather):
        def __call__(
            self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
        ) -> None:
            for rank, shard in enumerate(output_tensor.chunk(group.size())):
                # The shard of this rank is a view of the input.
                if rank != group.rank():
                    shard.copy_(input_tensor)

    class LocalReduceScatter(DefaultReduceScatter):
        def __call__(  # type: ignore[override]
            self,
            output_tensor: Tensor,
            input_tensor: Tensor,
            group: Any,
            op: Any,
            async_op: bool = False,
        ) -> None:
            output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    def set_collectives(gather: DefaultAllGather, scatter: DefaultReduceScatter) -> None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)

    set_collectives(LocalAllGather(), LocalReduceScatter())
    try:
        yield
    finally:
        set_collectives(DefaultAllGather(), DefaultReduceScatter())
