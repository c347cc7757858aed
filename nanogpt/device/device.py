"""Select the device, precision and number of threads that a model runs with."""

import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.config import TrainDeviceConfig
from nanogpt.device import measurements
from nanogpt.device.measurements import MIN_SPEEDUP
from nanogpt.device.memory import tune_malloc
from nanogpt.errors import UserError


@dataclass(frozen=True)
class Machine:
    """A device and how a model runs on it.

    Attributes:
        device: The device that holds all tensors.
        dtype: The precision of matmuls.
        threads: The number of CPU threads.
        attention: The attention implementation, "sdpa" or "eager".
        compile: Whether the training step is compiled.
        deterministic: Whether only deterministic kernels are used.
        parallel: Data parallelism across processes, "ddp" or "fsdp".
    """

    device: torch.device
    dtype: torch.dtype
    threads: int
    attention: str = "sdpa"
    compile: bool = False
    deterministic: bool = False
    parallel: str = "ddp"

    def autocast(self) -> AbstractContextManager:
        """Return the context for forward passes: matmuls in `dtype`, all else in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        # With FSDP the cache would keep a 16-bit copy of all gathered weights.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.parallel != "fsdp")

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the device; the copy to a CUDA GPU is asynchronous."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def record_event(self) -> Any:
        """Record a timestamp in the device's stream of work."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_seconds(self, start: Any, end: Any) -> float:
        """Return the seconds between two recorded events that the device has completed."""
        if self.device.type == "cuda":
            return start.elapsed_time(end) / 1000
        return end - start

    def to_config(self) -> TrainDeviceConfig:
        """Return the settings that select this machine again."""
        dtype = str(self.dtype).removeprefix("torch.")
        return TrainDeviceConfig(**vars(self) | {"device": self.device.type, "dtype": dtype})

    def for_decoding(self) -> "Machine":
        """Return the machine with the precision for decoding one sequence.

        On a CPU this is float32: decoding is bound by reading weights, and autocast would convert
        all weights again for every token.
        """
        return replace(self, dtype=torch.float32) if self.device.type == "cpu" else self

    def __str__(self) -> str:
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
            name = f"{self.device.type.upper()} ({platform.machine()}, {threads})"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}"


def select_device(
    config: TrainDeviceConfig, local_rank: int | None = None, local_world_size: int = 1
) -> Machine:
    """Select device, precision and threads where the settings leave them open.

    Sets PyTorch's threads, determinism and float32 matmul precision for this process. Processes
    on one machine use a GPU each, or equal parts of the CPU cores. Where the settings leave
    attention and torch.compile open, they are left to `autotune.autotune_for_training`.

    Args:
        config: The device settings.
        local_rank: Index of this process on its machine, or None if it trains alone.
        local_world_size: Number of processes on this machine.

    Raises:
        UserError: The device is not available.
    """
    device_type = _available_device_type(config.device)
    device = torch.device(device_type)
    if device_type == "cuda" and local_rank is not None:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device_type == "cpu" and platform.libc_ver()[0] == "glibc":
        tune_malloc()
    _set_determinism(device_type, config.deterministic)
    if local_rank is not None:
        max_threads = max(1, (os.cpu_count() or 1) // local_world_size)
        torch.set_num_threads(min(config.threads or max_threads, max_threads))
    elif config.threads or device_type == "cpu":
        torch.set_num_threads(config.threads or _best_num_threads(device))
    if config.dtype == "auto":
        dtype = torch.bfloat16 if _bfloat16_is_faster(device) else torch.float32
    else:
        dtype = getattr(torch, config.dtype)
    if device_type == "cuda":
        # With bfloat16, the few matmuls left in float32 may use TF32. With float32, all are exact.
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    return Machine(
        device,
        dtype,
        threads=torch.get_num_threads(),
        attention="sdpa" if config.attention == "auto" else config.attention,
        compile=bool(config.compile),
        deterministic=config.deterministic,
        parallel=config.parallel,
    )


def _available_device_type(name: str) -> str:
    """Return the requested device type, or the best available one for "auto"."""
    has_gpu = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(device_type for device_type, found in has_gpu.items() if found), "cpu"]
    if name == "auto":
        return available[0]
    if name in available:
        return name
    if name != "cuda":
        reason = "It needs a Mac with an Apple GPU."
    elif torch.version.cuda is None:
        reason = "This build of PyTorch has no CUDA support."
    else:
        reason = f"PyTorch supports CUDA {torch.version.cuda} but finds no usable GPU."
    raise UserError(
        f"The device {name} is not available to PyTorch {torch.__version__}. {reason} "
        f"Available devices: {', '.join(available)}.",
        fix={"device": available[0]},
    )


def _set_determinism(device_type: str, deterministic: bool) -> None:
    if device_type == "cuda" and deterministic:
        # Older versions of cuBLAS require this to be deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Calling this imports the compiler, which takes a second.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)


def _best_num_threads(device: torch.device) -> int:
    """Return the number of CPU threads that computes a small layer fastest (cached).

    PyTorch's default of one thread per core is too many where a container may use only a fraction
    of the CPU time. Fewer threads are chosen only if they are clearly faster.
    """
    default = torch.get_num_threads()
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((512, 256), (1024, 256)))

    def layer() -> None:
        F.silu(F.linear(x, w)).sum().backward()

    def measure() -> float:
        seconds = {}
        for threads in (default >> halvings for halvings in range(default.bit_length())):
            torch.set_num_threads(threads)
            seconds[threads] = measurements.benchmark_seconds(layer, device)
        # The key of the cache contains the number of threads.
        torch.set_num_threads(default)
        fastest = min(seconds, key=seconds.__getitem__)
        is_faster = MIN_SPEEDUP * seconds[fastest] < seconds[default]
        return float(fastest if is_faster else default)

    return int(measurements.cached_measurement("threads", device, measure))


def _bfloat16_is_faster(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    bfloat16 = measurements.peak_flops(device, torch.bfloat16)
    return bfloat16 > MIN_SPEEDUP * measurements.peak_flops(device, torch.float32)
