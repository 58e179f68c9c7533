"""Notebooks 01 and 02: the reference network and its budget as pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from torch import Tensor, nn

from mnistlib.budget import Budget
from mnistlib.plots import QUIET, figure, heat, note, show_digit

# the same colour for the same layer in every figure
LAYER_COLORS = {
    "conv1": "#3cb4ba", "conv2": "#3f90da", "conv3": "#1f5f99", "onecross": "#b9ac70",
    "conv4": "#ffa90e", "conv5": "#e76300", "conv6": "#bd1f01",
    "pool1": "#717581", "pool2": "#717581",
}  # fmt: skip
DARK = ("conv3", "conv6")  # with white letters
# the reference network, block by block: a shortcut starts at | and is added at +, / ends a row
DIAGRAM = """conv1 bn1 ReLU | conv2 bn2 ReLU conv3 bn3 + pool1 ReLU drop1 /
    onecross | conv4 bn4 ReLU conv5 bn5 + pool2 ReLU drop2 conv6"""
# of a block of each kind: width in inches, colour, text
BLOCKS = {
    "Conv2d": (0.66, "", "{name}\n{layer.kernel_size[0]}x{layer.kernel_size[1]}\n{count:,}"),
    "BatchNorm2d": (0.22, "#d3dbe0", "BatchNorm {count}"),
    "MaxPool2d": (0.22, "#f5dcc0", "max-pool {layer.kernel_size}x{layer.kernel_size}"),
    "ReLU": (0.22, "#eeeeee", "ReLU"),
    "Dropout": (0.22, "#eeeeee", "dropout"),
}
GAP, TALL, LINE = 0.18, 1.06, "#333333"  # between two blocks; height of a block; in inches


def block_diagram(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw the reference network as blocks and arrows, from a digit to its ten probabilities.

    Args:
        model: a `ReferenceNet`.
        image: `(1, 28, 28)` uint8, the digit that goes in.
        title: the finding.
    """
    kinds = ("Conv2d", "MaxPool2d")
    shapes = {layer.name: layer.shape for layer in Budget(model).layers if layer.kind in kinds}
    layers = {"ReLU": nn.ReLU(), **dict(model.named_children())}
    about = "in a block: kernel and number of parameters; below it: channels x height x width"
    with figure(title, about, (7, 4.1)) as (_, (ax,)):
        x, y = 0.62, 2.6
        ax.imshow(image[0].numpy(), extent=(0, x, y - x / 2, y + x / 2))
        ax.add_patch(Rectangle((0, y - x / 2), x, x, fill=False, color=LINE))
        note(ax, "1x28x28", (x / 2, y - 0.7), ha="center")
        for word in DIAGRAM.split():
            if word == "|":
                fork = x + GAP / 2
            elif word == "/":
                turn = (x, x + GAP, x + GAP, 0.05, 0.05), (y, y, 1.75, 1.75, 0.75)
                ax.plot(*turn, color=LINE, lw=1)
                x, y = 0.05, 0.75
            else:
                x = _arrow(ax, x, y)
                if word == "+":
                    x += _draw_addition(ax, x, y, fork)
                else:
                    x += _draw_block(ax, x, y, word, layers[word], shapes.get(word, ()))
        with torch.no_grad():
            _draw_output(ax, _arrow(ax, x, y), y, model.eval()(image[None]).softmax(1)[0])
        ax.set(xlim=(-0.02, 7), ylim=(0, 3.5), aspect="equal")
        ax.axis("off")


def _arrow(ax: Axes, x: float, y: float, down: float = 0) -> float:
    """Draw an arrow to the right, or down by so much; return where the next block begins."""
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    end = (x, y - down) if down else (x + GAP, y)
    ax.annotate("", end, (x, y), arrowprops=style)
    return x + GAP


def _draw_block(
    ax: Axes, x: float, y: float, name: str, layer: nn.Module, shape: tuple[int, ...]
) -> float:
    """Draw one layer with its left side at `x`, its output's shape below it; return its width."""
    width, color, text = BLOCKS[type(layer).__name__]
    low, count = y - TALL / 2, sum(p.numel() for p in layer.parameters())
    color, ink = color or LAYER_COLORS[name], "white" if name in DARK else "black"
    ax.add_patch(Rectangle((x, low), width, TALL, facecolor=color, edgecolor=LINE, lw=0.8))
    style: dict[str, Any] = {"ha": "center"}
    text, turned = text.format(name=name, layer=layer, count=count), 90 if width < 0.5 else 0
    note(ax, text, (x + width / 2, y), va="center", rotation=turned, color=ink, **style)
    note(ax, "x".join(map(str, shape)), (x + width / 2, low - 0.17), **style)
    return width


def _draw_addition(ax: Axes, x: float, y: float, fork: float) -> float:
    """Draw the addition of a shortcut that leaves the path at `fork`; return its width."""
    middle, top = x + 0.1, y + 0.7
    ax.add_patch(Circle((middle, y), 0.1, facecolor="white", edgecolor=LINE))
    note(ax, "+", (middle, y), fontsize=9, ha="center", va="center_baseline")
    ax.plot([fork, fork, middle], [y, top, top], color=LINE, lw=1)
    _arrow(ax, middle, top, down=0.6)
    note(ax, "shortcut", ((fork + middle) / 2, top + 0.04), ha="center")
    return 0.2


