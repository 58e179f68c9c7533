"""Networks written in one line: each named one to the last bit, and the language itself."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mnistlib import MODELS, build
from mnistlib.spec import HEADS, SpecNet, check_model

BODY = 13_912 - 7_840
SMALL = {697: 9, 1000: 12, 1936: 18}  # channels
TOTALS = {
    "reference": 13_912,
    "reference-pooled": BODY + 160,
    "reference-shared": BODY + 49 + 160,
    "reference-depthwise": BODY + 784 + 160,
    "reference-separable": BODY + 1_120 + 700,
    "reference-plain": 13_912,
    "reference-unnormalised": 13_912 - (3 * 8 + 2 * 16),
    "reference-gelu": 13_912,
    "early": 25 * 24 + 24 * 16 + 4 * 9 * 16 * 16 + 2 * 24 + 4 * 2 * 16 + 7_840,
    # first layer, two separable convolutions, eleven BatchNorms, pooled head
    **{f"net-{n}": 9 * c + 2 * (9 * c + c * c) + 11 * 2 * c + 10 * c for n, c in SMALL.items()},
    "net-3500": 9 * 8 + 9 * 64 + 9 * 8 * 12 + 9 * 144 + 2 * (2 * 8 + 4 * 12) + 49 + 120,
    "net-6174": 9 * 8 + 18 * 64 + 9 * 8 * 14 + 18 * 196 + 2 * (3 * 8 + 5 * 14) + 49 + 140,
    "net-7918": 9 * 8 + 18 * 64 + 9 * 8 * 16 + 18 * 256 + 2 * (3 * 8 + 5 * 16) + 49 + 160,
    "net-20k": 9 * 16 + 8 * 9 * 256 + 9 * 2 * 16 + 49 + 160,
}
every_model = pytest.mark.parametrize("name", list(MODELS))


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)


# What each name stands for, written out without the language


class Shared(nn.Module):
    """One window for all channels: each is an image of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.window = nn.Conv2d(1, 1, 7, bias=False)

    def forward(self, x):
        alone = x.flatten(0, 1).unsqueeze(1)  # (N, 16, 7, 7) -> (16 N, 1, 7, 7)
        return self.window(alone).view(*x.shape[:2], 1, 1)


class Bias(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return x + self.bias


def conv(c: int, out: int, kernel=3, **how) -> nn.Conv2d:
    return nn.Conv2d(c, out, kernel, bias=False, **how)


def full() -> nn.Module:
    return conv(16, 10, 7)


def pooled() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(7), conv(16, 10, 1))


def shared() -> nn.Module:
    return nn.Sequential(Shared(), conv(16, 10, 1))


def depthwise() -> nn.Module:
    return nn.Sequential(conv(16, 16, 7, groups=16), conv(16, 10, 1))


def separable() -> nn.Module:
    return nn.Sequential(conv(16, 10, (7, 1)), conv(10, 10, (1, 7)))


