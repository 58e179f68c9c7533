"""What may be concluded from runs: intervals, comparisons, how many seeds a claim needs."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

import numpy as np


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


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a sample and the ends of its percentile bootstrap interval.

    It assumes no shape of the distribution, but with fewer than about ten values it is too narrow.
    Source: B. Efron, Ann. Statist. 7 (1979) 1-26.

    Raises:
        ValueError: there are fewer than two values.
    """
    sample = np.asarray(values, dtype=float)
    if len(sample) < 2:
        raise ValueError(f"an interval needs two values or more, here are {len(sample)}")
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[drawn].mean(1), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(sample.mean()), float(low), float(high)


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


def compare_paired(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare `b` with `a`, value by value of the same seed; positive where `b` is larger.

    What both runs of a seed share drops out. Source of the interval: as of `mean_interval`.

    Raises:
        ValueError: the samples differ in length or have fewer than two values.
    """
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    differences = [y - x for x, y in zip(a, b, strict=True)]
    return Comparison(*mean_interval(differences), f"{len(a)} paired seeds", unit)


def compare(a: Sequence[float], b: Sequence[float], unit: str = "points") -> Comparison:
    """Compare the mean of `b` with that of `a`, seeds unrelated; positive where `b` is larger."""
    seeds = f"{len(a)} and {len(b)} seeds"
    return Comparison(*difference_interval(a, b), seeds, unit)


def best_epoch_inflation(curves: Sequence[Sequence[float]], unit: str = "points") -> Comparison:
    """How far the best epoch of a run lies above its last, over runs; accuracies by epoch of each.

    The maximum of noisy figures is too high by their noise, so this is what reports of best epochs
    gain by reporting alone. Source of the interval: as of `mean_interval`.
    """
    return compare_paired([list(c)[-1] for c in curves], [max(c) for c in curves], unit)


def mcnemar(wrong_a: Collection[int], wrong_b: Collection[int]) -> tuple[int, int, float]:
    """Compare two networks on the same images: misread by `a` alone, by `b` alone, and p.

    p is exact and two-sided: how often images that one alone misreads would divide at least as
    unevenly if neither were better. Source: Q. McNemar, Psychometrika 12 (1947) 153-157.
    """
    a, b = set(wrong_a), set(wrong_b)
    only_a, only_b = len(a - b), len(b - a)
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return only_a, only_b, min(1.0, 2 * tail)


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
    from scipy.stats import nct, t

    freedom = n - 1 if paired else 2 * (n - 1)
    shift = gain / (sd * math.sqrt((1 if paired else 2) / n))
    bound = t.ppf(0.975, freedom)
    return float(nct.sf(bound, freedom, shift) + nct.cdf(-bound, freedom, shift))


def seeds_needed(gain: float, sd: float, power: float = 0.8, paired: bool = False) -> int:
    """Return the least number of seeds per arm with which a gain is found so often."""
    n = 2
    while detection_power(gain, sd, n, paired) < power:
        n += 1
    return n


def smallest_gain(sd: float, n: int, power: float = 0.8, paired: bool = False) -> float:
    """Return the least true gain that `n` seeds per arm find so often, in the unit of `sd`."""
    from scipy.optimize import brentq

    enough = sd
    while detection_power(enough, sd, n, paired) < power:
        enough *= 2
    return float(brentq(lambda g: detection_power(g, sd, n, paired) - power, 1e-6 * sd, enough))
