"""The figures of the spread over seeds and over writers draw what they say."""

import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest

from mnistlib import Evaluation
from mniststudy.figures.seeds import errors_by_writer, seed_histogram, writers_of_half
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


def test_the_writers_of_half_of_the_errors_are_as_few_as_possible():
    assert writers_of_half(np.array([0, 3, 0, 5, 1, 1])).tolist() == [3]
    assert writers_of_half(np.array([2, 2, 2, 2])).tolist() == [0, 1]
    assert writers_of_half(np.array([1, 4, 1, 1, 3.5])).tolist() == [1, 4]


def test_each_writer_has_a_bar_in_the_colour_of_the_group_and_each_recipe_both_intervals():
    errors, students = np.arange(70.0), np.arange(70) % 3 == 0
    seen = {"a": Evaluation(0.0, 99, 100, (), 2.0, 50), "b": Evaluation(0.0, 90, 100, (), 1.5, 50)}
    errors_by_writer(errors, students, seen, "title")
    left, right = plt.gcf().axes
    assert sorted(bar.get_height() for bar in left.patches) == list(range(10, 70))
    colors = {name: {b.get_facecolor() for b in left.containers[k]} for k, name in enumerate("se")}
    assert len(colors["s"]) == len(colors["e"]) == 1
    assert colors["s"] != colors["e"]
    assert len(left.containers[0]) == students[10:].sum()
    assert "21 writers make half" in left.texts[-1].get_text()  # 69 + ... + 49 of 2,415
    ends = [line.get_xdata() for line in right.lines if len(line.get_xdata()) == 2]
    low, high = seen["b"].interval
    assert ends[3] == pytest.approx([100 - high, 100 - low])
    assert ends[2][0] > ends[3][0]
    plt.close("all")
