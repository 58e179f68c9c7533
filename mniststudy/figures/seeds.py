"""Notebook 07: how far final errors spread over seeds, and the gain that so many seeds can show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

from ..runs.stats import seeds_needed, smallest_gain


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
