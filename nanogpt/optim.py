"""What moves the weights: AdamW and Muon, and the learning rate as a pure function of progress.

In: named parameters and the settings of a run. Out: an optimiser, and its state as plain tensors by name.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nanogpt.config import TrainingConfig

BETAS = (0.9, 0.99)  # a batch of a small run holds few tokens: average squared gradients over more steps than the usual 0.95
EPSILON = 1e-8  # of AdamW
FLOOR = 0.1  # what the cosine falls to, as a share of the highest learning rate (Hoffmann et al. 2022, appendix B)
MOMENTUM = 0.9  # of Muon: better than the usual 0.95 in short runs (1.487 and 1.511 after 800 steps, 1.456 and 1.468 after 1,200), and than 0.85 (1.500)
# The polynomials a X + b (X X') X + c (X X')^2 X of Polar Express (Amsel et al. 2025, theorem 3.1 and algorithm 1), found for four steps and singular values
# from 4e-3 to 1, which come to within 13 % of 1. A fifth step gained nothing (a loss of 1.5462 after 800 steps, 1.5468 with four), leaving one out lost 0.012.
# The factor 1.02 keeps rounding in bfloat16 from making them grow.
POLAR_EXPRESS = tuple(
    (a / 1.02, b / 1.02**3, c / 1.02**5)
    for a, b, c in (
        (8.340980668, -24.597367869, 18.223024853),
        (3.977994423, -2.965434208, 0.564272001),
        (3.327478541, -2.495236797, 0.510813368),
        (2.308564578, -1.675994456, 0.419573929),
    )
)


Compute = Callable[[list[int], list[Tensor]], list[Tensor]]  # the updates of some directions, by their numbers
Divided = Callable[[Sequence[Tensor], Compute], list[Tensor]]  # those of all directions, however they are computed


def undivided(directions: Sequence[Tensor], compute: Compute) -> list[Tensor]:
    """All of them here, at once."""
    return compute(list(range(len(directions))), list(directions))


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest; each with its highest learning rate.

    They are functions of gradients and of a state by name; the classes of `torch.optim` import the compiler when they are made, which takes a second.
    """

    def __init__(
        self, model: nn.Module, settings: TrainingConfig, matrices_of_blocks: dict[str, list[int]],
        dtype: torch.dtype = torch.bfloat16, divided: Divided = undivided,
    ):  # fmt: skip
        """`matrices_of_blocks` has the names of parameters that Muon may move, each with the row counts of the separate matrices stacked in it;
        `dtype` is that of its products, of which bfloat16 is enough; `divided` says who computes them."""
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.settings, self.dtype, self.divided = settings, dtype, divided
        muon = settings.optimizer == "muon"
        self.matrices = {p: matrices_of_blocks[name] for p, name in self.names.items() if muon and name in matrices_of_blocks}

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move the weights along their gradients, at `share` of the highest learning rates, and drop the gradients."""
        settings, decay = self.settings, self.settings.weight_decay
        moving = [p for p in self.names if p.grad is not None]
        rest = [p for p in moving if p not in self.matrices]
        # only matrices decay: shrinking a bias or a norm's gain regularises nothing
        adamw([p for p in rest if p.dim() >= 2], self.state, share * settings.learning_rate, decay)
        adamw([p for p in rest if p.dim() < 2], self.state, share * settings.learning_rate, 0.0)
        whole = {p: self.matrices[p] for p in moving if p in self.matrices}
        muon(whole, self.state, share * settings.matrix_learning_rate, decay, self.dtype, self.divided)
        for p in moving:
            p.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as tensors named "parameter.quantity", for a file."""
        return {f"{self.names[p]}.{key}": value for p, state in self.state.items() for key, value in state.items()}

    def room(self, full_name: str, shape: Sequence[int]) -> Tensor:
        """An empty tensor for one of the names of `state_tensors`, which lies as its parameter does. Errors: KeyError for a parameter that is not there."""
        p = {name: p for p, name in self.names.items()}[full_name.rpartition(".")[0]]
        return torch.empty_like(p, requires_grad=False) if list(p.shape) == list(shape) else torch.empty(list(shape), device=p.device)

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, exactly. Errors: KeyError for a parameter that is not there."""
        parameters = {name: p for p, name in self.names.items()}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            self.state[parameters[name]][key] = value.to(parameters[name].device)


def adamw(parameters: list[Tensor], state: dict[Tensor, dict[str, Tensor]], rate: float, decay: float) -> None:
    """One update of AdamW (Loshchilov and Hutter 2019, algorithm 2) by the one kernel that `torch.optim.AdamW(fused=True)` calls."""
    if not parameters:
        return
    for p in parameters:
        if not state[p]:
            state[p] |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p), "step": torch.zeros((), device=p.device)}
        state[p]["step"] += 1
    gradients = [p.grad for p in parameters if p.grad is not None]  # all of them
    first, second, steps = ([state[p][key] for p in parameters] for key in ("exp_avg", "exp_avg_sq", "step"))
    torch._fused_adamw_(
        parameters, gradients, first, second, [], steps,
        lr=rate, beta1=BETAS[0], beta2=BETAS[1], weight_decay=decay, eps=EPSILON, amsgrad=False, maximize=False,
    )  # fmt: skip


def muon(
    matrices: dict[Tensor, list[int]], state: dict[Tensor, dict[str, Tensor]], rate: float, decay: float, dtype: torch.dtype, divided: Divided = undivided
) -> None:
    """One update of Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers"): W <- (1 - rate decay) W - rate sqrt(max(1, rows / columns))
    orthogonalize(Nesterov momentum of the gradient), so that every direction of a matrix moves by the same amount.
    """
    if not matrices:
        return
    directions = []
    for p in matrices:
        if not state[p]:
            state[p]["momentum"] = torch.zeros_like(p)
        assert p.grad is not None
        momentum = state[p]["momentum"].lerp_(p.grad, 1 - MOMENTUM)
        directions.append(p.grad.lerp(momentum, MOMENTUM).to(dtype))
    stacks = list(matrices.values())
    updates = divided(directions, lambda numbers, whole: _orthogonal_updates(whole, [stacks[i] for i in numbers]))
    for p, update in zip(matrices, updates, strict=True):
        p.mul_(1 - rate * decay).sub_(update, alpha=rate)


def _orthogonal_updates(directions: list[Tensor], stacks: list[list[int]]) -> list[Tensor]:
    """What Muon moves some parameters along. Matrices that lie stacked in one of them, by the row counts given, are orthogonalised one by one; those of one
    shape are computed together."""
    updates = [torch.empty_like(direction) for direction in directions]
    alike = defaultdict(list)  # shape -> (direction, where its update goes), views
    for direction, update, rows in zip(directions, updates, stacks, strict=True):
        for part, into in zip(direction.split(rows), update.split(rows), strict=True):
            alike[part.shape].append((part, into))
    for shape, pairs in alike.items():
        found = orthogonalize(torch.stack([part for part, _ in pairs])) * max(1.0, shape[0] / shape[1]) ** 0.5  # (matrices, rows, columns)
        for (_, into), update in zip(pairs, found.unbind(), strict=True):
            into.copy_(update)
    return updates


def orthogonalize(matrices: Tensor) -> Tensor:
    """(matrices, rows, columns) -> the nearest matrices whose singular values are all 1, to within 15 %: U V' of each U S V'."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)  # singular values at most 1
    tall = x.shape[-2] > x.shape[-1]
    for a, b, c in POLAR_EXPRESS:
        square = x.mT @ x if tall else x @ x.mT  # of the smaller side
        square = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b (X X') + c (X X')^2
        x = torch.baddbmm(x, x, square, beta=a) if tall else torch.baddbmm(x, square, x, beta=a)
    return x


def schedule(progress: float, warmup: float, cooldown: float) -> float:
    """The learning rate as a share of its highest, at `progress` in [0, 1] of the run, `warmup` and `cooldown` being shares of the run.

    It rises linearly. With a cool-down it then stays, and falls linearly to zero (Zhai et al. 2022, section 3.5; Hägele et al. 2024, section 3);
    without, it falls along half a cosine (Loshchilov and Hutter 2017, section 3) to `FLOOR`.
    """
    rise = progress / warmup if progress < warmup else 1.0
    if cooldown > 0:
        return min(rise, max(0.0, 1.0 - progress) / cooldown)
    if progress < warmup:
        return rise
    falling = (progress - warmup) / (1.0 - warmup) if warmup < 1.0 else 1.0
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * min(falling, 1.0)))
