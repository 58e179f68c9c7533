"""The frontier: its rows come from the ledger, and its figures draw what they say."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from mnistlib import RECIPES, Budget, build
from mniststudy.figures import frontier
from mniststudy.runs.ledger import read_results, runs_for


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_each_recipe_of_the_frontier_keeps_its_budget():
    for most, recipe in frontier.BUDGETS.items():
        assert Budget(build(RECIPES[recipe].model)).parameters <= most
    assert list(frontier.BUDGETS) == sorted(frontier.BUDGETS)


def test_rows_of_the_frontier_are_means_over_the_tested_seeds_of_the_ledger():
    found = frontier.frontier(["fast", "reference"]).set_index("recipe")
    assert found.index.tolist() == ["reference", "fast"]  # by parameters
    runs = runs_for(RECIPES["fast"])
    row = found.loc["fast"]
    assert row["n"] == len(runs)
    assert row["error"] == pytest.approx(100 - runs["test_accuracy"].mean())
    assert row["low"] < row["error"] < row["high"]
    assert (row["best"], row["worst"]) == pytest.approx(
        (100 - runs["test_accuracy"].max(), 100 - runs["test_accuracy"].min())
    )
    assert row["images"] == 13 * 15_000


def test_what_was_tried_are_runs_on_unseen_writers_alone():
    found = frontier.tried()
    runs = read_results()
    held_out = runs[runs["split"].str.startswith("writers") & runs["test_accuracy"].isna()]
    assert found["n"].sum() == (held_out["parameters"] < 20_000).sum()
    assert not found.duplicated(["model", "config"]).any()


def points():
    return frontier.frontier(["reference", "best-20k"])


def test_the_figure_has_each_point_with_its_number_and_each_claim_with_its_name():
    claims = pd.DataFrame({"parameters": [697], "accuracy": [99.03], "source": ["site/who/name"]})
    frontier.error_vs_parameters(points(), frontier.frontier(["best"]), claims, "title")
    (ax,) = plt.gcf().axes
    texts = {t.get_text() for t in ax.texts}
    assert {"best", "name"} < texts
    assert any(text.startswith("13,912\n0.62 %") for text in texts)
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_chosen_designs_stand_out_among_those_that_were_tried():
    runs = pd.DataFrame(
        {"model": ["a", "b", "b"], "parameters": [600, 700, 700], "images": [1e5, 1e5, 4e5],
         "error": [3.0, 2.0, 1.5]}
    )  # fmt: skip
    frontier.search(runs, ["b"], "title", "")
    everything, chosen = plt.gcf().axes[0].collections
    assert (len(everything.get_offsets()), len(chosen.get_offsets())) == (3, 2)
    assert chosen.get_sizes()[1] > chosen.get_sizes()[0]


def test_the_drawing_of_all_weights_shows_each_of_them_once():
    model = build("c5p rs1 = pooled")
    frontier.all_weights(model, "title")
    shown = [ax.images[0].get_array() for ax in plt.gcf().axes]
    drawn = np.concatenate([np.asarray(a.filled(np.nan)).ravel() for a in shown])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()
    assert np.sort(drawn[~np.isnan(drawn)]) == pytest.approx(np.sort(weights))
    labels = [ax.get_xlabel() for ax in plt.gcf().axes]
    assert sum(int(label.split("\n")[1]) for label in labels) == len(weights)


def test_errors_by_digit_add_up_to_the_error_of_the_recipe():
    labels = torch.arange(10_000) % 10
    found = frontier.errors_by_digit(labels, {"one": "fast"})
    listed = read_results("misread").merge(runs_for(RECIPES["fast"])[["config_hash", "seed"]])
    counts = [len(str(text).split()) for text in listed["wrong"]]
    assert found["one"].mean() == pytest.approx(100 * np.mean(counts) / 10_000)
