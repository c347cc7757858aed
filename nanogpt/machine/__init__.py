"""The machine at hand: device, precision, threads, attention and compiler, chosen by measuring and said.

In: what was asked for, and the shape of what is to run. Out: a `Machine`, and a sentence that says what it is and why.
Refuses: a device that is not there, with what is.

What is measured is kept in the cache, so that the same machine makes the same choice again. A processor's name is never
asked what it can do: the same name may be a virtual machine without its units.
"""

import hashlib
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.config import MachineConfig, ModelConfig
from nanogpt.errors import UserError
from nanogpt.files import cache_dir, write_text
from nanogpt.machine.memory import free_memory, keep_memory, memory_for, memory_of, out_of_memory
from nanogpt.machine.parallel import Division, shard, spread
from nanogpt.machine.ranks import Ranks, join

__all__ = [
    "Division", "Machine", "Ranks", "choose", "compiled", "compiled_before", "eager", "for_training", "free_memory", "has_compiler", "join", "known",
    "memory_for", "memory_of", "note_compiling", "note_failure", "once", "out_of_memory", "peak", "remember", "shard", "spread", "uncompiled",
]  # fmt: skip

FASTER = 1.2  # a measured gain below this is noise, and the simpler choice stays
COLD_SECONDS, WARM_SECONDS = 25.0, 4.0  # what compiling a step takes on two cores, the first time and again; 21 s the first time beside an H200
# Of a compiled step over an eager one, where none was measured yet. On an H200 the seed's recipe became 4.3 times as fast, a larger model gains less.
USUAL_GAIN = {"cpu": 1.3, "cuda": 2.0}


