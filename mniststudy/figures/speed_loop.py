"""Notebook 08's baseline: the training loop that most tutorials write.

Nothing else of the package trains with it. Its habits can be changed one by one, down to the loop
of `train.py`; `speed.py` times each step.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, ToTensor, v2

from mnistlib import Config, Digits, augment, build
from mnistlib.optim import make_optimizer, make_scheduler
from mnistlib.runtime import keep_freed_memory
from mnistlib.state import WeightAverage

# what the loop may do otherwise; all but half precision (bfloat16) only round differently
KEPT = (
    "tensors in memory",  # indexed; tutorials load and transform one picture at a time
    "kept as uint8",  # made floats batch by batch
    "loss read at the end",  # not after every step, as for a running mean
    "channels_last",
    "fused optimizer",  # all parameters in one kernel, not in a Python loop
    "freed memory kept",  # by the process for the next step, see `keep_freed_memory`
)
NOT_KEPT = ("bfloat16", "denormals flushed", "torch.compile")


class _Pictures(MNIST):
    """torchvision's own MNIST data set over images that are in memory already."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.data, self.targets = images.squeeze(1), labels
        self.transform, self.target_transform = transform, None


Parts = tuple[nn.Module, torch.optim.Optimizer, LRScheduler | None]
"""network, optimizer and learning-rate schedule, which is stepped once per batch"""
SCALE = v2.ToDtype(torch.float32, scale=True)  # uint8 pixels to 0..1; floats stay


def config_parts(config: Config, steps_per_epoch: int) -> Parts:
    """Make the parts of a training as a Config describes them."""
    model = build(config.model, config.dropout)
    optimizer = make_optimizer(model, config)
    return model, optimizer, make_scheduler(optimizer, config, config.epochs * steps_per_epoch)


class TutorialLoop:
    """One training by the tutorial's loop; iterate over it to take its steps one by one.

    Args:
        config: what to train and how.
        digits: what to train on.
        changes: names in `KEPT` and `NOT_KEPT`: what is done otherwise than tutorials do.
        seed: of torch's random state, from which weights, order, dropout and augmentation come.
        parts: makes network, optimizer and schedule; a published example has its own.
    """

    def __init__(
        self,
        config: Config,
        digits: Digits,
        changes: Collection[str] = (),
        seed: int = 0,
        parts: Callable[[Config, int], Parts] = config_parts,
    ) -> None:
        self.config, self.changes = config, changes
        self.train_ids, self.val_ids = digits.split()
        self.images, self.labels = digits.train_images, digits.train_labels.long()
        if "tensors in memory" in changes and "kept as uint8" not in changes:
            self.images = self.images.float() / 255
        self.steps_per_epoch = -(-len(self.train_ids) // config.batch_size)
        torch.manual_seed(seed)
        self.model, self.optimizer, self.scheduler = parts(config, self.steps_per_epoch)
        if "channels_last" in changes:
            self.model.to(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["fused"] = "fused optimizer" in changes
        self.average = WeightAverage(self.model, config.ema_decay)

    def batches(self, ids: Tensor, training: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images `(N, 1, 28, 28)` and labels `(N,)` of one pass over `ids`."""
        size, amounts = self.config.batch_size, self.config.augmentation if training else {}
        if "tensors in memory" in self.changes:
            for chosen in (ids[torch.randperm(len(ids))] if training else ids).split(size):
                yield augment(self.images[chosen], **amounts, generator=None), self.labels[chosen]
            return
        transform: Callable = ToTensor()
        if amounts:
            transform = Compose(
                [transform, lambda x: augment(x[None], **amounts, generator=None)[0]]
            )
        pictures = _Pictures(self.images[ids], self.labels[ids], transform)
        yield from DataLoader(pictures, size, shuffle=training)

    def __iter__(self) -> Iterator[int]:
        """Train; yield the number of steps taken, after each."""
        forward = torch.compile(self.model) if "torch.compile" in self.changes else self.model
        epochs = (self.batches(self.train_ids, training=True) for _ in range(self.config.epochs))
        running_loss: float | Tensor = 0.0
        with ExitStack() as stack:
            if "freed memory kept" in self.changes:
                stack.enter_context(keep_freed_memory())
            stack.callback(torch.set_flush_denormal, False)
            torch.set_flush_denormal("denormals flushed" in self.changes)
            for step, (pixels, labels) in enumerate(chain.from_iterable(epochs), 1):
                with torch.autocast("cpu", torch.bfloat16, enabled="bfloat16" in self.changes):
                    logits = forward(pixels).float()
                loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.average.update()
                if self.scheduler:
                    self.scheduler.step()
                at_end = "loss read at the end" in self.changes
                running_loss += loss.detach() if at_end else loss.item()
                yield step

    @torch.inference_mode()
    def accuracy(self) -> float:
        """Return the validation accuracy in percent.

        By a pass of the same loop, not by `evaluate`, because this pass is timed, too.
        """
        network, right = self.average.model.eval(), 0
        for pixels, labels in self.batches(self.val_ids, training=False):
            right += int((network(pixels).argmax(1) == labels).sum())
        network.train()
        return 100 * right / len(self.val_ids)


def keras_parts(config: Config, steps_per_epoch: int) -> Parts:
    """Make network (34,826 parameters) and optimizer of Keras' example mnist_convnet.

    As published in github.com/keras-team/keras-io, examples/vision; Adam as it comes.
    """
    model = nn.Sequential(
        SCALE,
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 32, 13, 13)
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 64, 5, 5)
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(1600, 10),
    )  # fmt: skip
    return model, torch.optim.Adam(model.parameters(), 1e-3, eps=1e-7), None


def pytorch_parts(config: Config, steps_per_epoch: int) -> Parts:
    """Make network (1,199,882 parameters), optimizer and schedule of PyTorch's example mnist.

    As published in github.com/pytorch/examples: Adadelta, rate 1, times 0.7 after each epoch.
    """
    model = nn.Sequential(
        SCALE, v2.Normalize((0.1307,), (0.3081,)),
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # -> (N, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # -> (N, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adadelta(model.parameters(), 1.0)
    return model, optimizer, StepLR(optimizer, steps_per_epoch, 0.7)
