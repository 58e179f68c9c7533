"""What can a handwritten-digit classifier do on a parameter budget?

Digits are read from the folder in MNISTLIB_DATA, else from the cache, else downloaded, else taken
from an embedded sample of 5,000. Runs go to MNISTLIB_RUNS, else to outputs/runs. Exit codes: 0
done, 1 error with an explanation, 2 wrong command line, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import importlib.util
import inspect
import json
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import mnistlib
from mnistlib import Config, ConfigError
from mnistlib.checkpoint import latest_checkpoint
from mnistlib.config import DEFAULT_RECIPE, check_allowed
from mnistlib.paths import outputs_folder, runs_folder, write_atomically
from mnistlib.runtime import pick_device

from .runs.ledger import check_ledger, collect, commit, record, record_pool


def peak_memory_mb() -> float:
    """Return the peak resident memory of this process so far, in MB; 0 if it is unknown."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


AT_START = peak_memory_mb()  # after the import of torch, before any work


def do_train(args: argparse.Namespace) -> int:
    """Train a network and save its checkpoint.

    A table row is printed per epoch. Ctrl-C or SIGTERM stops it after the current step and saves a
    checkpoint, which --resume continues. Settings that are not given are those of the recipe.

    Options:
        --recipe NAME: reference, reference-fast, fast, sprint, smoothed, smoothed-20k, teacher,
            best, best-20k, best-7918, best-6174, best-3500, best-1936, best-1000 or best-697;
            without it, reference-fast
        --resume CHECKPOINT: continue this run with its own settings; with the folder of a run, from
            its latest intact checkpoint
        --test: evaluate the final weights on the test set
        --folder FOLDER: folder of the checkpoints
        --ledger FOLDER: ledger to which the row is added
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    if args.resume:
        if args.recipe or settings(args):
            raise ConfigError("--resume continues a run with its own settings; give none with it")
        args.resume = latest_checkpoint(args.resume)
        content = mnistlib.load_checkpoint(args.resume)
        config = Config(**content["config"])
        if len(content["history"]) == config.epochs:
            print(f"{args.resume} belongs to a finished run: nothing is trained or recorded")
            return 0
    else:
        config = mnistlib.configure(args.recipe or DEFAULT_RECIPE, **settings(args))
    # everything that can be wrong is checked before digits are loaded
    pick_device(config.device)
    folder = args.folder or runs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder {folder} cannot be a folder ({error.strerror})") from None
    check_ledger(args.ledger)
    # the first optimizer makes torch import its compiler, which takes much of the memory
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with_optimizer = peak_memory_mb()
    digits = mnistlib.load_mnist(args.data)
    commit()  # cached now, because files may change before the run ends
    run = mnistlib.train(config, digits, args.resume, folder=args.folder)
    peak = peak_memory_mb()
    print(run)
    if run.interrupted:
        again = f"Continue with: mnist train --resume {run.checkpoint}"
        print(again if run.checkpoint else "Interrupted before the first checkpoint: start again")
        return 128 + run.signal
    test = None
    if args.test and digits.test_images is not None and digits.test_labels is not None:
        test = mnistlib.evaluate(run.model, digits.test_images, digits.test_labels)
        print(f"test: {test}")
    memory = (peak - AT_START, with_optimizer - AT_START) if peak else (None, None)
    record(run, test, args.ledger, *memory)
    collect(args.ledger)
    print(f"checkpoint: {run.checkpoint}")
    return 0


def do_sweep(args: argparse.Namespace) -> int:
    """Train a recipe over many seeds, one run per core.

    Each run has one thread and is recorded when it ends. Runs that are in the ledger are skipped,
    so the same command continues a stopped sweep. An interrupted run continues from its last epoch.

    Options:
        --recipe NAME: reference, reference-fast, fast, sprint, smoothed, smoothed-20k, teacher,
            best, best-20k, best-7918, best-6174, best-3500, best-1936, best-1000 or best-697;
            without it, reference-fast
        --seeds FROM:TO: 0:20 means 0 to 19 [default: 0:5]
        --ablations N: train the comparisons of notebook 06 instead, N epochs each; other settings
            do not apply
        --only NAME +: only these ablations, e.g. 'as it is' 'no hard-example mining'
        --test: evaluate the final weights on the test set
        --ledger FOLDER: ledger to which the rows are added
        --curves: validate after each epoch, not only after the last
        --workers N: number of processes; 0: one per core [default: 0]
        --stacked: train all seeds in this process as one wide network, for a GPU; needs sgd,
            --slices 1 and no dropout
        --keep FOLDER: with --stacked, save the final weights of each run here
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    from .figures.ablations import ablations
    from .runs.stacked import sweep_stacked
    from .runs.sweep import sweep

    if args.only and args.ablations is None:
        raise ConfigError("--only is for --ablations")
    if args.ablations is None:
        every = {"": mnistlib.configure(args.recipe or DEFAULT_RECIPE, **settings(args))}
    elif args.recipe or settings(args):
        raise ConfigError("--ablations has its own settings; give none with it")
    else:
        every = ablations(args.ablations)
    for name in args.only or ():
        check_allowed("--only", name, tuple(every))
    # ordered by seed, so that all have the same seeds wherever the sweep stops
    configs = [replace(every[k], seed=seed) for seed in args.seeds for k in args.only or every]
    check_allowed("--workers", args.workers, (0, 1024))
    pick_device(configs[0].device)
    if args.stacked:
        if args.curves or args.workers:
            raise ConfigError(
                "--curves and --workers do not go with --stacked, which is one process"
            )
        what = {"data": args.data, "test": args.test, "keep": args.keep}
        return int(sweep_stacked(configs, args.ledger, **what)[1] > 0)
    if args.keep:
        raise ConfigError("--keep is for --stacked; `train` saves the checkpoint of one run")
    how = {"data": args.data, "test": args.test, "curves": args.curves, "workers": args.workers}
    return int(sweep(configs, args.ledger, **how)[1] > 0)


