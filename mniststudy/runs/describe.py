"""A checkpoint described: what it is, how it does, and how that compares with the published run."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from torch import Tensor

from mnistlib import RECIPES, Config, DatasetError, Digits, Evaluation, evaluate
from mnistlib.checkpoint import load_checkpoint, load_model

from .ledger import images_seen, read_results, runs_for


def beside_published(
    title: str, seen: Mapping[str, Evaluation], images: int, seconds: float
) -> str:
    """Return a table of three columns: the published run, our 20 epochs, and another run.

    Args:
        title: heading of that run's column.
        seen: its evaluations, of those called `validation` and `test`.
        images: training images that it has seen; 0: unknown.
        seconds: its time.
    """
    rows = runs_for(RECIPES["reference"]).dropna(subset="test_accuracy")
    best = read_results("published").nlargest(1, "val_acc").to_dict("records")[0]
    table = [["", "published", "20 epochs here", title]]
    table.append(["", "one run, best epoch", f"mean of {len(rows)} seeds", "last epoch"])
    for part, short, theirs in (("validation", "val", best), ("test", "test", {})):
        for name, column, style in (("accuracy", "acc", "{:.2f} %"), ("loss", "loss", "{:.4f}")):
            own = getattr(seen.get(part), name, None)
            values = theirs.get(f"val_{column}"), rows[f"{short}_{name}"].mean(), own
            cells = ["-" if value is None else style.format(value) for value in values]
            table.append([f"{part} {name}", *cells])
    shown = f"{images:,}" if images else "-"
    table.append(["training images seen", "-", f"{images_seen(rows.iloc[0]):,}", shown])
    minutes = [f"{s / 60:.1f}" for s in (rows["seconds"].median(), seconds)]
    table.append(["minutes of training", "about 10", *minutes])
    return pd.DataFrame(table).to_string(index=False, header=False)


def describe(checkpoint: Path, digits: Digits, compare: bool = False) -> str:
    """Describe a checkpoint, evaluated on the validation images of its split and the test set.

    Args:
        checkpoint: file.
        digits: digits with the images to evaluate on; of another source than the checkpoint's they
            may not have its split, so nothing is said about validation images.
        compare: add a table beside the published run, if the network is the published one.
    """
    content, model = load_checkpoint(checkpoint), load_model(checkpoint)
    config, done = Config(**content["config"]), len(content["history"])
    seconds = content["training"]["progress"]["seconds"]
    lines = [
        f"data        {digits}",
        f"network     {config.model}, {sum(p.numel() for p in model.parameters()):,} parameters",
        f"training    {config.recipe}, seed {config.seed}, {done} of {config.epochs} epochs in "
        f"{seconds:.0f} s on {content['versions']['device']}",
    ]
    seen, images = {}, 0
    if content["source"] == digits.source:
        train_ids, ids = digits.split(config.split)
        images = done * (config.epoch_images or len(train_ids))
        if len(ids):
            held_out = digits.train_images[ids], digits.train_labels[ids]
            who = _writers(digits, "train", ids)
            seen["validation"] = evaluate(model, *held_out, writers=who)
    else:
        lines.append(f"note        no validation: trained on the source {content['source']!r}")
    if digits.test:
        seen["test"] = evaluate(model, *digits.test, writers=_writers(digits, "test"))
    lines += [f"{part:12}{what}" for part, what in seen.items()]
    if not digits.test:
        lines.append("test        none: the embedded sample has no test set")
    lines.append(f"checkpoint  {checkpoint}")
    if compare and config.model == "reference":
        title = "this run" if digits.source == "mnist" else f"this run, on the {digits.source}"
        lines += ["", beside_published(title, seen, images, seconds), ""]
    return "\n".join(lines)


def _writers(digits: Digits, part: str, ids: Tensor | slice = slice(None)) -> Tensor | None:
    """Return who wrote images of a part, or None where QMNIST's table is not at hand."""
    try:
        return digits.writers(part)[ids, 2]
    except DatasetError:
        return None
