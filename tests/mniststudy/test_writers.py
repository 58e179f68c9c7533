"""Errors by writer: the committed table, how it is written, and the interval that follows."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from mnistlib import RECIPES
from mnistlib.evaluate import over_writers
from mnistlib.paths import outputs_folder
from mniststudy.runs import writers
from mniststudy.runs.ledger import read_results, runs_for


def test_the_errors_of_students_and_employees_are_those_that_are_listed():
    found = read_results("writers").merge(read_results("misread"), on=["config_hash", "seed"])
    assert len(found) == len(read_results("writers"))
    for row in found.itertuples():
        positions = [int(i) for i in row.wrong.split()]
        # the first 5,001 test images are by students
        assert row.students == sum(i < 5001 for i in positions)
        assert row.employees == len(positions) - row.students
    assert found["factor"].between(1, 2).all()


def test_each_recipe_with_a_released_network_has_its_factor():
    for folder in (outputs_folder() / "checkpoints").iterdir():
        rows = runs_for(RECIPES[folder.name]).dropna(subset="test_accuracy")
        assert math.isfinite(writers.one_network(rows).freedom), (
            f"run `make writers`: {folder.name}"
        )


def test_one_network_has_the_mean_accuracy_and_the_wider_interval_if_its_factor_is_known():
    rows = runs_for(RECIPES["best"]).dropna(subset="test_accuracy")
    seen, alone = writers.one_network(rows), writers.one_network(rows.assign(seed=-1))
    assert seen.accuracy == pytest.approx(rows["test_accuracy"].mean(), abs=0.006)
    assert seen.correct == alone.correct
    assert (alone.factor, alone.freedom) == (1.0, math.inf)
    assert seen.interval[0] < alone.interval[0] < alone.interval[1] < seen.interval[1]


def test_the_table_counts_the_errors_of_students_and_employees_and_knows_the_factor(
    tiny_digits, tmp_path, monkeypatch
):
    table = torch.stack([torch.zeros(100), 4.0 * (torch.arange(100) < 40), torch.arange(100) // 5])
    monkeypatch.setattr(type(tiny_digits), "writers", lambda self, part: table.T.long())
    monkeypatch.setattr(writers, "load_mnist", lambda source: tiny_digits)
    runs = pd.DataFrame({"config_hash": ["b", "a"], "seed": [0, 1], "source": "mnist"})
    tables = {"misread": runs.drop(columns="source").assign(wrong=["0 1 2 40", ""]), "runs": runs}
    monkeypatch.setattr(writers, "read_results", lambda name="runs": tables[name])
    monkeypatch.setattr(writers, "outputs_folder", lambda: tmp_path)
    (tmp_path / "results").mkdir()
    written = pd.read_csv(writers.write_writers()).set_index("config_hash")
    assert written[["students", "employees"]].to_numpy().tolist() == [[0, 0], [3, 1]]
    factor, freedom = over_writers(np.isin(np.arange(100), [0, 1, 2, 40]), table[2])
    assert written["factor"].tolist() == pytest.approx([1, factor], abs=1e-4)
    assert written["freedom"].tolist() == pytest.approx([freedom] * 2)
