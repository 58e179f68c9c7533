"""Notebook 07: how far final errors spread over seeds and over writers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.stats import norm

from mnistlib import Evaluation
from mnistlib.plots import QUIET, REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

from ..runs.stats import seeds_needed, smallest_gain

DARK = "#333333"


def seed_histogram(
    errors: Mapping[str, Sequence[float]],
    predicted: Mapping[str, float],
    title: str,
    gain: float = 0.05,
) -> None:
    """Draw final errors over seeds as histograms, beside the smallest gain that n seeds can show.

    Args:
        errors: of two sets of images, by name, the final error in percent of each seed.
        predicted: by set of images, the predicted standard deviation, points.
        title: the finding.
        gain: whose number of seeds is marked, points.
    """
    subtitle = f"n = {max(map(len, errors.values()))} seeds, sd in points; curves: predicted spread"
    grid = {"ncols": 2, "sharex": "col", "gridspec_kw": {"width_ratios": (1, 1.15), "wspace": 0.12}}
    spreads = {name: float(np.std(values, ddof=1)) for name, values in errors.items()}
    widest = max(spreads, key=spreads.__getitem__)
    counts, step = [2, 3, 4, 6, 8, 12, 17, 25, 35, 50, 70, 100], 0.02  # points: two images
    with figure(title, subtitle, (7, 3.6), nrows=2, **grid) as (_, (top, right, bottom, spare)):
        spare.remove()
        right.set_subplotspec(right.get_gridspec()[:, 1])
        for ax, name, color in zip((top, bottom), errors, (VALIDATION, TRAIN), strict=True):
            values, sd, mean = errors[name], spreads[name], float(np.mean(errors[name]))
            # edges between the values that there can be, which are multiples of half a step
            edges = np.arange(min(values) - 0.75 * step, max(values) + 2 * step, step)
            ax.hist(values, bins=edges, color=color, alpha=0.5)
            curve = norm(mean, predicted[name])
            x = np.linspace(mean - 3.5 * curve.std(), mean + 3.5 * curve.std(), 200)
            ax.plot(x, len(values) * step * curve.pdf(x), color=color)
            text, place = f"{name}\nmean {mean:.2f} %\nsd {sd:.3f}", (0.02, 0.97)
            note(ax, text, place, xycoords="axes fraction", color=color, va="top")
            ax.set_ylabel("seeds")
            ax.yaxis.get_major_locator().set_params(integer=True)

            right.plot(counts, [smallest_gain(sd, n) for n in counts], "o-", color=color, ms=3)
            # the labels of the wider spread stand to the right of its curve and line
            sign, ha, va = (1, "left", "bottom") if name == widest else (-1, "right", "top")
            look: dict[str, Any] = {"color": color, "ha": ha}
            note(right, name, (6, smallest_gain(sd, 6)), (4 * sign, 3 * sign), va=va, **look)
            enough = seeds_needed(gain, sd)
            right.plot([enough, enough, 2], [0.01, gain, gain], color=REFERENCE, lw=0.8, ls=":")
            note(right, f"{enough}", (enough, 0.0165), (3 * sign, 0), **look)
        bottom.set_xlabel("error (%)")
        log_axis(right.xaxis)
        log_axis(right.yaxis)
        right.set(ylim=(0.015, 0.5), xlabel="seeds per recipe")
        right.set_ylabel("gain found 4 times out of 5 (points)")
        right.xaxis.set_tick_params(labelbottom=True)


def writers_of_half(errors: np.ndarray) -> np.ndarray:
    """Return the fewest writers that make half of all errors `(W,)`, most errors first."""
    order = np.argsort(-errors, kind="stable")
    return order[: 1 + np.searchsorted(errors[order].cumsum(), errors.sum() / 2)]


def errors_by_writer(
    errors: np.ndarray, students: np.ndarray, seen: Mapping[str, Evaluation], title: str
) -> None:
    """Draw the errors of the writers with the most, beside intervals with and without writers.

    Args:
        errors: misclassified images of each writer, mean over networks, `(W,)`.
        students: whether each writer is a student, `(W,)` bool.
        seen: one network of each recipe, by name.
        title: the finding.
    """
    shown, half = np.argsort(-errors, kind="stable")[:60], len(writers_of_half(errors))
    subtitle = f"the first 60 of n = {len(errors)} writers, means over seeds"
    grid = {"ncols": 2, "gridspec_kw": {"width_ratios": (1.25, 1), "wspace": 0.1}}
    with figure(title, subtitle, (7, 3.3), **grid) as (_, (left, right)):
        for name, part, color, y in (
            ("students", students[shown], VALIDATION, 0.62),
            ("employees", ~students[shown], TRAIN, 0.52),
        ):
            places = np.flatnonzero(part)
            left.bar(places + 1, errors[shown[places]], color=color, width=0.85)
            note(left, name, (0.97, y), xycoords="axes fraction", color=color, ha="right")
        left.axvline(half + 0.5, color=REFERENCE, lw=0.8, ls=":")
        text = f"{half} writers make half\nof all errors"
        note(left, text, (half + 0.5, errors.max()), (5, 0), va="top", color=REFERENCE)
        left.set(xlabel="writer, most errors first", ylabel="errors, mean over seeds")
        for row, one in enumerate(seen.values()):
            alone = replace(one, factor=1.0, freedom=math.inf)
            for how, y, color in ((alone, -0.14, QUIET), (one, 0.14, DARK)):
                low, high = how.interval
                right.plot([100 - high, 100 - low], [row + y] * 2, color=color, lw=4)
                right.plot(how.error, row + y, "|", color="white", ms=5)
        for text, y, color in (("images alone", -0.14, REFERENCE), ("writers", 0.14, DARK)):
            place = 100 - alone.interval[0], y
            note(right, text, place, (-8, 0), va="center", ha="right", color=color)
        right.set(yticks=range(len(seen)), yticklabels=seen, xlabel="test error (%), 95 % interval")
        right.invert_yaxis()
        right.grid(False, axis="y")
