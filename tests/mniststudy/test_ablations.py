"""The ablations change what they say and nothing else; the figure of comparisons draws."""

from dataclasses import asdict

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import scipy.stats

from mnistlib import build
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION
from mniststudy.figures.ablations import (
    ablations,
    compare_with_first,
    final_results,
    forest_plot,
    train_ablations,
)
from mniststudy.runs.stats import Comparison


def test_each_ablation_is_another_run_than_the_base_and_keeps_seed_split_and_length():
    found = ablations()
    assert len({config.hash("mnist") for config in found.values()}) == len(found) >= 13
    assert {(c.seed, c.split, c.epoch_images) for c in found.values()} == {(0, "writers", 15_000)}
    lengths = {name: c.epochs for name, c in found.items() if c.epochs != 8}
    assert lengths == {"5 epochs": 5, "20 epochs": 20, "60 epochs": 60}
    assert "20 epochs" not in ablations(20)


@pytest.mark.parametrize("name", [n for n in ablations() if n != "as it is"])
def test_an_ablation_changes_one_choice_and_a_rate_only_where_its_name_says_so(name):
    base, changed = asdict(ablations()["as it is"]), asdict(ablations()[name])
    differ = {field for field in base if base[field] != changed[field]}
    if "rate 0" in name:
        assert f"rate {changed['max_lr']:g}" in name
        if name != "learning rate 0.25":
            differ.remove("max_lr")
    else:
        assert "max_lr" not in differ
    assert len(differ) >= 1
    augmentations = {"degrees", "pixels", "scale", "shear", "elastic"}
    pairs = [{"optimizer", "weight_decay"}, {"anneal", "cycle_momentum"}]
    assert len(differ) == 1 or differ <= augmentations or differ in pairs


def test_every_ablation_has_a_network_under_20000_parameters():
    for config in ablations().values():
        assert sum(p.numel() for p in build(config.model).parameters()) < 20_000


def test_at_full_length_the_recipes_own_average_is_kept():
    assert ablations(5)["as it is"].ema_decay == 0.99
    assert ablations(80)["as it is"].ema_decay == ablations(40)["as it is"].ema_decay > 0.99


def test_a_seed_of_each_or_of_those_named_is_trained_before_the_next(monkeypatch):
    monkeypatch.setattr("mniststudy.figures.ablations.sweep", list)
    every = train_ablations(range(3, 5), epochs=2)
    n = len(ablations())
    assert [c.seed for c in every] == [3] * n + [4] * n
    assert {c.epochs for c in every} == {2, 5, 20, 60}
    some = ["as it is", "no hard-example mining"]
    assert [(c.seed, c.focus) for c in train_ablations(range(2), 80, some)] == [
        (seed, ablations(80)[name].focus) for seed in (0, 1) for name in some
    ]


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


def change(difference, half=0.05, unit="points"):
    return Comparison(difference, difference - half, difference + half, "8 paired seeds", unit)


def test_the_results_are_validation_errors_and_losses_by_seed():
    found = final_results({"as it is": ablations()["as it is"]})["as it is"]
    assert found.index.tolist() == list(range(8))
    assert found["error"].between(0.8, 1.1).all()
    assert found["loss"].between(0.05, 0.1).all()


def test_changes_are_compared_by_seed_and_corrected_and_those_of_few_seeds_are_left_out():
    first = pd.DataFrame({"error": [1.0, 1.1, 0.9, 1.0]})
    others = {
        "same seeds": pd.DataFrame({"error": [1.3, 1.3, 1.2, 1.4]}),
        "one more": pd.DataFrame({"error": [1.1, 1.2, 1.1, 1.0, 9.0]}),
        "two seeds": first.head(2) + 1,
    }
    changes, p = compare_with_first({"first": first} | others, "error", "points", least=3)
    assert list(changes) == ["same seeds", "one more"]
    assert changes["same seeds"].difference == pytest.approx(0.3)
    assert changes["one more"].seeds == "4 paired seeds"
    raw = scipy.stats.ttest_rel(first["error"], others["same seeds"]["error"]).pvalue
    assert p["same seeds"] == pytest.approx(2 * raw)


def test_the_forest_sorts_and_names_every_change_in_each_panel():
    changes = {"worse": change(0.3, 0.2), "better": change(-0.1, 0.1), "undecided": change(0.02)}
    losses = {name: change(c.difference / 10, 0.01, "nats") for name, c in changes.items()}
    panels = {"error": (changes, ["worse"]), "loss": (losses, [])}
    forest_plot(panels, "title", "subtitle")
    error, loss = plt.gcf().axes
    labels = [t.get_text() for t in error.get_yticklabels()]
    assert labels == ["better", "undecided", "worse"]
    assert [t.get_text() for t in error.texts] == ["-0.10", "+0.02", "+0.30"]
    assert [t.get_text() for t in loss.texts] == ["-0.010", "+0.002", "+0.030"]
    assert (error.get_xlabel(), loss.get_xlabel()) == ("error", "loss")
    low, high = error.get_xlim()
    assert low < -0.2
    assert high > 0.5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_forest_shows_zero_also_where_all_changes_lie_on_one_side(sign):
    changes = {"small": change(sign * 0.2, 0.01), "large": change(sign * 0.3, 0.01)}
    forest_plot({"points": (changes, [])}, "title", "subtitle")
    low, high = plt.gca().get_xlim()
    assert low < 0 < high


@pytest.mark.parametrize("sign", [1, -1])
def test_the_forest_draws_a_change_far_beyond_the_others_as_an_arrow_at_the_edge(sign):
    changes = {"small": change(0.1), "opposite": change(-0.1), "far": change(sign * 0.9)}
    forest_plot({"points": (changes, [])}, "title", "subtitle")
    low, high = plt.gca().get_xlim()
    assert -0.2 < low < high < 0.2
    marks = {line.get_marker(): line.get_xdata()[0] for line in plt.gca().lines}
    assert marks[">" if sign > 0 else "<"] == pytest.approx(sign * 0.15)
    assert f"{sign * 0.9:+.2f}" in [t.get_text() for t in plt.gca().texts]


def test_the_forest_colours_the_distinguishable_changes_by_their_direction():
    changes = {"worse": change(0.3), "hardly": change(0.1), "better": change(-0.2)}
    forest_plot({"points": (changes, ["worse", "better"])}, "title", "subtitle")
    colors = {t.get_text(): t.get_color() for t in plt.gca().texts}
    assert colors == {"+0.30": VALIDATION, "+0.10": REFERENCE, "-0.20": TRAIN}
