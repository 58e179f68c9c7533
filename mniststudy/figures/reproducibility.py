"""Notebook 11: trainings that are killed and resumed, or repeated in another process."""

import hashlib
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from torch import nn

from mnistlib import Config, load_checkpoint

# when training starts, only torch, numpy and the core are imported
SCRIPT = """
{first}
from pathlib import Path
from mnistlib import Config, load_mnist, train
run = train(Config(**{settings}), load_mnist(), verbose=False, {how})
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
    with subprocess.Popen(_command(config, f"folder=Path({str(folder)!r})")) as job:
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
    command, environment = _command(config, "save=False", first), os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.stdout.strip() or done.stderr


def _command(config: Config, how: str, first: str = "") -> list[str]:
    script = SCRIPT.format(first=first, settings=asdict(config), how=how)
    return [sys.executable, "-W", "ignore", "-c", script]
