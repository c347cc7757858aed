"""Parameters, FLOPs and memory of a training step, by formulas."""

from dataclasses import dataclass
from itertools import product

from nanogpt.config import ATTN_CHUNK_SIZE, MAX_LOGITS_PER_CHUNK, ModelConfig, TrainingConfig

# Memory estimates are within 20 %.
MEMORY_SAFETY_FACTOR = 1.2


@dataclass(frozen=True)
class StepMode:
    """The precision, attention implementation and parallelism of a training step.

    Attributes:
        mixed_precision: True if matmuls are in 16 bits.
        sdpa: True if attention is fused and does not store its probabilities.
        world_size: Number of ranks.
        parallel: Data parallelism, "ddp" or "fsdp".
    """

    mixed_precision: bool
    sdpa: bool
    world_size: int = 1
    parallel: str = "ddp"

    @property
    def is_sharded(self) -> bool:
        """True if each rank stores only a part of the parameters."""
        return self.parallel == "fsdp" and self.world_size > 1

    @property
    def matmul_bytes(self) -> int:
        """Bytes of a number that enters a matmul."""
        return 2 if self.mixed_precision else 4


def num_parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Return the number of parameters of each part of `model.GPT`."""
    C, L = model.n_embd, model.n_layer
    D = model.head_size
    qkv = (model.n_head + 2 * model.num_kv_heads) * D
    head = {} if model.has_tied_embeddings else {"head": vocab_size * C}
    if model.arch == "qwen3":
        return {
            "embedding": vocab_size * C,
            "attention": L * (C * qkv + model.n_head * D * C),
            "feed-forward": L * 3 * model.intermediate_size * C,
            "norms": L * (2 * C + 2 * D) + C,
        } | head
    return {
        "embedding": vocab_size * C,
        "positions": model.context_length * C,
        "attention": L * (C * qkv + qkv + C * C + C),
        "feed-forward": L * (8 * C * C + 5 * C),
        "norms": L * 4 * C + 2 * C,
    } | head


def non_embedding_matmul_params(model: ModelConfig) -> int:
    """Return the number of parameters in the matrices of the blocks."""
    counts = num_parameters(model, 1)
    biases = 0 if model.arch == "qwen3" else model.n_layer * 9 * model.n_embd
    return counts["attention"] + counts["feed-forward"] - biases


def flops_per_token(model: ModelConfig, vocab_size: int) -> float:
    """Return the FLOPs of training on one token, forward and backward.

    They are 6 per matmul parameter, and 12 n_layer T n_embd for attention, counted as if it were
    not causal (Chowdhery et al. 2022, appendix B). T is at most the sliding window.
    """
    C = model.n_embd
    T = min(model.context_length, model.sliding_window or model.context_length)
    return 6 * (non_embedding_matmul_params(model) + vocab_size * C) + 12 * model.n_layer * T * C


def estimate_memory(
    model: ModelConfig, training: TrainingConfig, vocab_size: int, mode: StepMode
) -> dict[str, float]:
    """Return the peak bytes of an eager training step on each rank, by use.

    Activations are what the backward pass needs (Korthikanti et al. 2022, section 4.1). FSDP shards
    weights, gradients and moments (ZeRO stage 3, Rajbhandari et al. 2020, section 5.3); "buffers"
    are temporary gathered copies. A compiled step needs less.

    Args:
        model: The model's shape.
        training: The training settings. Without a micro-batch size, a rank's part of the batch is
            one micro-batch.
        vocab_size: Number of different tokens.
        mode: Precision, attention implementation and parallelism.
    """
    total = sum(num_parameters(model, vocab_size).values())
    matrices = non_embedding_matmul_params(model)
    # Muon keeps one moment of the matrices, AdamW keeps two of all parameters.
    moments = 2 * total - (matrices if training.optimizer == "muon" else 0)
    shard_fraction = 1 / mode.world_size if mode.is_sharded else 1.0
    weights = 4 * total * shard_fraction
    # Autocast keeps 16-bit copies of the matrices for the backward pass. FSDP frees them only if
    # activations are checkpointed.
    if mode.mixed_precision and not (mode.is_sharded and training.activation_checkpointing):
        weights += 2 * matrices
    micro_batch_size = training.micro_batch_size or training.batch_size // mode.world_size
    tokens = micro_batch_size * model.context_length
    logits = min(tokens, max(1, MAX_LOGITS_PER_CHUNK // vocab_size)) * vocab_size
    bytes_per_logit = 8 + (mode.matmul_bytes if mode.mixed_precision else 0)
    # Input and target ids take 16 bytes a token, and the next batch is prefetched.
    batch = 2 * 16 * training.batch_size / mode.world_size * model.context_length
    return {
        "weights": weights,
        "gradients": 4 * total * shard_fraction,
        "optimizer": 4 * moments * shard_fraction,
        "activations": _activation_bytes(model, training, micro_batch_size, mode),
        "logits": logits * bytes_per_logit,
        "batch": batch,
        "buffers": _fsdp_buffer_bytes(model, vocab_size, mode) if mode.is_sharded else 0.0,
    }


def _activation_bytes(
    model: ModelConfig, training: TrainingConfig, micro_batch_size: int, mode: StepMode
) -> float:
    """Return the bytes that the forward pass stores for the backward pass."""
    C, T = model.n_embd, model.context_length
    b = mode.matmul_bytes
    residual = 4 * C  # the residual stream is in float32
    dropout_mask = C if model.dropout else 0
    if model.arch == "qwen3":
        K = model.num_kv_heads * model.head_size
        attention = 2 * residual + 3 * b * C + 2 * b * K + 12 * (C + K) + dropout_mask
        mlp = 2 * residual + b * C + 4 * b * model.intermediate_size + dropout_mask
    else:
        attention = residual + b * 6 * C + dropout_mask
        mlp = residual + b * 9 * C + dropout_mask
    has_attention_dropout = model.arch == "gpt2" and model.dropout > 0
    chunk = 0
    if not mode.sdpa or has_attention_dropout:
        if T <= ATTN_CHUNK_SIZE:
            attention += model.n_head * T * (4 + b + has_attention_dropout)
        else:
            # Only the scores of one chunk of queries, and their gradients, exist at a time.
            keys = ATTN_CHUNK_SIZE + (model.sliding_window or 0)
            scores = micro_batch_size * model.n_head * ATTN_CHUNK_SIZE * keys
            chunk = scores * (8 + 2 * b + has_attention_dropout)
    if training.activation_checkpointing:
        layers = model.n_layer * residual + attention + mlp
    else:
        layers = model.n_layer * (attention + mlp)
    return micro_batch_size * T * (layers + 2 * residual) + chunk


def _fsdp_buffer_bytes(model: ModelConfig, vocab_size: int, mode: StepMode) -> float:
    """Return the bytes that FSDP gathers at a time.

    These are the current block (also in 16 bits), the next block, and all parameters outside the
    blocks. The largest gradient exists twice while it is reduced.
    """
    block, rest = fsdp_units(model, vocab_size)
    return 4 * (2 * block + rest) + 2 * block * mode.mixed_precision + 8 * max(block, rest)


def fsdp_units(model: ModelConfig, vocab_size: int) -> tuple[int, int]:
    """Return the parameters of one block, and those outside the blocks: FSDP's gather units."""
    one, two = (
        sum(num_parameters(model.model_copy(update={"n_layer": layers}), vocab_size).values())
        for layers in (1, 2)
    )
    return two - one, 2 * one - two


