"""Drawings of a network: its maps, what its layers see and answer, where its parameters go."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from .budget import Budget, Layer
from .plots import PUBLISHED, QUIET, TRAIN, VALIDATION, figure, log_axis, show_digit

if TYPE_CHECKING:
    import pandas as pd

# the same colour for the same layer in every figure
LAYER_COLORS = {
    "conv1": "#92dadd", "conv2": "#3f90da", "conv3": "#1f5f99", "onecross": "#b9ac70",
    "conv4": "#ffa90e", "conv5": "#e76300", "conv6": "#bd1f01",
}  # fmt: skip


def _group(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    """Gather the layers with weights to multiply by under their top-level names, in order."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.multiply_accumulates:
            groups.setdefault(layer.name.split(".")[0], []).append(layer)
    return groups


def _color(name: str) -> str:
    return LAYER_COLORS.get(name, QUIET)


def architecture(budget: Budget, image: Tensor, title: str) -> None:
    """Draw the network from left to right: map shapes, and on a digit what one value can see.

    Args:
        budget: of the network.
        image: `(1, 28, 28)`, the digit on which the receptive fields are laid.
        title: the finding.
    """
    blocks = [layer for layer in budget.layers if layer.multiply_accumulates]
    with figure(title, size=(7, 3.1), nrows=2, ncols=len(blocks), height_ratios=(1.5, 1)) as (
        fig,
        axes,
    ):
        deepest = max(layer.shape[0] for layer in blocks)
        for column, layer in enumerate(blocks):
            ax, below = axes[column], axes[len(blocks) + column]
            _draw_maps(ax, layer, deepest)
            _draw_field(below, image, layer.receptive_field, _color(layer.name.split(".")[0]))
        fig.supxlabel(
            "above: maps of each convolution; below: input pixels that one of its values can see",
            fontsize=8, color="#555555",
        )  # fmt: skip


def _draw_maps(ax: Axes, layer: Layer, deepest: int) -> None:
    """Draw a layer's output as a stack of squares, one per channel, sized like the map."""
    channels, side, _ = layer.shape
    color = _color(layer.name.split(".")[0])
    size, step = max(side / 28, 0.08), 0.035
    for k in reversed(range(channels)):
        corner = (k * step, k * step)
        ax.add_patch(Rectangle(corner, size, size, facecolor=color, edgecolor="white", lw=0.4))
    ax.set(xlim=(-0.05, 1 + deepest * step), ylim=(-0.05, 1 + deepest * step), aspect="equal")
    ax.axis("off")
    text = f"{layer.name}\n{channels}x{side}x{side}"
    ax.set_title(text, fontsize=7.5, fontweight="normal", loc="center")


def _draw_field(ax: Axes, image: Tensor, field: int, color: str, centre: float = 13.5) -> None:
    """Draw the square of side `field` around the middle of a digit, cut at its border."""
    show_digit(ax, image)
    low, high = max(centre - field / 2, -0.5), min(centre + field / 2, 27.5)
    square = Rectangle((low, low), high - low, high - low, fill=True, alpha=0.25, color=color)
    ax.add_patch(square)
    ax.add_patch(Rectangle((low, low), high - low, high - low, fill=False, color=color, lw=1.5))
    ax.set_xlabel(f"{field}x{field}" + (" (all)" if field >= 28 else ""), fontsize=7.5)


def receptive_fields(budget: Budget, image: Tensor, title: str) -> None:
    """Draw, for each convolution, the input square that one of its values can see."""
    groups = _group(budget.layers)
    with figure(title, size=(7, 1.6), ncols=len(groups)) as (_, axes):
        for ax, (name, layers) in zip(axes, groups.items(), strict=True):
            _draw_field(ax, image, layers[-1].receptive_field, _color(name))
            ax.set_title(name, fontsize=8, fontweight="normal", loc="center")


