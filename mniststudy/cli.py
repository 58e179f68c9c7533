"""What can a handwritten-digit classifier do on a parameter budget?

Digits are read from the folder in MNISTLIB_DATA, else from the cache, else downloaded, else taken
from an embedded sample of 5,000. Runs go to MNISTLIB_RUNS, else to outputs/runs. Exit codes: 0
done, 1 error with an explanation, 2 wrong command line, 130 interrupted by Ctrl-C, 143 by SIGTERM.
"""

import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

import mnistlib
from mnistlib import RECIPES, Config, ConfigError
from mnistlib.checkpoint import latest_checkpoint
from mnistlib.config import DEFAULT_RECIPE, check_allowed
from mnistlib.paths import runs_folder
from mnistlib.runtime import pick_device, stop_on_signal

# What else a command needs it imports itself, so that `predict` starts fast


class Settings(Config):
    """Settings as given; `Config` checks them later and says in one sentence what is wrong."""

    def __post_init__(self) -> None:
        """Check nothing yet."""


@dataclass(frozen=True)
class SweepSettings(Settings):
    """Settings of many runs, whose seeds are those of --seeds."""

    seed: Suppress[int] = 0


# Options that several commands have
Checkpoint = Annotated[
    Path | None, arg(help="without it, the released one of best, for predict of careful")
]
Data = Annotated[str, arg(metavar="SOURCE", help="auto, mnist, sample or a folder")]
Ledger = Annotated[Path | None, arg(help="folder of the ledger; without it, that of the runs")]
Parameters = tyro.conf.UseAppendAction[tuple[tuple[str, str], ...]]
Recipe = Annotated[str, arg(metavar="NAME", help=f"one of {', '.join(RECIPES)}")]
Switch = tyro.conf.FlagCreatePairsOff[bool]


def train(
    *, settings: OmitArgPrefixes[Settings], recipe: Recipe = DEFAULT_RECIPE,
    resume: Path | None = None, test: Switch = False,
    folder: Path | None = None, ledger: Ledger = None, data: Data = "auto",
) -> int:  # fmt: skip
    """Train a network and save its checkpoint.

    A table row is printed per epoch. Ctrl-C or SIGTERM stops it after the current step and saves a
    checkpoint, which --resume continues.

    Args:
        settings: As shown, the recipe's; --recipe NAME --help shows those of another one.
        resume: continue this run with its own settings: a checkpoint or the folder of a run
        test: evaluate the final weights on the test set
        folder: folder of the checkpoints
    """
    from .runs.ledger import check_ledger, collect, commit, finished, record
    from .runs.memory import peak_memory_mb

    config, done = Config(**vars(settings)), False
    if resume:
        resume = latest_checkpoint(resume)
        content = mnistlib.load_checkpoint(resume)
        config = Config(**content["config"])
        done = len(content["history"]) == config.epochs
        if done and (content["config_hash"], config.seed) in finished(ledger, test):
            print(f"{resume} belongs to a finished run that is in the ledger: nothing is done")
            return 0
    # everything that can be wrong is checked before digits are loaded
    pick_device(config.device)
    (folder or runs_folder()).mkdir(parents=True, exist_ok=True)
    check_ledger(ledger, [config])
    # the first optimizer makes torch import its compiler, which takes much of the memory
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    optimizer_mb = peak_memory_mb()
    digits = mnistlib.load_mnist(data)
    commit()  # cached now, because files may change before the run ends
    with stop_on_signal(signal.SIGTERM):  # the run says so and how it is continued
        run = mnistlib.train(config, digits, resume, folder=folder)
    memory_mb = peak_memory_mb()
    print(run)
    if run.interrupted:
        again = "Interrupted before the first checkpoint: start again"
        if run.checkpoint:  # in full, so that it does the same from any folder
            place = {"resume": run.checkpoint, "folder": folder or run.checkpoint.parent}
            place |= {"ledger": ledger or runs_folder()}
            words = [f"--{option}={path.absolute()}" for option, path in place.items()]
            words += [f"--data={digits.folder.absolute() if digits.folder else digits.source}"]
            again = "Continue with: " + shlex.join(["mnist", "train", *words, *["--test"] * test])
        print(again)
        return 128 + run.signal
    if done:  # earlier, perhaps by another torch
        run.versions, memory_mb, optimizer_mb = content["versions"], None, None
    seen = mnistlib.evaluate(run.model, *digits.test) if test and digits.test else None
    if seen:
        print(f"test: {seen}")
    record(run, seen, ledger, memory_mb, optimizer_mb)
    collect(ledger)
    print(f"checkpoint: {run.checkpoint}")
    return 0


def evaluate(checkpoint: Checkpoint = None, /, *, data: Data = "auto") -> int:
    """Evaluate a checkpoint on its validation images and the test set."""
    from .runs.describe import describe

    path = checkpoint or mnistlib.released_checkpoint()
    mnistlib.load_checkpoint(path)  # a bad file is refused before digits are loaded
    print(describe(path, mnistlib.load_mnist(data)))
    return 0


