"""Optimizers and learning-rate schedules of a Config."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .config import Config
from .muon import Muon

MOMENTUM = 0.9
DROPS = (0.6, 0.85)  # shares of all steps after which `step` divides the learning rate by ten


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Return the optimizer of a Config for the parameters of a network."""
    parameters = list(model.parameters())
    fused = parameters[0].device.type in ("cpu", "cuda")  # all parameters in one kernel
    lr, decay = config.max_lr, config.weight_decay
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        return kind(parameters, lr=lr, weight_decay=decay, fused=fused)
    vectors = [p for p in parameters if p.ndim <= 1]  # decay would work against BatchNorm
    matrices = [p for p in parameters if p.ndim > 1]
    no_decay = {"params": vectors, "weight_decay": 0.0}
    if config.optimizer == "sgd":
        groups = [{"params": matrices, "weight_decay": decay}, no_decay]
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=True, fused=fused)
    # plain momentum for first layer, 1x1 convolutions and head, as Muon's author does
    inner = [p for p in matrices if p.shape[-1] == 3 and p.shape[1] > 1]
    others = [p for p in matrices if not (p.shape[-1] == 3 and p.shape[1] > 1)]
    plain = {"params": others, "weight_decay": decay}
    return Muon([{"params": inner, "orthogonal": True}, plain, no_decay], lr, MOMENTUM)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> LRScheduler:
    """Return the learning-rate schedule of a Config, to be stepped once per batch."""
    warm = config.pct_start
    if config.anneal in ("step", "constant"):
        drops = DROPS if config.anneal == "step" else ()

        def factor(step: int) -> float:
            # rises from a 25th of the peak, as in OneCycleLR
            up = 1.0 if step >= warm * steps else 0.04 + 0.96 * step / (warm * steps)
            return up * 0.1 ** sum(step >= drop * steps for drop in drops)

        return LambdaLR(optimizer, factor)
    if math.isclose(warm * steps, 1.0):
        warm *= 0.999  # OneCycleLR divides by the steps of the warm-up less one
    return OneCycleLR(
        optimizer,
        max_lr=config.max_lr,
        total_steps=steps,
        pct_start=warm,
        anneal_strategy="cos" if config.anneal == "cos" else "linear",
        cycle_momentum=config.cycle_momentum,
    )


def learning_rate(scheduler: LRScheduler) -> float:
    """Return the current learning rate, at least zero; linear annealing would end below it."""
    return max(0.0, float(scheduler.get_last_lr()[0]))


def learning_rates(config: Config, steps_per_epoch: int) -> list[float]:
    """Return the learning rate of every step, and one more, after the last step."""
    # skip_init draws no initial weights, so the random state of the process is unchanged
    optimizer = make_optimizer(nn.utils.skip_init(nn.Linear, 1, 1), config)
    scheduler = make_scheduler(optimizer, config, config.epochs * steps_per_epoch)
    rates = [learning_rate(scheduler)]
    optimizer.step()  # once, or the scheduler warns
    for _ in range(config.epochs * steps_per_epoch):
        scheduler.step()
        rates.append(learning_rate(scheduler))
    return rates
