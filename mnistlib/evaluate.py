"""Predictions of a network, their accuracy and loss."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .slices import side_by_side

BATCH = 64  # images at a time; more would take memory and save no time


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Loss and accuracy of a network on `n` labelled images."""

    loss: float
    """mean cross-entropy, nats"""
    correct: int
    n: int
    wrong: tuple[int, ...] = ()
    """positions of the misclassified images"""

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, percent."""
        return 100 * self.correct / self.n

    @property
    def error(self) -> float:
        """Share of wrong predictions, percent."""
        return 100 * (self.n - self.correct) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, percent, for the random choice of the images."""
        from scipy.stats import binomtest

        found = binomtest(self.correct, self.n).proportion_ci(method="wilson")
        return 100 * float(found.low), 100 * float(found.high)

    def __repr__(self) -> str:
        """Give accuracy and interval in a sentence."""
        low, high = self.interval
        share = f"{self.accuracy:.2f} % of {self.n:,} images correct"
        return f"{share} (95 % interval {low:.2f} to {high:.2f})"


def predict_logits(model: nn.Module, images: ArrayLike, threads: int = 0) -> Tensor:
    """Return the logits `(N, 10)` of images `(N, 1, 28, 28)`, on the CPU, in eval mode.

    Images may also be `(N, 28, 28)`, one alone `(28, 28)`, and arrays of numpy. The batches and so
    the bits do not depend on the number of threads.
    """

    @torch.inference_mode()  # each thread has its own inference mode
    def one(batch: Tensor) -> Tensor:
        return model(batch.to(device)).cpu()

    pixels = torch.as_tensor(images)
    pixels = pixels if pixels.ndim > 3 else pixels.view(-1, 1, *pixels.shape[-2:])
    device = next(model.parameters()).device
    training = [m for m in model.modules() if m.training]  # some may be frozen on purpose
    model.eval()
    try:
        with side_by_side(threads) as each:
            return torch.cat(list(each(one, pixels.split(BATCH))))
    finally:
        for module in training:
            module.training = True


def predict(model: nn.Module, images: ArrayLike) -> Tensor:
    """Return the probabilities `(N, 10)` float32 of the ten digits; each row sums to 1.

    Images are `(N, 1, 28, 28)`, `(N, 28, 28)` or one `(28, 28)`, of torch or numpy.
    """
    return predict_logits(model, images).softmax(1)


def evaluate(
    model: nn.Module, images: ArrayLike = (), labels: ArrayLike = (), threads: int = 0
) -> Evaluation:
    """Evaluate a network on images `(N, 1, 28, 28)` with labels `(N,)`.

    Args:
        model: the network; its mode is not changed.
        images: uint8, or float from 0 to 1, as for `predict`.
        labels: any integer type.
        threads: CPU threads, which do not change the result; 0: torch's own setting.

    Raises:
        ValueError: there are no images, or the numbers of images and labels differ.
    """
    n, targets = len(torch.as_tensor(images)), torch.as_tensor(labels).cpu().long()
    if n == 0 or n != len(targets):
        fault = f"{n} images with {len(targets)} labels cannot be evaluated"
        raise ValueError(f"{fault} (the embedded sample has no test images)")
    logits = predict_logits(model, images, threads)
    wrong = tuple((logits.argmax(1) != targets).nonzero().flatten().tolist())
    loss = float(F.cross_entropy(logits, targets))
    return Evaluation(loss, n - len(wrong), n, wrong)
