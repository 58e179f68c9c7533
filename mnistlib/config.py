"""The definition of a run: a frozen `Config`, its hash, and the named recipes."""

import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .data import SPLITS
from .errors import ConfigError
from .spec import check_model

AUGMENTATIONS = ("degrees", "pixels", "scale", "shear", "elastic")
NOT_HASHED = ("device", "threads")  # columns of their own in the ledger


def _setting(default: Any, *allowed: Any) -> Any:
    """Return a field with its default and its range or names; `--help` shows the text below it."""
    return field(default=default, metadata={"allowed": allowed})


@dataclass(frozen=True)
class Config:
    """Everything that defines a training run; values given as text are converted.

    The defaults are those of no recipe; `configure` starts from one.

    Raises:
        ConfigError: a value has the wrong type, is out of range, or conflicts with another one.
    """

    model: str = _setting("reference")
    """a name in MODELS, or a one-line spec such as 'c16k5s2 r1 p r2 r2 full'"""
    epochs: int = _setting(3, 1, 10_000)
    """number of epochs, of epoch-images images each"""
    batch_size: int = _setting(128, 2, 60_000)
    """images per step"""
    slices: int = _setting(1, 1, 64)
    """equal parts of a batch that are trained on in parallel, one per core; each is normalised by
    its own BatchNorm statistics"""
    epoch_images: int = _setting(0, 0, 10_000_000)
    """images per epoch; if there are fewer, they repeat; 0: each image once"""
    optimizer: str = _setting("adamw", "adamw", "adam", "sgd", "muon")
    """adamw, adam, sgd (Nesterov momentum 0.9), or muon (sgd with orthogonalised steps for inner
    filters)"""
    max_lr: float = _setting(0.01, 1e-8, 100.0)
    """peak learning rate"""
    pct_start: float = _setting(0.2, 0.0, 0.95)
    """share of the steps during which the learning rate rises"""
    anneal: str = _setting("cos", "cos", "linear", "step", "constant")
    """shape of the learning rate after the warm-up: cos or linear to zero (OneCycleLR), step (to a
    tenth after 60 % of the steps, again after 85 %), or constant"""
    cycle_momentum: bool = _setting(True)
    """true: momentum falls from 0.95 to 0.85 at the peak and rises again; false: it stays at 0.9"""
    weight_decay: float = _setting(0.01, 0.0, 10.0)
    """as the optimizer defines it; sgd and muon do not apply it to BatchNorm"""
    dropout: float = _setting(0.05, 0.0, 0.95)
    """probability of zeroing an activation"""
    label_smoothing: float = _setting(0.0, 0.0, 0.95)
    """share of the target probability that is spread evenly over all classes"""
    degrees: float = _setting(0.0, 0.0, 180.0)
    """augmentation: rotation, ± degrees"""
    pixels: float = _setting(0.0, 0.0, 28.0)
    """augmentation: translation, ± pixels"""
    scale: float = _setting(0.0, 0.0, 0.95)
    """augmentation: zoom, 1 ± scale"""
    shear: float = _setting(0.0, 0.0, 80.0)
    """augmentation: shear, ± degrees"""
    elastic: float = _setting(0.0, 0.0, 14.0)
    """augmentation: smooth random displacement, standard deviation in pixels"""
    focus: float = _setting(0.0, 0.0, 1.0)
    """hard-example mining: share of an epoch taken by the images with the largest loss when last
    seen; needs epoch-images below the number of training images"""
    ema_decay: float = _setting(0.0, 0.0, 0.999999)
    """decay per step of the averaged weights, which replace the last ones in evaluation; 0: none"""
    start: str = _setting("")
    """fine-tuning: recipe whose released checkpoint has the first weights, of a network with the
    same tensors; empty: they are random"""
    pool: str = _setting("")
    """distillation: name of a pool of augmented images with the answers of teachers, which
    `mnist teach` builds; empty: none"""
    norm_images: int = _setting(0, 0, 60_000)
    """training images, as they are, from which BatchNorm's statistics are computed anew for the
    final weights; 0: statistics are averaged like the weights"""
    split: str = _setting("random", *SPLITS)
    """validation images: random (10,000 of 60,000), last (59.5 % by employees, nearly all unseen;
    the rest by students, all seen), writers (about 10,000, all by writers who are not in the
    training set), writers-1 to writers-4 (the same with other writers), none (train on all)"""
    seed: int = _setting(0, 0, 2**31 - 1)
    """random seed of weights, image order, dropout and augmentation"""
    device: str = _setting("auto", "auto", "cpu", "cuda", "mps", "xpu")
    """where to train; auto: the accelerator that torch finds, else the CPU"""
    threads: int = _setting(0, 0, 1024)
    """CPU threads for slices and evaluation; their number does not change the result. 0: torch's
    own setting"""

    def __post_init__(self) -> None:
        """Cast each value to its field's type and check its range."""
        for f in fields(Config):
            value = cast(f.name, getattr(self, f.name), f.type)
            object.__setattr__(self, f.name, value)
            check_allowed(f.name, value, f.metadata["allowed"])
        if self.focus and not self.epoch_images:
            remedy = "set epoch_images below the number of training images"
            raise ConfigError(f"focus is {self.focus!r}, but all images are used: {remedy}")
        if self.slices > 1 and self.dropout:
            remedy = "its random numbers would depend on the order of the threads: set it to 0"
            raise ConfigError(f"dropout is {self.dropout:g} with {self.slices} slices; {remedy}")
        if self.anneal in ("step", "constant") and self.cycle_momentum:
            raise ConfigError(f"cycle_momentum is True with anneal {self.anneal}: set it to false")
        if self.pool and not re.fullmatch(r"[0-9a-f]{8}", self.pool):
            raise ConfigError(f"pool is {self.pool!r}, but it must be eight hex digits")
        if self.pool and (self.augmentation or self.label_smoothing):
            fault = f"pool {self.pool} has augmented images and its own targets"
            raise ConfigError(f"{fault}; set augmentation and label_smoothing to 0")
        if self.start and not re.fullmatch(r"[a-z0-9-]+", self.start):
            raise ConfigError(f"start is {self.start!r}, but it must be the name of a recipe")
        object.__setattr__(self, "model", " ".join(self.model.split()))
        check_model(self.model)

    @property
    def recipe(self) -> str:
        """Name of the recipe that this Config is a seed of, or `custom`."""
        plain = replace(self, seed=0, device="auto", threads=0)
        return next((name for name, c in RECIPES.items() if c == plain), "custom")

    @property
    def augmentation(self) -> dict[str, float]:
        """Arguments of `augment` for training images; empty without augmentation."""
        amounts = {name: getattr(self, name) for name in AUGMENTATIONS}
        return amounts if any(amounts.values()) else {}

    def steps_per_epoch(self, n_train: int) -> int:
        """Return the number of batches in an epoch; the last one may be short."""
        return math.ceil((self.epoch_images or n_train) / self.batch_size)

    def hash(self, source: str) -> str:
        """Return eight hex digits of a SHA-256 over the source and what changes the result.

        Fields at their default are left out. So a new field whose default is the old behaviour does
        not change the hashes of old runs. Defaults never change.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_HASHED}
        kept = {k: v for k, v in values.items() if v != getattr(Config, k) or k == "seed"}
        text = json.dumps({"version": 1, "source": source, **kept}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def run_name(self, source: str) -> str:
        """Return the folder name, such as `best-21989fa6-seed0`, after `sample-` on the sample."""
        mark = "" if source == "mnist" else f"{source}-"
        return f"{mark}{self.recipe}-{self.hash(source)}-seed{self.seed}"


def cast(name: str, value: Any, kind: Any) -> Any:
    """Turn papermill's strings and floats (`"1e-2"`, `20.0`) into the field's own type."""
    kinds = {int: "a whole number", float: "a finite number", str: "a name", bool: "true or false"}
    truths = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    try:
        if kind is bool:
            return truths[str(value).lower()]
        if kind is str and isinstance(value, str):
            return value.strip()
        number = math.nan if kind is str or isinstance(value, bool) else float(value)
        if math.isfinite(number) and kind(number) == number:
            return kind(number) + kind(0)  # turns -0.0 into 0.0, which hashes the same
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"{name} is {value!r}, but it must be {kinds[kind]}")


def check_allowed(name: str, value: Any, allowed: tuple) -> None:
    """Raise ConfigError unless a value is one of the allowed names or in the allowed range."""
    named = bool(allowed) and isinstance(allowed[0], str)
    if named and value not in allowed:
        raise ConfigError(f"{name} is {value!r}, but it must be one of {', '.join(allowed)}")
    if allowed and not named and not allowed[0] <= value <= allowed[-1]:
        low, high = (f"{v:,}" if isinstance(v, int) else f"{v:g}" for v in allowed)
        raise ConfigError(f"{name} is {value!r}, but it must be from {low} to {high}")


# Shared by our own recipes; dropout never helped networks of this size
_SGD: dict[str, Any] = {
    "optimizer": "sgd", "max_lr": 0.25, "pct_start": 0.2, "anneal": "linear",
    "cycle_momentum": False, "weight_decay": 5e-4, "dropout": 0.0, "label_smoothing": 0.05,
}  # fmt: skip
_MILD = {"degrees": 5.0, "pixels": 0.7, "scale": 0.05, "shear": 3.0}
_MEDIUM = {"degrees": 8.0, "pixels": 1.0, "scale": 0.08, "shear": 5.0}
_STRONG = {"degrees": 10.0, "pixels": 1.5, "scale": 0.1, "shear": 6.0, "elastic": 0.5}
_MINED = _SGD | {"epoch_images": 15_000, "focus": 0.9, "ema_decay": 0.999}
_FAST = _MINED | {"ema_decay": 0.995, "slices": 2}
_FAST_REFERENCE = _FAST | _MEDIUM | {"max_lr": 0.15, "weight_decay": 2e-3, "label_smoothing": 0.0}
_FAST_EARLY = _FAST | _MILD | {"model": "early", "pct_start": 0.4}
_LONG = _MINED | _STRONG | {"focus": 0.7, "split": "none"}
_STACKED = _MINED | {"label_smoothing": 0.0, "batch_size": 120, "split": "none"}
_SMALL = _STACKED | _MILD | {"max_lr": 0.15, "norm_images": 10_000}
# without a factor in BatchNorm the weight decay sets the effective learning rate
_SHRINKING = _SMALL | {"max_lr": 0.4, "weight_decay": 1e-3}
# 20 views of each image, answered by seeds 0 to 19 of `teacher`
_TAUGHT = _STACKED | {"pool": "768ab9d8", "max_lr": 0.12}
RECIPES: dict[str, Config] = {
    # The published protocol: 391 batches of 128, no augmentation, no averaging
    "reference": Config(epochs=20, max_lr=0.01, pct_start=0.2, dropout=0.05),
    # The same network, fastest found to 99.4 %; short epochs, because hard examples are chosen anew
    # after each
    "reference-fast": Config(epochs=16, **_FAST_REFERENCE),
    # Fastest found to 99.4 % with any network
    "fast": Config(epochs=13, **_FAST_EARLY),
    # Fastest found to 99.0 %
    "sprint": Config(epochs=6, **_FAST_EARLY | {"epoch_images": 9_000, "ema_decay": 0.98}),
    # Label smoothing: the reference network (at 0.25 some seeds do not train), one under 20,000
    "smoothed": Config(epochs=80, **_LONG | {"max_lr": 0.1}),
    "smoothed-20k": Config(model="c16k5s2 r1 p r2 r2 full", epochs=144, **_LONG),
    # The reference network without label smoothing; its seeds teach
    "teacher": Config(epochs=60, **_STACKED | _STRONG | {"max_lr": 0.12, "weight_decay": 1e-3}),
    # Most accurate, taught by them: the reference network, any under 20,000, and two smaller ones
    "best": Config(epochs=130, **_TAUGHT | {"weight_decay": 1e-3}),
    # The same network, trained on: it has also learned what is no digit, for `mnist predict`
    "careful": Config(
        start="best",
        epochs=130,
        **_TAUGHT | {"pool": "a04b12d3", "max_lr": 0.1, "weight_decay": 1e-3},
    ),
    "best-20k": Config(
        model="net-20k", epochs=80, **_TAUGHT | {"max_lr": 0.15, "weight_decay": 1e-3}
    ),
    "best-7918": Config(model="net-7918", epochs=100, **_TAUGHT),
    "best-6174": Config(model="net-6174", epochs=90, **_TAUGHT),
    # Still smaller ones, on their own: teachers did not help them (notebook 05)
    "best-3500": Config(model="net-3500", epochs=100, **_SMALL | _MEDIUM | {"max_lr": 0.12}),
    "best-1936": Config(model="net-1936", epochs=55, **_SMALL),
    "best-1000": Config(model="net-1000", epochs=45, **_SMALL),
    # The smallest, in a shape that trains in less than half the time
    "best-682": Config(model="net-682", epochs=100, **_SHRINKING),
    "best-920": Config(model="net-920", epochs=100, **_SHRINKING),
    "best-1816": Config(model="net-1816", epochs=100, **_SHRINKING),
    "best-3466": Config(model="net-3466", epochs=100, **_SHRINKING),
    # Smallest file: the released `best-6174` with rounded weights, trained on for less than half of
    # its time, taught by the six released networks that were trained on all images
    "tiny": Config(
        model="rounded-6174",
        start="best-6174",
        epochs=40,
        **_TAUGHT | {"pool": "80243226", "max_lr": 0.03, "norm_images": 10_000},
    ),
}


def read_settings(text: str) -> dict[str, str]:
    """Return settings that are written in one line, such as `epochs=3 model='c8 r2 p full'`.

    Values stay text, which `configure` converts; as in a shell, quotes keep spaces.

    Raises:
        ConfigError: it is no text, or a word has no `=`.
    """
    try:
        words = shlex.split(cast("settings", text, str))
        return dict(word.split("=", 1) for word in words)
    except ValueError:
        remedy = "but it must be like 'epochs=3 max_lr=0.1'"
        raise ConfigError(f"settings is {text!r}, {remedy}") from None


DEFAULT_RECIPE = "reference-fast"  # of the command line


def configure(recipe: str, **settings: Any) -> Config:
    """Return a recipe with some fields changed; `None` keeps the recipe's own value.

    Raises:
        ConfigError: unknown recipe, unknown field, or a value that is not allowed.
    """
    check_allowed("recipe", recipe, tuple(RECIPES))
    known = {f.name for f in fields(Config)}
    for name in settings:
        if name not in known:
            raise ConfigError(f"no setting {name!r}; choose from {', '.join(sorted(known))}")
    return replace(RECIPES[recipe], **{k: v for k, v in settings.items() if v is not None})
