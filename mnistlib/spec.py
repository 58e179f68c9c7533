"""Networks written as one-line specs, the named ones, and the normalisation of pixels."""

import copy
import re
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import ConfigError

# Mean and standard deviation of the 60,000 training images, pixels scaled to 0..1. The network
# normalises its input itself, so that a checkpoint predicts from raw pixels.
MEAN, STD = 0.1307, 0.3081
TOLERANCE = 1e-3  # resampled pixels may be this far outside 0..1
HEADS = ("full", "pooled", "linear", "shared", "depthwise", "separable")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU,
}  # fmt: skip

# Step between the values of rounded weights, by their number, in mean absolute weights: near that
# with the least squared error for normally distributed weights
STEPS = {3: 1.4, 5: 1.06, 7: 0.73, 15: 0.42}

MODELS = {
    "reference": "c8 r2 p d x16 r2 p d full",  # `ReferenceNet` is used instead, with the same bits
    "reference-pooled": "c8 r2 p d x16 r2 p d pooled",
    "reference-shared": "c8 r2 p d x16 r2 p d shared",
    "reference-depthwise": "c8 r2 p d x16 r2 p d depthwise",
    "reference-separable": "c8 r2 p d x16 r2 p d separable",
    "reference-plain": "c8 c8 c8 p d x16 c16 c16 p d full",  # without the residual shortcuts
    "reference-unnormalised": "bias c8 r2 p d x16 r2 p d full",
    "reference-gelu": "gelu c8 r2 p d x16 r2 p d full",
    # the reference's blocks on 7x7 maps: 18,216 parameters, under a third of the
    # multiply-accumulates, about a quarter of the activations
    "early": "c24k5s2p x16 r2 r2 full",
    # the networks of notebook 05, within so many parameters. The first three use two separable
    # convolutions in all of their blocks, on 14x14 and 7x7 maps; from 3,500 on there is room for
    # full convolutions on 28x28 maps, a layer of its own for each size, and a 7x7 window
    "net-697": "c9p rs2 = = p = = pooled",
    "net-1000": "c12p rs2 = = p = = pooled",
    "net-1936": "c18p rs2 = = p = = pooled",
    "net-3500": "c8 r1 p c12 r1 = p = shared",
    "net-6174": "c8 r2 p c14 r2 p = shared",
    "net-7918": "c8 r2 p c16 r2 p = shared",
    # smaller and faster ones: the digit set upright, and after the first layer one or two separable
    # convolutions, which are used again and again on maps that shrink from 14x14 to 4x4 or 2x2
    "net-682": "upright beta c14p rs1v = = = = linear",
    "net-920": "upright beta c13p rs2v = = linear",
    "net-1816": "upright beta c21p rs2v = = linear",
    "net-3466": "upright beta c32p rs2v = = linear",
    # `net-6174`, of whose weights 5,688 have five values and the others seven
    "rounded-6174": "w7 c8 w5 r2 p c14 r2 p = w7 shared",
    # deeper than wide, without a head of half its parameters
    "net-20k": "c16 r2 p r2 r1 p r2 r1 shared",
}


def normalise(pixels: Tensor, network: nn.Module) -> Tensor:
    """Scale pixels to zero mean and unit variance, in the dtype of a network's weights.

    In eager evaluation the range of the pixels is checked first, because pixels that are already
    normalised, or floats from 0 to 255, would be misclassified without an error. In training,
    export and compilation there is no check, as it would take time or fail.

    Args:
        pixels: uint8 in 0..255 or float in 0..1, of any shape.
        network: the network that takes them.

    Raises:
        ValueError: the network is in eval mode and pixels are outside 0..1.
    """
    scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
    unseen = network.training or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if scale == 1 and not (unseen or pixels.is_meta or pixels.numel() == 0):
        low, high = (float(v) for v in pixels.detach().aminmax())
        if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
            raise ValueError(
                f"the pixels go from {low:g} to {high:g}, but the network takes uint8 from 0 to "
                "255 or floats from 0 to 1; do not normalise them, the network does"
            )
    return (pixels.to(next(network.parameters()).dtype) - MEAN * scale) / (STD * scale)


