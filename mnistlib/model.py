"""The networks: the 13,912-parameter reference, its relatives, and others written in one line."""

import re
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Mean and standard deviation of the 60,000 training images, pixels scaled to 0..1.
# They live in the network, so a checkpoint predicts from raw pixels and nobody has to guess them.
MEAN, STD = 0.1307, 0.3081


def normalise(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bring pixels to zero mean and unit variance; uint8 counts 0..255, floats 0..1."""
    scale = 255.0 if pixels.dtype == torch.uint8 else 1.0
    return (pixels.to(dtype) - MEAN * scale) / (STD * scale)


class ReferenceNet(nn.Module):
    """Two residual stages of 3x3 convolutions and a head, for 28x28 grey images.

    Input `(N, 1, 28, 28)`, uint8 in 0..255 or float in 0..1; output `(N, 10)` logits.
    No convolution has a bias: the BatchNorm behind it has one, and the reference's total of
    13,912 parameters leaves no room for another.

    Args:
        head: builds what turns the `(N, 16, 7, 7)` map into `(N, 10, 1, 1)`.
        dropout: probability of zeroing an activation, after each of the two poolings.
        activation: what follows each BatchNorm.
        norm: builds the normalisation of so many channels.
        residual: whether a stage's input is added before its last activation.
    """

    def __init__(
        self,
        head: Callable[[], nn.Module],
        dropout: float = 0.05,
        activation: Callable[[Tensor], Tensor] = F.relu,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        residual: bool = True,
    ) -> None:
        super().__init__()
        conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.conv1, self.bn1 = conv3x3(1, 8), norm(8)
        self.conv2, self.bn2 = conv3x3(8, 8), norm(8)
        self.conv3, self.bn3 = conv3x3(8, 8), norm(8)
        self.onecross = nn.Conv2d(8, 16, kernel_size=1, bias=False)
        self.conv4, self.bn4 = conv3x3(16, 16), norm(16)
        self.conv5, self.bn5 = conv3x3(16, 16), norm(16)
        self.activation, self.residual = activation, residual
        self.conv6 = head()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        x = normalise(pixels, self.conv1.weight.dtype)
        f = self.activation
        x = f(self.bn1(self.conv1(x)))  # (N, 1, 28, 28) -> (N, 8, 28, 28)
        y = self.bn3(self.conv3(f(self.bn2(self.conv2(x)))))
        x = f(y + x if self.residual else y)
        x = self.drop1(self.pool1(x))  # -> (N, 8, 14, 14)
        x = self.onecross(x)  # -> (N, 16, 14, 14)
        y = self.bn5(self.conv5(f(self.bn4(self.conv4(x)))))
        x = f(y + x if self.residual else y)
        x = self.drop2(self.pool2(x))  # -> (N, 16, 7, 7)
        x = self.conv6(x)  # -> (N, 10, 1, 1)
        return x.flatten(1)  # -> (N, 10)


class _Bias(nn.Module):
    """What is left of a BatchNorm that does not normalise: a bias for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias[:, None, None]


class _SharedWindow(nn.Conv2d):
    """One 7x7 window of weights, the same for every channel: `(N, C, 7, 7) -> (N, C, 1, 1)`."""

    def __init__(self) -> None:
        super().__init__(1, 1, kernel_size=7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return super().forward(x.reshape(n * c, 1, h, w)).reshape(n, c, 1, 1)


def make_head(kind: str, c: int = 16) -> nn.Module:
    """Return what turns a `(N, c, 7, 7)` map into `(N, 10, 1, 1)`; a kind of `HEADS`."""
    classify = partial(nn.Conv2d, c, 10, kernel_size=1, bias=False)  # of c = 16: 160 parameters
    if kind == "full":
        return nn.Conv2d(c, 10, kernel_size=7, bias=False)  # 10 * 16 * 7 * 7 = 7,840
    if kind == "pooled":
        return nn.Sequential(nn.AvgPool2d(7), classify())
    if kind == "shared":
        return nn.Sequential(_SharedWindow(), classify())  # 49 + 160 = 209
    if kind == "depthwise":  # one 7x7 window a channel: 784 + 160 = 944
        return nn.Sequential(nn.Conv2d(c, c, kernel_size=7, groups=c, bias=False), classify())
    columns = nn.Conv2d(c, 10, kernel_size=(7, 1), bias=False)  # -> (N, 10, 1, 7)
    rows = nn.Conv2d(10, 10, kernel_size=(1, 7), bias=False)  # -> (N, 10, 1, 1)
    return nn.Sequential(columns, rows)  # 1,120 + 700 = 1,820


HEADS = ("full", "pooled", "shared", "depthwise", "separable")


class _Conv(nn.Module):
    """Convolution, perhaps pooling, BatchNorm, ReLU; pooled first, there is less to normalise."""

    def __init__(self, c: int, out: int, kernel: int, stride: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, out, kernel, stride, padding=kernel // 2, bias=False)
        self.pool = nn.MaxPool2d(2) if pool else None
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.bn(self.pool(x) if self.pool else x))


class _Residual(nn.Module):
    """3x3 convolutions with BatchNorm, the input added before the last ReLU; shapes are kept."""

    def __init__(self, c: int, depth: int) -> None:
        super().__init__()
        conv3x3 = partial(nn.Conv2d, c, c, kernel_size=3, padding=1, bias=False)
        self.steps = nn.ModuleList(
            nn.Sequential(conv3x3(), nn.BatchNorm2d(c)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for step in self.steps[:-1]:
            y = F.relu(step(y))
        return F.relu(self.steps[-1](y) + x)


class LineNet(nn.Sequential):
    """A network written in one line, for 28x28 grey images; input and output as `ReferenceNet`.

    Words, from the image to the head: `c16k5s2` a convolution of kernel 5 and stride 2 to 16
    channels, with BatchNorm and ReLU (`k3` and `s1` may be left out; a `p` at its end pools 2x2
    before the BatchNorm); `r2` a residual block of two 3x3 convolutions; `p` max-pooling 2x2;
    `x16` a bare 1x1 convolution to 16 channels; last a head of `HEADS` on a 7x7 map. Maps of odd
    size are refused by the head.

    Args:
        line: e.g. `c16k5s2 r1 p r2 r2 full`.
        dropout: probability of zeroing an activation, before the head.

    Raises:
        ValueError: a word that is none, or a map before the head that is not 7x7.
    """

    def __init__(self, line: str, dropout: float = 0.05) -> None:
        *words, head = line.split() or [""]
        layers: list[nn.Module] = []
        c, size = 1, 28
        for word in words:
            if m := re.fullmatch(r"c([1-9]\d{0,2})(?:k([357]))?(?:s([12]))?(p?)", word):
                out, kernel, stride = int(m[1]), int(m[2] or 3), int(m[3] or 1)
                layers.append(_Conv(c, out, kernel, stride, bool(m[4])))
                c, size = out, size // stride // (2 if m[4] else 1)
            elif m := re.fullmatch(r"r([1-4])", word):
                layers.append(_Residual(c, int(m[1])))
            elif m := re.fullmatch(r"x([1-9]\d{0,2})", word):
                layers.append(nn.Conv2d(c, c := int(m[1]), kernel_size=1, bias=False))
            elif word == "p":
                layers.append(nn.MaxPool2d(2))
                size //= 2
            else:
                raise ValueError(f"{word!r} is no layer; layers are like c16k5s2, r2, p, x16")
        if head not in HEADS or size != 7:
            raise ValueError(
                f"{line!r} must end in a head ({', '.join(HEADS)}) on a 7x7 map; here it is "
                f"{head!r} on {size}x{size}"
            )
        super().__init__(*layers, nn.Dropout(dropout), make_head(head, c))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        x = normalise(pixels, next(self.parameters()).dtype)
        return super().forward(x).flatten(1)  # (N, 10, 1, 1) -> (N, 10)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "reference": partial(ReferenceNet, partial(make_head, "full")),
    "reference-pooled": partial(ReferenceNet, partial(make_head, "pooled")),
    "reference-shared": partial(ReferenceNet, partial(make_head, "shared")),
    "reference-depthwise": partial(ReferenceNet, partial(make_head, "depthwise")),
    "reference-separable": partial(ReferenceNet, partial(make_head, "separable")),
    "reference-plain": partial(ReferenceNet, partial(make_head, "full"), residual=False),
    "reference-unnormalised": partial(ReferenceNet, partial(make_head, "full"), norm=_Bias),
    "reference-gelu": partial(ReferenceNet, partial(make_head, "full"), activation=F.gelu),
    "reference-silu": partial(ReferenceNet, partial(make_head, "full"), activation=F.silu),
    # the reference's blocks on 7x7 maps: 18,216 parameters, under a third of the
    # multiply-accumulates, about a quarter of the activations
    "early": partial(LineNet, "c24k5s2p x16 r2 r2 full"),
}


def build(name: str = "reference", dropout: float = 0.05) -> nn.Module:
    """Return a freshly initialised network, weights drawn from torch's random state.

    Args:
        name: in `MODELS`, or a network written in one line as `LineNet` takes it.
        dropout: probability of zeroing an activation.

    Raises:
        ValueError: there is no network of that name, or the line is none.
    """
    if name not in MODELS and " " in name:
        return LineNet(name, dropout)
    if name not in MODELS:
        raise ValueError(
            f"there is no model {name!r}; choose one of {', '.join(MODELS)}, or write one in a "
            "line, as c16k5s2 r1 p r2 r2 full"
        )
    model = MODELS[name](dropout=dropout)
    if name == "reference":
        assert sum(p.numel() for p in model.parameters()) == 13_912
    return model
