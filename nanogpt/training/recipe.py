"""Choose model shape and hyperparameters for a given text, machine and time budget.

The shape is the one with the lowest loss that a scaling law predicts (Hoffmann et al. 2022,
section 3.3) for the tokens that the machine can train on in that time. `benchmarks/recipe.py`
fits the constants to `benchmarks/recipe.csv`, character-level runs on one English text. The size
of the vocabulary changes the time per token, not the predicted loss.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from nanogpt import checkpoint
from nanogpt.config import ModelConfig, TrainingConfig, resolve
from nanogpt.device import measurements
from nanogpt.device.device import Machine
from nanogpt.optim import Optimizer
from nanogpt.plan.model_size import non_embedding_matmul_params

CONTEXT_LENGTH = 256
# Candidate (n_layer, n_embd), from small to large.
CANDIDATE_SHAPES = (
    (2, 64), (3, 96), (4, 128), (4, 160), (4, 192), (6, 256), (6, 320),
    (6, 384), (8, 448), (8, 512), (10, 640), (12, 768), (16, 1024), (24, 1024),
)  # fmt: skip
# Nats per token by which a larger model must beat a smaller one.
MIN_LOSS_GAIN = 0.002
# On 1/20 of Tiny Shakespeare, 18 parameters per token still helped and 39 did not.
MAX_PARAMETERS_PER_TOKEN = 18

WEIGHT_DECAY = 0.05
# Above this many epochs, Muon's weight decay shrinks weights by e^-DECAY_PER_EPOCH per epoch at the
# peak learning rate. The weights are then a moving average of their updates with a timescale of
# 1 / DECAY_PER_EPOCH epochs (Wang & Aitchison 2024). Ablations: docs/experiments.md.
MULTI_EPOCH_THRESHOLD = 3
DECAY_PER_EPOCH = 1.4
# Epochs of fewer steps count as this many, so that the weight decay of a tiny text stays bounded.
MIN_STEPS_PER_EPOCH = 20
# A run ends after this many epochs, even if the time allows more.
MAX_EPOCHS = 10
# AdamW, for which that weight decay was not tried, uses dropout above this many epochs instead.
DROPOUT_EPOCHS = 5
DROPOUT = 0.2

# Seconds of a run that go into the last evaluation and the last save. In short runs training keeps
# MIN_TRAIN_FRACTION of the time.
TEARDOWN_SECONDS = 4.0
MIN_TRAIN_FRACTION = 0.3
SECONDS_BETWEEN_EVALUATIONS = 45
# Below MIN_STEPS the batch size is halved, down to 4; above MAX_STEPS it is doubled.
MIN_STEPS = 100
MAX_STEPS = 8000
# Tokens in the batch that times a shape on a CPU; a GPU takes 8 times as many.
TIMING_TOKENS = 2048


@dataclass(frozen=True)
class ScalingLaw:
    """A fit of the reducible loss, L - E in Hoffmann et al. 2022: A / N^alpha + B / D^beta.

    N counts parameters of the block matrices and D training tokens, both in millions. Tokens of
    repeated epochs count for less: `repeat_decay` is R*_D of Muennighoff et al. 2023, equation 5.
    They found 15.4 for far larger texts and models. The fit describes the runs of
    benchmarks/recipe.csv that have the recipe's settings within 0.008 nats (rms).
    """

    A: float = 0.131
    alpha: float = 0.4
    B: float = 0.242
    beta: float = 0.6
    repeat_decay: float = 2.0


LAW = ScalingLaw()


@dataclass(frozen=True)
class ChosenSetting:
    """A setting that was chosen automatically, with a one-line reason."""

    name: str
    value: Any
    reason: str


def choose_settings(
    seconds: float,
    train_tokens: int,
    vocab_size: int,
    machine: Machine,
    user_settings: dict[str, Any],
    world_size: int = 1,
) -> list[ChosenSetting]:
    """Choose the settings of a run that takes `seconds`.

    Args:
        seconds: Time left for training, the last evaluation and the last save.
        train_tokens: Tokens in the training split.
        vocab_size: Size of the vocabulary.
        machine: The machine of this process.
        user_settings: Settings given by the user, which are kept.
        world_size: Number of processes, each assumed to be as fast as this one.

    Returns:
        The settings that the user did not give, each with its reason.

    Raises:
        UserError: If the user's settings contradict each other.
    """
    # A short text still gives several windows.
    context_length = min(CONTEXT_LENGTH, max(1, train_tokens // 4))
    base = {"arch": "qwen3", "context_length": context_length} | user_settings
    # The time of all processes added up, because each trains on its own tokens.
    train_seconds = world_size * max(1.0, MIN_TRAIN_FRACTION * seconds, seconds - TEARDOWN_SECONDS)
    model, tokens_in_time = _best_shape(base, train_seconds, train_tokens, vocab_size, machine)
    max_tokens = MAX_EPOCHS * train_tokens
    num_sequences = min(tokens_in_time, max_tokens) / model.context_length
    batch_size, steps = _choose_batch_size(num_sequences, machine, user_settings, world_size)
    num_evaluations = max(2, min(10, round(seconds / SECONDS_BETWEEN_EVALUATIONS)))
    eval_every = max(1, round(steps / num_evaluations))
    optimizer_choice = optimizer_settings(steps, user_settings.get("optimizer", "muon"))
    epochs = steps * batch_size * model.context_length / train_tokens
    regularization = _regularization(epochs, steps, optimizer_choice | user_settings)

    is_short = model.context_length < CONTEXT_LENGTH
    context_reason = "the text is short" if is_short else "a paragraph of context"
    minutes = user_settings.get("minutes") or seconds / 60
    shape = {"n_layer": model.n_layer, "n_embd": model.n_embd, "n_head": model.n_head}
    rounded_steps = float(f"{steps:.2g}")
    about_steps = f"about {rounded_steps:,.0f} steps"
    per_token = f"{non_embedding_matmul_params(model) / train_tokens:.2g} parameters per token"
    epochs_reason = f"at most {MAX_EPOCHS} epochs; the time allows more"
    choices: list[tuple[str, dict[str, Any]]] = [
        ("learns faster than gpt2", {"arch": base["arch"]}),
        (context_reason, {"context_length": model.context_length}),
        (f"lowest predicted loss in {minutes:.3g} min", shape),
        (about_steps, {"batch_size": batch_size, "eval_every": eval_every}),
        (f"{epochs:.2g} epochs, {per_token}", regularization),
        (epochs_reason, {"steps": math.ceil(steps)} if tokens_in_time > max_tokens else {}),
        (f"rates for {about_steps}", optimizer_choice),
    ]
    return [
        ChosenSetting(name, value, reason)
        for reason, values in choices
        for name, value in values.items()
        if name not in user_settings
    ]


def _choose_batch_size(
    num_sequences: float, machine: Machine, user_settings: dict[str, Any], world_size: int
) -> tuple[int, float]:
    """Return the batch size and the number of steps for training on `num_sequences`.

    The batch size is that of the user, or keeps the steps in range and splits across ranks.
    """
    batch_size = user_settings.get("batch_size") or (32 if machine.device.type == "cuda" else 8)
    steps = max(1.0, num_sequences / batch_size)
    if "batch_size" in user_settings:
        return batch_size, steps
    while steps < MIN_STEPS and batch_size > 4:
        batch_size, steps = batch_size // 2, steps * 2
    while steps > MAX_STEPS:
        batch_size, steps = batch_size * 2, steps / 2
    if batch_size % world_size:
        divisible = -(-batch_size // world_size) * world_size
        batch_size, steps = divisible, steps * batch_size / divisible
    return batch_size, steps


def _regularization(epochs: float, steps: float, settings: dict[str, Any]) -> dict[str, float]:
    """Return dropout and weight decay for the optimizer in `settings`."""
    if settings["optimizer"] == "muon":
        decay = muon_weight_decay(epochs, steps, settings["muon_learning_rate"])
        return {"dropout": 0.0, "weight_decay": decay}
    return {"dropout": DROPOUT if epochs > DROPOUT_EPOCHS else 0.0, "weight_decay": WEIGHT_DECAY}


def _best_shape(
    base: dict[str, Any], seconds: float, train_tokens: int, vocab_size: int, machine: Machine
) -> tuple[ModelConfig, float]:
    """Return the shape with the lowest predicted loss, and the tokens that fit into the time.

    The search runs from small to large. It stops at two shapes in a row that are no better, because
    a single timing can be disturbed by other programs.
    """
    best: tuple[float, ModelConfig, float] | None = None
    num_worse, max_tokens = 0, MAX_EPOCHS * train_tokens
    for n_layer, n_embd in CANDIDATE_SHAPES:
        model = _candidate_config(base, n_layer, n_embd)
        num_params = non_embedding_matmul_params(model)
        if best is not None and num_params > MAX_PARAMETERS_PER_TOKEN * train_tokens:
            break
        tokens_in_time = seconds / seconds_per_token(model, vocab_size, machine)
        loss = predicted_loss(num_params, min(tokens_in_time, max_tokens), train_tokens)
        if best is None or loss <= best[0] - MIN_LOSS_GAIN:
            best, num_worse = (loss, model, tokens_in_time), 0
            continue
        num_worse += 1
        if num_worse == 2:
            break
    assert best is not None
    return best[1:]


def _candidate_config(base: dict[str, Any], n_layer: int, n_embd: int) -> ModelConfig:
    """Return a valid shape near (n_layer, n_embd) that keeps the settings in `base`."""
    if "n_embd" not in base:
        # Each head needs an even number of channels, because RoPE rotates pairs.
        multiple = 2 * (base.get("n_head") or base.get("n_kv_head") or 1)
        n_embd = max(1, round(n_embd / multiple)) * multiple
    shape = {"n_layer": n_layer, "n_embd": n_embd}
    shape |= {name: value for name, value in base.items() if name in ModelConfig.model_fields}
    # Dropout follows from the number of epochs, which the timing of a shape decides.
    n_head = num_heads_for(shape["n_embd"], base.get("n_kv_head") or 1)
    return resolve({"n_head": n_head} | shape | {"dropout": 0.0}).model


def predicted_loss(num_params: float, tokens_seen: float, train_tokens: float) -> float:
    """Return the predicted reducible loss, in nats per token.

    Args:
        num_params: Parameters of the block matrices.
        tokens_seen: Training tokens, repeated epochs included.
        train_tokens: Tokens in the training split.
    """
    repeat_epochs = max(0.0, tokens_seen / train_tokens - 1)
    repeat_value = LAW.repeat_decay * (1 - math.exp(-repeat_epochs / LAW.repeat_decay))
    effective_tokens = min(tokens_seen, train_tokens) * (1 + repeat_value)
    model_term = LAW.A / (num_params / 1e6) ** LAW.alpha
    return model_term + LAW.B / (effective_tokens / 1e6) ** LAW.beta


def optimizer_settings(steps: float, optimizer: str = "muon") -> dict[str, Any]:
    """Return the optimizer, peak learning rates and schedule for a run of `steps` steps.

    Shorter runs get higher rates. The longest run in benchmarks/recipe.csv has 4,050 steps; rates
    beyond it are extrapolated. AdamW's rate is 1/5 of Muon's for the parameters that Muon does not
    update, and 1/20 of it if AdamW updates all.
    """
    muon_rate = min(0.06, max(0.015, 0.03 * (800 / steps) ** 0.35))
    return {
        "optimizer": optimizer,
        "learning_rate": round(muon_rate / 5 if optimizer == "muon" else muon_rate / 20, 4),
        "muon_learning_rate": round(muon_rate, 3),
        "warmup_steps": 20,
        "cooldown_fraction": 0.7,
    }


def muon_weight_decay(epochs: float, steps: float, learning_rate: float) -> float:
    """Return the weight decay of Muon for `epochs` epochs at a peak `learning_rate`."""
    if epochs <= MULTI_EPOCH_THRESHOLD:
        return WEIGHT_DECAY
    steps_per_epoch = max(MIN_STEPS_PER_EPOCH, steps / epochs)
    return round(DECAY_PER_EPOCH / (learning_rate * steps_per_epoch), 2)


def num_heads_for(n_embd: int, n_kv_head: int = 1) -> int:
    """Return a number of heads that divides `n_embd` and is a multiple of `n_kv_head`.

    Heads have about 64 channels, or about 32 in models narrower than 128. The number of channels is
    even, because RoPE rotates pairs.
    """
    max_heads = max(n_kv_head, n_embd // (64 if n_embd >= 128 else 32))
    for heads in range(max_heads, 0, -1):
        if n_embd % (2 * heads) == 0 and heads % n_kv_head == 0:
            return heads
    return n_kv_head  # No number of heads fits; `resolve` reports it.


def seconds_per_token(model: ModelConfig, vocab_size: int, machine: Machine) -> float:
    """Measure the seconds that an eager training step with Muon takes per token.

    Contexts above TIMING_TOKENS are timed at that length. The result is the fastest of four steps,
    measured once per shape and cached.
    """
    context_length = min(model.context_length, TIMING_TOKENS)
    model = model.model_copy(update={"context_length": context_length})
    tokens = TIMING_TOKENS if machine.device.type != "cuda" else 8 * TIMING_TOKENS
    batch_size = max(1, tokens // context_length)
    # Round the vocabulary up to a multiple of 128, or of 1/32 to 1/16 of its size, so that texts
    # with similar vocabularies share a measurement.
    granularity = max(128, 2 ** vocab_size.bit_length() // 32)
    vocab_size = -(-vocab_size // granularity) * granularity

    def measure() -> float:
        network = checkpoint.build_uninitialized(model, vocab_size, "cpu")
        network.init_weights(torch.Generator().manual_seed(0))
        network.to(machine.device)
        optimizer = Optimizer(
            network, TrainingConfig(optimizer="muon"), network.muon_param_splits(), machine.dtype
        )
        x = torch.zeros(batch_size, context_length, dtype=torch.int64, device=machine.device)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            with machine.autocast():
                loss = network.loss_sum(x, x)
            loss.backward()
            optimizer.step(0.0)
            optimizer.zero_grad()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        return min(times[1:]) / x.numel()

    key = f"token {model} {vocab_size} {machine.dtype}"
    return measurements.cached_measurement(key, machine.device, measure)
