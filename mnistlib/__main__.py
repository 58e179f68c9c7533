"""What can a handwritten-digit classifier do on a parameter budget?

Digits come from the folder in MNISTLIB_DATA, else from the cache, else from a download, else from
an embedded sample of 5,000; runs go to MNISTLIB_RUNS, else to outputs/runs. Exit codes: 0 done,
1 an error that is explained, 2 a wrong command line, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import argparse
import importlib.util
import inspect
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mnistlib
from mnistlib import Config, ConfigError

from .checkpoint import latest_checkpoint
from .config import check_allowed
from .experiments.ledger import check_ledger, collect, commit, record
from .paths import runs_folder
from .runtime import pick_device


def peak_memory_mb() -> float:
    """Return the largest resident size of this process so far, in MB; 0 where it is unknown."""
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


AT_START = peak_memory_mb()  # torch is imported, nothing has run


def do_train(args: argparse.Namespace) -> int:
    """Train a network and save its checkpoint.

    A table row is printed per epoch. Ctrl-C or SIGTERM ends it after the step it is in, with a
    checkpoint that --resume continues. Settings that are not given are the recipe's own.

    Options:
        --recipe NAME: reference, reference-fast, fast, sprint, best or best-20k, else fast
        --resume CHECKPOINT: continue this run, as it was set; of a run's folder, from the latest
            checkpoint that is whole
        --test: evaluate the final weights on the test set
        --folder FOLDER: where the checkpoint goes
        --ledger FOLDER: of the ledger that gets the row
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    if args.resume:
        if args.recipe or settings(args):
            raise ConfigError("--resume goes on with a run as it was set; give no settings with it")
        args.resume = latest_checkpoint(args.resume)
        content = mnistlib.load_checkpoint(args.resume)
        config = Config(**content["config"])
        if len(content["history"]) == config.epochs:
            print(f"{args.resume} is of a run that is finished: nothing is trained or recorded")
            return 0
    else:
        config = mnistlib.configure(args.recipe or "fast", **settings(args))
    # everything that can be wrong is looked at before digits are loaded
    pick_device(config.device)
    folder = args.folder or runs_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder {folder} cannot be a folder ({error.strerror})") from None
    check_ledger(args.ledger)
    # the first optimizer makes torch import its compiler, which is most of the memory that follows
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with_optimizer = peak_memory_mb()
    digits = mnistlib.load_mnist(args.data)
    commit()  # of the code that runs now; files may change before it ends
    run = mnistlib.train(config, digits, args.resume, folder=args.folder)
    peak = peak_memory_mb()
    print(run)
    if run.interrupted:
        again = f"Go on with: python -m mnistlib train --resume {run.checkpoint}"
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

    Each run has one thread and is recorded as it ends. Runs that the ledger has are left out, so
    the same command continues where it was stopped; a run that was cut off continues from its last
    epoch.

    Options:
        --recipe NAME: reference, reference-fast, fast, sprint, best or best-20k, else fast
        --seeds FROM:TO: 0:20 is 0 to 19 [default: 0:5]
        --ablations N: train instead what notebook 06 compares, each so many epochs long; other
            settings do not apply
        --only NAME +: of the ablations, these, e.g. 'as it is' 'no focus'
        --test: evaluate final weights on the test set
        --ledger FOLDER: of the ledger that gets the rows
        --curves: validate after each epoch, not only after the last
        --workers N: processes; 0 is one per core [default: 0]
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    from .experiments.sweep import sweep
    from .studies.ablations import ablations

    if args.only and args.ablations is None:
        raise ConfigError("--only is for --ablations")
    if args.ablations is None:
        every = {"": mnistlib.configure(args.recipe or "fast", **settings(args))}
    elif args.recipe or settings(args):
        raise ConfigError("--ablations has its own settings; give none with it")
    else:
        every = ablations(args.ablations)
    for name in args.only or ():
        check_allowed("--only", name, tuple(every))
    # a seed of each before the next seed: wherever it stops, all have as many
    configs = [replace(every[k], seed=seed) for seed in args.seeds for k in args.only or every]
    check_allowed("--workers", args.workers, (0, 1024))
    pick_device(configs[0].device)
    how = {"data": args.data, "test": args.test, "curves": args.curves, "workers": args.workers}
    return int(sweep(configs, args.ledger, **how)[1] > 0)


