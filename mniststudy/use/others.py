"""Images that show no digit, so that a network can learn which have none."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from mnistlib.augment import augment

from .mnist_form import to_mnist
from .rendered import LETTERS, letter, scribble

# of matplotlib; the answers to letters are counted with others, those of `rendered`
FONTS = ("DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono-Bold",
         "STIXGeneralBol", "STIXGeneralBolIta", "cmb10", "cmmi10", "cmti10")  # fmt: skip
SIGNS = "!#$%&()*+,-/:;<=>?@[]^_{}~"
SHARES = (0.4, 0.15, 0.2, 0.25)  # of letters and signs, scribbles, pieces of a digit, pairs
AMOUNTS = {"degrees": 10.0, "scale": 0.1, "shear": 10.0, "elastic": 0.7}
SIZE = 84  # pixels of a letter or scribble before it is scaled down


def draw_others(n: int, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
    """Return `n` images without a digit in MNIST's format, `(n, 28, 28)` uint8.

    They are what a page has beside digits, and what a wrong cut makes of it.

    Args:
        n: number of images.
        images: `(N, 1, 28, 28)` uint8, the digits.
        labels: `(N,)`; a 1 is not cut into pieces, because they would still be a 1.
        seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    digits = images.numpy().reshape(-1, 28, 28) / np.float32(255)
    longer = np.flatnonzero(labels.numpy() != 1)
    ways: list[Callable[[], np.ndarray]] = [
        lambda: letter(rng, SIZE, rng.choice(list(4 * LETTERS + SIGNS)), FONTS),
        lambda: scribble(rng, SIZE),
        lambda: piece(rng, digits[rng.choice(longer)]),
        lambda: pair(rng, *digits[rng.integers(len(digits), size=2)]),
    ]
    made = np.stack([to_mnist(trim(ways[way]())) for way in rng.choice(4, n, p=SHARES)])
    draw = torch.Generator().manual_seed(seed)
    pixels = augment(torch.from_numpy(made)[:, None], **AMOUNTS, generator=draw)
    return (pixels[:, 0] * 255).round().to(torch.uint8)


def piece(rng: Generator, digit: np.ndarray) -> np.ndarray:
    """Return what is left of a digit `(h, w)` on one side of a straight line through it."""
    v, u = np.indices(digit.shape)
    while True:
        angle = rng.uniform(0, 2 * np.pi)
        y, x = (rng.uniform(line.min(), line.max()) for line in np.nonzero(digit))
        part = digit * (np.cos(angle) * (u - x) + np.sin(angle) * (v - y) > 0)
        if 0.2 < part.sum() / digit.sum() < 0.7:
            return part


def pair(rng: Generator, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return two digits `(28, 28)` side by side, or the halves of both that are neighbours."""
    left, right = trim(left), trim(right)
    if rng.random() < 0.5:
        start, stop = (int(side.shape[1] * rng.uniform(0.3, 0.7)) for side in (left, right))
        left, right = left[:, start:], right[:, : max(stop, 1)]
    first = left.shape[1] + rng.integers(-2, 5)  # column of the right one; < 0: over the left one
    out = np.zeros((32, max(first, 0) + right.shape[1] + left.shape[1]), np.float32)
    for ink, x in ((left, 0), (right, max(first, 0))):
        y = rng.integers(0, 33 - len(ink))
        place = out[y : y + len(ink), x : x + ink.shape[1]]
        np.maximum(place, ink, out=place)
    return out


def trim(ink: np.ndarray) -> np.ndarray:
    """Return ink `(h, w)` without the empty rows and columns around it."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
