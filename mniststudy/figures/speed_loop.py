"""Notebook 08's baseline: the training loop that most tutorials write.

Nothing else of the package trains with it. `LoopOptions` switches its habits off one by one, down
to the loop of `train.py`; `speed.py` times each step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from mnistlib import Config, Digits, augment, build
from mnistlib.optim import make_optimizer, make_scheduler
from mnistlib.runtime import keep_freed_memory
from mnistlib.state import WeightAverage


@dataclass(frozen=True)
class LoopOptions:
    """How a loop treats data and memory. What it computes stays the same but for rounding."""

    loader: bool = True
    """a DataLoader over single pictures, each transformed by itself; else tensors, indexed"""
    floats: bool = True
    """tensors kept as float32; else as uint8, made floats batch by batch (without a loader)"""
    reads_loss: bool = True
    """reads the loss after every step, as a running mean does"""
    channels_last: bool = False
    fused: bool = False
    """the optimizer updates all parameters in one kernel, not in a Python loop"""
    flushes_denormals: bool = False
    """floats too small for full precision become zero"""
    keeps_memory: bool = False
    """what a step frees stays with the process for the next, see `keep_freed_memory`"""
    bfloat16: bool = False
    """convolutions and products in half precision: the one option that does change the numbers"""
    compiled: bool = False
    """the network goes through torch.compile, which needs a C++ compiler"""


# the loop's steps: from which other, and how; the last three were tried and not kept
LOOP_STEPS: dict[str, tuple[str, LoopOptions]] = {
    "conventional loop": ("", step := LoopOptions()),
    "tensors in memory": ("conventional loop", step := replace(step, loader=False)),
    "kept as uint8": ("tensors in memory", step := replace(step, floats=False)),
    "loss read at the end": ("kept as uint8", step := replace(step, reads_loss=False)),
    "channels_last": ("loss read at the end", step := replace(step, channels_last=True)),
    "fused optimizer": ("channels_last", step := replace(step, fused=True)),
    "freed memory kept": ("fused optimizer", step := replace(step, keeps_memory=True)),
    "bfloat16": ("freed memory kept", replace(step, bfloat16=True)),
    "denormals flushed": ("freed memory kept", replace(step, flushes_denormals=True)),
    "torch.compile": ("freed memory kept", replace(step, compiled=True)),
}


@dataclass(frozen=True)
class TrainingSetup:
    """A network and how it is trained; a published recipe has parts that no Config describes."""

    config: Config
    """epochs, batch size, label smoothing, augmentation and averaging"""
    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer]
    scheduler: Callable[[Optimizer, int], LRScheduler] | None
    """made for an optimizer and the number of steps of an epoch; stepped once per batch"""


def training_setup(config: Config) -> TrainingSetup:
    """Return how a Config trains, so that the tutorial's loop can do it."""

    def scheduler(optimizer: Optimizer, steps: int) -> LRScheduler:
        return make_scheduler(optimizer, config, config.epochs * steps)

    network = partial(build, config.model, config.dropout)
    return TrainingSetup(config, network, partial(make_optimizer, config=config), scheduler)


class _Pictures(MNIST):
    """torchvision's own MNIST data set over images that are in memory already."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.data, self.targets = images.squeeze(1), labels
        self.transform, self.target_transform = transform, None


class TutorialLoop:
    """One training by the tutorial's loop; iterate over it to take its steps one by one.

    Args:
        setup: what to train, and how.
        digits: what to train it on.
        options: what the loop does otherwise than tutorials do.
        seed: of torch's random state, from which weights, order, dropout and augmentation come.
    """

    def __init__(
        self, setup: TrainingSetup, digits: Digits, options: LoopOptions, seed: int = 0
    ) -> None:
        self.setup, self.options = setup, options
        self.train_ids, self.val_ids = digits.split()
        self.images, self.labels = digits.train_images, digits.train_labels.long()
        if options.floats and not options.loader:
            self.images = self.images.float() / 255
        self.steps_per_epoch = -(-len(self.train_ids) // setup.config.batch_size)
        torch.manual_seed(seed)
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = setup.build().to(memory_format=layout)
        self.average = WeightAverage(self.model, setup.config.ema_decay)
        self.optimizer = setup.optimizer(self.model)
        for group in self.optimizer.param_groups:
            group["fused"] = options.fused

    def batches(self, ids: Tensor, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(N, 1, 28, 28)` and labels `(N,)` of one pass over `ids`."""
        size = self.setup.config.batch_size
        amounts = self.setup.config.augmentation if training else {}
        if self.options.loader:
            steps: list[Callable] = [transforms.ToTensor()]
            if amounts:
                steps.append(lambda x: augment(x[None], **amounts, generator=None)[0])
            pictures = _Pictures(self.images[ids], self.labels[ids], transforms.Compose(steps))
            yield from DataLoader(pictures, size, shuffle=training)
            return
        for chosen in (ids[torch.randperm(len(ids))] if training else ids).split(size):
            batch = self.images[chosen]
            batch = batch if self.options.floats else batch.float() / 255
            yield augment(batch, **amounts, generator=None), self.labels[chosen]

    def __iter__(self) -> Iterator[int]:
        """Train; yield the number of steps taken, after each."""
        setup, options = self.setup, self.options
        forward = torch.compile(self.model) if options.compiled else self.model
        scheduler = setup.scheduler and setup.scheduler(self.optimizer, self.steps_per_epoch)
        epochs = (self.batches(self.train_ids, training=True) for _ in range(setup.config.epochs))
        loss_of = partial(F.cross_entropy, label_smoothing=setup.config.label_smoothing)
        running_loss: float | Tensor = 0.0
        with ExitStack() as stack:
            if options.keeps_memory:
                stack.enter_context(keep_freed_memory())
            stack.callback(torch.set_flush_denormal, False)
            torch.set_flush_denormal(options.flushes_denormals)
            for step, (pixels, labels) in enumerate(chain.from_iterable(epochs), 1):
                with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
                    logits = forward(pixels).float()
                loss = loss_of(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.average.update()
                if scheduler:
                    scheduler.step()
                running_loss += loss.item() if options.reads_loss else loss.detach()
                yield step

    def accuracy(self) -> float:
        """Return the validation accuracy in percent, by a pass of the same loop."""
        network, right = self.average.model.eval(), 0
        with torch.inference_mode():
            for pixels, labels in self.batches(self.val_ids, training=False):
                right += int((network(pixels).argmax(1) == labels).sum())
        network.train()
        return 100 * right / len(self.val_ids)

    def epochs(self) -> Iterator[tuple[int, float, float]]:
        """Train to the end; yield epoch, seconds so far and validation accuracy after each."""
        began = time.perf_counter()
        for step in self:
            if step % self.steps_per_epoch == 0:
                accuracy = self.accuracy()
                yield step // self.steps_per_epoch, time.perf_counter() - began, accuracy
