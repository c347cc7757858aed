"""The machine at hand: device, precision and threads, chosen and said.

In: what was asked for. Out: a `Machine`, and a sentence that says what it is and why.
Refuses: a device that is not there, with what is.
"""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from nanogpt.config import MachineConfig
from nanogpt.errors import UserError


@dataclass(frozen=True)
class Machine:
    """Where tensors live, how precise the products are, and how many CPU threads make them."""

    device: torch.device
    dtype: torch.dtype
    threads: int

    def autocast(self) -> AbstractContextManager:
        """The context in which forward passes run: matrix products in `dtype`, everything else in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def settings(self) -> MachineConfig:
        """The choice, to be written down and made again on resume."""
        return MachineConfig(device=self.device.type, dtype=str(self.dtype).removeprefix("torch."), threads=self.threads)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        else:
            place = f"{self.device.type.upper()} ({platform.machine()}, {self.threads} thread{'s' * (self.threads > 1)})"
        return f"{place}, {str(self.dtype).removeprefix('torch.')}"


def choose(asked: MachineConfig) -> Machine:
    """Pick what was left open, and set the number of threads.

    Errors: `UserError` when the device asked for is not available.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = asked.device if asked.device != "auto" else next(name for name, usable in there.items() if usable)
    if not there[device]:
        usable = ", ".join(name for name, yes in there.items() if yes)
        build = "without CUDA: a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, and sees {torch.cuda.device_count()} GPUs"
        why = f" It was built {build}." if device == "cuda" else " It needs a Mac with an Apple GPU."
        raise UserError(
            f"--device {device} is not available to PyTorch {torch.__version__}.{why} It can use: {usable}.",
            "Leave --device out, and the best available device is used.",
        )
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        _keep_memory()
    fast_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = asked.dtype if asked.dtype != "auto" else "bfloat16" if fast_bf16 else "float32"
    return Machine(torch.device(device), getattr(torch, dtype), torch.get_num_threads())


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Turn PyTorch's error that memory ran out, which has a class of its own on GPUs only, into a `UserError` that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        raise UserError(f"There is not enough memory for {what}: {error}", "Lower --batch-size, --context-length, --n-embd or --n-layer.") from error


def _keep_memory() -> None:
    """Have glibc keep what is freed. Else it gives every large tensor back to the system, and each step waits for fresh zeroed
    pages again, which takes a third to a half of the seed recipe's time."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