def feature_maps(model: nn.Module, image: Tensor, layers: Sequence[str], title: str) -> None:
    """Draw what the named layers of a network answer to one image `(1, 28, 28)` uint8.

    A row per layer, a column per channel (the first eight); red above zero, blue below.
    """
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: out[0].detach().float().cpu()})
        )
        for name in layers
    ]
    with torch.no_grad():
        model.eval()(image.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    with figure(title, size=(7, 0.3 + 0.86 * len(layers)), nrows=len(layers), ncols=8) as (
        _,
        axes,
    ):
        for row, name in enumerate(layers):
            limit = float(seen[name].abs().max())
            for column in range(8):
                ax = axes[row * 8 + column]
                ax.imshow(seen[name][column], cmap="RdBu_r", vmin=-limit, vmax=limit)
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                ax.spines[:].set_visible(False)
            axes[row * 8].set_ylabel(name, fontsize=8)


def budget(counted: Budget, title: str) -> None:
    """Draw where parameters, multiply-accumulates and activation memory go, and what layers see."""
    groups = _group(counted.layers)
    with figure(title, size=(7, 3.8), nrows=2, height_ratios=(1.5, 1)) as (_, (bars, fields)):
        weights = {g: sum(layer.parameters for layer in ls) for g, ls in groups.items()}
        weights["norms"] = counted.parameters - sum(weights.values())
        work = {g: sum(layer.multiply_accumulates for layer in ls) for g, ls in groups.items()}
        _share_bar(bars, 0, weights)
        _share_bar(bars, 1, work)
        bars.set_yticks(range(2), ["parameters", "multiply-\naccumulates"])
        bars.invert_yaxis()
        bars.set(xlim=(0, 100), xlabel="share (%)")
        bars.grid(False)
        sides = [layers[-1].receptive_field for layers in groups.values()]
        fields.bar(range(len(groups)), sides, color=[_color(g) for g in groups], width=0.6)
        for x, side in enumerate(sides):
            fields.annotate(f"{side}", (x, side), ha="center", va="bottom", fontsize=8)
        fields.axhline(28, color=PUBLISHED, lw=1, ls="--")
        fields.annotate("image", (-0.45, 29), fontsize=8, color=PUBLISHED)
        fields.set_xticks(range(len(groups)), list(groups))
        fields.set(ylabel="receptive field\n(pixels)", ylim=(0, 50))


def _share_bar(ax: Axes, y: int, counts: dict[str, int]) -> None:
    """Draw one stacked bar of shares in percent, labelled where there is room."""
    left, total = 0.0, sum(counts.values())
    for name, count in counts.items():
        share = 100 * count / total
        ax.barh(y, share, left=left, color=_color(name), edgecolor="white", height=0.7)
        if share > 3.5:
            wide = share > 6
            text = f"{name}\n{share:.1f} %" if wide else f"{name} {share:.1f} %"
            white = name in ("conv3", "conv6")
            ax.annotate(
                text,
                (left + share / 2, y),
                ha="center",
                va="center",
                fontsize=7.5 if wide else 6.5,
                rotation=0 if wide else 90,
                color="white" if white else "black",
            )
        left += share


def evidence(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw, for each class, how much each place of an image `(1, 28, 28)` adds to its logit.

    A head that is one convolution over the whole map is a sum over places: the 7x7 shares shown
    here add up to the logit exactly. Red speaks for the class, blue against it.
    """
    seen: list[Tensor] = []
    head = model.get_submodule("conv6")
    hook = head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model.eval()(image.unsqueeze(0))[0]  # (10,)
        shares = (head.weight * seen[0]).sum(1)  # (10, 16, 7, 7) * (1, 16, 7, 7) -> (10, 7, 7)
    hook.remove()
    assert torch.allclose(shares.sum((1, 2)), logits, atol=1e-4)
    limit = float(shares.abs().max())
    with figure(title, size=(7, 3.1), nrows=2, ncols=5) as (_, axes):
        for c, ax in enumerate(axes):
            show_digit(ax, image)
            box = (-0.5, 27.5, 27.5, -0.5)
            ax.imshow(shares[c], cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65, extent=box)
            weight = "bold" if c == int(logits.argmax()) else "normal"
            text = f"{c}: logit {logits[c]:.1f}"
            ax.set_title(text, fontsize=8, fontweight=weight, loc="center")


def staircase(table: "pd.DataFrame", title: str) -> None:
    """Draw the seconds of each step of `report.staircase` as points on a log axis, downwards.

    Points are medians, lines reach from the fastest repetition to the slowest. Steps that were
    tried and not built on are hollow; beside each stands the validation accuracy with its number
    of seeds.
    """
    subtitle = "median and range of the repetitions; validation accuracy, mean over seeds"
    with figure(title, subtitle, size=(7, 1.0 + 0.27 * len(table))) as (_, (ax,)):
        for y, step in enumerate(table.itertuples()):
            color = PUBLISHED if y == 0 else TRAIN
            ax.plot([step.fastest, step.slowest], [y, y], color=color, lw=1.2)
            fill = color if step.kept else "white"
            ax.plot(step.seconds, y, "o", color=color, mfc=fill, ms=6)
            ax.annotate(f"  {step.seconds:.0f} s", (step.slowest, y), va="center", fontsize=8)
            if step.accuracy:
                text = f"{np.mean(step.accuracy):.2f} %, n = {len(step.accuracy)}"
                ax.annotate(text, (1.0, y), xycoords=("axes fraction", "data"), va="center",
                            fontsize=8, color=VALIDATION)  # fmt: skip
        names = [n if kept else f"{n} (not kept)" for n, kept in table["kept"].items()]
        ax.set_yticks(range(len(table)), names, fontsize=8)
        ax.invert_yaxis()
        log_axis(ax.xaxis)
        ax.set(xlim=(table["seconds"].min() / 2, 2 * table["slowest"].max()),
               xlabel="seconds of training, two threads")  # fmt: skip


def race(curves: dict[str, tuple[Sequence[float], Sequence[float]]], title: str) -> None:
    """Draw validation error (percent) over seconds of training, both on log axes.

    Args:
        curves: by name the seconds and the errors; one of each is drawn as a point.
        title: the finding.
    """
    with figure(title, "lines: published recipes, means over seeds; stars: whole runs of ours",
                size=(7, 3.6)) as (_, (ax,)):  # fmt: skip
        for name, (seconds, errors) in curves.items():
            star = {"marker": "*", "ms": 13, "ls": "", "color": VALIDATION}
            (line,) = ax.plot(seconds, errors, **star if len(seconds) == 1 else {"lw": 1.2})
            ax.annotate(name, (seconds[-1], errors[-1]), color=line.get_color(), fontsize=8,
                        xytext=(8, 0), textcoords="offset points", va="center", zorder=5,
                        bbox={"fc": "white", "ec": "none", "pad": 1})  # fmt: skip
        ax.margins(x=0.1, y=0.1)
        log_axis(ax.yaxis)
        log_axis(ax.xaxis)
        ax.set(xlabel="seconds of training, two threads", ylabel="validation error (%)")
