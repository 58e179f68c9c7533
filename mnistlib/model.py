"""The networks: the 13,912-parameter reference, its body under four other heads, a quick one."""

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
    """

    def __init__(self, head: Callable[[], nn.Module], dropout: float = 0.05) -> None:
        super().__init__()
        conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
        self.conv1, self.bn1 = conv3x3(1, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3x3(8, 8), nn.BatchNorm2d(8)
        self.conv3, self.bn3 = conv3x3(8, 8), nn.BatchNorm2d(8)
        self.onecross = nn.Conv2d(8, 16, kernel_size=1, bias=False)
        self.conv4, self.bn4 = conv3x3(16, 16), nn.BatchNorm2d(16)
        self.conv5, self.bn5 = conv3x3(16, 16), nn.BatchNorm2d(16)
        self.conv6 = head()
        self.pool1, self.pool2 = nn.MaxPool2d(2), nn.MaxPool2d(2)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        x = normalise(pixels, self.conv1.weight.dtype)
        x = F.relu(self.bn1(self.conv1(x)))  # (N, 1, 28, 28) -> (N, 8, 28, 28)
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        x = self.drop1(self.pool1(x))  # -> (N, 8, 14, 14)
        x = self.onecross(x)  # -> (N, 16, 14, 14)
        y = F.relu(self.bn4(self.conv4(x)))
        x = F.relu(self.bn5(self.conv5(y)) + x)
        x = self.drop2(self.pool2(x))  # -> (N, 16, 7, 7)
        x = self.conv6(x)  # -> (N, 10, 1, 1)
        return x.flatten(1)  # -> (N, 10)


def _full_head() -> nn.Module:
    return nn.Conv2d(16, 10, kernel_size=7, bias=False)  # 10 * 16 * 7 * 7 = 7,840 parameters


def _pooled_head() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(7), nn.Conv2d(16, 10, 1, bias=False))  # 160


class _SharedWindow(nn.Conv2d):
    """One 7x7 window of weights, the same for every channel: `(N, C, 7, 7) -> (N, C, 1, 1)`."""

    def __init__(self) -> None:
        super().__init__(1, 1, kernel_size=7, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return super().forward(x.reshape(n * c, 1, h, w)).reshape(n, c, 1, 1)


def _shared_head() -> nn.Module:
    return nn.Sequential(_SharedWindow(), nn.Conv2d(16, 10, 1, bias=False))  # 49 + 160 = 209


def _depthwise_head() -> nn.Module:
    window = nn.Conv2d(16, 16, kernel_size=7, groups=16, bias=False)  # one 7x7 window a channel
    return nn.Sequential(window, nn.Conv2d(16, 10, 1, bias=False))  # 784 + 160 = 944


def _separable_head() -> nn.Module:
    columns = nn.Conv2d(16, 10, kernel_size=(7, 1), bias=False)  # -> (N, 10, 1, 7)
    rows = nn.Conv2d(10, 10, kernel_size=(1, 7), bias=False)  # -> (N, 10, 1, 1)
    return nn.Sequential(columns, rows)  # 1,120 + 700 = 1,820


class EarlyNet(nn.Module):
    """The reference's blocks on small maps: 28x28 becomes 7x7 before most of the work is done.

    Input and output as of `ReferenceNet`; 18,216 parameters, under a third of its
    multiply-accumulates and about a quarter of its activations. Pooling comes before BatchNorm and
    ReLU, which so have a quarter of the values to pass over.

    Args:
        dropout: probability of zeroing an activation, before the head.
    """

    def __init__(self, dropout: float = 0.05) -> None:
        super().__init__()
        conv3x3 = partial(nn.Conv2d, 16, 16, kernel_size=3, padding=1, bias=False)
        self.conv1 = nn.Conv2d(1, 24, kernel_size=5, stride=2, padding=2, bias=False)
        self.pool1, self.bn1 = nn.MaxPool2d(2), nn.BatchNorm2d(24)
        self.onecross = nn.Conv2d(24, 16, kernel_size=1, bias=False)
        self.conv2, self.bn2 = conv3x3(), nn.BatchNorm2d(16)
        self.conv3, self.bn3 = conv3x3(), nn.BatchNorm2d(16)
        self.conv4, self.bn4 = conv3x3(), nn.BatchNorm2d(16)
        self.conv5, self.bn5 = conv3x3(), nn.BatchNorm2d(16)
        self.drop, self.conv6 = nn.Dropout(dropout), _full_head()

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        x = normalise(pixels, self.conv1.weight.dtype)
        x = self.pool1(self.conv1(x))  # (N, 1, 28, 28) -> (N, 24, 14, 14) -> (N, 24, 7, 7)
        x = self.onecross(F.relu(self.bn1(x)))  # -> (N, 16, 7, 7)
        y = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(y)) + x)
        y = F.relu(self.bn4(self.conv4(x)))
        x = F.relu(self.bn5(self.conv5(y)) + x)
        x = self.conv6(self.drop(x))  # -> (N, 10, 1, 1)
        return x.flatten(1)  # -> (N, 10)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "reference": partial(ReferenceNet, _full_head),
    "reference-pooled": partial(ReferenceNet, _pooled_head),
    "reference-shared": partial(ReferenceNet, _shared_head),
    "reference-depthwise": partial(ReferenceNet, _depthwise_head),
    "reference-separable": partial(ReferenceNet, _separable_head),
    "early": EarlyNet,
}


def build(name: str = "reference", dropout: float = 0.05) -> nn.Module:
    """Return a freshly initialised network of `MODELS`, weights drawn from torch's random state.

    Raises:
        ValueError: there is no network of that name.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(MODELS)}")
    model = MODELS[name](dropout=dropout)
    if name == "reference":
        assert sum(p.numel() for p in model.parameters()) == 13_912
    return model
