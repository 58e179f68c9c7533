"""Notebook 09: trainings that are killed and resumed, or repeated in another process."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

from mnistlib import Config, Run, load_checkpoint
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

# when training starts, only torch, numpy and the core are imported
SCRIPT = """
{first}
from mnistlib import Config, load_mnist, train
run = train(Config(**{settings}), load_mnist(), folder={folder!r}, save={save}, verbose=False)
from mniststudy.figures.reproducibility import digest
print(digest(run.model))
"""


def digest(model: nn.Module) -> str:
    """Return the SHA-256 over all tensors of a network; equal only if every bit is equal."""
    tensors = model.state_dict().values()
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()


def train_and_kill(config: Config, folder: Path, epochs: int) -> int:
    """Train in another process, kill it after `epochs` saved epochs, return the last saved step.

    Args:
        config: network and settings.
        folder: an empty folder for the checkpoints.
        epochs: fewer than the Config's.
    """
    saved: set[Path] = set()  # each checkpoint stays for two epochs
    with subprocess.Popen(_command(config, folder=str(folder))) as job:
        while job.poll() is None and len(saved) < epochs:
            time.sleep(0.02)
            saved |= set(folder.glob("mnist_model_*.pth"))
        job.kill()
    left = [load_checkpoint(path) for path in folder.glob("mnist_model_*.pth")]
    return max(content["training"]["progress"]["step"] for content in left)


def train_in_new_process(config: Config, first: str = "", **environment: str) -> str:
    """Train in a new interpreter; return the digest of the network, or the error output.

    Args:
        config: network and settings.
        first: Python code that runs before any import.
        environment: environment variables in addition to those of this process.
    """
    environment = os.environ | environment
    done = subprocess.run(_command(config, first), capture_output=True, text=True, env=environment)
    return done.stdout.strip() or done.stderr


def _command(config: Config, first: str = "", folder: str | None = None) -> list[str]:
    settings = asdict(config)
    script = SCRIPT.format(first=first, settings=settings, folder=folder, save=folder is not None)
    return [sys.executable, "-W", "ignore", "-c", script]


def overlay_resumed(whole: Run, resumed: Run, step: int, title: str, subtitle: str) -> None:
    """Draw the loss of a resumed run over that of an uninterrupted one, with their difference.

    Args:
        whole: the uninterrupted run.
        resumed: the resumed run, of the same length.
        step: last step before the interruption.
        title: the finding.
        subtitle: a description of the runs.
    """
    difference = np.subtract(resumed.curve["loss"], whole.curve["loss"])
    steps = np.arange(1, len(difference) + 1)
    panels = figure(title, subtitle, (7, 4.2), nrows=2, sharex=True, height_ratios=(3, 1))
    with panels as (_, (top, bottom)):
        top.plot(steps, whole.curve["loss"], color=REFERENCE, lw=4, alpha=0.35)
        top.plot(steps, resumed.curve["loss"], color=TRAIN, lw=0.8)
        top.set(ylabel="training loss (nats)")
        log_axis(top.yaxis)
        for ax in (top, bottom):
            ax.axvline(step, color="black", lw=0.8, ls=":")
        note(top, "resumed from here", (step, 0.93), (4, 0), xycoords=("data", "axes fraction"))
        above = (steps[-1], max(whole.curve["loss"][len(steps) // 2 :]))
        for text, color, y in (("never stopped", REFERENCE, 20), ("killed and resumed", TRAIN, 8)):
            note(top, text, above, (0, y), color=color, ha="right", fontsize=9)
        bottom.plot(steps, difference, color=VALIDATION)
        bottom.set(ylabel="difference\n(nats)", xlabel="step")
        if not difference.any():  # a scale for a constant zero
            bottom.set(yticks=[-1, 0, 1], ylim=(-1, 1))
            note(bottom, "exactly 0 at every step", (steps[-1], 0), (0, 6), ha="right")
