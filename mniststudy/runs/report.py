"""Tables from the ledger as Markdown, and what they are made of."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from mnistlib import RECIPES, configure
from mnistlib.paths import outputs_folder

from .ledger import LedgerError, images_seen, read_results, runs_for, whole_seconds
from .stats import mean_interval
from .writers import one_network

ON_TEST = ("test accuracy, mean [95 %]", "one network, other writers", "test loss", "seeds")


def tested(recipe: str) -> pd.DataFrame:
    """Return the tested runs of a recipe as it is now."""
    return runs_for(RECIPES[recipe]).dropna(subset="test_accuracy")


def headline() -> str:
    """Return the table of results of six recipes on the test set."""
    timed = speed_ratios().groupby("name")["seconds"].median()
    table = []
    for recipe in ("reference", "reference-fast", "fast", "teacher", "best", "best-20k"):
        if (rows := tested(recipe)).empty:
            continue
        name = "conventional" if recipe == "reference" else recipe
        seconds = timed.get(name, rows["seconds"].median())
        spent = "GPU" if (rows["device"] == "cuda").all() else f"{seconds:.0f}"
        table.append((f"{rows['parameters'].iloc[0]:,}", f"`{recipe}`", *_on_test(rows), spent))
    return markdown("rlrrrrr", ("parameters", "recipe", *ON_TEST, "seconds"), table)


def leaderboard() -> str:
    """Return the whole leaderboard: recipes with a released checkpoint, and public claims."""
    entries: list[tuple[int, float, tuple[str, ...]]] = []
    released = outputs_folder() / "checkpoints"
    for recipe in RECIPES:
        if (rows := tested(recipe)).empty or not (released / recipe).is_dir():
            continue
        first = rows.iloc[0]
        costs = f"{first['multiply_accumulates']:,}", f"{images_seen(first):,}"
        cells = (*_on_test(rows), *costs, f"`{recipe}`: `{first['model']}`")
        entries.append((first["parameters"], -rows["test_accuracy"].mean(), cells))
    for claim in read_results("claims").to_dict("records"):
        source = public(claim["source"])
        claimed = (f"{claim['accuracy']:.2f} %", *[""] * 5, f"*{source}: {claim['how']}*")
        entries.append((claim["parameters"], -claim["accuracy"], claimed))
    columns = ("parameters", *ON_TEST, "multiply-accumulates", "images seen", "entry")
    return markdown("rrrrrrrl", columns, [(f"{n:,}", *cells) for n, _, cells in sorted(entries)])


def public(source: str, text: str = "") -> str:
    """Return the source of a public claim, a link if it has an address, by a text or its name."""
    site, _, name = source.partition("/")
    return f"[{text or name}](https://{site}/{name})" if name else text or source


def speed_ratios() -> pd.DataFrame:
    """Return the seconds of whole trainings and how many times as fast as the conventional loop.

    One row for each training and round of the last session: `name`, `repetition`, `threads`,
    `seconds`, `ratio` within the round. `sprint`, which ends at 99.0 %, is compared with the
    conventional loop up to its first epoch at 99.0 %, median over the seeds of `reference`.
    """
    rows = read_results("speed").query("kind == 'run' and go == go.max()")
    table = rows.assign(seconds=whole_seconds(rows))
    keys = runs_for(RECIPES["reference"])[["config_hash", "seed", "epochs"]]
    reached = read_results("history").merge(keys).query("val_acc >= 99").groupby("seed")
    when = keys["seed"].map(reached["epoch"].min()).fillna(math.inf)  # some may never reach it
    first = when.median() / keys["epochs"].iloc[0]
    share = table["name"].map({"sprint": first}).fillna(1.0)
    ours = table[table["name"] == "conventional"].set_index("repetition")["seconds"]
    table["ratio"] = table["repetition"].map(ours) * share / table["seconds"]
    return table[["name", "repetition", "threads", "seconds", "ratio"]]


def speed() -> str:
    """Return the table of training times."""
    usual, table = ("`{}`", "the whole conventional run"), []
    special = {
        "conventional": ("`reference` by the conventional loop", ""),
        "sprint": ("`{}`", "the conventional run to 99.0 %"),
    }
    for name, own in speed_ratios().groupby("name", sort=False):
        what, yardstick = special.get(str(name), usual)
        ratio = _median_range(own["ratio"], ".2g") if yardstick else "1"
        times = own["threads"].iloc[0], len(own), _median_range(own["seconds"]), ratio
        table.append((what.format(name), *times, yardstick))
    columns = (
        "training", "threads", "rounds", "seconds, median (range)",
        "times as fast, median (range)", "compared with",
    )  # fmt: skip
    return markdown("lrrrrl", columns, table)


def promises() -> str:
    """Return the table of the published project's promises and our runs."""
    published, rows = read_results("published")["val_acc"], runs_for(RECIPES["reference"])
    history = read_results("history").merge(rows[["config_hash", "seed"]])
    best, last = history.groupby("seed")["val_acc"].max(), rows["val_accuracy"]
    memory = f"{rows['memory_mb'].max():.0f} MB more than after `import torch`"
    optimizer = f"the first optimizer accounts for {rows['optimizer_mb'].max():.0f} MB"
    minutes = f"{_median_range(rows['seconds'] / 60)} minutes, median (range), one thread"
    disk = f"{rows['checkpoint_bytes'].max() / 1000:.0f} kB for a checkpoint"
    one, epoch = "{:.2f} % (one run)", "validation accuracy, {} epoch"
    table = [
        ("parameters", "13,912", f"{rows['parameters'].iloc[0]:,}"),
        (epoch.format("best"), one.format(published.max()), _mean_range(best)),
        (epoch.format("last"), one.format(published.iloc[-1]), _mean_range(last)),
        ("training time, 20 epochs", "about 10 minutes on a CPU", minutes),
        ("memory", "under 500 MB", f"{memory}; {optimizer}"),
        ("disk", "about 50 MB", disk),
    ]
    here = f"here, recipe `reference`, n = {len(rows)} seeds, mean (range)"
    return markdown("lll", ("", "promised", here), table)


