"""How unequal the writers of the test set are: the interval of one network for other writers."""

from pathlib import Path

import numpy as np
import pandas as pd

from mnistlib import Evaluation, load_mnist
from mnistlib.evaluate import over_writers
from mnistlib.paths import outputs_folder, write_atomically

from .ledger import read_results

KEYS = ["config_hash", "seed"]


def write_writers() -> Path:
    """Write `writers.csv` for all runs of `misread.csv` on MNIST's test set; return its path.

    Raises:
        DatasetError: the digits or QMNIST's table of writers are not at hand.
    """
    _, group, who = load_mnist("mnist").writers("test").numpy().T
    rows = read_results("misread").merge(read_results().query("source == 'mnist'")[KEYS])
    table = []
    for run in rows.sort_values(KEYS).to_dict("records"):
        wrong = np.isin(np.arange(len(who)), [int(i) for i in run["wrong"].split()])
        students, employees = (int(wrong[group == part].sum()) for part in (4, 0))
        factor, freedom = over_writers(wrong, who)
        table.append((*(run[key] for key in KEYS), students, employees, factor, freedom))
    written = pd.DataFrame(table, columns=[*KEYS, "students", "employees", "factor", "freedom"])
    path = outputs_folder() / "results" / "writers.csv"
    text = written.round(4).to_csv(index=False, lineterminator="\n")
    write_atomically(path, text.encode())
    return path


def one_network(rows: pd.DataFrame) -> Evaluation:
    """Return what to expect of one network of a recipe on the test set.

    Args:
        rows: tested runs of the recipe, of `runs.csv`. Accuracy and loss are averaged, and the
            factor over those in `writers.csv`; if there are none, the interval ignores writers.
    """
    n, mean = int(rows["n_test"].iloc[0]), rows[["test_accuracy", "test_loss"]].mean()
    known = rows.merge(read_results("writers"), on=KEYS)[["factor", "freedom"]]
    correct = round(mean["test_accuracy"] * n / 100)
    return Evaluation(mean["test_loss"], correct, n, (), *known.dropna().mean().dropna())
