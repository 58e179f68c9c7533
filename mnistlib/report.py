"""The README's generated blocks: tables that no hand has typed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .config import RECIPES, Config, outputs_folder
from .ledger import images_seen, read_results
from .stats import mean_interval

if TYPE_CHECKING:
    import pandas as pd

BEGIN, END = "<!-- {} begin: written by `python -m mnistlib report` -->", "<!-- {} end -->"


def headline(folder: Path | None = None) -> str:
    """Return the README's headline table, a row per recipe, from the committed ledger."""
    lines = [
        "| recipe | network | parameters | training images seen | seeds | "
        "validation accuracy, mean [95 %] | test accuracy, mean [95 %] | sd |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    runs = read_results(folder=folder)
    for recipe in (name for name in RECIPES if name in set(runs["recipe"])):
        rows = runs[runs["recipe"] == recipe]
        row = rows.iloc[0]
        val = _mean_interval(rows["val_accuracy"]) if row["n_val"] else "none held out"
        test = _mean_interval(rows["test_accuracy"])
        sd = rows["test_accuracy"].std()  # nan for one seed, or where none was evaluated
        lines.append(
            f"| `{recipe}` | {row['model']} | {row['parameters']:,} | {images_seen(row):,} | "
            f"{len(rows)} | {val} | {test} | {'' if sd != sd else f'{sd:.3f}'} |"
        )
    return "\n".join(lines)


def speed(folder: Path | None = None) -> str:
    """Return the README's table of training times, beside the conventional loop's.

    `sprint`, which ends at 99.0 %, is set against the conventional loop's first epoch there.
    """
    rows = read_results("speed", folder)
    rows = rows[(rows["kind"] == "run") & (rows["go"] == rows["go"].max())]
    seconds = rows.groupby("name")["seconds"]
    whole = seconds.median()["conventional"]
    runs = read_results(folder=folder)
    keys = runs[runs["recipe"] == "reference"][["config_hash", "seed", "epochs"]]
    reached = read_results("history", folder).merge(keys).query("val_acc >= 99")
    first = reached.groupby("seed")["epoch"].min().median() / reached["epochs"].iloc[0]
    lines = [
        "| training | threads | times taken | seconds, median (range) | times as fast | as |",
        "|---|---:|---:|---:|---:|---|",
    ]
    against = {"conventional": (1.0, ""), "fast": (1.0, "the whole conventional run"),
               "sprint": (first, "the conventional run to 99.0 %")}  # fmt: skip
    for name, (share, yardstick) in against.items():
        own = seconds.get_group(name)
        what = f"`{name}`" if name in RECIPES else "`reference` by the conventional loop"
        lines.append(
            f"| {what} | {rows['threads'].iloc[0]} | {len(own)} | {_median_range(own, 1)} | "
            f"{whole * share / own.median():.1f} | {yardstick} |"
        )
    return "\n".join(lines)


def staircase(folder: Path | None = None) -> "pd.DataFrame":
    """Return a row per step that was timed last: what its whole training takes and reaches.

    Columns: `seconds` of the training images at the median pace of the repetitions, the
    evaluations on the way included; `fastest` and `slowest` repetition; `us` per image;
    `accuracy`, the list of validation accuracies at the last epoch of
    the committed seeds below 100, others having served to choose (a step that only rounds
    differently shares those of its Config, half precision does not);
    `base`, the step that it is one change away from; `kept`, whether others build on it.
    """
    import numpy as np
    import pandas as pd

    from .bench import WAYS

    speed, runs = read_results("speed", folder), read_results(folder=folder)
    speed = speed[(speed["kind"] == "step") & (speed["go"] == speed["go"].max())]
    seedless = [Config(**json.loads(c) | {"seed": 0}).hash("mnist") for c in runs["config"]]
    rows = {}
    for name, own in speed.groupby("name", sort=False):
        row, pace = own.iloc[0], own["seconds"] / own["images"]
        whole = pace * row["whole_images"] + own["evaluation_seconds"] * row["evaluations"]
        _, way = WAYS.get(name, ("", None))
        same = [h == row["config_hash"] and not (way and way.bfloat16) for h in seedless]
        accuracy = runs["val_accuracy"][np.array(same) & (runs["seed"] < 100)]
        rows[name] = {
            "seconds": whole.median(), "fastest": whole.min(), "slowest": whole.max(),
            "us": 1e6 * pace.median(), "accuracy": accuracy.tolist(), "base": row["base"],
        }  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.assign(kept=table.index.isin({*table["base"], table.index[-1]}))


def promises(folder: Path | None = None) -> str:
    """Return the README's table of the reference's promises beside the committed runs."""
    runs, published = read_results(folder=folder), read_results("published", folder)
    history = read_results("history", folder)
    rows = runs[runs["recipe"] == "reference"]
    best = history.merge(rows[["config_hash", "seed"]]).groupby("seed")["val_acc"].max()
    last, n = rows["val_accuracy"], len(rows)
    memory = rows["memory_mb"].max()
    kilobytes = rows["checkpoint_bytes"].max() / 1000
    table = [
        ("", "promised", f"here, `reference` recipe, n = {n} seeds"),
        ("---", "---", "---"),
        ("parameters", "13,912", f"{rows['parameters'].iloc[0]:,}"),
        ("validation accuracy, best epoch", f"{published['val_acc'].max():.2f} % (one run)",
         _mean_range(best)),
        ("validation accuracy, last epoch", f"{published['val_acc'].iloc[-1]:.2f} % (one run)",
         _mean_range(last)),
        ("training time, 20 epochs", "about 10 minutes on a CPU",
         f"{_median_range(rows['seconds'] / 60, 1)} minutes, median (range), with one thread"),
        ("memory", "under 500 MB", f"{memory:.0f} MB above `import torch`, of which "
         f"{rows['optimizer_mb'].max():.0f} MB come with torch's first optimizer"),
        ("disk", "about 50 MB", f"{kilobytes:.0f} kB for a checkpoint"),
    ]  # fmt: skip
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def _median_range(values: "pd.Series", digits: int = 0) -> str:
    shown = (f"{v:.{digits}f}" for v in (values.median(), values.min(), values.max()))
    return "{} ({} to {})".format(*shown)


def _mean_range(values: "pd.Series") -> str:
    if values.isna().any():
        return "not evaluated"
    return f"{values.mean():.2f} % ({values.min():.2f} to {values.max():.2f})"


def _mean_interval(values: "pd.Series") -> str:
    """Say the mean with its 95 % interval over seeds (Student's t)."""
    if values.isna().any():
        return "not evaluated"
    if len(values) == 1:
        return f"{values.iloc[0]:.2f} % (one seed)"
    mean, low, high = mean_interval(values)
    return f"{mean:.2f} % [{low:.2f} to {high:.2f}]"


def write_report(check: bool = False, readme: Path | None = None) -> bool:
    """Renew the generated blocks of the README; return whether they were out of date.

    Raises:
        ValueError: a block's marks are missing.
    """
    readme = readme or outputs_folder().parent / "README.md"
    text = new = readme.read_text(encoding="utf-8")
    blocks = {"headline": headline(), "speed": speed(), "promises": promises()}
    for name, block in blocks.items():
        begin, end = BEGIN.format(name), END.format(name)
        if (new.count(begin), new.count(end)) != (1, 1) or new.index(end) < new.index(begin):
            raise ValueError(f"{readme} must have the marks {begin} and {end} once, in order")
        before, after = new.split(begin)[0], new.split(end)[1]
        new = f"{before}{begin}\n{block}\n{end}{after}"
    if new != text and not check:
        readme.write_text(new, encoding="utf-8")
    return new != text
