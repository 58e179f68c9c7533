"""Predictions and what is read off them: accuracy, intervals, pictures of one's own."""

import io
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn

from mnistlib import DatasetError, Evaluation, build, evaluate, predict, wilson_interval
from mnistlib.evaluate import read_picture

# Intervals


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 100_000), confidence=st.floats(0.5, 0.999))
def test_the_interval_is_scipys(data, n, confidence):
    successes = data.draw(st.integers(0, n) | st.sampled_from([0, n]))
    known = scipy.stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    low, high = wilson_interval(successes, n, confidence)
    assert low == pytest.approx(known.low, abs=1e-12)
    assert high == pytest.approx(known.high, abs=1e-12)
    assert 0 <= low < high <= 1


def test_9940_of_10000_give_the_published_interval():
    low, high = wilson_interval(9_940, 10_000)
    assert (round(100 * low, 2), round(100 * high, 2)) == (99.23, 99.53)


@pytest.mark.parametrize(
    "nonsense",
    [(1, 0), (0, 0), (1, -5), (-1, 10), (11, 10), (math.nan, 10), (5, 10, 1.0), (5, 10, 1.5),
     (5, 10, -0.5)],
)  # fmt: skip
def test_an_interval_of_nonsense_is_a_value_error(nonsense):
    with pytest.raises(ValueError, match=r"."):
        wilson_interval(*nonsense)


def test_an_evaluation_is_a_sentence_with_its_count_and_interval():
    seen = Evaluation(loss=0.02, correct=9_940, n=10_000)
    sentence = "99.40 % of 10,000 images correct (95 % interval 99.23 to 99.53)"
    assert repr(seen) == sentence
    assert seen.accuracy == pytest.approx(99.4)
    assert seen.error == pytest.approx(0.6)


# Evaluation


@pytest.fixture
def reader():
    """A network whose logits are the first ten pixels of an image."""
    last = nn.Linear(784, 10, bias=False)
    nn.init.eye_(last.weight)
    return nn.Sequential(nn.Flatten(), last)


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (7, 1, 28, 28), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("n", [1, 499, 500, 501, 1203])
@pytest.mark.parametrize("wrong", ["first", "last"])
def test_every_image_counts(reader, n, wrong):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 10, (n,), generator=generator, dtype=torch.uint8)
    answers, errors = labels.long(), (n + 3) // 4
    spoilt = slice(None, errors) if wrong == "first" else slice(n - errors, None)
    answers[spoilt] = (answers[spoilt] + 1) % 10
    images = torch.zeros(n, 1, 28, 28)
    images[torch.arange(n), 0, 0, answers] = 3.0
    seen = evaluate(reader, images, labels)
    assert (seen.correct, seen.n) == (n - errors, n)
    assert seen.accuracy == pytest.approx(100 * (n - errors) / n)
    total = math.log(math.exp(3) + 9)  # a right answer loses total - 3 nats, a wrong one total
    assert seen.loss == pytest.approx((n * total - 3 * (n - errors)) / n, rel=1e-5)


def test_predictions_are_in_the_order_of_the_images(reader):
    answers = torch.arange(1203) % 7
    images = torch.zeros(1203, 1, 28, 28)
    images[torch.arange(1203), 0, 0, answers] = 3.0
    assert torch.equal(predict(reader, images).argmax(1), answers)


def test_predictions_add_up_to_1(pixels):
    chances = predict(build("reference"), pixels)
    assert chances.shape == (7, 10)
    assert chances.dtype == torch.float32
    assert (chances >= 0).all()
    torch.testing.assert_close(chances.sum(1), torch.ones(7))


@pytest.mark.parametrize("look", [predict, lambda m, x: evaluate(m, x, torch.zeros(len(x)))])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_stays_in_its_mode_and_its_statistics_stay(pixels, look, training):
    model = build("reference").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    look(model, pixels)
    assert {m.training for m in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_layer_that_was_frozen_in_evaluation_mode_stays_so(pixels):
    model = build("reference").train()
    model.bn1.eval()
    predict(model, pixels)
    assert [name for name, m in model.named_modules() if not m.training] == ["bn1"]


def test_the_mode_is_put_back_when_an_image_does_not_fit():
    model = build("reference").train()
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(2, 3, 28, 28))
    assert model.training


