"""`plan`: what a run will take, from formulas with their sources."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanogpt.config import ModelConfig, TrainDeviceConfig, TrainingConfig
from nanogpt.errors import UserError
from nanogpt.formatting import format_sig
from nanogpt.gpu_specs import Cluster
from nanogpt.plan import model_size
from nanogpt.plan.communication import StepCost, estimate_step
from nanogpt.plan.corpus_cost import CorpusCost

# Compute-optimal ratio (Hoffmann et al. 2022, table 3).
TOKENS_PER_PARAMETER = 20
# Up to 4 epochs, repeated text is worth as much as new text; beyond 16 it is worth little
# (Muennighoff et al. 2023, section 6).
FULL_VALUE_EPOCHS = 4
MAX_USEFUL_EPOCHS = 16
# The clusters that are tried if a model does not fit.
DEVICES_PER_NODE = (2, 4, 8)
MAX_NODES = 4096


@dataclass(frozen=True)
class Plan:
    """The predicted size and cost of a run, without evaluations.

    Attributes:
        parameters: Number of parameters of each part of the model.
        memory: Bytes on each device, by use.
        tokens_per_step: Tokens per optimizer step on all devices.
        micro_batch_size: Sequences per forward pass on a device.
        activation_checkpointing: Whether activations are recomputed in the backward pass.
        parallel: Data parallelism, "ddp" or "fsdp".
        steps: Number of optimizer steps.
        flops_per_token: FLOPs of training on one token.
        cluster: The devices.
        step: Time and communication of a step.
        fits: Whether the step fits into a device's memory.
        fix: The smallest change of settings that makes it fit, if it does not and one exists.
        price: Price per device-hour, in any currency.
        corpus: Cost of preparing the corpus, if its size is known.
        notes: Sentences about the choice of model size and number of tokens.
    """

    parameters: dict[str, int]
    memory: dict[str, float]
    tokens_per_step: int
    micro_batch_size: int
    activation_checkpointing: bool
    parallel: str
    steps: int
    flops_per_token: float
    cluster: Cluster
    step: StepCost
    fits: bool
    fix: dict[str, object] | None
    price: float | None
    corpus: CorpusCost | None
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Duration of the run."""
        return self.steps * self.step.seconds

    @property
    def cost(self) -> float | None:
        """Cost of the run, or None without a price."""
        if self.price is None:
            return None
        return self.price * self.cluster.num_devices * self.seconds / 3600

    def asdict(self) -> dict[str, Any]:
        """Return all fields and totals as a flat dictionary for JSON."""
        fields = asdict(self)
        cluster, step = self.cluster, fields.pop("step")
        tokens = self.steps * self.tokens_per_step
        return fields | step | {
            "step_seconds": self.step.seconds,
            "seconds": self.seconds,
            "cost": self.cost,
            "total_parameters": sum(self.parameters.values()),
            "total_memory": sum(self.memory.values()),
            "tokens": tokens,
            "flops": tokens * self.flops_per_token,
            "cluster": str(cluster),
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.devices_per_node,
            "devices": cluster.num_devices,
            "device_memory": cluster.memory,
            "peak_flops_per_second": cluster.peak_flops * cluster.num_devices,
            "link_bytes_per_second": cluster.link_bandwidth,
            "network_bytes_per_second": cluster.network_bandwidth,
            "corpus": asdict(self.corpus) | {"hours": self.corpus.hours} if self.corpus else None,
        }  # fmt: skip


def plan(
    model: ModelConfig,
    training: TrainingConfig,
    device: TrainDeviceConfig,
    vocab_size: int,
    cluster: Cluster,
    corpus: CorpusCost | None = None,
    price: float | None = None,
) -> Plan:
    """Predict what a run takes if each device computes an equal part of each batch.

    Args:
        model: The model's shape.
        training: The training settings.
        device: The device settings.
        vocab_size: Number of different tokens.
        cluster: The devices.
        corpus: Cost of preparing the corpus, if its size is known.
        price: Price per device-hour, in any currency.

    Raises:
        UserError: The batch size is not divisible by the number of devices.
    """
    batch_size, devices = training.batch_size, cluster.num_devices
    if batch_size % devices:
        what = f"The batch size {batch_size} is not divisible by the number of devices, {devices}."
        raise UserError(what, {"batch_size": _round_up(batch_size, devices)})
    mode = _step_mode(device, cluster, device.parallel)
    local_batch_size = batch_size // devices
    chosen, memory = model_size.fit_micro_batch(
        model, training, vocab_size, local_batch_size, cluster.memory, mode
    )
    fits = model_size.fits_memory(memory, cluster.memory)
    step = estimate_step(model, chosen, vocab_size, cluster, mode)
    steps = training.steps or max(1, int(60 * (training.minutes or 0) / step.seconds))
    parameters = model_size.num_parameters(model, vocab_size)
    tokens_per_step = batch_size * model.context_length
    return Plan(
        parameters=parameters,
        memory=memory,
        tokens_per_step=tokens_per_step,
        micro_batch_size=chosen.micro_batch_size or local_batch_size,
        activation_checkpointing=bool(chosen.activation_checkpointing),
        parallel=device.parallel,
        steps=steps,
        flops_per_token=model_size.flops_per_token(model, vocab_size),
        cluster=cluster,
        step=step,
        fits=fits,
        fix=None if fits else _suggest_fix(model, training, device, vocab_size, cluster),
        price=price,
        corpus=corpus,
        notes=_scaling_notes(sum(parameters.values()), tokens_per_step * steps, corpus),
    )


