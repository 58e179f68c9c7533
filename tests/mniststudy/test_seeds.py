"""The figure of the spread over seeds draws what it says."""

import statistics

import matplotlib.pyplot as plt

from mniststudy.figures.seeds import seed_histogram
from mniststudy.runs.stats import seeds_needed


def test_each_set_of_images_has_a_histogram_of_all_seeds_and_a_curve_of_gains_with_its_name():
    errors = {"validation": [0.5, 0.55, 0.6, 0.58], "test": [0.4, 0.45, 0.5, 0.46]}
    seed_histogram(errors, {"validation": 0.05, "test": 0.05}, "title")
    validation, right, test = plt.gcf().axes
    needed = []
    for panel, (name, values) in zip((validation, test), errors.items(), strict=True):
        mean, spread = statistics.mean(values), statistics.stdev(values)
        assert sum(patch.get_height() for patch in panel.patches) == 4
        (label,) = (t.get_text() for t in panel.texts)
        assert label == f"{name}\nmean {mean:.2f} %\nsd {spread:.3f}"
        needed.append(str(seeds_needed(0.05, spread)))
    assert validation.get_xlim() == test.get_xlim()
    colors = {t.get_text(): t.get_color() for t in right.texts}
    assert set(colors) == {*needed, *errors}
    assert colors["validation"] == colors[needed[0]] != colors["test"] == colors[needed[1]]
    plt.close("all")
