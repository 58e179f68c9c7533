"""Every figure type the notebooks use, in one look. Functions draw and return nothing."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from .augment import random_distortion
from .config import Config
from .train import Run

if TYPE_CHECKING:
    import pandas as pd

STYLE = Path(__file__).with_name("mnistlib.mplstyle")
TRAIN, VALIDATION, PUBLISHED, QUIET = "#3f90da", "#e76300", "#717581", "#94a4a2"


def log_axis(axis: Axis) -> None:
    """Make an axis logarithmic, with ticks that read as numbers."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def figure(
    title: str, subtitle: str = "", size: tuple[float, float] = (7, 3.5), **grid: object
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Make a titled figure in the project's style; the axes come as a flat array."""
    # loads the backend now: within the style, the settings it makes would be undone at the end
    plt.draw_if_interactive()
    with plt.style.context(STYLE):
        fig, axes = plt.subplots(figsize=size, squeeze=False, **grid)
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if subtitle:
            axes.flat[0].set_title(subtitle, fontsize=8.5, fontweight="normal", color="#555555")
        yield fig, axes.ravel()


def show_digit(ax: Axes, image: Tensor) -> None:
    """Draw one image `(1, 28, 28)` or `(28, 28)` without axes."""
    side = image.shape[-1]
    ax.imshow(image.reshape(side, side).float().cpu(), cmap="gray_r")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="#cccccc")


def digits(images: Tensor, labels: Tensor, title: str, captions: Sequence[str] = ()) -> None:
    """Draw images `(N, 1, 28, 28)` in rows of ten, each under its label or caption."""
    n = len(images)
    rows = math.ceil(n / 10)
    with figure(title, size=(7, 0.25 + 0.88 * rows), nrows=rows, ncols=10) as (_, axes):
        for i, ax in enumerate(axes):
            if i >= n:
                ax.axis("off")
                continue
            show_digit(ax, images[i])
            caption = captions[i] if captions else str(int(labels[i]))
            ax.set_title(caption, fontsize=8, fontweight="normal", loc="center")


def bars(values: dict[str, float], title: str, label: str, highlight: str = "") -> None:
    """Draw named values as horizontal bars, each with its number."""
    with figure(title, size=(7, 0.7 + 0.32 * len(values))) as (_, (ax,)):
        names = list(values)
        colors = [VALIDATION if name == highlight else TRAIN for name in names]
        ax.barh(names, list(values.values()), color=colors, height=0.65)
        for y, value in enumerate(values.values()):
            ax.annotate(f" {value:,.0f}", (value, y), va="center", fontsize=8)
        ax.invert_yaxis()
        ax.set(xlabel=label, xlim=(0, 1.12 * max(values.values())))
        ax.grid(axis="y", visible=False)


def augmentation(image: Tensor, config: Config, title: str, n: int = 19, seed: int = 0) -> None:
    """Draw an image `(1, 28, 28)` uint8 and `n` random distortions of it, as a Config has them."""
    source = torch.Generator().manual_seed(seed)
    batch = (image.float() / 255).expand(n, 1, 28, 28)
    drawn = random_distortion(batch, **config.distortion, generator=source)
    images = torch.cat([image.float().unsqueeze(0) / 255, drawn])
    digits(images, torch.zeros(n + 1), title, captions=["original"] + [""] * n)


def onecycle(run: Run, title: str) -> None:
    """Draw learning rate, loss and validation error of a Run on one axis of steps."""
    steps = len(run.curve["lr"])
    warm = int(np.argmax(run.curve["lr"]))
    where = "validation images" + (" of the embedded sample" if run.source == "sample" else "")
    with figure(title, _about(run), size=(7, 5), nrows=3, sharex=True) as (_, axes):
        rate, loss, error = axes
        rate.plot(run.curve["lr"], color="#832db6")
        rate.set(ylabel="learning rate")
        loss.plot(run.curve["loss"], color=TRAIN, lw=0.4, alpha=0.4)
        loss.plot(_smooth(run.curve["loss"]), color=TRAIN)
        loss.set(ylabel="training loss")
        log_axis(loss.yaxis)
        points = dict(zip(run.curve["eval_step"], run.curve["eval_error"], strict=True))
        per_epoch = steps // max(len(run.history), 1)
        points |= {h["epoch"] * per_epoch: 100 - h["val_acc"] for h in run.history}
        x, y = zip(*sorted(points.items()), strict=True)
        error.plot(x, y, "o-", ms=3.5, color=VALIDATION)
        error.annotate(f"{y[-1]:.2f} %", (x[-1], y[-1]), xytext=(0, 6), ha="right",
                       textcoords="offset points", color=VALIDATION, fontsize=8)  # fmt: skip
        error.set(ylabel="validation error (%)", xlabel="step", xlim=(0, steps))
        log_axis(error.yaxis)
        error.set_title(f"n = {run.n_val:,} {where}", fontsize=8, fontweight="normal")
        for ax, words in ((rate, ("warm-up", "annealing")), (loss, ("", "")), (error, ("", ""))):
            ax.axvspan(0, warm, color="#ffa90e", alpha=0.12, lw=0)
            ax.axvspan(warm, steps, color="#3f90da", alpha=0.06, lw=0)
            for x0, word in zip((0, warm), words, strict=True):
                ax.annotate(word, (x0 + steps / 100, 0.06), xycoords=("data", "axes fraction"),
                            fontsize=8, color="#555555")  # fmt: skip


