"""What a step needs: parameters, arithmetic and memory of a device, by formulas.

In: the shape of a model, the settings of its training, the size of the vocabulary. Out: numbers by the part they belong to.
"""

from nanogpt.config import ModelConfig, TrainingConfig
from nanogpt.sizes import QUERIES, SCORES, swiglu_width

PRECISION = 1.2  # the estimate of memory is good to a fifth


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


def memory(
    model: ModelConfig, training: TrainingConfig, vocab_size: int, rows: int, *, half: bool, fused: bool, ranks: int = 1, parallel: str = "ddp"
) -> dict[str, float]:
    """Bytes that a training step needs at its height on a device, with `rows` windows computed at once, by part, without a compiler, which needs less.

    `half`: products are in 16 bits. Activations are what the backward pass needs of each layer, counted as in Korthikanti et al. 2022, section 4.1;
    with checkpoints, what goes into each layer, and the rest of one. Of several ranks, each holds all of the weights, gradients and moments with ddp, and
    its share of them with fsdp, as in ZeRO's third stage (Rajbhandari et al. 2020, section 5.3); "buffers" are then what is whole for a while. Not shared is
    what the backward pass keeps of weights in 16 bits, unless activations are checkpointed.
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
    sharded = parallel == "fsdp" and ranks > 1
    share = 1 / ranks if sharded else 1.0
    return {
        "weights": 4 * total * share + (2 * matrices if half and not (sharded and training.checkpoint_activations) else 0),
        "gradients": 4 * total * share,
        "optimizer": 4 * moments * share,
        "activations": tokens * (layers + 2 * stream) + block,
        "logits": min(tokens, max(1, SCORES // V)) * V * (8 + (b if half else 0)),
        "batch": 2 * 16 * training.batch_size / ranks * T,  # two of them: the next is fetched meanwhile
        "buffers": _gathered(model, vocab_size, half) if sharded else 0.0,
    }


def _gathered(model: ModelConfig, vocab_size: int, half: bool) -> float:
    """Bytes of what fsdp holds whole at a time: the block at hand, also in 16 bits, and the next one, all that is in no block, and the gradient of one of
    these, which is there twice while it is added up."""
    block, rest = units(model, vocab_size)
    return 4 * (2 * block + rest) + 2 * block * half + 8 * max(block, rest)


def units(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Parameters of a block, and those that are in none: what fsdp gathers at a time."""
    one, two = (sum(parameters(model.model_copy(update={"n_layer": layers}), vocab_size).values()) for layers in (1, 2))
    return two - one, 2 * one - two


def fit(
    model: ModelConfig, training: TrainingConfig, vocab_size: int, rows: int, room: float | None, *,
    half: bool, fused: bool, ranks: int = 1, parallel: str = "ddp",
) -> tuple[TrainingConfig, dict[str, float]]:  # fmt: skip
    """Choose `micro_batch_size` and `checkpoint_activations`, where they are open, such that a step of `rows` windows fits into the `room` bytes
    of each rank; and its memory.

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
            needed = memory(model, chosen, vocab_size, size, half=half, fused=fused, ranks=ranks, parallel=parallel)
            if room is None or PRECISION * sum(needed.values()) <= room:
                return chosen, needed
    return chosen, needed
