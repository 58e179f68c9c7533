"""Notebooks 01 and 02: the reference network as a picture, its budget, its requirements."""

import contextlib
import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle
from torch import Tensor, nn

from mnistlib.budget import Budget, Layer
from mnistlib.plots import QUIET, figure, note, show_digit

# the same colour for the same layer in every figure
LAYER_COLORS = {
    "conv1": "#3cb4ba", "conv2": "#3f90da", "conv3": "#1f5f99", "onecross": "#b9ac70",
    "conv4": "#ffa90e", "conv5": "#e76300", "conv6": "#bd1f01",
    "pool1": "#717581", "pool2": "#717581",
}  # fmt: skip
# the reference network, block by block: a shortcut starts at | and is added at +
DIAGRAM = (
    "image conv1 bn1 ReLU | conv2 bn2 ReLU conv3 bn3 + pool1 ReLU drop1",
    "onecross | conv4 bn4 ReLU conv5 bn5 + pool2 ReLU drop2 conv6 output",
)
GAP, TALL, LINE = 0.18, 0.9, "#333333"  # between two blocks; height of a block; in inches


def requirements(model: nn.Module, limit: int = 20_000) -> dict[str, bool]:
    """Check the four requirements of the reference by running the network.

    The requirements: fewer than `limit` parameters; images `(N, 1, 28, 28)` in and logits
    `(N, 10)` out; BatchNorm in use, so that a training pass changes its running statistics;
    Dropout in use, so that two training passes of the same images differ. The network and torch's
    random state are left unchanged.
    """
    model = copy.deepcopy(model).cpu().float().train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    means = [m.running_mean for m in norms if m.running_mean is not None]
    before = [mean.clone() for mean in means]
    first = second = torch.empty(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        # a network for other images fails each check that needs a pass
        with contextlib.suppress(RuntimeError, ValueError):
            first, second = model(images), model(images)
    return {
        f"fewer than {limit:,} parameters": sum(p.numel() for p in model.parameters()) < limit,
        "BatchNorm in use": any(not torch.equal(a, b) for a, b in zip(before, means, strict=True)),
        "Dropout in use": not torch.equal(first, second),
        "28x28 in, 10 out": tuple(first.shape) == (4, 10),
    }


def block_diagram(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw the reference network as blocks and arrows, from a digit to its ten probabilities.

    Args:
        model: a `ReferenceNet`.
        image: `(1, 28, 28)` uint8, the digit that goes in.
        title: the finding.
    """
    shapes = {layer.name: "x".join(map(str, layer.shape)) for layer in Budget(model).layers}
    modules = {"ReLU": nn.ReLU(), **dict(model.named_children())}
    about = "in a block: kernel and number of parameters; below it: channels x height x width"
    with figure(title, about, (7, 3.5)) as (_, (ax,)):
        for x, y, row in ((0.0, 2.3, DIAGRAM[0]), (0.05, 0.65, DIAGRAM[1])):
            for word in row.split():
                if word == "|":
                    fork = x + GAP / 2
                    continue
                if word != "image":
                    _arrow(ax, (x, y), (x + GAP, y))
                    x += GAP
                if word == "image":
                    ax.imshow(image[0].numpy(), extent=(x, x + 0.62, y - 0.31, y + 0.31))
                    ax.add_patch(Rectangle((x, y - 0.31), 0.62, 0.62, fill=False, color=LINE))
                    note(ax, "1x28x28", (x + 0.31, y - 0.6), fontsize=7, ha="center")
                    x += 0.62
                elif word == "+":
                    x += _draw_addition(ax, x, y, fork)
                elif word == "output":
                    with torch.no_grad():
                        _draw_output(ax, x, y, model.eval()(image[None]).softmax(1)[0])
                else:
                    x += _draw_block(ax, x, y, word, modules[word], shapes.get(word, ""))
            if row == DIAGRAM[0]:
                wrap = (0.05, 0.05, x + GAP, x + GAP, x), (0.65, 1.55, 1.55, y, y)
                ax.plot(*wrap, color=LINE, lw=1)
        ax.set(xlim=(-0.02, 7), ylim=(0, 3.1), aspect="equal")
        ax.axis("off")


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    ax.annotate("", end, start, arrowprops=style)


def _draw_block(ax: Axes, x: float, y: float, name: str, module: nn.Module, shape: str) -> float:
    """Draw one layer with its left side at `x` and, if its shape is new, the shape; its width."""
    count = sum(p.numel() for p in module.parameters())
    wide, text, color = False, name, "#eeeeee"
    if isinstance(module, nn.Conv2d):
        (kernel, _), wide = module.kernel_size, True
        text, color = f"{name}\n{kernel}x{kernel}\n{count:,}", _color(name)
    elif isinstance(module, nn.BatchNorm2d):
        text, color, shape = f"BatchNorm {count}", "#d3dbe0", ""
    elif isinstance(module, nn.MaxPool2d):
        text, color = f"max-pool {module.kernel_size}x{module.kernel_size}", "#f5dcc0"
    elif isinstance(module, nn.Dropout):
        text, shape = "dropout", ""
    width, low = 0.66 if wide else 0.22, y - TALL / 2
    ax.add_patch(Rectangle((x, low), width, TALL, facecolor=color, edgecolor=LINE, lw=0.8))
    place: dict[str, Any] = {"fontsize": 7, "ha": "center", "rotation": 0 if wide else 90}
    note(ax, text, (x + width / 2, y), va="center", color=_text_color(name), **place)
    note(ax, shape, (x + width / 2, low - 0.15), fontsize=7, ha="center")
    return width


def _draw_addition(ax: Axes, x: float, y: float, fork: float) -> float:
    """Draw the addition of a shortcut that leaves the path at `fork`; return its width."""
    middle, top = x + 0.1, y + 0.62
    ax.add_patch(Circle((middle, y), 0.1, facecolor="white", edgecolor=LINE))
    note(ax, "+", (middle, y), fontsize=9, ha="center", va="center_baseline")
    ax.plot([fork, fork, middle], [y, top, top], color=LINE, lw=1)
    _arrow(ax, (middle, top), (middle, y + 0.1))
    note(ax, "shortcut", ((fork + middle) / 2, top + 0.04), fontsize=7, ha="center")
    return 0.2


def _draw_output(ax: Axes, x: float, y: float, probabilities: Tensor) -> None:
    """Draw the ten classes in a column, each with its probability as a bar."""
    for digit, probability in enumerate(probabilities.tolist()):
        height, best = y + 0.12 * (4.5 - digit), digit == int(probabilities.argmax())
        weight = "bold" if best else "normal"
        note(ax, str(digit), (x + 0.06, height), fontsize=7, va="center", fontweight=weight)
        bar = (x + 0.15, height - 0.045), 0.35 * probability, 0.09
        ax.add_patch(Rectangle(*bar, color=LAYER_COLORS["conv6"]))
    note(ax, "softmax", (x + 0.2, y + 0.68), fontsize=7, ha="center")


def receptive_fields(budget: Budget, image: Tensor, title: str) -> None:
    """Draw the receptive field of each layer that widens it on a digit `(1, 28, 28)`.

    The field lies around the middle of the image and is cut at its border.
    """
    wider = {layer.receptive_field: layer.name for layer in reversed(budget.layers)}
    with figure(title, size=(7, 1.45), ncols=len(wider)) as (_, axes):
        for ax, (field, name) in zip(axes, reversed(wider.items()), strict=True):
            show_digit(ax, image, name)
            low, high = max(13.5 - field / 2, -0.5), min(13.5 + field / 2, 27.5)
            box, color = ((low, low), high - low, high - low), _color(name)
            ax.add_patch(Rectangle(*box, alpha=0.25, color=color))
            ax.add_patch(Rectangle(*box, fill=False, color=color, lw=1.5))
            ax.set_xlabel(f"{field}x{field}" + (" (all)" if field >= 28 else ""), fontsize=7.5)


def _color(name: str) -> str:
    return LAYER_COLORS.get(name.split(".")[0], QUIET)


def _text_color(name: str) -> str:
    return "white" if name in ("conv3", "conv6") else "black"


def _blocks(budget: Budget) -> dict[str, list[Layer]]:
    """Group the convolutions and linear layers by their top-level names, in order."""
    blocks: dict[str, list[Layer]] = {}
    for layer in budget.layers:
        if layer.multiply_accumulates:
            blocks.setdefault(layer.name.split(".")[0], []).append(layer)
    return blocks


def outputs(model: nn.Module, image: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Return the outputs `(C, H, W)` of the named layers for one image `(1, 28, 28)`."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            # cloned, because a ReLU may follow that overwrites its input
            lambda _m, _i, out, name=name: seen.update({name: out[0].detach().clone()})
        )
        for name in layers
    ]
    with torch.no_grad():
        model.eval()(image.unsqueeze(0))
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in layers]


def feature_maps(model: nn.Module, image: Tensor, layers: Sequence[str], title: str) -> None:
    """Draw the feature maps of the named layers for one image `(1, 28, 28)` uint8.

    A row for each layer, with a scale of its own that is cut at the smallest value; a column for
    each of the first eight channels.
    """
    size, about = (7, 0.5 + 0.86 * len(layers)), "the first eight channels of each layer"
    with figure(title, "", size, nrows=len(layers), ncols=8) as (fig, axes):
        for row, maps in enumerate(outputs(model, image, layers)):
            own, limit = axes[8 * row : 8 * row + 8], float(maps.abs().max())
            for ax, one in zip(own, maps.numpy(), strict=False):
                drawn = ax.imshow(one, cmap="RdBu_r", vmin=-limit, vmax=limit)
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                ax.spines[:].set_visible(False)
            own[0].set_ylabel(layers[row], fontsize=8)
            scale = fig.colorbar(drawn, ax=own, aspect=8, pad=0.01, label="value").ax
            scale.set_ylim(bottom=float(maps.min()))
            scale.tick_params(labelsize=7)
        fig.supxlabel(about, fontsize=8, color="#555555")


def logit_contributions(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw how much each position of an image `(1, 28, 28)` adds to the logit of each class.

    The head of the reference network is one convolution over the whole map. A logit is therefore
    the sum of the 7x7 contributions drawn here: red raises the logit, blue lowers it.
    """
    maps, logits = outputs(model, image, ["drop2", "conv6"])  # (16, 7, 7), (10, 1, 1)
    shares = (model.get_parameter("conv6.weight").detach() * maps).sum(1)  # -> (10, 7, 7)
    assert torch.allclose(shares.sum((1, 2)), logits.flatten(), atol=1e-4)
    limit = float(shares.abs().max())
    with figure(title, size=(7, 3.1), nrows=2, ncols=5) as (fig, axes):
        for c, (ax, share) in enumerate(zip(axes, shares.numpy(), strict=True)):
            show_digit(ax, image, f"{c}: logit {float(logits[c]):.1f}")
            look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "alpha": 0.65}
            drawn = ax.imshow(share, extent=(-0.5, 27.5, 27.5, -0.5), **look)
        axes[int(logits.argmax())].title.set_fontweight("bold")
        fig.colorbar(drawn, ax=axes, aspect=30, pad=0.01, label="contribution to the logit")


def budget(counted: Budget, title: str) -> None:
    """Draw the shares of parameters and of multiply-accumulates, one bar for each."""
    blocks = _blocks(counted)
    weights = {name: sum(layer.parameters for layer in own) for name, own in blocks.items()}
    work = {n: sum(layer.multiply_accumulates for layer in own) for n, own in blocks.items()}
    for layer in counted.layers:  # the norms
        if layer.parameters and not layer.multiply_accumulates:
            kind = layer.kind.removesuffix("2d")
            weights[kind] = weights.get(kind, 0) + layer.parameters
    with figure(title, size=(7, 3.1)) as (_, (ax,)):
        _share_bar(ax, 0, weights)
        _share_bar(ax, 1, work)
        ax.set_yticks(range(2), ["parameters", "multiply-\naccumulates"])
        ax.set(xlim=(0, 100), ylim=(1.95, -0.95), xlabel="share (%)")
        ax.grid(False)


def _share_bar(ax: Axes, y: int, counts: dict[str, int]) -> None:
    """Draw one stacked bar of shares in percent; thin segments are labelled outside, by lines."""
    left, thin = 0.0, []
    for name, count in counts.items():
        share = 100 * count / sum(counts.values())
        bar = ax.barh(y, share, left=left, color=_color(name), edgecolor="white", height=0.7)
        text = f"{name}\n{share:.1f} %"
        if share > 6:
            color = _text_color(name)
            ax.bar_label(bar, [text], label_type="center", fontsize=7.5, color=color)
        else:
            thin.append((left + share / 2, text, _color(name)))
        left += share
    # labels outside the bar, at least so many per cent apart and not beyond its ends
    room, out = 9, 1 if y else -1
    at = np.array([max(middle, 4) for middle, *_ in thin])
    for k in range(1, len(at)):
        at[k] = max(at[k], at[k - 1] + room)
    at = np.minimum(at, 97 - room * np.arange(len(at))[::-1])
    for (middle, text, color), x in zip(thin, at, strict=True):
        ends = (middle, x), (y + 0.35 * out, y + 0.5 * out)
        ax.plot(*ends, color=color, lw=1.2)
        note(ax, text, (x, y + 0.53 * out), fontsize=7, ha="center", va="top" if y else "bottom")
