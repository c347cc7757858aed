"""Benchmarks of this machine, cached on disk.

Capabilities are benchmarked, not looked up by CPU name: a virtual machine may report a CPU whose
vector units it does not expose.
"""

import json
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from nanogpt.errors import UserError
from nanogpt.files import cache_dir, write_text

# A smaller measured speedup is noise, and the simpler alternative is chosen.
MIN_SPEEDUP = 1.2


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matmul, an upper bound for a training step (cached)."""

    def measure() -> float:
        peak = 0.0
        for n in (512, 1024, 2048) if device.type != "cuda" else (8192,):
            x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            seconds = benchmark_seconds(partial(F.linear, x, w), device)
            peak = max(peak, 2 * n**3 / seconds)
            # A slow machine reaches its peak with the smaller sizes.
            if seconds > 0.1:
                break
        return peak

    return cached_measurement(f"peak {dtype}", device, measure)


def benchmark_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time of five calls, in seconds, after one warm-up call."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def cached_measurement(name: str, device: torch.device, measure: Callable[[], float]) -> float:
    """Return the cached measurement of this name, or call `measure` and cache its result."""
    value = get_cached(name, device)
    return value if value is not None else put_cached(name, device, measure())


def get_cached(name: str, device: torch.device) -> float | None:
    """Return a measurement of this device, PyTorch version and thread count, or None."""
    value = _load_cache().get(_cache_key(name, device))
    return value if isinstance(value, float) else None


def put_cached(name: str, device: torch.device, value: float) -> float:
    """Cache a measurement and return it; an unwritable cache is ignored."""
    with suppress(OSError, UserError):
        cache = _load_cache() | {_cache_key(name, device): value}
        write_text(_cache_file(), json.dumps(cache, indent=1))
    return value


def _load_cache() -> dict[str, object]:
    try:
        cache = json.loads(_cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _cache_file() -> Path:
    return cache_dir() / "measurements.json"


def _cache_key(name: str, device: torch.device) -> str:
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.node()} {cpu_name()} {torch.get_num_threads()} threads"
    return f"{hardware}, torch {torch.__version__}: {name}"


def cpu_name() -> str:
    """Return the CPU name that the system reports, to tell machines apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