def do_teach(args: argparse.Namespace) -> int:
    """Ask teachers about augmented training images, once for all students.

    The answers are a pool, which is named after what it is made of. A student is trained with
    --pool NAME and without augmentation or label smoothing of its own. A stopped command is
    continued by the same one.

    Options:
        teachers FILE +: checkpoints, all trained with the same split
        --views N: augmented views of each training image [default: 20]
        --recipe NAME: whose augmentation the views get [default: teacher]
        --device DEVICE: auto, cpu, cuda, mps or xpu [default: auto]
        --ledger FOLDER: ledger to whose pools.csv the pool is added
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    from mnistlib.distill import pool_folder

    from .runs.teachers import build_pool

    check_allowed("--views", args.views, (1, 100))
    check_ledger(args.ledger)
    config, device = mnistlib.configure(args.recipe), pick_device(args.device)
    if not config.augmentation:
        raise ConfigError(
            f"--recipe {args.recipe} has no augmentation, so all views would be alike"
        )
    digits = mnistlib.load_mnist(args.data)
    name = build_pool(args.teachers, digits, config, args.views, device)
    record_pool(pool_folder(name), args.ledger)
    print(f"pool {name}: {args.views} views of {len(digits.train_labels):,} images, ", end="")
    print(f"{len(args.teachers)} teachers; train with --pool {name}")
    return 0


def do_bench(args: argparse.Namespace) -> int:
    """Time training, step by step from a conventional loop to the fastest recipe.

    All steps of notebook 08 are timed in turn and the rows are added to speed.csv. The machine must
    be idle meanwhile, for about half an hour on two cores. Accuracy is measured separately, with
    one seed per core: --ladder trains the steps that change the recipe, --curves trains a baseline
    with the conventional loop and adds its epochs to curves.csv.

    Options:
        --repetitions N: rounds of measurement [default: 5]
        --only TEXT: measure only what has this text in its kind or name
        --ladder: train the steps instead of timing them
        --curves BASELINE: train reference, keras, pytorch or one-epoch instead
        --latency: time answers instead, of best and of the examples of Keras and PyTorch, by torch
            and onnxruntime, on one thread; rows are added to latency.csv
        --seeds FROM:TO: seeds for --ladder and --curves [default: 0:1]
        --ledger FOLDER: ledger to which the rows are added
    """
    check_ledger(args.ledger)
    if args.latency:
        from .figures.speed import example_networks
        from .use.export import latency
        from .use.formats import check_extra

        check_extra()  # before digits are loaded
        best = mnistlib.load_model(mnistlib.released_checkpoint())
        digits = mnistlib.load_mnist("mnist")
        path = latency({"best": best} | example_networks(), digits, args.ledger, args.repetitions)
        print(f"rows are in {path}")
        return 0
    from .figures.speed import BASELINES, bench, curves, recipe_steps
    from .runs.sweep import sweep

    if args.ladder:
        steps = [replace(c, seed=seed) for c in recipe_steps().values() for seed in args.seeds]
        return int(sweep(steps, args.ledger, data="mnist")[1] > 0)
    if args.curves:
        check_allowed("--curves", args.curves, tuple(BASELINES))
        path = curves(args.curves, args.seeds, args.ledger)
    else:
        path = bench(args.ledger, args.repetitions, args.only or "")
    print(f"rows are in {path}")
    return 0


def do_audit(args: argparse.Namespace) -> int:
    """Train a committed run again and compare.

    A run is chosen at random from the committed ledger and trained again with the settings of its
    row; then all values are compared. The exit code is 1 if an accuracy differs by more than it
    would between two seeds.

    Options:
        --recipe NAME: only runs of this recipe as it is now, or the run with this config hash,
            including runs on a GPU
        --minutes MINUTES: only runs that took no longer, on the device that they ran on
            [default: 10]
        --pick N: seed of the random choice; without it, a new choice each time
        --ledger FOLDER: another ledger
    """
    from .runs.audit import audit

    found = audit(args.ledger, args.recipe, args.minutes, args.pick)
    print(found)
    return int(not found.passed)


def do_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint on its validation images and the test set.

    Options:
        checkpoint FILE ?: without it, the released checkpoint of best
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    from .runs.report import describe

    path = args.checkpoint or mnistlib.released_checkpoint()
    mnistlib.load_checkpoint(path)  # a bad file is refused before digits are loaded
    print(describe(path, mnistlib.load_mnist(args.data)))
    return 0


def do_predict(args: argparse.Namespace) -> int:
    """Say which digits each picture shows, from left to right.

    A mark may also be 'not sure' or 'not a digit'; the thresholds are those of calibration.json
    beside the checkpoint. The exit code is 1 if a file cannot be read; the others are read.

    Options:
        images FILE +: photos, scans or drawings of digits, as PNG, JPEG, ...
        --checkpoint FILE: without it, the released checkpoint of best
        --show: write what the network saw and its answers beside each picture, as NAME-read.png
        --json: print all probabilities and the boxes as JSON
    """
    from .use.pictures import load_calibration, read_marks, read_picture, save_readings

    path = args.checkpoint or mnistlib.released_checkpoint()
    model, calibration, failed = mnistlib.load_model(path), load_calibration(path), False
    found: list[dict[str, Any]] = []
    for image in args.images:
        try:
            page, notes = read_picture(image)
            readings = read_marks(model, page.marks, calibration)
            shown = save_readings(image, readings) if args.show else None
        except mnistlib.DatasetError as error:
            print(f"error: {error}", file=sys.stderr)
            found.append({"picture": str(image), "error": str(error)})
            failed = True
            continue
        found.append({"picture": str(image), "notes": notes, "reason": page.reason or None})
        found[-1]["readings"] = [reading.as_dict(page.scale) for reading in readings]
        if not args.json:
            said = ", ".join(map(str, readings)) or f"not a digit ({page.reason})"
            several = f"{len(readings)} marks: " if len(readings) > 1 else ""
            print(f"{image}: {several}{said}", *notes, *([f"see {shown}"] * args.show), sep="; ")
    if args.json:
        print(json.dumps(found, indent=1))
    return int(failed)


def do_calibrate(args: argparse.Namespace) -> int:
    """Fit the temperature and the thresholds of predict, and write calibration.json.

    The released network was trained on all training images, so nothing is left to calibrate it on.
    Its twin was trained by the same recipe on a part, and so were the twin's teachers, if it has
    any; what is fitted on the validation images of the twin is used for both. The file is written
    beside CHECKPOINT.

    Options:
        twin TWIN: checkpoint with validation images
        checkpoint FILE ?: the checkpoint to be used; without it, the released checkpoint of best
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
        --measure: then count the answers to synthetic pages of test digits, for pictures.csv
    """
    from .use.rendered import calibrate, measure

    path = args.checkpoint or mnistlib.released_checkpoint()
    twin, content = mnistlib.load_checkpoint(args.twin), mnistlib.load_checkpoint(path)
    digits, config = mnistlib.load_mnist(args.data), Config(**twin["config"])
    if twin["source"] != digits.source or config.split == "none":
        fault = f"was trained on {twin['source']!r} with split {config.split!r}"
        raise ConfigError(f"{args.twin} {fault}: no validation images here; name another twin")
    released = Config(**content["config"])
    may_differ = ["split", "seed", "device", "threads"]
    if config.pool and released.pool:
        may_differ.append("pool")  # the twin's teachers have not seen its validation images either
    if replace(config, **{k: getattr(released, k) for k in may_differ}) != released:
        raise ConfigError(f"{args.twin} is no twin of {path}: their settings differ; train another")
    ids = digits.split(config.split)[1]
    model = mnistlib.load_model(args.twin)
    found = calibrate(model, digits.train_images[ids], digits.train_labels[ids])
    about = {k: getattr(config, k) for k in ("split", "seed")} | {"n": len(ids)}
    about |= {"pool": config.pool} if config.pool else {}
    whole = {
        "checkpoint": path.name,
        "config_hash": released.hash(content["source"]),
        **asdict(found),
        "twin": {"config_hash": config.hash(twin["source"]), **about},
    }
    beside = path.with_name("calibration.json")
    write_atomically(beside, (json.dumps(whole, indent=1) + "\n").encode())
    print(f"{beside}: {found}")
    if args.measure and digits.test is not None:
        table = measure(mnistlib.load_model(path), found, *digits.test)
        counts = outputs_folder() / "results" / "pictures.csv"
        write_atomically(counts, table.to_csv(index=False).encode())
        print(table.to_string(index=False))
    return 0


def do_export(args: argparse.Namespace) -> int:
    """Write a checkpoint as ONNX and safetensors, with a model card and a page to draw on.

    The files are called after the recipe, the int8 one of ONNX with -int8, and MODEL_CARD.md and
    draw.html. The model card explains how each of them is used.

    Options:
        checkpoint FILE ?: without it, the released checkpoint of best
        --folder FOLDER: without it, the folder of the checkpoint
    """
    from .use.export import export
    from .use.formats import check_extra

    check_extra()  # before digits are loaded
    path = args.checkpoint or mnistlib.released_checkpoint()
    mnistlib.load_checkpoint(path)
    for file in export(path, mnistlib.load_mnist(), args.folder):
        print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def do_notebooks(args: argparse.Namespace) -> int:
    """Execute notebooks with papermill and summarise the results.

    Executed notebooks, checkpoints and figures go into a new folder in outputs/runs. The exit code
    is 1 if a cell fails.

    Options:
        names NAME *: e.g. 03; without names, all notebooks
        -p,--parameter NAME,VALUE: set a notebook parameter, e.g. -p seed 1
        --folder FOLDER: folder inside that of the runs; without it, named by the time
        --in-place: update the committed notebooks and their figures instead
    """
    for needed in ("papermill", "ipykernel"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"{needed} is not installed: pip install 'mnistlib[notebooks]'")
    from .notebooks import execute_in_place, find_notebooks, read_value, run_notebooks, summarise

    began = time.time()
    notebooks = find_notebooks(args.names)
    parameters = {name: read_value(text) for name, text in args.parameter or ()}
    if args.in_place:
        if parameters:
            raise ConfigError("--in-place executes notebooks as committed; give no parameters")
        execute_in_place(notebooks)
        return 0
    digits = mnistlib.load_mnist()
    folder = run_notebooks(notebooks, parameters, args.folder)
    print(f"\n{summarise(folder, digits)}\nall in      {time.time() - began:.0f} s")
    return 0


def do_report(args: argparse.Namespace) -> int:
    """Write the ledger's tables into README.md.

    Options:
        --check: change nothing, only report whether README.md is up to date
    """
    from .runs.report import write_report

    changed = write_report(check=args.check)
    print("README.md is " + ("not up to date" if args.check and changed else "up to date"))
    return int(args.check and changed)


def settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the fields of `Config` that are given on the command line, as text."""
    return {k: v for k, v in vars(args).items() if k in vars(Config()) and v is not None}


