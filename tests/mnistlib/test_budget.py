"""Counts before training, each against the reference's document or a second way to count."""

import copy
import html
import re

import pytest
import torch
from core_helpers import same
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mnistlib import MODELS, Budget, ConfigError, build


def chain(*layers):
    return nn.Sequential(*layers)


# the side of the square that the last layer of each sees, worked out by hand
SMALL = {
    "strides": (chain(nn.Conv2d(1, 2, 3, 2), nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 2, 3)), 15),
    "stride over gaps": (chain(nn.Conv2d(1, 2, 1, 3), nn.Conv2d(2, 2, 3)), 7),
    "dilation": (chain(nn.Conv2d(1, 2, 3, dilation=3), nn.Conv2d(2, 2, 3, dilation=2)), 11),
    "tall kernels": (chain(nn.Conv2d(1, 2, (7, 1), (2, 1)), nn.Conv2d(2, 2, (3, 5))), 11),
    "pools": (chain(nn.AvgPool2d(3, 2), nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)), 9),
    "groups": (chain(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 5, groups=4, padding=2)), 7),
    "linear": (chain(nn.Conv2d(1, 2, 3, 2), nn.Flatten(), nn.Linear(2 * 20 * 20, 5)), 41),
    "adaptive pool": (chain(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)), 41),
}


def sides_by_gradient(model, size):
    """Side of the square of pixels that move one central output value, for each layer."""
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    outputs = {}
    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
    images = torch.rand(32, 1, size, size, generator=generator, requires_grad=True)
    model(images)
    sides = {}
    for name, out in outputs.items():
        # ReLU and max-pool let a gradient through here and there: the union over many images
        centre = out[:, :, out.shape[2] // 2, out.shape[3] // 2] if out.ndim == 4 else out[:, :1]
        weights = torch.rand(centre.shape, generator=generator)  # so that no two channels cancel
        (moved,) = torch.autograd.grad((centre * weights).sum(), images, retain_graph=True)
        spots = moved[:, 0].abs().amax(0).nonzero()  # (spots, 2): row, column
        sides[name] = int((spots.amax(0) - spots.amin(0) + 1).max())
    return sides


def test_the_layers_of_the_reference_are_those_of_the_document():
    budget = Budget(build("reference"))
    first, *_, last = budget.layers
    assert (first.name, first.kind, first.shape) == ("conv1", "Conv2d", (8, 28, 28))
    assert (first.multiply_accumulates, first.activation_bytes) == (28**2 * 8 * 9, 4 * 8 * 28**2)
    assert (last.name, last.shape, last.activation_bytes) == ("conv6", (10, 1, 1), 40)
    assert last.multiply_accumulates == last.parameters == 7_840
    fields = {layer.name: layer.receptive_field for layer in budget.layers}
    assert [fields[f"conv{i}"] for i in range(1, 7)] == [3, 5, 7, 12, 16, 42]
    assert (budget.parameters, budget.multiply_accumulates) == (13_912, 1_895_712)


def test_multiply_accumulates_are_half_of_torchs_flops():
    small = [(chain(model, nn.Flatten(), nn.LazyLinear(3)), 41) for model, _ in SMALL.values()]
    for model, size in [*small, *((build(name), 28) for name in MODELS)]:
        images = torch.zeros(1, 1, size, size)
        model.eval()(images)  # a lazy layer finds its size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        assert 2 * Budget(model, size).multiply_accumulates == counter.get_total_flops() > 0


# the shapes of a network that the others vary: shortcuts, strides, shared and depthwise kernels
@pytest.mark.parametrize("name", ["reference", "reference-depthwise", "net-697", "net-20k"])
def test_receptive_fields_are_what_gradients_reach(name):
    model = build(name)
    # a field larger than the image is all of it, and one as large may be cut off at its border
    fields = {layer.name: min(layer.receptive_field, 27) for layer in Budget(model).layers}
    assert fields == {k: min(side, 27) for k, side in sides_by_gradient(model, 28).items()}


@pytest.mark.parametrize("name", list(SMALL))
def test_receptive_fields_of_small_networks_are_what_gradients_reach(name):
    model, by_hand = SMALL[name]
    budget = Budget(model, image_size=41)
    fields = {layer.name: layer.receptive_field for layer in budget.layers}
    assert fields == sides_by_gradient(model, 41)
    assert budget.receptive_field == by_hand


def test_a_layer_used_twice_computes_twice_and_has_its_parameters_once():
    twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    budget = Budget(chain(nn.Conv2d(1, 4, 1, bias=False), twice, nn.ReLU(), twice))
    assert budget.parameters == 4 + 144
    assert budget.multiply_accumulates == 28 * 28 * (4 + 2 * 4 * 4 * 9)
    assert sum(layer.parameters for layer in budget.layers) == budget.parameters


def test_a_network_may_be_named():
    for name in ("reference", "c4k5s2p pooled"):
        assert repr(Budget(name)) == repr(Budget(build(name)))


def test_text_and_html_hold_the_same_cells():
    model = chain(nn.Conv2d(1, 2, 3), nn.Flatten())
    model.add_module("<b>&", nn.Linear(2 * 26 * 26, 10, bias=False))
    text, page = repr(Budget(model)), Budget(model)._repr_html_()
    lines = text.splitlines()
    head = ["layer", "kind", "output", "parameters", "share", "MACs", "memory", "field"]
    assert lines[0].split() == head
    assert lines[1].split() == "0 Conv2d 2x26x26 20 0.1 % 12,168 5.3 kB 3x3".split()  # noqa: SIM905
    assert lines[-1].split()[:2] == ["total", "13,540"]
    cells = re.findall(
        r'<t[hd] style="padding: 2px 10px; text-align: (?:left|right);">(.*?)</t', page
    )
    assert re.sub(r"\s", "", html.unescape("".join(cells))) == re.sub(r"\s", "", text)
    assert "&lt;b&gt;&amp;" in page


def test_counting_leaves_network_and_random_state_as_they_were():
    model = build("reference").train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Budget(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("size", [-3, 0, 27, 1_000_000])
def test_an_image_size_that_the_network_cannot_take_is_refused_by_name(size):
    with pytest.raises(ConfigError, match=rf"image_size is {size}, .* choose another size"):
        Budget(build("reference"), image_size=size)
