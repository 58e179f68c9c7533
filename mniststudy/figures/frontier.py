"""Notebook 07: how small a network can get, and what was tried at each size."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistlib import RECIPES
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note, show_digit

from ..runs.ledger import LedgerError, config_in, images_seen, read_results, runs_for
from ..runs.stats import mean_interval

# labels that would cover something at the right of their points: offset and alignment
PLACES = {
    "Parameter-Efficient-MNIST": ((-42, -14), "left"),
    "ERA4": ((-6, -9), "right"),
    "README of a course": ((-10, -12), "center"),
    "keras-io": ((-6, 3), "right"),
}
# the recipe within each number of parameters
BUDGETS = {
    697: "best-697", 1_000: "best-1000", 1_936: "best-1936", 3_500: "best-3500",
    6_174: "best-6174", 7_918: "best-7918", 13_912: "best", 20_000: "best-20k",
}  # fmt: skip


def frontier(recipes: Iterable[str]) -> pd.DataFrame:
    """Return a row for each recipe with test results, by the size of its network.

    Columns: `recipe`, `model`, `parameters`, `multiply_accumulates`, `images` seen in training, `n`
    seeds, test `error` in percent, mean over seeds, its 95 % interval `low` to `high` over seeds,
    `best` and `worst` seed, mean test `loss`.

    Raises:
        LedgerError: a recipe has fewer than two tested runs.
    """
    rows = []
    for recipe in recipes:
        runs = runs_for(RECIPES[recipe]).dropna(subset="test_accuracy")
        if len(runs) < 2:
            raise LedgerError(f"the ledger has fewer than two tested runs of the recipe {recipe!r}")
        error, first = 100 - runs["test_accuracy"], runs.iloc[0]
        row = {"recipe": recipe, **first[["model", "parameters", "multiply_accumulates"]]}
        row |= {"images": images_seen(first), "n": len(runs)}
        row |= dict(zip(("error", "low", "high"), mean_interval(list(error)), strict=True))
        row |= {"best": error.min(), "worst": error.max(), "loss": runs["test_loss"].mean()}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("parameters", ignore_index=True)


def tried() -> pd.DataFrame:
    """Return a row for each design and recipe that was judged on images of unseen writers.

    Only networks of less than 20,000 parameters, and no run that was tested. Columns: `model`,
    `parameters`, `images` seen, `config` without seed and group of writers, `n` runs, mean
    validation `error` in percent and `loss`.
    """
    runs = read_results()
    judged = runs["split"].str.startswith("writers") & runs["test_accuracy"].isna()
    runs = runs[judged & (runs["parameters"] < 20_000)].copy()
    runs["images"] = [images_seen(row) for _, row in runs.iterrows()]
    same: dict[str, Any] = {"seed": 0, "device": "auto", "threads": 0, "split": "writers"}
    runs["config"] = [str(replace(config_in(text), **same)) for text in runs["config"]]
    runs["error"] = 100 - runs["val_accuracy"]
    designs = runs.groupby(["parameters", "model", "images", "config"])
    columns = {"n": ("seed", "size"), "error": ("error", "mean"), "loss": ("val_loss", "mean")}
    return designs.agg(**columns).reset_index()


def error_vs_parameters(
    points: pd.DataFrame, others: pd.DataFrame, claims: pd.DataFrame, title: str, subtitle: str = ""
) -> None:
    """Draw test error against parameters, both logarithmic, with public claims as hollow points.

    Args:
        points: the frontier, as `frontier` returns it.
        others: further recipes, likewise.
        claims: columns `parameters`, `accuracy` and `source`.
        title: the finding.
        subtitle: what is shown, with n.
    """
    with figure(title, subtitle, (7, 4.4)) as (_, (ax,)):
        log_axis(ax.xaxis)
        log_axis(ax.yaxis)
        x, y = points["parameters"], points["error"]
        ax.fill_between(x, points["best"], points["worst"], color=TRAIN, alpha=0.18, lw=0)
        ax.plot(x, y, "o-", color=TRAIN, ms=4)
        # at the right of its point where the label before it is near
        for spot, near in zip(zip(x, y, strict=True), x < 1.4 * x.shift(), strict=True):
            place, side = ((0, -24), "left") if near else ((-3, -24), "right")
            note(ax, "{:,}\n{:.2f} %".format(*spot), spot, place, color=TRAIN, ha=side)
        for row in others.to_dict("records"):
            spot = (row["parameters"], row["error"])
            ax.plot(*spot, "o", color=REFERENCE, ms=4)
            place, side = ((6, -6), "left") if spot[0] > 15_000 else ((-6, 2), "right")
            note(ax, row["recipe"], spot, place, color=REFERENCE, ha=side)
        for row in claims.to_dict("records"):
            name, spot = row["source"].split("/")[-1], (row["parameters"], 100 - row["accuracy"])
            ax.plot(*spot, "D", mfc="none", color=VALIDATION, ms=5)
            place, side = PLACES.get(name, ((6, 3), "left"))
            note(ax, name, spot, place, color=VALIDATION, fontsize=7, ha=side)
        ax.set(xlabel="parameters", ylabel="test error (%)", xlim=(0.75 * ax.get_xlim()[0], None))


def all_weights(model: nn.Module, title: str) -> None:
    """Draw every parameter of a small network: orange negative, violet positive, by tensor."""
    tensors = [p.detach() for p in model.parameters() if p.ndim == 4]
    shapes = [p.shape[:3] for p in tensors]
    labels = [
        f"{out} kernels {k}x{k}" if into == 1 else f"{k}x{k}, {into} to {out}"
        for out, into, k in shapes
    ]
    norms = torch.cat([p.detach() for p in model.parameters() if p.ndim == 1])
    tensors, labels = [*tensors, norms.view(-1, 1, 1, 1)], [*labels, "BatchNorm"]
    pictures = [_tiles(p) for p in tensors]
    grid = {"ncols": len(pictures), "width_ratios": [p.shape[1] for p in pictures]}
    with figure(title, "", (7, 1.7), **grid) as (_, axes):
        for ax, p, picture, label in zip(axes, tensors, pictures, labels, strict=True):
            top = float(p.abs().max())
            show_digit(ax, picture, cmap="PuOr", vmin=-top, vmax=top)
            ax.set_xlabel(f"{label}\n{p.numel()}", fontsize=7)


def _tiles(weight: Tensor) -> Tensor:
    """Return filters `(out, in, k, k)` as one picture: a row for each output, nan around each.

    Kernels of a single input stand in a square instead.
    """
    if weight.shape[1] == 1:
        side = math.ceil(len(weight) ** 0.5)
        empty = weight.new_full((-len(weight) % side, *weight.shape[1:]), math.nan)
        weight = torch.cat([weight, empty]).view(-1, side, *weight.shape[2:])
    gap = int(weight.shape[-1] > 1)
    tiles = F.pad(weight, [0, gap, 0, gap], value=math.nan)
    picture = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    return F.pad(picture, [gap, 0, gap, 0], value=math.nan)
