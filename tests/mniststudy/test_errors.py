"""What notebook 10 shows: changed images are changed as named, figures count what is there."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from mnistlib import (
    RECIPES,
    evaluate,
    load_mnist,
    load_model,
    released_checkpoint,
)
from mniststudy.figures import errors
from mniststudy.figures.errors import CASES, frame, occlusion, robustness, transform
from mniststudy.runs.ledger import read_results, runs_for
from mniststudy.runs.stats import calibration_error

MIDDLE = torch.arange(28) - 13.5


@pytest.fixture
def digits():
    """Eight images of a slanted stroke with grey edges, within the middle 20x20."""
    image = torch.zeros(28, 28)
    for k in range(6, 22):
        image[k, 9 + k // 3 : 12 + k // 3] = torch.tensor([120.0, 255.0, 90.0])
    return image.to(torch.uint8).expand(8, 1, 28, 28).clone()


def centre(images):
    """Centre of mass from the middle, `(N, 2)`: down and right."""
    mass = images.sum((1, 2, 3))
    return torch.stack([(images.sum((1, axis)) @ MIDDLE) / mass for axis in (3, 2)], 1)


def angle(images):
    """Direction of the longer axis of each image in degrees, `(N,)`."""
    found = []
    for image, (y, x) in zip(images[:, 0], centre(images), strict=True):
        down, right = (MIDDLE - y)[:, None], (MIDDLE - x)[None]
        moments = [(image * m).sum() for m in (down * down, right * right, down * right)]
        found.append(0.5 * math.degrees(math.atan2(2 * moments[2], moments[1] - moments[0])))
    return torch.tensor(found)


def width(images):
    """Standard deviation of the mass around its centre, `(N,)`."""
    y, x = centre(images).T[..., None]
    rows, columns = images.sum((1, 3)), images.sum((1, 2))
    spread = (rows * (MIDDLE - y) ** 2).sum(1) + (columns * (MIDDLE - x) ** 2).sum(1)
    return (spread / images.sum((1, 2, 3))).sqrt()


@pytest.mark.parametrize("case", CASES)
def test_the_neutral_severity_is_tried_and_changes_nothing(digits, case):
    neutral = CASES[case].neutral
    assert neutral in CASES[case].severities
    assert torch.equal(transform(digits, case, neutral), digits / 255)


@pytest.mark.parametrize("case", CASES)
def test_every_severity_gives_other_images_that_a_network_takes(digits, case):
    before = digits.clone()
    for severity in set(CASES[case].severities) - {CASES[case].neutral}:
        changed = transform(digits, case, severity)
        assert changed.shape == digits.shape
        assert changed.dtype == torch.float32
        assert 0 <= changed.min() <= changed.max() <= 1
        assert not torch.equal(changed, digits / 255)
        assert torch.equal(changed, transform(digits, case, severity))  # the same each time
    assert torch.equal(digits, before)


def test_a_case_that_does_not_exist_is_an_error(digits):
    with pytest.raises(KeyError, match="mirror"):
        transform(digits, "mirror", 1)


def test_a_shift_moves_the_images_in_turn_right_left_down_and_up_by_that_many_pixels(digits):
    for k in (1, 3):
        moved = transform(digits, "shift", k)
        for turn, step in enumerate(((0, k), (0, -k), (k, 0), (-k, 0))):
            expected = torch.roll(digits[turn::4] / 255, step, (2, 3))  # nothing reaches the border
            assert torch.equal(moved[turn::4], expected)


def test_ink_that_is_shifted_over_the_border_does_not_come_back_on_the_other_side():
    full = torch.full((4, 1, 28, 28), 255, dtype=torch.uint8)
    moved = transform(full, "shift", 5)
    assert moved.mean((1, 2, 3)).tolist() == pytest.approx([23 / 28] * 4)
    assert moved[0, 0, :, :5].max() == 0
    assert moved[3, 0, -5:].max() == 0


@pytest.mark.parametrize("degrees", [10, 40])
def test_a_rotation_turns_the_images_in_turn_one_way_and_the_other_about_the_middle(
    digits, degrees
):
    turned = transform(digits, "rotation", degrees)
    change = (angle(turned) - angle(digits / 255) + 90) % 180 - 90
    assert change[::2].tolist() == pytest.approx([float(change[0])] * 4)
    assert abs(change[0]) == pytest.approx(degrees, abs=0.7)
    assert change[1].item() == pytest.approx(-change[0].item(), abs=1)
    dot = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    dot[..., 13:15, 13:15] = 200
    assert centre(transform(dot, "rotation", degrees)).abs().max() < 1e-5


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.25])
def test_scale_changes_the_size_by_the_factor_and_keeps_the_digit_in_the_middle(digits, factor):
    scaled = transform(digits, "scale", factor)
    assert (width(scaled) / width(digits / 255)).tolist() == pytest.approx([factor] * 8, rel=0.06)
    assert (centre(scaled) - factor * centre(digits / 255)).abs().max() <= 0.51
    ink = scaled.sum() / (digits / 255).sum()
    assert float(ink) == pytest.approx(factor**2, rel=0.1)


def test_noise_has_its_standard_deviation_where_nothing_is_cut_off():
    grey = torch.full((50, 1, 28, 28), 128, dtype=torch.uint8)
    noise = transform(grey, "noise", 0.1) - grey / 255
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02)
    assert abs(float(noise.mean())) < 0.002
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("sd", [1, 2])
def test_blur_spreads_a_dot_by_its_standard_deviation_and_keeps_the_ink(sd):
    dot = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    dot[..., 14, 14] = 255
    blurred = transform(dot, "blur", sd)
    assert float(blurred.sum()) == pytest.approx(1, abs=1e-3)
    assert float(width(blurred)) / math.sqrt(2) == pytest.approx(sd, rel=0.02)


def test_thickness_moves_each_edge_by_that_many_pixels():
    bar = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    bar[..., 4:24, 10:16] = 255
    for pixels in (-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2):
        across = transform(bar, "thickness", pixels)[0, 0, 14].sum()
        assert float(across) == pytest.approx(6 + 2 * pixels, abs=1e-5)


def test_the_mean_ink_grows_with_the_thickness(digits):
    steps = [-2, -1, -0.75, -0.5, 0, 0.25, 0.5, 1, 1.5, 2]
    ink = torch.stack([transform(digits, "thickness", s).mean((1, 2, 3)) for s in steps])
    assert (ink.diff(dim=0) > 0).all()


# Saliency


class Dot(nn.Module):
    """Says 3 by as much as there is ink in one place, and 5 by as much as there is in another."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        logits, ink = torch.zeros(len(images), 10), images[:, 0] / 255
        if images.is_floating_point():
            ink = images[:, 0]
        logits[:, 3] = ink[:, 6:9, 18:21].sum((1, 2)) + 0.5
        logits[:, 5] = ink[:, 20:23, 4:7].sum((1, 2))
        return self.weight * logits


