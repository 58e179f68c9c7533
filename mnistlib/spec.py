"""Networks written as one-line specs, the named ones, and the normalisation of pixels."""

import copy
import re
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from .errors import ConfigError

# Mean and standard deviation of the 60,000 training images, pixels scaled to 0..1. The network
# normalises its input itself, so that a checkpoint predicts from raw pixels.
MEAN, STD = 0.1307, 0.3081
TOLERANCE = 1e-3  # resampled pixels may be this far outside 0..1
HEADS = ("full", "pooled", "shared", "depthwise", "separable")
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}

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
    # the networks of notebook 07, within so many parameters. The first three use two separable
    # convolutions in all of their blocks, on 14x14 and 7x7 maps; from 3,500 on there is room for
    # full convolutions on 28x28 maps, a layer of its own for each size, and a 7x7 window
    "net-697": "c9p rs2 = = p = = pooled",
    "net-1000": "c12p rs2 = = p = = pooled",
    "net-1936": "c18p rs2 = = p = = pooled",
    "net-3500": "c8 r1 p c12 r1 = p = shared",
    "net-6174": "c8 r2 p c14 r2 p = shared",
    "net-7918": "c8 r2 p c16 r2 p = shared",
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
    `s16` and `rs2` are likewise with separable convolutions, a kernel for each channel and then a
    1x1 convolution;
    `=` is the layer of the last such word once more, with the same convolutions and a BatchNorm of
    its own; other words may lie between;
    `x16` is a 1x1 convolution to 16 channels without BatchNorm and ReLU;
    `d` is dropout; a spec without `d` has it before the head;
    `gelu` or `silu` replaces the ReLU, and `bias` the BatchNorm, in all later words;
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
        c, size = 1, 28
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d
        activation: Callable[[], nn.Module] = nn.ReLU
        for word in words if "d" in words else [*words, "d"]:
            if m := re.fullmatch(r"([cs])([1-9]\d{0,2})(?:k([357]))?(?:s([12]))?(p?)", word):
                out, kernel, stride = int(m[2]), int(m[3] or 3), int(m[4] or 1)
                # pooling before the BatchNorm leaves it less to normalise
                pool = [nn.MaxPool2d(2)] if m[5] else []
                conv = _convolution(c, out, kernel, stride, separable=m[1] == "s")
                layers.append(layer := nn.Sequential(*conv, *pool, norm(out), activation()))
                last = layer if (c, stride, pool) == (out, 1, []) else None
                c, size = out, -(-size // stride) // (2 if pool else 1)
            elif m := re.fullmatch(r"r(s?)([1-4])", word):
                block: list[nn.Module] = []
                for _ in range(int(m[2])):
                    block += [*_convolution(c, c, separable=bool(m[1])), norm(c), activation()]
                layers.append(last := _Residual(*block))
            elif word == "=" and last and last[0].in_channels == c:
                shared = {id(m): m for m in last.modules() if isinstance(m, nn.Conv2d)}
                layers.append(copy.deepcopy(last, shared))
            elif m := re.fullmatch(r"x([1-9]\d{0,2})", word):
                layers.append(nn.Conv2d(c, c := int(m[1]), kernel_size=1, bias=False))
            elif word == "p":
                layers.append(nn.MaxPool2d(2))
                size //= 2
            elif word == "d":
                layers.append(nn.Dropout(dropout))
            elif word == "bias":
                norm = _Bias
            elif word in ACTIVATIONS:
                activation = ACTIVATIONS[word]
            else:
                fault = "is no layer; layers are like c16k5s2, r2, p, x16, d"
                if word == "=":
                    fault = "repeats nothing: nothing before it keeps size and channels"
                raise ConfigError(f"model is {spec!r}, but {word!r} {fault}")
        if head not in HEADS or not size:
            needed = f"it must end in a head ({', '.join(HEADS)}) on maps of 1x1 or more"
            raise ConfigError(f"model is {spec!r}, but {needed}; here: {head!r} on {size}x{size}")
        super().__init__(*layers, make_head(head, c, size))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        return super().forward(normalise(pixels, self)).flatten(1)  # (N, 10, 1, 1) -> (N, 10)


class _Residual(nn.Sequential):
    """Convolutions that keep the shape; the input is added before the last activation."""

    def forward(self, x: Tensor) -> Tensor:
        *steps, activation = self
        y = x
        for step in steps:
            y = step(y)
        return activation(y + x)


class _Bias(nn.Module):
    """A bias for each channel, in place of a BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


def _convolution(
    c: int, out: int, kernel: int = 3, stride: int = 1, separable: bool = False
) -> tuple[nn.Module, ...]:
    """Return the layers of a convolution that keeps the size of the maps, but for the stride."""
    if not separable:
        return (nn.Conv2d(c, out, kernel, stride, padding=kernel // 2, bias=False),)
    each = nn.Conv2d(c, c, kernel, stride, padding=kernel // 2, groups=c, bias=False)
    return each, nn.Conv2d(c, out, kernel_size=1, bias=False)


def make_head(kind: str, c: int, size: int) -> nn.Module:
    """Return a head, one of `HEADS`, that turns maps `(N, c, size, size)` into `(N, 10, 1, 1)`."""
    classify = partial(nn.Conv2d, c, 10, kernel_size=1, bias=False)  # 160 parameters with c = 16
    if kind == "full":
        return nn.Conv2d(c, 10, kernel_size=size, bias=False)  # 10 * 16 * 7 * 7 = 7,840
    if kind == "pooled":
        return nn.Sequential(nn.AvgPool2d(size), classify())
    if kind == "shared":
        return nn.Sequential(_SharedWindow(size), classify())  # 49 + 160 = 209
    if kind == "depthwise":  # one 7x7 kernel for each channel: 784 + 160 = 944
        return nn.Sequential(nn.Conv2d(c, c, size, groups=c, bias=False), classify())
    columns = nn.Conv2d(c, 10, kernel_size=(size, 1), bias=False)  # -> (N, 10, 1, 7)
    rows = nn.Conv2d(10, 10, kernel_size=(1, size), bias=False)  # -> (N, 10, 1, 1)
    return nn.Sequential(columns, rows)  # 1,120 + 700 = 1,820


class _SharedWindow(nn.Conv2d):
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