def _draw_output(ax: Axes, x: float, y: float, probabilities: Tensor) -> None:
    """Draw the ten classes in a column, each with its probability as a bar."""
    heights = [y + 0.14 * (4.5 - digit) for digit in range(10)]
    lengths = (0.35 * probabilities).tolist()
    ax.barh(heights, lengths, 0.09, left=x + 0.15, color=LAYER_COLORS["conv6"])
    for digit, height in enumerate(heights):
        weight = "bold" if digit == int(probabilities.argmax()) else "normal"
        note(ax, str(digit), (x + 0.04, height), va="center", fontweight=weight)
    note(ax, "softmax", (x + 0.5, y + 0.74), ha="right")


def outputs(model: nn.Module, image: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Return the outputs `(C, H, W)` of the named layers for one image `(1, 28, 28)`."""
    names, seen = {module: name for name, module in model.named_modules()}, {}

    def keep(module: nn.Module, _inputs: object, output: Tensor) -> None:
        # cloned, because a ReLU may follow that overwrites its input
        seen[names[module]] = output[0].clone()

    with nn.modules.module.register_module_forward_hook(keep), torch.no_grad():
        model.eval()(image[None])
    return [seen[name] for name in layers]


def feature_maps(model: nn.Module, image: Tensor, layers: Sequence[str], title: str) -> None:
    """Draw the feature maps of the named layers for one image `(1, 28, 28)` uint8.

    A row for each layer, with a scale of its own that is cut at the smallest value; a column for
    each of the first eight channels.
    """
    size = (7, 0.5 + 0.86 * len(layers))
    with figure(title, "", size, nrows=len(layers), ncols=8) as (fig, axes):
        rows = zip(layers, axes.reshape(-1, 8), outputs(model, image, layers), strict=True)
        for name, own, maps in rows:
            limit = float(maps.abs().max())
            for ax, one in zip(own, maps, strict=False):
                drawn = show_digit(ax, one, cmap="RdBu_r", vmin=-limit, vmax=limit)
            own[0].set_ylabel(name)
            scale = fig.colorbar(drawn, ax=own, aspect=8, pad=0.01, label="value").ax
            scale.set_ylim(bottom=float(maps.min()))
        fig.supxlabel("the first eight channels of each layer", fontsize=9, color="#555555")


def logit_contributions(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw how much each position of an image `(1, 28, 28)` adds to the logit of each class.

    The head of the reference network is one convolution over the whole map. A logit is therefore
    the sum of the 7x7 contributions drawn here: red raises the logit, blue lowers it.
    """
    maps, logits = outputs(model, image, ["drop2", "conv6"])  # (16, 7, 7), (10, 1, 1)
    shares = (model.get_parameter("conv6.weight").detach() * maps).sum(1)  # -> (10, 7, 7)
    captions = [f"{c}: logit {float(logit):.1f}" for c, logit in enumerate(logits)]
    with figure(title, size=(7, 3.1), nrows=2, ncols=5) as (_, axes):
        heat(axes, image.expand(10, 28, 28), shares, "contribution to the logit", captions)
        axes[int(logits.argmax())].title.set_fontweight("bold")


def parts(counted: Budget) -> pd.DataFrame:
    """Return parameters and multiply-accumulates of each part in order, BatchNorm at the end.

    A part is a layer of the reference network, or what a spec of another network has in one word.
    """
    rows = pd.DataFrame([vars(layer) for layer in counted.layers])
    norm = rows["kind"].str.startswith("BatchNorm")
    names = rows["name"].str.split(".").str[0]
    names = names.where(~names.str.isdecimal(), "part " + (names.str.extract(r"(\d+)$")[0]))
    rows["name"] = names.mask(norm, "BatchNorm")
    rows = pd.concat([rows[~norm & (rows["multiply_accumulates"] > 0)], rows[norm]])
    return rows.groupby("name", sort=False)[["parameters", "multiply_accumulates"]].sum()


def budget(counted: Budget, title: str) -> None:
    """Draw how parameters and multiply-accumulates are split by layer, all BatchNorm together."""
    about = f"a network of {counted.parameters:,} parameters, its layers from left to right"
    with figure(title, about, size=(7, 3.3)) as (_, (ax,)):
        for y, (_, count) in enumerate(parts(counted).items()):
            _split_bar(ax, y, 100 * count[count > 0] / count.sum())
        ax.set_yticks(range(2), ["parameters", "multiply-\naccumulates"])
        ax.set(xlim=(0, 100), ylim=(1.95, -0.95), xlabel="share (%)")
        ax.grid(False)


def _split_bar(ax: Axes, y: int, shares: pd.Series) -> None:
    """Draw a bar split into shares in percent; labels of thin segments stand beside it."""
    bar = pd.DataFrame({"share": shares, "middle": shares.cumsum() - shares / 2})
    thin, out = bar[shares < 9], 1 if y else -1
    # so far apart that they do not overlap, and not beyond the ends of the bar
    room = 11 * np.arange(len(thin))
    places = np.maximum.accumulate(thin["middle"].clip(lower=4) - room) + room
    bar["label"] = np.minimum(places, 97 - room[::-1])  # missing where there is room inside
    for name, share, middle, label in bar.itertuples(name=None):
        text, color = f"{name}\n{share:.1f} %", LAYER_COLORS.get(name, QUIET)
        ax.barh(y, share, 0.7, middle - share / 2, color=color, edgecolor="white")
        if name in thin.index:
            ax.plot([middle, label], [y + 0.35 * out, y + 0.5 * out], color=color, lw=1.2)
            va = "top" if y else "bottom"
            note(ax, text, (label, y + 0.53 * out), ha="center", va=va)
        else:
            ink = "white" if name in DARK else "black"
            note(ax, text, (middle, y), ha="center", va="center", color=ink)
