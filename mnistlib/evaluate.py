"""Predictions of a network, their accuracy and loss."""

import math
from dataclasses import dataclass

import numpy as np
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
    factor: float = 1.0
    """standard error over writers, in times the binomial one, see `over_writers`"""
    freedom: float = math.inf
    """its degrees of freedom; infinite: the writers are unknown, and the interval ignores them"""

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, percent."""
        return 100 * self.correct / self.n

    @property
    def error(self) -> float:
        """Share of wrong predictions, percent."""
        return 100 * (self.n - self.correct) / self.n

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, points; over writers where they are known."""
        return self.factor * math.sqrt(self.accuracy * self.error / self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, percent: for other writers, or for other images by these.

        Wilson's, of as many independent images as have this standard error: N. Dean and M. Pagano,
        J. Surv. Stat. Methodol. 3 (2015) 484-503; with the quantile of Student's t.
        """
        from scipy.special import stdtrit

        z, p = float(stdtrit(self.freedom, 0.975)) * self.factor, self.correct / self.n
        half = z * math.sqrt(p * (1 - p) / self.n + (z / self.n) ** 2 / 4)
        ends = (p + z**2 / (2 * self.n) + sign * half for sign in (-1, 1))
        low, high = (100 * end / (1 + z**2 / self.n) for end in ends)
        return low, high

    def __repr__(self) -> str:
        """Give accuracy and interval in a sentence."""
        low, high = self.interval
        share = f"{self.accuracy:.2f} % of {self.n:,} images correct"
        how = ", writers ignored"
        if self.freedom < math.inf:
            how = f" over writers, {self.factor:.2f} times the binomial"
        return f"{share} (95 % interval {low:.2f} to {high:.2f}{how})"


def over_writers(wrong: np.ndarray, writers: ArrayLike) -> tuple[float, float]:
    """Return factor and degrees of freedom of the standard error of an error rate over writers.

    The factor is that over the binomial standard error, which takes images for independent.
    With e of n images of a writer wrong, and E of N in all, the error rate is a ratio of sums over
    writers. Its variance is about that of their residuals e - n E / N, divided by N^2: W. G.
    Cochran, Sampling Techniques (1977), section 3.12. Each residual is that of the rate without the
    writer, as few write many images: J. G. MacKinnon et al., J. Econometrics 232 (2023) 272-299.
    The degrees of freedom are one less than the effective number of writers, N^2 / sum of n^2. Few
    errors show no clusters, so the factor is at least 1.

    Args:
        wrong: whether each image is misclassified, `(N,)` bool.
        writers: who wrote it, `(N,)` integers.
    """
    _, who = np.unique(writers, return_inverse=True)
    n, errors = np.bincount(who), np.bincount(who, wrong)
    share = n / len(wrong)
    residuals = (errors - n * wrong.mean()) / (1 - share)
    variance, binomial = (1 - 1 / len(n)) * (residuals**2).sum(), wrong.sum() * (1 - wrong.mean())
    factor = max(1.0, math.sqrt(variance / binomial)) if binomial else 1.0
    return factor, 1 / (share**2).sum() - 1


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
    model: nn.Module,
    images: ArrayLike = (),
    labels: ArrayLike = (),
    threads: int = 0,
    writers: ArrayLike | None = None,
) -> Evaluation:
    """Evaluate a network on images `(N, 1, 28, 28)` with labels `(N,)`.

    Args:
        model: the network; its mode is not changed.
        images: uint8, or float from 0 to 1, as for `predict`.
        labels: any integer type.
        threads: CPU threads, which do not change the result; 0: torch's own setting.
        writers: who wrote each image, `(N,)`, as in the last column of `Digits.writers`; by default
            the interval ignores writers.

    Raises:
        ValueError: there are no images, or the numbers of images and labels differ.
    """
    n, targets = len(torch.as_tensor(images)), torch.as_tensor(labels).cpu().long()
    if n == 0 or n != len(targets):
        fault = f"{n} images with {len(targets)} labels cannot be evaluated"
        raise ValueError(f"{fault} (the embedded sample has no test images)")
    logits = predict_logits(model, images, threads)
    missed = (logits.argmax(1) != targets).numpy()
    wrong = tuple(missed.nonzero()[0].tolist())
    clustered = () if writers is None else over_writers(missed, writers)
    return Evaluation(float(F.cross_entropy(logits, targets)), n - len(wrong), n, wrong, *clustered)
