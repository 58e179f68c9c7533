"""The training loop, on tensors in memory."""

import copy
import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .augment import augment
from .checkpoint import (
    checkpoint_content,
    latest_checkpoint,
    load_model,
    prune_checkpoints,
    released_checkpoint,
    restore,
    save_checkpoint,
)
from .config import Config, configure
from .data import Digits
from .distill import distillation_loss, load_pool
from .errors import CheckpointError, ConfigError, TrainingError
from .evaluate import Evaluation, evaluate
from .optim import learning_rate, learning_rates
from .paths import only_here, runs_folder
from .runtime import pick_device, run_context, stop_on_signal, versions
from .slices import Slices, side_by_side
from .state import TrainingState, history_row

if TYPE_CHECKING:
    import pandas as pd

HEADER = "Epoch  Train Loss  Val Loss  Train Acc   Val Acc        LR   Seconds"
ROW = (
    "{epoch:5d}{train_loss:12.4f}{val_loss:10.4f}{train_acc:10.2f}%{val_acc:9.2f}%{lr:10.6f}"
    "{seconds:10.1f}"
)


@dataclass(repr=False)
class Run:
    """A training run: its Config, its measurements, and the network."""

    config: Config
    source: str
    """data source: `mnist` or `sample`"""
    model: nn.Module
    """with averaged weights if the Config averages, else with the last; on the CPU, in eval mode"""
    history: list[dict[str, float]]
    """one dict per epoch: epoch, train_loss, val_loss, train_acc, val_acc (percent), lr, seconds"""
    curve: dict[str, list[float]]
    """`loss` and `lr` of each step; validation `eval_error` in percent at the steps `eval_step`"""
    seconds: float
    """training time, including the evaluations of the loop"""
    n_val: int
    """validation images"""
    checkpoint: Path | None
    """the latest checkpoint; None if none was saved"""
    versions: dict[str, str]
    """of torch, numpy, Python and platform, the device and the number of CPU threads; where all but
    this number are equal, so is every bit of the result"""
    signal: int = 0
    """number of the signal that interrupted the run, SIGINT or SIGTERM; 0: not interrupted"""

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run early."""
        return self.signal != 0

    @property
    def parameters(self) -> int:
        """Trainable parameters of the network."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def table(self) -> "pd.DataFrame":
        """The history as a table, a row per epoch."""
        import pandas as pd  # here, because training does not need it

        return pd.DataFrame(self.history).set_index("epoch")

    def __repr__(self) -> str:
        """Describe the result in one line."""
        done = f"after {len(self.history)} of {self.config.epochs} epochs"
        result = f"trained {done}, not validated"
        if self.history and not math.isnan(error := 100 - self.history[-1]["val_acc"]):
            result = f"{error:.2f} % error on {self.n_val:,} validation images {done}"
        result += " of the embedded SAMPLE" if self.source == "sample" else ""
        result += ", INTERRUPTED" if self.interrupted else ""
        cost = f"{self.seconds:.0f} s, {self.parameters:,} parameters"
        return f"{self.config.model}: {result}, {cost}"


