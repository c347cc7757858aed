"""A plan in lines, for a person."""

from collections.abc import Iterator

from nanogpt.plan import SHARE, Corpus, Plan
from nanogpt.plan.corpus import CORES
from nanogpt.plan.numbers import duration, rounded, size


def table(plan: Plan) -> str:
    """What a run would take, in lines."""
    lines = [*_model(plan), *_time(plan), *(_corpus(plan.corpus) if plan.corpus else ()), *(("Hint", hint) for hint in plan.hints)]
    return "\n".join(f"{head:12}{line}" for head, line in lines)


def _model(plan: Plan) -> Iterator[tuple[str, str]]:
    many = plan.cluster.devices > 1
    yield "Parameters", f"{sum(plan.parameters.values()) / 1e6:,.2f} M: " + ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    parts = ", ".join(f"{name} {part / 1e9:.2f}" for name, part in plan.memory.items() if part)
    yield "Memory", f"{sum(plan.memory.values()) / 1e9:,.2f} GB{' on each device' * many}: {parts}"
    again = ", inner activations computed again instead of kept" if plan.checkpoint_activations else ""
    yield "", f"with {f'{plan.parallel}, ' * many}{plan.micro_batch_size} window{'s' * (plan.micro_batch_size > 1)} at a time{again}"
    if not plan.fits and plan.cluster.memory is not None:
        advice = f"It fits with {plan.remedy}." if plan.remedy else "Lower --context-length, --n-embd or --n-layer."
        yield "", f"This does not fit into {plan.cluster.memory / 1e9:.0f} GB, of which a sixth should stay free. {advice}"


def _time(plan: Plan) -> Iterator[tuple[str, str]]:
    cluster, step, tokens = plan.cluster, plan.step, plan.steps * plan.tokens_per_step
    arithmetic = f"{size(plan.flops_per_token)}FLOP a token, {plan.flops_per_token * tokens:.3g} FLOP for {tokens:,} tokens"
    yield "Arithmetic", f"{arithmetic} in {plan.steps:,} steps"
    if step.communication:
        kinds = ", ".join(f"{size(sent)}B {name}" for name, sent in step.communication.items())
        yield "Exchange", f"each device sends in a step {kinds}"
        ways = [f"{size(cluster.link)}B/s within a node"] * (cluster.per_node > 1)
        ways += [f"{size(cluster.network)}B/s out of each node, which {size(step.between_nodes)}B leave"] * (cluster.nodes > 1)
        yield "", " and ".join(ways)
    peak = f"{SHARE:.0%} of the peak of {size(cluster.flops * cluster.devices)}FLOP/s"
    yield "Time", f"{duration(plan.seconds)} on {cluster}, evaluations aside: {rounded(step.seconds)} s a step, at {peak}"
    if step.communication:
        hidden = f"{rounded(step.exchange_seconds)} s of exchange, of which {rounded(step.hidden_seconds)} s pass behind it"
        yield "", f"{rounded(step.compute_seconds)} s of arithmetic, {hidden}, and {rounded(step.update_seconds)} s for the update"
    if plan.cost is not None:
        yield "Cost", f"{rounded(plan.cost)}, at {plan.price:g} for a device and an hour"


def _corpus(corpus: Corpus) -> Iterator[tuple[str, str]]:
    shards = f"{corpus.shards:,} shard{'s' * (corpus.shards > 1)} of {size(corpus.shard_bytes)}B"
    yield (
        "Text",
        f"{size(corpus.text_bytes)}B: {size(corpus.tokens)} tokens of {corpus.bytes_per_token:.2f} bytes, {shards}, {size(corpus.disk_bytes)}B on the disk",
    )
    each = f" by each of {corpus.machines} machines" * (corpus.machines > 1)
    parts = f"{duration(3600 * corpus.reading_hours)} to read it, {duration(3600 * corpus.encoding_hours)} to encode{' its part' * (corpus.machines > 1)}"
    yield "", f"prepared in {duration(3600 * corpus.hours)}{each}: {parts}, with {CORES} cores like those of the machine in the README"
