"""What a run will take, before it is begun: parameters, memory, arithmetic and time, by formulas.

In: the settings of a run, the size of the vocabulary and the text, and a machine: this one, or GPUs by name. Out: a `Plan`.
Refuses: a GPU that is not in the table, with those that are like it.
"""

import difflib
import math
from dataclasses import asdict, dataclass
from typing import Any

from nanogpt.config import MachineConfig, ModelConfig, TrainingConfig
from nanogpt.errors import UserError
from nanogpt.model import QUERIES, SCORES, swiglu_width

SHARE = 0.4  # of its peak that a machine is taken to reach in training: 0.46 was had with PaLM (Chowdhery et al. 2022, section 4.1), small models get less
PRECISION = 1.2  # the estimate of memory is good to a fifth
NETWORK = 12.5e9  # bytes/s into and out of each node: 100-gigabit Ethernet
TOKENS_PER_PARAMETER = 20  # of the best model for its arithmetic (Hoffmann et al. 2022, table 3)
FRESH_EPOCHS, USEFUL_EPOCHS = (
    4,
    16,
)  # rereading a text teaches as much as new text up to the first, and little past the second (Muennighoff et al. 2023, section 6)


@dataclass(frozen=True)
class Gpu:
    """A processor by its data sheet: FLOP/s of dense bfloat16 (or float16 where there is none), bytes of memory, bytes/s to its neighbours."""

    flops: float
    memory: float
    link: float


# Data sheets of NVIDIA and AMD, without sparsity. `link` is NVLink or Infinity Fabric in both directions together, else PCIe.
GPUS = {
    "t4": Gpu(65e12, 16e9, 32e9),
    "v100": Gpu(125e12, 32e9, 300e9),
    "a10": Gpu(125e12, 24e9, 64e9),
    "a100": Gpu(312e12, 80e9, 600e9),
    "l4": Gpu(121e12, 24e9, 64e9),
    "l40s": Gpu(362e12, 48e9, 64e9),
    "h100": Gpu(989e12, 80e9, 900e9),
    "h200": Gpu(989e12, 141e9, 900e9),
    "b200": Gpu(2250e12, 180e9, 1800e9),
    "rtx3090": Gpu(71e12, 24e9, 112.5e9),
    "rtx4090": Gpu(165e12, 24e9, 64e9),
    "rtx5090": Gpu(210e12, 32e9, 128e9),
    "mi250x": Gpu(191.5e12, 64e9, 400e9),  # half of it: PyTorch sees two
    "mi300x": Gpu(1307e12, 192e9, 896e9),
}


@dataclass(frozen=True)
class Plan:
    """What a run takes. Memory is in bytes on each device, time in seconds, evaluations aside."""

    parameters: dict[str, int]
    memory: dict[str, float]
    tokens_per_step: int
    micro_batch_size: int  # windows that a device computes at once
    checkpoint_activations: bool
    steps: int
    flops_per_token: float
    where: str
    devices: int
    peak_flops_per_second: float
    device_memory: float | None
    step_seconds: float
    exchange_seconds: float  # of a step, to add up the gradients of all devices
    hints: list[str]

    @property
    def seconds(self) -> float:
        """The whole run."""
        return self.steps * self.step_seconds

    def asdict(self) -> dict[str, Any]:
        """All of it, with totals, for JSON."""
        totals = {"total_parameters": sum(self.parameters.values()), "total_memory": sum(self.memory.values()), "seconds": self.seconds}
        return asdict(self) | totals | {"tokens": self.steps * self.tokens_per_step, "flops": self.steps * self.tokens_per_step * self.flops_per_token}


def parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """The numbers that are learned, by the part they belong to; together those of `model.GPT`."""
    C, L = model.n_embd, model.n_layer
    D = C // model.n_head
    qkv = (model.n_head + 2 * (model.n_kv_head or model.n_head)) * D
    if model.arch == "modern":
        return {
            "embedding": vocab_size * C,
            "attention": L * (C * qkv + C * C),
            "feed-forward": L * 3 * swiglu_width(C) * C,
            "norms": L * (2 * C + 2 * D) + C,
            "head": vocab_size * C,
        }
    return {
        "embedding": vocab_size * C,  # which is the head too
        "positions": model.context_length * C,
        "attention": L * (C * qkv + qkv + C * C + C),
        "feed-forward": L * (8 * C * C + 5 * C),
        "norms": L * 4 * C + 2 * C,
    }


