"""The shared figures draw what they are given, in one look, and return nothing."""

import warnings

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from mnistlib import plots


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


def test_the_style_holds_inside_a_figure_and_not_after_it():
    before = dict(mpl.rcParams)
    with plots.figure("A title", "a subtitle", ncols=2) as (figure, axes):
        assert not mpl.rcParams["axes.spines.top"]
        assert len(axes) == 2
    assert figure.get_suptitle() == "A title"
    assert axes[0].get_title(loc="left") == "a subtitle"
    assert dict(mpl.rcParams) == before


def test_a_log_axis_has_ticks_that_read_as_numbers():
    _, ax = plt.subplots()
    ax.plot([0.02, 30], [0.02, 30])
    plots.log_axis(ax.yaxis)
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    plt.gcf().canvas.draw()
    assert {"0.05", "0.1", "1", "20"} <= {t.get_text() for t in ax.get_yticklabels()}
    assert {t.get_text() for t in ax.get_yticklabels(minor=True)} <= {""}


def test_digits_stand_in_rows_of_ten_under_their_labels_or_captions(tiny_digits):
    images, labels = tiny_digits.train_images[:12], tiny_digits.train_labels[:12]
    plots.digits(images, labels, "title")
    axes = plt.gcf().axes
    assert len(axes) == 20
    assert [ax.get_title(loc="center") for ax in axes[:12]] == [str(int(y)) for y in labels]
    assert [ax.axison for ax in axes] == [True] * 12 + [False] * 8
    plots.digits(images[:2], labels[:2], "title", ["one", "two"], marked=[1])
    axes = plt.gcf().axes[:3]
    assert [ax.get_title(loc="center") for ax in axes] == ["one", "two", ""]
    assert [ax.title.get_color() == plots.VALIDATION for ax in axes] == [False, True, False]


def test_maps_on_digits_share_a_scale_that_goes_as_far_below_zero_as_above(tiny_digits):
    maps = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.0]])
    with plots.figure("title", ncols=2) as (_, axes):
        plots.heat(axes, tiny_digits.train_images[:2, 0], maps, "label", ["one", "two"])
    assert [ax.images[1].get_clim() for ax in axes] == [(-3, 3)] * 2


def test_the_confusion_counts_each_mistake_and_leaves_out_what_is_right():
    labels = torch.tensor([1, 1, 7, 3, 3, 3], dtype=torch.uint8)
    predictions = torch.tensor([1, 7, 1, 8, 8, 3])
    plots.confusion(labels, predictions, "title")
    (ax,) = plt.gcf().axes
    counts = ax.collections[0].get_array()
    assert {(i, j): int(counts[i, j]) for i, j in zip(*counts.nonzero(), strict=True)} == {
        (1, 7): 1, (7, 1): 1, (3, 8): 2
    }  # fmt: skip
    assert ax.get_title(loc="left") == "4 errors of n = 6"
    with warnings.catch_warnings(action="error"):  # nbval takes a warning for a difference
        plots.confusion(labels, labels, "title")
    assert plt.gcf().axes[0].get_title(loc="left") == "0 errors of n = 6"
