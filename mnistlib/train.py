"""The training loop: OneCycleLR on tensors in memory, one table row per epoch."""

import copy
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import random_distortion
from .checkpoint import save_checkpoint, versions
from .config import Config, runs_folder
from .data import Digits
from .evaluate import evaluate
from .optimizers import learning_rates, rate
from .process import Table, collected_interrupts, settings
from .resume import find_checkpoint, retire, take_up
from .state import TrainingState, pick_device

CHECK_EVERY = 50  # steps between looks at the loss on a CPU; elsewhere a look waits for the device


class TrainingError(Exception):
    """Training that cannot go on: names the step and the likely cause."""


@dataclass(repr=False)
class Run:
    """A training run: what was asked, what came out, and the network."""

    config: Config
    source: str
    """data source: `mnist` or `sample`"""
    model: nn.Module
    """the published weights: the averaged ones where the recipe averages; on the CPU, eval mode"""
    history: list[dict[str, float]]
    """a dict per epoch: epoch, train_loss, val_loss, train_acc, val_acc (percent), lr, seconds"""
    curve: dict[str, list[float]]
    """per step: `loss`, `lr`; at the steps in `eval_step` the validation `eval_error` (percent)"""
    seconds: float
    """training time, the evaluations the loop makes included"""
    n_val: int
    """validation images"""
    checkpoint: Path | None
    """the latest checkpoint; None if the run ended before the first"""
    device: str
    """type of the device: cpu, cuda, mps, xpu"""
    threads: int
    """CPU threads; results are bit-equal only at the same number"""
    signal: int = 0
    """number of the signal that interrupted it, SIGINT or SIGTERM; 0: it ran to its end"""

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped before its end."""
        return bool(self.signal)

    @property
    def parameters(self) -> int:
        """Trainable parameters of the network."""
        return sum(p.numel() for p in self.model.parameters())

    def __repr__(self) -> str:
        """Say it in one line."""
        done = len(self.history)
        text = f"{self.config.model}: "
        if done and self.n_val:
            on = "the sample's " if self.source == "sample" else ""
            error = 100 - self.history[-1]["val_acc"]
            text += f"{error:.2f} % error on {on}{self.n_val:,} validation images after "
        text += f"{done} of {self.config.epochs} epochs, {self.seconds:.0f} s, "
        text += f"{self.parameters:,} parameters"
        return text + (", interrupted" if self.interrupted else "")


def train(
    config: Config,
    digits: Digits,
    resume: str | Path | None = None,
    *,
    folder: Path | None = None,
    eval_every: int | None = 0,
    save: bool = True,
    verbose: bool = True,
) -> Run:
    """Train the network of a Config and return the Run; a checkpoint is saved after every epoch.

    Ctrl-C or SIGTERM ends the run after the step it is in, with a checkpoint and a Run marked
    interrupted; a kill costs what came after the last epoch. At a fixed thread count a resumed run
    ends with the bits of one never stopped.

    Args:
        config: what to train, and how.
        digits: the images; `config.split` says which of them validate.
        resume: checkpoint of the same config and data source, or a run's folder: the latest in it.
        folder: where checkpoints go; by default one of the run's own under `runs_folder()`.
        eval_every: also evaluate every so many steps, for `Run.curve`; 0: once an epoch; None:
            only at the end, with nan in the history of the epochs before.
        save: write checkpoints; without them a run cannot be resumed.
        verbose: print one table row per epoch.

    Raises:
        ConfigError: the device cannot be used.
        CheckpointError: `resume` is damaged or of another run, or nothing can be saved.
        TrainingError: the loss is no longer finite.
    """
    device = pick_device(config.device)
    folder = folder or runs_folder() / config.run_name(digits.source)
    train_ids, val_ids = digits.split(config.split)
    saved: list[Path] = []  # checkpoints of this run, the latest last
    with settings(config.threads, config.seed), collected_interrupts() as interrupted:
        t = TrainingState(config, device, len(train_ids))
        if resume is not None:
            saved = take_up(t, find_checkpoint(resume), digits.source)
        images, labels = digits.train_images.to(device), digits.train_labels.to(device)
        val = digits.train_images[val_ids], digits.train_labels[val_ids]
        kept = t.state()
        threads = torch.get_num_threads()
        table = Table(verbose and t.step < t.total_steps)
        try:
            while t.step < t.total_steps and not interrupted:
                begin = time.perf_counter() - t.seconds
                order = train_ids[t.draw_order(len(train_ids))].to(device)
                for ids in order.split(config.batch_size)[t.step % t.steps_per_epoch :]:
                    _step(t, images[ids], labels[ids])
                    if eval_every and t.step % eval_every == 0 and len(val_ids):
                        t.evals.append([t.step, evaluate(t.published, *val).error])
                    if t.step % CHECK_EVERY == 0:
                        if device.type == "cpu":  # others are not waited for within an epoch
                            _check_finite(t)
                        table.progress(t.step, t.steps_per_epoch)
                    if interrupted:
                        break
                _check_finite(t)
                ended = t.step % t.steps_per_epoch == 0
                if ended:
                    t.end_epoch()
                due = eval_every is not None or t.step == t.total_steps
                row = _epoch_row(t, val if due else (val[0][:0], val[1][:0])) if ended else {}
                t.seconds = time.perf_counter() - begin
                if ended:
                    t.history.append(row | {"seconds": t.seconds})
                    table.row(t.history[-1])
                now = t.state()
                if save:  # `kept` and the checkpoint move together, also if a save is torn apart
                    saved.append(_save(now, t, digits, folder))
                kept = now
                retire(saved, folder, finished=t.step == t.total_steps)
        except KeyboardInterrupt:  # a second Ctrl-C: back to what the last checkpoint holds
            interrupted.append(signal.SIGINT)
            t.restore(kept)
    return Run(
        config=config,
        source=digits.source,
        model=copy.deepcopy(t.published).to("cpu", memory_format=torch.contiguous_format).eval(),
        history=t.history,
        curve={
            "loss": t.loss[: t.step].tolist(),
            "lr": learning_rates(config, t.steps_per_epoch)[: t.step],
            "eval_step": [step for step, _ in t.evals],
            "eval_error": [error for _, error in t.evals],
        },
        seconds=t.seconds,
        n_val=len(val_ids),
        checkpoint=saved[-1] if saved else None,
        device=device.type,
        threads=threads,
        signal=interrupted[0] if t.step < t.total_steps else 0,
    )


def _step(t: TrainingState, pixels: Tensor, labels: Tensor) -> None:
    """Take one optimizer step on uint8 images `(N, 1, 28, 28)` with labels `(N,)`."""
    c = t.config
    if c.augments:
        pixels = pixels.float() / 255
        pixels = random_distortion(pixels, **c.distortion, generator=t.distort)
    labels = labels.long()
    logits = t.model(pixels)  # (N, 1, 28, 28) -> (N, 10)
    each = "none" if c.focus else "mean"  # the mean of one is itself, to the last bit
    losses = F.cross_entropy(logits, labels, label_smoothing=c.label_smoothing, reduction=each)
    loss = losses.mean()
    t.optimizer.zero_grad()
    loss.backward()
    t.optimizer.step()
    t.scheduler.step()
    t.update_average()
    if c.focus:
        begin = t.step % t.steps_per_epoch * c.batch_size
        t.epoch_loss[begin : begin + len(labels)] = losses.detach()
    t.loss[t.step] = loss.detach()  # stays on the device: nothing here waits for it
    t.correct[t.step] = (logits.argmax(1) == labels).sum()
    t.step += 1


def _check_finite(t: TrainingState) -> None:
    """Stop a run whose loss or weights are no longer finite, naming the first such step."""
    bad = (~torch.isfinite(t.loss[: t.step])).nonzero().flatten()
    step = int(bad[0]) + 1 if len(bad) else t.step
    tensors = [*t.model.state_dict().values(), *t.published.state_dict().values()]
    if len(bad) or not all(torch.isfinite(v).all() for v in tensors):
        what = "loss is" if len(bad) else "weights are"  # the last update may break them unseen
        raise TrainingError(
            f"the {what} not finite at step {step} of {t.total_steps}; the likely "
            f"cause is too high a learning rate (max_lr is {t.config.max_lr:g}): try a tenth of "
            "it. The checkpoints of earlier epochs are as they were"
        )


def _epoch_row(t: TrainingState, val: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Return the history row of the epoch that just ended; nan where nothing is validated."""
    n, steps = t.epoch_images, t.steps_per_epoch
    sizes = torch.full((steps,), float(t.config.batch_size), device=t.device)
    sizes[-1] = n - (steps - 1) * t.config.batch_size
    seen = evaluate(t.published, *val) if len(val[0]) else None
    return {
        "epoch": t.step // steps,
        "train_loss": float((t.loss[t.step - steps : t.step] * sizes).sum()) / n,
        "val_loss": seen.loss if seen else math.nan,
        "train_acc": 100 * int(t.correct[t.step - steps : t.step].sum()) / n,
        "val_acc": seen.accuracy if seen else math.nan,
        "lr": rate(t.scheduler),
    }


def _save(kept: dict[str, Any], t: TrainingState, digits: Digits, folder: Path) -> Path:
    """Save a checkpoint and return its path."""
    val_acc = t.history[-1]["val_acc"] if t.history else math.nan
    accuracy, kind = val_acc, "none" if math.isnan(val_acc) else "validation"
    if t.config.split == "none" and t.step == t.total_steps and digits.test_images is not None:
        accuracy = evaluate(t.published, digits.test_images, digits.test_labels).accuracy
        kind = "test"
    content = {
        "config": asdict(t.config),
        "source": digits.source,
        "history": kept["history"],
        "accuracy": accuracy,
        "accuracy_kind": kind,
        "val_accuracy": val_acc,
        "model_state_dict": t.published_weights(kept),
        "optimizer_state_dict": kept["optimizer"],
        "training": kept,
        "versions": versions() | {"device": t.device.type, "threads": str(torch.get_num_threads())},
    }
    return save_checkpoint(content, folder)
