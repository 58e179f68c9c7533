"""What a run changes from step to step: all of it can be taken down, and put back bit for bit."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .config import Config, ConfigError
from .model import build
from .optimizers import make_optimizer, make_scheduler


def pick_device(name: str) -> torch.device:
    """Return the device of a Config: `auto` is the accelerator torch sees, else the CPU.

    Raises:
        ConfigError: this machine or this torch has no such device.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    if name != "cpu" and (found is None or found.type != name):
        has = f"cpu and {found.type}" if found else "cpu alone"
        raise ConfigError(f"device is {name!r}, but torch finds {has} here; use one of these")
    return torch.device(name)


class TrainingState:
    """Everything that changes from step to step, and nothing else: what a checkpoint must hold."""

    def __init__(self, config: Config, device: torch.device, n_train: int) -> None:
        self.config, self.device = config, device
        self.epoch_images = config.epoch_images or n_train
        self.steps_per_epoch = math.ceil(self.epoch_images / config.batch_size)
        self.total_steps = steps = config.epochs * self.steps_per_epoch
        self.model = build(config.model, config.dropout).to(device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, config)
        # before any optimizer state is loaded: the other order silently changes the rate
        self.scheduler = make_scheduler(self.optimizer, config, steps)
        self.average = None
        if config.ema_decay:
            # with buffers, else BatchNorm statistics are copied, not averaged
            self.average = AveragedModel(self.model, use_buffers=True)
            averaged, current = self.average.module.state_dict(), self.model.state_dict()
            self._pairs = [(v, current[k]) for k, v in averaged.items() if v.is_floating_point()]
        self.shuffle = torch.Generator().manual_seed(config.seed)
        # draws where it is used: numbers from the host would have to be waited for
        self.distort = torch.Generator(device).manual_seed(config.seed + 2**31)
        self.order_state = self.shuffle.get_state()  # from which the current epoch's order is drawn
        # what `focus` goes by, in half the bytes of a float: to rank images, three digits do
        self.last_loss = torch.full((n_train,), math.inf, dtype=torch.bfloat16)
        self.drawn: Tensor = torch.arange(0)  # the epoch's images, positions in the training set
        self.step = 0  # finished steps of the whole run
        self.seconds = 0.0
        self.loss = torch.zeros(steps, device=device)
        self.correct = torch.zeros(steps, dtype=torch.int32, device=device)
        self.epoch_loss = torch.zeros(self.epoch_images, dtype=torch.bfloat16, device=device)
        self.history: list[dict[str, float]] = []
        self.evals: list[list[float]] = []  # step, validation error in percent

    def draw_order(self, n: int) -> Tensor:
        """Draw the epoch's indices below `n`: each once, or for a longer epoch in fresh passes.

        With `focus`, a shorter epoch takes that share of its images from those whose loss was
        greatest when they were last seen, unseen ones before all, and the rest from the others.
        """
        self.order_state = self.shuffle.get_state()
        size = self.epoch_images
        orders = [torch.randperm(n, generator=self.shuffle) for _ in range(math.ceil(size / n))]
        self.drawn = torch.cat(orders)[:size]
        if self.config.focus and size < n:
            losses = self.last_loss[orders[0]].float()
            # a stable sort of a random order: equal losses, as of images not yet seen, stay random
            ranked = orders[0][losses.argsort(descending=True, stable=True)]
            hard, others = ranked.split([k := round(self.config.focus * size), n - k])
            others = others[torch.randperm(n - k, generator=self.shuffle)[: size - k]]
            order = torch.randperm(size, generator=self.shuffle)
            self.drawn = torch.cat([hard, others])[order]
        return self.drawn

    def update_average(self) -> None:
        """Move the averaged weights towards the current ones, after a step.

        The class's own update looks through all modules each time, which in a small network
        takes as long as a tenth of the step; only its first one, which copies, is used.
        """
        if self.average is None:
            return
        if self.average.n_averaged == 0:
            self.average.update_parameters(self.model)
            return
        for averaged, current in self._pairs:
            averaged.lerp_(current, 1 - self.config.ema_decay)
        self.average.n_averaged += 1

    def end_epoch(self) -> None:
        """Remember the losses that the epoch's images had."""
        if self.config.focus:
            self.last_loss[self.drawn] = self.epoch_loss.cpu()

    @property
    def published(self) -> nn.Module:
        """The network that is evaluated: the averaged one where the recipe averages."""
        return self.average.module if self.average else self.model

    def published_weights(self, state: dict[str, Any]) -> dict[str, Tensor]:
        """Return the published network's weights out of a `state()`, without a second copy."""
        if self.average is None:
            return state["weights"]
        mark = "module."
        return {k.removeprefix(mark): v for k, v in state["average"].items() if k.startswith(mark)}

    def state(self) -> dict[str, Any]:
        """Return a copy of all of it as tensors and plain values."""
        state = {
            "weights": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "rng": torch.get_rng_state(),
            "device_rng": _device_rng(self.device),
            "order": self.order_state
            if self.step % self.steps_per_epoch
            else self.shuffle.get_state(),
            "distort": self.distort.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss[: self.step],
            "correct": self.correct[: self.step],
            "history": self.history,
            "evals": self.evals,
        }
        if self.config.focus:  # others would carry 100 kB for nothing
            state |= {"last_loss": self.last_loss, "epoch_loss": self.epoch_loss}
        return copy.deepcopy(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Become the state that `state()` returned."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average:
            self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        _device_rng(self.device, state["device_rng"])
        self.shuffle.set_state(state["order"])
        self.distort.set_state(state["distort"])
        if self.config.focus:
            self.last_loss.copy_(state["last_loss"])
            self.epoch_loss.copy_(state["epoch_loss"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.loss[: self.step] = state["loss"]
        self.correct[: self.step] = state["correct"]
        self.history = copy.deepcopy(state["history"])
        self.evals = copy.deepcopy(state["evals"])


def _device_rng(device: torch.device, state: Tensor | None = None) -> Tensor | None:
    """Return, or set, the random state of an accelerator; the CPU's is torch's own."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    if state is not None:
        module.set_rng_state(state)
    return module.get_rng_state()
