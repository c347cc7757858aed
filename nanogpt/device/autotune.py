"""Choose the attention implementation and torch.compile for a training run by benchmarks."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt.config import ModelConfig, TrainDeviceConfig
from nanogpt.device import measurements
from nanogpt.device.compile import should_compile
from nanogpt.device.device import Machine
from nanogpt.device.measurements import MIN_SPEEDUP

BENCHMARK_TOKENS = 4096
# Above this many bytes, eager attention is not benchmarked.
MAX_BENCHMARK_BYTES = 2**31


def autotune_for_training(
    machine: Machine, config: TrainDeviceConfig, model: ModelConfig, batch_size: int, seconds: float
) -> tuple[Machine, dict[str, str]]:
    """Choose the attention implementation and torch.compile where the settings leave them open.

    Args:
        machine: The device that was selected for `config`.
        config: The device settings; `attention = auto` and `compile = None` are open.
        model: The model's shape.
        batch_size: Sequences per step.
        seconds: Expected duration of the run.

    Returns:
        The machine with both settings chosen, and the reason for each chosen setting.
    """
    reasons: dict[str, str] = {}
    if config.dtype == "auto" and machine.device.type == "cpu":
        bfloat16 = measurements.peak_flops(machine.device, torch.bfloat16) / 1e9
        float32 = measurements.peak_flops(machine.device, torch.float32) / 1e9
        reasons["dtype"] = f"matmul: {bfloat16:,.0f} GFLOP/s bfloat16, {float32:,.0f} float32"
    if config.attention == "auto":
        attention, reasons["attention"] = _benchmark_attention(machine, model)
        machine = replace(machine, attention=attention)
    if config.compile is None:
        is_compiled, reasons["compile"] = should_compile(machine, model, batch_size, seconds)
        machine = replace(machine, compile=is_compiled)
    return machine, reasons


def _benchmark_attention(machine: Machine, model: ModelConfig) -> tuple[str, str]:
    """Return the faster attention implementation, "sdpa" or "eager", and the reason."""
    if model.arch == "gpt2" and model.dropout:
        return "eager", "attention dropout needs the probabilities"
    if machine.device.type != "cpu":
        return "sdpa", "the GPU has a fused kernel"
    T, H = model.context_length, model.n_head
    D = model.head_size
    B = max(1, BENCHMARK_TOKENS // T)
    # Scores, probabilities and their gradients take about 16 bytes an element.
    if B * T * H * max(T, D) * 16 > MAX_BENCHMARK_BYTES:
        return "sdpa", "the context is long"

    def measure(implementation: str) -> float:
        q, k, v = (
            torch.randn(B, H, T, D, dtype=machine.dtype, requires_grad=True) for _ in range(3)
        )
        mask = torch.full((T, T), -math.inf).triu(1)

        def attention() -> Tensor:
            if implementation == "sdpa":
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return ((q @ k.mT).float() + mask).softmax(dim=3).to(v.dtype) @ v

        return measurements.benchmark_seconds(lambda: attention().sum().backward(), machine.device)

    def cached(implementation: str) -> float:
        name = f"attention {implementation} {T} {H} {D} {machine.dtype}"
        return measurements.cached_measurement(
            name, machine.device, lambda: measure(implementation)
        )

    eager, sdpa = cached("eager"), cached("sdpa")
    reason = f"{BENCHMARK_TOKENS:,} tokens: {1e3 * eager:.3g} ms eager, {1e3 * sdpa:.3g} ms sdpa"
    return "eager" if MIN_SPEEDUP * eager < sdpa else "sdpa", reason
