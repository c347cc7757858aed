"""What a run trains: settings that fit into the memory, and a model with its optimiser, in one process or spread over many.

In: the settings of a run, and the machine. Out: a model with its initial weights. Refuses: a model that does not fit.
"""

import torch

from nanogpt import checkpoint, machine
from nanogpt.config import Config
from nanogpt.errors import UserError
from nanogpt.machine import Machine, Ranks
from nanogpt.model import GPT
from nanogpt.optim import Optimizer
from nanogpt.plan import PRECISION, fit


def fitted(settled: Config, vocab_size: int, place: Machine, ranks: Ranks = Ranks()) -> tuple[Config, float, float | None]:
    """The settings, with as many windows computed at once as memory suffices for; the bytes that a step will take, and those that are free, in each process.

    Errors: `UserError` where not even one fits by far: a system may kill the process, and others, without a word.
    """
    free, half, fused = machine.free_memory(place.device), place.dtype != torch.float32, place.attention == "fused"
    if free is not None and place.device.type == "cpu":  # where the processes of a machine share it
        free /= ranks.local_size
    training, parts = fit(
        settled.model, settled.training, vocab_size, len(ranks.rows(settled.training.batch_size)), free,
        half=half, fused=fused, ranks=ranks.size, parallel=settled.machine.parallel,
    )  # fmt: skip
    needed, rows = sum(parts.values()), training.micro_batch_size
    if free is not None and needed > PRECISION * free:
        lower = "--micro-batch-size" if rows != 1 else "--batch-size" if parts["batch"] > needed / 2 else "--context-length, --n-embd or --n-layer"
        raise UserError(
            f"There is not enough memory to train this model, even with {'one window' if rows == 1 else f'{rows:,} windows'} of "
            f"{settled.model.context_length:,} tokens at a time: it takes about {needed / 1e9:,.2g} GB, and {free / 1e9:,.2g} GB are free.",
            f"Lower {lower}; `nanogpt plan` tells what each would take.",
        )
    return settled.model_copy(update={"training": training}), needed, free


@torch.no_grad()
def build(settled: Config, vocab_size: int, place: Machine, ranks: Ranks = Ranks()) -> tuple[GPT, Optimizer]:
    """A model with its initial weights, which are the same on every device and in any number of processes, and its optimiser."""
    generator = torch.Generator().manual_seed(settled.training.seed)
    if ranks.sharded:
        with torch.device("meta"):
            model = GPT(settled.model, vocab_size)
        machine.shard(model, ("nats", "next_logits"))
        model.to_empty(device=place.device)
        for name, parameter in model.named_parameters():  # of which one at a time is whole
            whole = torch.empty(parameter.shape)
            model.init_weight(name, whole, generator)
            ranks.fill(parameter, whole)
    else:
        model = checkpoint.empty_model(settled.model, vocab_size, "cpu")
        model.init_weights(generator)
        model.to(place.device)
    model.fuse_attention(place.attention == "fused")
    model.checkpoint_activations(bool(settled.training.checkpoint_activations))
    divided = {"divided": machine.Division(ranks)} if ranks.size > 1 else {}
    return model, Optimizer(model, settled.training, model.matrices(), place.dtype, **divided)
