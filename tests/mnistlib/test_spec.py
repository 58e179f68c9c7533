"""Networks written in one line: the named ones, and the language itself."""

import itertools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnistlib import MODELS, build, load_mnist
from mnistlib.spec import HEADS, SpecNet, Upright, check_model, make_head

BODY = 13_912 - 7_840
SMALL = {697: 9, 1000: 12, 1936: 18}  # channels
SHRINKING = {920: 13, 1816: 21, 3466: 32}
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
    # first layer, one or two separable convolutions, BatchNorms without a factor, linear head
    "net-682": 9 * 14 + (9 * 14 + 14 * 14) + 6 * 14 + 14 * 10 + 10,
    **{f"net-{n}": 9 * c + 2 * (9 * c + c * c) + 7 * c + 10 * c + 10 for n, c in SHRINKING.items()},
    "rounded-6174": 6_137,
    "net-20k": 9 * 16 + 8 * 9 * 256 + 9 * 2 * 16 + 49 + 160,
}


@pytest.fixture(scope="module")
def pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 1, 28, 28), generator=generator, dtype=torch.uint8)


# The named networks


def bits(make, training: bool, pixels) -> list[torch.Tensor]:
    """Return initial weights, logits, gradients and running statistics of a network."""
    torch.manual_seed(7)
    model = make()
    initial = [v.clone() for v in model.state_dict().values()]
    model.train()(pixels)  # so that the running statistics are no longer 0 and 1
    model.train(training)
    torch.manual_seed(8)  # of dropout
    logits = model(pixels)
    logits.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return [*initial, logits.detach(), *gradients, *model.state_dict().values()]


def test_the_reference_and_its_one_line_spec_have_the_same_bits(pixels):
    for dropout, training in ((0.0, True), (0.3, True), (0.3, False)):
        built = bits(partial(build, "reference", dropout), training, pixels)
        spelt = bits(partial(SpecNet, MODELS["reference"], dropout), training, pixels)
        assert all(torch.equal(a, b) for a, b in zip(built, spelt, strict=True))


def test_the_named_networks_have_these_totals():
    found = {name: sum(p.numel() for p in build(name).parameters()) for name in MODELS}
    assert found == TOTALS


@pytest.mark.parametrize("name", list(MODELS))
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
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    biased = [m for m in convs if m.bias is not None]
    assert biased == (convs[-1:] if "beta" in MODELS[name] else [])


# The language


def test_a_spec_is_the_network_it_says():
    model = build("c16k5s2 r1 p x24 r2 s10k5 rs1 depthwise")
    found = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    assert found == [
        (16, 1, 5, 5), (16, 16, 3, 3), (24, 16, 1, 1), (24, 24, 3, 3), (24, 24, 3, 3),
        (24, 1, 5, 5), (10, 24, 1, 1), (10, 1, 3, 3), (10, 10, 1, 1),
        (10, 1, 7, 7), (10, 10, 1, 1),
    ]  # fmt: skip
    assert sum(p.ndim == 1 for p in model.parameters()) == 2 * 6  # of six BatchNorms


def test_the_shared_head_looks_through_one_window_and_the_pooled_one_takes_the_mean():
    maps = torch.rand(3, 16, 7, 7, generator=torch.Generator().manual_seed(0))
    shared, pooled = make_head("shared", 16, 7), make_head("pooled", 16, 7)
    for head, window in ((shared, shared[0].weight[0, 0]), (pooled, torch.full((7, 7), 1 / 49))):
        wanted = torch.einsum("nchw,hw,oc->no", maps, window, head[1].weight.flatten(1))
        torch.testing.assert_close(head(maps).flatten(1), wanted)


def test_pooling_before_the_batchnorm_is_pooling_after_the_relu(pixels):
    torch.manual_seed(0)
    before = build("c8k5s2p r1 full").eval()
    torch.manual_seed(0)
    after = build("c8k5s2 p r1 full").eval()
    torch.testing.assert_close(before(pixels), after(pixels))


def test_dropout_stands_where_it_is_written_and_else_before_the_head():
    places = {"c8 p r1 p full": [4], "c8 d p p full": [1], "d c8p d c8p x4 full": [0, 2]}
    for spec, wanted in places.items():
        dropouts = {i: m.p for i, m in enumerate(SpecNet(spec, 0.25)) if isinstance(m, nn.Dropout)}
        assert dropouts == dict.fromkeys(wanted, 0.25)


def test_beta_is_a_batchnorm_that_shifts_but_does_not_scale():
    norm = SpecNet("beta c4p full")[0][2].train()
    nn.init.constant_(norm.bias, 3.0)
    x = torch.randn(9, 4, 5, 5)
    assert [name for name, _ in norm.named_parameters()] == ["bias"]
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(4, affine=False)(x) + 3)


