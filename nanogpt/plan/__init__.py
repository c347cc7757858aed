"""What a run will take, before it is begun: parameters, memory, arithmetic, exchange, time and cost, by formulas, each with its source.

In: the settings of a run, the size of the vocabulary and the text, and a `Cluster`: this machine, or GPUs by name. Out: a `Plan`.
Refuses: more devices than a batch can be shared among.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from nanogpt.config import MachineConfig, ModelConfig, TrainingConfig
from nanogpt.errors import UserError
from nanogpt.plan.corpus import Corpus, corpus_of
from nanogpt.plan.counts import PRECISION, body_parameters, fit, flops_per_token, memory, parameters
from nanogpt.plan.exchange import SHARE, Step, step_of
from nanogpt.plan.gpus import ETHERNET, GPUS, Cluster, cluster_of
from nanogpt.plan.numbers import duration, rounded

__all__ = [
    "ETHERNET",
    "GPUS",
    "PRECISION",
    "SHARE",
    "Cluster",
    "Corpus",
    "Plan",
    "Step",
    "body_parameters",
    "cluster_of",
    "corpus_of",
    "duration",
    "fit",
    "flops_per_token",
    "memory",
    "parameters",
    "plan",
    "rounded",
]

TOKENS_PER_PARAMETER = 20  # of the best model for its arithmetic (Hoffmann et al. 2022, table 3)
# Rereading a text teaches as much as new text up to the first, and little past the second (Muennighoff et al. 2023, section 6).
FRESH_EPOCHS, USEFUL_EPOCHS = 4, 16
MOST_PER_NODE, MOST_NODES = 8, 4096  # devices that are tried for a model that does not fit


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory is in bytes on each device, time in seconds, evaluations aside."""

    parameters: dict[str, int]
    memory: dict[str, float]
    tokens_per_step: int
    micro_batch_size: int  # windows that a device computes at once
    checkpoint_activations: bool
    parallel: str
    steps: int
    flops_per_token: float
    cluster: Cluster
    step: Step
    fits: bool
    remedy: str | None  # the smallest change with which it does, None where it fits or no change would do
    price: float | None  # of a device for an hour, in whatever money
    corpus: Corpus | None
    hints: list[str]

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.steps * self.step.seconds

    @property
    def cost(self) -> float | None:
        """Of the whole run, where a price was given."""
        return None if self.price is None else self.price * self.cluster.devices * self.seconds / 3600

    def asdict(self) -> dict[str, Any]:
        """All of it, with totals, for JSON."""
        found, cluster, tokens = asdict(self), self.cluster, self.steps * self.tokens_per_step
        del found["cluster"]
        found |= found.pop("step") | {"step_seconds": self.step.seconds, "seconds": self.seconds, "cost": self.cost}
        found |= {"total_parameters": sum(self.parameters.values()), "total_memory": sum(self.memory.values())}
        found |= {"tokens": tokens, "flops": tokens * self.flops_per_token}
        found |= {"where": str(cluster), "nodes": cluster.nodes, "gpus_per_node": cluster.per_node, "devices": cluster.devices}
        found |= {"device_memory": cluster.memory, "peak_flops_per_second": cluster.flops * cluster.devices}
        found |= {"link_bytes_per_second": cluster.link, "network_bytes_per_second": cluster.network}
        return found | {"corpus": asdict(self.corpus) | {"hours": self.corpus.hours} if self.corpus else None}


