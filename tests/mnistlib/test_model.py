"""The reference network: tensor by tensor, and the pixels that it refuses."""

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


def test_the_reference_has_the_tensors_of_its_document_in_their_order():
    model = build("reference")
    assert isinstance(model, ReferenceNet)
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(found.items()) == list(TENSORS.items())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_912


def test_by_default_it_drops_one_activation_in_twenty():
    for model in (ReferenceNet(), build(), build("early")):
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.05}


@pytest.mark.parametrize("name", ["drop1", "drop2"])
def test_all_that_an_image_tells_passes_each_dropout(name, pixels):
    model = build("reference").eval()
    layer = model.get_submodule(name).train()
    assert not torch.equal(*model(pixels)[:2])
    layer.p = 1.0
    assert torch.equal(*model(pixels)[:2])


# Pixels


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 1, 28, 28), generator=generator, dtype=torch.uint8)


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


def test_pixels_that_are_not_raw_are_refused_in_evaluation(pixels):
    floats = pixels / 255
    wrong = {
        "normalised already": (floats - 0.1307) / 0.3081,
        "floats of 0 to 255": pixels.double(),
        "bytes as int64": pixels.long(),
        "one that is not a number": floats.masked_fill(floats == floats[1, 0, 3, 3], math.nan),
        "a little below 0": floats - 0.01,
        "a little above 1": floats + 0.01,
    }
    said = r"^the pixels go from \S+ to \S+, but .* uint8 from 0 to 255 .*0 to 1; do not normalise"
    for name in ("reference", "early"):
        for images in wrong.values():
            with pytest.raises(ValueError, match=said):
                build(name).eval()(images)


def test_pixels_that_resampling_moved_just_beyond_0_and_1_are_taken():
    pixels = torch.tensor([-0.0009, 1.0009]).repeat(392).view(1, 1, 28, 28)
    assert build().eval()(pixels).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_pixels_are_not_looked_at_in_training_or_where_looking_would_fail(pixels):
    """There are none, or the network is compiled, exported or traced, and looking would be too."""
    wrong, model = pixels.float(), build("reference")
    assert model.train()(wrong).shape == (3, 10)
    assert model.eval()(wrong[:0]).shape == (0, 10)
    assert build().to("meta").eval()(wrong.to("meta")).shape == (3, 10)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    traced = torch.jit.trace(model, wrong, check_trace=False)
    exported = torch.export.export(model, (wrong,)).module()
    for other in (compiled, traced, exported):
        torch.testing.assert_close(other(wrong / 255), model(wrong / 255))
        assert other(wrong).shape == (3, 10)
