"""Notebook 07: how small a network can get, and what was tried at each size."""

import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from mnistlib import RECIPES, Config
from mnistlib.plots import QUIET, REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

from ..runs.ledger import LedgerError, images_seen, read_results, runs_for
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
    697: "best-697",
    1_000: "best-1000",
    1_936: "best-1936",
    3_500: "best-3500",
    6_174: "best-6174",
    7_918: "best-7918",
    13_912: "best",
    20_000: "best-20k",
}


def frontier(recipes: Iterable[str], folder: Path | None = None) -> pd.DataFrame:
    """Return a row for each recipe with test results, by the size of its network.

    Columns: `recipe`, `model`, `parameters`, `multiply_accumulates`, `images` seen in training, `n`
    seeds, test `error` in percent, mean over seeds, its 95 % interval `low` to `high` over seeds,
    `best` and `worst` seed, mean test `loss`.

    Raises:
        LedgerError: a recipe has fewer than two tested runs.
    """
    rows = []
    for recipe in recipes:
        runs = runs_for(RECIPES[recipe], folder).dropna(subset="test_accuracy")
        if len(runs) < 2:
            raise LedgerError(f"the ledger has fewer than two tested runs of the recipe {recipe!r}")
        error, first = 100 - runs["test_accuracy"], runs.iloc[0]
        mean, low, high = mean_interval(list(error))
        about = ("model", "parameters", "multiply_accumulates")
        rows.append(
            {"recipe": recipe}
            | {column: first[column] for column in about}
            | {"images": images_seen(first), "n": len(runs), "error": mean, "low": low}
            | {"high": high, "best": error.min(), "worst": error.max()}
            | {"loss": runs["test_loss"].mean()}
        )
    return pd.DataFrame(rows).sort_values("parameters", ignore_index=True)


def tried(folder: Path | None = None) -> pd.DataFrame:
    """Return a row for each design and recipe that was judged on images of unseen writers.

    Only networks of less than 20,000 parameters, and no run that was tested. Columns: `model`,
    `parameters`, `images` seen, `config` without seed and group of writers, `n` runs, mean
    validation `error` in percent and `loss`.
    """
    runs = read_results(folder=folder)
    judged = runs["split"].str.startswith("writers") & runs["test_accuracy"].isna()
    runs = runs[judged & (runs["parameters"] < 20_000)].copy()
    runs["images"] = [images_seen(row) for _, row in runs.iterrows()]
    same: dict[str, Any] = {"seed": 0, "device": "auto", "threads": 0, "split": "writers"}
    runs["config"] = [str(replace(Config(**json.loads(text)), **same)) for text in runs["config"]]
    runs["error"] = 100 - runs["val_accuracy"]
    by = ["parameters", "model", "images", "config"]
    found = runs.groupby(by).agg(
        n=("seed", "size"), error=("error", "mean"), loss=("val_loss", "mean")
    )
    return found.reset_index()


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
        ax.fill_between(
            points["parameters"], points["best"], points["worst"], color=TRAIN, alpha=0.18, lw=0
        )
        ax.plot(points["parameters"], points["error"], "o-", color=TRAIN, ms=4)
        last = 0
        for row in points.to_dict("records"):
            text = f"{row['parameters']:,}\n{row['error']:.2f} %"
            near, last = row["parameters"] < 1.4 * last, row["parameters"]  # else the labels touch
            how: dict[str, Any] = {"color": TRAIN, "ha": "left" if near else "right"}
            note(ax, text, (row["parameters"], row["error"]), (0 if near else -3, -24), **how)
        for row in others.to_dict("records"):
            spot, right = (row["parameters"], row["error"]), row["parameters"] > 15_000
            ax.plot(*spot, "o", color=REFERENCE, ms=4)
            how = {"color": REFERENCE, "ha": "left" if right else "right"}
            note(ax, row["recipe"], spot, (6, -6) if right else (-6, 2), **how)
        for row in claims.to_dict("records"):
            name = row["source"].rpartition("/")[2]
            spot = (row["parameters"], 100 - row["accuracy"])
            ax.plot(*spot, "D", mfc="none", color=VALIDATION, ms=5)
            place, side = PLACES.get(name, ((6, 3), "left"))
            note(ax, name, spot, place, color=VALIDATION, fontsize=7, ha=side)
        left, right = ax.get_xlim()
        ax.set(xlabel="parameters", ylabel="test error (%)", xlim=(0.75 * left, right))


