"""Intervals of means, checked against their formulas, and by how often they hold the truth."""

import math
import warnings
from itertools import combinations
from statistics import fmean, variance

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
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


def student(values, confidence=0.95):
    """The interval of a mean as Student wrote it down."""
    quantile = scipy.stats.t.ppf(0.5 + confidence / 2, len(values) - 1)
    half = quantile * math.sqrt(variance(values) / len(values))
    return fmean(values), fmean(values) - half, fmean(values) + half


@given(samples, st.floats(0.5, 0.999))
def test_the_interval_of_a_mean_is_students(values, confidence):
    assume(np.std(values) > 1e-3)
    assert mean_interval(values, confidence) == pytest.approx(student(values, confidence), rel=1e-9)


@given(samples, samples)
def test_the_interval_of_a_difference_is_welchs(a, b):
    assume(min(np.std(a), np.std(b)) > 1e-3)
    found = compare(a, b)
    parts = [variance(x) / len(x) for x in (a, b)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    half = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(sum(parts))
    middle = fmean(b) - fmean(a)
    known = (middle, middle - half, middle + half)
    assert (found.difference, found.low, found.high) == pytest.approx(known, rel=1e-6, abs=1e-9)


@given(st.lists(st.tuples(st.floats(90, 100), st.floats(90, 100)), min_size=2, max_size=30))
def test_a_paired_comparison_is_students_interval_of_the_differences(pairs):
    a, b = (list(x) for x in zip(*pairs, strict=True))
    differences = [y - x for x, y in pairs]
    assume(np.std(differences) > 1e-3)
    found = compare_paired(a, b)
    known = student(differences)
    assert (found.difference, found.low, found.high) == pytest.approx(known, rel=1e-6, abs=1e-9)


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(0)
    held = [0, 0]
    for _ in range(2000):
        a, b = draw.normal(99.3, 0.05, 6), draw.normal(99.4, 0.09, 9)
        _, low, high = mean_interval(a)
        held[0] += low <= 99.3 <= high
        found = compare(a, b)
        held[1] += found.low <= 0.1 <= found.high
    assert all(abs(n / 2000 - 0.95) < 0.02 for n in held)


def test_a_difference_has_the_sign_of_the_second_minus_the_first():
    assert compare([1.0, 2.0], [5.0, 6.0]).difference == 4.0
    assert compare_paired([1.0, 2.0], [5.0, 7.0]).difference == 4.5


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([99.0]), "two values or more, here are 1$"),
        (lambda: mean_interval([]), "two values or more, here are 0$"),
        (lambda: compare([99.0], [1.0, 2.0]), "two values or more, here are 1 and 2"),
        (lambda: compare_paired([99.0], [1.0]), "two values or more, here are 1 and 1"),
        (lambda: compare_paired([1.0, 2.0], [1.0]), "2 and 1 values cannot be paired"),
        (lambda: compare([1.0, 1.0], [2.0, 2.0]), "all values of each sample are equal"),
        (lambda: compare([99.4] * 3, [99.5] * 3), "all values of each sample are equal"),
        (lambda: seeds_needed(0.0, 0.05), "the gain is 0, but it must be above 0"),
        (lambda: seeds_needed(-0.1, 0.05), "the gain is -0.1, but it must be above 0"),
    ],
)
def test_too_little_to_tell_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_seeds_that_all_end_alike_have_an_interval_of_no_width_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mean_interval([99.4] * 3) == pytest.approx((99.4, 99.4, 99.4))
        found = compare_paired([99.4] * 3, [99.5] * 3)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_pairing_removes_what_the_runs_of_a_seed_share():
    seeds = [98.0, 98.5, 99.0, 99.5, 99.9]
    better = [x + d for x, d in zip(seeds, (0.10, 0.12, 0.08, 0.11, 0.09), strict=True)]
    assert compare_paired(seeds, better).decided
    assert not compare(seeds, better).decided


def test_a_comparison_is_a_sentence():
    found = compare_paired([99.0, 99.1, 99.2], [99.1, 99.2, 99.33])
    assert repr(found) == ("+0.110 points (95 % interval +0.067 to +0.153, n = 3 paired seeds)")
    level = compare([99.0, 99.2], [99.1, 99.15, 99.2])
    assert repr(level).endswith("n = 2 and 3 seeds); no difference is shown")


def test_the_predicted_spread_has_its_published_values():
    assert predicted_spread(0.6, 10_000) == pytest.approx(0.055, abs=5e-4)
    assert predicted_spread(0.4, 10_000) == pytest.approx(0.045, abs=5e-4)


