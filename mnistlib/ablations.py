"""What notebook 06 compares: the best recipe, made short, and each of its choices undone."""

from dataclasses import replace

from .config import RECIPES, Config

SHORT = 8  # epochs of the paired comparisons; what matters there is confirmed at full length


def ablations(epochs: int = SHORT) -> dict[str, Config]:
    """Return the recipe `best` with one choice changed each, by name; the first is unchanged.

    All hold out the images of the split by writers. Where a change needs another learning rate to
    train at all, or an optimizer has a scale of its own, its name says so. A run of a few hundred
    steps has three settings of its own: an average over the recipe's 1,000 steps would be made of
    early weights, so there it is 100; a greater share of hard images; and no elastic distortion,
    which makes them harder still. Of the last three, the longer ones keep those settings too.
    """
    base = replace(RECIPES["best"], split="writers", epochs=epochs)
    if epochs <= 2 * SHORT:
        base = replace(base, ema_decay=0.99, focus=0.9, elastic=0.0)
    undistorted = dict.fromkeys(base.distortion, 0.0)

    def alone(*kept: str) -> dict[str, float]:
        return undistorted | {name: getattr(base, name) for name in kept}

    changes: dict[str, dict[str, object]] = {
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
        "no distortion": undistorted,
        "AdamW, rate 0.01": {"optimizer": "adamw", "max_lr": 0.01, "weight_decay": 0.01},
        "Muon, rate 0.2": {"optimizer": "muon", "max_lr": 0.2},
        "constant rate": {"anneal": "constant"},
        "rate in steps": {"anneal": "step"},
        "cosine, cycled momentum": {"anneal": "cos", "cycle_momentum": True},
        "batches of 64, rate 0.07": {"batch_size": 64, "max_lr": 0.07},
        "batches of 256, rate 0.15": {"batch_size": 256, "max_lr": 0.15},
        "rate 0.25": {"max_lr": 0.25},
        "rotation alone": alone("degrees"),
        "translation alone": alone("pixels"),
        "zoom alone": alone("scale"),
        "shear alone": alone("shear"),
        "elastic distortion alone": undistorted | {"elastic": 0.5},
        "elastic distortion added": {"elastic": 0.5},
        "triangular rate": {"pct_start": 0.5},
    }
    changes |= {f"{n} epochs": {"epochs": n} for n in (5, 20, 60) if n != epochs}
    return {name: replace(base, **change) for name, change in changes.items()}
