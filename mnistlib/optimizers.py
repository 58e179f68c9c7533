"""What moves the weights: optimizers and learning-rate schedules of a Config."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .config import Config

MOMENTUM = 0.9
DROPS = (0.6, 0.85)  # shares of all steps after which the schedule `step` divides the rate by ten


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose steps of filters are made orthogonal.

    A filter bank `(out, in, k, k)` is a matrix `(out, in * k * k)`; its step keeps the singular
    vectors and sets all singular values to about one, so rare directions move as far as common
    ones. Source: K. Jordan, "Muon", 2024, github.com/KellerJordan/Muon, with its iteration.
    torch's own class takes matrices only.

    Args:
        groups: with `params`, `weight_decay`, `orthogonal`.
        lr: learning rate; an orthogonal step has a tenth of it as its singular values.
    """

    def __init__(self, groups: list[dict[str, object]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": MOMENTUM, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take one step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    update = 0.1 * orthogonal(update.flatten(1)).view_as(p)
                p.add_(update, alpha=-group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring a matrix's singular values near one by Newton and Schulz's iteration.

    The coefficients are Jordan's: quick rather than exact, singular values end in about 0.7..1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer of a Config over the parameters of a network."""
    device = next(model.parameters()).device
    common = {"lr": config.max_lr, "fused": device.type in ("cpu", "cuda")}  # one kernel a step
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(model.parameters(), weight_decay=config.weight_decay, **common)
    vectors = [p for p in model.parameters() if p.ndim <= 1]  # decay would fight BatchNorm
    matrices = [p for p in model.parameters() if p.ndim > 1]
    if config.optimizer == "sgd":
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.SGD(groups, momentum=MOMENTUM, nesterov=True, **common)
    # first layer, 1x1 convolutions and head are left to plain momentum, as by Muon's author
    inner = [p for p in matrices if p.ndim == 4 and p.shape[-1] == 3 and p.shape[1] > 1]
    groups = [
        {"params": inner, "orthogonal": True, "weight_decay": 0.0},
        {"params": [p for p in matrices if not any(p is q for q in inner)], "orthogonal": False,
         "weight_decay": config.weight_decay},
        {"params": vectors, "orthogonal": False, "weight_decay": 0.0},
    ]  # fmt: skip
    return Muon([g for g in groups if g["params"]], config.max_lr)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LRScheduler:
    """Return the schedule of a Config over `steps` steps, to be stepped once per batch."""
    warm = config.pct_start
    if config.anneal in ("step", "constant"):
        drops = DROPS if config.anneal == "step" else ()

        def factor(step: int) -> float:
            # from a 25th of the peak, where OneCycleLR begins
            up = 1.0 if step >= warm * steps else 0.04 + 0.96 * step / (warm * steps)
            return up * 0.1 ** sum(step >= drop * steps for drop in drops)

        return LambdaLR(optimizer, factor)
    if math.isclose(warm * steps, 1.0):
        warm *= 0.999  # a warm-up of just one step has no length, by which OneCycleLR divides
    return OneCycleLR(
        optimizer,
        max_lr=config.max_lr,
        total_steps=steps,
        pct_start=warm,
        anneal_strategy=config.anneal,
        cycle_momentum=config.cycle_momentum,
    )


def rate(scheduler: LRScheduler) -> float:
    """Return the learning rate now; a straight line goes below zero after the last step."""
    return max(0.0, scheduler.get_last_lr()[0])


def learning_rates(config: Config, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every step, and last the one after the final step."""
    # no initial values are drawn, so the process's random state stays as it is
    optimizer = make_optimizer(nn.utils.skip_init(nn.Linear, 1, 1), config)
    scheduler = make_scheduler(optimizer, config, config.epochs * steps_per_epoch)
    rates = [rate(scheduler)]
    for _ in range(config.epochs * steps_per_epoch):
        optimizer.step()
        scheduler.step()
        rates.append(rate(scheduler))
    return rates