def search(runs: pd.DataFrame, chosen: Collection[str], title: str, subtitle: str) -> None:
    """Draw the validation error of everything that was tried against its parameters.

    Args:
        runs: as `tried` returns them.
        chosen: the models that were chosen, which are filled.
        title: the finding.
        subtitle: what is shown.
    """
    with figure(title, subtitle, (7, 3.6)) as (_, (ax,)):
        log_axis(ax.xaxis)
        log_axis(ax.yaxis)
        size = 8 + 3 * np.log2(runs["images"] / runs["images"].min())
        ax.scatter(runs["parameters"], runs["error"], s=size, color=QUIET, alpha=0.7, lw=0)
        own = runs[runs["model"].isin(chosen)]
        ax.scatter(own["parameters"], own["error"], s=size[own.index], color=VALIDATION, lw=0)
        ax.set(xlabel="parameters", ylabel="validation error (%)")


def all_weights(model: nn.Module, title: str) -> None:
    """Draw every parameter of a small network: orange negative, violet positive, by tensor.

    Args:
        model: a network of a few hundred parameters.
        title: what is shown.
    """
    weights = [p.detach() for p in model.parameters() if p.ndim == 4]
    vectors = torch.cat([p.detach() for p in model.parameters() if p.ndim == 1])
    pictures, labels = [_tiles(p) for p in weights], []
    for p in weights:
        out, into, k, _ = p.shape
        what = f"{out} kernels {k}x{k}" if into == 1 else f"{k}x{k}, {into} to {out}"
        labels.append(f"{what}\n{p.numel()}")
    pictures.append(_tiles(vectors.view(-1, 1, 1, 1)))
    labels.append(f"BatchNorm\n{len(vectors)}")
    grid = {"ncols": len(pictures), "gridspec_kw": {"width_ratios": [p.shape[1] for p in pictures]}}
    with figure(title, "", (7, 1.7), **grid) as (_, axes):
        for ax, picture, label in zip(axes, pictures, labels, strict=True):
            top = np.nanmax(np.abs(picture))
            ax.imshow(picture, cmap="PuOr", vmin=-top, vmax=top)
            ax.set(xticks=[], yticks=[])
            ax.grid(False)
            ax.spines[:].set(visible=False)
            ax.set_xlabel(label, fontsize=7)


def _tiles(weight: torch.Tensor) -> np.ndarray:
    """Return filters `(out, in, k, k)` as one picture, nan between and after them.

    A row for each output; kernels of a single input stand in a square instead.
    """
    out, into, k, _ = weight.shape
    if into == 1:
        into = math.ceil(out**0.5)
        whole = torch.full((math.ceil(out / into) * into, k, k), math.nan)
        whole[:out] = weight[:, 0]
        weight = whole.view(-1, into, k, k)
    step = k + 1 if k > 1 else 1
    picture = np.full((len(weight) * step - (k > 1), into * step - (k > 1)), np.nan)
    for i, row in enumerate(weight.numpy()):
        for j, kernel in enumerate(row):
            picture[i * step : i * step + k, j * step : j * step + k] = kernel
    return picture


def errors_by_digit(labels: torch.Tensor, recipes: Mapping[str, str]) -> pd.DataFrame:
    """Return the mean test errors of each digit in percent, a column for each recipe by its label.

    Args:
        labels: of the test images, `(10000,)`.
        recipes: recipe by column.
    """
    counts = torch.bincount(labels.long(), minlength=10).numpy()
    columns = {}
    for column, recipe in recipes.items():
        runs = read_results("misread").merge(runs_for(RECIPES[recipe])[["config_hash", "seed"]])
        wrong = [int(i) for text in runs["wrong"].astype(str) for i in text.split()]
        missed = torch.bincount(labels[wrong].long(), minlength=10).numpy()
        columns[column] = 100 * missed / counts / len(runs)
    return pd.DataFrame(columns)
