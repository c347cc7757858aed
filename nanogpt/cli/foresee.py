"""What `nanogpt plan` puts together: settings as `train` would have them, and a machine, this one or GPUs by name.

In: what was given on the command line. Out: a `Plan`. Refuses: counts of nothing, and what `plan` does.
"""

from typing import Any

from nanogpt.config import Config, flatten, is_path, preset_settings, resolve
from nanogpt.errors import UserError
from nanogpt.plan import ETHERNET, Cluster, Plan, cluster_of, corpus_of, plan
from nanogpt.tokenizer.kinds import SIZED, suggested_size

TYPICAL_BYTES = 10**6  # of a text of which nothing is said,
TYPICAL_CHARACTERS = 65  # and its different characters: English letters and punctuation


def foresee(
    settings: Config, preset: str | None, text_bytes: int | None, gpu: str | None, gpus_per_node: int, nodes: int, network: float | None, price: float | None
) -> Plan:
    """The plan of a run with these settings; see the command for what the others are."""
    numbers = {"--text-bytes": text_bytes, "--gpus-per-node": gpus_per_node, "--nodes": nodes, "--network": network, "--price": price}
    if wrong := [f"{name} {number:g}" for name, number in numbers.items() if number is not None and not number > 0]:
        raise UserError(f"{', '.join(wrong)}: it takes more than 0.")
    given = preset_settings(preset) | flatten(settings, explicit=True)
    settled = resolve(given, complete=False)
    tokenizer = settled.text.tokenizer
    suggested = suggested_size(text_bytes or TYPICAL_BYTES) if tokenizer in SIZED or is_path(tokenizer) else TYPICAL_CHARACTERS
    vocab_size = settled.text.vocab_size or suggested
    if gpu is not None:
        cluster = cluster_of(gpu, gpus_per_node, nodes, network)
    else:
        cluster, chosen = _here(given, settled, text_bytes or TYPICAL_BYTES, vocab_size, gpus_per_node, nodes, network)
        given |= chosen
    settled = resolve(given)
    corpus = corpus_of(text_bytes, tokenizer, vocab_size, nodes) if text_bytes else None
    found = plan(settled.model, settled.training, settled.machine, vocab_size, cluster, corpus, price)
    if settled.text.vocab_size is None:
        found.hints.append(f"Counted with {vocab_size:,} different tokens, as a text may have; --vocab-size gives another number.")
    return found


def _here(
    given: dict[str, Any], settled: Config, text_bytes: int, vocab_size: int, gpus_per_node: int, nodes: int, network: float | None
) -> tuple[Cluster, dict[str, Any]]:
    """Machines like this one, and the settings that are chosen for them."""
    from nanogpt import machine, recipe  # which need torch, and that takes a second

    place, chosen = machine.choose(settled.machine), {}
    if settled.training.minutes is not None:
        chosen = {choice.name: choice.value for choice in recipe.choose(60 * settled.training.minutes, text_bytes, vocab_size, place, given)}
    between = ETHERNET if network is None else network * 1e9 / 8
    shared = gpus_per_node if place.device.type == "cpu" else 1  # processes on CPUs share what there is
    memory = machine.memory_of(place.device)
    cluster = Cluster(
        str(place), machine.peak(place.device, place.dtype) / shared, memory and memory / shared, None, between, between, gpus_per_node, nodes
    )  # fmt: skip
    return cluster, chosen | place.settings().model_dump()
