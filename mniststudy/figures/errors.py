"""Notebook 10: misclassified digits, calibration, saliency, robustness, digits from elsewhere."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnistlib import evaluate, load_mnist, load_model, released_checkpoint
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder, write_atomically
from mnistlib.plots import QUIET, REFERENCE, TRAIN, VALIDATION, figure, log_axis, note, show_digit

COLORS = {"best": TRAIN, "smoothed": VALIDATION, "reference": REFERENCE}


@dataclass(frozen=True)
class Case:
    """A way to change images, and the severities that are tried."""

    change: Callable[[Tensor, float], Tensor]
    """from images `(N, 1, 28, 28)` float in 0..1 and a severity to changed images"""
    unit: str
    severities: tuple[float, ...]
    neutral: float = 0
    """the severity that changes nothing"""


def _shift(images: Tensor, pixels: float) -> Tensor:
    """Shift the images in turn to the right, to the left, down and up; what leaves is cut off."""
    k, shifted = int(pixels), torch.zeros_like(images)
    wide = F.pad(images, [k] * 4)
    for turn, (x, y) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
        shifted[turn::4] = wide[turn::4, :, k * (y + 1) :, k * (x + 1) :][..., :28, :28]
    return shifted


def _rotate(images: Tensor, degrees: float) -> Tensor:
    """Rotate the images in turn one way and the other."""
    rotated = images.clone()
    for turn, angle in enumerate((degrees, -degrees)):
        part = images[turn::2].numpy()
        part = scipy.ndimage.rotate(part, angle, axes=(3, 2), reshape=False, order=1)
        rotated[turn::2] = torch.from_numpy(part)
    return rotated


def _zoom(images: Tensor, factor: float) -> Tensor:
    zoomed = F.interpolate(images, scale_factor=factor, mode="bilinear", antialias=True)
    spare = 28 - zoomed.shape[-1]  # negative: the border is cut off
    return F.pad(zoomed, [spare // 2, spare - spare // 2] * 2)


def _add_noise(images: Tensor, sd: float) -> Tensor:
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + sd * drawn).clamp(0, 1)


def _blur(images: Tensor, sd: float) -> Tensor:
    blurred = scipy.ndimage.gaussian_filter(images.numpy(), sd, axes=(2, 3), mode="constant")
    return torch.from_numpy(blurred)


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
    "shift": Case(_shift, "pixels", (0, 1, 2, 3, 4, 5, 6)),
    "rotation": Case(_rotate, "degrees", (0, 10, 20, 30, 40, 50)),
    "scale": Case(_zoom, "times the size", (0.25, 0.5, 0.75, 1, 1.25, 1.5), 1),
    "noise": Case(_add_noise, "sd, share of the range", (0, 0.1, 0.2, 0.3, 0.4, 0.5)),
    "blur": Case(_blur, "sd, pixels", (0, 0.5, 1, 1.5, 2, 2.5)),
    "thickness": Case(_thicken, "pixels at each edge", (-1, -0.5, 0, 0.5, 1, 1.5)),
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
    return changed.clamp(0, 1)


def robustness(models: Mapping[str, nn.Module], images: Tensor, labels: Tensor) -> pd.DataFrame:
    """Return the accuracy of networks on changed images, a row for each case and severity.

    Args:
        models: networks by recipe.
        images: `(N, 1, 28, 28)` uint8.
        labels: `(N,)`.

    Returns:
        Columns `case`, `severity`, `recipe`, `accuracy` in percent and `n`.
    """
    rows = []
    for name, case in CASES.items():
        for severity in case.severities:
            changed = transform(images, name, severity)
            for recipe, model in models.items():
                seen = evaluate(model, changed, labels)
                rows.append((name, severity, recipe, round(seen.accuracy, 4), seen.n))
    return pd.DataFrame(rows, columns=["case", "severity", "recipe", "accuracy", "n"])


def write_robustness(path: Path | None = None) -> Path:
    """Measure three released networks on all test images and replace `robustness.csv`.

    Raises:
        DatasetError: MNIST is not available.
    """
    test = load_mnist("mnist").test
    assert test is not None
    models = {recipe: load_model(released_checkpoint(recipe)) for recipe in COLORS}
    path = path or outputs_folder() / "results" / "robustness.csv"
    write_atomically(path, robustness(models, *test).to_csv(index=False).encode())
    return path


def robustness_curves(table: pd.DataFrame, title: str) -> None:
    """Draw error against severity, a panel for each case and a line for each recipe."""
    subtitle, grid = f"n = {table['n'].iloc[0]:,} test images", {"nrows": 2, "ncols": 3}
    with figure(title, subtitle, (7, 4.4), sharey=True, **grid) as (_, axes):
        for ax, (name, case) in zip(axes, CASES.items(), strict=True):
            for recipe, color in COLORS.items():
                own = table[(table["case"] == name) & (table["recipe"] == recipe)]
                ax.plot(own["severity"], 100 - own["accuracy"], "o-", ms=3, color=color)
            ax.axvline(case.neutral, color=QUIET, lw=0.8, ls=":")
            ax.set_xlabel(f"{name} ({case.unit})")
            log_axis(ax.yaxis)
        for ax in axes[::3]:
            ax.set_ylabel("error (%)")
        for k, (recipe, color) in enumerate(COLORS.items()):
            note(axes[0], recipe, (0.05, 0.9 - 0.11 * k), xycoords="axes fraction", color=color)


def severities(image: Tensor, title: str) -> None:
    """Draw an image `(1, 28, 28)` uint8 at all severities, the unchanged one with a black frame."""
    columns = max(len(case.severities) for case in CASES.values())
    with figure(title, "", (7, 6.3), nrows=len(CASES), ncols=columns) as (_, axes):
        for ax in axes:
            ax.axis("off")
        for row, (name, case) in zip(axes.reshape(-1, columns), CASES.items(), strict=True):
            for ax, severity in zip(row, case.severities, strict=False):
                ax.axis("on")
                show_digit(ax, transform(image[None], name, severity)[0], f"{severity:g}")
                if severity == case.neutral:
                    ax.spines[:].set(color="black")
            row[0].set_ylabel(name, fontsize=8)


def plate(
    images: Tensor, labels: Tensor, probabilities: np.ndarray, title: str, marked: Collection[int]
) -> None:
    """Draw every misclassified image, the most confident first, with label, answer, probability.

    Args:
        images: `(N, 1, 28, 28)`.
        labels: `(N,)`.
        probabilities: `(N, 10)`.
        title: the finding.
        marked: positions of images with a disputed label, which are framed.
    """
    answers, confidence = probabilities.argmax(1), probabilities.max(1)
    wrong = np.flatnonzero(answers != labels.numpy())
    wrong = wrong[np.argsort(-confidence[wrong], kind="stable")]
    rows = math.ceil(len(wrong) / 10)
    with figure(title, size=(7, 0.25 + 0.88 * rows), nrows=rows, ncols=10) as (_, axes):
        for ax, i in zip(axes, wrong, strict=False):
            show_digit(ax, images[i], f"{labels[i]}→{answers[i]} {100 * confidence[i]:.1f} %")
            if i in marked:
                ax.spines[:].set(color=VALIDATION, linewidth=2)
                ax.title.set_color(VALIDATION)
        for ax in axes[len(wrong) :]:
            ax.axis("off")


def seed_counts(times: np.ndarray, disputed: np.ndarray, title: str) -> None:
    """Draw how many images are misclassified by 1, 2, ... seeds.

    Args:
        times: for each image `(N,)` the number of seeds that misclassify it.
        disputed: `(N,)` bool, whether its label is disputed.
        title: the finding.
    """
    ticks = np.arange(1, times.max() + 1)
    bottom = np.zeros(len(ticks), int)
    with figure(title, f"n = {len(times):,} test images", (7, 2.9)) as (_, (ax,)):
        looks = ("other images", ~disputed, TRAIN), ("disputed label", disputed, VALIDATION)
        for row, (name, part, color) in enumerate(looks):
            counts = np.bincount(times[part], minlength=len(ticks) + 1)[1:]
            drawn = ax.bar(ticks, counts, bottom=bottom, color=color)
            bottom = bottom + counts
            place = (0.5, 0.8 + 0.1 * row)  # between the tall bars at both ends
            note(ax, name, place, xycoords="axes fraction", ha="center", color=color)
        ax.bar_label(drawn, bottom, fontsize=8)
        ax.set(xlabel="seeds that misclassify the image", ylabel="images", xticks=ticks)
        ax.grid(axis="x", visible=False)


def reliability(
    networks: Mapping[str, Sequence[np.ndarray]], labels: np.ndarray, title: str, bins: int = 15
) -> None:
    """Draw the expected error of each bin of images against its observed error, on log axes.

    Args:
        networks: by recipe, probabilities `(N, 10)` before and after temperature scaling.
        labels: `(N,)`.
        title: the finding.
        bins: number of bins of equal size, from the least to the most confident images.
    """
    subtitle = f"n = {len(labels):,}, {bins} bins of equal size; lines: 95 % Wilson intervals"
    low, high, ticks = 0.008, 40, (0.01, 0.1, 1, 10)  # percent; the axes begin above zero
    with figure(title, subtitle, (7, 3.5), ncols=2, sharey=True) as (_, axes):
        for k, (ax, when) in enumerate(zip(axes, ("before", "after"), strict=True)):
            for recipe, pair in networks.items():
                order = np.argsort(pair[k].max(1), kind="stable")
                doubt = 100 * (1 - pair[k].max(1)[order])
                wrong = (pair[k].argmax(1) != labels)[order]
                for part in np.array_split(np.arange(len(order)), bins):
                    expected, errors = doubt[part].mean(), int(wrong[part].sum())
                    found = scipy.stats.binomtest(errors, len(part)).proportion_ci(method="wilson")
                    ends = max(100 * found.low, low), 100 * found.high
                    ax.plot([expected] * 2, ends, color=COLORS[recipe], lw=1, alpha=0.6)
                    dot = 100 * errors / len(part) if errors else np.nan
                    ax.plot(expected, dot, "o", ms=4, color=COLORS[recipe])
            ax.plot((low, high), (low, high), color="black", lw=0.8, ls=":")
            ax.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_ticks(ticks)
                axis.set_major_formatter("{x:g}")
            ax.set_xlabel("expected error: 100 - mean confidence (%)")
            lines = {f"{when} temperature scaling": "black", **COLORS}
            for row, (text, color) in enumerate(lines.items()):
                note(ax, text, (0.03, 0.93 - 0.07 * row), xycoords="axes fraction", color=color)
        axes[0].set_ylabel("observed error (%)")


def confidences(probabilities: Mapping[str, np.ndarray], title: str) -> None:
    """Draw histograms of the largest of ten probabilities `(N, 10)`, by recipe."""
    n = len(next(iter(probabilities.values())))
    with figure(title, f"n = {n:,} images", (7, 2.6)) as (_, (ax,)):
        for k, (recipe, own) in enumerate(probabilities.items()):
            counts, edges = np.histogram(100 * own.max(1), np.linspace(10, 100, 91))
            ax.stairs(counts, edges, color=COLORS[recipe], lw=1.3)
            place = (0.02, 0.88 - 0.11 * k)
            note(ax, recipe, place, xycoords="axes fraction", color=COLORS[recipe], fontsize=9)
        ax.set(xlabel="largest probability (%)", ylabel="images", yscale="log")


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
    covered = image.expand(785, 1, 28, 28).clone()  # the last one stays as it is
    for k in range(784):
        top, left = (max(0, place - side // 2) for place in divmod(k, 28))
        bottom, right = (place + side // 2 + 1 for place in divmod(k, 28))
        covered[k, :, top:bottom, left:right] = 0
    logits = predict_logits(model, covered)  # (785, 10)
    answer = int(logits[-1].argmax())
    others = logits.clone()
    others[:, answer] = -math.inf
    margin = logits[:, answer] - others.max(1).values  # (785,)
    return (margin[-1] - margin[:-1]).view(28, 28)


def saliency(images: Tensor, maps: Sequence[Tensor], captions: Sequence[str], title: str) -> None:
    """Draw images `(N, 1, 28, 28)`, and below each its map from `occlusion`, all on one scale."""
    limit, n = max(float(one.abs().max()) for one in maps), len(images)
    with figure(title, size=(7, 2.7), nrows=2, ncols=n) as (fig, axes):
        for k, (image, one) in enumerate(zip(images, maps, strict=True)):
            show_digit(axes[k], image, captions[k])
            show_digit(axes[n + k], image)
            look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.75}
            drawn = axes[n + k].imshow(one.numpy(), **look)
        fig.colorbar(drawn, ax=axes[n:], aspect=12, pad=0.01, label="fall of the margin")


def frame(images: Tensor, mode: str = "bicubic") -> Tensor:
    """Enlarge small digits to 20x20 and centre them by mass in 28x28, as MNIST was made.

    Args:
        images: `(N, H, W)` float in 0..1, digits that fill their height.
        mode: of `torch.nn.functional.interpolate`.

    Returns:
        `(N, 1, 28, 28)` uint8.
    """
    large = F.interpolate(images[:, None], (20, 20), mode=mode).clamp(0, 1)  # (N, 1, 20, 20)
    framed, places = torch.zeros(len(images), 1, 28, 28), torch.arange(20.0)
    for k, digit in enumerate(large):
        middles = (digit.sum((0, axis)) @ places / digit.sum() for axis in (2, 1))
        top, left = (round(13.5 - float(middle)) for middle in middles)
        framed[k] = F.pad(digit, [left, 8 - left, top, 8 - top])  # cuts off where negative
    return (255 * framed).round().to(torch.uint8)