def do_bench(args: argparse.Namespace) -> int:
    """Time training, step by step from a conventional loop to the fastest recipe.

    Every step of notebook 08 is timed in turns, the rows are appended to speed.csv; leave the
    machine alone meanwhile, half an hour on two cores. The accuracy of the steps is measured apart,
    one seed per core: --ladder trains those that change the recipe, --curves a baseline by the
    conventional loop, its epochs going to curves.csv.

    Options:
        --repetitions N: of each measure [default: 5]
        --only TEXT: measure what has this in its name
        --ladder: train the steps of the staircase
        --curves BASELINE: reference, keras, pytorch or one-epoch
        --seeds FROM:TO: of the ladder or the curves [default: 0:1]
        --ledger FOLDER: of the ledger that gets the rows
    """
    check_ledger(args.ledger)
    from .experiments.sweep import sweep
    from .studies.speed import BASELINES, bench, curves, recipe_steps

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

    A run of the committed ledger is chosen at random, trained again with the settings of its row,
    and every value is compared. Exit code 1 if an accuracy is farther off than another seed's
    would be.

    Options:
        --recipe NAME: only runs of this recipe as it is now, or the run with this config hash
        --minutes MINUTES: only runs no longer [default: 10]
        --pick N: seed of the choice, else another each time
        --ledger FOLDER: of the ledger, else the committed one
    """
    from .experiments.sweep import audit

    found = audit(args.ledger, args.recipe, args.minutes, args.pick)
    print(found)
    return int(not found.passed)


def do_evaluate(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint on its validation images and the test set.

    Options:
        checkpoint FILE ?: else the released one
        --data SOURCE: auto, mnist, sample or a folder [default: auto]
    """
    path = args.checkpoint or mnistlib.released_checkpoint()
    mnistlib.load_checkpoint(path)  # a bad file is refused before digits are looked for
    print(describe(path, mnistlib.load_mnist(args.data)))
    return 0


def do_predict(args: argparse.Namespace) -> int:
    """Say which digit each picture shows.

    Options:
        images FILE +: PNG, JPEG, ... of a digit
        --checkpoint FILE: else the released one
    """
    from .studies.pictures import read_picture

    model = mnistlib.load_model(args.checkpoint or mnistlib.released_checkpoint())
    pictures = torch.stack([read_picture(path) for path in args.images])  # (N, 1, 28, 28)
    for path, row in zip(args.images, mnistlib.predict(model, pictures), strict=True):
        (p, q), (first, second) = (values.tolist() for values in row.topk(2))
        print(f"{path}: {first} ({100 * p:.1f} %), then {second} ({100 * q:.1f} %)")
    return 0


def do_notebooks(args: argparse.Namespace) -> int:
    """Execute notebooks headless with papermill.

    They go into a folder of their own under outputs/runs, with checkpoints and figures, and what
    came out is summarised. A cell that fails ends it with exit code 1.

    Options:
        names NAME *: e.g. 03, else all
        -p,--parameter NAME,VALUE: set a notebook parameter, e.g. -p seed 1
        --folder FOLDER: below the folder of runs, else the time
        --in-place: renew the committed notebooks
    """
    for needed in ("papermill", "ipykernel"):
        if importlib.util.find_spec(needed) is None:
            raise ConfigError(f"{needed} is not installed: pip install 'mnistlib[notebooks]'")
    from .run_notebooks import execute_in_place, find_notebooks, read_value, run_notebooks

    began = time.time()
    notebooks = find_notebooks(args.names)
    parameters = {name: read_value(text) for name, text in args.parameter or ()}
    if args.in_place:
        if parameters:
            raise ConfigError("--in-place runs notebooks as committed; give no parameters")
        execute_in_place(notebooks)
        return 0
    digits = mnistlib.load_mnist()
    folder = run_notebooks(notebooks, parameters, args.folder)
    print("\n" + summarise(folder, digits, began))
    return 0


