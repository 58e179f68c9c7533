"""The figure of the spread over seeds draws what it says."""

import statistics

import matplotlib.pyplot as plt
import pytest

from mniststudy.figures.seeds import seed_histogram
from mniststudy.runs.stats import seeds_needed


@pytest.fixture
def axes():
    """The panels of a histogram of four seeds: validation, gains, test; and the errors drawn."""
    errors = {"validation": [0.5, 0.55, 0.6, 0.58], "test": [0.4, 0.45, 0.5, 0.46]}
    seed_histogram(errors, {"validation": 0.05, "test": 0.05}, "title")
    yield *plt.gcf().axes, errors
    plt.close("all")


def test_each_set_of_images_has_its_own_histogram_of_all_seeds_with_its_name(axes):
    validation, _, test, errors = axes
    for panel, (name, values) in zip((validation, test), errors.items(), strict=True):
        assert sum(patch.get_height() for patch in panel.patches) == 4
        (label,) = (t.get_text() for t in panel.texts)
        spread = statistics.stdev(values)
        assert label == f"{name}\nmean {statistics.mean(values):.2f} %\nsd {spread:.3f}"
    assert validation.get_xlim() == test.get_xlim()


def test_the_curves_of_gains_are_named_and_the_seeds_that_are_needed_are_marked(axes):
    _, right, _, errors = axes
    needed = {str(seeds_needed(0.05, statistics.stdev(values))) for values in errors.values()}
    assert len(needed) == 2
    assert {t.get_text() for t in right.texts} == needed | {"validation", "test"}
    colors = {t.get_text(): t.get_color() for t in right.texts}
    assert colors["validation"] != colors["test"]
