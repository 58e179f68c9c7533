"""What the command line takes: every command, its options and their help."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from .config import RECIPES, Config


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        "python -m mnistlib",
        description="What can a handwritten-digit classifier do on a parameter budget?",
        epilog="Digits come from the folder in MNISTLIB_DATA, else from the cache, else from a "
        "download, else from an embedded sample of 5,000; runs go to MNISTLIB_RUNS, else to "
        "outputs/runs. Exit codes: 0 done, 1 an error that is explained, 2 a wrong command "
        "line, 130 interrupted by Ctrl-C, 143 by SIGTERM.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "train",
        help="train a network and save its checkpoint",
        description="Train a network, a table row per epoch. Ctrl-C or SIGTERM ends it after the "
        "step it is in, with a checkpoint that --resume takes up. Settings not given are the "
        "recipe's own.",
    )
    _add_recipe(p)
    p.add_argument("--resume", metavar="CHECKPOINT", help="go on with this run, as it was set; "
                   "of a run's folder, with the latest that is whole")  # fmt: skip
    p.add_argument("--test", action="store_true", help="evaluate the final weights on the test set")
    p.add_argument("--folder", type=Path, help="where the checkpoint goes")
    p.add_argument("--ledger", type=Path, help="folder of the ledger that gets the row")
    _add_data(p)
    _add_settings(p)

    p = commands.add_parser(
        "sweep",
        help="train a recipe over many seeds, one run per core",
        description="Train a recipe over many seeds, one run per core with one thread each, and "
        "write a row as each ends. Runs that the ledger has are left out, so the same command "
        "goes on where it was stopped. What Ctrl-C cuts off goes on from its last epoch.",
    )
    _add_recipe(p)
    p.add_argument("--seeds", type=_seeds, default=range(5), metavar="FROM:TO",
                   help="e.g. 0:20, which is 0 to 19 (default: 0:5)")  # fmt: skip
    p.add_argument("--ablations", type=int, metavar="EPOCHS", help="train instead what notebook 06 "
                   "compares, each so many epochs long; other settings do not apply")  # fmt: skip
    p.add_argument("--only", nargs="+", metavar="NAME", help="of the ablations, these, "
                   "e.g. 'as it is' 'no focus'")  # fmt: skip
    p.add_argument("--test", action="store_true", help="evaluate final weights on the test set")
    p.add_argument("--ledger", type=Path, help="folder of the ledger that gets the rows")
    p.add_argument("--curves", action="store_true", help="validate after each epoch, not the last")
    p.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    _add_data(p)
    _add_settings(p, leave_out="seed")

    p = commands.add_parser(
        "bench",
        help="time training, step by step from a conventional loop to the fastest recipe",
        description="Time every step of notebook 08 in turns and append the rows to speed.csv; "
        "leave the machine alone meanwhile, half an hour on two cores. What the steps reach is "
        "measured apart, one seed per core: --ladder trains those that change the recipe, "
        "--curves a course by the conventional loop, its epochs going to curves.csv.",
    )
    p.add_argument("--repetitions", type=int, default=5, help="of each measure (default: 5)")
    p.add_argument("--only", default="", metavar="TEXT", help="measure what has this in its name")
    p.add_argument("--ladder", action="store_true", help="train the steps of the staircase")
    p.add_argument("--curves", metavar="COURSE", help="reference, keras, pytorch or one-epoch")
    p.add_argument("--seeds", type=_seeds, default=range(1), metavar="FROM:TO",
                   help="of the ladder or the curves (default: 0:1)")  # fmt: skip
    p.add_argument("--ledger", type=Path, help="folder of the ledger that gets the rows")

    p = commands.add_parser(
        "audit",
        help="train a committed run again and compare",
        description="Choose a run of the committed ledger at random, train it again with the "
        "settings and threads of its row, and compare every figure. Exit code 1 if an accuracy is "
        "farther off than another seed would be.",
    )
    p.add_argument("--recipe", help="only runs of this recipe")
    p.add_argument("--minutes", type=float, default=10.0, help="only runs no longer (default: 10)")
    p.add_argument("--pick", type=int, help="seed of the choice (default: another each time)")
    p.add_argument("--ledger", type=Path, help="folder of the ledger (default: the committed one)")

    p = commands.add_parser(
        "evaluate", help="accuracy of a checkpoint on its validation images and the test set"
    )
    p.add_argument("checkpoint", type=Path, nargs="?", help="default: the published one")
    _add_data(p)

    p = commands.add_parser("predict", help="say which digit each picture shows")
    p.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, ... of a digit"
    )
    p.add_argument("--checkpoint", type=Path, help="default: the published one")

    p = commands.add_parser(
        "notebooks",
        help="execute notebooks headless with papermill",
        description="Execute notebooks headless into a folder of their own under outputs/runs, "
        "with checkpoint and figures, and summarise the result. A file complete.json there says "
        "that all of it is whole. Ctrl-C and SIGTERM end it after the cell at work, a training "
        "with a checkpoint. Exit code 1 if a cell fails.",
    )
    p.add_argument("names", nargs="*", metavar="NAME", help="e.g. 03 (default: all)")
    p.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="set a notebook parameter, e.g. -p seed 1",
    )
    p.add_argument("--folder", type=Path, help="below the folder of runs (default: the time)")
    p.add_argument("--in-place", action="store_true", help="renew the committed notebooks")

    p = commands.add_parser("report", help="write the ledger's figures into README.md")
    p.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    return parser.parse_args(arguments)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="auto", help="auto, mnist, sample or a folder")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help=f"{', '.join(RECIPES)} (default: fast)")


def _add_settings(parser: argparse.ArgumentParser, leave_out: str = "") -> None:
    settings = parser.add_argument_group("settings of the run (recipe's own where not given)")
    for f in fields(Config):
        if f.name != leave_out:
            settings.add_argument(
                f"--{f.name.replace('_', '-')}",
                metavar=f.type.__name__,
                help=f.metadata["help"].replace("%", "%%"),
            )


def _seeds(text: str) -> range:
    """Read `0:20`, or `7` for that seed alone."""
    first, colon, last = text.partition(":")
    try:
        seeds = range(int(first), int(last) if colon else int(first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not FROM:TO, as in 0:20") from None
    if not seeds or seeds[0] < 0:
        raise argparse.ArgumentTypeError(f"{text!r} names no seeds; 0:20 is 0 to 19")
    return seeds