def train(
    config: Config | str,
    digits: Digits,
    resume: str | Path | None = None,
    *,
    folder: Path | None = None,
    eval_every: int | None = 0,
    save: bool = True,
    verbose: bool = True,
) -> Run:
    """Train a network and return the Run.

    Ctrl-C and SIGTERM stop it after the current step and save a checkpoint. SIGTERM is then
    repeated, so that it ends a program that does not handle it. A run that is resumed from a
    checkpoint gives the same bits as an uninterrupted one.

    Args:
        config: network and settings, or the name of a recipe.
        digits: data.
        resume: a checkpoint of the same run, or its folder; a finished run is returned as it is.
        folder: folder of the checkpoints; by default the run's own below `runs_folder()`.
        eval_every: validate also after every so many steps; 0: only after each epoch; None: only
            after the last epoch.
        save: write a checkpoint after each epoch.
        verbose: print a table row per epoch, and a progress bar on a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged or belongs to another run, or none can be saved,
            as when another process is training the same run there.
        ConfigError: the device or the pool is not available, or a batch would have one image.
        DatasetError: the split needs the writers, which are unknown.
        TrainingError: the loss or a weight is no longer finite.
    """
    config = configure(config) if isinstance(config, str) else config
    device = pick_device(config.device)
    folder = folder or runs_folder() / config.run_name(digits.source)
    train_ids, val_ids = digits.split(config.split)
    val = digits.train_images[val_ids], digits.train_labels[val_ids]
    images, labels = digits.train_images.to(device), digits.train_labels.to(device)
    per_epoch = config.steps_per_epoch(len(train_ids))
    # threads only pay on a CPU
    threads = (config.threads or torch.get_num_threads()) if device.type == "cpu" else 1
    about = versions() | {"device": device.type, "threads": str(threads)}
    lock = f".training-{config.hash(digits.source)}"  # other runs may save in the same folder
    held = only_here(folder, lock, CheckpointError, wait=False) if save else nullcontext()
    with held, run_context(config.seed), side_by_side(threads) as each, stop_on_signal() as stopped:
        state = TrainingState(config, len(train_ids), device)
        if config.start:
            start_from(config, state)
        path = latest_checkpoint(resume, config.hash(digits.source)) if resume else None
        if path:
            restore(state, path, config, digits.source)
        progress, network = state.progress, state.average.model
        slices = Slices(state.model, config.slices, each)
        pool = load_pool(config, digits, device) if config.pool and not progress.ended else None
        if verbose and not progress.ended:
            print(HEADER)
        while not (progress.ended or stopped):
            began = time.perf_counter() - progress.seconds
            order = train_ids[state.sampler.sample_epoch()].to(device)
            batches = order.split(config.batch_size)[progress.step % per_epoch :]
            # disable=None: shown on a terminal only
            for ids in tqdm(batches, leave=False, disable=None if verbose else True):
                if pool:
                    batch, targets = pool.draw(ids, state.random.augmentation)
                else:  # as images[ids], in a thirtieth of the time
                    batch, targets = images.index_select(0, ids), None
                train_step(state, slices, config, batch, labels[ids].long(), targets)
                if eval_every and progress.step % eval_every == 0 and len(val_ids):
                    progress.evals.append([progress.step, evaluate(network, *val, threads).error])
                if stopped:
                    break
            check_finite(state, config)
            if progress.ended and config.norm_images:
                state.average.renew_statistics(digits.train_images[train_ids[: config.norm_images]])
            whole_epoch = progress.step % per_epoch == 0
            due = whole_epoch and len(val_ids) and (eval_every is not None or progress.ended)
            seen = evaluate(network, *val, threads) if due else None
            progress.seconds = time.perf_counter() - began
            if whole_epoch:
                state.sampler.end_epoch()
                progress.history.append(epoch_row(state, config, per_epoch, seen))
                if verbose:
                    shown = ROW.format(**progress.history[-1])  # nan: not validated
                    print(shown.replace("nan%", "   -").replace("nan", "  -"), flush=True)
            if save:
                path = save_state(state, config, digits, about, folder)
                prune_checkpoints(path, finished=progress.ended)
    model = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()
    curve = progress.curve() | {"lr": learning_rates(config, per_epoch)[: progress.step]}
    run = Run(
        config, digits.source, model, progress.history, curve, progress.seconds, len(val_ids), path,
        about, signal=0 if progress.ended else stopped[0],
    )  # fmt: skip
    if signal.SIGTERM in stopped:  # it was meant for the program, which may be about to train more
        signal.raise_signal(signal.SIGTERM)
    return run


