"""Counts before training, each against the reference's document or a second way to count."""

import copy
import re

import pytest
import torch
import torchinfo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mnistlib import MODELS, Budget, ConfigError, build

PARAMETER_LIST = """\
conv1.weight: 72 parameters
bn1.weight: 8 parameters
bn1.bias: 8 parameters
conv2.weight: 576 parameters
bn2.weight: 8 parameters
bn2.bias: 8 parameters
conv3.weight: 576 parameters
bn3.weight: 8 parameters
bn3.bias: 8 parameters
onecross.weight: 128 parameters
conv4.weight: 2,304 parameters
bn4.weight: 16 parameters
bn4.bias: 16 parameters
conv5.weight: 2,304 parameters
bn5.weight: 16 parameters
bn5.bias: 16 parameters
conv6.weight: 7,840 parameters

Total Trainable Parameters: 13,912"""

LAYER_SUMMARY = [
    ["Layer", "Output Shape", "Param #"],
    ["conv1", "(8, 1, 3, 3)", "72"],
    ["bn1", "(8,)", "16"],
    ["conv2", "(8, 8, 3, 3)", "576"],
    ["bn2", "(8,)", "16"],
    ["conv3", "(8, 8, 3, 3)", "576"],
    ["bn3", "(8,)", "16"],
    ["onecross", "(16, 8, 1, 1)", "128"],
    ["conv4", "(16, 16, 3, 3)", "2,304"],
    ["bn4", "(16,)", "32"],
    ["conv5", "(16, 16, 3, 3)", "2,304"],
    ["bn5", "(16,)", "32"],
    ["conv6", "(10, 16, 7, 7)", "7,840"],
    ["Total trainable parameters: 13,912"],
]


def chain(*layers):
    return nn.Sequential(*layers)


# the side of the square that the last layer of each sees, worked out by hand
SMALL = {
    "strides": (chain(nn.Conv2d(1, 2, 3, 2), nn.Conv2d(2, 2, 3, 2), nn.Conv2d(2, 2, 3)), 15),
    "stride over gaps": (chain(nn.Conv2d(1, 2, 1, 3), nn.Conv2d(2, 2, 3)), 7),
    "dilation": (chain(nn.Conv2d(1, 2, 3, dilation=3), nn.Conv2d(2, 2, 3, dilation=2)), 11),
    "wide kernels": (chain(nn.Conv2d(1, 2, (1, 7)), nn.Conv2d(2, 2, (5, 3))), 9),
    "tall kernels": (chain(nn.Conv2d(1, 2, (7, 1), (2, 1)), nn.Conv2d(2, 2, (3, 5))), 11),
    "pools": (chain(nn.AvgPool2d(3, 2), nn.Conv2d(1, 4, 3), nn.MaxPool2d(2)), 9),
    "dilated pool": (chain(nn.Conv2d(1, 4, 3), nn.MaxPool2d(3, 1, dilation=2)), 7),
    "groups": (chain(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 5, groups=4, padding=2)), 7),
}
small_networks = pytest.mark.parametrize("name", list(SMALL))
every_model = pytest.mark.parametrize("name", list(MODELS))


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


def test_the_parameter_list_is_that_of_the_document():
    assert Budget(build("reference")).parameter_list() == PARAMETER_LIST


def test_the_layer_summary_is_that_of_the_document():
    lines = Budget(build("reference")).layer_summary().splitlines()
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if not set(line) <= {"-"}]
    assert rows == LAYER_SUMMARY
    assert len(lines) == len(rows) + 3


def test_the_final_convolution_has_over_half_of_the_parameters():
    budget = Budget(build("reference"))
    (last,) = [layer for layer in budget.layers if layer.name == "conv6"]
    assert f"{last.parameters / budget.parameters:.1%}" == "56.4%"


def test_layers_come_in_the_order_in_which_they_run_with_their_output():
    first, *_, last = Budget(build("reference")).layers
    assert (first.name, first.kind, first.shape) == ("conv1", "Conv2d", (8, 28, 28))
    assert first.multiply_accumulates == 28 * 28 * 8 * 9
    assert first.activation_bytes == 4 * 8 * 28 * 28
    assert (last.name, last.shape, last.activation_bytes) == ("conv6", (10, 1, 1), 40)
    assert last.multiply_accumulates == 7_840


@every_model
def test_multiply_accumulates_are_half_of_torchs_flops(name):
    model = build(name).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    assert 2 * Budget(model).multiply_accumulates == counter.get_total_flops() > 0


@small_networks
def test_multiply_accumulates_of_small_networks_are_half_of_torchs_flops(name):
    model = chain(SMALL[name][0], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 1, 41, 41))  # the lazy layer finds its size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, 41, 41))
    counted = Budget(model, image_size=41).multiply_accumulates
    assert 2 * counted == counter.get_total_flops() > 0


