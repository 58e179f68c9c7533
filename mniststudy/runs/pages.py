"""Writes the ledger into README and docs: their tables, and each sentence that has a number."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2

from mnistlib import RECIPES, Budget
from mnistlib.paths import outputs_folder, write_atomically

from ..figures.ablations import ablations, compare_with_first, final_results
from ..figures.frontier import AIMS, BUDGETS, untaught
from .ledger import LedgerError, config_in, read_results, runs_for
from .report import (
    headline,
    latency,
    leaderboard,
    markdown,
    mean_with_interval,
    promises,
    public,
    speed,
    speed_ratios,
    tested,
)
from .stats import seeds_needed

BEGIN, END = "<!-- {} begin: written by `mnist report` -->", "<!-- {} end -->"
PUBLISHED = 13_912  # parameters of the published network


def findings() -> str:
    """Return the README's three findings, the aims that were missed as the last."""
    few, tiny, best, fast = map(tested, ("best-6174", BUDGETS[697], "best", "reference-fast"))
    alone = runs_for(untaught()["net-6174"])
    seconds = speed_ratios().groupby("name")["seconds"].median()
    lines = [
        f"**{_parameters(few)} parameters reach {_reached(few)}**, taught by other networks "
        f"(alone {_reached(alone)}); {_parameters(tiny)} reach {_reached(tiny)}, alone; the "
        f"published network's {PUBLISHED:,} reach {_reached(best)}, taught.",
        f"**{seconds['reference-fast']:.0f} seconds on two cores** train the published network to "
        f"{_reached(fast)}. {_gains()}",
        _misses(),
    ]
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, 1))


def _parameters(rows: pd.DataFrame) -> str:
    return f"{rows['parameters'].iloc[0]:,}"


def _reached(rows: pd.DataFrame) -> str:
    return f"{mean_with_interval(rows['test_accuracy'])}, n = {len(rows)}"


def _gains() -> str:
    """Return what longer training and teachers add to the short training of one network."""
    alone, last = RECIPES["teacher"], RECIPES["best"]
    taught = replace(last, epochs=alone.epochs)
    steps = [tested("reference-fast"), tested("teacher"), runs_for(taught), tested("best")]
    means = [rows["test_accuracy"].mean() for rows in steps]
    longer, answers, more = np.diff(means)
    whole = longer + answers + more
    return (
        f"Of the {whole:.2f} points (percentage points) from there to {means[-1]:.2f} %, longer "
        f"training on all images gives {longer:.2f}, a pool of other networks' answers "
        f"{answers:.2f}, and longer training on the pool {more:.2f}."
    )


def _misses() -> str:
    """Return which aims were missed, or that none was."""
    reached = {most: tested(recipe) for most, recipe in BUDGETS.items()}
    short = {most: AIMS[most] - rows["test_accuracy"].mean() for most, rows in reached.items()}
    missed = [most for most in sorted(short, key=lambda k: short[k]) if round(short[most], 6) > 0]
    if not missed:
        return f"**No miss:** all {len(AIMS)} aims that we had set, one for each size, are met."
    worst = missed[-1]
    return (
        f"**Missed: {len(missed)} of {len(AIMS)} aims** for accuracy within a size. The largest "
        f"gap: {AIMS[worst]:.2f} % with at most {worst:,} parameters; reached is "
        f"{_reached(reached[worst])}."
    )


def leaders() -> str:
    """Return the README's leaderboard: the best public result and ours within each size."""
    claims, table, least = read_results("claims"), [], 0
    for most, recipe in BUDGETS.items():
        rows = tested(recipe)
        within = claims[claims["parameters"].between(least + 1, most)]
        claim = within.sort_values("accuracy").iloc[-1]
        theirs = public(claim["source"], f"{claim['accuracy']:.2f} %")
        own = mean_with_interval(rows["test_accuracy"]), len(rows)
        table.append((_parameters(rows), *own, theirs, f"{claim['parameters']:,}"))
        least = most
    columns = "parameters", "test accuracy, mean [95 %]", "n", "public", "parameters"
    return markdown("rrrrr", columns, table)


