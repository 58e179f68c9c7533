"""Predictions of a network, and what is read off them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stats import wilson_interval

BATCH = 500  # images at a time: small enough to keep memory low, large enough to be fast


@dataclass(frozen=True, repr=False)
class Evaluation:
    """Loss and accuracy of a network on `n` labelled images."""

    loss: float
    """mean cross-entropy, nats"""
    correct: int
    n: int

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
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [model(batch.to(device)).cpu() for batch in images.split(BATCH)]
    finally:
        model.train(training)
    return torch.cat(parts)


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the probabilities `(N, 10)` float32 of the ten digits; rows add up to 1."""
    return predict_logits(model, images).softmax(1)


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Evaluation:
    """Evaluate a network on images `(N, 1, 28, 28)` with labels `(N,)`; every image counts."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(images)} images with {len(labels)} labels cannot be evaluated")
    logits, targets = predict_logits(model, images), labels.cpu().long()
    correct = int((logits.argmax(1) == targets).sum())
    return Evaluation(float(F.cross_entropy(logits, targets)), correct, len(targets))
