"""The reference network with its 13,912 parameters, and `build`."""

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .spec import MODELS, SpecNet, check_model, normalise


class ReferenceNet(nn.Module):
    """Two residual stages of 3x3 convolutions and a 7x7 head, for 28x28 grey images.

    Input `(N, 1, 28, 28)`, uint8 in 0..255 or float in 0..1; output `(N, 10)` logits.
    No convolution has a bias: the reference's total of 13,912 parameters leaves no room for one,
    and BatchNorm has its own.

    Args:
        dropout: probability of zeroing an activation, after each of the two max-poolings.
    """

    def __init__(self, dropout: float = 0.05) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, kernel_size=3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.pool1, self.drop1 = nn.MaxPool2d(2), nn.Dropout(dropout)
        self.onecross = nn.Conv2d(8, 16, kernel_size=1, bias=False)
        self.conv4 = nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False)
        self.bn4 = nn.BatchNorm2d(16)
        self.conv5 = nn.Conv2d(16, 16, kernel_size=3, padding=1, bias=False)
        self.bn5 = nn.BatchNorm2d(16)
        self.pool2, self.drop2 = nn.MaxPool2d(2), nn.Dropout(dropout)
        self.conv6 = nn.Conv2d(16, 10, kernel_size=7, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`."""
        relu = partial(F.relu, inplace=True)  # nothing else needs BatchNorm's output
        x = normalise(pixels, self)
        x = relu(self.bn1(self.conv1(x)))  # (N, 1, 28, 28) -> (N, 8, 28, 28)
        y = relu(self.bn2(self.conv2(x)))
        # pooling before the ReLU gives the same values and saves three quarters of its work
        x = relu(self.pool1(self.bn3(self.conv3(y)) + x))  # -> (N, 8, 14, 14)
        x = self.onecross(self.drop1(x))  # -> (N, 16, 14, 14)
        y = relu(self.bn4(self.conv4(x)))
        x = relu(self.pool2(self.bn5(self.conv5(y)) + x))  # -> (N, 16, 7, 7)
        x = self.drop2(x)
        x = self.conv6(x)  # -> (N, 10, 1, 1)
        return x.flatten(1)  # -> (N, 10)


def build(name: str = "reference", dropout: float = 0.05) -> nn.Module:
    """Return a network with new weights, drawn from torch's random state.

    Args:
        name: a name in `MODELS`, or a one-line spec as explained in `SpecNet`.
        dropout: probability of zeroing an activation.

    Raises:
        ConfigError: the name is unknown or the spec is wrong.
    """
    if name == "reference":
        return ReferenceNet(dropout)
    check_model(name)
    return SpecNet(MODELS.get(name, name), dropout)
