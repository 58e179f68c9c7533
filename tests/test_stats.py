"""Intervals of means, checked against scipy's own, and by how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given
from hypothesis import strategies as st

from mnistlib.stats import difference_interval, mean_interval

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
        (lambda: difference_interval([1.0, 1.0], [2.0, 2.0]), "neither sample has any spread"),
    ],
)
def test_too_little_to_tell_is_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()
