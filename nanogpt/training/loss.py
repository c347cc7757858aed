"""The training loss: compiled and data-parallel, with a fallback to eager mode."""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor

from nanogpt.device import compile
from nanogpt.device.device import Machine
from nanogpt.device.memory import is_oom_error
from nanogpt.distributed import parallelize
from nanogpt.distributed.context import DistContext
from nanogpt.errors import Notice
from nanogpt.model import GPT


class TrainLoss:
    """The summed loss of a micro-batch, compiled and parallelized as the run requires.

    With several ranks, the backward pass leaves the mean of all ranks' gradients on each rank.
    """

    def __init__(self, model: GPT, machine: Machine, dist: DistContext):
        self.model = model
        self.machine = machine
        self.dist = dist
        self.loss_sum: Callable[..., Tensor] = model.loss_sum
        if machine.compile:
            self.loss_sum = compile.compile_loss(machine, model, model.loss_sum)
        self.parallel_loss, self.no_sync, self.no_comm = parallelize.parallelize(
            model, lambda *inputs: self.loss_sum(*inputs), dist
        )

    def __call__(self, x: Tensor, y: Tensor, dropout_seeds: Tensor) -> Tensor:
        """Return the loss, (), in nats, summed over the targets y (B, T) of the inputs x (B, T)."""
        return self.parallel_loss(x, y, dropout_seeds)

    def sync_context(self, is_last: bool, communicate: bool) -> AbstractContextManager:
        """Return the context of a micro-batch: only the last one averages the gradients."""
        if not communicate:
            return self.no_comm()
        return nullcontext() if is_last else self.no_sync()

    def try_compile(self, dry_run: Callable[[], float], batch_size: int) -> None:
        """Compile the loss by a dry run, or fall back to eager mode with a notice.

        Args:
            dry_run: Runs forward and backward without an update; returns its seconds.
            batch_size: Sequences per step, a part of the key under which results are cached.
        """
        start = time.perf_counter()
        failure: str | None = None
        try:
            dry_run()
        except Exception as error:  # torch.compile raises errors of many classes
            if is_oom_error(error):
                raise
            failure = str(error)
        seconds = time.perf_counter() - start
        (any_failed,) = self.dist.any_rank(failure is not None)
        if any_failed:
            first_lines = ["on another rank"] if failure is None else failure.split("\n")[:2]
            reason = " ".join(first_lines).strip()[:200] or "no reason given"
            message = f"torch.compile failed; training continues without it, slower ({reason})."
            warnings.warn(message, Notice, stacklevel=2)
            self.model.zero_grad(set_to_none=True)
            # The blocks that failed to compile would otherwise be compiled again.
            self.loss_sum = compile.force_eager()(self.model.loss_sum)
            compile.record_compile_failure(self.machine, self.model.config)
            return

        def measure_speedup() -> float:
            compiled_seconds = min(dry_run() for _ in range(2))
            with compile.force_eager():
                return min(dry_run() for _ in range(2)) / compiled_seconds

        compile.record_compile(
            self.machine, self.model.config, batch_size, seconds, measure_speedup
        )
