"""What moves the weights: AdamW and Muon, and the learning rate as a pure function of progress.

In: named parameters and the settings of a run. Out: an optimiser, and its state as plain tensors by name.
"""

import math
from collections import defaultdict

import torch
from torch import Tensor, nn

from nanogpt.config import TrainingConfig

BETAS = (0.9, 0.99)  # a batch of a small run holds few tokens: average squared gradients over more steps than the usual 0.95
FLOOR = 0.1  # what the cosine falls to, as a share of the highest learning rate (Hoffmann et al. 2022, appendix B)
MOMENTUM = 0.95  # of Muon
# The polynomials a X + b (X X') X + c (X X')^2 X of Polar Express (Amsel et al. 2025, algorithm 1 and appendix), which bring singular values
# from 1e-3 and above to 1 in five steps. They are for exact arithmetic; a factor keeps bfloat16 from diverging (there it is 1.01, without the last).
POLAR_EXPRESS = tuple(
    (a / 1.02, b / 1.02**3, c / 1.02**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)


class Optimizer:
    """AdamW for all parameters, or Muon for the matrices of the blocks and AdamW for the rest; each with its highest learning rate."""

    def __init__(self, model: nn.Module, settings: TrainingConfig, matrices_of_blocks: dict[str, list[int]], dtype: torch.dtype = torch.bfloat16):
        """`matrices_of_blocks` has the names of parameters that Muon may move, each with the row counts of the separate matrices stacked in it;
        `dtype` is that of its products, of which bfloat16 is enough."""
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        decay, muon = settings.weight_decay, settings.optimizer == "muon"
        matrices = {p: matrices_of_blocks[name] for name, p in model.named_parameters() if muon and name in matrices_of_blocks}
        rest = [p for p in model.parameters() if p not in matrices]
        groups = [  # only matrices decay: shrinking a bias or a norm's gain regularises nothing
            {"params": [p for p in rest if p.dim() >= 2], "weight_decay": decay},
            {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, betas=BETAS, fused=True)  # Loshchilov and Hutter 2019
        self.moves: list[tuple[torch.optim.Optimizer, float]] = [(adamw, settings.learning_rate)]
        if matrices:
            self.moves.append((Muon(matrices, decay, dtype), settings.matrix_learning_rate))

    def step(self, share: float) -> None:
        """Move the weights along their gradients, at `share` of the highest learning rates, and drop the gradients."""
        for optimizer, highest in self.moves:
            for group in optimizer.param_groups:
                group["lr"] = share * highest
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """The state as tensors named "parameter.quantity", for a file."""
        return {f"{self.names[p]}.{key}": value for optimizer, _ in self.moves for p, state in optimizer.state.items() for key, value in state.items()}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_tensors` gave, exactly. Errors: KeyError for a parameter that is not there."""
        owner = {self.names[p]: (optimizer, p) for optimizer, _ in self.moves for group in optimizer.param_groups for p in group["params"]}
        for full_name, value in tensors.items():
            name, _, key = full_name.rpartition(".")
            optimizer, p = owner[name]
            optimizer.state[p][key] = value.to(p.device)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves by the same amount (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

    Matrices that lie stacked in one parameter are moved one by one, and those of one shape are computed together.
    """

    def __init__(self, matrices: dict[nn.Parameter, list[int]], weight_decay: float, dtype: torch.dtype):
        super().__init__(list(matrices), {"lr": 0.0, "weight_decay": weight_decay})
        self.rows, self.dtype = matrices, dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update: W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonalize(Nesterov momentum of the gradient)."""
        (group,) = self.param_groups
        alike = defaultdict(list)  # shape -> (matrix, direction), views of the parameters and of what they move along
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            direction = p.grad.lerp(momentum, MOMENTUM).to(self.dtype)
            for matrix, part in zip(p.split(self.rows[p]), direction.split(self.rows[p]), strict=True):
                alike[matrix.shape].append((matrix, part))
        for shape, pairs in alike.items():
            updates = orthogonalize(torch.stack([part for _, part in pairs]))  # (matrices, rows, columns)
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for (matrix, _), update in zip(pairs, updates.unbind(), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(matrices, rows, columns) -> the nearest matrices whose singular values are all 1, to within some percent: U V' of each U S V'."""
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