def plan(
    model: ModelConfig, training: TrainingConfig, how: MachineConfig, vocab_size: int, cluster: Cluster, corpus: Corpus | None = None,
    price: float | None = None,
) -> Plan:  # fmt: skip
    """Foresee a run in which each device of the cluster takes its share of a batch.

    Errors: `UserError` for more devices than rows in a batch.
    """
    devices = cluster.devices
    if training.batch_size % devices:
        raise UserError(
            f"A batch of {training.batch_size} windows cannot be shared among {devices} devices.",
            f"Use --batch-size {-(-training.batch_size // devices) * devices}.",
        )
    half, fused = how.dtype != "float32", how.attention != "plain"
    rows = training.batch_size // devices
    fitting, needed = fit(model, training, vocab_size, rows, cluster.memory, half=half, fused=fused, ranks=devices, parallel=how.parallel)
    fits = cluster.memory is None or PRECISION * sum(needed.values()) <= cluster.memory
    step = step_of(model, fitting, vocab_size, cluster, how.parallel, half)
    steps = training.steps if training.steps is not None else max(1, int(60 * (training.minutes or 0) / step.seconds))
    tokens = training.batch_size * model.context_length
    return Plan(
        parameters=parameters(model, vocab_size),
        memory=needed,
        tokens_per_step=tokens,
        micro_batch_size=fitting.micro_batch_size or rows,
        checkpoint_activations=bool(fitting.checkpoint_activations),
        parallel=how.parallel,
        steps=steps,
        flops_per_token=flops_per_token(model, vocab_size),
        cluster=cluster,
        step=step,
        fits=fits,
        remedy=None if fits else _remedy(model, training, how, vocab_size, cluster),
        price=price,
        corpus=corpus,
        hints=_hints(sum(parameters(model, vocab_size).values()), tokens * steps, corpus),
    )


def _remedy(model: ModelConfig, training: TrainingConfig, how: MachineConfig, vocab_size: int, cluster: Cluster) -> str | None:
    """The smallest change, as flags, with which a step fits: less at once, then shares of the weights, then more devices; None where none of it does."""
    opened = training.model_copy(update={"micro_batch_size": None, "checkpoint_activations": None})
    wider = [replace(cluster, per_node=n) for n in (2, 4, 8) if cluster.nodes == 1 and cluster.per_node < n <= MOST_PER_NODE]
    per_node = wider[-1].per_node if wider else cluster.per_node
    wider += [replace(cluster, per_node=per_node, nodes=cluster.nodes << k) for k in range(1, 13) if cluster.nodes << k <= MOST_NODES]
    tries = [(cluster, how.parallel), (cluster, "fsdp"), *((each, "fsdp") for each in wider)]
    for each, parallel in tries:
        batch = -(-training.batch_size // each.devices) * each.devices
        asked, rows = opened.model_copy(update={"batch_size": batch}), batch // each.devices
        half, fused = how.dtype != "float32", how.attention != "plain"
        chosen, needed = fit(model, asked, vocab_size, rows, each.memory, half=half, fused=fused, ranks=each.devices, parallel=parallel)
        if each.memory is not None and PRECISION * sum(needed.values()) <= each.memory:
            flags = {
                "--nodes": (cluster.nodes, each.nodes),
                "--gpus-per-node": (cluster.per_node, each.per_node),
                "--batch-size": (training.batch_size, batch),
                "--parallel": (how.parallel, parallel),
                "--micro-batch-size": (training.micro_batch_size, chosen.micro_batch_size if training.micro_batch_size else None),
            }
            words = [f"{flag} {new}" for flag, (old, new) in flags.items() if new != old]
            return " ".join(words + ["--checkpoint-activations"] * bool(chosen.checkpoint_activations and training.checkpoint_activations is False))
    return None


def _hints(total: int, tokens: int, corpus: Corpus | None) -> list[str]:
    """What the literature says of so many parameters, tokens, and so long a text."""
    best = math.sqrt(total * tokens / TOKENS_PER_PARAMETER)  # the same arithmetic, 6 N D, at the best ratio
    found = [
        f"{rounded(tokens / total)} tokens for each parameter; about {TOKENS_PER_PARAMETER} make the best use of so much arithmetic, "
        f"which would be a model of {rounded(best / 1e6)} M parameters on {rounded(best * TOKENS_PER_PARAMETER / 1e6)} M tokens."
    ]
    if corpus is not None:
        epochs = tokens / corpus.tokens
        advice = (
            "as good as new text" if epochs <= FRESH_EPOCHS
            else "each reading teaches less than the one before; dropout helps" if epochs <= USEFUL_EPOCHS
            else "more text, or a smaller model with dropout, will help more than more steps"
        )  # fmt: skip
        found.append(f"The text is read {rounded(epochs)} times: {advice}.")
    return found
