"""Statistics of runs: intervals, comparisons, and how many seeds a claim needs."""

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import scipy  # its statistics are loaded when they are first used


@dataclass(frozen=True, repr=False)
class Comparison:
    """Difference of two means, with the ends of its 95 % interval; infinite: noise unknown."""

    difference: float
    low: float
    high: float
    seeds: str
    """number of seeds, e.g. `8 paired seeds`"""
    unit: str = "points"
    p: float = math.nan
    """p-value of the t-test; nan: noise unknown"""

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __repr__(self) -> str:
        """Give difference, interval and n in a sentence that can be quoted."""
        interval = f"95 % interval {self.low:+.3f} to {self.high:+.3f}, n = {self.seeds}"
        if not math.isfinite(self.low):
            interval = f"noise unknown, n = {self.seeds} that differ alike"
        verdict = "" if self.decided else "; no difference is shown"
        return f"{self.difference:+.3f} {self.unit} ({interval}){verdict}"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of a sample and the ends of its t interval, in the unit of the values.

    For values over seeds it covers the random seeds, not the random choice of the images. If all
    values are equal, their noise is unknown and the ends are infinite. Source: "Student",
    Biometrika 6 (1908) 1-25.

    Raises:
        ValueError: there are fewer than two values.
    """
    low, high, _ = _ends(scipy.stats.ttest_1samp, values, confidence=confidence, popmean=0.0)
    return fmean(values), low, high


def compare(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare the mean of `b` with that of `a`, seeds not paired; positive if `b` is larger.

    Standard deviations may differ. Source: B. L. Welch, Biometrika 34 (1947) 28-35.

    Raises:
        ValueError: a sample has fewer than two values.
    """
    low, high, p = _ends(scipy.stats.ttest_ind, b, a, equal_var=False)
    return Comparison(fmean(b) - fmean(a), low, high, f"{len(a)} and {len(b)} seeds", unit, p)


def compare_paired(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare `b` with `a`, paired by seed; positive if `b` is larger.

    What both runs of a seed have in common cancels. The interval is that of `mean_interval`.

    Raises:
        ValueError: the samples differ in length or have fewer than two values.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    low, high, p = _ends(scipy.stats.ttest_rel, b, a)
    return Comparison(fmean(b) - fmean(a), low, high, f"{len(a)} paired seeds", unit, p)


def _ends(
    test: Callable[..., Any], *samples: Sequence[float], confidence: float = 0.95, **options: Any
) -> tuple[float, float, float]:
    """Return the ends of the confidence interval of one of scipy's t-tests, and its p-value.

    Values, or differences, that are all equal show no noise. The test would be sure of them.
    """
    if min(map(len, samples)) < 2:
        n = " and ".join(str(len(sample)) for sample in reversed(samples))
        raise ValueError(f"an interval needs two values or more, here are {n}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # seeds may have equal values
        found = test(*samples, **options)
        ends = found.confidence_interval(confidence)
    if not ends.high - ends.low > 1e-9 * np.abs(samples[0]).max():  # but for rounding
        return -math.inf, math.inf, math.nan
    return float(ends.low), float(ends.high), float(found.pvalue)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Correct the p-values of many comparisons, by name, by Holm's method; the smallest first.

    At a level of 5 % the chance of even one false finding among them is at most 5 %, however the
    comparisons depend on each other. One without a p-value (nan) stays so and comes last. Source:
    S. Holm, Scand. J. Statist. 6 (1979) 65-70.
    """
    names = sorted(p, key=lambda name: (math.isnan(p[name]), p[name]))
    steps = [p[name] * (len(p) - rank) for rank, name in enumerate(names)]
    corrected = np.minimum(np.maximum.accumulate(steps), 1.0)
    return dict(zip(names, corrected.tolist(), strict=True))


def predicted_spread(error: float, n: int) -> float:
    """Predicted standard deviation over seeds, in points, of an error in percent on `n` images.

    sqrt(error / 2n) with the error as a share: half the variance of that many errors at random.
    Source: K. Jordan, "Calibrated chaos", arXiv 2304.01910 (2023), for networks whose ensembles
    are calibrated.
    """
    return 100 * math.sqrt(error / 100 / (2 * n))


def detection_power(gain: float, sd: float, n: int, paired: bool = False) -> float:
    """Probability that a two-sided t-test at 5 % finds a true gain with `n` seeds per group.

    Args:
        gain: true difference of the means, in the unit of `sd`.
        sd: standard deviation over seeds in each group; of the differences if they are paired.
        n: seeds per group, or pairs.
        paired: one sample of differences instead of two samples.

    Source: J. Cohen, Statistical Power Analysis (1988), chapter 2, with the noncentral t.
    """
    freedom = n - 1 if paired else 2 * (n - 1)
    shift = gain / (sd * math.sqrt((1 if paired else 2) / n))
    bound = scipy.stats.t.ppf(0.975, freedom)
    # the lower tail as the upper one of -shift, because nct.cdf is nan for large shifts
    return sum(float(scipy.stats.nct.sf(bound, freedom, side)) for side in (shift, -shift))


def seeds_needed(gain: float, sd: float, power: float = 0.8, paired: bool = False) -> int:
    """Return the smallest number of seeds per group that finds a gain with probability `power`.

    Raises:
        ValueError: the gain is not above 0.
    """
    if gain <= 0:
        raise ValueError(f"the gain is {gain:g}, but it must be above 0")
    seeds = range(2, 10**9)
    return seeds[bisect_left(seeds, power, key=lambda n: detection_power(gain, sd, n, paired))]


def smallest_gain(sd: float, n: int, power: float = 0.8, paired: bool = False) -> float:
    """Return the smallest gain, in the unit of `sd`, that `n` seeds per group find that often."""

    def excess(gain: float) -> float:
        return detection_power(gain, sd, n, paired) - power

    return float(scipy.optimize.brentq(excess, 1e-6 * sd, 1e4 * sd))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature T > 0 that minimises the cross-entropy of softmax(logits / T).

    Source: C. Guo et al., On calibration of modern neural networks (2017), section 4.2.

    Args:
        logits: `(N, 10)`, of images that the network was not trained on.
        labels: `(N,)` integers.

    Raises:
        ValueError: no temperature is best, as where all answers are right.
    """
    true = logits[np.arange(len(labels)), labels]

    def loss(log_t: float) -> float:
        t = math.exp(log_t)
        return float(np.mean(scipy.special.logsumexp(logits / t, axis=1) - true / t))

    found = scipy.optimize.minimize_scalar(loss, (-1, 1))  # the loss has one minimum in 1 / T
    if abs(found.x) > math.log(100):
        remedy = "fit on images of which some, not most, are misclassified"
        raise ValueError(f"no temperature is best for these {len(labels)} answers; {remedy}")
    return math.exp(found.x)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error, in points: confidence against accuracy, by bins.

    Images are sorted by the largest probability and divided into bins of equal size; the absolute
    differences of mean confidence and accuracy are averaged.

    Args:
        probabilities: `(N, 10)`.
        labels: `(N,)` integers.
        bins: number of bins.
    """
    order = np.argsort(probabilities.max(1), kind="stable")
    surplus = (probabilities.max(1) - (probabilities.argmax(1) == labels))[order]
    parts = np.array_split(surplus, bins)
    return 100 * sum(abs(part.sum()) for part in parts) / len(labels)