def answers() -> str:
    """Return the README's table of the notebooks: each question with its answer.

    Raises:
        LedgerError: there is a notebook without an answer, or none for an answer.
    """
    found = sorted((outputs_folder().parent / "notebooks").glob("[0-9]*.ipynb"))
    told = {answer.__name__.strip("_"): answer for answer in ANSWERS}
    if [path.stem.partition("_")[2] for path in found] != list(told):
        raise LedgerError("there must be one answer for each notebook, in their order")
    table = []
    for path, answer in zip(found, told.values(), strict=True):
        first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]
        title = "".join(first).splitlines()[0].removeprefix("# ")
        table.append((f"[{title}](notebooks/{path.name})", answer()))
    return markdown("ll", ("question", "answer"), table)


def _architecture_design() -> str:
    *_, before, last = [layer.receptive_field for layer in Budget("reference").layers]
    return (
        f"Before the last layer no value depends on more than {before}x{before} pixels; the last "
        f"depends on all{'' if last > 28 else f' but {28 - last}'}."
    )


def _parameter_budget() -> str:
    budget = Budget("reference")
    last = budget.layers[-1]
    share = 100 * last.parameters / budget.parameters
    work = 100 * last.multiply_accumulates / budget.multiply_accumulates
    return f"{share:.1f} % into the last layer, which does {work:.1f} % of the multiplications."