class SpecNet(nn.Sequential):
    """A network from a one-line spec, for 28x28 grey images; input and output as `ReferenceNet`.

    A spec lists the layers from the image to the head, one word each:
    `c16k5s2` is a convolution to 16 channels with kernel 5 and stride 2, BatchNorm and ReLU; `k3`
    and `s1` may be left out; with a final `p` it pools 2x2 before the BatchNorm;
    `r2` is a residual block of two 3x3 convolutions; `p` is 2x2 max-pooling;
    `c16v` and `r1v` pad nothing, so maps shrink, and the input of the block is cropped to fit;
    `s16` and `rs2` are likewise with separable convolutions, a kernel for each channel and then a
    1x1 convolution;
    `=` is the layer of the last such word once more, with the same convolutions and a BatchNorm of
    its own; other words may lie between;
    `x16` is a 1x1 convolution to 16 channels without BatchNorm and ReLU;
    `upright` comes first, if at all: it moves, straightens and resizes each image by its moments;
    `d` is dropout; a spec without `d` has it before the head;
    `gelu` or `silu` replaces the ReLU, `bias` the BatchNorm, and `beta` the BatchNorm by one that
    shifts but does not scale, in all later words;
    `w3`, `w5`, `w7` or `w15` rounds the weights of later convolutions to so many values, `w0` none;
    the last word is one of `HEADS`.

    Args:
        spec: e.g. `c16k5s2 r1 p r2 r2 full`.
        dropout: probability of zeroing an activation.

    Raises:
        ConfigError: a word is unknown, there is no head, or maps get smaller than their kernels.
    """

    def __init__(self, spec: str, dropout: float = 0.05) -> None:
        *words, head = spec.split() or [""]
        layers: list[nn.Module] = []
        last: nn.Sequential | None = None  # what `=` repeats, if it keeps the shape
        c, size, levels = 1, 28, 0
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d
        activation: Callable[[], nn.Module] = nn.ReLU
        for word in words if "d" in words else [*words, "d"]:
            before = len(layers)
            if m := re.fullmatch(r"([cs])([1-9]\d{0,2})(?:k([357]))?(?:s([12]))?(v?)(p?)", word):
                out, kernel, stride = int(m[2]), int(m[3] or 3), int(m[4] or 1)
                # pooling before the BatchNorm leaves it less to normalise
                pool = [nn.MaxPool2d(2)] if m[6] else []
                pad = 0 if m[5] else kernel // 2
                conv = _convolution(c, out, kernel, stride, pad, separable=m[1] == "s")
                layers.append(layer := nn.Sequential(*conv, *pool, norm(out), activation()))
                last = layer if (c, stride, pool) == (out, 1, []) else None
                c = out
                size = ((size + 2 * pad - kernel) // stride + 1) // (2 if pool else 1)
            elif m := re.fullmatch(r"r(s?)([1-4])(v?)", word):
                block: list[nn.Module] = []
                pad = 0 if m[3] else 1
                for _ in range(int(m[2])):
                    conv = _convolution(c, c, pad=pad, separable=bool(m[1]))
                    block += [*conv, norm(c), activation()]
                layers.append(last := _Residual(*block))
                size -= 2 * (1 - pad) * int(m[2])
            elif word == "=" and last and last[0].in_channels == c:
                convs = [m for m in last.modules() if isinstance(m, nn.Conv2d)]
                layers.append(copy.deepcopy(last, {id(m): m for m in convs}))
                size -= sum(m.kernel_size[0] - 1 - 2 * int(m.padding[0]) for m in convs)
            elif m := re.fullmatch(r"x([1-9]\d{0,2})", word):
                layers.append(_Conv2d(c, c := int(m[1]), kernel_size=1, bias=False))
            elif word == "p":
                layers.append(nn.MaxPool2d(2))
                size //= 2
            elif word == "d":
                layers.append(nn.Dropout(dropout))
            elif word == "upright" and not layers:
                layers.append(Upright())
            elif word == "bias":
                norm = _Bias
            elif word == "beta":
                norm = _Beta
            elif word in ACTIVATIONS:
                activation = ACTIVATIONS[word]
            elif m := re.fullmatch(r"w(0|3|5|7|15)", word):
                levels = int(m[1])
            else:
                fault = "is no layer; layers are like c16k5s2, r2, p, x16, d"
                if word == "=":
                    fault = "repeats nothing: nothing before it keeps size and channels"
                raise ConfigError(f"model is {spec!r}, but {word!r} {fault}")
            _round_weights(layers[before:], levels)
        if head not in HEADS or size < 1:
            needed = f"it must end in a head ({', '.join(HEADS)}) on maps of 1x1 or more"
            raise ConfigError(f"model is {spec!r}, but {needed}; here: {head!r} on {size}x{size}")
        layers.append(make_head(head, c, size))
        _round_weights(layers[-1:], levels)
        super().__init__(*layers)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        return super().forward(normalise(pixels, self)).flatten(1)  # (N, 10, 1, 1) -> (N, 10)


class Upright(nn.Module):
    """Moves, straightens and half resizes each image by its moments; it has no parameters.

    Afterwards the centre of mass is in the middle, rows and columns are uncorrelated, and the
    standard deviations along both axes are geometric means of what they were and what they are in
    an average digit. Source: R. G. Casey, "Moment normalization of handprinted characters", IBM J.
    Res. Dev. 14 (1970) 548-557, with a shear in place of a rotation.
    """

    SPREAD = (5.3, 4.0)  # pixels: of rows and columns of an average digit
    LEAST = 0.25  # square pixels; a thin stroke has hardly any variance, an empty image none

    def forward(self, x: Tensor) -> Tensor:
        """Return images of the same shape and scale, `(N, C, 28, 28)`, each treated alone."""
        n, c, size, _ = x.shape
        ink = (x * STD + MEAN).reshape(n * c, size, size)
        at = torch.arange(size, device=x.device, dtype=x.dtype)
        rows, columns = ink.sum(2), ink.sum(1)  # (N, 28)
        total = rows.sum(1, keepdim=True).clamp(min=1e-3)

        def mean(values: Tensor) -> Tensor:
            return values.sum(1, keepdim=True) / total  # (N, 1)

        middle_y, middle_x = mean(rows * at), mean(columns * at)
        y, x0 = at - middle_y, at - middle_x
        spread_y = mean(rows * y**2).clamp(min=self.LEAST)
        mixed = mean((ink * y[:, :, None] * x0[:, None]).sum(2))
        slant = mixed / spread_y
        spread_x = (mean(columns * x0**2) - slant * mixed).clamp(min=self.LEAST)
        # where each pixel of the result comes from
        y = (at - size / 2) * (spread_y.sqrt() / self.SPREAD[0]).sqrt()
        x0 = (at - size / 2) * (spread_x.sqrt() / self.SPREAD[1]).sqrt()
        from_x = (middle_x + x0)[:, None] + (slant * y)[:, :, None]  # (N, 28, 28)
        from_y = (middle_y + y)[:, :, None].expand_as(from_x)
        grid = (2 * torch.stack((from_x, from_y), dim=-1) + 1) / size - 1
        found = F.grid_sample(ink[:, None], grid, align_corners=False)
        return ((found - MEAN) / STD).view(n, c, size, size)


class _Conv2d(nn.Conv2d):
    """A convolution, whose weights may be rounded to so many `levels`, such as -1, 0 and 1.

    The step between the levels is a multiple of the mean absolute weight of an output channel. The
    gradient passes as if nothing was rounded (Y. Bengio et al., arXiv 1308.3432).
    """

    levels = 0

    def rounded(self) -> tuple[Tensor, Tensor]:
        """Return the weights as whole numbers, and each output channel's step `(out, 1, 1, 1)`."""
        weight = self.weight.detach()
        step = STEPS[self.levels] * weight.abs().mean((1, 2, 3), keepdim=True)
        most = self.levels // 2
        return (weight / step).round().clamp(-most, most), step

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.levels:
            whole, step = self.rounded()
            weight = weight - weight.detach() + whole * step
        return super()._conv_forward(x, weight, bias)


def _round_weights(layers: list[nn.Module], levels: int) -> None:
    for layer in layers:
        for m in layer.modules():
            if isinstance(m, _Conv2d):
                m.levels = levels


class _Residual(nn.Sequential):
    """Convolutions that keep the shape; the input is added before the last activation."""

    def forward(self, x: Tensor) -> Tensor:
        *steps, activation = self
        y = x
        for step in steps:
            y = step(y)
        if crop := (x.shape[-1] - y.shape[-1]) // 2:  # convolutions without padding
            x = F.pad(x, [-crop] * 4)  # slices would lose channels_last in the backward pass
        return activation(y + x)


class _Beta(nn.BatchNorm2d):
    """BatchNorm that shifts but does not scale: the next layer's weights can do that."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_parameter("weight", None)


class _Bias(nn.Module):
    """A bias for each channel, in place of a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def _convolution(
    c: int, out: int, kernel: int = 3, stride: int = 1, pad: int = 1, *, separable: bool = False
) -> tuple[nn.Module, ...]:
    """Return the layers of a convolution; maps keep their size with a `pad` of half the kernel."""
    if not separable:
        return (_Conv2d(c, out, kernel, stride, pad, bias=False),)
    each = _Conv2d(c, c, kernel, stride, pad, groups=c, bias=False)
    return each, _Conv2d(c, out, kernel_size=1, bias=False)


def make_head(kind: str, c: int, size: int) -> nn.Module:
    """Return a head, one of `HEADS`, that turns maps `(N, c, size, size)` into `(N, 10, 1, 1)`."""
    classify = partial(_Conv2d, c, 10, kernel_size=1, bias=False)  # 160 parameters with c = 16
    if kind == "full":
        return _Conv2d(c, 10, kernel_size=size, bias=False)  # 10 * 16 * 7 * 7 = 7,840
    if kind == "pooled":
        return nn.Sequential(nn.AvgPool2d(size), classify())
    if kind == "linear":
        return nn.Sequential(nn.AvgPool2d(size), classify(bias=True))
    if kind == "shared":
        return nn.Sequential(_SharedWindow(size), classify())  # 49 + 160 = 209
    if kind == "depthwise":  # one 7x7 kernel for each channel: 784 + 160 = 944
        return nn.Sequential(_Conv2d(c, c, size, groups=c, bias=False), classify())
    columns = _Conv2d(c, 10, kernel_size=(size, 1), bias=False)  # -> (N, 10, 1, 7)
    rows = _Conv2d(10, 10, kernel_size=(1, size), bias=False)  # -> (N, 10, 1, 1)
    return nn.Sequential(columns, rows)  # 1,120 + 700 = 1,820


class _SharedWindow(_Conv2d):
    """One kernel that all channels share: `(N, C, size, size) -> (N, C, 1, 1)`."""

    def __init__(self, size: int) -> None:
        super().__init__(1, 1, kernel_size=size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        k = c // self.groups  # one group, but for stacked seeds
        x = x.reshape(n, self.groups, k, h, w).transpose(1, 2).reshape(n * k, self.groups, h, w)
        return super().forward(x).view(n, k, self.groups).transpose(1, 2).reshape(n, c, 1, 1)


@cache
def check_model(name: str) -> None:
    """Check the name or spec of a network without drawing random numbers.

    Raises:
        ConfigError: the name is unknown or the spec is wrong.
    """
    if name not in MODELS and " " not in name:
        remedy = f"choose one of {', '.join(MODELS)}, or write a spec like c8 r1 p r2 p full"
        raise ConfigError(f"model is {name!r}, but there is none of that name; {remedy}")
    with torch.device("meta"):
        SpecNet(MODELS.get(name, name))
