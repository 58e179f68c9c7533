"""Intervals of means, checked against scipy's own, and by how often they hold the truth."""

from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from mnistlib.stats import (
    best_epoch_inflation,
    bootstrap_interval,
    compare,
    compare_paired,
    detection_power,
    difference_interval,
    holm,
    mcnemar,
    mean_interval,
    predicted_spread,
    seeds_needed,
    smallest_gain,
)

samples = st.lists(st.floats(90, 100), min_size=2, max_size=40)


@given(samples, st.floats(0.5, 0.999))
def test_the_interval_of_a_mean_is_scipys(values, confidence):
    assume(np.std(values) > 1e-3)
    known = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert mean_interval(values, confidence) == pytest.approx((np.mean(values), *known), rel=1e-9)


@given(samples, samples, st.floats(0.5, 0.999))
def test_the_interval_of_a_difference_is_scipys(a, b, confidence):
    assume(min(np.std(a), np.std(b)) > 1e-3)
    known = scipy.stats.ttest_ind(b, a, equal_var=False).confidence_interval(confidence)
    found = difference_interval(a, b, confidence)
    assert found == pytest.approx((np.mean(b) - np.mean(a), *known), rel=1e-6, abs=1e-9)


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    draw = np.random.default_rng(0)
    held = [0, 0]
    for _ in range(2000):
        a, b = draw.normal(99.3, 0.05, 6), draw.normal(99.4, 0.09, 9)
        _, low, high = mean_interval(a)
        held[0] += low <= 99.3 <= high
        _, low, high = difference_interval(a, b)
        held[1] += low <= 0.1 <= high
    assert all(abs(n / 2000 - 0.95) < 0.02 for n in held)


def test_a_difference_has_the_sign_of_the_second_minus_the_first():
    assert difference_interval([1.0, 2.0], [5.0, 6.0])[0] == 4.0


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([99.0]), "two values or more"),
        (lambda: difference_interval([99.0], [1.0, 2.0]), "two values or more, here are 1 and 2"),
        (lambda: bootstrap_interval([99.0]), "two values or more"),
        (lambda: compare_paired([1.0, 2.0], [1.0]), "2 and 1 values cannot be paired"),
        (lambda: difference_interval([1.0, 1.0], [2.0, 2.0]), "neither sample has any spread"),
    ],
)
def test_too_little_to_tell_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_the_bootstrap_interval_is_scipys():
    values = np.random.default_rng(1).exponential(1, 30)
    known = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=10_000, rng=np.random.default_rng(2)
    ).confidence_interval
    mean, low, high = bootstrap_interval(values)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(known, abs=0.02)
    assert bootstrap_interval(values) == (mean, low, high)


@given(st.lists(st.tuples(st.floats(90, 100), st.floats(90, 100)), min_size=2, max_size=30))
def test_a_paired_comparison_is_scipys(pairs):
    a, b = (list(x) for x in zip(*pairs, strict=True))
    assume(np.std(np.subtract(b, a)) > 1e-3)
    found = compare_paired(a, b)
    known = scipy.stats.ttest_rel(b, a).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(known), rel=1e-6, abs=1e-9)
    assert found.difference == pytest.approx(np.mean(b) - np.mean(a), abs=1e-9)


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


@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_mcnemar_is_scipys_binomial_test(a, b):
    only_a, only_b, p = mcnemar(a, b)
    assert (only_a, only_b) == (len(a - b), len(b - a))
    known = scipy.stats.binomtest(only_a, n).pvalue if (n := only_a + only_b) else 1.0
    assert p == pytest.approx(known)


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


def test_the_best_epoch_is_never_below_the_last_and_noise_alone_inflates_it():
    assert best_epoch_inflation([[97.0, 99.0, 98.9], [98.0, 98.5, 98.6]]).difference == (
        pytest.approx(0.05)
    )
    noise = np.random.default_rng(0).normal(99, 0.05, (200, 8))  # no epoch is better than another
    found = best_epoch_inflation(noise)
    assert found.difference == pytest.approx(0.05 * 1.4236, abs=0.01)  # mean maximum of 8 normals
    assert found.decided


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