# torchinfo counts a convolution that is used twice twice
@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if "=" not in spec])
def test_the_total_is_that_of_torchinfo(name):
    model = build(name)
    with torch.random.fork_rng():
        counted = torchinfo.summary(model, input_size=(1, 1, 28, 28), verbose=0)
    assert Budget(model).parameters == counted.total_params


@every_model
def test_receptive_fields_are_what_gradients_reach(name):
    model = build(name)
    # a field larger than the image is all of it, and one as large may be cut off at its border
    fields = {layer.name: min(layer.receptive_field, 27) for layer in Budget(model).layers}
    assert fields == {k: min(side, 27) for k, side in sides_by_gradient(model, 28).items()}
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert min(fields.values()) == first.kernel_size[0]


@small_networks
def test_receptive_fields_of_small_networks_are_what_gradients_reach(name):
    model, by_hand = SMALL[name]
    budget = Budget(model, image_size=41)
    fields = {layer.name: layer.receptive_field for layer in budget.layers}
    assert fields == sides_by_gradient(model, 41)
    assert budget.receptive_field == by_hand


@pytest.mark.parametrize(
    "last",
    [chain(nn.Flatten(), nn.Linear(2 * 11 * 11, 5)), nn.AdaptiveAvgPool2d(1)],
    ids=["linear", "adaptive pool"],
)
def test_a_layer_that_sees_the_whole_map_sees_the_whole_image(last):
    model = chain(nn.Conv2d(1, 2, 3), last)
    assert max(sides_by_gradient(model, 13).values()) == 13
    assert Budget(model, image_size=13).receptive_field == 13


def test_the_reference_sees_42_pixels():
    fields = {layer.name: layer.receptive_field for layer in Budget(build("reference")).layers}
    seen = [fields[name] for name in ("conv1", "conv2", "conv3", "conv4", "conv5", "conv6")]
    assert seen == [3, 5, 7, 12, 16, 42]


block = st.tuples(st.integers(1, 6), st.sampled_from([1, 3, 5]), st.booleans(), st.booleans())


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(blocks=st.lists(block, min_size=1, max_size=5), channels=st.integers(1, 3))
def test_parameters_of_any_stack_of_convolutions_are_counted(blocks, channels):
    layers, expected, inputs = [], 0, channels
    for outputs, kernel, bias, norm in blocks:
        layers.append(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias))
        expected += inputs * outputs * kernel * kernel + outputs * bias + 2 * outputs * norm
        layers += [nn.BatchNorm2d(outputs)] * norm
        inputs = outputs
    budget = Budget(chain(*layers), image_size=6, channels=channels)
    assert budget.parameters == expected
    assert sum(layer.parameters for layer in budget.layers) == expected
    assert budget.layers[-1].shape == (inputs, 6, 6)


def test_a_layer_used_twice_computes_twice_and_has_its_parameters_once():
    twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    budget = Budget(chain(nn.Conv2d(1, 4, 1, bias=False), twice, nn.ReLU(), twice))
    assert budget.parameters == 4 + 144
    assert budget.multiply_accumulates == 28 * 28 * (4 + 2 * 4 * 4 * 9)
    assert sum(layer.parameters for layer in budget.layers) == budget.parameters


@every_model
@pytest.mark.parametrize("draw", [repr, Budget._repr_html_], ids=["text", "html"])
def test_the_table_is_the_same_every_time(name, draw):
    first = Budget(build(name))
    assert draw(first) == draw(first) == draw(Budget(build(name)))


def test_text_and_html_hold_the_same_cells():
    budget = Budget(build("reference"))
    cells = re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", budget._repr_html_())
    assert "".join(cells).replace(" ", "") == re.sub(r"\s", "", repr(budget))
    assert repr(budget).splitlines()[-1].split()[:2] == ["total", "13,912"]


def test_every_cell_of_the_html_table_has_its_own_padding():
    cells = re.findall(r"<t[hd][^>]*>", Budget(build("reference"))._repr_html_().split("\n", 1)[1])
    assert all("padding:" in cell for cell in cells if not cell.startswith(("<thead", "<tbody")))


def test_html_escapes_the_names_of_layers():
    model = nn.Sequential()
    model.add_module("<b>&", nn.Conv2d(1, 2, 3))
    assert ">&lt;b&gt;&amp;</td>" in Budget(model)._repr_html_()


def test_counting_leaves_network_and_random_state_as_they_were():
    model = build("reference").train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Budget(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("size", [-3, 0, 27, 1_000_000])
def test_an_image_size_that_the_network_cannot_take_is_refused_by_name(size):
    with pytest.raises(ConfigError, match=rf"image_size is {size}, .* choose another size"):
        Budget(build("reference"), image_size=size)