def test_dropout_is_off_while_predicting(pixels):
    model = build("reference", dropout=0.5).train()
    assert torch.equal(predict(model, pixels), predict(model, pixels))


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2), (2, 3)])
def test_no_images_or_other_numbers_of_labels_are_a_value_error(reader, images, labels):
    with pytest.raises(ValueError, match=f"{images} images with {labels} labels"):
        evaluate(reader, torch.zeros(images, 1, 28, 28), torch.zeros(labels))


# Pictures


def drawn(size=(28, 28), ink=0, ground=255, mode="L"):
    """A slanted stroke with a foot, away from the middle."""
    picture = Image.new(mode, size, ground)
    draw, (w, h) = ImageDraw.Draw(picture), size
    draw.line((0.6 * w, 0.1 * h, 0.5 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    draw.line((0.5 * w, 0.6 * h, 0.7 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    return picture


def read(picture, tmp_path, name="digit.png"):
    picture.save(tmp_path / name)
    return read_picture(tmp_path / name)


def test_a_light_digit_of_28x28_is_taken_as_it_is(tmp_path):
    picture = drawn(ink=200, ground=0)
    digit = read(picture, tmp_path)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    np.testing.assert_array_equal(digit[0], np.asarray(picture))


def test_a_dark_digit_of_28x28_is_inverted(tmp_path):
    picture = drawn(ink=30, ground=250)
    np.testing.assert_array_equal(read(picture, tmp_path)[0], 255 - np.asarray(picture))


@pytest.mark.parametrize(
    ("mode", "ink", "ground", "name"),
    [
        ("L", 0, 255, "dark.png"),
        ("L", 255, 0, "light.png"),
        ("1", 0, 1, "bits.png"),
        ("RGB", (20, 30, 120), (235, 230, 210), "photo.jpg"),
        ("RGB", (250, 240, 90), (10, 60, 30), "board.jpg"),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0), "transparent.png"),
        ("P", 0, 255, "palette.gif"),
    ],
)
@pytest.mark.parametrize("size", [(320, 240), (240, 400), (90, 90)])
def test_a_drawn_digit_is_fitted_to_20x20_and_centred_by_mass(
    tmp_path, mode, ink, ground, name, size
):
    picture = drawn(size, ink, ground, mode)
    if mode == "P":
        picture.putpalette([k for k in range(256) for _ in range(3)])
    digit = read(picture, tmp_path, name)[0].double()
    assert digit.shape == (28, 28)
    assert digit.max() > 200
    stroke = digit > 32
    height, width = int(stroke.any(1).sum()), int(stroke.any(0).sum())
    assert max(height, width) == 20
    middle = torch.arange(28, dtype=torch.float64) - 13.5
    for axis in (0, 1):
        assert abs((digit.sum(1 - axis) * middle).sum() / digit.sum()) <= 0.51
    assert (digit == 0).double().mean() > 0.5  # the ground is dark


def test_the_same_digit_is_read_the_same_wherever_it_stands_on_the_paper(tmp_path):
    stroke = drawn((80, 120))
    digits = []
    for corner in ((10, 10), (150, 60)):
        paper = Image.new("L", (300, 250), 255)
        paper.paste(stroke, corner)
        digits.append(read(paper, tmp_path))
    assert torch.equal(*digits)


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("size", [(200, 100), (1, 1), (28, 28)])
def test_a_blank_picture_is_refused_by_name(tmp_path, size, ground):
    with pytest.raises(DatasetError, match=r"blank\.png shows no digit"):
        read(Image.new("L", size, ground), tmp_path, "blank.png")


def png():
    buffer = io.BytesIO()
    drawn((200, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "contents", [b"this is not a picture", b"", png()[:100], png()[:-40], png()[:8]]
)
def test_what_is_no_picture_is_refused_by_name_with_a_remedy(tmp_path, contents):
    path = tmp_path / "digit.png"
    path.write_bytes(contents)
    with pytest.raises(DatasetError, match=r"digit\.png cannot be read .*; give a PNG or JPEG"):
        read_picture(path)


def test_a_missing_picture_is_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.png cannot be read"):
        read_picture(tmp_path / "nowhere.png")


def test_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DatasetError, match=r"folder\.png cannot be read"):
        read_picture(tmp_path / "folder.png")


def test_a_picture_too_large_for_memory_is_refused_by_name(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    with pytest.raises(DatasetError, match=r"huge\.png has over 50 million pixels"):
        read_picture(tmp_path / "huge.png")