@pytest.mark.parametrize(("gain", "n"), [(0.10, 6), (0.05, 17), (0.03, 45)])
def test_the_seeds_needed_have_their_published_values(gain, n):
    assert seeds_needed(gain, 0.05) == n
    assert smallest_gain(0.05, n) <= gain < smallest_gain(0.05, n - 1)


@pytest.mark.parametrize("paired", [False, True])
def test_the_power_is_how_often_a_gain_is_found(paired):
    draw, found = np.random.default_rng(0), 0
    for _ in range(4000):
        a, b = draw.normal(0, 1, 9), draw.normal(1.2, 1, 9)
        p = scipy.stats.ttest_1samp(b, 0) if paired else scipy.stats.ttest_ind(a, b)
        found += p.pvalue < 0.05
    assert found / 4000 == pytest.approx(detection_power(1.2, 1, 9, paired), abs=0.025)


def test_without_a_gain_one_test_in_twenty_finds_one():
    assert detection_power(0.0, 0.05, 10) == pytest.approx(0.05)


def test_fewer_pairs_than_arms_are_needed_for_the_same_spread():
    assert seeds_needed(0.05, 0.05, paired=True) < seeds_needed(0.05, 0.05)
    assert smallest_gain(0.05, 2) > smallest_gain(0.05, 3) > smallest_gain(0.05, 100) > 0


@pytest.mark.parametrize("paired", [False, True])
def test_the_seeds_needed_are_the_first_number_with_enough_power(paired):
    for gain in (0.02, 0.05, 0.3):
        for power in (0.5, 0.8, 0.95):
            n = seeds_needed(gain, 0.05, power, paired)
            assert detection_power(gain, 0.05, n, paired) >= power
            assert n == 2 or detection_power(gain, 0.05, n - 1, paired) < power
    assert seeds_needed(0.001, 0.05) > 10_000  # found at once, not by counting up


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("n", [2, 3, 5, 20, 100, 386, 10_000])
def test_the_smallest_gain_is_found_for_any_number_of_seeds(n, paired):
    """The noncentral t of scipy is nan far down its lower tail."""
    for power in (0.5, 0.8, 0.95):
        gain = smallest_gain(0.05, n, power, paired)
        assert detection_power(gain, 0.05, n, paired) == pytest.approx(power, abs=1e-6)
    assert detection_power(1000.0, 0.05, n, paired) == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1), max_size=7))
def test_holms_correction_closes_the_test_over_every_set_of_questions(values):
    """A question is decided where Bonferroni decides every set of questions that holds it."""
    p = {str(i): value for i, value in enumerate(values)}
    sets = [s for k in range(1, len(p) + 1) for s in combinations(p, k)]
    closed = {q: max(min(1, len(s) * min(p[r] for r in s)) for s in sets if q in s) for q in p}
    assert holm(p) == pytest.approx(closed)


def test_holms_correction_names_the_smallest_first_and_never_falls():
    assert holm({"b": 0.03, "a": 0.01, "c": 0.025}) == pytest.approx(
        {"a": 0.03, "c": 0.05, "b": 0.05}
    )
    assert list(holm({"b": 0.03, "a": 0.01, "c": 0.025})) == ["a", "c", "b"]


# Calibration


def drawn_labels(temperature, n=20_000):
    """Logits, and labels drawn with the probabilities softmax(logits / temperature)."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (n, 10))
    probabilities = scipy.special.softmax(logits / temperature, axis=1)
    sums = probabilities.cumsum(1)
    return logits, (generator.random((n, 1)) > sums).sum(1).clip(max=9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_with_which_the_labels_were_drawn(temperature):
    logits, labels = drawn_labels(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)
    right = scipy.special.softmax(logits / temperature, axis=1)
    sharper = scipy.special.softmax(logits / (temperature / 2), axis=1)
    assert calibration_error(right, labels) < 1.2
    assert calibration_error(sharper, labels) > 5


def test_the_calibration_error_is_the_mean_difference_of_confidence_and_accuracy_by_bin():
    confidence = np.array([0.6, 0.6, 0.9, 0.9])
    probabilities = np.zeros((4, 10))
    probabilities[:, 3], probabilities[:, 4] = confidence, 1 - confidence
    labels = np.array([3, 4, 3, 3])  # half right at 0.6, all right at 0.9
    assert calibration_error(probabilities, labels, bins=2) == pytest.approx(10)
    assert calibration_error(probabilities, labels, bins=1) == pytest.approx(0)
