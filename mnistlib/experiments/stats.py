"""What may be concluded from runs: intervals, comparisons, how many seeds a claim needs."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import scipy  # its statistics are loaded when they are first used


@dataclass(frozen=True, repr=False)
class Comparison:
    """How much larger one mean is than another, with the ends of a 95 % interval."""

    difference: float
    low: float
    high: float
    seeds: str
    """how many, e.g. `8 paired seeds`"""
    unit: str = "points"

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        """Say it as a sentence that can be quoted."""
        interval = f"95 % interval {self.low:+.3f} to {self.high:+.3f}, n = {self.seeds}"
        verdict = "" if self.decided else "; no difference is shown"
        return f"{self.difference:+.3f} {self.unit} ({interval}){verdict}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of a sample and the ends of its t interval, in the unit of the values.

    Over seeds this says how well their mean is known; that the images were drawn, too, is not in
    it. Source: "Student", Biometrika 6 (1908) 1-25.

    Raises:
        ValueError: there are fewer than two values.
    """
    low, high = _ends(scipy.stats.ttest_1samp, values, confidence=confidence, popmean=0.0)
    return fmean(values), low, high


def compare(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare the mean of `b` with that of `a`, seeds unrelated; positive where `b` is larger.

    Their spreads are taken apart. Source: B. L. Welch, Biometrika 34 (1947) 28-35.

    Raises:
        ValueError: a sample has fewer than two values, or neither has any spread.
    """
    low, high = _ends(scipy.stats.ttest_ind, b, a, equal_var=False)
    if len({*a}) == len({*b}) == 1:
        raise ValueError("neither sample has any spread, so nothing is known of their noise")
    return Comparison(fmean(b) - fmean(a), low, high, f"{len(a)} and {len(b)} seeds", unit)


def compare_paired(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare `b` with `a`, value by value of the same seed; positive where `b` is larger.

    What both runs of a seed share drops out. Source of the interval: as of `mean_interval`.

    Raises:
        ValueError: the samples differ in length or have fewer than two values.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    low, high = _ends(scipy.stats.ttest_rel, b, a)
    return Comparison(fmean(b) - fmean(a), low, high, f"{len(a)} paired seeds", unit)


def _ends(
    test: Callable[..., Any], *samples: Sequence[float], confidence: float = 0.95, **options: Any
) -> tuple[float, float]:
    """Return the ends of the confidence interval of a t-test of scipy's."""
    if min(map(len, samples)) < 2:
        n = " and ".join(str(len(sample)) for sample in reversed(samples))
        raise ValueError(f"an interval needs two values or more, here are {n}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of equal values, which seeds may have
        found = test(*samples, **options).confidence_interval(confidence)
    return float(found.low), float(found.high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values of many questions, by name, corrected so that all verdicts hold together.

    The smallest first. At a level of 5 %, no question without an effect is decided in nineteen
    families of twenty, however the questions depend on each other. Source: S. Holm, Scand. J.
    Statist. 6 (1979) 65-70.
    """
    corrected, bound = {}, 0.0
    for k, name in enumerate(sorted(p, key=p.__getitem__)):
        bound = max(bound, min(1.0, p[name] * (len(p) - k)))  # never below the one before
        corrected[name] = bound
    return corrected


def predicted_spread(error: float, n: int) -> float:
    """Standard deviation over seeds to be expected of an error in percent on `n` images, points.

    sqrt(error / 2n), errors as a share: half of what drawing that many errors at random would give.
    Source: K. Jordan, "Calibrated chaos", arXiv 2304.01910 (2023), for networks whose ensembles
    are calibrated.
    """
    return 100 * math.sqrt(error / 100 / (2 * n))


def detection_power(gain: float, sd: float, n: int, paired: bool = False) -> float:
    """Chance that a two-sided t-test at 5 % finds a true gain with `n` seeds per arm.

    Args:
        gain: true difference of the means, in the unit of `sd`.
        sd: over seeds, of each arm; of the differences if they are paired.
        n: seeds per arm, or pairs.
        paired: one sample of differences instead of two samples.

    Source: J. Cohen, Statistical Power Analysis (1988), chapter 2, by the noncentral t.
    """
    freedom = n - 1 if paired else 2 * (n - 1)
    shift = gain / (sd * math.sqrt((1 if paired else 2) / n))
    bound = scipy.stats.t.ppf(0.975, freedom)
    # the lower tail as the upper one of the mirror image: nct.cdf is nan there for large shifts
    return sum(float(scipy.stats.nct.sf(bound, freedom, side)) for side in (shift, -shift))


def seeds_needed(gain: float, sd: float, power: float = 0.8, paired: bool = False) -> int:
    """Return the least number of seeds per arm with which a gain is found so often.

    Raises:
        ValueError: the gain is not above 0, so that no number is enough.
    """
    if gain <= 0:
        raise ValueError(f"the gain is {gain:g}, but it must be above 0")
    seeds = range(2, 10**9)
    return seeds[bisect_left(seeds, power, key=lambda n: detection_power(gain, sd, n, paired))]


def smallest_gain(sd: float, n: int, power: float = 0.8, paired: bool = False) -> float:
    """Return the least true gain that `n` seeds per arm find so often, in the unit of `sd`."""

    def excess(gain: float) -> float:
        return detection_power(gain, sd, n, paired) - power

    return float(scipy.optimize.brentq(excess, 1e-6 * sd, 1e4 * sd))
