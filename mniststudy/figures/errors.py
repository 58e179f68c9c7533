"""Notebook 09: calibration, saliency, robustness, digits from elsewhere."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import ndimage
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from mnistlib import evaluate, load_mnist, load_model, released_checkpoint
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder, write_atomically
from mnistlib.plots import QUIET, RECIPE_COLORS, figure, log_axis, note, show_digit

from ..use.mnist_form import centre

COLORS = {name: RECIPE_COLORS[name] for name in ("best", "smoothed", "reference")}


@dataclass(frozen=True)
class Case:
    """A way to change images, and the severities that are tried."""

    change: Callable[[Tensor, float], Tensor | np.ndarray]
    """from images `(N, 1, 28, 28)` float in 0..1 and a severity to changed images"""
    unit: str
    severities: tuple[float, ...]
    neutral: float = 0
    """the severity that changes nothing"""
    short: str = ""
    """the unit below a small picture"""


def _shift(images: Tensor, pixels: float) -> np.ndarray:
    """Shift the images in turn to the right, to the left, down and up; what leaves is cut off."""
    steps = itertools.cycle([(0, pixels), (0, -pixels), (pixels, 0), (-pixels, 0)])
    moves = zip(images.numpy(), steps, strict=False)
    return np.stack([ndimage.shift(image, (0, *step), order=0) for image, step in moves])


def _rotate(images: Tensor, degrees: float) -> np.ndarray:
    """Rotate the images in turn one way and the other, about pixel 14, MNIST's centre of mass."""
    odd = F.pad(images, [0, 1, 0, 1])  # 29x29: pixel 14 is in the middle
    turns = zip(odd.numpy(), itertools.cycle([degrees, -degrees]), strict=False)
    turned = [ndimage.rotate(i, a, (2, 1), reshape=False, order=1) for i, a in turns]
    return np.stack(turned)[..., :28, :28]


def _zoom(images: Tensor, factor: float) -> Tensor:
    """Scale the images about pixel 14, MNIST's centre of mass, to a whole pixel."""
    zoomed = F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
    before = round(14.5 * (1 - factor))  # negative: the border is cut off
    return F.pad(zoomed, [before, 28 - zoomed.shape[-1] - before] * 2)


def _add_noise(images: Tensor, sd: float) -> Tensor:
    return images + sd * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def _blur(images: Tensor, sd: float) -> np.ndarray:
    return ndimage.gaussian_filter(images.numpy(), (0, 0, sd, sd), mode="constant")


def _thicken(images: Tensor, pixels: float) -> Tensor:
    """Move the edges of the strokes outwards, or inwards if negative, by dilation or erosion.

    A whole pixel replaces each value by the largest or smallest in its 3x3 neighbourhood; a part of
    a pixel is as much of that change.
    """
    sign = math.copysign(1, pixels)
    for k in range(math.ceil(abs(pixels))):
        wider = sign * F.max_pool2d(sign * images, 3, stride=1, padding=1)
        images = images + min(1, abs(pixels) - k) * (wider - images)
    return images


CASES = {
    "shift": Case(_shift, "pixels", (0, 1, 2, 3, 4, 5, 6), short="pixels"),
    "rotation": Case(_rotate, "degrees", (0, 10, 20, 30, 40, 50), short="degrees"),
    "scale": Case(_zoom, "times the size", (0.25, 0.5, 0.75, 1, 1.25, 1.5), 1, "times"),
    "noise": Case(
        _add_noise, "sd, share of the range", (0, 0.1, 0.2, 0.3, 0.4, 0.5), short="of the range"
    ),
    "blur": Case(_blur, "sd, pixels", (0, 0.5, 1, 1.5, 2, 2.5), short="pixels"),
    "thickness": Case(_thicken, "pixels at each edge", (-1, -0.5, 0, 0.5, 1, 1.5), short="pixels"),
}


def transform(images: Tensor, case: str, severity: float) -> Tensor:
    """Return changed images, float in 0..1; the neutral severity changes nothing.

    Args:
        images: `(N, 1, 28, 28)` uint8.
        case: a name in `CASES`.
        severity: any number in the unit of the case; of a shift, whole pixels.
    """
    pixels, chosen = images.float() / 255, CASES[case]
    changed = pixels if severity == chosen.neutral else chosen.change(pixels, severity)
    return torch.as_tensor(changed).clamp(0, 1)


def write_robustness() -> Path:
    """Evaluate three released networks on all test images, changed, and write `robustness.csv`.

    Raises:
        DatasetError: MNIST is not available.
    """
    test = load_mnist("mnist").test
    assert test
    models = {recipe: load_model(released_checkpoint(recipe)) for recipe in COLORS}
    rows = []
    for name, case in CASES.items():
        for severity in case.severities:
            changed = transform(test[0], name, severity)
            for recipe, model in models.items():
                seen = evaluate(model, changed, test[1])
                rows.append((name, severity, recipe, round(seen.accuracy, 4), seen.n))
    table = pd.DataFrame(rows, columns=["case", "severity", "recipe", "accuracy", "n"])
    path = outputs_folder() / "results" / "robustness.csv"
    write_atomically(path, table.to_csv(index=False).encode())
    return path


