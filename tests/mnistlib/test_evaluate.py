"""Predictions and what is read off them: accuracy, its interval, the misclassified images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mnistlib import Evaluation, build, evaluate, predict
from mnistlib.evaluate import predict_logits

# Intervals


@settings(max_examples=100, deadline=None, database=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 100_000))
def test_the_interval_is_wilsons(data, n):
    correct = data.draw(st.integers(0, n) | st.sampled_from([0, n]))
    z, p = 1.959963984540054, correct / n
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    low, high = Evaluation(0.0, correct, n).interval
    assert low == pytest.approx(100 * (middle - half), abs=1e-9)
    assert high == pytest.approx(100 * (middle + half), abs=1e-9)
    assert 0 <= low < high <= 100


def test_9940_of_10000_give_the_published_interval():
    low, high = Evaluation(0.02, 9_940, 10_000).interval
    assert (round(low, 2), round(high, 2)) == (99.23, 99.53)


def test_an_evaluation_is_a_sentence_with_its_count_and_interval():
    seen = Evaluation(loss=0.02, correct=9_940, n=10_000)
    sentence = "99.40 % of 10,000 images correct (95 % interval 99.23 to 99.53)"
    assert repr(seen) == sentence
    assert seen.accuracy == pytest.approx(99.4)
    assert seen.error == pytest.approx(0.6)


def test_accuracy_and_error_are_exact_for_a_whole_number_of_hundredths():
    """They are rounded in tables; half a hundredth off would show."""
    assert (Evaluation(0.0, 1, 4).accuracy, Evaluation(0.0, 1, 4).error) == (25.0, 75.0)


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
    assert seen.wrong == tuple(range(n))[spoilt]
    assert seen.accuracy == pytest.approx(100 * (n - errors) / n)
    total = math.log(math.exp(3) + 9)  # a right answer loses total - 3 nats, a wrong one total
    assert seen.loss == pytest.approx((n * total - 3 * (n - errors)) / n, rel=1e-5)


def test_predictions_are_in_the_order_of_the_images(reader):
    answers = torch.arange(1203) % 7
    images = torch.zeros(1203, 1, 28, 28)
    images[torch.arange(1203), 0, 0, answers] = 3.0
    assert torch.equal(predict(reader, images).argmax(1), answers)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 300])
def test_batches_change_no_logit_and_are_small(n):
    sizes = []

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)[:, :10] * self.weight

    images = torch.rand(n, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = predict_logits(Sums(), images)
    assert torch.equal(logits, 2 * images.flatten(1)[:, :10])
    assert logits.device.type == "cpu"
    assert not logits.requires_grad
    assert sum(sizes) == n
    assert max(sizes) <= 64


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


def test_labels_may_be_bytes_or_integers(reader):
    images = torch.zeros(3, 1, 28, 28)
    images[:, 0, 0, 7] = 1.0
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert evaluate(reader, images, torch.full((3,), 7, dtype=dtype)).correct == 3


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2), (2, 3)])
def test_no_images_or_other_numbers_of_labels_are_a_value_error(reader, images, labels):
    with pytest.raises(ValueError, match=f"{images} images with {labels} labels"):
        evaluate(reader, torch.zeros(images, 1, 28, 28), torch.zeros(labels))