def do_report(args: argparse.Namespace) -> int:
    """Write the ledger's tables into README.md.

    Options:
        --check: only say whether README.md is up to date
    """
    from .experiments.report import write_report

    changed = write_report(check=args.check)
    print("README.md is " + ("not up to date" if args.check and changed else "up to date"))
    return int(args.check and changed)


def summarise(folder: Path, digits: mnistlib.Digits, began: float) -> str:
    """Describe what a folder of executed notebooks holds: the trained networks and all files."""
    lines = []
    if digits.source == "sample":
        lines = ["ON THE EMBEDDED SAMPLE of 5,000 digits, not on MNIST: see the warning above", ""]
    for path in sorted(folder.rglob("mnist_model_*.pth")):
        lines += [describe(path, digits), f"checkpoint  {path}"]
    figures = list((folder / "figures").glob("*.png"))
    lines.append(f"figures     {folder / 'figures'} ({len(figures)} pictures)")
    lines += [f"notebook    {path}" for path in sorted(folder.glob("*.ipynb"))]
    return "\n".join([*lines, f"all in      {time.time() - began:.0f} s"])


def describe(checkpoint: Path, digits: mnistlib.Digits) -> str:
    """Evaluate a checkpoint on the validation images of its split and on the test set."""
    content, model = mnistlib.load_checkpoint(checkpoint), mnistlib.load_model(checkpoint)
    config, done = Config(**content["config"]), len(content["history"])
    n = sum(p.numel() for p in model.parameters())
    seconds = content["training"]["progress"]["seconds"]
    lines = [
        f"data        {digits}",
        f"network     {config.model}, {n:,} parameters",
        f"training    {config.recipe}, seed {config.seed}, {done} of {config.epochs} epochs in "
        f"{seconds:.0f} s on {content['versions']['device']}",
    ]
    if content["source"] != digits.source:
        lines.append(f"note        no validation: trained on the source {content['source']!r}")
    elif len(ids := digits.split(config.split)[1]):
        seen = mnistlib.evaluate(model, digits.train_images[ids], digits.train_labels[ids])
        lines.append(f"validation  {seen}")
    if digits.test_images is None or digits.test_labels is None:
        return "\n".join([*lines, "test        none: the embedded sample has no test set"])
    seen = mnistlib.evaluate(model, digits.test_images, digits.test_labels)
    return "\n".join([*lines, f"test        {seen}"])


def settings(args: argparse.Namespace) -> dict[str, str]:
    """Return the fields of `Config` that the command line gives, as text."""
    return {k: v for k, v in vars(args).items() if k in vars(Config()) and v is not None}


def read_seeds(text: str) -> range:
    """Read `0:20`, which is 0 to 19, or `7` for that seed alone."""
    if found := re.fullmatch(r"(\d+)(?::(\d+))?", text):
        first, last = int(found[1]), int(found[2] or int(found[1]) + 1)
        if first < last:
            return range(first, last)
    raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, as in 0:20, which is 0 to 19")


# what follows an option, by what its text calls it; else it is text itself
KINDS = {"FOLDER": Path, "FILE": Path, "N": int, "MINUTES": float, "FROM:TO": read_seeds}
OPTION = re.compile(r"^ {4}(\S+?)(?: ([A-Z:,]+))?(?: ([*+?]))?: (.+(?:\n {8}.+)*)", re.MULTILINE)
SETTING = re.compile(r'^ {4}(\w+): (\w+) = .+\n {4}"""([^"]+)"""', re.MULTILINE)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; commands, options and their help are the docstrings above.

    An option is a line `--name KIND: text`. One without a kind is a switch, one without dashes a
    positional argument; behind the kind stands argparse's `nargs`, where it is not one value. The
    settings are the fields of `Config`, with the texts under them.
    """
    parser = argparse.ArgumentParser("python -m mnistlib", description=__doc__)
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
    """Run a command and return the exit code; a user's mistake gets a sentence, no traceback."""
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


if __name__ == "__main__":
    sys.exit(main())
