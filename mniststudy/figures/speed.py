"""Notebook 08: how fast training is, timed step by step, from a tutorial's loop to our fastest."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit
from typing import Any

import pandas as pd
import torch
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from torch import Tensor, nn

from mnistlib import RECIPES, Budget, Config, ConfigError, Digits, Run, evaluate, load_mnist, train
from mnistlib.model import normalise
from mnistlib.paths import runs_folder
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

from ..runs.ledger import append_rows, commit, read_results, whole_seconds
from .speed_loop import LOOP_STEPS, LoopOptions, TrainingSetup, TutorialLoop, training_setup

# what a row says is written down in outputs/README.md
COLUMNS = (
    "go", "kind", "name", "base", "repetition", "images", "seconds", "evaluation_seconds",
    "whole_images", "evaluations", "threads", "processes", "parameters", "multiply_accumulates",
    "config_hash", "device", "torch", "commit",
)  # fmt: skip
CURVE_COLUMNS = (
    "name", "seed", "epoch", "val_accuracy", "seconds", "parameters", "threads", "torch", "commit",
)  # fmt: skip
LABEL = "{kind}: {name}"  # of a measure
IMAGES_PER_TIMING = 12_800  # of a piece of training that stands for the whole
WARMUP_STEPS = 10  # before a clock starts
Timing = tuple[float, float]
"""seconds of training, and of an evaluation of the validation images (0: not timed)"""
Measure = tuple[dict[str, Any], Callable[[], Timing]]
"""what is particular to the row of a measure, and how it is taken"""


class _Normalised(nn.Sequential):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(normalise(pixels, self))


class _Scaled(nn.Sequential):
    def forward(self, pixels: Tensor) -> Tensor:
        return super().forward(pixels / 255)


def _keras_convnet() -> nn.Module:
    """Build the network of Keras' example mnist_convnet from its layer list: 34,826 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 32, 13, 13)
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),  # -> (N, 64, 5, 5)
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(1600, 10),
    )  # fmt: skip


