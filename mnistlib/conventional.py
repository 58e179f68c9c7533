"""The yardstick: the training loop most tutorials write.

Nothing else of the package trains with it. `Way` switches its habits off one by one, down to the
loop of `train.py`; notebook 08 times each step.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from .augment import random_distortion
from .config import Config
from .data import Digits
from .model import build
from .optimizers import make_optimizer, make_scheduler
from .process import kept_memory, settings


@dataclass(frozen=True)
class Way:
    """How a loop treats data and memory. What it computes stays the same but for rounding."""

    loader: bool = True
    """a DataLoader over single pictures, each transformed by itself; else tensors, indexed"""
    floats: bool = True
    """tensors kept as float32; else as uint8, made floats batch by batch (without a loader)"""
    reads_loss: bool = True
    """asks for the loss of every step at once, as a running mean does"""
    channels_last: bool = False
    fused: bool = False
    """the optimizer updates all parameters in one kernel, not in a Python loop"""
    flush: bool = False
    """floats too small for full precision become zero"""
    keeps_memory: bool = False
    """what a step frees stays with the process for the next, see `kept_memory`"""
    bfloat16: bool = False
    """convolutions and products in half precision: the one habit that does change the numbers"""
    compiled: bool = False
    """the network goes through torch.compile, which needs a C++ compiler"""


@dataclass(frozen=True)
class Course:
    """A network and how it is trained, ours or a published one."""

    build: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler] | None
    """made for an optimizer and the number of steps of the whole training"""
    epochs: int
    batch_size: int
    per_epoch: bool = False
    """whether the scheduler is stepped once an epoch, not once a batch"""
    label_smoothing: float = 0.0
    distort: Callable[..., Tensor] | None = None
    ema_decay: float = 0.0


def course_of(config: Config) -> Course:
    """Return the course of a Config, so that the conventional loop can train it."""
    c = config
    distort = partial(random_distortion, **c.distortion)
    return Course(
        build=partial(build, c.model, c.dropout),
        optimizer=partial(make_optimizer, config=c),
        scheduler=lambda optimizer, steps: make_scheduler(optimizer, c, steps),
        epochs=c.epochs,
        batch_size=c.batch_size,
        label_smoothing=c.label_smoothing,
        distort=distort if c.augments else None,
        ema_decay=c.ema_decay,
    )


class _Pictures(MNIST):
    """torchvision's own MNIST data set over images that are in memory already."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.data, self.targets = images.squeeze(1), labels
        self.transform, self.target_transform = transform, None


class Training:
    """One training by the conventional loop; iterate over it to take its steps one by one.

    `network` is what would be published: the averaged network where the course averages.
    """

    def __init__(self, course: Course, digits: Digits, seed: int = 0, way: Way = Way()) -> None:
        self.course, self.way = course, way
        self.train_ids, self.val_ids = digits.split("random")
        self.images, self.labels = digits.train_images, digits.train_labels.long()
        if way.floats and not way.loader:
            self.images = self.images.float() / 255
        self.steps_per_epoch = -(-len(self.train_ids) // course.batch_size)
        layout = torch.channels_last if way.channels_last else torch.contiguous_format
        with settings(0, seed):
            self.model = course.build().to(memory_format=layout)
            self.random = torch.get_rng_state()
        self.forward = torch.compile(self.model) if way.compiled else self.model
        self.optimizer = course.optimizer(self.model)
        for group in self.optimizer.param_groups:
            group["fused"] = way.fused
        self.average = None
        if course.ema_decay:
            average = get_ema_multi_avg_fn(course.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The network to evaluate."""
        return self.average.module if self.average else self.model

    def batches(self, ids: Tensor, shuffle: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(N, 1, 28, 28)` and labels `(N,)` of one pass over `ids`."""
        size, distort = self.course.batch_size, self.course.distort if shuffle else None
        if self.way.loader:
            steps = [transforms.ToTensor()]
            if distort:
                steps.append(lambda picture: distort(picture[None])[0])
            pictures = _Pictures(self.images[ids], self.labels[ids], transforms.Compose(steps))
            yield from DataLoader(pictures, size, shuffle=shuffle)
            return
        order = ids[torch.randperm(len(ids))] if shuffle else ids
        for chosen in order.split(size):
            batch = self.images[chosen]
            batch = batch if self.way.floats else batch.float() / 255
            yield distort(batch) if distort else batch, self.labels[chosen]

    def __iter__(self) -> Iterator[int]:
        """Train; yield the number of steps taken, after each."""
        with kept_memory() if self.way.keeps_memory else nullcontext():
            yield from self._steps()

    def _steps(self) -> Iterator[int]:
        total = self.course.epochs * self.steps_per_epoch
        scheduler = self.course.scheduler and self.course.scheduler(self.optimizer, total)
        done, running = 0, 0.0
        torch.set_flush_denormal(self.way.flush)
        torch.set_rng_state(self.random)
        self.model.train()
        for _ in range(self.course.epochs):
            for pixels, labels in self.batches(self.train_ids, shuffle=True):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.way.bfloat16):
                    logits = self.forward(pixels).float()
                smoothing = self.course.label_smoothing
                loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if self.average:
                    self.average.update_parameters(self.model)
                if scheduler and not self.course.per_epoch:
                    scheduler.step()
                running += loss.item() if self.way.reads_loss else loss.detach()
                done += 1
                yield done
            if scheduler and self.course.per_epoch:
                scheduler.step()

    def accuracy(self) -> float:
        """Return the validation accuracy in percent, by a pass of the same loop."""
        self.network.eval()
        right = 0
        with torch.inference_mode():
            for pixels, labels in self.batches(self.val_ids, shuffle=False):
                right += int((self.network(pixels).argmax(1) == labels).sum())
        self.network.train()
        return 100 * right / len(self.val_ids)


def curve(training: Training) -> Iterator[tuple[int, float, float]]:
    """Train to the end; yield epoch, seconds so far and validation accuracy after each epoch."""
    began = time.perf_counter()
    for step in training:
        if step % training.steps_per_epoch == 0:
            accuracy = training.accuracy()
            yield step // training.steps_per_epoch, time.perf_counter() - began, accuracy