def _training_onecycle() -> str:
    error = _by_epoch("reference-fast")
    half = error.iloc[len(error) // 2 - 1]
    return (
        f"The learning rate rises, then falls to zero: {half:.2f} % validation error halfway, "
        f"{error.iloc[-1]:.2f} % at the end."
    )


def _convergence() -> str:
    error = _by_epoch("reference")
    less = 100 - 100 * error.iloc[-1] / error.iloc[len(error) // 2 - 1]
    return (
        f"Done near the end of the cycle: the last {len(error) // 2} of {len(error)} epochs "
        f"remove {less:.0f} % of the remaining errors."
    )


def _how_small() -> str:
    means = {int(rows["parameters"].iloc[0]): rows["test_accuracy"].mean() for rows in _frontier()}
    some, many = (min(n for n, mean in means.items() if mean >= goal) for goal in (99, 99.6))
    return f"{some:,} parameters reach 99 %; {many:,} reach 99.6 %, taught by larger ones."


def _which_choices_matter() -> str:
    changes, p = compare_with_first(final_results(ablations()), "error", "points", 8)
    sure = [changes[str(name)].difference > 0 for name in p.index[p < 0.05]]
    return (
        f"Of {len(changes)} changes {sum(sure)} raise the error and {len(sure) - sum(sure)} "
        "lower it; the others are undecided."
    )


def _how_sure_are_we() -> str:
    errors = 100 - runs_for(RECIPES["fast"])["test_accuracy"].dropna()
    sd, k = errors.std(), len(errors) - 1
    low, high = (seeds_needed(0.05, sd * (k / chi2.ppf(q, k)) ** 0.5) for q in (0.975, 0.025))
    needed = seeds_needed(0.05, sd)
    return f"{needed} of each, for recipes like `fast` (95 % interval {low} to {high})."


def _how_fast() -> str:
    seconds = speed_ratios().groupby("name")["seconds"].median()
    said = [
        f"{100 - _by_epoch(name).iloc[-1]:.1f} % validation accuracy in {seconds[name]:.0f} s"
        for name in ("reference-fast", "fast")
    ]
    return f"{said[0]} with the published network, in {seconds['fast']:.0f} s with another."


def _what_it_gets_wrong() -> str:
    released = runs_for(RECIPES["best"]).query("seed == 0")
    own = read_results("misread").merge(released[["config_hash", "seed"]]).iloc[0]
    noise = read_results("robustness").query("recipe == 'best' and case == 'noise'")
    wrong = 100 - noise.set_index("severity")["accuracy"][0.2]
    letters = read_results("pictures").set_index("kind").loc["letters"]
    return (
        f"{len(own['wrong'].split())} of {own['n']:,} test digits, {wrong:.0f} % under strong "
        "noise (`best`). Not always: `mnist predict` is confident about "
        f"{letters['confident']} of {letters['n']} letters."
    )


def _use_it() -> str:
    pages = read_results("pictures").set_index("kind")[["right", "n"]]
    (one, of_one), (several, of_several) = pages.loc["digits"], pages.loc["several"]
    return (
        f"`mnist predict photo.png` is right on {one} of {of_one:,} synthetic pages with one "
        f"digit, and on {several} of {of_several} with several."
    )


def _same_answer_twice() -> str:
    rows = read_results("faults").query("what == 'mnistlib' and fault.str.startswith('resumed')")
    last = rows.sort_values("finished").iloc[-1]
    return (
        f"Yes on one machine with one torch: {last['tries'] - last['bad']} of {last['tries']} "
        "resumed runs are equal in every bit. A GPU draws other random numbers."
    )


ANSWERS: tuple[Callable[[], str], ...] = (
    _architecture_design, _parameter_budget, _training_onecycle, _convergence, _how_small,
    _which_choices_matter, _how_sure_are_we, _how_fast, _what_it_gets_wrong, _use_it,
    _same_answer_twice,
)  # fmt: skip


def settings_tested() -> str:
    """Return how often the test set was used, for the docs."""
    runs = read_results().dropna(subset="test_accuracy").copy()
    same: dict[str, Any] = {"seed": 0, "device": "auto", "threads": 0}
    runs["settings"] = [str(replace(config_in(text), **same)) for text in runs["config"]]
    versions = runs[runs["recipe"] != "custom"].groupby("recipe")["settings"].nunique()
    several = versions[versions > 1].sort_values(ascending=False, kind="stable")
    listed = ", ".join(f"{n} of `{recipe}`" for recipe, n in several.items())
    return (
        "- **Test set**: the 10,000 test images were evaluated with the final weights of "
        f"{len(runs):,} runs, which have {runs['settings'].nunique()} different settings, not "
        f"counting the seed. Several versions of a recipe were tested: {listed}."
    )


def _frontier() -> list[pd.DataFrame]:
    return [tested(recipe) for recipe in BUDGETS.values()]


def _by_epoch(recipe: str) -> pd.Series:
    """Return the mean validation error of a recipe's runs by epoch, in percent."""
    keys = runs_for(RECIPES[recipe])[["config_hash", "seed"]]
    history = read_results("history").merge(keys)
    return 100 - history.groupby("epoch")["val_acc"].mean().dropna()


BLOCKS: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (findings, answers, leaders),
    "docs/results.md": (headline, leaderboard, settings_tested),
    "docs/timing.md": (speed, latency),
    "docs/reference.md": (promises,),
}


def write_report(check: bool = False, root: Path | None = None) -> bool:
    """Update the generated blocks of README and docs; return whether any was out of date.

    Raises:
        LedgerError: a table of the ledger, a text or its marks are missing.
    """
    root, changed = root or outputs_folder().parent, {}
    for text_name, blocks in BLOCKS.items():
        path = root / text_name
        if not path.is_file():
            raise LedgerError(f"{path} is not there: the report is part of the repository")
        old = new = path.read_text(encoding="utf-8")
        for block in blocks:
            begin, end = BEGIN.format(block.__name__), END.format(block.__name__)
            before, found, rest = new.partition(f"{begin}\n")
            _, closed, after = rest.partition(end)
            if not found or not closed:
                raise LedgerError(f"{path} must have the marks {begin} and {end}, in order")
            new = f"{before}{begin}\n{block()}\n{end}{after}"
        if new != old:
            changed[path] = new
    if not check:
        for path, new in changed.items():
            write_atomically(path, new.encode())
    return bool(changed)