def test_occlusion_finds_what_speaks_for_the_answer_and_what_speaks_against_it():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 6:9, 18:21] = 255
    image[0, 20:22, 4:7] = 255
    found = occlusion(Dot(), image, 5)
    assert found.shape == (28, 28)
    # 9.5 against 6; without its own dot the answer has 0.5 and loses by 5.5
    assert found.max().item() == pytest.approx(9)
    assert divmod(int(found.argmax()), 28)[0] in range(6, 9)
    assert torch.equal(found == 9, near(range(6, 9), range(18, 21)))
    assert found.min().item() == pytest.approx(-6)
    assert torch.equal(found == -6, near(range(19, 23), range(4, 7)))
    touched = near(range(3, 12), range(15, 24)) | near(range(17, 25), range(1, 10))
    assert (found[~touched.bool()] == 0).all()


def near(rows, columns):
    """A map `(28, 28)` bool, true in these rows and columns."""
    there = torch.zeros(28, 28, dtype=torch.bool)
    there[rows.start : rows.stop, columns.start : columns.stop] = True
    return there


def test_the_square_that_covers_is_cut_at_the_border_not_moved():
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 6:9, 18:21] = 255

    class Corner(Dot):
        def forward(self, images):
            return super().forward(torch.roll(images, (6, 18), (2, 3)))

    found = occlusion(Corner(), torch.roll(image, (-6, -18), (1, 2)), 7)
    assert found[:4, :4].flatten().tolist()[0] == pytest.approx(9)
    assert (found[6:] == 0).all()
    assert (found[:, 6:] == 0).all()


