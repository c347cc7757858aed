"""Memory of the machine: how much there is and is free, and what to say when it runs out.

In: a device, or an error of PyTorch. Out: bytes, or a `UserError` that says what to lower.
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanogpt.errors import UserError

CGROUP = Path("/sys/fs/cgroup")  # where Linux tells of a container's memory


def memory_of(device: torch.device) -> float | None:
    """Bytes of memory of the device; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def free_memory(device: torch.device) -> float | None:
    """Bytes of it that can be had now; None where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [memory_of(device)]
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits.append(1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with suppress(OSError, ValueError, KeyError):  # of a container; "max" where there is none
        limit, used = (float((CGROUP / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        limits.append(max(0.0, limit - used + float(kept["inactive_file"]) + float(kept["active_file"])))  # files in memory make room
    return min((limit for limit in limits if limit is not None), default=None)


def out_of_memory(error: Exception) -> bool:
    """Whether it is PyTorch's error that memory ran out, which has a class of its own on GPUs only."""
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn PyTorch's error that memory ran out into a `UserError` that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"There is not enough memory for {what}: {error}", "Lower --context-length, --n-embd or --n-layer.") from error


def keep_memory() -> None:
    """Have glibc keep what is freed. Else it gives every large tensor back to the system, and each step waits for fresh zeroed
    pages again, which takes a third to a half of the seed recipe's time."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
