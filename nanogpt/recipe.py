"""The best settings for a text, a machine and a time, each with its reason.

In: seconds, how much text of how many different tokens, a machine, and the settings that somebody gave. Out: the other settings.

The shape is the one with the lowest loss that a law of parameters and tokens foresees (Hoffmann et al. 2022, section 3.3), given how many steps of it this
machine takes in the time. The law's constants come from short experiments: `benchmarks/recipe.py` makes them, and its table is benchmarks/recipe.csv. What
has no row there says so. All of it was measured on characters: a larger vocabulary counts by the time that it takes, not by how much more its tokens tell.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt import checkpoint, machine
from nanogpt.config import ModelConfig, TrainingConfig, resolve
from nanogpt.machine import Machine
from nanogpt.optim import Optimizer
from nanogpt.plan import body_parameters

CONTEXT = 256
SHAPES = (  # layers and width
    (2, 64), (3, 96), (4, 128), (4, 160), (4, 192), (6, 256), (6, 320), (6, 384), (8, 448), (8, 512), (10, 640), (12, 768), (16, 1024), (24, 1024),
)  # fmt: skip
# The law: loss = floor + A / (parameters / 1e6)^a + B / (tokens / 1e6)^b, where text that was read before teaches ever less (Muennighoff et al. 2023, eq. 5:
# REREADING is R*_D, which they found to be 15.4 for far larger texts and models); fitted to benchmarks/recipe.csv, which it describes within 0.008 (rms).
A, a, B, b, REREADING = 0.131, 0.4, 0.242, 0.6, 2
WORTH = 0.002  # nats that a larger model has to gain
PARAMETERS_PER_TOKEN = 18  # at most: a twentieth of Tiny Shakespeare gained from so many, and not from 39
# What is read often is best forgotten as it is read: with a weight decay by which, at the highest rate, weights shrink e^1.4 times in a reading (Wang and
# Aitchison 2024, "How to set AdamW's weight decay as you scale model and dataset size": what stays the same is the time that it takes, in readings). From the
# same table, by 6 layers of 256 on all of the text: read 3 times 1.388 with it and 1.376 without, 4.6 times 1.371 and 1.395, 6 times 1.357 and 1.410; as the
# steps of a run are foreseen to within a third at best, it is done from three readings on. Half as much of it, or half as much again, lost 0.01 (6 layers of
# 320, 5 readings). Dropout gained nothing with it or instead of it: after 6 readings 1.376 (0.1, with) and 1.392 (0.2, instead); a quarter, read 8 times by 4
# layers of 128, came to 1.803 with it, to 1.903 without, and with dropout as well to 1.842. From the sixth reading on little is gained: all of the text 1.363
# after 8, a quarter 1.820 after 6, 1.803 after 8 and 1.822 after 12. A twentieth, read 10 times, came to 2.142, and to 2.174 without it and read 6 times (no
# row).
OFTEN, FORGETTING, MOST_EPOCHS, DECAY = 3, 1.4, 10, 0.05
DROPOUT, VERY_OFTEN = 0.2, 5  # instead, for AdamW, with which nothing of this was tried: Muon with the usual decay gained by it from six readings on
FEWEST_STEPS = 20  # in which a reading may be forgotten: the least that a row has
FINISHING = 4.0  # seconds of a run that go into the last evaluation, and into saving
SAMPLE_TOKENS = 2048  # on which a shape is timed
FEW_STEPS, MANY_STEPS = 100, 8000  # below, half the batch teaches more; above, twice the batch costs nothing; no rows


@dataclass(frozen=True)
class Choice:
    """A setting that the recipe chose, and why, in a line."""

    name: str
    value: Any
    reason: str


def choose(seconds: float, tokens: int, vocab_size: int, place: Machine, given: dict[str, Any], processes: int = 1) -> list[Choice]:
    """The settings for a run of so many seconds on a text of so many training tokens; what is `given` stays, and the others fit it. Of many `processes` each
    is taken to be as fast as this one, and gets as many rows of a batch.

    Errors: `UserError` for settings that contradict each other.
    """
    chosen: list[Choice] = []

    def pick(reason: str, **values: Any) -> None:
        chosen.extend(Choice(name, value, reason) for name, value in values.items() if name not in given)

    stepping = max(1.0, 0.3 * seconds, seconds - FINISHING)
    base = {"arch": "modern", "context_length": min(CONTEXT, max(1, tokens // 4))} | given
    rows = given.get("batch_size") or (32 if place.device.type == "cuda" else 8)
    model, read = _best_shape(base, processes * stepping, tokens, vocab_size, place)
    most = MOST_EPOCHS * tokens
    steps = max(1.0, min(read, most) / (rows * model.context_length))
    if "batch_size" not in given:
        while steps < FEW_STEPS and rows > 4:
            rows, steps = rows // 2, steps * 2
        while steps > MANY_STEPS:
            rows, steps = rows * 2, steps / 2
        if rows % processes:
            even = -(-rows // processes) * processes
            steps, rows = steps * rows / even, even
    epochs = steps * rows * model.context_length / tokens
    count = f"{float(f'{steps:.2g}'):,.0f}"
    pick("learns faster than classic", arch=base["arch"])
    few = model.context_length < CONTEXT
    pick("the text is short" if few else "fifty words or more to look back on", context_length=model.context_length)
    pick("has learned most after so long, of the shapes tried", n_layer=model.n_layer, n_embd=model.n_embd, n_head=model.n_head)
    evaluations = max(2, min(10, round(seconds / 45)))
    pick(f"for about {count} steps", batch_size=rows, eval_every=max(1, round(steps / evaluations)))
    rates = learning(steps, given.get("optimizer", "muon")) | given
    if rates["optimizer"] == "muon":
        dropout, decay = 0.0, decay_for(epochs, steps, rates["matrix_learning_rate"])
    else:
        dropout, decay = DROPOUT if epochs > VERY_OFTEN else 0.0, DECAY
    per_token = body_parameters(model) / tokens
    pick(f"the text is read {epochs:.2g} times, by {per_token:.2g} parameters for each token of it", dropout=dropout, weight_decay=decay)
    if read > most:
        pick(f"fewer than the time allows: the text would be read more than {MOST_EPOCHS} times", steps=math.ceil(steps))
    pick(f"suit a run of {count} steps", **learning(steps, rates["optimizer"]))
    return chosen


def _best_shape(given: dict[str, Any], seconds: float, tokens: int, vocab_size: int, place: Machine) -> tuple[ModelConfig, float]:
    """The shape with the lowest loss to be foreseen, and how many tokens it reads in the time; from small to large, until two in a row are no better: the
    time of one may have been measured while something else ran."""
    best: tuple[float, ModelConfig, float] | None = None
    worse, most = 0, MOST_EPOCHS * tokens
    for n_layer, n_embd in SHAPES:
        model = _fitted(given, n_layer, n_embd)
        if best is not None and body_parameters(model) > PARAMETERS_PER_TOKEN * tokens:
            break
        read = seconds / token_seconds(model, vocab_size, place)
        loss = foreseen(body_parameters(model), min(read, most), tokens)
        if best is None or loss <= best[0] - WORTH:
            best, worse = (loss, model, read), 0
            continue
        worse += 1
        if worse == 2:
            break
    assert best is not None
    return best[1:]


def _fitted(given: dict[str, Any], n_layer: int, n_embd: int) -> ModelConfig:
    """A shape in which what was given stays, and the width can be shared among the heads."""
    heads = given.get("n_head") or given.get("n_kv_head") or 1
    if "n_embd" not in given:
        n_embd = max(1, round(n_embd / (2 * heads))) * 2 * heads
    shape = {"n_layer": n_layer, "n_embd": n_embd} | {name: value for name, value in given.items() if name in ModelConfig.model_fields}
    return resolve({"n_head": heads_for(shape["n_embd"], given.get("n_kv_head") or 1)} | shape | {"dropout": 0.0}).model


def foreseen(parameters: float, read: float, tokens: float) -> float:
    """The loss, less its floor, of a model that reads so many tokens of a text of `tokens`; reading again counts for less (Muennighoff et al. 2023, eq. 5)."""
    again = max(0.0, read / tokens - 1)
    worth = min(read, tokens) * (1 + REREADING * (1 - math.exp(-again / REREADING)))
    return A / (parameters / 1e6) ** a + B / (worth / 1e6) ** b


def learning(steps: float, optimizer: str = "muon") -> dict[str, Any]:
    """Settings of the optimiser for a run of so many steps: the fewer, the higher the rate, as the rows of the table with other rates have it.

    With 3 layers of 96, 0.058 was the best of 0.029, 0.058 and 0.116 after 150 steps, and 0.038 by 0.006 of 0.0095, 0.019 and 0.038 after 1,350; larger
    models want less: 4 layers of 128 came to 1.456 with 0.020 and to 1.460 with 0.031, after 1,200 steps. No row is longer than 4,050.
    """
    rate = min(0.06, max(0.015, 0.03 * (800 / steps) ** 0.35))
    return {
        "optimizer": optimizer,
        "learning_rate": round(rate / 5 if optimizer == "muon" else rate / 20, 4),
        "matrix_learning_rate": round(rate, 3),
        "warmup_steps": 20,
        "cooldown": 0.7,
    }


def decay_for(epochs: float, steps: float, rate: float) -> float:
    """The weight decay of Muon for a text that is read so many times in so many steps, `rate` being the highest."""
    return DECAY if epochs <= OFTEN else round(FORGETTING / (rate * max(FEWEST_STEPS, steps / epochs)), 2)


def heads_for(n_embd: int, n_kv_head: int = 1) -> int:
    """Heads of 64 channels, or of 32 in a narrow model, such that they share the width, and the heads of keys and values serve equally many."""
    most = max(n_kv_head, n_embd // (64 if n_embd >= 128 else 32))
    fitting = (heads for heads in range(most, 0, -1) if n_embd % (2 * heads) == 0 and heads % n_kv_head == 0)
    return next(fitting, n_kv_head)


def token_seconds(model: ModelConfig, vocab_size: int, place: Machine) -> float:
    """What a token costs in training steps of this shape on this machine, without a compiler: the fastest of four, measured once and kept."""
    model = model.model_copy(update={"context_length": min(model.context_length, SAMPLE_TOKENS)})
    rows = max(1, (SAMPLE_TOKENS if place.device.type != "cuda" else 8 * SAMPLE_TOKENS) // model.context_length)
    step = max(128, 2 ** vocab_size.bit_length() // 32)
    vocab_size = -(-vocab_size // step) * step  # so that texts with about as many tokens share a measurement

    def measure() -> float:
        network = checkpoint.empty_model(model, vocab_size, "cpu")
        network.init_weights(torch.Generator().manual_seed(0))
        network.to(place.device)
        optimizer = Optimizer(network, TrainingConfig(optimizer="muon"), network.matrices(), place.dtype)
        x = torch.zeros(rows, model.context_length, dtype=torch.int64, device=place.device)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            with place.autocast():
                nats = network.nats(x, x)
            nats.backward()
            optimizer.step(0.0)
            nats.item()  # a GPU has done it only then
            times.append(time.perf_counter() - begin)
        return min(times[1:]) / x.numel()

    return machine.once(f"token {model} {vocab_size} {place.dtype}", place.device, measure)
