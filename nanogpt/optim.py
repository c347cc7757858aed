"""AdamW, Muon, and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from nanogpt.config import TrainingConfig

# A batch of a small run has few tokens: beta2 = 0.99 averages squared gradients over more steps
# than the usual 0.95.
ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-8
MIN_LR_RATIO = 0.1  # of the peak, at the end of a cosine (Hoffmann et al. 2022, appendix B)
MUON_MOMENTUM = 0.9  # better in short runs than the usual 0.95, see docs/experiments.md

# The polynomials a X + b (X X') X + c (X X')^2 X of Polar Express (Amsel et al. 2025, theorem 3.1
# and algorithm 1), for four iterations and singular values from 4e-3 to 1, which come to within
# 13 % of 1. The factor 1.02 keeps bfloat16 rounding from making them grow.
POLAR_EXPRESS = tuple(
    (a / 1.02, b / 1.02**3, c / 1.02**5)
    for a, b, c in (
        (8.340980668, -24.597367869, 18.223024853),
        (3.977994423, -2.965434208, 0.564272001),
        (3.327478541, -2.495236797, 0.510813368),
        (2.308564578, -1.675994456, 0.419573929),
    )
)

OptimizerState = dict[Tensor, dict[str, Tensor]]
# Computes the updates of some directions, given their indices and the directions themselves.
UpdateFn = Callable[[list[int], list[Tensor]], list[Tensor]]
# Computes the updates of all directions with an `UpdateFn`, on one or several processes.
DistributeFn = Callable[[Sequence[Tensor], UpdateFn], list[Tensor]]


def run_locally(directions: Sequence[Tensor], compute: UpdateFn) -> list[Tensor]:
    """Compute all updates in this process."""
    return compute(list(range(len(directions))), list(directions))


class Optimizer:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest.

    It calls the functional forms: constructing a class of `torch.optim` imports the compiler,
    which takes a second. State tensors have names, so that a file can hold them.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingConfig,
        muon_splits: dict[str, list[int]],
        dtype: torch.dtype = torch.bfloat16,
        distribute: DistributeFn = run_locally,
    ):
        """Create an optimizer without state.

        Args:
            model: The model whose parameters are updated.
            settings: Optimizer, peak learning rates and weight decay.
            muon_splits: Names of the matrices that Muon may update, each with the row counts of the
                separate matrices stacked in it.
            dtype: The precision of Muon's matrix products; bfloat16 suffices.
            distribute: Where Muon's updates are computed.
        """
        self.settings = settings
        self.dtype = dtype
        self.distribute = distribute
        self.params: dict[str, Tensor] = dict(model.named_parameters())
        self.state: OptimizerState = defaultdict(dict)
        splits = muon_splits if settings.optimizer == "muon" else {}
        self.muon_splits = {p: splits[name] for name, p in self.params.items() if name in splits}

    @torch.no_grad()
    def step(self, lr_scale: float) -> None:
        """Update the parameters that have gradients, at `lr_scale` times the peak rates."""
        lr = lr_scale * self.settings.learning_rate
        weight_decay = self.settings.weight_decay
        params = [p for p in self.params.values() if p.grad is not None]
        adamw_params = [p for p in params if p not in self.muon_splits]
        # Only matrices decay: shrinking a bias or a norm's gain regularizes nothing.
        matrices = [p for p in adamw_params if p.dim() >= 2]
        vectors = [p for p in adamw_params if p.dim() < 2]
        adamw_step(matrices, self.state, lr, weight_decay)
        adamw_step(vectors, self.state, lr, 0.0)
        muon_splits = {p: self.muon_splits[p] for p in params if p in self.muon_splits}
        muon_lr = lr_scale * self.settings.muon_learning_rate
        muon_step(muon_splits, self.state, muon_lr, weight_decay, self.dtype, self.distribute)

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.params.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors named "parameter.quantity"."""
        return {
            f"{name}.{key}": value
            for name, p in self.params.items()
            for key, value in self.state.get(p, {}).items()
        }

    def empty_state_tensor(self, full_name: str, shape: Sequence[int]) -> Tensor:
        """Return an empty tensor for a name of `state_dict`, sharded as its parameter is.

        Raises:
            KeyError: The model has no such parameter.
        """
        p = self.params[full_name.rpartition(".")[0]]
        if list(p.shape) == list(shape):
            return torch.empty_like(p, requires_grad=False)
        return torch.empty(list(shape), device=p.device)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict` exactly.

        Raises:
            KeyError: The model has no such parameter.
        """
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            p = self.params[name]
            self.state[p][key] = value.to(p.device)


def adamw_step(params: list[Tensor], state: OptimizerState, lr: float, weight_decay: float) -> None:
    """Apply one AdamW update (Loshchilov and Hutter 2019, algorithm 2), in one fused kernel."""
    if not params:
        return
    for p in params:
        if not state[p]:
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
            state[p]["step"] = torch.zeros((), device=p.device)
    adamw(
        params,
        [p.grad for p in params if p.grad is not None],
        [state[p]["exp_avg"] for p in params],
        [state[p]["exp_avg_sq"] for p in params],
        [],
        [state[p]["step"] for p in params],
        fused=True,
        lr=lr,
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        eps=ADAM_EPS,
        weight_decay=weight_decay,
        amsgrad=False,
        maximize=False,
    )


def muon_step(
    splits: dict[Tensor, list[int]],
    state: OptimizerState,
    lr: float,
    weight_decay: float,
    dtype: torch.dtype,
    distribute: DistributeFn = run_locally,
) -> None:
    """Apply one update of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    W <- (1 - lr weight_decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(G), where G is the
    Nesterov momentum of the gradient. All directions of a matrix thus move by the same amount.

    Args:
        splits: The parameters, each with the row counts of the matrices stacked in it.
        state: The optimizer state, which is updated.
        lr: The learning rate.
        weight_decay: The weight decay.
        dtype: The precision of the matrix products.
        distribute: Where the updates are computed.
    """
    if not splits:
        return
    directions = []
    for p in splits:
        if not state[p]:
            state[p]["momentum"] = torch.zeros_like(p)
        assert p.grad is not None
        momentum = state[p]["momentum"].lerp_(p.grad, 1 - MUON_MOMENTUM)
        directions.append(p.grad.lerp(momentum, MUON_MOMENTUM).to(dtype))
    row_counts = list(splits.values())

    def compute(indices: list[int], directions: list[Tensor]) -> list[Tensor]:
        return _muon_updates(directions, [row_counts[i] for i in indices])

    updates = distribute(directions, compute)
    for p, update in zip(splits, updates, strict=True):
        p.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def _muon_updates(directions: list[Tensor], row_counts: list[list[int]]) -> list[Tensor]:
    """Orthogonalize the matrices stacked in each direction, those of one shape in one batch."""
    updates = [torch.empty_like(direction) for direction in directions]
    by_shape = defaultdict(list)  # shape -> (source, destination) views
    for direction, update, rows in zip(directions, updates, row_counts, strict=True):
        for src, dst in zip(direction.split(rows), update.split(rows), strict=True):
            by_shape[src.shape].append((src, dst))
    for shape, pairs in by_shape.items():
        matrices = torch.stack([src for src, _ in pairs])  # (N, rows, columns)
        results = orthogonalize(matrices) * max(1.0, shape[0] / shape[1]) ** 0.5
        for (_, dst), result in zip(pairs, results.unbind(), strict=True):
            dst.copy_(result)
    return updates


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return the nearest orthogonal matrices: U V' of each U S V', to within 15 %.

    Args:
        matrices: A batch of matrices, (N, rows, columns).

    Returns:
        Matrices of the same shape whose singular values are about 1.
    """
    norms = matrices.norm(dim=(-2, -1), keepdim=True)
    x = matrices / (norms * 1.02 + 1e-7)  # The singular values are at most 1.
    is_tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        gram = x.mT @ x if is_tall else x @ x.mT  # on the smaller side
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b X X' + c (X X')^2
        x = torch.baddbmm(x, x, poly, beta=a) if is_tall else torch.baddbmm(x, poly, x, beta=a)
    return x


def lr_multiplier(progress: float, warmup_fraction: float, cooldown_fraction: float) -> float:
    """Return the learning rate as a fraction of its peak.

    The rate rises linearly. With a cool-down it then stays, and falls linearly to zero at the end
    (Zhai et al. 2022, section 3.5; Hägele et al. 2024, section 3). Without one it falls along half
    a cosine to `MIN_LR_RATIO` (Loshchilov and Hutter 2017, section 3).

    Args:
        progress: The fraction of the run that is done, from 0 to 1.
        warmup_fraction: The fraction of the run in which the rate rises.
        cooldown_fraction: The fraction of the run, at its end, in which it falls; 0 for a cosine.
    """
    warmup = progress / warmup_fraction if progress < warmup_fraction else 1.0
    if cooldown_fraction > 0:
        return min(warmup, max(0.0, 1.0 - progress) / cooldown_fraction)
    if progress < warmup_fraction:
        return warmup
    decay = (progress - warmup_fraction) / (1.0 - warmup_fraction) if warmup_fraction < 1.0 else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(decay, 1.0)))
    return MIN_LR_RATIO + (1.0 - MIN_LR_RATIO) * cosine
