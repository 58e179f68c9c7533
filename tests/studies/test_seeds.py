"""The figure of the spread over seeds draws what it says."""

import statistics

import matplotlib.pyplot as plt
import pytest

from mnistlib.experiments.stats import seeds_needed
from mnistlib.studies.seeds import seed_histogram


@pytest.fixture
def axes():
    """Both panels of a histogram of four seeds."""
    errors = {"validation": [0.5, 0.55, 0.6, 0.58], "test": [0.4, 0.45, 0.5, 0.47]}
    seed_histogram(errors, {"validation": 0.05, "test": 0.05}, "title")
    yield *plt.gcf().axes, errors
    plt.close("all")


def test_the_histogram_shows_all_seeds_of_both_sets(axes):
    left, _, _ = axes
    assert sum(patch.get_height() for patch in left.patches) == 8
    assert {"validation", "test"} == {t.get_text() for t in left.texts}


def test_the_seeds_that_the_gain_needs_are_marked(axes):
    _, right, errors = axes
    needed = {str(seeds_needed(0.05, statistics.stdev(values))) for values in errors.values()}
    assert needed == {t.get_text() for t in right.texts}


def test_names_stand_on_the_outer_flanks_of_the_bells(axes):
    left, _, _ = axes
    places = {t.get_text(): (t.xy[0], t.get_ha()) for t in left.texts}
    assert places["test"] == (pytest.approx(0.455 - 0.05), "right")
    assert places["validation"] == (pytest.approx(0.5575 + 0.05), "left")