@dataclass(frozen=True)
class Machine:
    """Where tensors live, how precise the products are, how many CPU threads make them, and how a training step runs."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    attention: str = "fused"
    compile: bool = False
    deterministic: bool = False
    parallel: str = "ddp"

    def autocast(self) -> AbstractContextManager:
        """The context in which forward passes run: matrix products in `dtype`, everything else in float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self.parallel != "fsdp")  # it would keep all weights, whole, in 16 bits

    def send(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, or on its way there where that is safe: a CUDA GPU goes on meanwhile."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor.to(self.device)

    def moment(self) -> Any:
        """Now, in the work of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two moments, when the device has come past them."""
        return begin.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - begin

    def settings(self) -> MachineConfig:
        """The choice, to be written down and made again on resume."""
        return MachineConfig(
            device=self.device.type,  # type: ignore[arg-type]
            dtype=str(self.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            threads=self.threads,
            compile=self.compile,
            attention=self.attention,  # type: ignore[arg-type]
            deterministic=self.deterministic,
            parallel=self.parallel,  # type: ignore[arg-type]
        )

    def for_single_rows(self) -> "Machine":
        """The same for writing one text: there a CPU reads weights more than it multiplies, and casting them for every token costs more than it saves."""
        return replace(self, dtype=torch.float32) if self.device.type == "cpu" else self

    def __str__(self) -> str:
        if self.device.type == "cuda":
            place = torch.cuda.get_device_name(self.device)
        else:
            place = f"{self.device.type.upper()} ({platform.machine()}, {self.threads} thread{'s' * (self.threads > 1)})"
        return f"{place}, {str(self.dtype).removeprefix('torch.')}"


def choose(asked: MachineConfig, ranks: Ranks = Ranks()) -> Machine:
    """Pick device, precision and threads where they were left open, and set the threads. How a step runs is left to `for_training`.

    Processes that share a machine have a GPU each, or share the processor's cores.

    Errors: `UserError` when the device asked for is not available.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = asked.device if asked.device != "auto" else next(name for name, usable in there.items() if usable)
    if not there[name]:
        usable = ", ".join(name for name, yes in there.items() if yes)
        build = "without CUDA: a CPU build" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}, and sees {torch.cuda.device_count()} GPUs"
        why = f" It was built {build}." if name == "cuda" else " It needs a Mac with an Apple GPU."
        raise UserError(
            f"--device {name} is not available to PyTorch {torch.__version__}.{why} It can use: {usable}.",
            f"Use --device {next(name for name, yes in there.items() if yes)}.",
        )
    device = torch.device(name, ranks.local_rank) if name == "cuda" and ranks.size > 1 else torch.device(name)
    if name == "cuda" and ranks.size > 1:
        torch.cuda.set_device(device)
    if name == "cpu" and platform.libc_ver()[0] == "glibc":
        keep_memory()
    if name == "cuda" and asked.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which older versions ask for
    if asked.deterministic != torch.are_deterministic_algorithms_enabled():  # saying so imports the compiler, which takes a second
        torch.use_deterministic_algorithms(asked.deterministic)
    share = max(1, (os.cpu_count() or 1) // ranks.local_size) if ranks.size > 1 else None
    torch.set_num_threads(min(asked.threads or share, share) if share else asked.threads or _threads(device))
    name_of_dtype = asked.dtype if asked.dtype != "auto" else "bfloat16" if _bfloat16_pays(device) else "float32"
    dtype = getattr(torch, name_of_dtype)
    if name == "cuda":  # the few products left in float32 may use TF32; asked for float32, they are exact
        torch.set_float32_matmul_precision("high" if dtype == torch.bfloat16 else "highest")
    return Machine(device, dtype, torch.get_num_threads(), deterministic=asked.deterministic, parallel=asked.parallel)


def for_training(place: Machine, asked: MachineConfig, model: ModelConfig, batch_size: int, seconds: float) -> tuple[Machine, dict[str, str]]:
    """The same machine with attention and compiler chosen, for the steps of a run that is expected to take `seconds`; and why, for each setting chosen."""
    reasons: dict[str, str] = {}
    attention, compiled = str(asked.attention), asked.compile
    if asked.dtype == "auto" and place.device.type == "cpu":
        bfloat16, float32 = (peak(place.device, dtype) / 1e9 for dtype in (torch.bfloat16, torch.float32))
        reasons["dtype"] = f"products take {bfloat16:,.0f} GFLOP/s in bfloat16, {float32:,.0f} in float32"
    if attention == "auto":
        attention, reasons["attention"] = _faster_attention(place, model)
    place = replace(place, attention=attention)
    if compiled is None:
        compiled, reasons["compile"] = _compiling_pays(place, model, batch_size, seconds)
    return replace(place, compile=compiled), reasons


def _compiling_pays(place: Machine, model: ModelConfig, batch_size: int, seconds: float) -> tuple[bool, str]:
    """Whether compiled steps win back what compiling takes, and why."""
    if place.device.type == "mps" or sys.platform == "win32":
        return False, "not tried on Windows and Apple's GPUs"
    gain = known(f"compiled gain {_kind(place, model)}", place.device) or USUAL_GAIN[place.device.type]
    if gain < FASTER:
        return False, "steps were no faster compiled when it was tried here"
    gains = f"steps become about {gain:.1f} times as fast, for about"
    if not _repays(WARM_SECONDS, gain, seconds):  # at once: looking for a compiler takes seconds itself
        return False, f"{gains} {WARM_SECONDS:.0f} s or more, which the run is too short for"
    if not has_compiler(place.device):
        return False, "no C++ compiler was found; with one (g++ or clang++), long runs are faster" if place.device.type == "cpu" else "no Triton was found"
    cold = known(f"compiling {_kind(place, model)}", place.device) or COLD_SECONDS
    cost = WARM_SECONDS if compiled_before(place, model, batch_size).exists() else cold
    pays = _repays(cost, gain, seconds)
    return pays, f"{gains} {cost:.0f} s" + ("" if pays else ", which the run is too short for")


def _repays(cost: float, gain: float, seconds: float) -> bool:
    """Whether a run of so many seconds gains a twentieth of them and more by compiling."""
    return seconds / gain + cost < 0.95 * seconds


def note_compiling(place: Machine, model: ModelConfig, batch_size: int, seconds: float, gain: Callable[[], float]) -> None:
    """Keep, for later choices, that a step of this shape was compiled, how long that took, and how many times as fast it became."""
    marker = compiled_before(place, model, batch_size)
    if not marker.exists():
        remember(f"compiling {_kind(place, model)}", place.device, seconds)
        with suppress(OSError):
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    try:
        once(f"compiled gain {_kind(place, model)}", place.device, gain)
    except RuntimeError as error:  # a step that fits compiled need not fit otherwise
        if not out_of_memory(error):
            raise


def note_failure(place: Machine, model: ModelConfig) -> None:
    """Keep that such a model could not be compiled, so that it is not tried again of itself."""
    remember(f"compiled gain {_kind(place, model)}", place.device, 1.0)


def _kind(place: Machine, model: ModelConfig) -> str:
    """Models that are alike to a compiler."""
    return f"{model.arch} {model.n_embd} wide{' with dropout' * (model.dropout > 0)} {place.dtype} {place.attention}"


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the most that a step could reach; measured once and kept."""

    def measure() -> float:
        fastest = 0.0
        for n in (512, 1024, 2048) if device.type != "cuda" else (8192,):
            x, w = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            seconds = _seconds(lambda x=x, w=w: F.linear(x, w), device)  # type: ignore[misc]
            fastest = max(fastest, 2 * n**3 / seconds)
            if seconds > 0.1:  # a slow machine shows what it can on smaller ones
                break
        return fastest

    return once(f"peak {dtype}", device, measure)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds what it needs: Triton for a GPU, a C++ compiler that works for a CPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False


def compiled(place: Machine, model: nn.Module, nats: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`nats`, the loss of the model, such that it runs compiled from the first call on, which compiles.

    On a CPU each block is compiled for itself: all are alike, so that one is compiled instead of all, in a fifth of the time. On a GPU it is the whole,
    with CUDA graphs. Gradients' inputs are computed anew where that is element-wise work, which costs less than storing them: dropout masks above all.
    """
    if place.device.type == "cuda":
        return torch.compile(nats, mode="reduce-overhead", dynamic=False)
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(dynamic=False)

    def compiling(*inputs: Tensor) -> Tensor:
        with torch._functorch.config.patch(ban_recompute_used_far_apart=False, ban_recompute_long_fusible_chains=False):
            return nats(*inputs)

    return compiling


def uncompiled(nats: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`nats` as it was before its blocks were compiled, which did not succeed."""

    def plain(*inputs: Tensor) -> Tensor:
        with eager():
            return nats(*inputs)

    return plain


def compiled_before(place: Machine, model: ModelConfig, batch_size: int) -> Path:
    """The file that stands beside the compiler's own cache once a step of this shape was compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir as compiler_cache

    how = f"{model} {batch_size} {place.device} {place.dtype} {place.threads} {place.attention} {torch.__version__} {sys.prefix}"
    return Path(compiler_cache()) / f"nanogpt-{hashlib.sha256(how.encode()).hexdigest()[:20]}"


def eager() -> AbstractContextManager:
    """The context in which a compiled model runs as it was before: for other shapes than those of a training step, which would all be compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()  # which takes long to import


def _threads(device: torch.device) -> int:
    return _useful_threads(device) if device.type == "cpu" else torch.get_num_threads()


def _useful_threads(device: torch.device) -> int:
    """How many CPU threads do the work of a small layer fastest: as many as PyTorch takes, one for each core, unless fewer are clearly faster, as where a
    container may use only a part of the cores' time."""
    usual = torch.get_num_threads()
    x, w = (torch.randn(shape, requires_grad=True) for shape in ((512, 256), (1024, 256)))

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        return _seconds(lambda: F.silu(F.linear(x, w)).sum().backward(), device)

    def measure() -> float:
        times = {threads: seconds(threads) for threads in (usual >> halvings for halvings in range(usual.bit_length()))}
        torch.set_num_threads(usual)  # by which figures are kept
        fastest = min(times, key=lambda threads: times[threads])
        return float(fastest if FASTER * times[fastest] < times[usual] else usual)

    return int(once("threads", device, measure))


def _bfloat16_pays(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and peak(device, torch.bfloat16) > FASTER * peak(device, torch.float32)


def _faster_attention(place: Machine, model: ModelConfig) -> tuple[str, str]:
    """ "plain" or "fused", by timing both, forward and backward, on 4,096 tokens of the context at hand; and why."""
    if model.arch == "classic" and model.dropout:
        return "plain", "dropout acts on its probabilities"
    if place.device.type != "cpu":
        return "fused", "GPUs have a kernel for it"
    T, H, D = model.context_length, model.n_head, model.n_embd // model.n_head
    rows = max(1, 4096 // T)

    def measure(fused: bool) -> float:
        q, k, v = (torch.randn(rows, H, T, D, dtype=place.dtype, requires_grad=True) for _ in range(3))
        mask = torch.full((T, T), -math.inf).triu(1)

        def attend() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True) if fused else ((q @ k.mT).float() + mask).softmax(dim=3).to(v.dtype) @ v

        return _seconds(lambda: attend().sum().backward(), place.device)

    if rows * T * H * max(T, D) * 16 > 2**31:  # bytes of scores, probabilities and their gradients
        return "fused", "the context is long"
    plain, fused = (once(f"attention {T} {H} {D} {place.dtype} fused={fused}", place.device, partial(measure, fused)) for fused in (False, True))
    why = f"4,096 tokens take {1e3 * plain:.3g} ms plain, {1e3 * fused:.3g} ms fused"
    return "plain" if FASTER * plain < fused else "fused", why


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs, after one that does not count."""
    times = []
    for _ in range(6):
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def once(what: str, device: torch.device, measure: Callable[[], float]) -> float:
    """A figure of this machine: as it was measured before, or measured now and kept."""
    figure = known(what, device)
    return figure if figure is not None else remember(what, device, measure())


def known(what: str, device: torch.device) -> float | None:
    """A figure of this machine, as it was measured before with the same PyTorch and threads."""
    figure = _figures().get(_key(what, device))
    return figure if isinstance(figure, float) else None


def remember(what: str, device: torch.device, figure: float) -> float:
    """Keep a figure that was measured, if it can be kept, and give it back."""
    with suppress(OSError, UserError):
        write_text(_figures_file(), json.dumps(_figures() | {_key(what, device): figure}, indent=1))
    return figure


def _figures() -> dict[str, object]:
    try:
        figures = json.loads(_figures_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


def _figures_file() -> Path:
    return cache_dir() / "machine.json"


def _key(what: str, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.node()} {processor()} {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}: {what}"


def processor() -> str:
    """What the system calls its processor: only to notice another machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
