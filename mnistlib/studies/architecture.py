"""Notebooks 01 and 02: what a network's layers compute, see and cost, and what is required of it.

The figures draw a network's feature maps, its receptive fields, the positions that speak for each
digit, and the shares of its parameters.
"""

import contextlib
import copy
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from ..budget import Budget, Layer
from ..plots import QUIET, REFERENCE, figure, show_digit

# the same colour for the same layer in every figure
LAYER_COLORS = {
    "conv1": "#92dadd", "conv2": "#3f90da", "conv3": "#1f5f99", "onecross": "#b9ac70",
    "conv4": "#ffa90e", "conv5": "#e76300", "conv6": "#bd1f01",
}  # fmt: skip


def requirements(model: nn.Module, limit: int = 20_000) -> dict[str, bool]:
    """Check the reference's requirements of a network by what it does, not by what it contains.

    Fewer than `limit` parameters; images `(N, 1, 28, 28)` in and `(N, 10)` logits out; BatchNorm
    in use (a training pass moves its running statistics); Dropout in use (two training passes of
    the same images differ). The network stays as it was, and so does torch's random state.
    """
    model = copy.deepcopy(model).cpu().float().train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    means = [m.running_mean for m in norms if m.running_mean is not None]
    before = [mean.clone() for mean in means]
    first = second = torch.empty(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        # a network that wants other images fails all that needs a pass
        with contextlib.suppress(RuntimeError, ValueError):
            first, second = model(images), model(images)
    return {
        f"fewer than {limit:,} parameters": sum(p.numel() for p in model.parameters()) < limit,
        "BatchNorm in use": any(not torch.equal(a, b) for a, b in zip(before, means, strict=True)),
        "Dropout in use": not torch.equal(first, second),
        "28x28 in, 10 out": tuple(first.shape) == (4, 10),
    }


def architecture(budget: Budget, image: Tensor, title: str) -> None:
    """Draw the network from left to right: map shapes, and on a digit the receptive fields.

    Args:
        budget: of the network.
        image: `(1, 28, 28)`, the digit on which the receptive fields are laid.
        title: the finding.
    """
    layers = [layer for layer in budget.layers if layer.multiply_accumulates]
    n, deepest = len(layers), max(layer.shape[0] for layer in layers)
    with figure(title, "", (7, 3.1), nrows=2, ncols=n, height_ratios=(1.5, 1)) as (fig, axes):
        for layer, above, below in zip(layers, axes[:n], axes[n:], strict=True):
            _draw_maps(above, layer, deepest)
            _draw_field(below, image, layer)
        text = "above: maps of each convolution; below: input pixels that one of its values can see"
        fig.supxlabel(text, fontsize=8, color="#555555")


def _draw_maps(ax: Axes, layer: Layer, deepest: int) -> None:
    """Draw a layer's output as a stack of squares, one per channel, sized like the map."""
    channels, side, _ = layer.shape
    size, step, color = max(side / 28, 0.08), 0.035, _color(layer.name)
    for k in reversed(range(channels)):
        corner = (k * step, k * step)
        ax.add_patch(Rectangle(corner, size, size, facecolor=color, edgecolor="white", lw=0.4))
    limits = (-0.05, 1 + deepest * step)
    ax.set(xlim=limits, ylim=limits, aspect="equal")
    ax.axis("off")
    text = f"{layer.name}\n{channels}x{side}x{side}"
    ax.set_title(text, fontsize=7.5, fontweight="normal", loc="center")


def _draw_field(ax: Axes, image: Tensor, layer: Layer, caption: str = "") -> None:
    """Draw a layer's receptive field around the middle of a digit, cut at its border."""
    show_digit(ax, image, caption)
    field, color = layer.receptive_field, _color(layer.name)
    low, high = max(13.5 - field / 2, -0.5), min(13.5 + field / 2, 27.5)
    side = high - low
    ax.add_patch(Rectangle((low, low), side, side, fill=True, alpha=0.25, color=color))
    ax.add_patch(Rectangle((low, low), side, side, fill=False, color=color, lw=1.5))
    ax.set_xlabel(f"{field}x{field}" + (" (all)" if field >= 28 else ""), fontsize=7.5)


def _color(name: str) -> str:
    return LAYER_COLORS.get(name.split(".")[0], QUIET)


def _blocks(budget: Budget) -> dict[str, list[Layer]]:
    """Gather the layers with weights to multiply by under their top-level names, in order."""
    blocks: dict[str, list[Layer]] = {}
    for layer in budget.layers:
        if layer.multiply_accumulates:
            blocks.setdefault(layer.name.split(".")[0], []).append(layer)
    return blocks


def receptive_fields(budget: Budget, image: Tensor, title: str) -> None:
    """Draw, for each block of convolutions, the input square that one of its values can see."""
    blocks = _blocks(budget)
    with figure(title, size=(7, 1.6), ncols=len(blocks)) as (_, axes):
        for ax, (name, layers) in zip(axes, blocks.items(), strict=True):
            _draw_field(ax, image, layers[-1], name)


def outputs(model: nn.Module, image: Tensor, layers: Sequence[str]) -> list[Tensor]:
    """Return what the named layers of a network answer to one image `(1, 28, 28)`, `(C, H, W)`."""
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
    return [seen[name] for name in layers]


def feature_maps(model: nn.Module, image: Tensor, layers: Sequence[str], title: str) -> None:
    """Draw what the named layers of a network answer to one image `(1, 28, 28)` uint8.

    A row per layer, a column per channel (the first eight); red above zero, blue below.
    """
    size = (7, 0.3 + 0.86 * len(layers))
    with figure(title, size=size, nrows=len(layers), ncols=8) as (_, axes):
        for row, maps in enumerate(outputs(model, image, layers)):
            limit = float(maps.abs().max())
            for ax, one in zip(axes[8 * row :], maps[:8].numpy(), strict=False):
                ax.imshow(one, cmap="RdBu_r", vmin=-limit, vmax=limit)
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                ax.spines[:].set_visible(False)
            axes[8 * row].set_ylabel(layers[row], fontsize=8)


def logit_contributions(model: nn.Module, image: Tensor, title: str) -> None:
    """Draw, for each class, how much each position of an image `(1, 28, 28)` adds to its logit.

    The reference's head is one convolution over the whole map, so a logit is a sum over positions:
    the 7x7 shares shown here add up to it exactly. Red speaks for the class, blue against it.
    """
    maps, logits = outputs(model, image, ["drop2", "conv6"])  # (16, 7, 7), (10, 1, 1)
    shares = (model.get_parameter("conv6.weight").detach() * maps).sum(1)  # -> (10, 7, 7)
    assert torch.allclose(shares.sum((1, 2)), logits.flatten(), atol=1e-4)
    limit = float(shares.abs().max())
    with figure(title, size=(7, 3.1), nrows=2, ncols=5) as (_, axes):
        for c, (ax, share) in enumerate(zip(axes, shares.numpy(), strict=True)):
            show_digit(ax, image, f"{c}: logit {float(logits[c]):.1f}")
            box = (-0.5, 27.5, 27.5, -0.5)
            ax.imshow(share, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65, extent=box)
        axes[int(logits.argmax())].title.set_fontweight("bold")


def budget(counted: Budget, title: str) -> None:
    """Draw the shares of parameters and multiply-accumulates, and the receptive fields below."""
    blocks = _blocks(counted)
    weights = {name: sum(layer.parameters for layer in own) for name, own in blocks.items()}
    weights["norms"] = counted.parameters - sum(weights.values())
    work = {n: sum(layer.multiply_accumulates for layer in own) for n, own in blocks.items()}
    with figure(title, size=(7, 3.8), nrows=2, height_ratios=(1.5, 1)) as (_, (bars, fields)):
        _share_bar(bars, 0, weights)
        _share_bar(bars, 1, work)
        bars.set_yticks(range(2), ["parameters", "multiply-\naccumulates"])
        bars.invert_yaxis()
        bars.set(xlim=(0, 100), xlabel="share (%)")
        bars.grid(False)
        sides = [own[-1].receptive_field for own in blocks.values()]
        drawn = fields.bar(list(blocks), sides, color=[_color(n) for n in blocks], width=0.6)
        fields.bar_label(drawn, fontsize=8)
        fields.axhline(28, color=REFERENCE, lw=1, ls="--")
        fields.annotate("image", (-0.45, 29), fontsize=8, color=REFERENCE)
        fields.set(ylabel="receptive field\n(pixels)", ylim=(0, 50))


def _share_bar(ax: Axes, y: int, counts: dict[str, int]) -> None:
    """Draw one stacked bar of shares in percent, labelled where there is room."""
    left = 0.0
    for name, count in counts.items():
        share = 100 * count / sum(counts.values())
        bar = ax.barh(y, share, left=left, color=_color(name), edgecolor="white", height=0.7)
        left += share
        wide = share > 6
        text = f"{name}\n{share:.1f} %" if wide else f"{name} {share:.1f} %" if share > 3.5 else ""
        (label,) = ax.bar_label(bar, [text], label_type="center", fontsize=7.5 if wide else 6.5)
        label.set(rotation=0 if wide else 90)
        label.set(color="white" if name in ("conv3", "conv6") else "black")
