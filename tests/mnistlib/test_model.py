"""The reference network: tensor by tensor, its behaviour, and the pixels that it refuses."""

import math

import pytest
import torch
from torch import nn

from mnistlib import ReferenceNet, build
from mnistlib.spec import normalise

TENSORS = {
    "conv1.weight": (8, 1, 3, 3), "bn1.weight": (8,), "bn1.bias": (8,),
    "conv2.weight": (8, 8, 3, 3), "bn2.weight": (8,), "bn2.bias": (8,),
    "conv3.weight": (8, 8, 3, 3), "bn3.weight": (8,), "bn3.bias": (8,),
    "onecross.weight": (16, 8, 1, 1),
    "conv4.weight": (16, 16, 3, 3), "bn4.weight": (16,), "bn4.bias": (16,),
    "conv5.weight": (16, 16, 3, 3), "bn5.weight": (16,), "bn5.bias": (16,),
    "conv6.weight": (10, 16, 7, 7),
}  # fmt: skip


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)


def test_the_reference_has_the_tensors_of_its_document_in_their_order():
    model = build("reference")
    assert isinstance(model, ReferenceNet)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(found.items()) == list(TENSORS.items())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_912


def test_by_default_it_drops_one_activation_in_twenty():
    for model in (ReferenceNet(), build(), build("early")):
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.05}


@pytest.mark.parametrize("alone", [0, 1])
def test_each_of_the_two_dropouts_makes_outputs_vary_alone(alone, pixels):
    model = build("reference", dropout=0.0).train()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 2
    dropouts[alone].p = 0.5
    assert not torch.equal(model(pixels), model(pixels))


def test_running_statistics_move_in_training_only(pixels):
    model = build("reference")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5
    model.eval()(pixels)
    assert all(not m.running_mean.any() and m.num_batches_tracked == 0 for m in norms)
    model.train()(pixels)
    assert all(m.running_mean.any() and m.num_batches_tracked == 1 for m in norms)
    assert all(not torch.equal(m.running_var, torch.ones_like(m.running_var)) for m in norms)


def test_weights_come_from_torchs_random_state():
    torch.manual_seed(5)
    first = build("reference").conv1.weight
    second = build("reference").conv1.weight
    torch.manual_seed(5)
    again = build("reference").conv1.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


# Pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_and_floats_from_0_to_1_give_the_same_logits(pixels, dtype):
    model = build("reference").to(dtype).eval()
    logits = model(pixels)
    assert logits.dtype == dtype
    torch.testing.assert_close(model(pixels.to(dtype) / 255), logits)


def test_pixels_get_mean_0_and_deviation_1_where_they_are_those_of_mnist():
    network = nn.Linear(1, 1, dtype=torch.float64).eval()
    found = normalise(torch.tensor([0.0, 0.1307, 0.1307 + 0.3081, 1.0]), network)
    expected = torch.tensor([-0.1307 / 0.3081, 0.0, 1.0, (1 - 0.1307) / 0.3081]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def wrong_pixels() -> dict[str, torch.Tensor]:
    """Return digits that a network would misclassify without a word."""
    raw = torch.randint(0, 256, (3, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    floats = raw / 255
    spoilt = floats.clone()
    spoilt[1, 0, 3, 3] = math.nan
    return {
        "normalised already": (floats - 0.1307) / 0.3081,
        "from -1 to 1": floats * 2 - 1,
        "floats of 0 to 255": raw.float(),
        "doubles of 0 to 255": raw.double(),
        "bytes as int64": raw,
        "one that is not a number": spoilt,
        "an infinite one": floats.masked_fill(floats == 1, math.inf),
        "a little below 0": floats - 0.01,
        "a little above 1": floats + 0.01,
    }


@pytest.mark.parametrize("kind", list(wrong_pixels()))
def test_pixels_that_are_not_raw_are_refused_in_evaluation(kind):
    said = r"^the pixels go from \S+ to \S+, but .* uint8 from 0 to 255 .*0 to 1; do not normalise"
    for name in ("reference", "early"):
        with pytest.raises(ValueError, match=said):
            build(name).eval()(wrong_pixels()[kind])


@pytest.mark.parametrize("past", [0.0, 0.0009])
def test_pixels_that_resampling_moved_just_beyond_0_and_1_are_taken(past):
    pixels = torch.tensor([-past, 1 + past]).repeat(392).view(1, 1, 28, 28)
    assert build().eval()(pixels).shape == (1, 10)


def test_pixels_are_not_looked_at_in_training_or_where_there_are_none():
    assert build().eval()(torch.empty(0, 1, 28, 28)).shape == (0, 10)
    assert build().train()(wrong_pixels()["floats of 0 to 255"]).shape == (3, 10)
    shapes = build().to("meta").eval()(torch.empty(5, 1, 28, 28, device="meta"))
    assert shapes.shape == (5, 10)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_pixels_are_not_looked_at_where_a_network_is_compiled_exported_or_traced():
    """Looking would fail there, or end up in the exported network."""
    pixels, model = wrong_pixels()["floats of 0 to 255"], build("reference").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    traced = torch.jit.trace(model, pixels, check_trace=False)
    exported = torch.export.export(model, (pixels,)).module()
    for other in (compiled, traced, exported):
        torch.testing.assert_close(other(pixels / 255), model(pixels / 255))
        assert other(pixels).shape == (3, 10)