def predict(
    image: Path, /, *more: Positional[Path],
    checkpoint: Checkpoint = None, show: Switch = False, json: Switch = False,
    csv: Path | None = None,
) -> int:  # fmt: skip
    """Say which digits each picture shows, by rows, from left to right.

    A mark may also be 'not sure' or 'not a digit'; the thresholds are those of calibration.json
    beside the checkpoint. The exit code is 1 if a file cannot be read; the others are read.

    Args:
        image: photo, scan or drawing of digits, as PNG, JPEG, ..., or a folder of them
        more: of the same
        show: write what the network saw and its answers beside each picture, as NAME-read.png
        json: print all probabilities, boxes and reasons as JSON
        csv: write a sheet of answers with a row for each picture
    """
    from tqdm import tqdm

    from .use.answers import as_dict, as_text, save_readings, write_sheet
    from .use.calibrate import load_calibration
    from .use.pictures import pictures_in, read_picture
    from .use.segment import read_page

    trained = checkpoint or mnistlib.released_checkpoint("careful")
    model, calibration = mnistlib.load_model(trained), load_calibration(trained)
    paths = [path for given in (image, *more) for path in pictures_in(given)]
    found: list[dict[str, Any]] = []
    for path in tqdm(paths, disable=None if len(paths) > 1 else True, leave=False, unit="picture"):
        try:
            page = read_picture(path)
            answer = read_page(model, page, calibration)
            drawn = show and answer.readings
            seen = [f"see {save_readings(path, answer.readings)}"] if drawn else []
        except mnistlib.DatasetError as error:
            tqdm.write(f"error: {error}", sys.stderr)
            found.append({"picture": str(path), "error": str(error)})
            continue
        found.append(as_dict(path, answer, page.scale, calibration))
        if not json:
            said = as_text(answer, page.scale, calibration)
            tqdm.write("; ".join([f"{path}: {said}", *seen]), sys.stdout)
    if json:
        print(dumps(found, indent=1))
    if csv:
        write_sheet(csv, found)
    return int(any("error" in each for each in found))


def sweep(
    *, settings: OmitArgPrefixes[SweepSettings], recipe: Recipe = DEFAULT_RECIPE,
    seeds: Annotated[str, arg(metavar="FROM:TO")] = "0:5", test: Switch = False,
    curves: Switch = False, workers: int = 0, stacked: Switch = False, keep: Path | None = None,
    ledger: Ledger = None, data: Data = "auto",
) -> int:  # fmt: skip
    """Train a recipe over many seeds, one run per core.

    Each run has one thread and is recorded when it ends. Runs that are in the ledger are skipped,
    so the same command continues a stopped sweep. An interrupted run continues from its last epoch.

    Args:
        settings: As shown, the recipe's; --recipe NAME --help shows those of another one.
        seeds: 0:20 means 0 to 19
        test: evaluate the final weights on the test set
        curves: validate after each epoch, not only after the last
        workers: number of processes; 0: one per core
        stacked: train all seeds as one wide network, for a GPU (sgd, no slices, no dropout)
        keep: with --stacked, save the final weights of each run here
    """
    from .runs.stacked import sweep_stacked
    from .runs.sweep import sweep as sweep_parallel

    if (stacked and (curves or workers)) or (keep and not stacked):
        raise ConfigError("--curves and --workers do not go with --stacked, which --keep needs")
    configs = [Config(**vars(settings) | {"seed": seed}) for seed in read_seeds(seeds)]
    pick_device(configs[0].device)
    how: dict[str, Any] = {"keep": keep} if stacked else {"curves": curves, "workers": workers}
    run = sweep_stacked if stacked else sweep_parallel
    _, failed = run(configs, ledger, data=data, test=test, **how)
    return int(failed > 0)


def read_seeds(text: str) -> range:
    """Read `0:20` as the seeds 0 to 19, or `7` as that seed alone."""
    if found := re.fullmatch(r"(\d+)(?::(\d+))?", text):
        first, last = int(found[1]), int(found[2] or int(found[1]) + 1)
        if first < last:
            return range(first, last)
    raise ConfigError(f"--seeds is {text!r}, but must be FROM:TO, as in 0:20, which is 0 to 19")


def teach(
    teacher: Path, /, *more: Positional[Path],
    views: int = 20, others: int = 0, ledger: Ledger = None, data: Data = "auto",
) -> int:  # fmt: skip
    """Ask teachers about augmented training images, once for all students.

    The answers are a pool, which is named after what it is made of. A student is trained with
    --pool NAME and without augmentation or label smoothing of its own. A stopped command is
    continued by the same one.

    Args:
        teacher: checkpoint
        more: others, trained with the same split
        views: views of each training image, augmented as in the recipe teacher
        others: images without a digit, of which the students learn that they have none: letters,
            scribbles, pieces of digits and pairs of neighbours
    """
    from mnistlib.distill import pool_folder

    from .runs.ledger import check_ledger, record_pool
    from .runs.teachers import build_pool

    check_allowed("--views", views, (1, 100))
    check_allowed("--others", others, (0, 1_000_000))
    check_ledger(ledger)
    digits, device = mnistlib.load_mnist(data), pick_device("auto")
    name = build_pool([teacher, *more], digits, RECIPES["teacher"], views, device, others)
    record_pool(pool_folder(name), ledger)
    print(f"pool {name}: {views} views, {1 + len(more)} teachers; train with --pool {name}")
    return 0


