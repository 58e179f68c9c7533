"""Figures that compare runs: spread over seeds, gains that seeds tell, forests, two runs as one."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .plots import PUBLISHED, QUIET, TRAIN, VALIDATION, figure
from .stats import Comparison, seeds_needed, smallest_gain

if TYPE_CHECKING:
    from .train import Run


def spread(
    errors: Mapping[str, Sequence[float]],
    predicted: Mapping[str, float],
    title: str,
    gain: float = 0.05,
) -> None:
    """Draw final errors over seeds as histograms, and beside them the gain that n seeds can tell.

    Args:
        errors: by set of images, the final error in percent of each seed.
        predicted: by set of images, the standard deviation to be expected, points.
        title: the finding.
        gain: whose price in seeds is marked, points.
    """
    n = max(len(values) for values in errors.values())
    subtitle = f"final error of n = {n} seeds, bell curves: the predicted spread"
    with figure(title, subtitle, size=(7, 3.4), ncols=2) as (_, (left, right)):
        for (name, values), color in zip(errors.items(), (VALIDATION, TRAIN), strict=False):
            mean, sd = np.mean(values), predicted[name]
            step = 0.02  # points: two images of 10,000
            # edges between the values that there can be, which are multiples of half a step
            edges = np.arange(min(values) - 0.75 * step, max(values) + 2 * step, step)
            left.hist(values, bins=edges, color=color, alpha=0.6)
            x = np.linspace(mean - 3.5 * sd, mean + 3.5 * sd, 200)
            height = len(values) * step / (sd * np.sqrt(2 * np.pi))
            left.plot(x, height * np.exp(-(((x - mean) / sd) ** 2) / 2), color=color)
            lowest = mean == min(np.mean(v) for v in errors.values())
            beside = mean + sd * (-1 if lowest else 1)  # on the outer flank of its bell
            left.annotate(name, (beside, 0.75 * height), color=color, fontsize=9,
                          ha="right" if lowest else "left", va="bottom")  # fmt: skip
        left.set(xlabel="error (%)", ylabel="seeds")
        sizes = [2, 3, 4, 6, 8, 12, 17, 25, 35, 50, 70, 100]
        for values, color in zip(errors.values(), (VALIDATION, TRAIN), strict=False):
            sd = float(np.std(values, ddof=1))
            right.plot(sizes, [smallest_gain(sd, k) for k in sizes], color=color, marker="o", ms=3)
            enough = seeds_needed(gain, sd)
            right.plot([enough, enough, 2], [0.01, gain, gain], color=PUBLISHED, lw=0.8, ls=":")
            right.annotate(f"{enough}", (enough, 0.0165), color=color, fontsize=9, ha="left",
                           xytext=(2, 0), textcoords="offset points")  # fmt: skip
        right.set(xscale="log", yscale="log", xlabel="seeds per arm",
                  ylabel="gain found 4 times of 5 (points)",
                  ylim=(0.015, 0.5))  # fmt: skip
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        right.set_xticks([2, 5, 10, 20, 50, 100])
        right.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5])


def forest(
    changes: Mapping[str, Comparison],
    title: str,
    subtitle: str,
    label: str,
    sure: Collection[str] | None = None,
) -> None:
    """Draw comparisons with their intervals, the largest at the top; undecided ones are grey.

    Args:
        changes: by name of the change, in points of error: to the right is worse.
        title: the finding.
        subtitle: what was compared, with n.
        label: of the axis.
        sure: names of the decided ones; by default those whose interval leaves out zero.
    """
    ordered = sorted(changes.items(), key=lambda item: item[1].difference)
    with figure(title, subtitle, size=(7, 1.0 + 0.25 * len(ordered))) as (_, (ax,)):
        for y, (name, c) in enumerate(ordered):
            decided = c.decided if sure is None else name in sure
            color = QUIET if not decided else VALIDATION if c.difference > 0 else TRAIN
            ax.plot([c.low, c.high], [y, y], color=color, lw=1.6)
            ax.plot(c.difference, y, "o", color=color, ms=5)
            ax.annotate(f"{c.difference:+.2f}", (1.0, y), xycoords=("axes fraction", "data"),
                        va="center", fontsize=8, color=color)  # fmt: skip
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8.5)
        # one that fails altogether must not press the others into a line
        ax.set_xscale("symlog", linthresh=0.2)
        ax.set_xticks([-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        low = min(0, *(c.low for c in changes.values()))  # zero is always in sight
        high = max(0, *(c.high for c in changes.values()))
        ax.set(xlabel=label, xlim=(1.2 * low - 0.02, 1.2 * high + 0.02))
        ax.grid(axis="y", visible=False)


def twice(whole: "Run", resumed: "Run", step: int, title: str, subtitle: str) -> None:
    """Draw a run that was resumed on top of one that never stopped, and their difference below.

    Args:
        whole: the uninterrupted run.
        resumed: the other one, its curve as long.
        step: the one after which it was resumed.
        title: the finding.
        subtitle: what the runs are.
    """
    difference = np.subtract(resumed.curve["loss"], whole.curve["loss"])
    steps = np.arange(1, len(difference) + 1)
    panels = {"nrows": 2, "sharex": True, "height_ratios": (3, 1)}
    with figure(title, subtitle, size=(7, 4.2), **panels) as (_, (top, bottom)):
        top.plot(steps, whole.curve["loss"], color=PUBLISHED, lw=4, alpha=0.35)
        top.plot(steps, resumed.curve["loss"], color=TRAIN, lw=0.8)
        top.set(yscale="log", ylabel="training loss (nats)")
        top.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        top.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value < 0.7 else "")
        for ax in (top, bottom):
            ax.axvline(step, color="black", lw=0.8, ls=":")
        top.annotate("resumed from here", (step, 0.93), xycoords=("data", "axes fraction"),
                     xytext=(4, 0), textcoords="offset points", fontsize=8)  # fmt: skip
        for text, color, y in (("never stopped", PUBLISHED, 0.78), ("killed", TRAIN, 0.66)):
            top.annotate(text, (0.99, y), xycoords="axes fraction", color=color, ha="right")
        bottom.plot(steps, difference, color=VALIDATION)
        bottom.set(ylabel="difference", xlabel="step")
        if not difference.any():  # else matplotlib makes up a scale
            bottom.set(yticks=[0], ylim=(-1, 1))