def body_parameters(model: ModelConfig) -> int:
    """Those of the blocks' matrices, which are what a larger model has more of."""
    counts = parameters(model, 1)
    biases = 0 if model.arch == "modern" else model.n_layer * 9 * model.n_embd
    return counts["attention"] + counts["feed-forward"] - biases


def flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Floating-point operations to learn from a token: 6 for each parameter it is multiplied with, 2 forward and 4 backward, and 12 n_layer context n_embd
    for attention, counted as if it were not causal (Chowdhery et al. 2022, appendix B); no token attends to more than a window."""
    C, seen = model.n_embd, min(model.context_length, model.window or model.context_length)
    return 6 * (body_parameters(model) + vocab_size * C) + 12 * model.n_layer * seen * C


def memory(model: ModelConfig, training: TrainingConfig, vocab_size: int, rows: int, *, half: bool, fused: bool) -> dict[str, float]:
    """Bytes that a training step needs at its height, with `rows` windows computed at once, by part, without a compiler, which needs less.

    `half`: products are in 16 bits. Activations are what the backward pass needs of each layer, counted as in Korthikanti et al. 2022, section 4.1;
    with checkpoints, what goes into each layer, and the rest of one.
    """
    counts = parameters(model, vocab_size)
    total, C, L, T, V = sum(counts.values()), model.n_embd, model.n_layer, model.context_length, vocab_size
    b = 2 if half else 4  # bytes of a number that enters a product
    matrices = body_parameters(model)
    moments = 2 * total - (matrices if training.optimizer == "muon" else 0)
    tokens = rows * T
    stream = 4 * C  # the stream stays in float32
    dropped = C if model.dropout else 0  # a mask takes a byte
    if model.arch == "modern":
        K = (model.n_kv_head or model.n_head) / model.n_head * C
        hidden = swiglu_width(C)
        attention = 2 * stream + 3 * b * C + 2 * b * K + 12 * (C + K) + dropped
        feed_forward = 2 * stream + b * C + 4 * b * hidden + dropped
    else:
        attention = stream + b * 6 * C + dropped
        feed_forward = stream + b * 9 * C + dropped
    drops_attention, block = model.arch == "classic" and dropped > 0, 0
    if not fused or drops_attention:
        if T <= QUERIES:
            attention += model.n_head * T * (4 + b + drops_attention)
        else:  # those of one block of queries, and their gradients
            block = rows * model.n_head * QUERIES * (QUERIES + (model.window or 0)) * (8 + 2 * b + drops_attention)
    layers = L * stream + attention + feed_forward if training.checkpoint_activations else L * (attention + feed_forward)
    return {
        "weights": 4 * total + (2 * matrices if half else 0),
        "gradients": 4 * total,
        "optimizer": 4 * moments,
        "activations": tokens * (layers + 2 * stream) + block,
        "logits": min(tokens, max(1, SCORES // V)) * V * (8 + (b if half else 0)),
        "batch": 2 * 16 * training.batch_size * T,  # two of them: the next is fetched meanwhile
    }


def fit(
    model: ModelConfig, training: TrainingConfig, vocab_size: int, rows: int, room: float | None, *, half: bool, fused: bool
) -> tuple[TrainingConfig, dict[str, float]]:
    """Choose `micro_batch_size` and `checkpoint_activations`, where they are open, such that a step of `rows` windows fits into `room` bytes; and its memory.

    The windows computed at once are halved down to one; where not one fits, activations are checkpointed, and again as many as fit are computed at once.
    Where nothing fits, it is what takes least; without a `room`, all at once.
    """
    sizes = [min(rows, training.micro_batch_size or rows)]
    while training.micro_batch_size is None and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    ways = (False, True) if training.checkpoint_activations is None else (training.checkpoint_activations,)
    for way in ways:
        for size in sizes:
            chosen = training.model_copy(update={"micro_batch_size": size, "checkpoint_activations": way})
            needed = memory(model, chosen, vocab_size, size, half=half, fused=fused)
            if room is None or PRECISION * sum(needed.values()) <= room:
                return chosen, needed
    return chosen, needed


def plan(
    model: ModelConfig, training: TrainingConfig, how: MachineConfig, vocab_size: int, text_tokens: int | None,
    here: tuple[str, float, float | None], gpu: str | None = None, gpus_per_node: int = 1, nodes: int = 1,
) -> Plan:  # fmt: skip
    """Foresee a run on `nodes` machines with `gpus_per_node` of a GPU each, or without a `gpu` on what is `here`: a name, its FLOP/s, and its bytes of memory.

    Each device takes its share of a batch. Errors: `UserError` for a GPU that is not in the table, or more devices than rows in a batch.
    """
    devices = nodes * gpus_per_node
    if training.batch_size % devices:
        raise UserError(
            f"A batch of {training.batch_size} windows cannot be shared among {devices} devices.",
            f"Use --batch-size {-(-training.batch_size // devices) * devices}.",
        )
    where, peak, room = here
    exchange = 0.0
    link = NETWORK
    if gpu is not None:
        sheet = _gpu(gpu)
        where, peak, room = gpu, sheet.flops, sheet.memory
        link = sheet.link / 2 if nodes == 1 else NETWORK
    if devices > 1:  # a ring passes all gradients but its own share round twice (Patarasuk and Yuan 2009, section 3)
        exchange = 2 * (devices - 1) / devices * 4 * sum(parameters(model, vocab_size).values()) / link
        where = f"{nodes} x {gpus_per_node} x {where}"
    rows = training.batch_size // devices
    per_token = flops_per_token(model, vocab_size)
    step = rows * model.context_length * per_token / (SHARE * peak) + exchange
    steps = training.steps if training.steps is not None else max(1, int(60 * (training.minutes or 0) / step))
    tokens = training.batch_size * model.context_length
    fitting, needed = fit(model, training, vocab_size, rows, room, half=how.dtype != "float32", fused=how.attention != "plain")
    return Plan(
        parameters=parameters(model, vocab_size),
        memory=needed,
        tokens_per_step=tokens,
        micro_batch_size=fitting.micro_batch_size or rows,
        checkpoint_activations=bool(fitting.checkpoint_activations),
        steps=steps,
        flops_per_token=per_token,
        where=where,
        devices=devices,
        peak_flops_per_second=peak * devices,
        device_memory=room,
        step_seconds=step,
        exchange_seconds=exchange,
        hints=_hints(sum(parameters(model, vocab_size).values()), tokens * steps, text_tokens),
    )


def _hints(total: int, tokens: int, text_tokens: int | None) -> list[str]:
    """What the literature says of so many parameters, tokens, and so long a text."""
    best = math.sqrt(total * tokens / TOKENS_PER_PARAMETER)  # the same arithmetic, 6 N D, at the best ratio
    found = [
        f"{rounded(tokens / total)} tokens for each parameter; about {TOKENS_PER_PARAMETER} make the best use of so much arithmetic, "
        f"which would be a model of {rounded(best / 1e6)} M parameters on {rounded(best * TOKENS_PER_PARAMETER / 1e6)} M tokens."
    ]
    if text_tokens is not None:
        epochs = tokens / text_tokens
        advice = (
            "as good as new text" if epochs <= FRESH_EPOCHS
            else "each reading teaches less than the one before; dropout helps" if epochs <= USEFUL_EPOCHS
            else "more text, or a smaller model with dropout, will help more than more steps"
        )  # fmt: skip
        found.append(f"The text is read {rounded(epochs)} times: {advice}.")
    return found


def rounded(number: float) -> str:
    """Three digits of a number, as a person writes them."""
    digits = 2 - math.floor(math.log10(number)) if number > 0 else 0
    return f"{round(number, digits):,.{max(0, digits)}f}"


def _gpu(name: str) -> Gpu:
    known = "".join(letter for letter in name.lower() if letter.isalnum())
    if known in GPUS:
        return GPUS[known]
    near = difflib.get_close_matches(known, GPUS, n=3, cutoff=0.5)
    like = f" Did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"There is no GPU {name!r} in the table.{like}", f"Use one of: {', '.join(GPUS)}.")
