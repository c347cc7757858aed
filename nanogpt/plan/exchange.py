"""How long a step takes: arithmetic, what passes between devices and how much of that is hidden behind arithmetic, and the update of the weights.

In: the shape of a model, the settings of its training, and a `Cluster`. Out: a `Step`, in bytes and seconds.

Sums and whole weights go round in rings, in which the devices of a node stand side by side: so as much leaves each node as each device sends.
A ring passes n pieces to n devices, or adds them up from them, in n - 1 steps (Patarasuk and Yuan 2009, section 3).
"""

from dataclasses import dataclass

from nanogpt.config import ModelConfig, TrainingConfig
from nanogpt.plan.counts import body_parameters, flops_per_token, parameters, units
from nanogpt.plan.gpus import Cluster

# Of its peak that a device is taken to reach in training: 0.46 was had with PaLM (Chowdhery et al. 2022, section 4.1), small models get less. What is
# exchanged in the open is added to that, at the full speed of the data sheets.
SHARE = 0.4
BUCKET = 25e6  # bytes of gradients that ddp sends at a time, PyTorch's default (Li et al. 2020, section 3.2.3)
ADAMW_BYTES = 28  # of memory for each parameter that an update reads (weight, gradient, two moments) and writes (all but the gradient)
POLYNOMIALS = 4  # that Muon evaluates of each matrix, see `optim.POLAR_EXPRESS`


@dataclass(frozen=True)
class Step:
    """What a step takes, in seconds, and the bytes that each device sends in it, by kind; none where there is one device."""

    compute_seconds: float
    communication: dict[str, float]
    between_nodes: float  # bytes that leave each node
    exchange_seconds: float  # of gradients and weights, by the slower of the two ways,
    hidden_seconds: float  # of which so many pass while there is arithmetic to do
    update_seconds: float  # of the weights, with what Muon exchanges for it

    @property
    def seconds(self) -> float:
        """From one step to the next."""
        return self.compute_seconds + self.exchange_seconds - self.hidden_seconds + self.update_seconds


def step_of(model: ModelConfig, training: TrainingConfig, vocab_size: int, cluster: Cluster, parallel: str, half: bool) -> Step:
    """A step of training, of which each device takes its share of the windows; `training` says how many of them at a time, and whether activations are kept."""
    rows, sharded = training.batch_size // cluster.devices, parallel == "fsdp" and cluster.devices > 1
    passes = -(-rows // (training.micro_batch_size or rows))
    forward = flops_per_token(model, vocab_size) / 3
    speed = SHARE * cluster.flops / (rows * model.context_length)  # of one FLOP for each token
    again = forward if training.checkpoint_activations else 0.0  # a forward pass more (Chen et al. 2016, section 3)
    compute, backward = (3 * forward + again) / speed, (2 * forward + again) / speed
    sent = _sent(model, vocab_size, cluster.devices, sharded, passes)
    muon, leaving = _sent_by_muon(model, cluster, sharded, half) if training.optimizer == "muon" else ({}, 0.0)
    each = sum(sent.values())
    exchange = _seconds(cluster, each, each)
    return Step(
        compute_seconds=compute,
        communication=sent | muon,
        between_nodes=each + leaving if cluster.nodes > 1 else 0.0,
        exchange_seconds=exchange,
        hidden_seconds=_hidden(model, vocab_size, exchange, compute, backward / passes, sharded),
        update_seconds=_update_seconds(model, training, vocab_size, cluster, sharded) + _seconds(cluster, sum(muon.values()), leaving),
    )


def _seconds(cluster: Cluster, each: float, leaving: float) -> float:
    """Seconds in which each device sends so many bytes, and so many leave each node."""
    return max(each / cluster.link if cluster.per_node > 1 else 0.0, leaving / cluster.network if cluster.nodes > 1 else 0.0)


def _sent(model: ModelConfig, vocab_size: int, devices: int, sharded: bool, passes: int) -> dict[str, float]:
    """Bytes that each device sends in a step, in float32.

    ddp adds up all gradients once, which takes two rounds; fsdp gathers the weights for the forward and for the backward pass, and scatters the sums of
    gradients, a round each (Rajbhandari et al. 2020, section 7.2), for each of the `passes` that the windows of a step are computed in; what is in no block
    is gathered only once in it.
    """
    if devices == 1:
        return {}
    total, turn = sum(parameters(model, vocab_size).values()), (devices - 1) / devices
    if not sharded:
        return {"all-reduce of gradients": 2 * 4 * total * turn}
    block, rest = units(model, vocab_size)
    gathered = passes * (2 * model.n_layer * block + rest)
    return {"all-gather of weights": 4 * gathered * turn, "reduce-scatter of gradients": 4 * passes * total * turn}


def _sent_by_muon(model: ModelConfig, cluster: Cluster, sharded: bool, half: bool) -> tuple[dict[str, float], float]:
    """Bytes that each device sends, and that leave each node at most: each matrix is orthogonalised whole on one device, which with ddp gives its update to
    all in a ring; with fsdp it gets the parts of the matrix from all, and gives them theirs."""
    if cluster.devices == 1:
        return {}, 0.0
    turn = (2 if half else 4) * body_parameters(model) * (cluster.devices - 1) / cluster.devices
    if not sharded:
        return {"all-gather of Muon's updates": turn}, turn
    return {"all-to-all of Muon's matrices": 2 * turn / cluster.devices}, 2 * turn / cluster.nodes


def _hidden(model: ModelConfig, vocab_size: int, exchange: float, compute: float, last_backward: float, sharded: bool) -> float:
    """Seconds of the exchange that pass behind arithmetic: with ddp behind the last backward pass, all but its last bucket (Li et al. 2020, section 3.2.3);
    with fsdp behind all of it, all but what the first block waits for (Zhao et al. 2023, section 3.3)."""
    if sharded:
        return min(compute, exchange * model.n_layer / (model.n_layer + 1))
    last_bucket = min(1.0, BUCKET / (4 * sum(parameters(model, vocab_size).values())))
    return min(last_backward, exchange * (1 - last_bucket))


def _update_seconds(model: ModelConfig, training: TrainingConfig, vocab_size: int, cluster: Cluster, sharded: bool) -> float:
    """AdamW waits for memory; Muon's products, 4 m m n + 2 m m m FLOP a polynomial for an m x n matrix with m the smaller, are shared among the devices."""
    own = sum(parameters(model, vocab_size).values()) / (cluster.devices if sharded else 1)
    seconds = ADAMW_BYTES * own / cluster.bandwidth if cluster.bandwidth else 0.0
    if training.optimizer == "muon":
        seconds += POLYNOMIALS * 6 * model.n_embd * body_parameters(model) / (SHARE * cluster.flops * cluster.devices)
    return seconds
