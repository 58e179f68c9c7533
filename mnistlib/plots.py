"""The figures that notebooks share, in one look. Functions draw and return nothing."""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator
from torch import Tensor

STYLE = Path(__file__).with_name("mnistlib.mplstyle")
TRAIN, VALIDATION, REFERENCE, QUIET = "#3f90da", "#e76300", "#717581", "#94a4a2"
# the same colour for the same recipe in every figure
RECIPE_COLORS = {
    "reference": REFERENCE, "reference-fast": "#832db6", "fast": "#a96b59", "sprint": "#bd1f01",
    "smoothed": VALIDATION, "best": TRAIN,
}  # fmt: skip


def log_axis(axis: XAxis | YAxis, marks: Sequence[int] = (1, 2, 5)) -> None:
    """Make an axis logarithmic, with plain numbers at some digits of each decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


@contextmanager
def figure(
    title: str, subtitle: str = "", size: tuple[float, float] = (7, 3.5), **grid: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
    """Make a titled figure in the project's style; the axes come as a flat array.

    Args:
        title: the finding.
        subtitle: what is shown, with n.
        size: width and height in inches.
        grid: of the axes, as `matplotlib.pyplot.subplots` takes it.
    """
    # loads the backend now: settings that it makes within the style context would be undone
    plt.draw_if_interactive()
    with plt.style.context(STYLE):
        fig, axes = plt.subplots(figsize=size, squeeze=False, **grid)
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        if subtitle:
            axes.flat[0].set_title(subtitle, fontsize=9, fontweight="normal", color="#555555")
        yield fig, axes.ravel()


def note(
    ax: Axes, text: str, xy: tuple[float, float], offset: tuple[float, float] = (0, 0), **style: Any
) -> None:
    """Write a short text at `xy`, moved by an offset in points."""
    ax.annotate(text, xy, offset, textcoords="offset points", **{"fontsize": 9, **style})


def show_digit(ax: Axes, image: Tensor, caption: str = "", **style: Any) -> AxesImage:
    """Draw one image `(1, 28, 28)` or map `(H, W)` without axes, with a caption above it."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set(visible=True, color="#cccccc")
    ax.set_title(caption, fontsize=9, fontweight="normal", loc="center")
    return ax.imshow(image.squeeze().cpu().numpy(), **{"cmap": "gray_r", **style})


def digits(
    images: Tensor,
    labels: Tensor,
    title: str,
    captions: Sequence[str] = (),
    marked: Collection[int] = (),
) -> None:
    """Draw images `(N, 1, 28, 28)` in rows of ten, with their labels or captions above them.

    Those whose positions are `marked` have an orange frame and caption.
    """
    rows = math.ceil(len(images) / 10)
    captions = captions or [str(int(label)) for label in labels]
    with figure(title, size=(7, 0.25 + 0.88 * rows), nrows=rows, ncols=10) as (_, axes):
        for ax, image, caption in zip(axes, images, captions, strict=False):
            show_digit(ax, image, caption)
        for k in marked:
            axes[k].spines[:].set(color=VALIDATION, linewidth=2)
            axes[k].title.set_color(VALIDATION)
        for ax in axes[len(images) :]:
            ax.axis("off")


def heat(
    axes: np.ndarray, images: Tensor, maps: Iterable[Tensor], label: str, captions: Iterable[str]
) -> None:
    """Draw digits `(N, 28, 28)`, and on each its map `(H, W)`: red above zero, blue below it.

    All maps share one scale, whose bar has the label.
    """
    limit = max(float(one.abs().max()) for one in maps)
    for ax, image, one, caption in zip(axes, images, maps, captions, strict=True):
        show_digit(ax, image, caption)
        look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.7}
        drawn = ax.imshow(one.numpy(), extent=(-0.5, 27.5, 27.5, -0.5), **look)
    axes[0].figure.colorbar(drawn, ax=axes, pad=0.01, label=label)


def confusion(labels: Tensor, predictions: Tensor, title: str) -> None:
    """Draw a confusion matrix of labels and predictions `(N,)` without its diagonal.

    With an accurate classifier the diagonal would hide the errors.
    """
    import seaborn  # takes a second to load and only this figure needs it

    pairs = 10 * labels.long() + predictions.long()
    wrong = pairs.bincount(minlength=100).view(10, 10).fill_diagonal_(0).numpy()
    with figure(title, f"{wrong.sum()} errors of n = {len(labels):,}", size=(7, 4)) as (_, (ax,)):
        look = {"cmap": "OrRd", "linewidths": 0.5, "linecolor": "#e6e6e6", "square": True}
        look |= {"vmin": 1, "vmax": max(1, wrong.max())}  # without an error there is no range
        seaborn.heatmap(wrong, annot=wrong, fmt="d", mask=wrong == 0, cbar=False, ax=ax, **look)
        ax.set(xlabel="predicted", ylabel="label")
        ax.tick_params(axis="y", labelrotation=0)
        ax.grid(False)