def export(
    checkpoint: Checkpoint = None, /, *, folder: Path | None = None, tiny: Switch = False
) -> int:
    """Write a checkpoint as ONNX and safetensors, with a model card and a page to draw on.

    The files are called after the recipe, the int8 one of ONNX with -int8, and MODEL_CARD.md and
    draw.html. The model card explains how each of them is used.

    Args:
        folder: without it, the folder of the checkpoint
        tiny: write the smallest file instead, and its reader in plain numpy; for rounded weights,
            as those of the recipe tiny
    """
    from .use.export import export as write_formats
    from .use.tiny import export_tiny

    path = checkpoint or mnistlib.released_checkpoint("tiny" if tiny else "best")
    mnistlib.load_checkpoint(path)
    write = export_tiny if tiny else write_formats
    for file in write(path, mnistlib.load_mnist(), folder):
        print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def notebooks(
    names: tuple[str, ...] = (), /, *,
    parameter: Annotated[Parameters, arg(aliases=("-p",), metavar="NAME VALUE")] = (),
    folder: Path | None = None, in_place: Switch = False,
) -> int:  # fmt: skip
    """Execute notebooks with papermill and summarise the results.

    Executed notebooks, checkpoints and figures go into a new folder in outputs/runs. The exit code
    is 1 if a cell fails.

    Args:
        names: e.g. 03; without names, all notebooks
        parameter: set a notebook parameter, e.g. -p seed 1
        folder: folder inside that of the runs; without it, named by the time
        in_place: update the committed notebooks and their figures instead
    """
    from .notebooks import execute_in_place, find_notebooks, run_notebooks, summarise

    began, chosen = time.time(), find_notebooks(names)
    if in_place:
        if parameter:
            raise ConfigError("--in-place executes notebooks as committed; give no parameters")
        execute_in_place(chosen)
        return 0
    done = run_notebooks(chosen, dict(parameter), folder)
    print(f"\n{summarise(done, mnistlib.load_mnist())}\nall in      {time.time() - began:.0f} s")
    return 0


def report(*, check: Switch = False) -> int:
    """Write the ledger's tables and numbers into README and docs.

    Args:
        check: change nothing, only report whether they are up to date
    """
    from .runs.pages import write_report

    changed = write_report(check=check)
    print("README and docs are " + ("not up to date" if check and changed else "up to date"))
    return int(check and changed)


def audit(*, recipe: str | None = None, minutes: float = 10.0, ledger: Path | None = None) -> int:
    """Train a committed run again and compare.

    A run is chosen at random from the committed ledger and trained again with the settings of its
    row; then all values are compared. The exit code is 1 if an accuracy differs by more than it
    would between two seeds.

    Args:
        recipe: only this recipe as it is now, or this config hash; runs on a GPU, too
        minutes: only runs that took no longer, on the device that they ran on
        ledger: another ledger
    """
    from .runs.audit import audit as repeat

    return int(not repeat(ledger, recipe, minutes))


SETTINGS = {f"--{field.name.replace('_', '-')}" for field in fields(Config)} | {"--recipe"}


def with_settings(command: Callable[..., int], given: Sequence[str]) -> Callable[..., int]:
    """Return `train` or `sweep` with the settings of the recipe that is given as its defaults.

    Raises:
        ConfigError: there is no such recipe, or settings are given for a run that is resumed.
    """
    options = {text.partition("=")[0].replace("_", "-") for text in given}
    if "--resume" in options and options & SETTINGS:
        raise ConfigError("--resume continues a run with its own settings; give none with it")

    def named(recipe: str = DEFAULT_RECIPE) -> str:
        return recipe

    recipe, _ = tyro.cli(named, args=given, return_unknown_args=True, add_help=False)
    kind = Settings if command is train else SweepSettings
    return partial(command, settings=kind(**vars(mnistlib.configure(recipe))))


def run_command(given: Sequence[str]) -> int:
    """Read a command line, run its command and return the exit code."""
    app = tyro.extras.SubcommandApp()
    for command in (train, evaluate, predict, sweep, teach, export, notebooks, report, audit):
        name, chosen, about = command.__name__, command, None
        if given[:1] != [name]:
            about = (command.__doc__ or "").partition("\n")[0]  # a line in the list of commands
        elif command in (train, sweep):
            chosen = with_settings(command, given[1:])
        app.command(name=name, help=about)(chosen)
    return app.cli(prog="mnist", description=__doc__, args=given, config=(tyro.conf.DisallowNone,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; errors of the package are printed as one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_, **__: print(f"warning: {text}", file=sys.stderr)
            return run_command(list(sys.argv[1:] if arguments is None else arguments))
    except (mnistlib.MnistlibError, OSError, ModuleNotFoundError) as error:
        remedy = "; pip install 'mnistlib[notebooks,export]'" * isinstance(error, ImportError)
        print(f"error: {error}{remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