def latency() -> str:
    """Return the table of how long answers take, from the last session of `latency.csv`.

    Microseconds per image, median and range of the rounds; ratios are taken within a round.
    """
    rows = read_results("latency").query("go == go.max()")
    rows = rows.assign(us=1e6 * rows["seconds"] / (rows["calls"] * rows["batch"]))
    rows = rows.sort_values("batch", kind="stable")
    first, runtimes = rows["network"].iloc[0], list(dict.fromkeys(rows["runtime"]))
    table, yardstick = [], pd.Series()
    for (batch, network), own in rows.groupby(["batch", "network"], sort=False):
        times = own.pivot(index="repetition", columns="runtime", values="us")
        if network == first:
            yardstick, ratio = times["onnxruntime"], "1"
        else:
            ratio = _median_range(times["onnxruntime"] / yardstick, ".2f")
        shown = [_median_range(times[runtime], ",.0f") for runtime in runtimes]
        torch = _median_range(times["torch"] / times["onnxruntime"], ".2f")
        about = f"{batch:,}", f"`{network}`", f"{own['parameters'].iloc[0]:,}"
        table.append((*about, *shown, torch, ratio))
    columns = (
        "images at a time", "network", "parameters",
        *(f"{runtime}, µs per image" for runtime in runtimes),
        "torch's time in times onnxruntime's",
        f"onnxruntime's time in times that of `{first}`",
    )  # fmt: skip
    return markdown("rlr" + "r" * (len(runtimes) + 2), columns, table)


def markdown(sides: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown, its cells as they are; `sides` has `l` or `r` for each column."""
    colalign = [{"l": "left", "r": "right"}[side] for side in sides]
    return tabulate(rows, columns, "pipe", disable_numparse=True, colalign=colalign)


def mean_with_interval(values: pd.Series) -> str:
    """Return the mean with its 95 % interval over seeds (Student's t) as text."""
    if values.nunique() == 1:  # which have no interval
        n = f"all {len(values)} seeds" if len(values) > 1 else "one seed"
        return f"{values.iloc[0]:.2f} % ({n})"
    return "{:.2f} % [{:.2f} to {:.2f}]".format(*mean_interval(list(values)))


def summary_sentence(recipe: str) -> str:
    """Describe the last epoch of a recipe's committed runs in a sentence.

    Raises:
        ConfigError: there is no such recipe.
        LedgerError: the ledger has no run of it.
    """
    rows = runs_for(configure(recipe))
    part, kind = ("val", "validation") if rows["n_val"].any() else ("test", "test")
    rows = rows.dropna(subset=f"{part}_accuracy")  # some seeds may not be tested
    if rows.empty:
        raise LedgerError(f"the ledger has no run of the recipe {recipe!r} as it is now")
    last = rows.iloc[-1]
    seen = rows[f"{part}_accuracy"]
    return (
        f"{recipe}: {seen.mean():.2f} % {kind} accuracy after {images_seen(last):,} images in "
        f"{last['epochs']} epochs, mean of n = {len(rows)} seeds (range {seen.min():.2f} to "
        f"{seen.max():.2f}), last epoch, {int(last[f'n_{part}']):,} {kind} images, "
        f"{last['parameters']:,} parameters"
    )


def other_writers(rows: pd.DataFrame) -> str:
    """Return the 95 % interval of one network for digits by other people, if it is known."""
    one = one_network(rows)
    return "{:.2f} to {:.2f}".format(*one.interval) if math.isfinite(one.freedom) else ""


def _on_test(rows: pd.DataFrame) -> tuple[str, str, str, str]:
    """Return the cells of the columns `ON_TEST`."""
    mean, loss = mean_with_interval(rows["test_accuracy"]), f"{rows['test_loss'].mean():.3f}"
    return mean, other_writers(rows), loss, f"{len(rows)}"


def _median_range(values: pd.Series, style: str = ".1f") -> str:
    low, middle, high = (format(value, style) for value in values.quantile([0, 0.5, 1]))
    return f"{middle} ({low} to {high}{_missing(values)})"


def _mean_range(values: pd.Series) -> str:
    return f"{values.mean():.2f} % ({values.min():.2f} to {values.max():.2f}{_missing(values)})"


def _missing(values: pd.Series) -> str:
    """Return how many of the values there are, if some are missing: pandas would not say so."""
    return f", n = {values.count()} of {len(values)}" if values.hasnans else ""