# Digits from elsewhere


def test_a_small_digit_is_enlarged_to_20x20_and_centred_by_mass():
    small = torch.zeros(3, 8, 8)
    small[0, :, 3:5] = 1
    small[1, :, 0:2] = 1
    small[2, 2:, 5:] = 0.5
    framed = frame(small)
    assert framed.shape == (3, 1, 28, 28)
    assert framed.dtype == torch.uint8
    assert centre(framed.float()).abs().max() <= 0.51
    assert ((framed[:2, 0] > 64).any(2).sum(1) == 20).all()
    assert framed.amax((1, 2, 3)).tolist()[:2] == [255, 255]
    # 0.5 is half of white, and bicubic interpolation overshoots at edges
    assert 127 <= int(framed[2].max()) <= 165


def test_no_ink_of_the_8x8_digits_is_cut_off():
    images = torch.from_numpy(load_digits().images).float() / 16
    large = F.interpolate(images[:, None], (20, 20), mode="bicubic").clamp(0, 1)
    lost = large.sum((1, 2, 3)) - frame(images).sum((1, 2, 3)) / 255
    assert lost.max() < 0.5


# The table of robustness


def test_each_row_of_the_table_says_how_one_network_reads_images_changed_once(digits):
    images, labels = digits[:4], torch.tensor([5, 5, 5, 0])
    images[:, :, 20:23, 4:7] = 255  # which a shift by six pixels moves away
    table = robustness({"best": Dot(), "reference": Dot()}, images, labels)
    assert list(table.columns) == ["case", "severity", "recipe", "accuracy", "n"]
    assert len(table) == 2 * sum(len(case.severities) for case in CASES.values())
    assert set(table["n"]) == {4}
    for row in table.sample(8, random_state=0).itertuples():
        seen = evaluate(Dot(), transform(images, row.case, row.severity), labels)
        assert row.accuracy == pytest.approx(seen.accuracy)
    assert table["accuracy"].nunique() > 1


def test_the_committed_table_is_of_the_released_networks():
    """Unchanged images are read as the ledger says, so a new network needs a new table."""
    table = read_results("robustness")
    assert list(table.columns) == ["case", "severity", "recipe", "accuracy", "n"]
    assert not table.duplicated(["case", "severity", "recipe"]).any()
    tried = {(name, s) for name, case in CASES.items() for s in case.severities}
    assert set(zip(table["case"], table["severity"], strict=True)) == tried
    for recipe, own in table.groupby("recipe"):
        row = runs_for(RECIPES[recipe]).query("seed == 0").iloc[0]
        for name, case in CASES.items():
            unchanged = own[(own["case"] == name) & (own["severity"] == case.neutral)]
            assert unchanged["accuracy"].item() == pytest.approx(row["test_accuracy"], abs=0.021)
    assert set(table["recipe"]) == {"best", "smoothed", "reference"}
    assert set(table["n"]) == {10_000}


def test_the_table_is_made_by_the_released_networks_from_the_test_images(
    tmp_path, monkeypatch, tiny_digits
):
    monkeypatch.setattr(errors, "CASES", {"shift": errors.Case(CASES["shift"].change, "", (0, 3))})
    # asked for "mnist", because the sample has no test images
    monkeypatch.setattr(errors, "load_mnist", {"mnist": tiny_digits}.__getitem__)
    path = errors.write_robustness(tmp_path / "results" / "robustness.csv")
    table = read_results("robustness", path.parent).set_index(["recipe", "severity"])
    assert set(table["n"]) == {100}
    for recipe in ("best", "smoothed", "reference"):
        seen = evaluate(load_model(released_checkpoint(recipe)), *tiny_digits.test)
        assert table.loc[(recipe, 0), "accuracy"] == pytest.approx(seen.accuracy)


# Figures


@pytest.fixture
def closed():
    yield
    plt.close("all")


