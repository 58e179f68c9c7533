"""Notebook 03: one run, step by step."""

import math

import numpy as np

from mnistlib import Run
from mnistlib.plots import TRAIN, VALIDATION, figure, log_axis, note


def onecycle(run: Run, title: str) -> None:
    """Draw learning rate, loss and validation error, if any, of a Run on one axis of steps."""
    steps, warm = len(run.curve["lr"]), int(np.argmax(run.curve["lr"]))
    points = dict(zip(run.curve["eval_step"], run.curve["eval_error"], strict=True))
    per_epoch = steps // max(len(run.history), 1)
    points |= {h["epoch"] * per_epoch: 100 - h["val_acc"] for h in run.history}
    known = [(x, y) for x, y in sorted(points.items()) if not math.isnan(y)]
    logs = np.pad(np.log(np.maximum(run.curve["loss"], 1e-12)), (24, 0), mode="edge")
    smooth = np.exp(np.convolve(logs, np.full(25, 1 / 25), mode="valid"))  # geometric mean
    where = " of the embedded sample" if run.source == "sample" else ""
    about = f"recipe {run.config.recipe}, {run.parameters:,} parameters, seed {run.config.seed}"
    with figure(title, about, (7, 5), nrows=3 if known else 2, sharex=True) as (_, axes):
        rate, loss, *_ = axes
        rate.plot(run.curve["lr"], color="#333333")
        loss.plot(run.curve["loss"], color=TRAIN, lw=0.4, alpha=0.4)
        loss.plot(smooth, color=TRAIN)
        log_axis(loss.yaxis)
        for error in axes[2:]:
            error.plot(*zip(*known, strict=True), "o-", ms=3.5, color=VALIDATION)
            last = f"{known[-1][1]:.2f} %"
            note(error, last, known[-1], (0, 6), ha="right", color=VALIDATION)
            log_axis(error.yaxis)
            about = f"n = {run.n_val:,} validation images{where}"
            error.set_title(about, fontsize=9, fontweight="normal", color="#555555")
        axes[-1].set(xlabel="step", xlim=(0, steps))
        labels = ("learning rate", "training loss (nats)", "validation error (%)")
        for ax, label in zip(axes, labels, strict=False):
            ax.set(ylabel=label)
            ax.axvspan(0, warm, color="#e76300", alpha=0.08, lw=0)
            ax.axvspan(warm, steps, color="#3f90da", alpha=0.06, lw=0)
        for start, word in ((0, "warm-up"), (warm, "annealing")):
            place = ("data", "axes fraction")
            note(rate, word, (start + steps / 100, 0.06), xycoords=place, color="#555555")
