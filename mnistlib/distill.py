"""Distillation: augmented images with the mean answer of teachers, which are asked only once."""

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .augment import augment
from .config import Config
from .data import Digits
from .errors import ConfigError
from .paths import folder_from, runs_folder

TEMPERATURE = 2.0  # of the teachers' answers and of the student's answer to them
SOFT = 0.9  # weight of the teachers' answers in the loss; the label has the rest
FIRST = [2.0, 0.9]  # these two, for pools that do not name them
CHECKSUMS = "SHA256SUMS"  # for `sha256sum --check`, too
CHUNK = 1000  # images that are augmented at a time
OTHERS = 0.25  # images without a digit, if the pool has any, as a share of the digits of a batch


@dataclass(frozen=True)
class Pool:
    """Views of the training images, each with the teachers' mean probabilities."""

    images: Tensor
    """`(V, N, 28, 28)` uint8: V augmented views of each of the N training images"""
    targets: Tensor
    """`(V, N, 10)` float16: mean over the teachers of the softmax of logits / TEMPERATURE"""
    others: Tensor
    """`(M, 28, 28)` uint8: images that show no digit; there may be none"""

    def draw(self, ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a random view of each image `ids` `(N,)`, `(N, 1, 28, 28)`, and its target.

        Images without a digit follow, if there are any; their target is 0.1 for each digit (the
        entropic open-set loss of A. R. Dhamija, M. Guenther and T. E. Boult, NeurIPS 2018).
        """
        draw = partial(torch.randint, generator=generator, device=ids.device)
        view = draw(len(self.images), ids.shape)
        images, targets = self.images[view, ids], self.targets[view, ids].float()
        if len(self.others):
            other = draw(len(self.others), (round(OTHERS * len(ids)),))
            images = torch.cat((images, self.others[other]))
            targets = torch.cat((targets, targets.new_full((len(other), 10), 0.1)))
        return images.unsqueeze(1), targets


def distillation_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the losses `(N,)` of logits `(N, 10)` for targets and labels.

    SOFT times the cross-entropy with the teachers at TEMPERATURE, and the rest that with the label.
    Source: G. Hinton, O. Vinyals and J. Dean, "Distilling the knowledge in a neural network", arXiv
    1503.02531. They multiply the first by the square of the temperature; here it is multiplied by
    the temperature, because with our learning rates the steps would be too large.

    Args:
        logits: of the student.
        truth: ten target probabilities and the label of each image, `(N, 11)`.
    """
    soft = -(truth[:, :10] * (logits / TEMPERATURE).log_softmax(1)).sum(1)
    hard = F.cross_entropy(logits, truth[:, 10].long(), reduction="none")
    return SOFT * TEMPERATURE * soft + (1 - SOFT) * hard


def load_pool(config: Config, digits: Digits, device: torch.device) -> Pool:
    """Return the pool of a Config; its images are made anew, which takes seconds to minutes.

    Raises:
        ConfigError: the pool is not there, incomplete, altered, of another loss or of other digits,
            or its teachers were trained on images that the Config validates on.
    """
    folder, n = pool_folder(config.pool), len(digits.train_labels)
    try:
        about = json.loads((folder / "pool.json").read_bytes())
        views = range(about["views"])
        paths, noted = [folder / f"{view}.f16" for view in views], folder / CHECKSUMS
        answers = bytearray(b"".join(path.read_bytes() for path in paths))
        targets = torch.frombuffer(answers, dtype=torch.float16).view(len(views), n, 10)
        others = torch.empty((0, 28, 28), dtype=torch.uint8)
        if about.get("others"):
            paths.append(folder / "others.u8")
            pixels = bytearray(paths[-1].read_bytes())
            others = torch.frombuffer(pixels, dtype=torch.uint8).view(about["others"], 28, 28)
        # older pools have none
        if noted.is_file() and noted.read_text("utf-8") != "".join(map(checksum, paths)):
            raise ValueError("its answers were altered")
        if about.get("loss", FIRST) != [TEMPERATURE, SOFT]:
            raise ValueError("it was built for another temperature or weight of the loss")
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        remedy = "the pool of the recipes is built by `mnist teach "
        remedy += "outputs/checkpoints/teacher/seeds/*.pth`"
        fault = f"pool {config.pool} is not, or not wholly, in {folder} ({error})"
        raise ConfigError(f"{fault}; {remedy}") from error
    if about["source"] != digits.source:
        raise ConfigError(f"pool {config.pool} was built on {about['source']}, not {digits.source}")
    if config.split not in ("none", about["split"]):
        fault = f"the teachers of pool {config.pool} were trained with split {about['split']}"
        raise ConfigError(f"{fault}, on images that split {config.split} validates on")
    images = torch.empty((len(views), n, 28, 28), dtype=torch.uint8, device=device)
    for view in views:
        images[view] = view_of(digits, about["augmentation"], view, device)
    return Pool(images, targets.to(device), others.to(device))


def pool_folder(name: str) -> Path:
    """Return the folder of a pool: in `MNISTLIB_POOLS`, else with the runs."""
    return (folder_from("MNISTLIB_POOLS") or runs_folder() / "pools") / name


def checksum(path: Path) -> str:
    """Return the line that a pool's checksums have for a file of answers."""
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"


def view_of(digits: Digits, amounts: dict[str, float], view: int, device: torch.device) -> Tensor:
    """Return all training images with the augmentation of a view, `(N, 28, 28)` uint8."""
    draw = torch.Generator().manual_seed(view)  # on the CPU, so that a view is the same everywhere
    made = []
    for images in digits.train_images.split(CHUNK):
        pixels = augment(images.to(device), **amounts, generator=draw)
        made.append((pixels * 255).round().to(torch.uint8).squeeze(1))
    return torch.cat(made)
