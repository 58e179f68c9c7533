"""Intervals of means against their formulas; power against the share of tests that find a gain."""

import math
from statistics import fmean, variance

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mniststudy.runs.stats import (
    calibration_error,
    compare,
    compare_paired,
    detection_power,
    fit_temperature,
    holm,
    mean_interval,
    predicted_spread,
    seeds_needed,
    smallest_gain,
)

samples = st.lists(st.floats(90, 100), min_size=2, max_size=40)


def two_sided(t, freedom):
    """The probability of a t that is at least so far from zero."""
    return pytest.approx(2 * scipy.stats.t.sf(abs(t), freedom), rel=1e-5)


def student(values, confidence=0.95):
    """The interval of a mean as Student wrote it down."""
    quantile = scipy.stats.t.ppf(0.5 + confidence / 2, len(values) - 1)
    half = quantile * math.sqrt(variance(values) / len(values))
    return fmean(values), fmean(values) - half, fmean(values) + half


@settings(max_examples=30)
@given(samples, samples, st.floats(0.5, 0.999))
def test_the_intervals_are_students_and_welchs(a, b, confidence):
    pairs = list(zip(a, b, strict=False))
    differences = [y - x for x, y in pairs]
    assume(len(pairs) > 1 and min(map(np.std, (a, b, differences))) > 1e-3)
    assert mean_interval(a, confidence) == pytest.approx(student(a, confidence), rel=1e-9)
    found = compare_paired(*zip(*pairs, strict=True))
    known = student(differences)
    assert (found.difference, found.low, found.high) == pytest.approx(known, rel=1e-6, abs=1e-9)
    error = math.sqrt(variance(differences) / len(pairs))
    assert found.p == two_sided(found.difference / error, len(pairs) - 1)
    found = compare(a, b)
    parts = [variance(x) / len(x) for x in (a, b)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    middle = fmean(b) - fmean(a)
    known = (middle, middle - half, middle + half)
    assert (found.difference, found.low, found.high) == pytest.approx(known, rel=1e-6, abs=1e-9)
    assert found.p == two_sided(middle / math.sqrt(sum(parts)), freedom)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([99.0]), "two values or more, here are 1$"),
        (lambda: compare([99.0], [1.0, 2.0]), "two values or more, here are 1 and 2"),
        (lambda: compare_paired([99.0], [1.0]), "two values or more, here are 1 and 1"),
        (lambda: compare_paired([1.0, 2.0], [1.0]), "2 and 1 values cannot be paired"),
        (lambda: fit_temperature(np.eye(10), np.arange(10)), "best for these 10 answers"),
        (lambda: fit_temperature(np.eye(10), 9 - np.arange(10)), "best for these 10 answers"),
        (lambda: seeds_needed(0.0, 0.05), "the gain is 0, but it must be above 0"),
    ],
)
def test_too_little_to_tell_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.filterwarnings("error")
def test_seeds_that_all_end_or_differ_alike_show_no_noise_and_decide_nothing():
    assert mean_interval([99.4] * 3) == pytest.approx((99.4, -math.inf, math.inf))
    rounded = [99.0, 99.1, 99.2], [99.1, 99.2, 99.3]  # which differ by 0.1 but for rounding
    pairs = compare_paired([1, 2, 3], [2, 3, 4]), compare_paired(*rounded)
    for found in (*pairs, compare([99.4] * 3, [99.5] * 3)):
        assert not found.decided
        assert math.isnan(found.p)
        assert "(noise unknown, n = 3 " in repr(found)


def test_a_comparison_is_a_sentence():
    found = compare_paired([99.0, 99.1, 99.2], [99.1, 99.2, 99.33])
    assert found.decided
    assert repr(found) == ("+0.110 points (95 % interval +0.067 to +0.153, n = 3 paired seeds)")
    level = compare([99.0, 99.2], [99.1, 99.15, 99.2])
    assert repr(level).endswith("n = 2 and 3 seeds); no difference is shown")


def test_the_predicted_spread_has_its_published_values():
    assert predicted_spread(0.6, 10_000) == pytest.approx(0.055, abs=5e-4)
    assert predicted_spread(0.4, 10_000) == pytest.approx(0.045, abs=5e-4)


@pytest.mark.parametrize("n", [3, 9])
@pytest.mark.parametrize("paired", [False, True])
def test_the_power_is_how_often_a_gain_is_found(paired, n):
    a, b = np.random.default_rng(0).normal([[0], [1.2]], 1, (4000, 2, n)).swapaxes(0, 1)
    test = scipy.stats.ttest_1samp(b, 0, axis=1) if paired else scipy.stats.ttest_ind(a, b, axis=1)
    share = (test.pvalue < 0.05).mean()
    assert share == pytest.approx(detection_power(1.2, 1, n, paired), abs=0.025)
    assert detection_power(0.0, 0.05, 10, paired) == pytest.approx(0.05)


@pytest.mark.parametrize("paired", [False, True])
def test_the_seeds_needed_are_the_first_number_with_enough_power(paired):
    for gain, power in ((0.02, 0.8), (0.05, 0.5), (0.3, 0.95)):
        n = seeds_needed(gain, 0.05, power, paired)
        assert detection_power(gain, 0.05, n, paired) >= power
        assert n == 2 or detection_power(gain, 0.05, n - 1, paired) < power
    assert seeds_needed(0.001, 0.05) > 10_000  # found at once, not by counting up
    assert [seeds_needed(gain, 0.05) for gain in (0.10, 0.05, 0.03)] == [6, 17, 45]  # published


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("n", [2, 386])
def test_the_smallest_gain_is_found_for_any_number_of_seeds(n, paired):
    """The noncentral t of scipy is nan far down its lower tail, and so is statsmodels' power."""
    for power in (0.5, 0.95):
        gain = smallest_gain(0.05, n, power, paired)
        assert detection_power(gain, 0.05, n, paired) == pytest.approx(power, abs=1e-6)
    assert detection_power(1000.0, 0.05, n, paired) == pytest.approx(1.0)


def test_holms_correction_names_the_smallest_first_and_never_falls():
    corrected = holm({"b": 0.03, "none": math.nan, "a": 0.01, "c": 0.025, "d": 0.9})
    assert list(corrected) == ["a", "c", "b", "d", "none"]
    known = [0.05, 0.1, 0.1, 1.0, math.nan]  # five comparisons, whatever came of them
    assert list(corrected.values()) == pytest.approx(known, nan_ok=True)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_the_temperature_is_found_with_which_the_labels_were_drawn(temperature):
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (20_000, 10))
    sums = scipy.special.softmax(logits / temperature, axis=1).cumsum(1)
    labels = (generator.random((20_000, 1)) > sums).sum(1).clip(max=9)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_the_calibration_error_is_the_mean_difference_of_confidence_and_accuracy_by_bin():
    confidence = np.array([0.6, 0.6, 0.9, 0.9])
    probabilities = np.zeros((4, 10))
    probabilities[:, 3], probabilities[:, 4] = confidence, 1 - confidence
    labels = np.array([3, 4, 3, 3])  # half right at 0.6, all right at 0.9
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(10)
    assert calibration_error(probabilities, labels, bins=1) == pytest.approx(0)
    # bins of 2, 1 and 1 images: off by 0.1 of each of the first two, and of each of the others
    assert calibration_error(probabilities, labels, bins=3) == pytest.approx(10)
    assert calibration_error(probabilities[1:], labels[1:], bins=2) == pytest.approx(20)
