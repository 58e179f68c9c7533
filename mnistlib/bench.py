"""How fast training is: every step of notebook 08, timed in turns, into `speed.csv`."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .budget import Budget
from .checkpoint import versions
from .config import RECIPES, Config, ConfigError, runs_folder
from .conventional import Course, Training, Way, course_of, curve
from .data import Digits, load_mnist
from .evaluate import evaluate
from .ledger import append, commit
from .machine import OPERATORS, WARM, matmul, operators, pair_seconds, shared, side_by_side
from .model import build
from .peers import COURSES
from .train import train

# what a row says is written down in outputs/README.md
COLUMNS = (
    "go", "kind", "name", "base", "repetition", "images", "seconds", "evaluation_seconds",
    "whole_images", "evaluations", "threads", "processes", "parameters", "multiply_accumulates",
    "config_hash", "device", "torch", "commit",
)  # fmt: skip
UNIT = 12_800  # images of a timed short run


# the conventional loop's steps: from which other, and how; the last three were tried and not kept
WAYS: dict[str, tuple[str, Way]] = {
    "conventional loop": ("", Way()),
    "tensors in memory": ("conventional loop", Way(False)),
    "kept as uint8": ("tensors in memory", Way(False, False)),
    "loss read at the end": ("kept as uint8", Way(False, False, False)),
    "channels_last": ("loss read at the end", Way(False, False, False, True)),
    "fused optimizer": ("channels_last", fused := Way(False, False, False, True, True)),
    "freed memory kept": ("fused optimizer", kept := replace(fused, keeps_memory=True)),
    "bfloat16": ("freed memory kept", replace(kept, bfloat16=True)),
    "denormals flushed": ("freed memory kept", replace(kept, flush=True)),
    "torch.compile": ("freed memory kept", replace(kept, compiled=True)),
}


@dataclass(frozen=True)
class Measure:
    """Something to be timed, and what its row says of it."""

    kind: str
    name: str
    take: Callable[[], tuple[float, float]]
    """returns seconds, and those of an evaluation of the validation images (0: not timed)"""
    images: int
    model: nn.Module | None = None
    config: Config | None = None
    whole_images: int = 0
    """training images of the whole run that this is a piece of"""
    evaluations: int = 0
    """that the whole run makes, the final one left out"""
    threads: int = 0
    processes: int = 1
    once: bool = False
    base: str = ""
    """of a step: the one that it is one change away from"""


def ladder() -> dict[str, Config]:
    """Return the steps from the recipe `reference` to `fast`: each is the one before, changed."""
    fast = RECIPES["fast"]
    changes: dict[str, tuple[str, ...]] = {
        "a network on small maps": ("model",),
        "fewer images": ("epochs", "epoch_images"),
        "SGD with Nesterov momentum": ("optimizer", "max_lr", "weight_decay"),
        "constant momentum, linear annealing": ("cycle_momentum", "anneal"),
        "no dropout": ("dropout",),
        "label smoothing": ("label_smoothing",),
        "distortion": ("degrees", "pixels", "scale", "shear"),
        "averaged weights": ("ema_decay",),
        "focus on hard images": ("focus",),
    }
    steps, config = {}, RECIPES["reference"]
    for name, fields in changes.items():
        config = replace(config, **{field: getattr(fast, field) for field in fields})
        steps[name] = config
    return steps


def bench(folder: Path | None = None, repetitions: int = 5, only: str = "") -> Path:
    """Time everything in turns and append the rows to `speed.csv`; return its path.

    Repetitions go round all measures, so that a machine that slows down slows all of them.

    Args:
        folder: of the ledger; by default `runs_folder()`.
        repetitions: of each measure; the whole conventional run is done once.
        only: measure only what has this text in its kind or name.
    """
    path = (folder or runs_folder()) / "speed.csv"
    go = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    chosen = [m for m in measures(load_mnist("mnist")) if only in f"{m.kind}: {m.name}"]
    if not chosen or repetitions < 1:
        raise ConfigError(
            f"nothing to time: no measure has {only!r} in its name, or repetitions < 1"
        )
    for repetition in range(1, repetitions + 1):
        for m in chosen:
            if m.once and repetition > 1:
                continue
            seconds, evaluation = m.take()
            row = {
                "go": go, "kind": m.kind, "name": m.name, "base": m.base, "repetition": repetition,
                "images": m.images, "seconds": round(seconds, 4),
                "evaluation_seconds": round(evaluation, 4) or None,
                "whole_images": m.whole_images or None, "evaluations": m.evaluations,
                "threads": m.threads or torch.get_num_threads(), "processes": m.processes,
                "parameters": sum(p.numel() for p in m.model.parameters()) if m.model else None,
                "multiply_accumulates":
                    Budget(m.model).multiply_accumulates if m.model else 1024**3,
                "config_hash": m.config.hash("mnist") if m.config else None,
                "device": "cpu", "torch": versions()["torch"], "commit": commit(),
            }  # fmt: skip
            append(path, COLUMNS, [row])
            print(f"{repetition} of {repetitions}  {m.kind}: {m.name}, {seconds:.2f} s", flush=True)
    return path


def measures(digits: Digits) -> Iterator[Measure]:
    """Yield everything that is timed, on as many threads as torch is set to."""
    for n in sorted({1, torch.get_num_threads()}):
        yield Measure("matmul", f"{n} threads", partial(_once, matmul, n), 20, threads=n)
    c, n_train = RECIPES["reference"], len(digits.split()[0])
    whole = c.epochs * n_train
    for name, (base, way) in WAYS.items():
        take = partial(_conventional, course_of(c), way, digits)
        yield Measure("step", name, take, UNIT, build(c.model), c, whole, c.epochs - 1, base=base)
    base = "freed memory kept"
    for name, step in {"our loop, evaluated at the end": c, **ladder()}.items():
        whole = step.epochs * (step.epoch_images or n_train)
        take = partial(_ours, step, digits)
        yield Measure("step", name, take, UNIT, build(step.model), step, whole, base=base)
        base = name
    for name in ("keras", "pytorch"):
        course = COURSES[name]
        whole = course.epochs * n_train
        take = partial(_conventional, course, Way(), digits)
        yield Measure("peer", name, take, UNIT, course.build(), None, whole, course.epochs - 1)
    c = RECIPES["reference"]
    for name, job, n in (
        ("one run, one process", side_by_side, 1),
        ("two runs side by side", side_by_side, 2),
        ("one run on two ranks", shared, 2),
    ):
        take, images = (
            partial(_once, pair_seconds, job, n, c, UNIT),
            UNIT * (n if job is side_by_side else 1),
        )
        yield Measure("pair", name, take, images, build(), c, threads=1, processes=n)
    for name in ("fast", "sprint"):
        c = RECIPES[name]
        n = c.epochs * (c.epoch_images or n_train)
        yield Measure("run", name, partial(_whole, c, digits), n, build(c.model), c, n)
    for c in (RECIPES["reference"], RECIPES["fast"]):
        for name in (*OPERATORS, "the rest"):
            take = partial(_once, operators, c, UNIT // 4, digits, name)
            yield Measure("operators", f"{c.model}: {name}", take, UNIT // 4, build(c.model), c,
                          threads=1, once=True)  # fmt: skip
    c = RECIPES["reference"]
    yield Measure("run", "conventional", partial(_whole_conventional, digits), c.epochs * n_train,
                  build(), c, c.epochs * n_train, c.epochs - 1, once=True)  # fmt: skip


def _ours(config: Config, digits: Digits) -> tuple[float, float]:
    """Time our loop over some images, and an evaluation."""
    short = replace(config, epochs=1, split="none")
    for images in (WARM * config.batch_size, UNIT):
        run = train(replace(short, epoch_images=images), digits, save=False, verbose=False)
    return run.seconds, _evaluation(run.model, digits)


def _evaluation(model: nn.Module, digits: Digits) -> float:
    _, ids = digits.split()
    images, labels = digits.train_images[ids], digits.train_labels[ids]
    began = time.perf_counter()
    evaluate(model.to(memory_format=torch.channels_last), images, labels)
    return time.perf_counter() - began


def _conventional(course: Course, way: Way, digits: Digits) -> tuple[float, float]:
    """Time the conventional loop over some images, and an evaluation."""
    training, last = Training(course, digits, way=way), WARM + UNIT // course.batch_size
    try:
        for step in training:
            if step == WARM:
                began = time.perf_counter()
            if step == last:
                seconds = time.perf_counter() - began
                break
        began = time.perf_counter()
        training.accuracy()
        return seconds, time.perf_counter() - began
    finally:
        torch.set_flush_denormal(False)


def _once(timed: Callable[..., float], *args: object) -> tuple[float, float]:
    """Take seconds where no evaluation belongs to them."""
    return timed(*args), 0.0


def _whole(config: Config, digits: Digits) -> tuple[float, float]:
    """Time a whole training, from digits in memory to final weights; an evaluation apart."""
    images = config.epoch_images or len(digits.split()[0])
    # as many images, but none held out, so that no evaluation is in the time
    run = train(
        replace(config, split="none", epoch_images=images), digits, save=False, verbose=False
    )
    return run.seconds, _evaluation(run.model, digits)


def _whole_conventional(digits: Digits) -> tuple[float, float]:
    """Time the whole conventional run with an evaluation after each epoch, all of which count."""
    *_, (_, seconds, _) = curve(Training(COURSES["reference"], digits))
    return seconds, 0.0
