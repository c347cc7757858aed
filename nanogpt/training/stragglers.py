"""Detection of ranks that are slower than the others."""

import statistics
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanogpt.device.device import Machine
from nanogpt.distributed.context import DistContext
from nanogpt.errors import Notice

# Ranks slower than this multiple of the median are reported: all others wait for them.
STRAGGLER_RATIO = 1.5


@dataclass(eq=False)
class StragglerDetector:
    """Measures the compute time of this rank and compares it with that of the others.

    Args:
        machine: The device whose work is timed.
        dist: The ranks to compare.
        log_path: File with the timings, named in the warning.
    """

    machine: Machine
    dist: DistContext
    log_path: Path
    compute_events: list[Any] = field(init=False, default_factory=list)
    compute_seconds: float = field(init=False, default=0.0)
    compute_steps: int = field(init=False, default=0)

    def record_start(self) -> None:
        """Mark the start of a step on the device."""
        self.compute_events = [self.machine.record_event()]

    def record_end(self) -> None:
        """Mark the end of the work that needs no other rank."""
        self.compute_events.append(self.machine.record_event())

    def add_step(self) -> None:
        """Add the recorded step. The device must have finished it."""
        start, end = self.compute_events
        self.compute_seconds += self.machine.elapsed_seconds(start, end)
        self.compute_steps += 1

    def check_stragglers(self) -> list[float]:
        """Warn of slow ranks; return the mean seconds per step since the last check, by rank."""
        seconds = self.dist.all_gather_object(self.compute_seconds / self.compute_steps)
        self.compute_seconds = 0.0
        self.compute_steps = 0
        median_seconds = statistics.median(seconds)
        stragglers = [
            f"rank {rank} ({rank_seconds / median_seconds:.1f}x the median)"
            for rank, rank_seconds in enumerate(seconds)
            if rank_seconds > STRAGGLER_RATIO * median_seconds
        ]
        if stragglers and self.dist.is_main_process:
            warnings.warn(
                f"Slow ranks, which all others wait for in every step: {', '.join(stragglers)}. "
                f"All timings are in {self.log_path}.",
                Notice,
                stacklevel=2,
            )
        return seconds
