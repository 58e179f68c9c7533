"""The frontier: its rows come from the ledger, and its figures draw what they say."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from mnistlib import RECIPES, build
from mniststudy.figures import frontier
from mniststudy.runs.ledger import LedgerError, read_results, runs_for


@pytest.fixture
def axes():
    yield lambda: plt.gcf().axes
    plt.close("all")


def test_rows_of_the_frontier_are_means_over_the_tested_seeds_of_the_ledger():
    found = frontier.frontier(["fast", "reference"]).set_index("recipe")
    assert found.index.tolist() == ["reference", "fast"]  # by parameters
    row, errors = found.loc["fast"], 100 - runs_for(RECIPES["fast"])["test_accuracy"]
    assert (row["n"], row["images"]) == (len(errors), 13 * 15_000)
    assert (row["error"], row["best"], row["worst"]) == pytest.approx(
        (errors.mean(), errors.min(), errors.max())
    )
    assert row["low"] < row["error"] < row["high"]


def test_a_recipe_without_two_tested_runs_is_named(monkeypatch):
    monkeypatch.setattr(frontier, "runs_for", lambda config: runs_for(config)[:1])
    with pytest.raises(LedgerError, match="fewer than two tested runs of the recipe 'fast'"):
        frontier.frontier(["fast"])


def test_what_was_tried_are_runs_on_unseen_writers_alone():
    found, runs = frontier.tried(), read_results()
    held_out = runs[runs["split"].str.startswith("writers") & runs["test_accuracy"].isna()]
    assert found["n"].sum() == (held_out["parameters"] < 20_000).sum()
    assert not found.duplicated(["model", "config"]).any()


def test_the_figure_has_each_point_with_its_number_and_each_claim_with_its_name(axes):
    claims = pd.DataFrame({"parameters": [697], "accuracy": [99.03], "source": ["site/who/name"]})
    curves = {name: frontier.frontier([name]) for name in ("reference", "best")}
    frontier.error_vs_parameters(curves, claims, "title")
    (ax,) = axes()
    shown = [t.get_text() for t in ax.texts]
    assert shown == ["13,912\n0.62 %", "reference", "13,912\n0.35 %", "best", "name"]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_drawing_of_all_weights_shows_each_of_them_once(axes):
    model = build("net-697")
    frontier.all_weights(model, "title")
    drawn = torch.cat([torch.from_numpy(a.images[0].get_array().compressed()) for a in axes()])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(drawn.sort().values, weights.sort().values)
    assert sum(int(ax.get_xlabel().split("\n")[1]) for ax in axes()) == len(weights)
