"""The plan behind `nanogpt plan`, for this machine or for GPUs by name."""

from dataclasses import asdict
from typing import Any

from nanogpt.cli.args import PlanTarget
from nanogpt.config import Config, flatten, is_path, resolve
from nanogpt.errors import UserError
from nanogpt.gpu_specs import DEFAULT_NETWORK_BANDWIDTH, Cluster, make_cluster
from nanogpt.plan.corpus_cost import estimate_corpus
from nanogpt.plan.planner import Plan, plan
from nanogpt.presets import preset_settings
from nanogpt.tokenizer.trainers import SIZED_KINDS, default_vocab_size

DEFAULT_TEXT_BYTES = 10**6
DEFAULT_NUM_CHARS = 65  # Tiny Shakespeare's


def make_plan(settings: Config, preset: str | None, target: PlanTarget) -> Plan:
    """Plan a run with these settings. Raises `UserError` for impossible ones."""
    wrong = [
        f"--{name.replace('_', '-')} {value:g}"
        for name, value in asdict(target).items()
        if isinstance(value, int | float) and not value > 0
    ]
    if wrong:
        raise UserError(f"Not a positive number: {', '.join(wrong)}.")
    explicit = flatten(settings, explicit=True)
    overrides = preset_settings(preset, explicit.get("arch")) | explicit
    config = resolve(overrides, complete=False)
    tokenizer = config.data.tokenizer
    text_bytes = target.text_bytes or DEFAULT_TEXT_BYTES
    if config.data.vocab_size is not None:
        vocab_size = config.data.vocab_size
    elif tokenizer in SIZED_KINDS or is_path(tokenizer):
        vocab_size = default_vocab_size(text_bytes)
    else:
        vocab_size = DEFAULT_NUM_CHARS
    if target.gpu is not None:
        cluster = make_cluster(target.gpu, target.gpus_per_node, target.nodes, target.network)
    else:
        cluster, chosen = _local_cluster(overrides, config, text_bytes, vocab_size, target)
        overrides |= chosen
    config = resolve(overrides)
    corpus = None
    if target.text_bytes:
        corpus = estimate_corpus(target.text_bytes, tokenizer, vocab_size, target.nodes)
    result = plan(
        config.model, config.training, config.device, vocab_size, cluster, corpus, target.price
    )
    if config.data.vocab_size is None:
        result.notes.append(
            f"Assumes a vocabulary of {vocab_size:,} tokens; --vocab-size sets another one."
        )
    return result


def _local_cluster(
    overrides: dict[str, Any], config: Config, text_bytes: int, vocab_size: int, target: PlanTarget
) -> tuple[Cluster, dict[str, Any]]:
    """Return a cluster of machines like this one, and the settings chosen for them."""
    from nanogpt.device import device, measurements, memory
    from nanogpt.training import recipe

    machine = device.select_device(config.device)
    chosen: dict[str, Any] = {}
    if config.training.minutes is not None:
        seconds = 60 * config.training.minutes
        choices = recipe.choose_settings(seconds, text_bytes, vocab_size, machine, overrides)
        chosen = {choice.name: choice.value for choice in choices}
    bandwidth = DEFAULT_NETWORK_BANDWIDTH if target.network is None else target.network * 1e9 / 8
    # Processes on a CPU share its cores and its memory.
    sharers = target.gpus_per_node if machine.device.type == "cpu" else 1
    total_memory = memory.total_memory(machine.device)
    cluster = Cluster(
        str(machine),
        measurements.peak_flops(machine.device, machine.dtype) / sharers,
        total_memory and total_memory / sharers,
        None,
        bandwidth,
        bandwidth,
        target.gpus_per_node,
        target.nodes,
    )
    return cluster, chosen | machine.to_config().model_dump()
