"""Notebook 08: how fast training is, timed step by step, from a tutorial's loop to our fastest."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice, pairwise
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from time import perf_counter
from timeit import timeit
from typing import Any

import pandas as pd
import torch
from torch import nn

from mnistlib import RECIPES, Budget, Config, Digits, Run, build, load_mnist, train
from mnistlib.paths import runs_folder
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION, figure, log_axis, note

from ..runs.ledger import append_rows, commit, config_in, read_results, whole_seconds
from .speed_loop import KEPT, NOT_KEPT, TutorialLoop, config_parts, keras_parts, pytorch_parts

IMAGES_PER_TIMING = 12_800  # of a piece of training that stands for the whole
WARMUP_STEPS = 10  # before a clock starts
Timing = tuple[float, float]
"""seconds of training, and of an evaluation of the validation images (0: not timed)"""

# what the two loops are compared by: the recipe `fast` in a form that both can train
ONE_EPOCH = replace(
    RECIPES["fast"], epochs=1, epoch_images=50_000, pct_start=0.2, focus=0.0, ema_decay=0.98,
    slices=1,
)  # fmt: skip
EXAMPLES = {
    "keras": (Config(epochs=15, batch_size=128), keras_parts),
    "pytorch": (Config(epochs=14, batch_size=64), pytorch_parts),
}
BASELINES = EXAMPLES | {"one-epoch": (ONE_EPOCH, config_parts)}


def example_networks() -> dict[str, nn.Module]:
    """Return the networks of Keras' and PyTorch's examples, untrained, for uint8 pixels."""
    return {name: parts(config, 1)[0] for name, (config, parts) in EXAMPLES.items()}


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


def train_quietly(config: Config, digits: Digits, images: int = 0) -> Run:
    """Train by our loop, one epoch of so many images if given; hold out, save and print nothing."""
    if images:
        config = replace(config, epochs=1, epoch_images=images)
    return train(replace(config, split="none"), digits, save=False, verbose=False)


def time_our_loop(config: Config, digits: Digits, images: int = IMAGES_PER_TIMING) -> Timing:
    """Time our loop over some images (0: the whole training), without evaluations."""
    train_quietly(config, digits, WARMUP_STEPS * config.batch_size)
    return train_quietly(config, digits, images).seconds, 0.0


def time_tutorial_loop(
    config: Config, digits: Digits, images: int = IMAGES_PER_TIMING, **options: Any
) -> Timing:
    """Time the tutorial's loop, with options of `TutorialLoop`, and an evaluation."""
    loop = TutorialLoop(config, digits, **options)
    steps, n = iter(loop), -(-images // config.batch_size)
    list(islice(steps, WARMUP_STEPS))
    return timeit(lambda: list(islice(steps, n)), number=1), timeit(loop.accuracy, number=1)


def time_matmul() -> Timing:
    """Time 20 products of 1024x1024 matrices: what the machine multiplies at best."""
    a, b = torch.rand(2, 1024, 1024)
    timeit(lambda: a @ b, number=5)
    return timeit(lambda: a @ b, number=20), 0.0


def time_side_by_side(config: Config, digits: Digits, processes: int) -> Timing:
    """Time runs of one thread each in processes, from the first start to the last end."""
    context = get_context("spawn")
    together = context.Barrier(processes + 1, timeout=600)
    for _ in range(processes):
        context.Process(target=_train_beside, args=(config, digits, together)).start()
    together.wait()
    return timeit(together.wait, number=1), 0.0


def _train_beside(config: Config, digits: Digits, together: Barrier) -> None:
    """Train when all processes are warm, and tell the others when it is done."""
    config = replace(config, threads=1)
    train_quietly(config, digits, WARMUP_STEPS * config.batch_size)
    together.wait()
    train_quietly(config, digits, IMAGES_PER_TIMING)
    together.wait()


def measures(digits: Digits) -> Iterator[tuple[dict[str, Any], Callable[[], Timing]]]:
    """Yield what is particular to the row of each measure, and how the measure is taken."""
    reference, n_train = RECIPES["reference"], len(digits.split()[0])
    threads, networks = torch.get_num_threads(), example_networks()

    def entry(kind: str, name: str, config: Config, timer: Callable, **more: Any) -> Any:
        cost = Budget(networks.get(name) or build(config.model))
        row = {"kind": kind, "name": name, "images": IMAGES_PER_TIMING}
        row |= {"parameters": cost.parameters, "multiply_accumulates": cost.multiply_accumulates}
        row["config_hash"] = None if name in networks else config.hash("mnist")
        if kind in ("step", "peer", "run"):
            row["whole_images"] = config.epochs * (config.epoch_images or n_train)
        return row | more, partial(timer, config, digits)

    row: dict[str, Any] = {"kind": "matmul", "name": f"{threads} threads", "images": 20}
    yield row | {"multiply_accumulates": 1024**3}, time_matmul
    for name, (config, parts) in EXAMPLES.items():
        timer = partial(time_tutorial_loop, parts=parts)
        yield entry("peer", name, config, timer, evaluations=config.epochs - 1)
    # an epoch with its evaluation stands for the twenty
    timer = partial(time_tutorial_loop, images=n_train)
    row, measure = entry("run", "conventional", reference, timer, evaluations=reference.epochs)
    yield row | {"images": n_train}, measure
    names = ("", "conventional loop", *KEPT)
    steps = [(base, name, KEPT[:n]) for n, (base, name) in enumerate(pairwise(names))]
    steps += [(KEPT[-1], name, (*KEPT, name)) for name in NOT_KEPT]
    for base, name, changes in steps:
        timer, evaluations = partial(time_tutorial_loop, changes=changes), reference.epochs - 1
        yield entry("step", name, reference, timer, base=base, evaluations=evaluations)
    base = KEPT[-1]
    for name, config in {"our loop, evaluated at the end": reference, **recipe_steps()}.items():
        yield entry("step", name, config, time_our_loop, base=base)
        base = name
    for n, name in enumerate(("one run, one process", "two runs side by side"), 1):
        timer, images = partial(time_side_by_side, processes=n), n * IMAGES_PER_TIMING
        yield entry("pair", name, reference, timer, images=images, threads=1, processes=n)
    for recipe in ("reference-fast", "fast"):
        for n in sorted({1, threads}):
            config, name = replace(RECIPES[recipe], threads=n), f"{recipe}, {n} threads"
            yield entry("threads", name, config, time_our_loop, threads=n)
        config, name = replace(RECIPES[recipe], slices=1), f"{recipe}, torch's own threads"
        yield entry("threads", name, config, partial(time_tutorial_loop, changes=KEPT))
    for recipe in ("reference-fast", "fast", "sprint"):
        row, measure = entry("run", recipe, RECIPES[recipe], partial(time_our_loop, images=0))
        yield row | {"images": row["whole_images"]}, measure


def bench(repetitions: int = 5) -> Path:
    """Time everything in rounds and append the rows to `speed.csv`; return its path.

    The machine must be idle meanwhile, for about half an hour on two cores. A round goes through
    all measures, so that a machine that slows down slows all of them. Each has a new process: how
    ours uses memory would change the loops that are timed after it. A round that is interrupted
    leaves no rows, because every measure is compared with others of its round.

    Args:
        repetitions: of each measure, the rounds.

    Raises:
        LedgerError: `speed.csv` is another table, or cannot be written.
    """
    path = runs_folder() / "speed.csv"
    session = {"go": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    for repetition in range(1, repetitions + 1):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(_round, path, session | {"repetition": repetition}).result()
    return path


def _round(path: Path, session: dict[str, Any]) -> None:
    """Take each measure once and append the rows, with the columns of the committed table."""
    columns, rows = list(map(str, read_results("speed"))), []
    append_rows(path, columns, [])  # another table is refused before the work
    usual = {"evaluations": 0, "threads": torch.get_num_threads(), "processes": 1, "device": "cpu"}
    usual |= session | {"torch": str(torch.__version__), "commit": commit()}
    for about, measure in measures(load_mnist("mnist")):
        seconds, evaluation = (round(value, 4) for value in measure())
        rows.append(usual | about | {"seconds": seconds, "evaluation_seconds": evaluation or None})
        label = f"round {session['repetition']}  {about['kind']}: {about['name']}"
        print(f"{label}, {seconds:.2f} s", flush=True)
    append_rows(path, columns, rows)


def curves(name: str, seed: int = 0) -> Path:
    """Train a baseline by the tutorial's loop on one thread; add a row per epoch to `curves.csv`.

    Args:
        name: in `BASELINES`.
        seed: of weights, order and augmentation.

    Raises:
        LedgerError: `curves.csv` is another table, or cannot be written.
    """
    path, columns = runs_folder() / "curves.csv", list(map(str, read_results("curves")))
    append_rows(path, columns, [])  # another table is refused before the work
    torch.set_num_threads(1)
    config, parts = BASELINES[name]
    loop = TutorialLoop(config, load_mnist("mnist"), seed=seed, parts=parts)
    row = {"name": name, "seed": seed, "threads": 1, "torch": str(torch.__version__)}
    row |= {"parameters": sum(p.numel() for p in loop.model.parameters()), "commit": commit()}
    rows, began = [], perf_counter()
    for step in loop:
        if step % loop.steps_per_epoch == 0:
            row["epoch"], accuracy = step // loop.steps_per_epoch, loop.accuracy()
            seconds = round(perf_counter() - began, 2)
            rows.append(row | {"val_accuracy": round(accuracy, 4), "seconds": seconds})
    append_rows(path, columns, rows)
    return path


def step_table(folder: Path | None = None) -> pd.DataFrame:
    """Return a row per step that was timed last: what its whole training takes and reaches.

    Columns: `seconds` of the training images at the median pace of the repetitions, the
    evaluations on the way included; `fastest` and `slowest` of the `repetitions`; `us` per image;
    `base`, the step that it is one change away from; `accuracy`, the list of validation accuracies
    at the last epoch of the committed seeds below 100, others having served to choose (a step that
    only rounds differently shares those of its Config, half precision does not); `kept`, whether
    others build on it.
    """
    speed, runs = read_results("speed", folder), read_results(folder=folder)
    speed = speed[(speed["kind"] == "step") & (speed["go"] == speed["go"].max())]
    pace, whole = speed["seconds"] / speed["images"], whole_seconds(speed)
    steps = speed.assign(us=1e6 * pace, whole=whole).groupby("name", sort=False)
    table = steps["whole"].agg(["median", "min", "max", "count"]).rename_axis(None)
    table.columns = ["seconds", "fastest", "slowest", "repetitions"]
    table["us"], table["base"] = steps["us"].median(), steps["base"].first().fillna("")
    runs = runs[runs["seed"] < 100]
    seedless = [replace(config_in(c), seed=0).hash("mnist") for c in runs["config"]]
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
    n = table["repetitions"].min()
    subtitle = f"median and range of n = {n} repetitions; validation accuracy, mean of n seeds"
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
        ax.set_yticks(range(len(table)), names)
        ax.invert_yaxis()
        log_axis(ax.xaxis)
        ax.set(xlim=(table["seconds"].min() / 2, 2 * table["slowest"].max()))
        ax.set_xlabel("seconds of training")
