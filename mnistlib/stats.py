"""Intervals for what was counted and for means over seeds."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval for a proportion of which `successes` of `n` trials were seen, both ends in 0..1.

    Unlike the normal approximation it stays inside 0..1 and holds near the ends, where an
    accurate classifier lives. Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209-212.

    Raises:
        ValueError: `n` is not positive, `successes` not in 0..n, or `confidence` not in 0..1.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is no proportion")
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence} is not between 0 and 1")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of a sample and the ends of its t interval, in the unit of the values.

    Over seeds this says how well their mean is known; that the images were drawn, too, is not in
    it. Source: "Student", Biometrika 6 (1908) 1-25.

    Raises:
        ValueError: there are fewer than two values.
    """
    from scipy.stats import t

    values = list(values)
    if len(values) < 2:
        raise ValueError(f"an interval needs two values or more, here are {len(values)}")
    half = math.sqrt(variance(values) / len(values)) * t.ppf(0.5 + confidence / 2, len(values) - 1)
    return fmean(values), fmean(values) - float(half), fmean(values) + float(half)


def difference_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of `b` minus mean of `a` and the ends of its interval, their spreads taken apart.

    Source: B. L. Welch, Biometrika 34 (1947) 28-35.

    Raises:
        ValueError: a sample has fewer than two values, or neither has any spread.
    """
    from scipy.stats import t

    a, b = list(a), list(b)
    if min(len(a), len(b)) < 2:
        raise ValueError(f"both samples need two values or more, here are {len(a)} and {len(b)}")
    parts = [variance(x) / len(x) for x in (a, b)]
    if sum(parts) == 0:
        raise ValueError("neither sample has any spread, so nothing is known of their noise")
    weights = [part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)]
    half = math.sqrt(sum(parts)) * float(
        t.ppf(0.5 + confidence / 2, sum(parts) ** 2 / sum(weights))
    )
    difference = fmean(b) - fmean(a)
    return difference, difference - half, difference + half
