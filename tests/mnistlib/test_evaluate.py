"""Predictions and what is read off them: accuracy, its interval, the misclassified images."""

import copy
import math

import pytest
import torch
from core_helpers import same
from torch import nn

from mnistlib import Evaluation, build, evaluate, load_mnist, predict
from mnistlib.evaluate import predict_logits


def test_the_interval_is_wilsons():
    """The first is the published one; the others are Wilson's formula by hand."""
    for correct, n in ((9_940, 10_000), (0, 1), (3, 7), (99_999, 100_000)):
        z, p = 1.959963984540054, correct / n
        middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
        wanted = pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-9)
        assert Evaluation(0.0, correct, n).interval == wanted
    seen = Evaluation(loss=0.02, correct=9_940, n=10_000)
    assert repr(seen) == "99.40 % of 10,000 images correct (95 % interval 99.23 to 99.53)"
    # exact for a whole number of hundredths: in tables half a hundredth off would show
    assert (Evaluation(0.0, 1, 4).accuracy, Evaluation(0.0, 1, 4).error) == (25.0, 75.0)


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