def lowest(layer: nn.Module, channels: int) -> float:
    """Return the lowest output of a layer, by which ReLU, GELU and SiLU can be told apart."""
    x = torch.randn(50, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return float(layer.train()(x).detach().min())


def test_activation_and_norm_are_those_of_what_follows():
    torch.manual_seed(0)
    model = SpecNet("c4p gelu c4 bias r2 silu c4p full")
    first, second, block, last = (m for m in model if not isinstance(m, nn.Dropout | nn.Conv2d))
    assert lowest(first, 1) == 0
    assert lowest(second, 4) == pytest.approx(-0.17, abs=0.01)
    assert lowest(block, 4) == pytest.approx(-0.17, abs=0.01)
    assert lowest(last, 4) < -0.2
    normalised = [any(isinstance(m, nn.BatchNorm2d) for m in x.modules()) for x in model]
    assert normalised == [True, True, False, False, False, False]
    nn.init.ones_(model[2][1].bias)
    assert torch.equal(model[2][1](torch.zeros(1, 4, 2, 2)), torch.ones(1, 4, 2, 2))


def test_words_that_leave_a_map_are_a_network_and_others_are_refused():
    """All ways down by up to three words, whose strides and poolings halve maps of odd sizes."""
    halved = {"c5s2": (1, 0), "s5k5s2p": (1, 1), "c3k7p": (0, 1), "p": (0, 1)}
    for words in itertools.chain(*(itertools.product(halved, repeat=n) for n in range(4))):
        size = 28
        for strides, pools in (halved[word] for word in words):
            size = (size + 1) // 2 if strides else size
            size = size // 2 if pools else size
        for head in HEADS:
            spec = " ".join([*words, head])
            if size:
                assert SpecNet(spec).eval()(torch.zeros(1, 1, 28, 28)).shape == (1, 10)
            else:
                with pytest.raises(ValueError, match="on maps of 1x1 or more"):
                    SpecNet(spec)


class Smallest(nn.Module):
    """`net-682` by hand."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 14, 3, padding=1, bias=False)
        self.each = nn.Conv2d(14, 14, 3, groups=14, bias=False)
        self.mix = nn.Conv2d(14, 14, 1, bias=False)
        self.shifts = nn.Parameter(torch.zeros(6, 14))
        self.head = nn.Linear(14, 10)

    def forward(self, x):
        def norm(x, k):
            return F.batch_norm(x, None, None, None, self.shifts[k], training=True)

        x = Upright()((x - 0.1307) / 0.3081)
        x = F.relu(norm(F.max_pool2d(self.first(x), 2), 0))
        for k in range(1, 6):
            x = F.relu(norm(self.mix(self.each(x)), k) + x[..., 1:-1, 1:-1])
        assert x.shape[2:] == (4, 4)
        return self.head(x.mean((2, 3)))


def test_a_convolution_used_five_times_without_padding_is_the_one_written_by_hand(pixels):
    own, model = Smallest(), build("net-682", dropout=0.0).train()
    _, first, block, *others, _, head = model
    own.first, (own.each, own.mix), own.head.bias = first[0], block[:2], head[1].bias
    own.head.weight.data = head[1].weight.data.flatten(1)
    for k, layer in enumerate([first, block, *others]):
        nn.init.normal_(layer[2].bias)
        own.shifts.data[k] = layer[2].bias.data
    torch.testing.assert_close(own(pixels / 255), model(pixels))


def moments(images):
    """Return middle, standard deviations and correlation of the ink of images `(N, 28, 28)`."""
    at = torch.arange(28.0)
    total = images.sum((1, 2))
    rows, columns = images.sum(2) / total[:, None], images.sum(1) / total[:, None]
    y, x = rows @ at, columns @ at
    spread_y, spread_x = (
        (p * (at - m[:, None]) ** 2).sum(1).sqrt() for p, m in ((rows, y), (columns, x))
    )
    mixed = torch.einsum("nyx,ny,nx->n", images, at - y[:, None], at - x[:, None]) / total
    return y, x, spread_y, spread_x, mixed / spread_y / spread_x


def test_upright_centres_straightens_and_half_resizes_each_digit():
    digits = load_mnist("sample").train_images[:300] / 255
    with torch.no_grad():
        found = Upright()((digits - 0.1307) / 0.3081) * 0.3081 + 0.1307
    y, x, spread_y, spread_x, slant = moments(found[:, 0])
    _, _, own_y, own_x, own_slant = moments(digits[:, 0])
    for middle in (x, y):  # a thin stroke is sampled between its pixels, a flat one loses its ends
        assert (middle - 14).abs().quantile(0.95) < 0.1
    assert slant.abs().median() < 0.02 < own_slant.abs().median() / 5
    straight = own_x * (1 - own_slant**2).sqrt()
    for now, wanted in ((spread_y, own_y * 5.3), (spread_x, straight * 4.0)):
        assert (now / wanted.sqrt() - 1).abs().median() < 0.03


def test_upright_treats_images_alone_and_leaves_an_empty_one_empty():
    digits = (load_mnist("sample").train_images[:12] / 255 - 0.1307) / 0.3081
    upright, empty = Upright(), torch.full((1, 1, 28, 28), -0.1307 / 0.3081)
    alone = upright(digits)
    torch.testing.assert_close(upright(digits.view(4, 3, 28, 28)).view(12, 1, 28, 28), alone)
    torch.testing.assert_close(upright(torch.cat([digits, empty]))[:12], alone)
    torch.testing.assert_close(upright(empty), empty)
    shifted = upright(digits.roll((1, -2), (2, 3)))
    assert (shifted - alone)[..., 3:-3, 3:-3].abs().max() < 1e-3


def test_without_padding_maps_shrink_and_a_layer_can_be_used_until_nothing_is_left():
    for spec, side in {"c4k5v r2v": 20, "c4p s4v = =": 8, "c4s2v r1v = p": 4}.items():
        assert SpecNet(f"{spec} full")[-1].weight.shape[-2:] == (side, side)
    with pytest.raises(ValueError, match="on maps of 1x1 or more; here: 'pooled' on 0x0"):
        SpecNet("c4p r1v = = = = = = pooled")


@pytest.mark.parametrize(("levels", "spread"), [(3, 1.4), (5, 1.06), (7, 0.73), (15, 0.42)])
def test_rounded_weights_have_so_many_values_and_pass_the_gradient_on(levels, spread, pixels):
    model = SpecNet(f"c8 w{levels} c8 = w0 c4p full")
    exact, rounded = model[0][0], model[1][0]
    nn.init.normal_(rounded.weight)
    step = spread * rounded.weight.detach().abs().mean((1, 2, 3), keepdim=True)
    wanted = (rounded.weight / step).round().clamp(-(levels // 2), levels // 2)
    used = wanted * step
    assert len(wanted.unique()) == levels
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.levels for conv in convs] == [0, levels, 0, 0]
    x = torch.rand(2, 8, 6, 6)
    torch.testing.assert_close(rounded(x), F.conv2d(x, used, padding=1), rtol=0, atol=0)
    rounded(x).square().sum().backward()
    given = nn.Parameter(used.detach())
    F.conv2d(x, given, padding=1).square().sum().backward()
    torch.testing.assert_close(rounded.weight.grad, given.grad)
    assert torch.equal(exact(pixels.float()), F.conv2d(pixels.float(), exact.weight, padding=1))


REFUSED = {
    "": "must end in a head", "c8p p": "must end in a head", "c8p p Full": "must end in a head",
    "c8p p full r2": "'full' is no layer", "p p p p p full": "here: 'full' on 0x0$",
    "= pooled": "'=' repeats nothing", "c8 = pooled": "'=' repeats nothing",
    "c8p r1 x16 = pooled": "'=' repeats nothing", "c8 d = full": "'=' repeats nothing",
    "c8p upright full": "'upright' is no layer",
}  # fmt: skip
NO_WORDS = [
    "q",
    "c0",
    "c8k4",
    "c8s3",
    "r0",
    "r5",
    "x0",
    "x1000",
    "c1000",
    "P",
    "c8pp",
    "s8k4",
    "w4",
    "c8pv",
]


def test_a_spec_that_is_no_network_is_refused_with_its_fault():
    no_words = {f"c8p {w} p full": f"'{w}' is no layer; layers are like c16k5" for w in NO_WORDS}
    for spec, fault in (REFUSED | no_words).items():
        with pytest.raises(ValueError, match=f"^model is '{spec}', but .*{fault}"):
            SpecNet(spec)


@pytest.mark.parametrize("word", ["s8", "r2"])
def test_a_repeated_layer_has_the_same_convolutions_and_a_batchnorm_of_its_own(word):
    network = SpecNet(f"c8p {word} = p = pooled")
    first, again, _, third, *_ = list(network)[1:]
    for other in (again, third):
        same = [a is b for a, b in zip(first.modules(), other.modules(), strict=True)]
        assert same == [isinstance(m, nn.Conv2d) for m in first.modules()]


def test_checking_a_name_draws_nothing_and_refuses_what_build_refuses():
    random_state = torch.get_rng_state()
    check_model("c16k5s2 r1 p r2 r2 full")
    for name, said in {"c16k5s2 q p full": "'q' is no layer", "resnet": ", ".join(MODELS)}.items():
        for refuses in (check_model, build):
            with pytest.raises(ValueError, match=f"^model is '{name}', but .*{said}"):
                refuses(name)
    assert torch.equal(torch.get_rng_state(), random_state)
