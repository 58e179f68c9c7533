"""The reference's four requirements, each met or missed; the figures of a network draw."""

import copy

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from mnistlib import MODELS, Budget, build
from mniststudy.figures import architecture
from mniststudy.figures.architecture import requirements

PARAMETERS = "fewer than 20,000 parameters"
BATCHNORM = "BatchNorm in use"
DROPOUT = "Dropout in use"
SHAPE = "28x28 in, 10 out"


def small(norm=nn.BatchNorm2d, dropout=0.5, width=4, channels=1, side=28, head=10, spare=None):
    """All four requirements met, unless an argument breaks one."""
    first = nn.Conv2d(channels, width, kernel_size=4, stride=4, bias=False)
    if spare is not None:
        first.spare = spare  # part of the network, never called
    last = nn.Linear(width * (side // 4) ** 2, head)
    return nn.Sequential(first, norm(width), nn.Dropout(dropout), nn.Flatten(), last)


def missed(model, **limit):
    return [name for name, met in requirements(model, **limit).items() if not met]


def test_the_four_requirements_are_those_of_the_reference():
    assert list(requirements(build("reference"))) == [PARAMETERS, BATCHNORM, DROPOUT, SHAPE]
    assert missed(small()) == []


def test_total_parameter_count():
    assert requirements(build("reference"))[PARAMETERS]
    assert missed(small(width=50)) == [PARAMETERS]


@pytest.mark.parametrize(("limit", "met"), [(13_912, False), (13_913, True)])
def test_the_parameter_limit_itself_is_too_many(limit, met):
    checks = requirements(build("reference"), limit=limit)
    assert checks[f"fewer than {limit:,} parameters"] is met


def test_batch_normalization_usage():
    assert requirements(build("reference"))[BATCHNORM]
    assert missed(small(norm=nn.Identity)) == [BATCHNORM]


def test_batch_normalization_that_is_never_called_does_not_count():
    assert missed(small(norm=nn.Identity, spare=nn.BatchNorm2d(4))) == [BATCHNORM]
    model = build("reference")
    model.spare = model.bn1
    for k in range(1, 6):
        setattr(model, f"bn{k}", nn.Identity())
    assert missed(model) == [BATCHNORM]


def test_dropout_layer_usage():
    assert requirements(build("reference"))[DROPOUT]
    assert missed(build("reference", dropout=0.0)) == [DROPOUT]
    assert missed(small(dropout=0.0)) == [DROPOUT]


def test_dropout_that_is_never_called_does_not_count():
    assert missed(small(dropout=0.0, spare=nn.Dropout(0.5))) == [DROPOUT]


@pytest.mark.parametrize("head", [9, 11])
def test_input_and_output_shape(head):
    assert requirements(build("reference"))[SHAPE]
    assert missed(small(head=head)) == [SHAPE]


@pytest.mark.parametrize("sizes", [(10, 1, 1), (1, 10)])
def test_logits_with_more_than_two_dimensions_have_the_wrong_shape(sizes):
    model = small()
    model.append(nn.Unflatten(1, sizes))
    assert missed(model) == [SHAPE]


@pytest.mark.parametrize("other", [{"channels": 3}, {"side": 32}])
def test_a_network_of_other_images_fails_all_that_needs_a_whole_pass(other):
    assert missed(small(**other))[-2:] == [DROPOUT, SHAPE]
    assert requirements(small(**other))[PARAMETERS]


@pytest.mark.parametrize("training", [True, False])
def test_the_checks_leave_network_and_random_state_as_they_were(training):
    model = build("reference").train(training)
    model.bn1.train(not training)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    requirements(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())


# Figures


@pytest.fixture(autouse=True)
def no_figure_left():
    yield
    plt.close("all")


@pytest.fixture
def image(tiny_digits):
    return tiny_digits.train_images[3]  # (1, 28, 28)


def test_the_block_diagram_shows_every_layer_with_its_parameters_and_the_answer(image):
    model = build("reference")
    architecture.block_diagram(model, image, "A title")
    (ax,) = plt.gcf().axes
    texts = [t.get_text() for t in ax.texts if t.get_text()]
    for layer in Budget(model).layers:
        if layer.kind == "Conv2d":
            assert [t.split("\n")[2] for t in texts if t.startswith(f"{layer.name}\n")] == [
                f"{layer.parameters:,}"
            ]
    words = ("BatchNorm", "ReLU", "max-pool", "dropout", "shortcut", "+")
    assert [sum(t.startswith(word) for t in texts) for word in words] == [5, 5, 2, 2, 2, 2]
    shapes = ["1x28x28", "8x28x28", "8x14x14", "16x14x14", "16x7x7", "10x1x1"]
    assert [texts.count(shape) for shape in shapes] == [1, 3, 1, 3, 1, 1]
    with torch.no_grad():
        answer = int(model(image[None]).argmax())
    bold = [t.get_text() for t in ax.texts if t.get_fontweight() == "bold"]
    assert bold == [str(answer)]


def test_receptive_fields_lie_around_the_middle_and_end_at_the_border(image):
    architecture.receptive_fields(Budget(build("reference")), image, "A title")
    drawn = {ax.get_title(loc="center"): ax.patches[0] for ax in plt.gcf().axes}
    assert list(drawn) == ["conv1", "conv2", "conv3", "pool1", "conv4", "conv5", "pool2", "conv6"]
    assert [patch.get_width() for patch in drawn.values()] == [3, 5, 7, 8, 12, 16, 18, 28]
    for patch in drawn.values():
        assert patch.get_x() + patch.get_width() / 2 == patch.get_y() + patch.get_height() / 2
        assert patch.get_x() + patch.get_width() / 2 == pytest.approx(13.5)


def test_feature_maps_are_the_outputs_of_the_layers_named(image):
    model = build("reference")
    architecture.feature_maps(model, image, ["conv1", "pool2"], "A title")
    axes, scales = plt.gcf().axes[:16], plt.gcf().axes[16:]
    assert [ax.get_ylabel() for ax in axes if ax.get_ylabel()] == ["conv1", "pool2"]
    assert [ax.get_ylim()[1] for ax in scales] == [ax.images[0].norm.vmax for ax in axes[7::8]]
    assert [ax.images[0].get_array().shape for ax in axes] == [(28, 28)] * 8 + [(7, 7)] * 8
    with torch.no_grad():
        (kept,) = architecture.outputs(model, image, ["conv6"])
        assert torch.equal(kept.flatten(), model(image[None])[0])
    assert not any(m._forward_hooks for m in model.modules())


def test_outputs_are_those_of_the_layer_itself_even_if_a_relu_follows_in_place(image):
    before, after = architecture.outputs(build("reference"), image, ["pool1", "drop1"])
    assert before.min() < 0
    assert torch.equal(before.relu(), after)


def test_the_contributions_of_all_positions_add_up_to_each_logit(image):
    model = build("reference").eval()
    architecture.logit_contributions(model, image, "A title")
    with torch.no_grad():
        logits = model(image[None])[0]
    *axes, _scale = plt.gcf().axes
    sums = [float(ax.images[1].get_array().sum()) for ax in axes]
    assert sums == pytest.approx(logits.tolist(), abs=1e-4)
    titles = [ax.title for ax in axes]
    assert [t.get_text() for t in titles] == [f"{c}: logit {z:.1f}" for c, z in enumerate(logits)]
    bold = [t.get_fontweight() == "bold" for t in titles]
    assert bold == [c == int(logits.argmax()) for c in range(10)]


def test_the_shares_of_the_budget_fill_both_bars_and_every_segment_has_a_label():
    architecture.budget(Budget(build("reference")), "A title")
    (ax,) = plt.gcf().axes
    for y in (0, 1):
        widths = [p.get_width() for p in ax.patches if round(p.get_y() + 0.35) == y]
        assert sum(widths) == pytest.approx(100)
    texts = [t.get_text() for t in ax.texts if t.get_text()]
    assert len(texts) == len(ax.patches) == 8 + 7
    assert {"conv6\n56.4 %", "conv1\n0.5 %", "BatchNorm\n0.8 %", "conv6\n0.4 %"} <= {*texts}


@pytest.mark.parametrize("name", list(MODELS))
def test_labels_outside_a_bar_do_not_overlap(name):
    architecture.budget(Budget(build(name)), "A title")
    (ax,) = plt.gcf().axes
    plt.gcf().canvas.draw()
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text()]
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
