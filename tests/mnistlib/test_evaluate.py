"""Predictions and what is read off them: accuracy, its interval, the misclassified images."""

import copy
import math

import numpy as np
import pytest
import torch
from core_helpers import same
from torch import nn

from mnistlib import Evaluation, build, evaluate, load_mnist, predict
from mnistlib.evaluate import over_writers, predict_logits


def test_the_interval_is_wilsons():
    """The first is the published one; the others are Wilson's formula by hand."""
    for correct, n in ((9_940, 10_000), (0, 1), (3, 7), (99_999, 100_000)):
        z, p = 1.959963984540054, correct / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        wanted = pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-9)
        assert Evaluation(0.0, correct, n).interval == wanted
    seen = Evaluation(loss=0.02, correct=9_940, n=10_000)
    assert seen.standard_error == pytest.approx(100 * math.sqrt(0.994 * 0.006 / 10_000))
    said = "99.40 % of 10,000 images correct (95 % interval 99.23 to 99.53, writers ignored)"
    assert repr(seen) == said
    # exact for a whole number of hundredths: in tables half a hundredth off would show
    assert (Evaluation(0.0, 1, 4).accuracy, Evaluation(0.0, 1, 4).error) == (25.0, 75.0)


def test_the_interval_over_writers_is_that_of_as_many_independent_images_as_say_the_same():
    seen = Evaluation(0.02, 9_940, 10_000, factor=1.5, freedom=100)
    alike = Evaluation(0.02, 9_940, 10_000).standard_error
    assert seen.standard_error == pytest.approx(1.5 * alike)
    # 10,000 / 1.5^2 images, and 1.984 is the quantile of Student's t
    z, p, n = 1.983971518523553, 0.994, 10_000 / 1.5**2
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    ends = (100 * (middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    assert seen.interval == pytest.approx(tuple(ends), abs=1e-9)
    how = "over writers, 1.50 times the binomial"
    assert repr(seen).endswith(f"(95 % interval 99.12 to 99.59 {how})")


def test_the_factor_over_writers_is_that_of_leaving_each_writer_out():
    """The jackknife by hand, with writers of many and of few images in any order."""
    draw = np.random.default_rng(0)
    who = draw.permutation(np.repeat(np.arange(12), [3, 5, 8, 13, 4, 6, 20, 9, 2, 7, 11, 12]))
    wrong = draw.random(100) < np.linspace(0, 0.6, 12)[who]
    left = np.array([wrong[who != w].mean() for w in range(12)])
    variance = 11 / 12 * ((left - wrong.mean()) ** 2).sum()
    factor, freedom = over_writers(wrong, who + 500)
    assert factor == pytest.approx(math.sqrt(variance * 100 / wrong.mean() / (1 - wrong.mean())))
    assert factor > 1
    assert freedom == pytest.approx(100**2 / (np.bincount(who) ** 2).sum() - 1)
    assert over_writers(np.zeros(100, bool), who) == (1.0, freedom)


def test_the_interval_over_writers_has_the_true_accuracy_where_the_binomial_one_misses_it():
    """Synthetic writers, as unlike as MNIST's: error rates from a beta distribution, mean 2 %."""
    draw, inside = np.random.default_rng(0), {"over writers": 0, "writers ignored": 0}
    for _ in range(400):
        who = np.repeat(np.arange(250), np.where(np.arange(250) < 50, 100, 20))
        wrong = draw.random(len(who)) < draw.beta(0.4, 19.6, 250)[who]
        n, right = len(who), int((~wrong).sum())
        for how, clustered in (("over writers", over_writers(wrong, who)), ("writers ignored", ())):
            seen = Evaluation(0.0, right, n, (), *clustered)
            low, high = seen.interval
            inside[how] += low <= 98 <= high
    assert 0.93 <= inside["over writers"] / 400 <= 0.97
    assert inside["writers ignored"] / 400 < 0.8


def test_writers_that_are_given_are_in_the_interval(reader):
    labels, writers = torch.arange(300) % 10, torch.arange(300) // 30
    images = torch.zeros(300, 1, 28, 28)
    images[torch.arange(300), 0, 0, torch.where(writers == 3, 0, labels)] = 3.0
    seen = evaluate(reader, images, labels, writers=writers)
    assert len(seen.wrong) == 27  # all by one writer, but for zeros
    assert seen.factor > 4
    assert seen.freedom == pytest.approx(9)
    low, high = evaluate(reader, images, labels).interval
    assert seen.interval[1] - seen.interval[0] > 3 * (high - low)


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


@pytest.mark.parametrize("n", [1, 64, 65, 300])
def test_every_image_counts_and_predictions_are_in_their_order(reader, n):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 10, (n,), generator=generator, dtype=torch.uint8)
    answers, errors = labels.long(), (n + 3) // 4
    answers[n - errors :] = (answers[n - errors :] + 1) % 10
    images = torch.zeros(n, 1, 28, 28)
    images[torch.arange(n), 0, 0, answers] = 3.0
    assert torch.equal(predict(reader, images).argmax(1), answers)
    total = math.log(math.exp(3) + 9)  # a right answer loses total - 3 nats, a wrong one total
    for dtype in (torch.uint8, torch.int64):
        seen = evaluate(reader, images, labels.to(dtype))
        assert (seen.correct, seen.n) == (n - errors, n)
        assert seen.wrong == tuple(range(n - errors, n))
        assert seen.loss == pytest.approx((n * total - 3 * (n - errors)) / n, rel=1e-5)


def test_no_batch_is_larger_than_64(pixels):
    sizes, model = [], build("c4k5s2p pooled")
    model.register_forward_hook(lambda m, x, out: sizes.append(len(x[0])))
    assert not predict_logits(model, pixels.repeat(30, 1, 1, 1)).requires_grad
    assert (sum(sizes), max(sizes)) == (210, 64)


def test_predictions_add_up_to_1_and_dropout_is_off(pixels):
    model = build("reference", dropout=0.5).train()
    chances = predict(model, pixels)
    assert (chances.shape, chances.dtype, bool((chances >= 0).all())) == (
        (7, 10),
        torch.float32,
        True,
    )
    torch.testing.assert_close(chances.sum(1), torch.ones(7))
    assert torch.equal(predict(model, pixels), chances)


@pytest.mark.parametrize("training", [True, False])
def test_each_layer_stays_in_its_mode_and_statistics_stay(pixels, training):
    model = build("reference").train(training)
    model.bn1.eval()  # a layer may be frozen on purpose
    before = copy.deepcopy(model.state_dict())
    predict(model, pixels)
    evaluate(model, pixels, torch.zeros(7))
    with pytest.raises(RuntimeError):
        predict(model, torch.zeros(2, 3, 28, 28))  # an image does not fit
    assert {n for n, m in model.named_modules() if m.training != training} <= {"bn1"}
    assert not model.bn1.training
    assert same(model.state_dict(), before)


def test_images_may_be_one_without_channel_or_arrays(reader, pixels):
    pixels = pixels / 255
    known = predict(reader, pixels)
    assert torch.equal(predict(reader, pixels[:, 0]), known)
    assert torch.equal(predict(reader, pixels.numpy()), known)
    assert torch.equal(predict(reader, pixels[3]), known[3:4])
    assert torch.equal(predict(reader, pixels[3, 0].numpy()), known[3:4])
    labels = known.argmax(1)
    assert evaluate(reader, pixels[:, 0].numpy(), labels.numpy()).correct == 7
    assert evaluate(reader, pixels, labels.tolist()).correct == 7


def test_the_sample_says_that_it_has_no_test_images(reader):
    with pytest.raises(ValueError, match="the embedded sample has no test images"):
        evaluate(reader, *load_mnist("sample").test)


@pytest.mark.parametrize(("images", "labels"), [(0, 0), (3, 2), (2, 3)])
def test_no_images_or_other_numbers_of_labels_are_a_value_error(reader, images, labels):
    with pytest.raises(ValueError, match=f"{images} images with {labels} labels"):
        evaluate(reader, torch.zeros(images, 1, 28, 28), torch.zeros(labels))
