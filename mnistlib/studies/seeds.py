"""Notebook 05: how far final errors spread over seeds, and the gain that so many seeds can show."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import norm

from ..experiments.stats import seeds_needed, smallest_gain
from ..plots import REFERENCE, TRAIN, VALIDATION, figure, note


def seed_histogram(
    errors: Mapping[str, Sequence[float]],
    predicted: Mapping[str, float],
    title: str,
    gain: float = 0.05,
) -> None:
    """Draw final errors over seeds as histograms, beside the smallest gain that n seeds can show.

    Args:
        errors: by set of images, two at most, the final error in percent of each seed.
        predicted: by set of images, the standard deviation to be expected, points.
        title: the finding.
        gain: whose price in seeds is marked, points.
    """
    subtitle = f"final error of n = {max(map(len, errors.values()))} seeds"
    panels = figure(title, f"{subtitle}, bell curves: the predicted spread", (7, 3.4), ncols=2)
    lowest, step = min(map(np.mean, errors.values())), 0.02  # points: two images of 10,000
    counts = [2, 3, 4, 6, 8, 12, 17, 25, 35, 50, 70, 100]
    with panels as (_, (left, right)):
        for (name, values), color in zip(errors.items(), (VALIDATION, TRAIN), strict=False):
            # edges between the values that there can be, which are multiples of half a step
            edges = np.arange(min(values) - 0.75 * step, max(values) + 2 * step, step)
            left.hist(values, bins=edges, color=color, alpha=0.6)
            mean, sd = float(np.mean(values)), predicted[name]
            x = np.linspace(mean - 3.5 * sd, mean + 3.5 * sd, 200)
            bell = len(values) * step * norm.pdf(x, mean, sd)
            left.plot(x, bell, color=color)
            side, outwards = ("right", -1) if mean == lowest else ("left", 1)  # off the other bell
            place = (mean + outwards * sd, 0.75 * bell.max())
            note(left, name, place, color=color, fontsize=9, ha=side, va="bottom")
            sd = float(np.std(values, ddof=1))
            right.plot(counts, [smallest_gain(sd, n) for n in counts], "o-", color=color, ms=3)
            enough = seeds_needed(gain, sd)
            right.plot([enough, enough, 2], [0.01, gain, gain], color=REFERENCE, lw=0.8, ls=":")
            note(right, f"{enough}", (enough, 0.0165), (2, 0), color=color, fontsize=9)
        left.set(xlabel="error (%)", ylabel="seeds")
        right.set(xscale="log", yscale="log", ylim=(0.015, 0.5), xlabel="seeds per arm")
        right.set_ylabel("gain found 4 times of 5 (points)")
        right.set(xticks=[2, 5, 10, 20, 50, 100], yticks=[0.02, 0.05, 0.1, 0.2, 0.5])
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
