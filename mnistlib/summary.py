"""What a checkpoint reaches, and what a folder of executed notebooks holds, in words."""

import time
from pathlib import Path

from .checkpoint import load_checkpoint, load_model
from .config import Config
from .data import Digits
from .evaluate import evaluate


def summarise(folder: Path, digits: Digits, began: float) -> str:
    """Say what a folder of executed notebooks holds: the trained networks and where all is."""
    lines = []
    if digits.source == "sample":
        lines += ["ON THE EMBEDDED SAMPLE of 5,000 digits, not on MNIST: see the warning above", ""]
    for path in sorted(folder.rglob("mnist_model_*.pth")):
        lines += [f"{name:12}{text}" for name, text in describe(path, digits)]
        lines.append(f"{'checkpoint':12}{path}")
    figures = list((folder / "figures").glob("*.png"))
    lines.append(f"{'figures':12}{folder / 'figures'} ({len(figures)} pictures)")
    lines += [f"{'notebook':12}{path}" for path in sorted(folder.glob("*.ipynb"))]
    lines.append(f"{'all in':12}{time.time() - began:.0f} s")
    return "\n".join(lines)


def describe(checkpoint: Path, digits: Digits) -> list[tuple[str, str]]:
    """Evaluate a checkpoint on the validation images of its split and on the test set."""
    content = load_checkpoint(checkpoint)
    model, config = load_model(checkpoint), Config(**content["config"])
    n = sum(p.numel() for p in model.parameters())
    seconds = content["training"]["seconds"]
    rows = [
        ("data", repr(digits)),
        ("network", f"{config.model}, {n:,} parameters"),
        ("training", f"{config.recipe}, seed {config.seed}, {len(content['history'])} of "
         f"{config.epochs} epochs in {seconds:.0f} s on {content['versions'].get('device')}"),
    ]  # fmt: skip
    if content["source"] != digits.source:
        rows.append(("note", f"trained on the source {content['source']!r}, so validation is out"))
    elif len(ids := digits.split(config.split)[1]):
        seen = evaluate(model, digits.train_images[ids], digits.train_labels[ids])
        rows.append(("validation", repr(seen)))
    if digits.test_images is not None:
        rows.append(("test", repr(evaluate(model, digits.test_images, digits.test_labels))))
    else:
        rows.append(("test", "none: the embedded sample has no test set"))
    return rows
