"""The best settings for a text, a machine and a time, each with its reason.

In: minutes, how much text of how many different tokens, a machine, and the settings that somebody gave. Out: the other settings.

What is chosen follows from one figure, the arithmetic that fits into the time on this machine, and from how often the text is read meanwhile.
The numbers below are fitted to short experiments, which `benchmarks/recipe.py` makes; its table is in benchmarks/recipe.md.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt import checkpoint, machine
from nanogpt.config import ModelConfig, TrainingConfig
from nanogpt.machine import Machine
from nanogpt.optim import Optimizer
from nanogpt.plan import flops_per_token, parameters

CONTEXT = 256
SHAPES = (
    (2, 64),
    (3, 96),
    (4, 128),
    (4, 160),
    (4, 192),
    (5, 224),
    (6, 256),
    (6, 320),
    (6, 384),
    (8, 448),
    (8, 512),
    (10, 640),
    (12, 768),
    (16, 1024),
    (24, 1024),
)
BEST_PARAMETERS, BEST_FLOPS, GROWTH = 0.8e6, 1e13, 0.5  # so many parameters are best for so much arithmetic, and grow with this power of it
USED = 0.85  # of the time goes into steps; the rest into starting, evaluating and writing


@dataclass(frozen=True)
class Choice:
    """A setting that the recipe chose, and why, in a line."""

    name: str
    value: Any
    reason: str


def choose(minutes: float, tokens: int, vocab_size: int, place: Machine, given: dict[str, Any]) -> list[Choice]:
    """The settings for a run of so many minutes on a text of so many training tokens; what is `given` stays, and what follows from it follows."""
    chosen: list[Choice] = []

    def pick(name: str, value: Any, reason: str) -> Any:
        if name in given:
            return given[name]
        chosen.append(Choice(name, value, reason))
        return value

    speed = training_speed(place)
    flops = 60 * minutes * USED * speed
    arch = pick("arch", "modern", "learns faster than classic")
    optimizer = pick("optimizer", "muon", "needs about half the steps of adamw")
    context = pick("context_length", min(CONTEXT, max(1, tokens // 4)), "the text is short" if tokens // 4 < CONTEXT else "some fifty words to look back on")

    def shape_of(n_layer: int, n_embd: int) -> ModelConfig:
        n_layer, n_embd = given.get("n_layer", n_layer), given.get("n_embd", n_embd)
        heads = given.get("n_head") or heads_for(n_embd)
        if "n_embd" not in given:
            n_embd = max(1, round(n_embd / (2 * heads))) * 2 * heads
        return ModelConfig(arch=arch, n_layer=n_layer, n_head=heads, n_embd=n_embd, context_length=context)

    best = BEST_PARAMETERS * (flops / BEST_FLOPS) ** GROWTH
    sizes = {shape_of(*shape): abs(body(shape_of(*shape), vocab_size) / best - 1) for shape in SHAPES}
    model = min(sizes, key=lambda shape: sizes[shape])
    per_token = flops_per_token(model, vocab_size)
    why = f"{minutes:g} minutes at {speed / 1e9:,.0f} GFLOP/s are best spent on {best / 1e6:.2g} M parameters"
    pick("n_layer", model.n_layer, why)
    pick("n_embd", model.n_embd, why)
    pick("n_head", model.n_head, f"{model.n_embd // model.n_head} channels each")
    rows = pick("batch_size", 8, "small batches learn most from each token")
    steps = max(1, int(flops / per_token / (rows * context)))
    epochs = steps * rows * context / tokens
    pick("dropout", 0.0, f"the text is read {epochs:.2g} times")
    pick("weight_decay", 0.05, "")
    pick("learning_rate", 3e-3 if optimizer == "muon" else 1e-3, "")
    pick("matrix_learning_rate", 0.02, "")
    pick("warmup_steps", 20, "")
    pick("cooldown", 0.5, "")
    pick("eval_every", max(1, steps // (5 if minutes <= 5 else 10)), f"about {steps:,} steps fit into the time")
    return chosen


def learning(steps: float) -> dict[str, Any]:
    """Settings of the optimiser for a run of so many steps: the fewer, the higher the rate."""
    rate = min(0.06, max(0.015, 0.025 * (800 / steps) ** 0.5))
    return {
        "optimizer": "muon",
        "learning_rate": round(rate / 5, 4),
        "matrix_learning_rate": round(rate, 3),
        "warmup_steps": 20,
        "cooldown": 0.7,
        "weight_decay": 0.05,
    }


def heads_for(n_embd: int) -> int:
    """Heads of 64 channels, or 32 where there would be few, such that they share the width."""
    per_head = 64 if n_embd >= 256 else 32
    return next(heads for heads in range(max(1, n_embd // per_head), 0, -1) if (n_embd % heads == 0 and n_embd // heads % 2 == 0) or heads == 1)


def body(model: ModelConfig, vocab_size: int) -> int:
    """Parameters of the blocks."""
    counts = parameters(model, vocab_size)
    return counts["attention"] + counts["feed-forward"]


def training_speed(place: Machine) -> float:
    """FLOP/s of training steps on this machine, without a compiler, by a few of them; measured once and kept."""
    small = place.device.type != "cuda"
    model = ModelConfig(arch="modern", n_layer=4 if small else 12, n_head=4 if small else 12, n_embd=128 if small else 768, dropout=0.0)
    rows, vocab_size = 8 if small else 32, 65

    def measure() -> float:
        network = checkpoint.empty_model(model, vocab_size, "cpu")
        network.init_weights(torch.Generator().manual_seed(0))
        network.to(place.device)
        optimizer = Optimizer(network, TrainingConfig(optimizer="muon"), network.matrices())
        x = torch.randint(vocab_size, (rows, model.context_length), device=place.device)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            with place.autocast():
                nats = network.nats(x, x)
            nats.backward()
            optimizer.step(0.0)
            nats.item()
            times.append(time.perf_counter() - begin)
        return rows * model.context_length * flops_per_token(model, vocab_size) / min(times[1:])

    return machine.once(f"training speed {place.dtype}", place.device, measure)
