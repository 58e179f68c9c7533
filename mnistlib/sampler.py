"""Which images an epoch sees: each once, or the hard ones more often."""

import math
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """Draws the images of an epoch, and with `focus` mines the hard ones.

    Source of the idea: A. Shrivastava et al., "Training region-based object detectors with online
    hard example mining", CVPR 2016; here the losses of earlier epochs rank the images.

    Args:
        n: training images.
        size: images per epoch.
        focus: share of a shorter epoch that goes to the images of greatest loss; 0: none.
        seed: of the order.
        device: where the losses are.
    """

    def __init__(self, n: int, size: int, focus: float, seed: int, device: torch.device) -> None:
        self.n, self.size, self.focus = n, size, focus
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()  # from which the epoch's images are drawn
        self.seen = 0  # images of the epoch under way whose loss is known
        self.drawn = torch.arange(0)  # the epoch's images, positions in the training set
        # to rank images, the three digits of a bfloat16 do, in half the bytes of a float
        self.last_loss = torch.full((n,), math.inf, dtype=torch.bfloat16)
        self.epoch_loss = torch.zeros(size, dtype=torch.bfloat16, device=device)

    def sample_epoch(self) -> Tensor:
        """Draw an epoch's positions `(size,)`: each once, or for a longer epoch in fresh passes.

        With `focus`, that share of them are the images whose loss was greatest when they were last
        seen, unseen ones before all, and the rest is drawn from the others.
        """
        n, size = self.n, self.size
        orders = [torch.randperm(n, generator=self.generator) for _ in range(math.ceil(size / n))]
        self.drawn = torch.cat(orders)[:size]
        if self.focus and size < n:
            losses = self.last_loss[orders[0]].float()
            # a stable sort of a random order: equal losses, as of images not yet seen, stay random
            ranked = orders[0][losses.argsort(descending=True, stable=True)]
            hard, others = ranked.split([k := round(self.focus * size), n - k])
            others = others[torch.randperm(n - k, generator=self.generator)[: size - k]]
            order = torch.randperm(size, generator=self.generator)
            self.drawn = torch.cat([hard, others])[order]
        return self.drawn

    def record(self, losses: Tensor) -> None:
        """Take the losses `(N,)` of the epoch's next images."""
        self.epoch_loss[self.seen : self.seen + len(losses)] = losses
        self.seen += len(losses)

    def end_epoch(self) -> None:
        """Remember the losses of the epoch that ended; the next one is drawn from here."""
        if self.focus:
            self.last_loss[self.drawn] = self.epoch_loss.cpu()
        self.seen = 0
        self.epoch_start = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the run depends on; losses only where images are mined."""
        losses = {"seen": self.seen, "last_loss": self.last_loss, "epoch_loss": self.epoch_loss}
        return {"epoch_start": self.epoch_start} | (losses if self.focus else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the sampler whose state it was; the epoch under way is drawn again."""
        self.epoch_start = state["epoch_start"]
        self.generator.set_state(self.epoch_start)
        if self.focus:
            self.seen = state["seen"]
            self.last_loss.copy_(state["last_loss"])
            self.epoch_loss.copy_(state["epoch_loss"])
