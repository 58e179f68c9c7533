"""Predictions of a network, and what is read off them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import DatasetError
from .stats import wilson_interval

BATCH = 128  # images at a time; more would cost memory and gain no time
# Positions of test images whose label several annotators dispute; given with the study's protocol
DISPUTED = frozenset(
    (947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729)
)


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Loss and accuracy of a network on `n` labelled images."""

    loss: float
    """mean cross-entropy, nats"""
    correct: int
    n: int
    wrong: tuple[int, ...] = ()
    """positions of the misread images"""

    @property
    def accuracy(self) -> float:
        """Correct predictions, percent."""
        return 100 * self.correct / self.n

    @property
    def error(self) -> float:
        """Wrong predictions, percent."""
        return 100 * (self.n - self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, percent: how far the choice of images matters."""
        low, high = wilson_interval(self.correct, self.n)
        return 100 * low, 100 * high

    def __repr__(self) -> str:
        """Say it as a sentence."""
        low, high = self.interval
        return (
            f"{self.accuracy:.2f} % of {self.n:,} images correct "
            f"(95 % interval {low:.2f} to {high:.2f})"
        )


def predict_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits `(N, 10)` of images `(N, 1, 28, 28)` on the CPU, dropout switched off."""
    device = next(model.parameters()).device
    training = [m for m in model.modules() if m.training]  # some may be frozen on purpose
    model.eval()
    try:
        with torch.inference_mode():
            parts = [model(batch.to(device)).cpu() for batch in images.split(BATCH)]
    finally:
        for module in training:
            module.training = True
    return torch.cat(parts)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the probabilities `(N, 10)` float32 of the ten digits; rows add up to 1."""
    return predict_logits(model, images).softmax(1)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate a network on images `(N, 1, 28, 28)` with labels `(N,)`; every image counts."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images with {len(labels)} labels cannot be evaluated")
    logits, targets = predict_logits(model, images), labels.cpu().long()
    wrong = tuple((logits.argmax(1) != targets).nonzero().flatten().tolist())
    loss, n = float(F.cross_entropy(logits, targets)), len(targets)
    return Evaluation(loss, n - len(wrong), n, wrong)


def read_picture(path: str | Path) -> Tensor:
    """Bring a picture of one digit into MNIST's form: `(1, 28, 28)` uint8, light on dark.

    As in MNIST, the ink is scaled to fit 20x20 pixels and its centre of mass put in the middle
    (Y. LeCun et al., Proc. IEEE 86 (1998) 2278-2324). A dark digit on a light ground is inverted;
    a 28x28 picture is taken as it is but for that.

    Raises:
        DatasetError: the file is no picture, or nothing is drawn on it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > 50_000_000:
                raise DatasetError(f"{path} has over 50 million pixels; make it smaller")
            ground = Image.new("RGBA", file.size, "white")  # where the picture is transparent
            ink = Image.alpha_composite(ground, file.convert("RGBA")).convert("L")
            ImageOps.exif_transpose(ink, in_place=True)  # photos are often stored lying down
    except DatasetError:
        raise
    except Exception as error:  # each format's decoder fails in its own way
        raise DatasetError(
            f"{path} cannot be read as a picture ({error}); give a PNG or JPEG"
        ) from None
    pixels = np.asarray(ink, dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels = 255 - pixels
    if pixels.max() - np.median(pixels) < 32:
        raise DatasetError(f"{path} shows no digit: nothing stands out from the ground")
    if pixels.shape != (28, 28):
        pixels = _centre(pixels)
    return torch.from_numpy(pixels.round().astype(np.uint8)).unsqueeze(0)  # (1, 28, 28)


def _centre(pixels: np.ndarray) -> np.ndarray:
    """Crop to the ink, scale it to fit 20x20 and put its centre of mass into the middle."""
    from PIL import Image

    low, high = float(np.median(pixels)), float(pixels.max())
    pixels = ((pixels - low) / (high - low)).clip(0, 1) * 255
    rows, columns = np.nonzero((pixels > 64).any(1))[0], np.nonzero((pixels > 64).any(0))[0]
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    zoom = 20 / max(pixels.shape)
    size = [max(1, round(side * zoom)) for side in pixels.shape[::-1]]
    ink = np.asarray(Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BOX))
    height, width = ink.shape
    weight = ink.sum(dtype=np.float64)
    down = round(14 - float((ink.sum(1) * (np.arange(height) + 0.5)).sum() / weight))
    right = round(14 - float((ink.sum(0) * (np.arange(width) + 0.5)).sum() / weight))
    down, right = min(max(down, 0), 28 - height), min(max(right, 0), 28 - width)
    out = np.zeros((28, 28), np.float32)
    out[down : down + height, right : right + width] = ink
    return out
