"""torch.compile: when it is worth its compile time, and how a training step uses it."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch._functorch.config  # no public API for the partitioner's recomputation settings
from torch import Tensor, nn

from nanogpt.config import ModelConfig
from nanogpt.device import measurements
from nanogpt.device.device import Machine
from nanogpt.device.measurements import MIN_SPEEDUP, get_cached, put_cached
from nanogpt.device.memory import is_oom_error

# Seconds to compile a step on two cores, with an empty and with a filled compiler cache.
COLD_COMPILE_SECONDS = 25.0
WARM_COMPILE_SECONDS = 4.0
# Assumed speedup of a compiled step before it was measured. An H200 measured 4.3 with the `nano`
# preset; larger models gain less.
DEFAULT_SPEEDUP = {"cpu": 1.3, "cuda": 2.0}


def should_compile(
    machine: Machine, model: ModelConfig, batch_size: int, seconds: float
) -> tuple[bool, str]:
    """Return whether compiling shortens a run of an expected duration, and the reason.

    Args:
        machine: The device, with its attention implementation already chosen.
        model: The model's shape.
        batch_size: Sequences per step.
        seconds: Expected duration of the eager run.
    """
    if machine.device.type == "mps" or sys.platform == "win32":
        return False, "not supported on Windows and Apple GPUs"
    key = _compile_cache_key(machine, model)
    speedup = get_cached(f"compile speedup {key}", machine.device)
    speedup = speedup or DEFAULT_SPEEDUP[machine.device.type]
    if speedup < MIN_SPEEDUP:
        return False, "an earlier run on this machine was no faster compiled"
    benefit = f"steps become about {speedup:.1f} times as fast; compiling takes about"
    too_short = "too long for this run"
    # Searching for a compiler takes seconds, so rule out short runs first.
    if not _amortizes(WARM_COMPILE_SECONDS, speedup, seconds):
        return False, f"{benefit} {WARM_COMPILE_SECONDS:.0f} s or more, {too_short}"
    if not has_compiler(machine.device):
        if machine.device.type == "cpu":
            return False, "no C++ compiler was found; install g++ or clang++ to speed up long runs"
        return False, "Triton was not found"
    cost = get_cached(f"compile seconds {key}", machine.device) or COLD_COMPILE_SECONDS
    if compile_marker_path(machine, model, batch_size).exists():
        cost = WARM_COMPILE_SECONDS
    if not _amortizes(cost, speedup, seconds):
        return False, f"{benefit} {cost:.0f} s, {too_short}"
    return True, f"{benefit} {cost:.0f} s"


def _amortizes(cost: float, speedup: float, seconds: float) -> bool:
    """Return True if compiling saves more than 5 % of a run of `seconds`."""
    return seconds / speedup + cost < 0.95 * seconds


def record_compile(
    machine: Machine,
    model: ModelConfig,
    batch_size: int,
    seconds: float,
    speedup: Callable[[], float],
) -> None:
    """Cache the compile time and the speedup of a training step.

    Args:
        machine: The device that the step was compiled for.
        model: The model's shape.
        batch_size: Sequences per step.
        seconds: Measured compile time.
        speedup: Measures the speedup; called if no earlier measurement is cached.
    """
    key = _compile_cache_key(machine, model)
    marker = compile_marker_path(machine, model, batch_size)
    if not marker.exists():
        put_cached(f"compile seconds {key}", machine.device, seconds)
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    try:
        measurements.cached_measurement(f"compile speedup {key}", machine.device, speedup)
    except RuntimeError as error:
        # The eager step may run out of memory where the compiled step fits.
        if not is_oom_error(error):
            raise


def record_compile_failure(machine: Machine, model: ModelConfig) -> None:
    """Cache that this model fails to compile, so that later runs default to eager."""
    put_cached(f"compile speedup {_compile_cache_key(machine, model)}", machine.device, 1.0)


def _compile_cache_key(machine: Machine, model: ModelConfig) -> str:
    """Return a key shared by models that compile alike."""
    dropout = " dropout" if model.dropout > 0 else ""
    shape = f"{model.arch} n_embd {model.n_embd}{dropout}"
    return f"{shape} {machine.dtype} {machine.attention}"


def has_compiler(device: torch.device) -> bool:
    """Return True if torch.compile works here: with Triton on a GPU, a C++ compiler on a CPU."""
    # PyTorch has no public way to ask for its compilers.
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False


def compile_loss(
    machine: Machine, model: nn.Module, loss_sum: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Return the loss function such that its first call compiles it.

    A GPU compiles the full function with CUDA graphs. A CPU compiles the blocks separately: they
    share one compiled graph, which takes a fifth of the compile time. There, element-wise results
    such as dropout masks are recomputed in the backward pass, which is cheaper than storing them.
    """
    if machine.device.type == "cuda":
        return torch.compile(loss_sum, mode="reduce-overhead", dynamic=False)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)
    allow_recompute = torch._functorch.config.patch(
        ban_recompute_used_far_apart=False, ban_recompute_long_fusible_chains=False
    )
    return allow_recompute(loss_sum)


def compile_marker_path(machine: Machine, model: ModelConfig, batch_size: int) -> Path:
    """Return the path of the file that exists once a step of this shape was compiled.

    The file lives in the compiler's own cache, so that both are deleted together.
    """
    # The location of the compiler's cache is not public.
    from torch._inductor.runtime.cache_dir_utils import cache_dir as compiler_cache_dir

    setup = (
        f"{model} {batch_size} {machine.device} {machine.dtype} {machine.threads} "
        f"{machine.attention} {torch.__version__} {sys.prefix}"
    )
    digest = hashlib.sha256(setup.encode()).hexdigest()
    return Path(compiler_cache_dir()) / f"nanogpt-{digest[:20]}"


@contextmanager
def force_eager() -> Iterator[None]:
    """Run compiled modules eagerly, in a `with` block or in a decorated function.

    Shapes other than those of a training step would otherwise each be compiled.
    """
    # Importing the compiler takes a second. If it was not imported, nothing is compiled.
    is_imported = "torch._dynamo" in sys.modules
    with torch.compiler.set_stance("force_eager") if is_imported else nullcontext():
        yield
