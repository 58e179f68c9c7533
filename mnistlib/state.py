"""The training state, in parts that each have a state dict."""

import copy
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from .config import Config
from .errors import ConfigError
from .evaluate import Evaluation
from .model import build
from .optim import make_optimizer, make_scheduler
from .sampler import Sampler


class WeightAverage:
    """Exponential moving average of a network's weights and BatchNorm statistics.

    Source: B. Polyak and A. Juditsky, SIAM J. Control Optim. 30 (1992) 838-855.
    torch's AveragedModel walks through all modules at each update, which would take a tenth of a
    small network's step.

    Args:
        model: the network in training; with a decay of 0 it serves as its own average.
        decay: decay per step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model) if decay else model
        # not from state_dict, which lists a weight that two layers share twice
        both = ([*m.parameters(), *m.buffers()] for m in (self.model, model))
        self.own, self.new = ([v.detach() for v in t if v.is_floating_point()] for t in both)

    def update(self) -> None:
        """Move the average towards the current weights; the first update copies them."""
        if self.decay:
            torch._foreach_lerp_(self.own, self.new, 1 - self.decay if self.steps else 1.0)
        self.steps += 1

    def renew_statistics(self, images: Tensor) -> None:
        """Compute BatchNorm's statistics for the averaged weights from images `(N, 1, 28, 28)`.

        An average of statistics belongs to no weights in particular. In deep networks with few
        channels the difference adds up from layer to layer (P. Izmailov et al., "Averaging weights
        leads to wider optima and better generalization", UAI 2018, section 3.2).
        """

        def batches() -> Iterator[Tensor]:
            for m in self.model.modules():
                if isinstance(m, nn.Dropout):  # update_bn has put all layers into training mode
                    m.eval()
            yield from images.chunk(math.ceil(len(images) / 500))

        update_bn(batches(), self.model.eval(), next(self.model.parameters()).device)

    def state_dict(self) -> dict[str, Any]:
        """Return the average and the number of updates; an empty dict without averaging."""
        return {"steps": self.steps, "weights": self.model.state_dict()} if self.decay else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the average and the number of updates."""
        if self.decay:
            self.steps = state["steps"]
            self.model.load_state_dict(state["weights"])


class RandomState:
    """Random numbers of a run: torch's own on its device, and a generator for augmentation."""

    def __init__(self, seed: int, device: torch.device) -> None:
        # on the device, because waiting for numbers from the host takes time
        self.augmentation = torch.Generator(device).manual_seed(seed + 2**31)
        self.device: Any = torch if device.type == "cpu" else torch.get_device_module(device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of both generators."""
        device, own = self.device.get_rng_state(), self.augmentation.get_state()
        return {"device": device, "augmentation": own}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the state of both generators."""
        self.device.set_rng_state(state["device"])
        self.augmentation.set_state(state["augmentation"])


class Progress:
    """Finished steps of a run, and what was measured in them."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.step = 0  # finished steps of the whole run
        self.seconds = 0.0
        self.loss = torch.zeros(steps, device=device)
        self.correct = torch.zeros(steps, dtype=torch.int32, device=device)
        self.history: list[dict[str, float]] = []
        self.evals: list[list[float]] = []  # step, validation error in percent

    @property
    def ended(self) -> bool:
        """Whether all steps are done."""
        return self.step == len(self.loss)

    def record(self, loss: Tensor, correct: Tensor) -> None:
        """Store loss and number of correct predictions of a step; both stay on the device."""
        self.loss[self.step], self.correct[self.step] = loss, correct
        self.step += 1

    def curve(self) -> dict[str, list[float]]:
        """Return the loss of every step, and the validation errors with their steps."""
        steps, errors = [step for step, _ in self.evals], [error for _, error in self.evals]
        return {"loss": self.loss[: self.step].tolist(), "eval_step": steps, "eval_error": errors}

    def state_dict(self) -> dict[str, Any]:
        """Return everything, losses and correct predictions of the finished steps only."""
        taken = {"loss": self.loss[: self.step], "correct": self.correct[: self.step]}
        return vars(self) | taken

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the progress of a run."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = list(state["history"])
        self.evals = [[step, error] for step, error in state["evals"]]
        self.loss.narrow(0, 0, self.step)[:] = state["loss"]  # raises if there are not as many
        self.correct[: self.step] = state["correct"]


def history_row(
    epoch: int, loss: float, accuracy: float, lr: float, seconds: float, seen: Evaluation | None
) -> dict[str, float]:
    """Return what is kept of an epoch, the only place that says what a row of a history holds.

    Args:
        epoch: counted from 1.
        loss: mean loss on the training images.
        accuracy: share of them that were classified correctly, percent.
        lr: learning rate after the epoch.
        seconds: since the run began.
        seen: evaluation on the validation images; None: nan in the row.
    """
    val_loss, val_acc = (seen.loss, seen.accuracy) if seen else (math.nan, math.nan)
    train = {"train_loss": loss, "val_loss": val_loss, "train_acc": accuracy, "val_acc": val_acc}
    return {"epoch": epoch, **train, "lr": lr, "seconds": seconds}


def check_batches(config: Config, n_train: int) -> None:
    """Refuse a batch or slice of one image, and warn where hard-example mining has no effect.

    Raises:
        ConfigError: an image would be alone: it has no variance for BatchNorm to divide by.
    """
    size, batch = config.epoch_images or n_train, config.batch_size
    for images in (min(batch, size), (size - 1) % batch + 1):
        part = math.ceil(images / config.slices)
        if 1 in (part, images % part):
            fault = f"epochs of {size:,} images with batch_size {batch} and slices {config.slices}"
            remedy = "BatchNorm needs two; change one of the three numbers"
            raise ConfigError(f"{fault} would have a batch or slice of one image: {remedy}")
    if config.focus and size >= n_train:
        remedy = f"epoch_images must be below the {n_train:,} training images"
        warnings.warn(f"focus is {config.focus:g} without effect: {remedy}", stacklevel=2)


class TrainingState:
    """All parts of a run that change; the rest follows from the Config and the digits.

    The initial weights are drawn from torch's random state.
    """

    def __init__(self, config: Config, n_train: int, device: torch.device) -> None:
        check_batches(config, n_train)
        steps = config.epochs * config.steps_per_epoch(n_train)
        self.model = build(config.model, config.dropout).to(device)
        self.model.to(memory_format=torch.channels_last)
        self.average = WeightAverage(self.model, config.ema_decay)
        self.optimizer = make_optimizer(self.model, config)
        # before any optimizer state is loaded: the other order silently changes the learning rate
        self.scheduler = make_scheduler(self.optimizer, config, steps)
        size = config.epoch_images or n_train
        self.sampler = Sampler(n_train, size, config.focus, config.seed, device)
        self.random = RandomState(config.seed, device)
        self.progress = Progress(steps, device)

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the state of each part by name; tensors are shared, not copied."""
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state: dict[str, dict[str, Any]]) -> None:
        """Restore each part, so that the run continues to the same bits."""
        for name, part in vars(self).items():
            part.load_state_dict(state[name])