class Reference(nn.Module):
    """The reference of its document, in which some parts can be replaced."""

    def __init__(self, dropout, head=full, norm=nn.BatchNorm2d, f=F.relu, residual=True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(1, 8, padding=1), norm(8)
        self.conv2, self.bn2 = conv(8, 8, padding=1), norm(8)
        self.conv3, self.bn3 = conv(8, 8, padding=1), norm(8)
        self.onecross = conv(8, 16, 1)
        self.conv4, self.bn4 = conv(16, 16, padding=1), norm(16)
        self.conv5, self.bn5 = conv(16, 16, padding=1), norm(16)
        self.head = head()
        self.dropout, self.f, self.residual = dropout, f, residual

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def forward(self, pixels):
        f = self.f
        x = (pixels.float() - 0.1307 * 255) / (0.3081 * 255)
        x = f(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(f(self.bn2(self.conv2(x)))))
        x = self.drop(F.max_pool2d(f(y + x if self.residual else y), 2))
        x = self.onecross(x)
        y = self.bn5(self.conv5(f(self.bn4(self.conv4(x)))))
        x = self.drop(F.max_pool2d(f(y + x if self.residual else y), 2))
        return self.head(x).flatten(1)


WRITTEN = {
    "reference": Reference,
    "reference-pooled": partial(Reference, head=pooled),
    "reference-shared": partial(Reference, head=shared),
    "reference-depthwise": partial(Reference, head=depthwise),
    "reference-separable": partial(Reference, head=separable),
    "reference-plain": partial(Reference, residual=False),
    "reference-unnormalised": partial(Reference, norm=Bias),
    "reference-gelu": partial(Reference, f=F.gelu),
}


def bits(make, training: bool, pixels) -> dict[str, list[torch.Tensor]]:
    """Return initial weights, logits, gradients and running statistics of a network."""
    torch.manual_seed(7)
    model = make()
    initial = [v.clone().flatten() for v in model.state_dict().values()]
    model.train()(pixels)  # so that the running statistics are no longer 0 and 1
    model.train(training)
    torch.manual_seed(8)  # of dropout
    logits = model(pixels)
    logits.square().sum().backward()
    return {
        "initial weights": initial,
        "logits": [logits.detach()],
        "gradients": [p.grad.flatten() for p in model.parameters()],
        "afterwards": [v.flatten() for v in model.state_dict().values()],
    }


def assert_equal_bits(one, other, training, pixels) -> None:
    found, wanted = bits(one, training, pixels), bits(other, training, pixels)
    for what, tensors in wanted.items():
        assert len(found[what]) == len(tensors), what
        for i, (a, b) in enumerate(zip(found[what], tensors, strict=True)):
            assert torch.equal(a, b), f"{what}, number {i}"


@pytest.mark.parametrize("name", list(WRITTEN))
def test_named_networks_are_the_ones_written_out_bit_for_bit(name, pixels):
    for dropout, training in ((0.0, True), (0.3, True), (0.3, False)):
        built, written = partial(build, name, dropout), partial(WRITTEN[name], dropout)
        assert_equal_bits(built, written, training, pixels)
        if name == "reference":  # which is built from a class of its own
            assert_equal_bits(built, partial(SpecNet, MODELS[name], dropout), training, pixels)


# Behaviour of all of them


def test_the_named_networks_have_these_totals():
    found = {name: sum(p.numel() for p in build(name).parameters()) for name in MODELS}
    assert found == TOTALS


@every_model
def test_every_named_network_gives_ten_logits_and_uses_all_its_parameters(name, pixels):
    model = build(name, dropout=0.2)
    logits = model(pixels)
    assert not torch.equal(model(pixels), logits)  # dropout, in training only
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    single = model.eval()(pixels)
    assert single.shape == (6, 10)
    assert torch.equal(model(pixels), single)
    double = model.double()(pixels)
    torch.testing.assert_close(double.float(), single, rtol=1e-4, atol=1e-5)
    assert all(m.bias is None for m in model.modules() if isinstance(m, nn.Conv2d))


# The language


def test_a_spec_is_the_network_it_says():
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


def dropouts_of(spec: str) -> list[int]:
    """Return where among its words a network drops activations."""
    return [i for i, m in enumerate(SpecNet(spec)) if isinstance(m, nn.Dropout)]


def test_dropout_stands_where_it_is_written_and_else_before_the_head():
    assert dropouts_of("c8 p r1 p full") == [4]
    assert dropouts_of("c8 d p p full") == [1]
    assert dropouts_of("d c8p d c8p x4 full") == [0, 2]
    assert all(m.p == 0.25 for m in SpecNet("d c8p c8p d full", 0.25) if isinstance(m, nn.Dropout))


def lowest(layer: nn.Module, channels: int) -> float:
    """Return the lowest output of a layer, by which ReLU, GELU and SiLU can be told apart."""
    x = torch.randn(50, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return float(layer.train()(x).detach().min())


def test_activation_and_norm_are_those_of_what_follows():
    model = SpecNet("c4p gelu c4 bias r2 silu c4p full")
    first, second, block, last = (m for m in model if not isinstance(m, nn.Dropout | nn.Conv2d))
    assert lowest(first, 1) == 0
    assert lowest(second, 4) == pytest.approx(-0.17, abs=0.01)
    assert lowest(block, 4) == pytest.approx(-0.17, abs=0.01)
    assert lowest(last, 4) < -0.2
    normalised = [any(isinstance(m, nn.BatchNorm2d) for m in x.modules()) for x in model]
    assert normalised == [True, True, False, False, False, False]


words = st.one_of(
    st.sampled_from(["p", "p", "d", "gelu", "silu", "bias", "x3", "x12", "r1", "r4", "rs2"]),
    st.builds(
        "{}{}{}{}{}".format,
        st.sampled_from("cs"),
        st.sampled_from([1, 5, 12]),
        st.sampled_from(["", "k3", "k5", "k7"]),
        st.sampled_from(["", "", "s1", "s2"]),
        st.sampled_from(["", "", "p"]),
    ),
)
NO_WORDS = ["q", "c0", "c8k4", "c8s3", "r0", "r5", "x0", "x1000", "c1000", "P", "full", "c8pp"]
NO_WORDS += ["s0", "s8k4", "rs0", "rs", "cs8"]


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.lists(words, max_size=7), st.sampled_from(HEADS))
def test_words_that_leave_a_map_are_a_network_and_others_are_refused(words, head):
    spec, size = " ".join([*words, head]), 28
    for word in words:
        size = (size + 1) // 2 if "s2" in word and word[0] != "r" else size
        size = size // 2 if word[-1] == "p" else size
    if size:
        assert SpecNet(spec).eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
    else:
        with pytest.raises(ValueError, match="on maps of 1x1 or more"):
            SpecNet(spec)


def test_a_word_that_is_none_is_refused_by_name_wherever_it_stands():
    for word in NO_WORDS:
        for spec in (f"{word} c8p p full", f"c8p {word} p full", f"c8p p {word} full"):
            with pytest.raises(
                ValueError, match=f"but '{word}' is no layer; layers are like c16k5"
            ):
                SpecNet(spec)


REFUSED = {
    "": "must end in a head", "c8p p": "must end in a head", "c8p p Full": "must end in a head",
    "c8p p full r2": "'full' is no layer", "p p p p p full": "here: 'full' on 0x0$",
    "= pooled": "'=' repeats nothing", "c8 = pooled": "'=' repeats nothing",
    "c8p r1 x16 = pooled": "'=' repeats nothing", "c8 d = full": "'=' repeats nothing",
}  # fmt: skip


@pytest.mark.parametrize("spec", list(REFUSED))
def test_a_spec_that_is_no_network_is_refused_with_its_fault(spec):
    with pytest.raises(ValueError, match=f"^model is '{spec}', but .*{REFUSED[spec]}"):
        SpecNet(spec)


def test_a_separable_convolution_has_a_kernel_for_each_channel_and_a_1x1_convolution():
    conv, pointwise, norm, _ = SpecNet("x6 s10k5s2 pooled")[1]
    assert (conv.groups, tuple(conv.weight.shape)) == (6, (6, 1, 5, 5))
    assert tuple(pointwise.weight.shape) == (10, 6, 1, 1)
    assert norm.num_features == 10
    assert sum(p.numel() for p in SpecNet("x6 rs1 pooled")[1].parameters()) == 6 * 9 + 6 * 6 + 12


@pytest.mark.parametrize("word", ["s8", "r2"])
def test_a_repeated_layer_has_the_same_convolutions_and_a_batchnorm_of_its_own(word, pixels):
    network = build(f"c8p {word} = p = pooled", dropout=0.0)
    once = build(f"c8p {word} p pooled", dropout=0.0)
    norms = sum(p.numel() for n, p in network[1].named_parameters() if p.ndim == 1)
    count = [sum(p.numel() for p in m.parameters()) for m in (network, once)]
    assert count[0] == count[1] + 2 * norms
    first, again = network[1], network[2]
    assert [a is b for a, b in zip(first.modules(), again.modules(), strict=True)] == [
        isinstance(m, nn.Conv2d) for m in first.modules()
    ]
    network(pixels).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_checking_a_name_draws_nothing_and_refuses_what_build_refuses():
    random_state = torch.get_rng_state()
    check_model("c16k5s2 r1 p r2 r2 full")
    for name, said in {"c16k5s2 q p full": "'q' is no layer", "resnet": ", ".join(MODELS)}.items():
        for refuses in (check_model, build):
            with pytest.raises(ValueError, match=f"^model is '{name}', but .*{said}"):
                refuses(name)
    assert torch.equal(torch.get_rng_state(), random_state)
