"""What notebook 09 shows: changed images are changed as named, figures show what is there."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from mnistlib import RECIPES, evaluate, load_model, released_checkpoint
from mniststudy.figures import errors
from mniststudy.figures.errors import CASES, frame, occlusion, transform
from mniststudy.runs.ledger import read_results, runs_for
from mniststudy.runs.stats import calibration_error


@pytest.fixture
def digits():
    """Eight images of a slanted stroke with grey edges, within the middle 20x20."""
    image = torch.zeros(28, 28)
    for k in range(6, 22):
        image[k, 9 + k // 3 : 12 + k // 3] = torch.tensor([120.0, 255.0, 90.0])
    return image.to(torch.uint8).expand(8, 1, 28, 28).clone()


def grey(value, rows, columns, n=1):
    """Images `(n, 1, 28, 28)` uint8 of one grey rectangle."""
    images = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
    images[..., rows, columns] = value
    return images


def centre(image):
    """Centre of mass from its place in MNIST: down and right."""
    return np.array(ndimage.center_of_mass(image.squeeze().numpy())) - 14


def spread(image):
    """Covariance of the mass around its centre, `(2, 2)`."""
    weights = image.squeeze().double().numpy()
    return np.cov(np.indices((28, 28)).reshape(2, -1), aweights=weights.ravel(), ddof=0)


def angle(image):
    """Direction of the longer axis in degrees."""
    (down, across), (_, right) = spread(image)
    return 0.5 * math.degrees(math.atan2(2 * across, right - down))


@pytest.mark.parametrize("case", CASES)
def test_each_severity_but_the_neutral_one_gives_other_images_that_a_network_takes(digits, case):
    before = digits.clone()
    assert CASES[case].neutral in CASES[case].severities
    for severity in CASES[case].severities:
        changed = transform(digits, case, severity)
        assert (changed.shape, changed.dtype) == (digits.shape, torch.float32)
        assert 0 <= changed.min() <= changed.max() <= 1
        assert torch.equal(changed, digits / 255) == (severity == CASES[case].neutral)
        assert torch.equal(changed, transform(digits, case, severity))  # the same each time
    assert torch.equal(digits, before)


def test_a_shift_moves_the_images_in_turn_right_left_down_and_up_and_cuts_off_what_leaves(digits):
    for turn, step in enumerate(((0, 3), (0, -3), (3, 0), (-3, 0))):
        expected = torch.roll(digits[turn::4] / 255, step, (2, 3))  # nothing reaches the border
        assert torch.equal(transform(digits, "shift", 3)[turn::4], expected)
    moved = transform(grey(255, slice(28), slice(28), 4), "shift", 5)
    assert moved.mean((1, 2, 3)).tolist() == pytest.approx([23 / 28] * 4)


def test_a_rotation_turns_the_images_in_turn_one_way_and_the_other_about_the_middle(digits):
    turned = transform(digits, "rotation", 40)
    change = [(angle(image) - angle(digits[0]) + 90) % 180 - 90 for image in turned]
    assert [abs(degrees) for degrees in change] == pytest.approx([40] * 8, abs=0.7)
    assert np.sign(change).tolist() == 4 * [np.sign(change[0]), -np.sign(change[0])]


def test_a_rotation_leaves_the_pixel_where_mnist_has_its_centres_of_mass():
    dots = grey(255, slice(14, 15), slice(14, 15), 2)
    turned = transform(dots, "rotation", 40)
    assert turned[..., 14, 14].tolist() == [[1], [1]]
    assert abs(centre(turned[0])).max() < 1e-4


def test_scale_changes_the_size_by_the_factor_and_keeps_the_centre_of_mass(digits):
    for factor in CASES["scale"].severities[1:-1]:
        scaled = transform(digits, "scale", factor)[0]
        size = math.sqrt(spread(scaled).trace() / spread(digits[0]).trace())
        assert size == pytest.approx(factor, rel=0.06)
        assert abs(centre(scaled) - factor * centre(digits[0])).max() <= 0.51


def test_thickness_moves_each_edge_by_that_many_pixels_or_parts_of_one():
    for pixels in (-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2):
        thick = transform(grey(255, slice(4, 24), slice(10, 16)), "thickness", pixels)
        assert float(thick[0, 0, 14].sum()) == pytest.approx(6 + 2 * pixels, abs=1e-5)


class Dot(nn.Module):
    """Says 3 by the ink in one place, and 5 by the ink in a corner."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        logits = torch.zeros(len(images), 10)
        logits[:, 3] = images[:, 0, 6:9, 18:21].sum((1, 2)) / 255 + 0.5
        logits[:, 5] = images[:, 0, :3, :3].sum((1, 2)) / 255
        return self.weight * logits


