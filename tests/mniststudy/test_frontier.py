"""The frontier: its rows come from the ledger, and its figures draw what they say."""

from collections import Counter

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from mnistlib import RECIPES, build
from mniststudy.figures import frontier
from mniststudy.runs.ledger import LedgerError, read_results, runs_for
from mniststudy.runs.stacked import check_stackable


@pytest.fixture
def axes():
    yield lambda: plt.gcf().axes
    plt.close("all")


def test_rows_of_the_frontier_are_means_over_the_tested_seeds_of_the_ledger():
    found = frontier.frontier({name: RECIPES[name] for name in ("fast", "reference")}).set_index(
        "name"
    )
    assert found.index.tolist() == ["reference", "fast"]  # by parameters
    row, errors = found.loc["fast"], 100 - runs_for(RECIPES["fast"])["test_accuracy"]
    assert (row["n"], row["images"]) == (len(errors), 13 * 15_000)
    assert (row["error"], row["best"], row["worst"]) == pytest.approx(
        (errors.mean(), errors.min(), errors.max())
    )
    assert row["low"] < row["error"] < row["high"]


def test_a_recipe_without_two_tested_runs_is_named(monkeypatch):
    monkeypatch.setattr(frontier, "runs_for", lambda config: runs_for(config)[:1])
    with pytest.raises(LedgerError, match="fewer than two tested runs of 'fast'"):
        frontier.frontier({"fast": RECIPES["fast"]})


def test_the_protocol_gives_each_network_as_many_images_alone_and_taught():
    found = frontier.protocol()
    assert len(set(found)) == len(found) == 8 * 20 + 4 * 20 + 4 * 5
    assert {config.epochs * config.epoch_images for config in found} == {1_500_000}
    assert {config.split for config in found} == {"none"}  # all images, so the test set is read
    counts = Counter((config.model, bool(config.pool)) for config in found)
    assert {n for (_, taught), n in counts.items() if not taught} == {20}
    assert {name: counts[name, True] for name in ("net-682", "net-20k")} == {
        "net-682": 5,
        "net-20k": 20,
    }
    assert found[0] == RECIPES["best-682"]  # which is in the ledger already
    for config in found:
        check_stackable(config)


def test_each_shape_is_timed_in_turn(monkeypatch, tmp_path):
    monkeypatch.setenv("MNISTLIB_RUNS", str(tmp_path))
    monkeypatch.setattr(frontier, "time_our_loop", lambda config, *_: (len(config.model), 0.0))
    monkeypatch.setattr(frontier, "load_mnist", lambda: None)
    table = read_results("shapes", frontier.time_shapes(["net-682", "net-3466"], 2).parent)
    assert table["name"].tolist() == ["net-682", "net-3466"] * 2
    assert table["seconds"].tolist() == [7, 8] * 2
    assert table["parameters"].tolist() == [682, 3466] * 2


def test_what_was_tried_are_runs_on_unseen_writers_alone():
    found, runs = frontier.tried(), read_results()
    held_out = runs[runs["split"].str.startswith("writers") & runs["test_accuracy"].isna()]
    assert found["n"].sum() == (held_out["parameters"] < 20_000).sum()
    assert not found.duplicated(["model", "config"]).any()


def test_the_figure_has_each_point_with_its_number_and_names_curves_and_claims(axes):
    claims = pd.DataFrame({"parameters": [697], "accuracy": [99.03], "source": ["site/who/name"]})
    curves = {n: frontier.frontier({n: RECIPES[n]}) for n in ("reference", "best")}
    frontier.error_vs_parameters(curves, claims, "title")
    (ax,) = axes()
    shown = [t.get_text() for t in ax.texts]
    assert shown == ["reference", "13,912\n0.35 %", "best", "public results"]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_drawing_of_all_weights_shows_each_of_them_once(axes):
    model = build("net-697")
    frontier.all_weights(model, "title")
    drawn = torch.cat([torch.from_numpy(a.images[0].get_array().compressed()) for a in axes()])
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(drawn.sort().values, weights.sort().values)
    assert sum(int(ax.get_xlabel().split("\n")[1]) for ax in axes()) == len(weights)
