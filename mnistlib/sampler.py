"""Which images an epoch uses: each once, or the hard ones more often."""

import math
from typing import Any

import torch
from torch import Tensor


class Sampler:
    """Draws the images of an epoch, with hard-example mining if `focus` is set.

    Source of the idea: A. Shrivastava et al., "Training region-based object detectors with online
    hard example mining", CVPR 2016; here the losses of earlier epochs rank the images.

    Args:
        n: number of training images.
        size: images per epoch.
        focus: share of an epoch taken by the images with the largest loss; 0: no mining. Has an
            effect only if `size` is below `n`.
        seed: seed of the order.
        device: device of the losses.
    """

    def __init__(self, n: int, size: int, focus: float, seed: int, device: torch.device) -> None:
        self.n, self.size, self.focus = n, size, focus
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_start = self.generator.get_state()  # with which the epoch's images are drawn
        self.seen = 0  # images of the current epoch whose loss is known
        self.drawn = torch.arange(0)  # the epoch's images, positions in the training set
        # the three digits of a bfloat16 are enough to rank images and take half the memory
        self.last_loss = torch.full((n,), math.inf, dtype=torch.bfloat16)
        self.epoch_loss = torch.zeros(size, dtype=torch.bfloat16, device=device)

    def sample_epoch(self) -> Tensor:
        """Draw the positions `(size,)` of an epoch's images, each image once before any repeats.

        With `focus`, that share of them are the images whose loss was largest when they were last
        seen, images not yet seen before all others. The rest is drawn from the other images.
        """
        n, size = self.n, self.size
        orders = [torch.randperm(n, generator=self.generator) for _ in range(math.ceil(size / n))]
        self.drawn = torch.cat(orders)[:size]
        if self.focus and size < n:
            losses = self.last_loss[orders[0]].float()
            # a stable sort of a random order keeps images of equal loss, such as unseen, random
            ranked = orders[0][losses.argsort(descending=True, stable=True)]
            hard, others = ranked.split([k := round(self.focus * size), n - k])
            others = others[torch.randperm(n - k, generator=self.generator)[: size - k]]
            order = torch.randperm(size, generator=self.generator)
            self.drawn = torch.cat([hard, others])[order]
        return self.drawn

    def record(self, losses: Tensor) -> None:
        """Store the losses `(N,)` of the epoch's next images."""
        self.epoch_loss[self.seen : self.seen + len(losses)] = losses
        self.seen += len(losses)

    def end_epoch(self) -> None:
        """Keep the losses of the epoch that ended for drawing the next one."""
        if self.focus:
            self.last_loss[self.drawn] = self.epoch_loss.cpu()
        self.seen = 0
        self.epoch_start = self.generator.get_state()

    def state_dict(self) -> dict[str, Any]:
        """Return what the rest of the run depends on; losses only with `focus`."""
        losses = {"seen": self.seen, "last_loss": self.last_loss, "epoch_loss": self.epoch_loss}
        return {"epoch_start": self.epoch_start} | (losses if self.focus else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the sampler; the current epoch must then be drawn again."""
        self.epoch_start = state["epoch_start"]
        self.generator.set_state(self.epoch_start)
        if self.focus:
            self.seen = state["seen"]
            self.last_loss.copy_(state["last_loss"])
            self.epoch_loss.copy_(state["epoch_loss"])
