"""The command line: `python -m mnistlib COMMAND`, each command in a function `do_COMMAND`."""

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from .ablations import ablations
from .arguments import parse
from .audit import audit
from .checkpoint import CheckpointError, load_checkpoint, load_model, published_checkpoint
from .config import Config, ConfigError, configure
from .data import DatasetError, load_mnist
from .evaluate import evaluate, predict, read_picture
from .ledger import commit, record
from .report import write_report
from .resume import find_checkpoint
from .state import pick_device
from .summary import describe, summarise
from .sweep import sweep
from .train import TrainingError, train


def peak_memory_mb() -> float | None:
    """Return the largest resident size of this process so far, in MB; None where unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


AT_START = peak_memory_mb()  # torch is imported, nothing has run


def do_train(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in fields(Config)}
    if args.resume:
        if args.recipe or any(v is not None for v in given.values()):
            raise ConfigError("--resume goes on with a run as it was set; give no settings with it")
        args.resume = find_checkpoint(args.resume)
        config = Config(**load_checkpoint(args.resume)["config"])
    else:
        config = configure(args.recipe or "fast", **given)
    # what cannot be is refused before digits are looked for
    pick_device(config.device)
    for name, folder in {"--folder": args.folder, "--ledger": args.ledger}.items():
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{name} {folder} cannot be a folder ({error.strerror})") from None
    # the first optimizer makes torch import its compiler, which is most of the memory that follows
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with_optimizer = peak_memory_mb()
    digits = load_mnist(args.data)
    commit()  # what runs now; files may change before it ends
    run = train(config, digits, args.resume, folder=args.folder)
    peak = peak_memory_mb()
    print(run)
    if run.interrupted:
        if run.checkpoint:
            print(f"Go on with: python -m mnistlib train --resume {run.checkpoint}")
        else:
            print("Interrupted before the first checkpoint: start again")
        return 128 + run.signal
    test = None
    if args.test and digits.test_images is not None:
        test = evaluate(run.model, digits.test_images, digits.test_labels)
        print(f"test: {test}")
    memory = (peak - AT_START, with_optimizer - AT_START) if peak else (None, None)
    record(run, test, args.ledger, *memory)
    print(f"checkpoint: {run.checkpoint}")
    return 0


def do_sweep(args: argparse.Namespace) -> int:
    given = {f.name: getattr(args, f.name) for f in fields(Config) if f.name != "seed"}
    if args.only and args.ablations is None:
        raise ConfigError("--only is for --ablations")
    if args.ablations is None:
        configs = [configure(args.recipe or "fast", **given, seed=seed) for seed in args.seeds]
    elif args.recipe or any(v is not None for v in given.values()):
        raise ConfigError("--ablations has its own settings; give none with it")
    else:  # a seed of each before the next seed: wherever it stops, all have as many
        every = ablations(args.ablations)
        for name in args.only or ():
            if name not in every:
                raise ConfigError(f"there is no ablation {name!r}; there are {', '.join(every)}")
        chosen = [every[name] for name in args.only or every]
        configs = [replace(config, seed=seed) for seed in args.seeds for config in chosen]
    pick_device(configs[0].device)
    if args.workers < 0:
        raise ConfigError(f"workers is {args.workers}, but it must be 0 or more")
    _, failed = sweep(
        configs, args.ledger,
        data=args.data, test=args.test, curves=args.curves, workers=args.workers,
    )  # fmt: skip
    return int(failed > 0)


def do_bench(args: argparse.Namespace) -> int:
    from .bench import bench, ladder
    from .peers import COURSES, curves

    if args.curves and args.curves not in COURSES:
        raise ConfigError(f"there is no course {args.curves!r}; there are {', '.join(COURSES)}")
    if args.ladder:
        steps = [replace(c, seed=seed) for c in ladder().values() for seed in args.seeds]
        return int(sweep(steps, args.ledger, data="mnist")[1] > 0)
    if args.curves:
        path = curves(args.curves, args.seeds, args.ledger)
    else:
        path = bench(args.ledger, args.repetitions, args.only)
    print(f"rows are in {path}")
    return 0


def do_audit(args: argparse.Namespace) -> int:
    found = audit(args.ledger, args.recipe, args.minutes, args.pick)
    print(found)
    return int(not found.passed)


def do_evaluate(args: argparse.Namespace) -> int:
    path = args.checkpoint or published_checkpoint()
    load_checkpoint(path)  # a bad file is refused before digits are looked for
    for name, text in describe(path, load_mnist(args.data)):
        print(f"{name:12}{text}")
    return 0


def do_predict(args: argparse.Namespace) -> int:
    model = load_model(args.checkpoint or published_checkpoint())
    pictures = torch.stack([read_picture(path) for path in args.images])  # (N, 1, 28, 28)
    for path, chances in zip(args.images, predict(model, pictures), strict=True):
        first, second = chances.topk(2).indices.tolist()
        print(f"{path}: {first} ({100 * chances[first]:.1f} %), "
              f"then {second} ({100 * chances[second]:.1f} %)")  # fmt: skip
    return 0


def do_notebooks(args: argparse.Namespace) -> int:
    import papermill

    from . import headless

    began = time.time()
    notebooks = headless.find_notebooks(args.names)
    parameters = {name: _value(text) for name, text in args.parameter}
    headless.check_parameters(notebooks, parameters)
    try:
        if args.in_place:
            if parameters:
                raise ConfigError("--in-place runs notebooks as committed; give no parameters")
            headless.execute_in_place(notebooks)
            return 0
        digits = load_mnist()
        folder = headless.run_notebooks(notebooks, parameters, args.folder)
    except headless.Stopped as stopped:
        print(f"{stopped}; checkpoints are in the folder of the run", file=sys.stderr)
        return 128 + stopped.number
    except papermill.PapermillExecutionError as error:
        print(f"error: cell {error.exec_count} failed: {error.ename}: {error.evalue}",
              file=sys.stderr)  # fmt: skip
        return 1
    print("\n" + summarise(folder, digits, began))
    return 0


def _value(text: str) -> object:
    """Read a parameter's value: None, true, false, a number, else text."""
    words = {"None": None, "null": None, "true": True, "True": True, "false": False, "False": False}
    if text in words:
        return words[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def do_report(args: argparse.Namespace) -> int:
    try:
        changed = write_report(check=args.check)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("README.md is " + ("not up to date" if args.check and changed else "up to date"))
    return int(args.check and changed)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; a user's mistake gets a sentence, no traceback."""
    args = parse(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return globals()[f"do_{args.command}"](args)
    except (CheckpointError, ConfigError, DatasetError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