def _step_mode(device: TrainDeviceConfig, cluster: Cluster, parallel: str) -> model_size.StepMode:
    return model_size.StepMode(
        mixed_precision=device.dtype != "float32",
        sdpa=device.attention != "eager",
        world_size=cluster.num_devices,
        parallel=parallel,
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _suggest_fix(
    model: ModelConfig,
    training: TrainingConfig,
    device: TrainDeviceConfig,
    vocab_size: int,
    cluster: Cluster,
) -> dict[str, object] | None:
    """Return the smallest change of settings with which a step fits, or None.

    Candidates are a smaller micro-batch, then FSDP, then more devices.
    """

    def settings(cluster: Cluster, training: TrainingConfig, parallel: str) -> dict[str, object]:
        return {
            "nodes": cluster.nodes,
            "gpus_per_node": cluster.devices_per_node,
            "batch_size": training.batch_size,
            "parallel": parallel,
            "micro_batch_size": training.micro_batch_size,
            "activation_checkpointing": training.activation_checkpointing,
        }

    before = settings(cluster, training, device.parallel)
    candidates = [(cluster, device.parallel), (cluster, "fsdp")]
    candidates += [(larger, "fsdp") for larger in _larger_clusters(cluster)]
    for candidate, parallel in candidates:
        devices = candidate.num_devices
        batch_size = _round_up(training.batch_size, devices)
        update = {"micro_batch_size": None, "activation_checkpointing": None}
        open_training = training.model_copy(update=update | {"batch_size": batch_size})
        mode = _step_mode(device, candidate, parallel)
        chosen, memory = model_size.fit_micro_batch(
            model, open_training, vocab_size, batch_size // devices, candidate.memory, mode
        )
        if model_size.fits_memory(memory, candidate.memory):
            after = settings(candidate, chosen, parallel).items()
            # Only settings that change. The run itself chooses those that are None, and
            # checkpointing may stay enabled where it is no longer needed.
            return {name: new for name, new in after if new and before[name] not in (None, new)}
    return None


def _larger_clusters(cluster: Cluster) -> list[Cluster]:
    """Return clusters with more devices: more in the node first, then more nodes."""
    sizes = [n for n in DEVICES_PER_NODE if n > cluster.devices_per_node and cluster.nodes == 1]
    larger = [replace(cluster, devices_per_node=n) for n in sizes]
    widest = larger[-1] if larger else cluster
    doublings = (cluster.nodes << k for k in range(1, MAX_NODES.bit_length()))
    return larger + [replace(widest, nodes=nodes) for nodes in doublings if nodes <= MAX_NODES]


def _scaling_notes(parameters: int, tokens: int, corpus: CorpusCost | None) -> list[str]:
    """Return what scaling laws say about these numbers of parameters, tokens and epochs."""
    # At a fixed number of FLOPs, about 6 N D for N parameters and D tokens.
    optimal = math.sqrt(parameters * tokens / TOKENS_PER_PARAMETER)
    notes = [
        f"{format_sig(tokens / parameters)} tokens per parameter; compute-optimal is about "
        f"{TOKENS_PER_PARAMETER}: {format_sig(optimal / 1e6)} M parameters on "
        f"{format_sig(optimal * TOKENS_PER_PARAMETER / 1e6)} M tokens for this FLOP budget."
    ]
    if corpus is None:
        return notes
    epochs = tokens / corpus.tokens
    if epochs <= FULL_VALUE_EPOCHS:
        advice = "repeated text is worth as much as new text"
    elif epochs <= MAX_USEFUL_EPOCHS:
        advice = "each epoch teaches less than the one before; dropout helps"
    else:
        advice = "more text, or a smaller model with dropout, helps more than more steps"
    return [*notes, f"{format_sig(epochs)} epochs: {advice}."]