def severities(image: Tensor, shown: Mapping[str, float], title: str) -> None:
    """Draw an image `(1, 28, 28)` uint8, and beside it changed in each of the named ways.

    Args:
        image: the image.
        shown: severity by name of the change.
        title: the finding.
    """
    with figure(title, size=(7, 1.75), ncols=1 + len(shown)) as (_, axes):
        show_digit(axes[0], image)
        axes[0].set_xlabel("unchanged")
        for ax, (name, severity) in zip(axes[1:], shown.items(), strict=True):
            show_digit(ax, transform(image[None], name, severity)[0])
            ax.set_xlabel(f"{name}\n{severity:g} {CASES[name].short}")


def tolerance(table: pd.DataFrame, title: str, subtitle: str) -> None:
    """Draw the error at every severity of every change, a line for each network.

    Args:
        table: error in percent by `case` and `severity`, a column for each name in `COLORS`.
        title: the finding.
        subtitle: what is shown, with n.
    """
    with figure(title, subtitle, (7, 4.4), nrows=2, ncols=3, sharey=True) as (fig, axes):
        for ax, (name, case) in zip(axes, CASES.items(), strict=True):
            for recipe, color in COLORS.items():
                ax.plot(table.loc[name, recipe], "o-", ms=3, color=color, label=recipe)
            ax.axvline(case.neutral, color=QUIET, lw=0.8, ls=":")
            ax.set_xlabel(f"{name} ({case.unit})")
            log_axis(ax.yaxis, (1,))
        fig.supylabel("error (%)", fontsize=9)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def reliability(
    networks: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, title: str, bins: int = 15
) -> None:
    """Draw the expected against the observed error of each bin of images, on log axes.

    Hollow: before temperature scaling, filled: after it. A triangle is the upper end of the
    interval of a bin without errors.

    Args:
        networks: by recipe, probabilities `(N, 10)` before and after temperature scaling.
        labels: `(N,)`.
        title: the finding.
        bins: number of bins of equal size, from the least to the most confident images.
    """
    subtitle = f"n = {len(labels):,}, {bins} bins of equal size"
    ends = (0.008, 40)  # percent; the axes begin above zero
    grid = {"ncols": len(networks), "sharex": True, "sharey": True}
    with figure(title, subtitle, (7, 3.3), **grid) as (_, axes):
        for ax, (recipe, pair) in zip(axes, networks.items(), strict=True):
            color = COLORS[recipe]
            for p, fill in zip(pair, ("white", color), strict=True):
                doubt, wrong = 1 - p.max(1), p.argmax(1) != labels
                parts = np.array_split(np.argsort(-doubt, kind="stable"), bins)
                expected = np.array([100 * doubt[part].mean() for part in parts])
                found, n = (np.array([f(wrong[part]) for part in parts]) for f in (sum, len))
                low, high = 100 * np.array(proportion_confint(found, n, method="wilson"))
                some = found > 0
                ax.vlines(expected[some], low[some], high[some], color, lw=1, zorder=1)
                look = {"color": color, "mfc": fill, "ls": ""}
                ax.plot(expected, 100 * found / n, "o", ms=5, **look)
                ax.plot(expected[~some], high[~some], "v", ms=4, **look)
            ax.plot(ends, ends, color="black", lw=0.8, ls=":")
            ax.set(xlim=ends, ylim=ends, xlabel="expected error (%)")
            for axis in (ax.xaxis, ax.yaxis):
                log_axis(axis, (1,))
            note(ax, recipe, (0.03, 0.97), xycoords="axes fraction", va="top", color=color)
        axes[0].set_ylabel("observed error (%)")


def occlusion(model: nn.Module, image: Tensor, side: int = 7) -> Tensor:
    """Return how much each place of an image speaks for the network's answer, `(28, 28)`.

    A square of background colour covers the image around each pixel in turn. The value is by how
    much the margin falls, the logit of the answer minus the largest other one.
    Source: M. Zeiler and R. Fergus, Visualizing and understanding convolutional networks (2014).

    Args:
        model: the network.
        image: `(1, 28, 28)` uint8.
        side: of the square, odd.
    """
    places = torch.arange(28)
    near = (places[:, None] - places).abs() <= side // 2  # (28, 28)
    square = (near[:, None, :, None] & near[:, None]).view(784, 1, 28, 28)
    logits = predict_logits(model, torch.cat([image[None], image * ~square]))  # (785, 10)
    answer = int(logits[0].argmax())
    others = logits[:, torch.arange(10) != answer]  # (785, 9)
    margin = logits[:, answer] - others.max(1).values
    return (margin[0] - margin[1:]).view(28, 28)


def frame(images: Tensor, mode: str = "bicubic") -> Tensor:
    """Enlarge small digits to 20x20 and centre them by mass in 28x28, as MNIST was made.

    Args:
        images: `(N, H, W)` float in 0..1, digits that fill their height.
        mode: of `torch.nn.functional.interpolate`.

    Returns:
        `(N, 1, 28, 28)` uint8.
    """
    large = F.interpolate(images[:, None], (20, 20), mode=mode).clamp(0, 1)  # (N, 1, 20, 20)
    grey = (255 * large).round().to(torch.uint8).numpy()
    return torch.from_numpy(np.stack([centre(digit[0])[None] for digit in grey]))