def start_from(config: Config, state: TrainingState) -> None:
    """Give the networks of a run that begins the weights of the released checkpoint `start`.

    Raises:
        CheckpointError: there is none.
        ConfigError: it has other tensors.
    """
    weights = load_model(released_checkpoint(config.start)).state_dict()
    try:
        for model in (state.model, state.average.model):
            model.load_state_dict(weights)
    except RuntimeError:
        fault = f"start is {config.start!r}, which has other tensors than model {config.model!r}"
        raise ConfigError(f"{fault}; name a recipe with the same network") from None


def train_step(
    state: TrainingState,
    slices: Slices,
    config: Config,
    images: Tensor,
    labels: Tensor,
    targets: Tensor | None = None,
) -> None:
    """Take one optimizer step on uint8 images `(N, 1, 28, 28)` with labels `(N,)` int64.

    With targets `(N, 10)`, the answers of teachers, the loss is that of distillation. What is
    recorded and ranks the images is still their loss with the label. Images without a label, which
    follow those with one, show no digit.
    """
    if config.augmentation:  # random numbers for the whole batch, whatever the slices
        draw = state.random.augmentation
        images = augment(images, **config.augmentation, generator=draw)
    each = "none" if config.focus or config.slices > 1 else "mean"
    loss = partial(F.cross_entropy, label_smoothing=config.label_smoothing, reduction=each)
    if targets is None:
        losses, logits = slices.backward(images, labels, loss)
    else:
        unlabelled = torch.arange(len(images) - len(labels), device=labels.device) % 10  # all alike
        hard = torch.cat((labels, unlabelled))
        truth = torch.cat((targets, hard[:, None]), dim=1)  # (N, 11)
        logits = slices.backward(images, truth, distillation_loss)[1][: len(labels)]
        losses = F.cross_entropy(logits, labels, reduction="none")
    state.optimizer.step()
    state.scheduler.step()
    state.average.update()
    if config.focus:
        state.sampler.record(losses)
    state.progress.record(losses.mean(), (logits.argmax(1) == labels).sum())


def check_finite(state: TrainingState, config: Config) -> None:
    """Raise TrainingError if a loss or a weight is not finite; the message names the step."""
    losses = state.progress.loss[: state.progress.step]
    bad = (~losses.isfinite()).nonzero().flatten()
    tensors = [*state.model.state_dict().values(), *state.average.model.state_dict().values()]
    if len(bad) or not all(v.isfinite().all() for v in tensors):
        # the last update may break the weights without a loss that shows it
        what, step = ("loss is", int(bad[0]) + 1) if len(bad) else ("weights are", len(losses))
        raise TrainingError(
            f"the {what} not finite at step {step} of {len(state.progress.loss)}; the likely cause "
            f"is too high a learning rate (max_lr is {config.max_lr:g}): try a tenth of it. The "
            "checkpoints of earlier epochs are unchanged"
        )


def epoch_row(
    state: TrainingState, config: Config, steps: int, seen: Evaluation | None
) -> dict[str, float]:
    """Return the history row of the epoch that just ended, which had so many steps."""
    progress, n = state.progress, state.sampler.size
    sizes = torch.full((steps,), float(config.batch_size), device=progress.loss.device)
    sizes[-1] = n - (steps - 1) * config.batch_size  # so that every image has the same weight
    taken = slice(progress.step - steps, progress.step)
    loss = float((progress.loss[taken] * sizes).sum()) / n
    accuracy, lr = 100 * int(progress.correct[taken].sum()) / n, learning_rate(state.scheduler)
    return history_row(progress.step // steps, loss, accuracy, lr, progress.seconds, seen)


def save_state(
    state: TrainingState, config: Config, digits: Digits, versions: dict[str, str], folder: Path
) -> Path:
    """Save a checkpoint with what resuming needs; one without held-out images is tested at last."""
    progress, network, test = state.progress, state.average.model, math.nan
    if config.split == "none" and progress.ended and digits.test:
        test = evaluate(network, *digits.test).accuracy
    content = checkpoint_content(config, digits.source, network, progress.history, test)
    content["optimizer_state_dict"] = state.optimizer.state_dict()
    return save_checkpoint(content | {"training": state.state_dict(), "versions": versions}, folder)
