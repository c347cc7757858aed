"""What moves the weights: AdamW with its parameter groups, and the learning rate as a pure function of progress.

In: a model and the settings of a run. Out: an optimiser, and its state as plain tensors by name.
"""

import math

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.99)  # a batch of a small run holds few tokens: average squared gradients over more steps than the usual 0.95
FLOOR = 0.1  # what the cosine falls to, as a share of the highest learning rate (Hoffmann et al. 2022, appendix B)


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Only matrices decay: shrinking a bias or a norm's gain regularises nothing."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=BETAS, fused=True)


def schedule(progress: float, warmup: float) -> float:
    """The learning rate as a share of its highest, at `progress` in [0, 1] of the run, `warmup` being the share that warms up.

    It rises linearly and then falls along half a cosine (Loshchilov and Hutter 2017, section 3) to `FLOOR`.
    """
    if progress < warmup:
        return progress / warmup
    falling = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(falling, 1.0)))


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named "parameter.quantity", for a file."""
    state = optimizer.state
    return {f"{name}.{key}": value for name, p in model.named_parameters() for key, value in state[p].items()}


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave, exactly."""
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(".")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
