"""Notebook 06: the recipe `best`, made short, with one of its choices undone at a time."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from .. import RECIPES, Config
from ..experiments.stats import Comparison
from ..plots import QUIET, TRAIN, VALIDATION, figure, note

SHORT = 8  # epochs of the paired comparisons; what matters there is confirmed at full length


def ablations(epochs: int = SHORT) -> dict[str, Config]:
    """Return the recipe `best` with one choice changed each, by name; the first is unchanged.

    All hold out the images of the split by writers. Where a change needs another learning rate to
    train at all, or an optimizer has a scale of its own, its name says so. A run of a few hundred
    steps has three settings of its own: an average over the recipe's 1,000 steps would be made of
    early weights, so there it is 100; a greater share of hard images; and no elastic augmentation,
    which makes them harder still. Of the last three, the longer ones keep those settings too.
    """
    base = replace(RECIPES["best"], split="writers", epochs=epochs)
    if epochs <= 2 * SHORT:
        base = replace(base, ema_decay=0.99, focus=0.9, elastic=0.0)
    none = dict.fromkeys(base.augmentation, 0.0)
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "no residual shortcuts": {"model": "reference-plain"},
        "no BatchNorm, rate 0.05": {"model": "reference-unnormalised", "max_lr": 0.05},
        "head: global average pooling": {"model": "reference-pooled"},
        "head: depthwise": {"model": "reference-depthwise"},
        "GELU for ReLU": {"model": "reference-gelu"},
        "dropout 0.05": {"dropout": 0.05},
        "dropout 0.1": {"dropout": 0.1},
        "no focus": {"focus": 0.0},
        "no averaging of weights": {"ema_decay": 0.0},
        "no label smoothing": {"label_smoothing": 0.0},
        "no distortion": none,
        "AdamW, rate 0.01": {"optimizer": "adamw", "max_lr": 0.01, "weight_decay": 0.01},
        "Muon, rate 0.2": {"optimizer": "muon", "max_lr": 0.2},
        "constant rate": {"anneal": "constant"},
        "rate in steps": {"anneal": "step"},
        "cosine, cycled momentum": {"anneal": "cos", "cycle_momentum": True},
        "batches of 64, rate 0.07": {"batch_size": 64, "max_lr": 0.07},
        "batches of 256, rate 0.15": {"batch_size": 256, "max_lr": 0.15},
        "rate 0.25": {"max_lr": 0.25},
        "rotation alone": none | {"degrees": base.degrees},
        "translation alone": none | {"pixels": base.pixels},
        "zoom alone": none | {"scale": base.scale},
        "shear alone": none | {"shear": base.shear},
        "elastic distortion alone": none | {"elastic": 0.5},
        "elastic distortion added": {"elastic": 0.5},
        "triangular rate": {"pct_start": 0.5},
    }
    changes |= {f"{n} epochs": {"epochs": n} for n in (5, 20, 60) if n != epochs}
    return {name: replace(base, **change) for name, change in changes.items()}


def forest_plot(
    changes: Mapping[str, Comparison],
    title: str,
    subtitle: str,
    label: str,
    sure: Collection[str] | None = None,
) -> None:
    """Draw comparisons with their intervals, the largest at the top; undecided ones are grey.

    Args:
        changes: by name of the change, in points of error: to the right is worse.
        title: the finding.
        subtitle: what was compared, with n.
        label: of the axis.
        sure: names of the decided ones; by default those whose interval leaves out zero.
    """
    ordered = sorted(changes.items(), key=lambda item: item[1].difference)
    with figure(title, subtitle, size=(7, 1.0 + 0.25 * len(ordered))) as (_, (ax,)):
        for y, (name, c) in enumerate(ordered):
            decided = c.decided if sure is None else name in sure
            color = QUIET if not decided else VALIDATION if c.difference > 0 else TRAIN
            ax.plot([c.low, c.high], [y, y], color=color, lw=1.6)
            ax.plot(c.difference, y, "o", color=color, ms=5)
            place = ("axes fraction", "data")
            note(ax, f"{c.difference:+.2f}", (1, y), xycoords=place, color=color, va="center")
        ax.axvline(0, color="black", lw=0.8)
        ax.set_yticks(range(len(ordered)), [name for name, _ in ordered], fontsize=8.5)
        # one that fails altogether must not press the others into a line
        ax.set_xscale("symlog", linthresh=0.2)
        ax.set_xticks([-0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 2, 5, 10])
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
        ends = [0, *(end for c in changes.values() for end in (c.low, c.high))]  # zero is in sight
        ax.set(xlabel=label, xlim=(1.2 * min(ends) - 0.02, 1.2 * max(ends) + 0.02))
        ax.grid(axis="y", visible=False)
