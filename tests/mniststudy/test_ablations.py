"""The ablations change what they say and nothing else; the figure of comparisons draws."""

import math
from dataclasses import asdict

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import scipy.stats

from mnistlib import build
from mnistlib.plots import REFERENCE, TRAIN, VALIDATION
from mniststudy.figures.ablations import ablations, compare_with_first, forest_plot
from mniststudy.runs.stats import Comparison


def test_each_ablation_is_another_run_than_the_base_and_keeps_seed_split_and_length():
    found = ablations()
    assert len({config.hash("mnist") for config in found.values()}) == len(found) == 30
    assert {(c.seed, c.split, c.epoch_images) for c in found.values()} == {(0, "writers", 15_000)}
    lengths = {name: c.epochs for name, c in found.items() if c.epochs != 8}
    assert lengths == {"5 epochs": 5, "20 epochs": 20, "60 epochs": 60}
    networks = {config.model for config in found.values()}
    assert max(sum(p.numel() for p in build(name).parameters()) for name in networks) < 20_000


def test_an_ablation_changes_one_choice_and_a_rate_only_where_its_name_says_so():
    first, *others = ablations().items()
    base = asdict(first[1])
    augmentations = {"degrees", "pixels", "scale", "shear", "elastic"}
    pairs = [{"optimizer", "weight_decay"}, {"anneal", "cycle_momentum"}]
    for name, config in others:
        changed = asdict(config)
        differ = {field for field in base if base[field] != changed[field]}
        assert ("max_lr" in differ) == ("rate 0" in name), name
        if "max_lr" in differ:
            assert f"rate {changed['max_lr']:g}" in name
            differ -= {"max_lr"} if len(differ) > 1 else set()
        assert len(differ) == 1 or differ <= augmentations or differ in pairs, name


def test_at_full_length_the_recipes_own_average_is_kept():
    assert ablations(5)["as it is"].ema_decay == 0.99
    assert ablations(80)["as it is"].ema_decay == ablations(40)["as it is"].ema_decay > 0.99
    assert "20 epochs" not in ablations(20)


def test_changes_are_compared_by_seed_and_corrected_and_those_of_few_seeds_are_left_out():
    first = pd.DataFrame({"error": [1.0, 1.1, 0.9, 1.0]})
    others = {
        "same seeds": pd.DataFrame({"error": [1.3, 1.3, 1.2, 1.4]}),
        "one more": pd.DataFrame({"error": [9.0, 1.1, 1.2, 1.1, 1.0]}, index=[-1, 0, 1, 2, 3]),
        "two seeds": first.head(2) + 1,
        "moved": first + 1,
    }
    changes, p = compare_with_first({"first": first} | others, "error", "points", least=3)
    assert list(changes) == ["same seeds", "one more", "moved"]
    assert changes["same seeds"].difference == pytest.approx(0.3)
    assert changes["one more"].seeds == "4 paired seeds"
    assert changes["one more"].difference == pytest.approx(0.1)
    raw = scipy.stats.ttest_rel(first["error"], others["same seeds"]["error"]).pvalue
    assert p["same seeds"] == pytest.approx(3 * raw)
    assert math.isnan(p["moved"])  # of seeds that all differ alike


def test_the_forest_sorts_names_and_colours_every_change_in_each_panel():
    changes = {
        name: Comparison(x, x - 0.05, x + 0.05, "8 paired seeds")
        for name, x in {"worse": 0.3, "better": -0.1, "undecided": 0.02, "far": 0.9}.items()
    }
    losses = {
        name: Comparison(-c.difference / 10, -c.high / 10, -c.low / 10, c.seeds, "nats")
        for name, c in changes.items()
    }
    sure = ["worse", "better", "far"]
    panels = {"error": (changes, sure, (-0.2, 0.4)), "loss": (losses, [], (-0.04, 0.02))}
    forest_plot(panels, "title", "subtitle")
    error, loss = plt.gcf().axes
    labels = [t.get_text() for t in error.get_yticklabels()]
    assert labels == ["better", "undecided", "worse", "far"]
    colors = {t.get_text(): t.get_color() for t in error.texts}
    assert colors == {"-0.10": TRAIN, "+0.02": REFERENCE, "+0.30": VALIDATION, "+0.90": VALIDATION}
    assert [t.get_text() for t in loss.texts] == ["+0.010", "-0.002", "-0.030", "-0.090"]
    assert (error.get_xlabel(), loss.get_xlabel()) == ("error", "loss")
    for ax, mark, edge in ((error, ">", 0.4), (loss, "<", -0.04)):  # beyond the axis: an arrow
        assert [line.get_xdata()[0] for line in ax.lines if line.get_marker() == mark] == [edge]
        assert ax.get_xlim()[0] < edge < ax.get_xlim()[1]
    plt.close("all")
