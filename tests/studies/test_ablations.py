"""The ablations change what they say and nothing else; the figure of comparisons draws."""

from dataclasses import asdict

import matplotlib.pyplot as plt
import pytest

from mnistlib import build
from mnistlib.__main__ import main
from mnistlib.experiments.stats import Comparison
from mnistlib.studies.ablations import ablations, forest_plot


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
        if name != "rate 0.25":
            differ.remove("max_lr")
    else:
        assert "max_lr" not in differ
    assert len(differ) >= 1
    distortions = {"degrees", "pixels", "scale", "shear", "elastic"}
    pairs = [{"optimizer", "weight_decay"}, {"anneal", "cycle_momentum"}]
    assert len(differ) == 1 or differ <= distortions or differ in pairs


def test_every_ablation_has_a_network_under_20000_parameters():
    for config in ablations().values():
        assert sum(p.numel() for p in build(config.model).parameters()) < 20_000


def test_at_full_length_the_recipes_own_average_is_kept():
    assert ablations(5)["as it is"].ema_decay == 0.99
    assert ablations(80)["as it is"].ema_decay == ablations(40)["as it is"].ema_decay > 0.99


def test_the_command_trains_a_seed_of_each_before_the_next_and_takes_no_other_settings(
    monkeypatch, capsys
):
    asked = []

    def sweep(configs, *args, **more):
        asked.extend(configs)
        return len(configs), 0

    monkeypatch.setattr("mnistlib.experiments.sweep.sweep", sweep)
    assert main(["sweep", "--ablations", "2", "--seeds", "3:5"]) == 0
    n = len(ablations())
    assert [c.seed for c in asked] == [3] * n + [4] * n
    assert {c.epochs for c in asked} == {2, 5, 20, 60}
    assert main(["sweep", "--ablations", "2", "--dropout", "0.1"]) == 1
    assert "--ablations has its own settings" in capsys.readouterr().err


def test_the_command_trains_some_of_the_ablations_and_refuses_names_there_are_not(
    monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(
        "mnistlib.experiments.sweep.sweep", lambda cs, *a, **k: (asked.extend(cs), 0)
    )
    some = ["as it is", "no focus"]
    main(["sweep", "--ablations", "80", "--seeds", "0:2", "--only", *some])
    every = ablations(80)
    assert [(c.seed, c.focus) for c in asked] == [
        (seed, every[name].focus) for seed in (0, 1) for name in some
    ]
    assert main(["sweep", "--ablations", "8", "--only", "no focuss"]) == 1
    assert "--only is 'no focuss', but it must be one of as it is," in capsys.readouterr().err
    assert main(["sweep", "--only", "no focus"]) == 1
    assert "--only is for --ablations" in capsys.readouterr().err


def drawn():
    (number,) = plt.get_fignums()
    found = plt.figure(number)
    texts = [t.get_text() for ax in found.axes for t in ax.texts]
    texts += [t.get_text() for ax in found.axes for t in ax.get_yticklabels()]
    return found, texts


@pytest.fixture(autouse=True)
def no_figure_left():
    plt.close("all")
    yield
    plt.close("all")


def test_the_forest_sorts_and_names_every_change():
    changes = {
        "worse": Comparison(0.3, 0.2, 0.4, "8 paired seeds"),
        "better": Comparison(-0.1, -0.15, -0.05, "8 paired seeds"),
        "undecided": Comparison(0.02, -0.05, 0.09, "8 paired seeds"),
    }
    forest_plot(changes, "title", "subtitle", "points")
    found, texts = drawn()
    labels = [t.get_text() for t in found.axes[0].get_yticklabels()]
    assert labels == ["better", "undecided", "worse"]
    assert {"+0.30", "-0.10", "+0.02"} <= set(texts)
    low, high = found.axes[0].get_xlim()
    assert low < -0.15
    assert high > 0.4


@pytest.mark.parametrize("sign", [1, -1])
def test_the_forest_shows_zero_also_where_all_changes_lie_on_one_side(sign):
    changes = {
        name: Comparison(sign * d, sign * d - 0.01, sign * d + 0.01, "8 paired seeds")
        for name, d in {"small": 0.2, "large": 0.3}.items()
    }
    forest_plot(changes, "title", "subtitle", "points")
    low, high = plt.gca().get_xlim()
    assert low < 0 < high


def test_the_forest_colours_what_is_decided_by_itself_or_by_the_names_given():
    both = {
        "worse": Comparison(0.3, 0.2, 0.4, "8 paired seeds"),
        "hardly": Comparison(0.1, 0.01, 0.19, "8 paired seeds"),
    }
    colours = []
    for sure in (None, {"worse"}, ()):
        forest_plot(both, "title", "subtitle", "points", sure)
        colours.append({t.get_text(): t.get_color() for t in plt.gca().texts})
        plt.close()
    assert [c["+0.30"] == c["+0.10"] for c in colours] == [True, False, True]
    assert colours[1]["+0.30"] == colours[0]["+0.30"] != colours[2]["+0.30"]