def fit_micro_batch(
    model: ModelConfig,
    training: TrainingConfig,
    vocab_size: int,
    local_batch_size: int,
    budget_bytes: float | None,
    mode: StepMode,
) -> tuple[TrainingConfig, dict[str, float]]:
    """Choose `micro_batch_size` and `activation_checkpointing` where they are None.

    The micro-batch is halved until a step fits. If one sequence does not fit, the search restarts
    with activation checkpointing. If nothing fits, the smallest configuration is returned.

    Args:
        model: The model's shape.
        training: The training settings.
        vocab_size: Number of different tokens.
        local_batch_size: Sequences per step on a rank.
        budget_bytes: Memory of a rank, or None for no limit.
        mode: Precision, attention implementation and parallelism.

    Returns:
        The training settings with both chosen, and their memory as from `estimate_memory`.
    """
    sizes = [min(local_batch_size, training.micro_batch_size or local_batch_size)]
    while training.micro_batch_size is None and sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    setting = training.activation_checkpointing
    for checkpointing, size in product([False, True] if setting is None else [setting], sizes):
        update = {"micro_batch_size": size, "activation_checkpointing": checkpointing}
        candidate = training.model_copy(update=update)
        needed = estimate_memory(model, candidate, vocab_size, mode)
        if fits_memory(needed, budget_bytes):
            break
    # The last candidate, the smallest, if none fits.
    return candidate, needed


def fits_memory(needed: dict[str, float], budget_bytes: float | None) -> bool:
    """Return True if a memory estimate fits into a budget with a margin; None is no limit."""
    return budget_bytes is None or MEMORY_SAFETY_FACTOR * sum(needed.values()) <= budget_bytes
