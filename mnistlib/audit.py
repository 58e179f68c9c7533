"""Is the ledger true? Trains a committed run again, chosen at random, and compares."""

import json
import math
import random
from dataclasses import dataclass, replace
from pathlib import Path

from .checkpoint import versions
from .config import Config, ConfigError
from .data import load_mnist
from .evaluate import evaluate
from .ledger import read_results
from .stats import predicted_spread
from .train import train


@dataclass(frozen=True, repr=False)
class Audit:
    """A run of the ledger and the same run made again."""

    name: str
    figures: dict[str, tuple[float, float]]
    """by column of the ledger, the figure there and the one found now"""
    tolerance: float
    """points by which accuracies may differ where bits do"""
    same_ground: bool
    """whether torch and the platform are those of the row"""

    @property
    def equal(self) -> bool:
        """Whether all figures agree to the last digit."""
        return all(a == b for a, b in self.figures.values())

    @property
    def passed(self) -> bool:
        """Whether all figures are equal, or all accuracies within the tolerance."""
        points = [abs(a - b) for k, (a, b) in self.figures.items() if k.endswith("accuracy")]
        return self.equal or all(p <= self.tolerance for p in points)

    def __repr__(self) -> str:
        """Say what was compared and what came out."""
        lines = [
            f"{k:14} {a:11.6f} in the ledger, {b:11.6f} now" for k, (a, b) in self.figures.items()
        ]
        why = "though" if self.same_ground else "as torch or the platform is another, and"
        verdict = "equal to the last digit" if self.equal else (
            f"not the same bits, {why} accuracies {'lie' if self.passed else 'DO NOT lie'} within "
            f"{self.tolerance:.2f} points, which is four times the spread of a difference of seeds"
        )  # fmt: skip
        return "\n".join([self.name, *lines, verdict])


def audit(
    folder: Path | None = None, recipe: str | None = None, minutes: float = 10.0,
    pick: int | None = None,
) -> Audit:  # fmt: skip
    """Choose a committed run at random, train it again and return what agrees.

    On the same machine, torch and number of threads all figures should be equal, if the code
    between the row's commit and this one rounds alike; elsewhere the run is another draw.

    Args:
        folder: of the ledger; by default the committed one.
        recipe: only runs of this recipe.
        minutes: only runs that took no longer.
        pick: seed of the choice; None: another one each time.

    Raises:
        ConfigError: there is no such run, or no ledger.
    """
    try:
        runs = read_results(folder=folder)
    except FileNotFoundError as error:
        raise ConfigError(f"{error}; name another with --ledger") from None
    runs = runs[(runs["source"] == "mnist") & (runs["device"] == "cpu")]
    runs = runs[(runs["n_val"] > 0) | runs["n_test"].notna()]  # without any there is no accuracy
    runs = runs[runs["seconds"] <= 60 * minutes]
    if recipe:
        runs = runs[runs["recipe"] == recipe]
    if runs.empty:
        raise ConfigError(f"no run of {recipe or 'any recipe'} took {minutes:g} minutes or less")
    row = runs.iloc[random.Random(pick).randrange(len(runs))]
    config = replace(Config(**json.loads(row["config"])), threads=int(row["threads"]), device="cpu")
    name = f"{row['recipe']}, {row['model']}, seed {config.seed}, hash {row['config_hash']}"
    print(f"{name}: {row['seconds']:.0f} s when it was run at commit {row['commit']}", flush=True)
    digits = load_mnist("mnist")
    run = train(config, digits, eval_every=None, save=False)
    if run.interrupted:
        raise KeyboardInterrupt
    last, figures = run.history[-1], {"train_loss": round(run.history[-1]["train_loss"], 6)}
    error, n = 100 - row["val_accuracy"], row["n_val"]
    if run.n_val:
        figures |= {
            "val_loss": round(last["val_loss"], 6),
            "val_accuracy": round(last["val_acc"], 4),
        }
    if not math.isnan(row["n_test"]):
        test = evaluate(run.model, digits.test_images, digits.test_labels)
        figures |= {"test_loss": round(test.loss, 6), "test_accuracy": round(test.accuracy, 4)}
        error, n = 100 - row["test_accuracy"], row["n_test"]
    known = versions()
    return Audit(
        name=name,
        figures={column: (float(row[column]), now) for column, now in figures.items()},
        tolerance=4 * math.sqrt(2) * predicted_spread(max(error, 0.1), n),
        same_ground=(known["torch"], known["platform"]) == (row["torch"], row["platform"]),
    )
