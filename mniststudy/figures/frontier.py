"""Notebook 05: how small a network can get, and what was tried at each size."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistlib import MODELS, RECIPES, Budget, Config, load_mnist
from mnistlib.distill import pool_folder
from mnistlib.paths import runs_folder
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note, show_digit

from ..runs.ledger import (
    LedgerError,
    append_rows,
    commit,
    config_in,
    images_seen,
    read_results,
    runs_for,
)
from ..runs.stacked import sweep_stacked
from ..runs.stats import mean_interval
from ..runs.sweep import sweep
from .speed import time_our_loop

# the recipe within each number of parameters
BUDGETS = {
    697: "best-682", 1_000: "best-920", 1_936: "best-1816", 3_500: "best-3500",
    6_174: "best-6174", 7_918: "best-7918", 13_912: "best", 20_000: "best-20k",
}  # fmt: skip
# test accuracies in percent that were set before the search, for each of these numbers
AIMS = {
    697: 99.00, 1_000: 99.10, 1_936: 99.35, 3_500: 99.45,
    6_174: 99.55, 7_918: 99.60, 13_912: 99.65, 20_000: 99.70,
}  # fmt: skip

TAUGHT = ("best-6174", "best-7918", "best", "best-20k")
# eight networks for one protocol, those that were found in small budgets first
SHRINKING = ("net-682", "net-920", "net-1816", "net-3466")
LARGER = ("net-6174", "net-7918", "reference", "net-20k")
# the smallest of before, the new ones, and others that were tried
TIMED = (
    *(MODELS[f"net-{n}"] for n in (697, 1000, 1936, 3500)), "c28p rs2 = = p = = pooled",
    "beta c14p rs1v = = = = linear", *SHRINKING,
)  # fmt: skip
SHAPE_COLUMNS = ("go", "name", "parameters", "repetition", "images", "seconds", "torch", "commit")


def untaught() -> dict[str, Config]:
    """Return the eight networks of the protocol, each with the settings of its training alone."""
    alone = {name: RECIPES[f"best-{name[4:]}"] for name in SHRINKING}
    return alone | {name: replace(RECIPES["teacher"], model=name, epochs=100) for name in LARGER}


def elsewhere() -> list[Config]:
    """Return short runs of the same networks, for any set of images: 150,000 images, five seeds."""
    # an average and statistics that 1,250 steps suffice for
    changes: dict[str, Any] = {"epochs": 10, "ema_decay": 0.99, "norm_images": 10_000}
    short = [replace(config, split="random", **changes) for config in untaught().values()]
    return [replace(config, seed=seed) for seed in range(100, 105) for config in short]


def protocol() -> list[Config]:
    """Return the runs of one protocol for eight networks, those that say most first.

    All see 1.5 million images: 20 seeds of each on its own, then taught by the pool of the recipe
    `best`, 20 seeds of the four larger ones and 5 of the others. A pool must have been built.
    """
    alone = untaught()
    taught = {name: replace(RECIPES["best"], model=name, epochs=100) for name in alone}
    for name in SHRINKING:  # what BatchNorm without a factor needs
        taught[name] = replace(taught[name], max_lr=0.4, norm_images=10_000)
    chosen = [replace(config, seed=seed) for seed in range(20) for config in alone.values()]
    for seed in range(20):
        names = LARGER if seed >= 5 else (*LARGER, *SHRINKING)
        chosen += [replace(taught[name], seed=seed) for name in names]
    return chosen


def train_protocol() -> None:
    """Train what is missing of the protocol, stacked on a GPU; the rows are kept as they come."""
    configs, on_gpu = protocol(), torch.cuda.is_available()
    if not pool_folder(RECIPES["best"].pool).is_dir():
        configs = [config for config in configs if not config.pool]
        print(
            "There is no pool, so none is taught: mnist teach outputs/checkpoints/teacher/seeds/*"
        )
    (sweep_stacked if on_gpu else sweep)(configs, test=True, data="mnist")


def time_shapes(names: Iterable[str], repetitions: int = 3, images: int = 15_000) -> Path:
    """Time training of networks in turn on one thread; return the table.

    Args:
        names: named networks or specs.
        repetitions: how often all of them are timed.
        images: of each timing.
    """
    digits, path = load_mnist(), runs_folder() / "shapes.csv"
    common = {"go": datetime.now(UTC).isoformat()[:19], "images": images, "commit": commit()}
    # a rate at which none diverges in a short run, and what is done once is left out
    plain = replace(RECIPES["best-682"], threads=1, max_lr=0.01, norm_images=0)
    for repetition in range(repetitions):
        for name in names:
            seconds = round(time_our_loop(replace(plain, model=name), digits, images)[0], 4)
            row = {"name": name, "parameters": Budget(name).parameters, "seconds": seconds}
            row |= common | {"repetition": repetition, "torch": torch.__version__}
            append_rows(path, SHAPE_COLUMNS, [row])
    return path


def frontier(configs: Mapping[str, Config]) -> pd.DataFrame:
    """Return a row for each training with test results, by the size of its network.

    Columns: `name`, `model`, `parameters`, `multiply_accumulates`, `images` seen in training, `n`
    seeds, test `error` in percent, mean over seeds, its 95 % interval `low` to `high` over seeds,
    `best` and `worst` seed, mean test `loss`.

    Raises:
        LedgerError: a training has fewer than two tested runs.
    """
    rows = []
    for name, config in configs.items():
        runs = runs_for(config).dropna(subset="test_accuracy")
        if len(runs) < 2:
            raise LedgerError(f"the ledger has fewer than two tested runs of {name!r}")
        error, first = 100 - runs["test_accuracy"], runs.iloc[0]
        row = {"name": name, **first[["model", "parameters", "multiply_accumulates"]]}
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
    curves: Mapping[str, pd.DataFrame], claims: pd.DataFrame, title: str, subtitle: str = ""
) -> None:
    """Draw test error against parameters, both logarithmic, with public claims as hollow points.

    Args:
        curves: up to two frontiers by name, as `frontier` returns them.
        claims: columns `parameters`, `accuracy` and `source`.
        title: the finding.
        subtitle: what is shown, with n.
    """
    with figure(title, subtitle, (7, 4.4)) as (_, (ax,)):
        log_axis(ax.xaxis)
        log_axis(ax.yaxis)
        *_, last = curves.values()
        for (name, points), color in zip(curves.items(), (REFERENCE, TRAIN), strict=False):
            x, y = points["parameters"], points["error"]
            ax.fill_between(x, points["best"], points["worst"], color=color, alpha=0.18, lw=0)
            ax.plot(x, y, "o-", color=color, ms=4)
            shown = points.drop(index=x.index[x < 1.25 * x.shift()])  # too near to the one before
            if points is not last:  # where it is above the last, there is no room
                shown = shown[shown["parameters"] < last["parameters"].min()]
            for spot in zip(shown["parameters"], shown["error"], strict=True):
                rising = (y[x < spot[0]] < spot[1]).any()  # so the curve is on its left, too
                place, side = ((0, -44), "center") if rising else ((-4, -28), "right")
                if points is last:  # which is flat
                    place, side = ((-10 if spot[0] == x.iloc[-1] else -16, -28), "left")
                note(ax, "{:,}\n{:.2f} %".format(*spot), spot, place, color=color, ha=side)
            end = (x.iloc[-1], y.iloc[-1])
            note(ax, name, end, (10, -3), color=color, weight="bold", ha="left")
        ax.plot(
            claims["parameters"], 100 - claims["accuracy"], "D", mfc="none", color=VALIDATION, ms=5
        )
        for row in claims.to_dict("records"):
            if row["source"] == "the published reference":
                spot = row["parameters"], 100 - row["accuracy"]
                note(ax, row["source"], spot, (7, -3), color=VALIDATION)
        top = claims.sort_values("accuracy").iloc[0]
        spot = top["parameters"], 100 - top["accuracy"]
        note(ax, "public results", spot, (8, -3), color=VALIDATION, weight="bold")
        lowest, highest = ax.get_xlim()
        ax.set(xlabel="parameters", ylabel="test error (%)", xlim=(0.75 * lowest, 1.25 * highest))


def all_weights(model: nn.Module, title: str) -> None:
    """Draw every parameter of a small network: orange negative, violet positive, by tensor."""
    tensors = [p.detach() for p in model.parameters() if p.ndim == 4]
    shapes = [p.shape[:3] for p in tensors]
    labels = [
        f"{out} kernels {k}x{k}" if into == 1 else f"{k}x{k}, {into} to {out}"
        for out, into, k in shapes
    ]
    norms = torch.cat([p.detach() for p in model.parameters() if p.ndim == 1])
    biased = any(isinstance(m, nn.Conv2d) and m.bias is not None for m in model.modules())
    labels.append("BatchNorm, bias" if biased else "BatchNorm")
    tensors.append(norms.view(-1, 1, 1, 1))
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
