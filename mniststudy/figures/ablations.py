"""Notebook 06: the recipe `smoothed`, made short, with one of its choices undone at a time."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pandas as pd

from mnistlib import RECIPES, Config
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, note

from ..runs.ledger import runs_for
from ..runs.stats import Comparison, compare_paired, holm

SHORT = 8  # epochs of the paired comparisons; what matters there is confirmed at full length


def ablations(epochs: int = SHORT) -> dict[str, Config]:
    """Return the recipe `smoothed` with one choice changed each, by name; the first is unchanged.

    All hold out the images of the split by writers. Where a change needs another learning rate, or
    an optimizer has a scale of its own, its name says so. Short runs have three settings of their
    own: weights averaged over 100 steps instead of 1,000, since a run of a few hundred steps would
    average early weights; a greater share of hard images; and no elastic augmentation, which makes
    images harder still. The changes of length keep these settings.
    """
    base = replace(RECIPES["smoothed"], split="writers", epochs=epochs)
    if epochs <= 2 * SHORT:
        base = replace(base, ema_decay=0.99, focus=0.9, elastic=0.0)
    none = dict.fromkeys(base.augmentation, 0.0)
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "no residual shortcuts": {"model": "reference-plain"},
        "no BatchNorm, learning rate 0.05": {"model": "reference-unnormalised", "max_lr": 0.05},
        "head: global average pooling": {"model": "reference-pooled"},
        "head: depthwise": {"model": "reference-depthwise"},
        "GELU instead of ReLU": {"model": "reference-gelu"},
        "dropout 0.05": {"dropout": 0.05},
        "dropout 0.1": {"dropout": 0.1},
        "no hard-example mining": {"focus": 0.0},
        "no weight averaging": {"ema_decay": 0.0},
        "no label smoothing": {"label_smoothing": 0.0},
        "no augmentation": none,
        "AdamW, learning rate 0.01": {"optimizer": "adamw", "max_lr": 0.01, "weight_decay": 0.01},
        "Muon, learning rate 0.2": {"optimizer": "muon", "max_lr": 0.2},
        "constant learning rate": {"anneal": "constant"},
        "learning rate in steps": {"anneal": "step"},
        "cosine, cycled momentum": {"anneal": "cos", "cycle_momentum": True},
        "batch size 64, learning rate 0.07": {"batch_size": 64, "max_lr": 0.07},
        "batch size 256, learning rate 0.15": {"batch_size": 256, "max_lr": 0.15},
        "learning rate 0.25": {"max_lr": 0.25},
        "rotation only": none | {"degrees": base.degrees},
        "translation only": none | {"pixels": base.pixels},
        "zoom only": none | {"scale": base.scale},
        "shear only": none | {"shear": base.shear},
        "elastic augmentation only": none | {"elastic": 0.5},
        "elastic augmentation added": {"elastic": 0.5},
        "triangular learning rate": {"pct_start": 0.5},
    }
    changes |= {f"{n} epochs": {"epochs": n} for n in (5, 20, 60) if n != epochs}
    return {name: replace(base, **change) for name, change in changes.items()}


def final_results(configs: Mapping[str, Config]) -> dict[str, pd.DataFrame]:
    """Return the committed runs of named configs by seed, with `error` in percent and `loss`.

    Error and loss are those of the validation images at the last epoch.
    """
    results = {}
    for name, config in configs.items():
        runs = runs_for(config).set_index("seed").sort_index()
        results[name] = runs.assign(error=100 - runs["val_accuracy"], loss=runs["val_loss"])
    return results


def compare_with_first(
    results: Mapping[str, pd.DataFrame], measure: str, unit: str, least: int = 2
) -> tuple[dict[str, Comparison], pd.Series]:
    """Compare a measure of each with that of the first, paired by seed; return Holm's p-values too.

    Args:
        results: of `final_results`; the first is compared with.
        measure: `error` or `loss`.
        unit: of the measure.
        least: paired seeds that a comparison must have to be made.
    """
    values = [frame[measure] for frame in results.values()]
    changes, p = {}, {}
    for name, other in zip(results, values, strict=True):
        a, b = values[0].align(other, join="inner")
        if other is not values[0] and len(a) >= least:
            changes[name] = compare_paired([*a], [*b], unit)
            p[name] = changes[name].p
    return changes, pd.Series(holm(p), name="p, Holm-corrected")


def forest_plot(
    panels: Mapping[str, tuple[Mapping[str, Comparison], Collection[str], tuple[float, float]]],
    title: str,
    subtitle: str,
) -> None:
    """Draw comparisons with their intervals, the largest of the first panel at the top.

    Args:
        panels: by axis label, comparisons by name; the names of those that are distinguishable
            (orange where larger, blue where smaller; the others are grey); and the ends of the
            axis, beyond which an arrow stands for a comparison, beside its number.
        title: the finding.
        subtitle: what was compared, with n.
    """
    first = next(iter(panels.values()))[0]
    ordered = sorted(first, key=lambda name: first[name].difference)
    grid = {"ncols": len(panels), "sharey": True}
    with figure(title, subtitle, (7, 1.0 + 0.24 * len(ordered)), **grid) as (_, axes):
        for ax, (label, (changes, sure, (low, high))) in zip(axes, panels.items(), strict=True):
            for y, name in enumerate(ordered):
                c = changes[name]
                color = REFERENCE if name not in sure else VALIDATION if c.difference > 0 else TRAIN
                mark = ">" if c.difference > high else "<" if c.difference < low else "o"
                ax.plot(min(max(c.difference, low), high), y, mark, color=color, ms=5)
                if mark == "o":
                    ax.plot([c.low, c.high], [y, y], color=color, lw=1.6)
                number = f"{c.difference:+.{3 if c.unit == 'nats' else 2}f}"
                place = {"xycoords": ("axes fraction", "data"), "va": "center"}
                note(ax, number, (1, y), (3, 0), color=color, **place)
            ax.axvline(0, color="black", lw=0.8)
            margin = 0.1 * (high - low)
            ax.set(xlabel=label, xlim=(low - margin, high + margin))
            ax.grid(axis="y", visible=False)
        axes[0].set_yticks(range(len(ordered)), ordered)
        axes[0].set_ylim(-0.7, len(ordered) - 0.3)
