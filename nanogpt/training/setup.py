"""Setup of a run: a micro-batch size that fits in memory, the model and its optimizer."""

import torch

from nanogpt import checkpoint
from nanogpt.config import Config
from nanogpt.device import memory
from nanogpt.device.device import Machine
from nanogpt.distributed import parallelize
from nanogpt.distributed.context import DistContext
from nanogpt.distributed.muon import DistributedMuon
from nanogpt.errors import UserError
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.plan.model_size import MEMORY_SAFETY_FACTOR, StepMode, fit_micro_batch
from nanogpt.training.recipe import ChosenSetting


def fit_to_memory(
    config: Config, vocab_size: int, machine: Machine, dist: DistContext
) -> tuple[Config, float, float | None, list[ChosenSetting]]:
    """Choose the micro-batch size and activation checkpointing so that a step fits in memory.

    Args:
        config: Settings of the run. Values that the user has set stay.
        vocab_size: Tokens in the vocabulary.
        machine: Device and precision.
        dist: Ranks that share the batch.

    Returns:
        The completed settings, the estimated bytes of a step on each rank, and the free bytes of
        each rank (None if the system does not report them). Last, the settings that were chosen
        because a full batch does not fit.

    Raises:
        UserError: A step does not fit. The operating system may otherwise kill the process.
    """
    free_bytes = memory.available_memory(machine.device)
    if free_bytes is not None and machine.device.type == "cpu":
        # The ranks of a node share its memory.
        free_bytes /= dist.local_world_size
    mode = StepMode(
        mixed_precision=machine.dtype != torch.float32,
        sdpa=machine.attention == "sdpa",
        world_size=dist.world_size,
        parallel=config.device.parallel,
    )
    batch_size = len(dist.local_batch_slice(config.training.batch_size))
    training, required = fit_micro_batch(
        config.model, config.training, vocab_size, batch_size, free_bytes, mode
    )
    required_bytes = sum(required.values())
    if free_bytes is not None and required_bytes > MEMORY_SAFETY_FACTOR * free_bytes:
        micro_batch_size = training.micro_batch_size or 1
        if micro_batch_size != 1:
            lower = "micro_batch_size"
        elif required["batch"] > required_bytes / 2:
            lower = "batch_size"
        else:
            lower = "context_length, n_embd or n_layer"
        plural = "s" if micro_batch_size != 1 else ""
        raise UserError(
            f"Not enough memory to train with micro-batches of {micro_batch_size:,} "
            f"sequence{plural} of {config.model.context_length:,} tokens: about "
            f"{required_bytes / 1e9:,.2g} GB (free: {free_bytes / 1e9:,.2g} GB).",
            f"Lower {lower}; `nanogpt plan` shows the memory of any settings.",
        )
    free_gb = (free_bytes or 0) / 1e9
    reason = f"{batch_size} sequences at once need more than the {free_gb:.2g} GB that are free"
    choices = []
    if config.training.micro_batch_size is None and training.micro_batch_size != batch_size:
        choices.append(ChosenSetting("micro_batch_size", training.micro_batch_size, reason))
    if config.training.activation_checkpointing is None and training.activation_checkpointing:
        choices.append(ChosenSetting("activation_checkpointing", True, reason))
    config = config.model_copy(update={"training": training})
    return config, required_bytes, free_bytes, choices


@torch.no_grad()
def build_model_and_optimizer(
    config: Config, vocab_size: int, machine: Machine, dist: DistContext = DistContext()
) -> tuple[GPT, Optimizer]:
    """Build the model and its optimizer.

    The initial weights depend on the seed only, not on the device or the number of ranks.
    """
    generator = torch.Generator().manual_seed(config.training.seed)
    if dist.is_fsdp:
        with torch.device("meta"):
            model = GPT(config.model, vocab_size)
        parallelize.apply_fsdp(model, ("loss_sum", "last_token_logits"))
        model.to_empty(device=machine.device)
        # Only one full parameter is in memory at a time.
        for name, parameter in model.named_parameters():
            full_parameter = torch.empty(parameter.shape)
            model.init_param(name, full_parameter, generator)
            dist.broadcast_tensor_into(parameter, full_parameter)
    else:
        model = checkpoint.build_uninitialized(config.model, vocab_size, "cpu")
        model.init_weights(generator)
        model.to(machine.device)
    model.set_attn_implementation(machine.attention)
    model.activation_checkpointing = bool(config.training.activation_checkpointing)
    distribute = {"distribute": DistributedMuon(dist)} if dist.world_size > 1 else {}
    return model, Optimizer(
        model, config.training, model.muon_param_splits(), machine.dtype, **distribute
    )
