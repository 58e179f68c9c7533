"""Batches in slices: one network on several cores, with the same result on any number of them."""

import copy
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def side_by_side(threads: int = 0) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield a `map` that runs its calls in several Python threads and returns results in order.

    torch releases Python's lock in its operators, so they run at the same time. Inside each thread
    torch itself uses one: the order of an operator's sums would depend on the number of threads,
    and small convolutions gain little from more.

    Args:
        threads: number of threads; 0: torch's own setting.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if (threads or usual) == 1:
            yield map
        else:
            with ThreadPoolExecutor(threads or usual) as pool:
                yield pool.map
    finally:
        torch.set_num_threads(usual)


class Slices:
    """Passes a batch forward and backward in slices, each normalised by its own statistics.

    The slices are "ghost batches" (E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize
    better", NeurIPS 2017). Each slice has a replica of the network with shared weights. Gradients
    are added in the order of the slices, whichever ended first. Each replica updates BatchNorm's
    running statistics from the network's; the network then gets their mean over all images.

    Args:
        model: the network in training.
        slices: number of slices; with 1 the network passes the whole batch.
        each: a `map`, such as that of `side_by_side`.
    """

    def __init__(self, model: nn.Module, slices: int, each: Callable[..., Iterable[Any]]) -> None:
        self.each, self.weights = each, list(model.parameters())
        shared = {id(weight): weight for weight in self.weights}
        others = [copy.deepcopy(model, dict(shared)) for _ in range(slices - 1)]
        self.replicas = [model, *others]
        # BatchNorm's, which are all float buffers of the network, if it has any
        lists = [[b for b in r.buffers() if b.is_floating_point()] for r in self.replicas]
        self.statistics = lists if lists[0] else [[]]

    def backward(
        self, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Set the gradients of the mean loss; return the losses and the logits `(N, 10)`.

        Args:
            images: `(N, 1, 28, 28)`.
            labels: `(N,)` int64, or what else the loss takes, `(N, ...)`.
            loss: function of logits and labels that returns the losses `(N,)`, or with a single
                slice their mean.
        """

        def one(replica: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Any]:
            logits = replica(images)
            losses = loss(logits, labels)
            share = len(images) / n  # a short slice counts less, so that images count the same
            gradients = torch.autograd.grad(losses.mean() * share, self.weights)
            return losses.detach(), logits.detach(), gradients

        own, *others = self.statistics
        for statistics in others:
            torch._foreach_copy_(statistics, own)
        n, parts = len(images), [batch.chunk(len(self.replicas)) for batch in (images, labels)]
        losses, logits, gradients = zip(*self.each(one, self.replicas, *parts), strict=True)
        for other in gradients[1:]:
            torch._foreach_add_(gradients[0], other)
        for weight, gradient in zip(self.weights, gradients[0], strict=True):
            weight.grad = gradient
        if others:
            first, *rest = parts[0]  # a short batch may have fewer slices than replicas
            torch._foreach_mul_(own, len(first) / n)
            for statistics, part in zip(others, rest, strict=False):
                torch._foreach_add_(own, statistics, alpha=len(part) / n)
        return torch.cat([part.flatten() for part in losses]), torch.cat(logits)
