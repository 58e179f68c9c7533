"""The networks: the reference tensor by tensor, its behaviour, and the other heads."""

import pytest
import torch
from torch import nn

from mnistlib import MODELS, build

TENSORS = [
    ("conv1.weight", (8, 1, 3, 3)),
    ("bn1.weight", (8,)),
    ("bn1.bias", (8,)),
    ("conv2.weight", (8, 8, 3, 3)),
    ("bn2.weight", (8,)),
    ("bn2.bias", (8,)),
    ("conv3.weight", (8, 8, 3, 3)),
    ("bn3.weight", (8,)),
    ("bn3.bias", (8,)),
    ("onecross.weight", (16, 8, 1, 1)),
    ("conv4.weight", (16, 16, 3, 3)),
    ("bn4.weight", (16,)),
    ("bn4.bias", (16,)),
    ("conv5.weight", (16, 16, 3, 3)),
    ("bn5.weight", (16,)),
    ("bn5.bias", (16,)),
    ("conv6.weight", (10, 16, 7, 7)),
]
BODY = 13_912 - 7_840
TOTALS = {
    "reference": 13_912,
    "reference-pooled": BODY + 160,
    "reference-shared": BODY + 49 + 160,
    "reference-depthwise": BODY + 784 + 160,
    "reference-separable": BODY + 1_120 + 700,
    "reference-plain": 13_912,
    "reference-unnormalised": 13_912 - (3 * 8 + 2 * 16),
    "reference-gelu": 13_912,
    "reference-silu": 13_912,
    "early": 25 * 24 + 24 * 16 + 4 * 9 * 16 * 16 + 2 * 24 + 4 * 2 * 16 + 7_840,
}
every_model = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)


def test_the_reference_has_the_tensors_of_its_document_in_their_order():
    model = build("reference")
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == TENSORS
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 13_912


def test_the_heads_have_the_totals_of_their_comments():
    found = {name: sum(p.numel() for p in build(name).parameters()) for name in MODELS}
    assert found == TOTALS


@every_model
def test_no_convolution_has_a_bias(name):
    convolutions = [m for m in build(name).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 7
    assert all(m.bias is None for m in convolutions)


@every_model
def test_every_image_gets_ten_logits(name, pixels):
    model = build(name).eval()
    assert model(pixels).shape == (6, 10)
    assert model(pixels[:1]).shape == (1, 10)


@every_model
def test_every_parameter_takes_part(name, pixels):
    model = build(name)
    model(pixels).square().sum().backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@every_model
def test_dropout_makes_training_outputs_vary(name, pixels):
    model = build(name, dropout=0.2).train()
    assert not torch.equal(model(pixels), model(pixels))


@pytest.mark.parametrize("alone", [0, 1])
def test_each_of_the_two_dropouts_makes_outputs_vary_alone(alone, pixels):
    model = build("reference", dropout=0.0).train()
    dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
    assert len(dropouts) == 2
    dropouts[alone].p = 0.5
    assert not torch.equal(model(pixels), model(pixels))


@every_model
def test_without_dropout_training_outputs_do_not_vary(name, pixels):
    model = build(name, dropout=0.0).train()
    assert torch.equal(model(pixels), model(pixels))


@every_model
def test_evaluation_outputs_do_not_vary(name, pixels):
    model = build(name, dropout=0.5).eval()
    assert torch.equal(model(pixels), model(pixels))


def test_an_image_is_judged_alone_in_evaluation(pixels):
    model = build("reference").double().eval()
    one_by_one = torch.cat([model(image.unsqueeze(0)) for image in pixels])
    torch.testing.assert_close(one_by_one, model(pixels))


def test_running_statistics_move_in_training_only(pixels):
    model = build("reference")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 5
    model.eval()(pixels)
    assert all(not m.running_mean.any() and m.num_batches_tracked == 0 for m in norms)
    model.train()(pixels)
    assert all(m.running_mean.any() and m.num_batches_tracked == 1 for m in norms)
    assert all(not torch.equal(m.running_var, torch.ones_like(m.running_var)) for m in norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_and_floats_from_0_to_1_give_the_same_logits(pixels, dtype):
    model = build("reference").to(dtype).eval()
    logits = model(pixels)
    assert logits.dtype == dtype
    torch.testing.assert_close(model(pixels.to(dtype) / 255), logits)


@every_model
def test_it_works_in_double_precision_and_agrees_with_single(name, pixels):
    model = build(name).eval()
    single = model(pixels)
    double = model.double()(pixels)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)


def test_weights_come_from_torchs_random_state():
    torch.manual_seed(5)
    first = build("reference").conv1.weight
    second = build("reference").conv1.weight
    torch.manual_seed(5)
    again = build("reference").conv1.weight
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_an_unknown_name_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no model 'resnet'") as refused:
        build("resnet")
    assert all(name in str(refused.value) for name in MODELS)


def test_a_line_is_the_network_it_says():
    model = build("c16k5s2 r1 p x24 r2 depthwise")
    found = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert found == [
        (16, 1, 5, 5), (16, 16, 3, 3), (24, 16, 1, 1), (24, 24, 3, 3), (24, 24, 3, 3),
        (24, 1, 7, 7), (10, 24, 1, 1),
    ]  # fmt: skip
    assert sum(p.ndim == 1 for p in model.parameters()) == 2 * 4  # of four BatchNorms


def test_pooling_before_the_batchnorm_is_pooling_after_the_relu(pixels):
    torch.manual_seed(0)
    before = build("c8k5s2p r1 full").eval()
    torch.manual_seed(0)
    after = build("c8k5s2 p r1 full").eval()
    torch.testing.assert_close(before(pixels), after(pixels))


def test_a_plain_network_differs_from_the_residual_one_by_its_shortcuts(pixels):
    with_shortcuts, plain = build("reference").eval(), build("reference-plain").eval()
    plain.load_state_dict(with_shortcuts.state_dict())
    assert not torch.allclose(plain(pixels), with_shortcuts(pixels), atol=1e-3)
    for model in (with_shortcuts, plain):
        for name in ("bn1", "bn4"):  # nothing to pass on: the shortcut of stage one is empty
            model.get_submodule(name).weight.data.zero_()
            model.get_submodule(name).bias.data.zero_()
        model.onecross.weight.data.zero_()
    torch.testing.assert_close(plain(pixels), with_shortcuts(pixels))