def answers(n=400, seed=0):
    """Probabilities `(n, 10)` and labels of which about a fifth is not the most probable."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 10))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p, np.where(rng.random(n) < 0.2, (p.argmax(1) + 1) % 10, p.argmax(1))


@pytest.mark.usefixtures("closed")
def test_the_plate_shows_every_error_once_most_confident_first_and_frames_the_marked_ones(digits):
    p, labels = answers(100)
    wrong = np.flatnonzero(p.argmax(1) != labels)
    marked = {int(wrong[2]), int(wrong[5]), int(np.flatnonzero(p.argmax(1) == labels)[0])}
    images = digits[:1].expand(100, 1, 28, 28)
    errors.plate(images, torch.from_numpy(labels), p, "title", marked)
    panels = [ax for ax in plt.gcf().axes if ax.images]
    assert len(panels) == len(wrong)
    shown = [ax.get_title() for ax in panels]
    order = sorted(wrong, key=lambda i: -p[i].max())
    assert shown == [f"{labels[i]}→{p[i].argmax()} {100 * p[i].max():.1f} %" for i in order]
    framed = [
        i for i, ax in zip(order, panels, strict=True) if ax.spines["top"].get_linewidth() > 1
    ]
    assert set(framed) == marked & set(wrong)


@pytest.mark.usefixtures("closed")
def test_the_bars_count_images_by_the_seeds_that_misclassify_them_disputed_ones_on_top():
    times = np.array([0, 1, 1, 1, 2, 0, 4, 4])
    disputed = np.array([True, False, True, False, False, False, True, True])
    errors.seed_counts(times, disputed, "title")
    others, contested = ([bar.get_height() for bar in c] for c in plt.gca().containers)
    assert others == [2, 1, 0, 0]
    assert contested == [1, 0, 0, 2]
    assert sum(others) + sum(contested) == (times > 0).sum()


@pytest.mark.usefixtures("closed")
def test_the_reliability_diagram_has_the_bins_of_the_calibration_error():
    p, labels = answers()
    flat = p**0.5 / (p**0.5).sum(1, keepdims=True)
    errors.reliability({"best": (flat, p)}, labels, "title", bins=10)
    for ax, own in zip(plt.gcf().axes, (flat, p), strict=True):
        dots = [line.get_xydata()[0] for line in ax.lines if line.get_marker() == "o"]
        assert len(dots) == 10
        gaps = [abs(x - y) for x, y in np.nan_to_num(dots)]
        assert np.mean(gaps) == pytest.approx(calibration_error(own, labels, bins=10))


@pytest.mark.usefixtures("closed")
def test_the_histogram_of_confidences_counts_every_image():
    p, _ = answers(200)
    errors.confidences({"best": p, "reference": p**2 / (p**2).sum(1, keepdims=True)}, "title")
    assert [sum(steps.get_data().values) for steps in plt.gca().patches] == [200, 200]


@pytest.mark.usefixtures("closed")
def test_the_curves_show_the_error_of_each_recipe_at_each_severity():
    table = read_results("robustness")
    errors.robustness_curves(table, "title")
    panels = plt.gcf().axes
    assert len(panels) == len(CASES)
    for ax, name in zip(panels, CASES, strict=True):
        for line, recipe in zip(ax.lines, ("best", "smoothed", "reference"), strict=False):
            own = table[(table["case"] == name) & (table["recipe"] == recipe)]
            assert line.get_ydata().tolist() == (100 - own["accuracy"]).tolist()
            assert line.get_xdata().tolist() == list(CASES[name].severities)


@pytest.mark.usefixtures("closed")
def test_each_severity_is_drawn_and_the_maps_share_one_scale(digits):
    errors.severities(digits[0], "title")
    assert sum(bool(ax.images) for ax in plt.gcf().axes) == sum(
        len(case.severities) for case in CASES.values()
    )
    maps = [torch.eye(28), -3 * torch.eye(28)]
    errors.saliency(digits[:2], maps, ["a", "b"], "title")
    scales = [image.get_clim() for ax in plt.gcf().axes for image in ax.images[1:]]
    assert scales == [(-3, 3), (-3, 3)]


def test_the_released_network_loses_its_answer_where_its_ink_is_covered():
    """On a real digit, covering ink matters and covering empty paper does not."""
    image = load_mnist("sample").train_images[0]
    found = occlusion(load_model(released_checkpoint()), image, 7)
    assert found.max() > 1
    assert found[0, 0] == found[-1, -1] == 0