def _pytorch_example() -> nn.Module:
    """Build the network of PyTorch's example mnist from its layer list: 1,199,882 parameters."""
    return _Normalised(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(),  # -> (N, 64, 24, 24)
        nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten(),  # -> (N, 9216)
        nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


# what the two loops are compared by: the recipe `fast` in a form that both can train
ONE_EPOCH = replace(RECIPES["fast"], epochs=1, epoch_images=50_000, pct_start=0.2)
ONE_EPOCH = replace(ONE_EPOCH, focus=0.0, ema_decay=0.98, slices=1)
# As published: github.com/keras-team/keras-io, examples/vision/mnist_convnet.py (Adam as it comes);
# github.com/pytorch/examples, mnist/main.py (Adadelta, rate 1, times 0.7 after each epoch)
BASELINES = {
    "reference": training_setup(RECIPES["reference"]),
    "one-epoch": training_setup(ONE_EPOCH),
    "keras": TrainingSetup(
        Config(epochs=15, batch_size=128),
        _keras_convnet,
        lambda model: torch.optim.Adam(model.parameters(), 1e-3, eps=1e-7),
        None,
    ),
    "pytorch": TrainingSetup(
        Config(epochs=14, batch_size=64),
        _pytorch_example,
        lambda model: torch.optim.Adadelta(model.parameters(), 1.0),
        lambda optimizer, steps: torch.optim.lr_scheduler.StepLR(optimizer, steps, 0.7),
    ),
}


def example_networks() -> dict[str, nn.Module]:
    """Return the networks of Keras' and PyTorch's examples, untrained, for uint8 pixels."""
    return {"keras": _Scaled(_keras_convnet()), "pytorch": _pytorch_example()}


def recipe_steps() -> dict[str, Config]:
    """Return the steps from the recipe `reference` to `fast`: each is the one before, changed."""
    changes = {
        "a network on small maps": "model",
        "fewer images": "epochs epoch_images",
        "SGD with Nesterov momentum": "optimizer max_lr weight_decay",
        "another learning-rate cycle": "cycle_momentum anneal pct_start",
        "no dropout": "dropout",
        "label smoothing": "label_smoothing",
        "augmentation": "degrees pixels scale shear",
        "averaged weights": "ema_decay",
        "hard-example mining": "focus",
        "two slices on two threads": "slices",
    }
    steps, config = {}, RECIPES["reference"]
    for name, fields in changes.items():
        changed = {field: getattr(RECIPES["fast"], field) for field in fields.split()}
        steps[name] = config = replace(config, **changed)
    return steps


def train_quietly(config: Config, digits: Digits, images: int = 0, **changes: Any) -> Run:
    """Train by our loop, one epoch of so many images if given; hold out, save and print nothing."""
    if images:
        changes |= {"epochs": 1, "epoch_images": images}
    return train(replace(config, split="none", **changes), digits, save=False, verbose=False)


def time_our_loop(setup: TrainingSetup, digits: Digits, images: int = IMAGES_PER_TIMING) -> Timing:
    """Time our loop over some images (0: the whole training), and an evaluation."""
    train_quietly(setup.config, digits, WARMUP_STEPS * setup.config.batch_size)
    run, (_, ids) = train_quietly(setup.config, digits, images), digits.split()
    pixels, labels = digits.train_images[ids], digits.train_labels[ids]
    began = time.perf_counter()
    evaluate(run.model.to(memory_format=torch.channels_last), pixels, labels)
    return run.seconds, time.perf_counter() - began


def time_tutorial_loop(
    setup: TrainingSetup, digits: Digits, options: LoopOptions, images: int = IMAGES_PER_TIMING
) -> Timing:
    """Time the tutorial's loop over some images (0: an epoch), and an evaluation."""
    loop = TutorialLoop(setup, digits, options)
    steps = iter(loop)
    n = images // setup.config.batch_size or loop.steps_per_epoch
    for n_steps in (WARMUP_STEPS, n):
        began = time.perf_counter()
        for _ in range(n_steps):
            next(steps)
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    loop.accuracy()
    return seconds, time.perf_counter() - began


def time_matmul(threads: int) -> Timing:
    """Time 20 products of 1024x1024 matrices: what the machine multiplies at best."""
    (a, b), usual = torch.rand(2, 1024, 1024), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        timeit(lambda: a @ b, number=5)
        return timeit(lambda: a @ b, number=20), 0.0
    finally:
        torch.set_num_threads(usual)


def time_side_by_side(setup: TrainingSetup, digits: Digits, processes: int) -> Timing:
    """Time runs of one thread each in processes, from the first start to the last end."""
    with TemporaryDirectory() as folder:
        marks = [Path(folder) / str(i) for i in range(processes)]
        config = replace(setup.config, epochs=1, epoch_images=IMAGES_PER_TIMING, threads=1)
        jobs = [delayed(_train_beside)(config, digits, mark, marks) for mark in marks]
        begins, ends = zip(*Parallel(processes)(jobs), strict=True)
    get_reusable_executor().shutdown()  # idle workers would keep this process from its end
    return max(ends) - min(begins), 0.0


def _train_beside(config: Config, digits: Digits, mark: Path, marks: list[Path]) -> Timing:
    """Train when all processes are warm, which their marks say; return begin and end."""
    train_quietly(config, digits, WARMUP_STEPS * config.batch_size)
    mark.touch()
    while not all(other.exists() for other in marks):
        time.sleep(0.001)
    began = time.perf_counter()
    return began, began + train_quietly(config, digits).seconds


def memory_table(config: Config) -> pd.Series:
    """Return the MB that each stage of a training adds to a new process above `import torch`.

    Of the largest resident size so far, so a stage that stays below it adds nothing. Linux alone
    tells it; elsewhere the table is empty.
    """
    stages = {
        "the package": "import mnistlib",
        "torch's first optimizer, which imports its compiler": "torch.optim.SGD([torch.zeros(1)])",
        "digits, read and checked": "digits = mnistlib.load_mnist()",
        "training": f"mnistlib.train(mnistlib.{config}, digits, save=False, verbose=False)",
    }
    # not by getrusage: a process starts with the peak of the one that started it
    peak = "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    lines = ["import re, torch", peak, *(f"{do}\n{peak}" for do in stages.values())]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, capture_output=True, text=True)
    added = [(int(b) - int(a)) / 1e3 for a, b in pairwise(done.stdout.split())]
    return pd.Series(added, list(stages)[: len(added)], name="MB").round()


def measures(digits: Digits) -> Iterator[Measure]:
    """Yield everything that is timed, on as many threads as torch is set to."""
    reference, n_train = BASELINES["reference"], len(digits.split()[0])
    counts = sorted({1, torch.get_num_threads()})

    def entry(kind: str, name: str, setup: TrainingSetup, timer: Callable, **more: Any) -> Measure:
        config, cost = setup.config, Budget(setup.build())
        whole = config.epochs * (config.epoch_images or n_train)
        row = {"kind": kind, "name": name, "images": IMAGES_PER_TIMING}
        row |= {"parameters": cost.parameters, "multiply_accumulates": cost.multiply_accumulates}
        row["config_hash"] = None if kind == "peer" else config.hash("mnist")
        row["whole_images"] = whole if kind in ("step", "peer", "run") else None
        if kind == "peer" or name in LOOP_STEPS:
            row["evaluations"] = config.epochs - 1
        return row | more, partial(timer, setup, digits)

    for n in counts:
        row = {"kind": "matmul", "name": f"{n} threads", "images": 20, "threads": n}
        yield row | {"multiply_accumulates": 1024**3}, partial(time_matmul, n)
    tutorial = partial(time_tutorial_loop, options=LoopOptions())
    for name in ("keras", "pytorch"):
        yield entry("peer", name, BASELINES[name], tutorial)
    # an epoch with its evaluation stands for the twenty
    more = {"images": n_train, "evaluations": reference.config.epochs}
    yield entry("run", "conventional", reference, partial(tutorial, images=0), **more)
    for name, (base, options) in LOOP_STEPS.items():
        timer = partial(time_tutorial_loop, options=options)
        yield entry("step", name, reference, timer, base=base)
    base = "freed memory kept"
    ours = {"our loop, evaluated at the end": reference.config} | recipe_steps()
    for name, config in ours.items():
        yield entry("step", name, training_setup(config), time_our_loop, base=base)
        base = name
    for name, n in (("one run, one process", 1), ("two runs side by side", 2)):
        more = {"images": n * IMAGES_PER_TIMING, "threads": 1, "processes": n}
        yield entry("pair", name, reference, partial(time_side_by_side, processes=n), **more)
    recipes = {name: RECIPES[name] for name in ("reference-fast", "fast", "sprint")}
    for name, config in list(recipes.items())[:2]:
        for n in counts:
            setup = training_setup(replace(config, threads=n))
            yield entry("threads", f"{name}, {n} threads", setup, time_our_loop, threads=n)
        timer = partial(time_tutorial_loop, options=LOOP_STEPS["freed memory kept"][1])
        setup = training_setup(replace(config, slices=1))
        yield entry("threads", f"{name}, torch's own threads", setup, timer)
    for name, config in recipes.items():
        whole = config.epochs * config.epoch_images
        timer = partial(time_our_loop, images=0)
        yield entry("run", name, training_setup(config), timer, images=whole)


def bench(folder: Path | None = None, repetitions: int = 5, only: str = "") -> Path:
    """Time everything in rounds and append the rows to `speed.csv`; return its path.

    A round goes through all measures, so that a machine that slows down slows all of them. Each has
    a new process: how ours uses memory would change the loops that are timed after it.

    Args:
        folder: of the ledger; by default `runs_folder()`.
        repetitions: of each measure, the rounds.
        only: measure only what has this text in its kind or name.

    Raises:
        ConfigError: nothing is to be measured.
        LedgerError: `speed.csv` is another table, or cannot be written.
    """
    path = (folder or runs_folder()) / "speed.csv"
    if repetitions < 1 or not _chosen(only):
        raise ConfigError(f"no measure has {only!r} in its name, or repetitions is below 1")
    append_rows(path, COLUMNS, [])  # another table is refused before the work
    common = {"go": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "evaluations": 0}
    common |= {"threads": torch.get_num_threads(), "processes": 1, "device": "cpu"}
    common |= {"torch": str(torch.__version__), "commit": commit()}
    for repetition in range(1, repetitions + 1):
        in_new_process(_round, path, common | {"repetition": repetition}, only)
    return path


def in_new_process(work: Callable, *arguments: Any) -> None:
    """Call a function in a new process and wait for its end."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def _round(path: Path, common: dict[str, Any], only: str) -> None:
    torch.set_num_threads(common["threads"])
    for about, measure in _chosen(only):
        seconds, evaluation = measure()
        row = common | about | {"seconds": round(seconds, 4)}
        row["evaluation_seconds"] = round(evaluation, 4) or None
        append_rows(path, COLUMNS, [row])
        print(f"round {row['repetition']}  {LABEL.format(**row)}, {seconds:.2f} s", flush=True)


def _chosen(only: str) -> list[Measure]:
    return [m for m in measures(load_mnist("mnist")) if only in LABEL.format(**m[0])]


def curves(name: str, seeds: Sequence[int], folder: Path | None = None) -> Path:
    """Train a baseline by the tutorial's loop, one seed per core, each epoch a row of `curves.csv`.

    Args:
        name: in `BASELINES`.
        seeds: those that the file has already are left out.
        folder: of the ledger; by default `runs_folder()`.

    Raises:
        LedgerError: `curves.csv` is another table, or cannot be written.
    """
    path = (folder or runs_folder()) / "curves.csv"
    append_rows(path, CURVE_COLUMNS, [])  # another table is refused before the work
    known = set(pd.read_csv(path).query("name == @name")["seed"])
    jobs = [delayed(_curve)(name, seed) for seed in seeds if seed not in known]
    text = "{name} seed {seed}: {val_accuracy:.2f} % after {epoch} epochs, {seconds:.0f} s"
    for rows in Parallel(-1, return_as="generator_unordered")(jobs):
        append_rows(path, CURVE_COLUMNS, rows)
        print(text.format(**rows[-1]), flush=True)
    return path


def _curve(name: str, seed: int) -> list[dict[str, Any]]:
    """Train a baseline on one thread; return a row per epoch."""
    torch.set_num_threads(1)
    row = {"name": name, "seed": seed, "threads": 1, "torch": str(torch.__version__)}
    loop = TutorialLoop(BASELINES[name], load_mnist("mnist"), LoopOptions(), seed)
    row |= {"parameters": sum(p.numel() for p in loop.model.parameters()), "commit": commit()}
    return [
        row | {"epoch": epoch, "val_accuracy": round(accuracy, 4), "seconds": round(seconds, 2)}
        for epoch, seconds, accuracy in loop.epochs()
    ]


def step_table(folder: Path | None = None) -> pd.DataFrame:
    """Return a row per step that was timed last: what its whole training takes and reaches.

    Columns: `seconds` of the training images at the median pace of the repetitions, the
    evaluations on the way included; `fastest` and `slowest` repetition; `us` per image;
    `base`, the step that it is one change away from; `accuracy`, the list of validation accuracies
    at the last epoch of the committed seeds below 100, others having served to choose (a step that
    only rounds differently shares those of its Config, half precision does not); `kept`, whether
    others build on it.
    """
    speed, runs = read_results("speed", folder), read_results(folder=folder)
    speed = speed[(speed["kind"] == "step") & (speed["go"] == speed["go"].max())]
    pace, whole = speed["seconds"] / speed["images"], whole_seconds(speed)
    steps = speed.assign(us=1e6 * pace, whole=whole).groupby("name", sort=False)
    table = steps["whole"].agg(["median", "min", "max"]).rename_axis(None)
    table.columns = ["seconds", "fastest", "slowest"]
    table["us"], table["base"] = steps["us"].median(), steps["base"].first().fillna("")
    runs = runs[runs["seed"] < 100]
    seedless = [Config(**json.loads(c) | {"seed": 0}).hash("mnist") for c in runs["config"]]
    reached = runs["val_accuracy"].groupby(seedless).agg(list).to_dict() | {None: []}
    digests = steps["config_hash"].first().where(table.index != "bfloat16", None)
    table["accuracy"] = [reached.get(digest, []) for digest in digests]
    table["kept"] = table.index.isin({*table["base"], table.index[-1]})
    return table


def staircase(table: pd.DataFrame, title: str) -> None:
    """Draw the seconds of each step of `step_table` as points on a log axis, downwards.

    Points are medians, lines reach from the fastest repetition to the slowest. Steps that were
    tried and not built on are hollow; beside each stands the validation accuracy with its number
    of seeds.
    """
    subtitle = "median and range of the repetitions; validation accuracy, mean over seeds"
    with figure(title, subtitle, size=(7, 1.0 + 0.27 * len(table))) as (_, (ax,)):
        for y, (_, step) in enumerate(table.iterrows()):
            color = TRAIN if y else REFERENCE
            ax.plot([step["fastest"], step["slowest"]], [y, y], color=color, lw=1.2)
            fill = color if step["kept"] else "white"
            ax.plot(step["seconds"], y, "o", color=color, mfc=fill, ms=6)
            note(ax, f"  {step['seconds']:.0f} s", (step["slowest"], y), va="center")
            if n := len(step["accuracy"]):
                text = f"{sum(step['accuracy']) / n:.2f} %, n = {n}"
                place = ("axes fraction", "data")
                note(ax, text, (1, y), xycoords=place, va="center", color=VALIDATION)
        names = [n if kept else f"{n} (not kept)" for n, kept in table["kept"].items()]
        ax.set_yticks(range(len(table)), names, fontsize=8)
        ax.invert_yaxis()
        log_axis(ax.xaxis)
        ax.set(xlim=(table["seconds"].min() / 2, 2 * table["slowest"].max()))
        ax.set_xlabel("seconds of training")
