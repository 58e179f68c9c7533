"""A committed run, trained again and compared."""

import tempfile
from dataclasses import replace
from pathlib import Path

from mnistlib import RECIPES, evaluate, load_mnist, train

from .ledger import LedgerError, config_in, read_results, record, runs_for
from .stats import predicted_spread

COMPARED = ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy")


def audit(folder: Path | None = None, recipe: str | None = None, minutes: float = 10.0) -> bool:
    """Choose a committed run at random, train it again, print both and return whether they agree.

    With the same machine and torch all values should be equal, unless the code has changed its
    rounding since the row's commit. Elsewhere, and if the row is from a GPU, the run is another
    random draw: its accuracies must be as close as those of two seeds. Rows from a GPU are chosen
    only if `recipe` asks for them.

    Args:
        folder: the ledger's folder; by default that of the committed ledger.
        recipe: only runs of this recipe as it is now, or the run with this config hash.
        minutes: only runs that took no longer.

    Raises:
        ConfigError: the run was trained on a pool that is not here.
        LedgerError: there is no ledger, or no such run in it.
    """
    runs = read_results(folder=folder)
    if recipe in RECIPES:
        runs = runs_for(RECIPES[recipe], folder)
    elif recipe:
        runs = runs[runs["config_hash"] == recipe]
    # without an accuracy there is nothing to compare; it is trained again on the CPU in any case
    usable = "source == 'mnist' and seconds <= 60 * @minutes and (n_val > 0 or n_test > 0)"
    runs = runs.query(usable if recipe else f"{usable} and device == 'cpu'")
    if runs.empty:
        raise LedgerError(f"no run of {recipe or 'any recipe'} took {minutes:g} minutes or less")
    row = runs.sample().iloc[0]
    config = replace(config_in(row["config"]), threads=0, device="cpu")
    name = f"{row['recipe']}, {row['model']}, seed {config.seed}, hash {row['config_hash']}"
    was = f"{row['seconds']:.0f} s on a {row['device']} device at commit {row['commit']}"
    print(f"{name}: {was}; on this CPU now", flush=True)
    digits = load_mnist("mnist")
    run = train(config, digits, eval_every=None, save=False)
    if run.interrupted:
        raise KeyboardInterrupt
    tested = row["n_test"] > 0
    seen = evaluate(run.model, *digits.test) if tested and digits.test else None
    with tempfile.TemporaryDirectory() as scratch:
        again = record(run, seen, Path(scratch))
    pairs = {c: (float(row[c]), again[c]) for c in COMPARED if again[c] is not None}
    for column, (there, now) in pairs.items():
        print(f"{column:14} {there:11.6f} in the ledger, {now:11.6f} now")
    if all(there == now for there, now in pairs.values()):
        print("equal to the last digit")
        return True
    part = "test" if tested else "val"
    spread = predicted_spread(max(100 - row[f"{part}_accuracy"], 0.1), row[f"n_{part}"])
    tolerance = 4 * 2**0.5 * spread  # of a difference, whose sd is larger by sqrt(2)
    points = [abs(there - now) for c, (there, now) in pairs.items() if c.endswith("accuracy")]
    passed = all(p <= tolerance for p in points)
    same_ground = all(again[c] == row[c] for c in ("torch", "platform", "device"))
    why = "but" if same_ground else "because torch or the machine differs;"
    print(
        f"not the same bits, {why} accuracies {'lie' if passed else 'DO NOT lie'} within "
        f"{tolerance:.2f} points, four standard deviations of a difference of two seeds"
    )
    return passed
