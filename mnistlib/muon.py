"""Muon, the optimizer behind the setting `optimizer=muon`."""

from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum that orthogonalises the steps of filters.

    A filter bank `(out, in, k, k)` is treated as a matrix `(out, in * k * k)`. Its step keeps the
    singular vectors and sets all singular values to about one, so rare directions move as far as
    common ones. Source: K. Jordan, "Muon", 2024, github.com/KellerJordan/Muon. torch's own class
    takes matrices only.

    Args:
        groups: parameter groups with `params` and, if needed, `weight_decay` (default 0) and
            `orthogonal` (default False).
        lr: learning rate; the singular values of an orthogonal step are a tenth of it.
        momentum: momentum of all steps.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False}
        super().__init__([g for g in groups if g["params"]], defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                gradient = p.grad.add(p, alpha=group["weight_decay"])
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
                update = gradient.add(buffer, alpha=group["momentum"])
                if group["orthogonal"]:
                    update = 0.1 * orthogonal(update.flatten(1)).view_as(p)
                p.add_(update, alpha=-group["lr"])


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring a matrix's singular values near one by the Newton-Schulz iteration.

    With Jordan's coefficients it is fast rather than exact: they end between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
