"""The figures of a network show its layers, counts and answer."""

import itertools

import matplotlib.pyplot as plt
import pytest
import torch

from mnistlib import Budget, build
from mniststudy.figures import architecture


@pytest.fixture
def axes():
    yield lambda: plt.gcf().axes
    plt.close("all")


@pytest.fixture
def image(tiny_digits):
    return tiny_digits.train_images[3]  # (1, 28, 28)


@pytest.fixture
def model():
    return build("reference").eval()


def answer(model, image):
    with torch.no_grad():
        return model(image[None])[0]


def test_the_block_diagram_shows_every_layer_with_its_parameters_and_the_answer(model, image, axes):
    architecture.block_diagram(model, image, "title")
    texts = [t.get_text() for t in axes()[0].texts]
    kernels = {"onecross": "1x1", "conv6": "7x7"}
    for layer in Budget(model).layers:
        if layer.kind == "Conv2d":
            kernel = kernels.get(layer.name, "3x3")
            assert texts.count(f"{layer.name}\n{kernel}\n{layer.parameters:,}") == 1
    words = ("BatchNorm", "ReLU", "max-pool 2x2", "dropout", "shortcut", "+")
    assert [sum(t.startswith(word) for t in texts) for word in words] == [5, 5, 2, 2, 2, 2]
    shapes = ["1x28x28", "8x28x28", "8x14x14", "16x14x14", "16x7x7", "10x1x1"]
    assert [texts.count(shape) for shape in shapes] == [1, 3, 1, 3, 1, 1]
    bold = [t.get_text() for t in axes()[0].texts if t.get_fontweight() == "bold"]
    assert bold == [str(int(answer(model, image).argmax()))]


def test_outputs_are_those_of_the_layer_itself_even_if_a_relu_follows_in_place(model, image):
    before, after, last = architecture.outputs(model, image, ["pool1", "drop1", "conv6"])
    assert before.min() < 0
    assert torch.equal(before.relu(), after)
    assert torch.equal(last.flatten(), answer(model, image))


def test_the_contributions_of_all_positions_add_up_to_each_logit(model, image, axes):
    architecture.logit_contributions(model, image, "title")
    logits, panels = answer(model, image), axes()[:10]
    sums = [float(ax.images[1].get_array().sum()) for ax in panels]
    assert sums == pytest.approx(logits.tolist(), abs=1e-4)
    titles = [ax.get_title(loc="center") for ax in panels]
    assert titles == [f"{c}: logit {z:.1f}" for c, z in enumerate(logits)]
    bold = [ax.title.get_fontweight() == "bold" for ax in panels]
    assert bold == [c == int(logits.argmax()) for c in range(10)]


@pytest.mark.parametrize("name", ["reference", "early", "net-20k"])
def test_both_bars_are_full_and_the_labels_of_their_segments_do_not_overlap(name, axes):
    counted = Budget(build(name))
    architecture.budget(counted, "title")
    (ax,) = axes()
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(200)
    labels = [text.get_text().split("\n") for text in ax.texts]
    assert [share for _, share in labels] == [f"{bar.get_width():.1f} %" for bar in ax.patches]
    norms = sum(layer.parameters for layer in counted.layers if layer.kind == "BatchNorm2d")
    assert ["BatchNorm", f"{100 * norms / counted.parameters:.1f} %"] in labels
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