def read_seeds(text: str) -> range:
    """Read `0:20` as the seeds 0 to 19, or `7` as that seed alone."""
    if found := re.fullmatch(r"(\d+)(?::(\d+))?", text):
        first, last = int(found[1]), int(found[2] or int(found[1]) + 1)
        if first < last:
            return range(first, last)
    raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, as in 0:20, which is 0 to 19")


# type of an option's value by the word in its help; other words mean text
KINDS = {
    "FOLDER": Path,
    "FILE": Path,
    "TWIN": Path,
    "N": int,
    "MINUTES": float,
    "FROM:TO": read_seeds,
}
OPTION = re.compile(r"^ {4}(\S+?)(?: ([A-Z:,]+))?(?: ([*+?]))?: (.+(?:\n {8}.+)*)", re.MULTILINE)
SETTING = re.compile(r'^ {4}(\w+): (\w+) = .+\n {4}"""([^"]+)"""', re.MULTILINE)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; commands, options and help texts come from the docstrings above.

    An option is a line `--name KIND NARGS: text`. Without a kind it is a switch, without dashes a
    positional argument; `NARGS` is argparse's, if it is not one value. Settings are the fields of
    `Config` with the texts below them.
    """
    parser = argparse.ArgumentParser("mnist", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, do in [item for item in globals().items() if item[0].startswith("do_")]:
        about, _, listed = str(inspect.getdoc(do)).partition("\n\nOptions:\n")
        command = commands.add_parser(name[3:], help=about.partition("\n")[0], description=about)
        command.set_defaults(do=do)
        options = OPTION.findall(listed)
        for field, kind, text in SETTING.findall(inspect.getsource(Config)):
            if do is do_train or (do is do_sweep and field != "seed"):
                options.append((f"--{field.replace('_', '-')}", kind, "", text))
        for names, kind, times, text in options:
            more: dict[str, Any] = {"action": "store_true"}
            if "," in kind:
                more = {"metavar": tuple(kind.split(",")), "nargs": 2, "action": "append"}
            elif kind:
                more = {"metavar": kind, "type": KINDS.get(kind, str), "nargs": times or None}
            if found := re.search(r"\[default: (.+)\]", text):
                more["default"] = found[1]
            command.add_argument(*names.split(","), help=text.replace("%", "%%"), **more)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors of the package are printed as one sentence."""
    args = parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
            return args.do(args)
    except mnistlib.MnistlibError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
