"""What our recipes are measured beside: published courses of training, by the conventional loop."""

from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import versions
from .config import RECIPES, runs_folder
from .conventional import Course, Training, course_of, curve
from .data import load_mnist
from .ledger import append, commit, finished
from .model import MEAN, STD
from .process import cores, workers

# what a row says is written down in outputs/README.md
CURVE_COLUMNS = (
    "name", "seed", "epoch", "val_accuracy", "seconds", "parameters", "threads", "torch", "commit",
)  # fmt: skip


class _Normalise(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - MEAN) / STD


def _keras_convnet() -> nn.Module:
    """Build the network of Keras' example mnist_convnet from its layer list: 34,826 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 32, 13, 13)
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 64, 5, 5)
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(1600, 10),
    )  # fmt: skip


def _pytorch_example() -> nn.Module:
    """Build the network of PyTorch's example mnist from its layer list: 1,199,882 parameters."""
    return nn.Sequential(
        _Normalise(),
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # -> (N, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # -> (N, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


ONE_EPOCH = replace(RECIPES["fast"], epochs=1, epoch_images=50_000, focus=0.0, ema_decay=0.98)

# As published: github.com/keras-team/keras-io, examples/vision/mnist_convnet.py (Adam as it comes);
# github.com/pytorch/examples, mnist/main.py (Adadelta, rate 1, times 0.7 after each epoch)
COURSES: dict[str, Course] = {
    "reference": course_of(RECIPES["reference"]),
    # what the two loops are compared by: the recipe `fast` in a form that both can train
    "one-epoch": course_of(ONE_EPOCH),
    "keras": Course(
        _keras_convnet, lambda m: torch.optim.Adam(m.parameters(), 1e-3, eps=1e-7), None, 15, 128
    ),
    "pytorch": Course(
        _pytorch_example,
        lambda m: torch.optim.Adadelta(m.parameters(), 1.0),
        lambda optimizer, _: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7),
        epochs=14,
        batch_size=64,
        per_epoch=True,
    ),
}


def curves(name: str, seeds: Sequence[int], folder: Path | None = None) -> Path:
    """Train a course by the conventional loop, each epoch a row of `curves.csv`.

    Args:
        name: in `COURSES`.
        seeds: those that the file has already are left out.
        folder: of the ledger; by default `runs_folder()`.
    """
    path = (folder or runs_folder()) / "curves.csv"
    todo = [seed for seed in seeds if (name, seed) not in finished(path, "name")]
    with workers(cores()) as pool:
        for job in as_completed([pool.submit(_rows, name, seed) for seed in todo]):
            rows = job.result()
            append(path, CURVE_COLUMNS, rows)
            last = rows[-1]
            print(f"{name} seed {last['seed']}: {last['val_accuracy']:.2f} % after {last['epoch']} "
                  f"epochs, {last['seconds']:.0f} s", flush=True)  # fmt: skip
    return path


def _rows(name: str, seed: int) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    training = Training(COURSES[name], load_mnist("mnist"), seed)
    common = {
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "threads": 1, "torch": versions()["torch"], "commit": commit(),
    }  # fmt: skip
    return [
        {"name": name, "seed": seed, "epoch": epoch, "val_accuracy": round(accuracy, 4),
         "seconds": round(seconds, 2), **common}
        for epoch, seconds, accuracy in curve(training)
    ]  # fmt: skip
