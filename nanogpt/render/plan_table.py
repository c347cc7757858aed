"""Render a plan as lines of text."""

from collections.abc import Iterator

from nanogpt.formatting import format_duration, format_flags, format_si, format_sig
from nanogpt.plan.communication import ASSUMED_MFU
from nanogpt.plan.corpus_cost import CORES_PER_MACHINE, CorpusCost
from nanogpt.plan.planner import Plan


def table(plan: Plan) -> str:
    """Return a plan as lines that start with a heading."""
    rows = [*_model_rows(plan), *_time_rows(plan)]
    if plan.corpus:
        rows += _corpus_rows(plan.corpus)
    rows += [("Note", note) for note in plan.notes]
    return "\n".join(f"{heading:14}{line}" for heading, line in rows)


def _model_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    is_parallel = plan.cluster.num_devices > 1
    counts = ", ".join(f"{name} {count:,}" for name, count in plan.parameters.items())
    yield "Parameters", f"{sum(plan.parameters.values()) / 1e6:,.2f} M: {counts}"
    uses = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in plan.memory.items() if size)
    per_device = " per device" if is_parallel else ""
    yield "Memory", f"{sum(plan.memory.values()) / 1e9:,.2f} GB{per_device}: {uses}"
    parallel = f"{plan.parallel}, " if is_parallel else ""
    checkpointing = ", activation checkpointing" if plan.activation_checkpointing else ""
    yield "", f"with {parallel}micro-batch size {plan.micro_batch_size}{checkpointing}"
    if not plan.fits and plan.cluster.memory is not None:
        if plan.fix:
            advice = f"It fits with {format_flags(plan.fix)}."
        else:
            advice = "Lower context_length, n_embd or n_layer."
        memory = f"{plan.cluster.memory / 1e9:.0f} GB"
        yield "", f"This does not fit into {memory} with a sixth kept free. {advice}"


def _time_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    cluster, step = plan.cluster, plan.step
    tokens = plan.steps * plan.tokens_per_step
    total = (
        f"{plan.flops_per_token * tokens:.3g} FLOP for {tokens:,} tokens in {plan.steps:,} steps"
    )
    yield "Compute", f"{format_si(plan.flops_per_token)}FLOP per token, {total}"
    if step.bytes_sent:
        sent = ", ".join(f"{format_si(size)}B {name}" for name, size in step.bytes_sent.items())
        yield "Communication", f"each device sends per step {sent}"
        limits = []
        if cluster.devices_per_node > 1:
            limits.append(f"{format_si(cluster.link_bandwidth)}B/s within a node")
        if cluster.nodes > 1:
            limits.append(
                f"{format_si(cluster.network_bandwidth)}B/s out of each node, "
                f"which sends {format_si(step.internode_bytes)}B"
            )
        yield "", " and ".join(limits)
    peak = f"the peak of {format_si(cluster.peak_flops * cluster.num_devices)}FLOP/s"
    speed = f"{format_sig(step.seconds)} s per step at {ASSUMED_MFU:.0%} of {peak}"
    yield "Time", f"{format_duration(plan.seconds)} on {cluster}, without evaluations: {speed}"
    if step.bytes_sent:
        yield (
            "",
            f"{format_sig(step.compute_seconds)} s compute, "
            f"{format_sig(step.communication_seconds)} s communication, of which "
            f"{format_sig(step.overlapped_seconds)} s overlap with compute, and "
            f"{format_sig(step.update_seconds)} s optimizer step",
        )
    if plan.cost is not None:
        yield "Cost", f"{format_sig(plan.cost)}, at {plan.price:g} per device-hour"


def _corpus_rows(corpus: CorpusCost) -> Iterator[tuple[str, str]]:
    plural = "s" if corpus.shards > 1 else ""
    tokens = f"{format_si(corpus.tokens)} tokens of {corpus.bytes_per_token:.2f} bytes"
    shards = f"{corpus.shards:,} shard{plural} of {format_si(corpus.shard_bytes)}B"
    disk = f"{format_si(corpus.disk_bytes)}B on disk"
    yield "Text", f"{format_si(corpus.text_bytes)}B: {tokens}, {shards}, {disk}"
    each = f" on each of {corpus.machines} machines" if corpus.machines > 1 else ""
    yield (
        "",
        f"prepared in {format_duration(3600 * corpus.hours)}{each}: "
        f"{format_duration(3600 * corpus.reading_hours)} reading and "
        f"{format_duration(3600 * corpus.encoding_hours)} encoding, with {CORES_PER_MACHINE} "
        "cores like those of the machine in the README",
    )
