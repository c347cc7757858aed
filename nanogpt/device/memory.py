"""Device memory: its size, what is available, and errors when it runs out."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nanogpt.errors import UserError

# Linux reports a container's memory limit and use here (cgroup v2).
CGROUP_FOLDER = Path("/sys/fs/cgroup")
# Options of glibc's mallopt, from malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def total_memory(device: torch.device) -> float | None:
    """Return the bytes of memory of a device, or None if the system does not report it."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return None


def available_memory(device: torch.device) -> float | None:
    """Return the bytes that can be allocated now, or None if the system does not report it.

    On a CPU this respects the memory limit of a container.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    limits = [total_memory(device)]
    with suppress(OSError, KeyError, ValueError):
        kibibytes = _read_table(Path("/proc/meminfo"))["MemAvailable:"]
        limits.append(1024 * float(kibibytes))
    # Without a container limit, memory.max contains the word "max".
    with suppress(OSError, KeyError, ValueError):
        limit = float((CGROUP_FOLDER / "memory.max").read_text(encoding="ascii"))
        used = float((CGROUP_FOLDER / "memory.current").read_text(encoding="ascii"))
        stat = _read_table(CGROUP_FOLDER / "memory.stat")
        # The kernel drops cached files when memory is needed.
        cached = float(stat["inactive_file"]) + float(stat["active_file"])
        limits.append(max(0.0, limit - used + cached))
    return min((limit for limit in limits if limit is not None), default=None)


def _read_table(path: Path) -> dict[str, str]:
    """Read a file with a name and a value on each line."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {name: value for name, value, *_ in map(str.split, lines)}


def is_oom_error(error: Exception) -> bool:
    """Return True if an error of PyTorch means that memory ran out.

    `torch.OutOfMemoryError` is raised on GPUs only, so this compares messages.
    """
    return "out of memory" in str(error) or "can't allocate memory" in str(error)


@contextmanager
def explain_oom(what: str) -> Iterator[None]:
    """Replace an out-of-memory error of PyTorch by a `UserError`.

    Args:
        what: What needs the memory, as a noun phrase.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_oom_error(error):
            raise
        raise UserError(
            f"There is not enough memory for {what}: {error}",
            "Lower context_length, n_embd or n_layer.",
        ) from error


def tune_malloc() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    By default glibc unmaps every large tensor, and each step waits for new zeroed pages. With the
    `nano` preset this takes a third to a half of the step time.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