def test_occlusion_finds_what_speaks_for_and_against_the_answer_also_at_the_border():
    image = (grey(255, slice(6, 9), slice(18, 21)) + grey(255, slice(2), slice(3)))[0]
    found = occlusion(Dot(), image, 5)
    # 9.5 against 6; without its own dot the answer has 0.5 and loses by 5.5
    assert (found.max(), found.min()) == (9, -6)
    assert torch.equal(found == 9, grey(1, slice(6, 9), slice(18, 21))[0, 0] == 1)
    assert torch.equal(found == -6, grey(1, slice(3), slice(3))[0, 0] == 1)
    touched = grey(1, slice(3, 12), slice(15, 24)) + grey(1, slice(4), slice(5))
    assert (found[touched[0, 0] == 0] == 0).all()


def test_a_small_digit_is_enlarged_to_20x20_and_centred_by_mass():
    small = torch.zeros(2, 8, 8)
    small[0, :, 3:5] = 1
    small[1, :, 0:2] = 1
    framed = frame(small)
    assert (framed.shape, framed.dtype) == ((2, 1, 28, 28), torch.uint8)
    assert all(abs(centre(image)).max() <= 0.5 for image in framed)
    assert ((framed[:, 0] > 64).any(2).sum(1) == 20).all()
    assert framed.amax((1, 2, 3)).tolist() == [255, 255]


def test_the_committed_table_is_of_the_released_networks():
    """Unchanged images are read as the ledger says, so a new network needs a new table."""
    table = read_results("robustness")
    keys = table[["recipe", "case", "severity"]].itertuples(index=False, name=None)
    tried = [(name, s) for name, case in CASES.items() for s in case.severities]
    assert sorted(keys) == sorted((recipe, *one) for recipe in errors.COLORS for one in tried)
    assert set(table["n"]) == {10_000}
    neutral = table["severity"] == table["case"].map(lambda name: CASES[name].neutral)
    for recipe, own in table[neutral].groupby("recipe"):
        row = runs_for(RECIPES[recipe]).query("seed == 0").iloc[0]
        assert own["accuracy"].tolist() == pytest.approx([row["test_accuracy"]] * 6, abs=0.021)


def test_the_table_is_made_by_the_released_networks_from_the_test_images(
    tmp_path, monkeypatch, tiny_digits
):
    monkeypatch.setattr(errors, "CASES", {"shift": errors.Case(CASES["shift"].change, "", (0, 3))})
    monkeypatch.setattr(errors, "load_mnist", {"mnist": tiny_digits}.__getitem__)
    monkeypatch.setattr(errors, "outputs_folder", lambda: tmp_path)
    errors.write_robustness()
    table = read_results("robustness", tmp_path / "results")
    assert table["recipe"].tolist() == 2 * list(errors.COLORS)
    images, labels = tiny_digits.test
    for row in table.itertuples():
        model = load_model(released_checkpoint(row.recipe))
        seen = evaluate(model, transform(images, "shift", row.severity), labels)
        assert (row.accuracy, row.n) == (pytest.approx(seen.accuracy), 100)


def test_the_reliability_diagram_has_the_bins_of_the_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(10, 0.2), 400)
    labels = np.where(rng.random(400) < 0.2, (p.argmax(1) + 1) % 10, p.argmax(1))
    flat = p**0.5 / (p**0.5).sum(1, keepdims=True)
    errors.reliability({"best": (flat, p)}, labels, "title", bins=10)
    (ax,) = plt.gcf().axes
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    for dot, bars, own in zip(dots, ax.collections, (flat, p), strict=True):
        x, y = dot.get_data()
        assert np.mean(abs(x - y)) == pytest.approx(calibration_error(own, labels, bins=10))
        ends = [line[:, 1] for line in bars.get_segments()]
        assert all(low <= at <= high for (low, high), at in zip(ends, y[y > 0], strict=True))
    plt.close("all")
