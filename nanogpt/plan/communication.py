"""Estimate the time of a training step: computation, communication and their overlap.

Collectives are rings in which the devices of a node are neighbors, so each node sends as much as
one device. A ring takes n - 1 steps for n devices (Patarasuk and Yuan 2009, section 3).
"""

from dataclasses import dataclass

from nanogpt.config import ModelConfig, TrainingConfig
from nanogpt.gpu_specs import Cluster
from nanogpt.plan.model_size import (
    StepMode,
    flops_per_token,
    fsdp_units,
    non_embedding_matmul_params,
    num_parameters,
)

# Assumed model FLOPs utilization, without communication. PaLM reached 0.46 (Chowdhery et al. 2022,
# section 4.1); small models reach less.
ASSUMED_MFU = 0.4
# DDP sends gradients in buckets of this many bytes, PyTorch's default (Li et al. 2020, section
# 3.2.3).
DDP_BUCKET_BYTES = 25e6
# Memory traffic of an AdamW update per parameter: it reads the weight, the gradient and two
# moments, and writes all but the gradient.
ADAMW_BYTES = 28
# Polynomials that Muon evaluates for each matrix, see `optim.POLAR_EXPRESS`.
MUON_POLYNOMIALS = 4


@dataclass(frozen=True)
class StepCost:
    """The time and communication of a training step.

    Attributes:
        compute_seconds: Time of the forward and backward passes.
        bytes_sent: Bytes that each device sends, by collective; empty for one device.
        internode_bytes: Bytes that leave each node.
        communication_seconds: Time of the collectives of gradients and weights.
        overlapped_seconds: The part of `communication_seconds` that overlaps with computation.
        update_seconds: Time of the optimizer step, including Muon's communication.
    """

    compute_seconds: float
    bytes_sent: dict[str, float]
    internode_bytes: float
    communication_seconds: float
    overlapped_seconds: float
    update_seconds: float

    @property
    def seconds(self) -> float:
        """Time from one step to the next."""
        seconds = self.compute_seconds + self.communication_seconds
        return seconds - self.overlapped_seconds + self.update_seconds