def _about(run: Run) -> str:
    on = " on the embedded sample" if run.source == "sample" else ""
    return f"{run.config.model}, {run.parameters:,} parameters, seed {run.config.seed}{on}"


def _smooth(values: Sequence[float], window: int = 25) -> np.ndarray:
    """Return the running geometric mean: the loss is drawn on a log axis."""
    logs = np.log(np.maximum(values, 1e-12))
    padded = np.concatenate([np.full(window - 1, logs[0]), logs])
    return np.exp(np.convolve(padded, np.ones(window) / window, mode="valid"))


def convergence(
    curves: "Run | pd.DataFrame", published: "pd.DataFrame | None" = None, title: str = ""
) -> None:
    """Draw loss and error over the epochs: of a Run, or of several seeds beside a published column.

    Args:
        curves: a Run, or rows with the columns of `Run.history` and `seed`.
        published: rows of the same columns without `seed`.
        title: the finding; for a Run its own line is used where none is given.
    """
    import pandas as pd

    if isinstance(curves, Run):
        title = title or f"{curves.config.model}: {len(curves.history)} epochs"
        about = _about(curves)
        rows = pd.DataFrame(curves.history).assign(seed=curves.config.seed)
    else:
        rows, about = curves, f"ours: mean and range of n = {curves['seed'].nunique()} seeds"
    with figure(title, about, size=(7, 3.6), ncols=2) as (_, (loss, error)):
        for name, color in (("train", TRAIN), ("val", VALIDATION)):
            word = {"train": "training", "val": "validation"}[name]
            _band(loss, rows, f"{name}_loss", color, word)
            _band(error, rows.assign(e=100 - rows[f"{name}_acc"]), "e", color, word)
            if published is not None:
                style = {"color": color, "ls": ":", "marker": "o", "ms": 3, "lw": 1}
                loss.plot(published["epoch"], published[f"{name}_loss"], **style)
                error.plot(published["epoch"], 100 - published[f"{name}_acc"], **style)
        if published is not None:
            loss.plot([], [], ":o", ms=3, lw=1, color=PUBLISHED, label="published (one run)")
        loss.legend()
        ends = rows[rows["epoch"] == rows["epoch"].max()]["val_acc"]
        best = rows.groupby("seed")["val_acc"].max().mean()
        error.axhline(100 - ends.mean(), color=VALIDATION, lw=0.8)
        error.axhline(100 - best, color=VALIDATION, lw=0.8, ls="--")
        error.annotate(
            f"last epoch {100 - ends.mean():.2f} %,\nbest epoch {100 - best:.2f} % (dashed)",
            (0.97, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=8,
            color=VALIDATION,
        )  # fmt: skip
        for ax, label in ((loss, "loss (nats)"), (error, "error (%)")):
            ax.set(ylabel=label, xlabel="epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            log_axis(ax.yaxis)


def _band(ax: Axes, rows: "pd.DataFrame", column: str, color: str, label: str) -> None:
    """Draw the mean over seeds as a line and their range as a band."""
    by_epoch = rows.groupby("epoch")[column]
    mean = by_epoch.mean()
    ax.plot(mean.index, mean, color=color, label=label, marker="o" if len(mean) < 6 else "", ms=3)
    if rows["seed"].nunique() > 1:
        ax.fill_between(mean.index, by_epoch.min(), by_epoch.max(), color=color, alpha=0.25, lw=0)


def lines(
    x: Sequence[float],
    curves: dict[str, Sequence[float]],
    title: str,
    labels: tuple[str, str],
    *,
    log: bool = False,
    subtitle: str = "",
) -> None:
    """Draw named curves over the same `x`, each labelled at its end; `labels` are of x and y."""
    with figure(title, subtitle, size=(7, 2.9)) as (_, (ax,)):
        for name, values in curves.items():
            (line,) = ax.plot(
                x[: len(values)], values, marker="o" if len(values) < 30 else "", ms=3
            )
            end = (x[len(values) - 1], values[-1])
            ax.annotate(f" {name}", end, color=line.get_color(), va="center", fontsize=8,
                        annotation_clip=False)  # fmt: skip
        ax.set(xlabel=labels[0], ylabel=labels[1])
        ax.xaxis.get_major_locator().set_params(integer=True)
        if log:
            log_axis(ax.yaxis)


def confusion(labels: Tensor, predictions: Tensor, title: str) -> None:
    """Draw how often each digit `(N,)` was read as which other `(N,)`; right answers are left out.

    A confusion matrix of an accurate classifier is all diagonal; without it the errors show.
    """
    import seaborn

    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels.long(), predictions.long()), torch.ones(len(labels)).long(), True)
    wrong = counts.fill_diagonal_(0).numpy()
    with figure(title, f"{wrong.sum()} errors of n = {len(labels):,}", size=(7, 4)) as (_, (ax,)):
        seaborn.heatmap(wrong, annot=wrong, mask=wrong == 0, cmap="OrRd", cbar=False, square=True,
                        linewidths=0.5, linecolor="#e6e6e6", ax=ax, fmt="d")  # fmt: skip
        ax.set(xlabel="read as", ylabel="digit")
        ax.grid(False)