def estimate_step(
    model: ModelConfig, training: TrainingConfig, vocab_size: int, cluster: Cluster, mode: StepMode
) -> StepCost:
    """Estimate the cost of a training step in which each device computes an equal part.

    Args:
        model: The model's shape.
        training: The training settings, with micro-batch size and checkpointing chosen.
        vocab_size: Number of different tokens.
        cluster: The devices.
        mode: Precision, attention implementation and parallelism.
    """
    parameters = sum(num_parameters(model, vocab_size).values())
    local_batch_size = training.batch_size // cluster.num_devices
    micro_batches = -(-local_batch_size // (training.micro_batch_size or local_batch_size))
    forward = flops_per_token(model, vocab_size) / 3
    # Checkpointing repeats the forward pass (Chen et al. 2016, section 3).
    recomputed = forward if training.activation_checkpointing else 0.0
    tokens_per_device = local_batch_size * model.context_length
    # Divides FLOPs per token; the quotient is in seconds.
    speed = ASSUMED_MFU * cluster.peak_flops / tokens_per_device
    compute_seconds = (3 * forward + recomputed) / speed
    backward_seconds = (2 * forward + recomputed) / speed
    bytes_sent = _bytes_sent(model, vocab_size, mode, micro_batches)
    total_sent = sum(bytes_sent.values())
    communication_seconds = _ring_seconds(cluster, total_sent, total_sent)
    if mode.is_sharded:
        # All communication but that of the first block can overlap (Zhao et al. 2023, section 3.3).
        overlappable = communication_seconds * model.n_layer / (model.n_layer + 1)
        overlap_limit = compute_seconds
    else:
        # All gradient buckets but the last can overlap with the last backward pass (Li et al. 2020,
        # section 3.2.3).
        last_bucket = min(1.0, DDP_BUCKET_BYTES / (4 * parameters))
        overlappable = communication_seconds * (1 - last_bucket)
        overlap_limit = backward_seconds / micro_batches
    muon_bytes, muon_internode_bytes = _muon_bytes_sent(model, training, cluster, mode)
    muon_seconds = _ring_seconds(cluster, sum(muon_bytes.values()), muon_internode_bytes)
    update_seconds = _update_seconds(model, training, parameters, cluster, mode)
    return StepCost(
        compute_seconds=compute_seconds,
        bytes_sent=bytes_sent | muon_bytes,
        internode_bytes=total_sent + muon_internode_bytes if cluster.nodes > 1 else 0.0,
        communication_seconds=communication_seconds,
        overlapped_seconds=min(overlappable, overlap_limit),
        update_seconds=update_seconds + muon_seconds,
    )


def _ring_seconds(cluster: Cluster, device_bytes: float, internode_bytes: float) -> float:
    """Return the seconds in which each device and each node send their bytes."""
    link_seconds = device_bytes / cluster.link_bandwidth if cluster.devices_per_node > 1 else 0.0
    network_seconds = internode_bytes / cluster.network_bandwidth if cluster.nodes > 1 else 0.0
    return max(link_seconds, network_seconds)


def _bytes_sent(
    model: ModelConfig, vocab_size: int, mode: StepMode, micro_batches: int
) -> dict[str, float]:
    """Return the bytes that each device sends in a step, in float32.

    DDP all-reduces the gradients once, in two rounds of the ring. FSDP, for each micro-batch,
    all-gathers the weights for the forward and for the backward pass, and reduce-scatters the
    gradients, in a round each (Rajbhandari et al. 2020, section 7.2). Parameters outside the blocks
    are gathered only once per micro-batch.
    """
    if mode.world_size == 1:
        return {}
    total = sum(num_parameters(model, vocab_size).values())
    ring_factor = (mode.world_size - 1) / mode.world_size
    if not mode.is_sharded:
        return {"all-reduce of gradients": 2 * 4 * total * ring_factor}
    block, rest = fsdp_units(model, vocab_size)
    gathered = micro_batches * (2 * model.n_layer * block + rest)
    return {
        "all-gather of weights": 4 * gathered * ring_factor,
        "reduce-scatter of gradients": 4 * micro_batches * total * ring_factor,
    }


def _muon_bytes_sent(
    model: ModelConfig, training: TrainingConfig, cluster: Cluster, mode: StepMode
) -> tuple[dict[str, float], float]:
    """Return the bytes that each device sends for Muon, and those that leave each node.

    Each matrix is orthogonalized on one device. With DDP the updates are all-gathered in a ring.
    With FSDP the shards of a matrix are sent to its device, and those of the update back.
    """
    devices = cluster.num_devices
    if training.optimizer != "muon" or devices == 1:
        return {}, 0.0
    ring_factor = (devices - 1) / devices
    sent = mode.matmul_bytes * non_embedding_matmul_params(model) * ring_factor
    if not mode.is_sharded:
        return {"all-gather of Muon's updates": sent}, sent
    return {"all-to-all of Muon's matrices": 2 * sent / devices}, 2 * sent / cluster.nodes


def _update_seconds(
    model: ModelConfig, training: TrainingConfig, parameters: int, cluster: Cluster, mode: StepMode
) -> float:
    """Return the seconds of an optimizer step, without communication.

    AdamW is bound by memory bandwidth. Muon's matmuls are distributed over the devices. For an
    m x n matrix with m <= n, each polynomial takes 4 m m n + 2 m m m FLOPs.
    """
    local_parameters = parameters / (cluster.num_devices if mode.is_sharded else 1)
    seconds = 0.0
    if cluster.memory_bandwidth:
        seconds = ADAMW_BYTES * local_parameters / cluster.memory_bandwidth
    if training.optimizer == "muon":
        flops = MUON_POLYNOMIALS * 6 * model.n_embd * non_embedding_matmul_params(model)
        seconds += flops / (ASSUMED_MFU * cluster.peak_flops * cluster.num_devices)
    return seconds
