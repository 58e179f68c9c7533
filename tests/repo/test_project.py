"""What is committed: the README, the ledger, the released checkpoints, the digits beside it."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from mnistlib import (
    RECIPES,
    Budget,
    Config,
    DatasetError,
    build,
    evaluate,
    learning_rates,
    load_checkpoint,
    load_mnist,
    load_model,
    released_checkpoint,
)
from mnistlib.distill import pool_name
from mniststudy.figures.frontier import BUDGETS
from mniststudy.runs.ledger import read_results, runs_for
from mniststudy.runs.report import write_report

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_says_what_the_ledger_says():
    assert not write_report(check=True), "run `mnist report`"


def test_each_row_of_the_ledger_is_reproduced_by_its_config():
    runs = read_results()
    assert (runs["source"] == "mnist").all()
    assert not runs.duplicated(["config_hash", "seed"]).any()
    for row in runs.itertuples():
        config = Config(**json.loads(row.config))
        assert config.hash(row.source) == row.config_hash
        # some were run before they had a name, some by a recipe that has changed since
        assert "custom" in (row.recipe, config.recipe) or row.recipe == config.recipe
        assert row.parameters == sum(p.numel() for p in build(row.model).parameters())


def test_the_recipes_are_the_ones_that_were_run():
    for recipe, seeds in {
        "reference": set(range(20)),
        "reference-fast": set(range(20)),
        "fast": set(range(40)),
        "sprint": set(range(20)),
        "smoothed": set(range(20)),
        "smoothed-20k": set(range(20)),
        "teacher": set(range(20)),
        **{recipe: set(range(20)) for recipe in BUDGETS.values()},
    }.items():
        rows = runs_for(RECIPES[recipe])
        assert seeds <= set(rows["seed"])
        assert set(rows["epochs"]) == {RECIPES[recipe].epochs}


def test_no_writer_of_the_digits_that_are_here_is_on_both_sides():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = load_mnist()
    if digits.source == "sample":
        with pytest.raises(DatasetError, match="writers of the sample are unknown"):
            digits.split("writers")
        return
    train_ids, val_ids = digits.split("writers")
    table = digits.writers()
    assert not set(table[train_ids, 2].tolist()) & set(table[val_ids, 2].tolist())
    assert len(train_ids) + len(val_ids) == 60_000
    assert abs(len(val_ids) - 10_000) < 100
    for partition in (0, 4):
        assert abs(int((table[val_ids, 1] == partition).sum()) - 5_000) < 100
    shares = [table[ids, 0].bincount(minlength=10) / len(ids) for ids in (train_ids, val_ids)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.002


def test_each_run_has_all_its_epochs_and_ends_as_its_row_says():
    history = read_results("history")
    for row in read_results().itertuples():
        mine = history[(history["config_hash"] == row.config_hash) & (history["seed"] == row.seed)]
        assert mine["epoch"].tolist() == list(range(1, row.epochs + 1))
        assert mine["val_acc"].iloc[-1] == pytest.approx(
            row.val_accuracy, abs=1e-3, nan_ok=not row.n_val
        )


def test_the_committed_reference_runs_had_the_published_learning_rates():
    rates = learning_rates(RECIPES["reference"], 391)[391::391]
    runs = read_results()
    history = read_results("history").merge(
        runs[runs["recipe"] == "reference"][["config_hash", "seed"]]
    )
    for _, rows in history.groupby("seed"):
        assert rows["lr"].tolist() == pytest.approx(rates, abs=1e-7)


@pytest.mark.parametrize(
    ("recipe", "n", "accuracy"),
    [("reference-fast", 20, 99.41), ("fast", 40, 99.4), ("sprint", 20, 99.0)],
)
def test_the_quick_recipes_reach_their_bars(recipe, n, accuracy):
    rows = runs_for(RECIPES[recipe]).query("seed < @n")
    assert len(rows) == n
    assert rows["val_accuracy"].mean() >= accuracy
    assert rows["test_accuracy"].mean() >= accuracy
    assert (rows["parameters"] < 20_000).all()


@pytest.mark.parametrize(
    ("recipe", "least"),
    [("best", 99.65), ("best-7918", 99.60), ("best-6174", 99.55)],
)
def test_networks_with_teachers_reach_the_aims_of_their_size(recipe, least):
    rows = runs_for(RECIPES[recipe]).query("seed < 20")
    assert len(rows) == 20
    assert round(rows["test_accuracy"].mean(), 6) >= least
    assert rows["test_loss"].mean() <= 0.016


ENTRIES = sorted(path.parent.name for path in (ROOT / "outputs" / "checkpoints").glob("*/*.pth"))


@pytest.mark.parametrize("recipe", ENTRIES)
def test_an_entry_of_the_leaderboard_gives_the_figures_of_its_row_again(recipe):
    path = released_checkpoint(recipe)
    assert path.stat().st_size < 450_000
    content = load_checkpoint(path)
    config, rows = Config(**content["config"]), runs_for(RECIPES[recipe])
    row = rows[rows["seed"] == 0].iloc[0]
    assert content["config_hash"] == config.hash("mnist") == row["config_hash"]
    assert Budget(build(config.model)).parameters == row["parameters"] < 20_000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = load_mnist()
    if digits.test:
        seen = evaluate(load_model(path), *digits.test)
        assert seen.accuracy == row["test_accuracy"]
        assert seen.loss == pytest.approx(row["test_loss"], abs=2e-5)
        assert set(BUDGETS.values()) | {"reference", "smoothed", "teacher"} <= set(ENTRIES)


def test_the_pool_of_the_recipes_is_named_after_the_committed_teachers():
    paths = sorted((ROOT / "outputs" / "checkpoints" / "teacher" / "seeds").glob("*.pth"))
    contents = [load_checkpoint(path) for path in paths]
    assert [content["config"]["seed"] for content in contents] == list(range(20))
    name = pool_name(contents, "mnist", RECIPES["teacher"], 20)
    taught = {recipe: c.pool for recipe, c in RECIPES.items() if c.pool}
    assert set(taught.values()) == {name}
    assert len(taught) == 4


def test_the_ledger_says_what_each_pool_was_made_of():
    runs = read_results()
    settings = [json.loads(text) for text in runs["config"]]
    used = {(c["pool"], c["split"]) for c in settings if c.get("pool")}
    pools = read_results("pools").set_index("pool")
    assert {name for name, _ in used} == set(pools.index)
    teachers = set(runs["config_hash"].str.cat(runs["seed"].astype(str), "-"))
    for name, split in used:
        assert set(pools.loc[name, "teachers"].split()) <= teachers
        assert pools.loc[name, "split"] == split


@pytest.mark.parametrize(
    ("recipe", "kind", "mark"), [("best", "test", "test"), ("reference", "val", "acc")]
)
def test_the_released_checkpoints_are_seed_0_and_what_their_rows_say(recipe, kind, mark):
    path = released_checkpoint(recipe)
    assert [path] == list(path.parent.glob("*.pth"))
    content = load_checkpoint(path)
    runs = read_results()
    row = runs[(runs["recipe"] == recipe) & (runs["seed"] == 0)].iloc[0]
    assert Config(**content["config"]) == Config(**json.loads(row["config"]))
    accuracy = content[f"{kind}_accuracy"]
    assert accuracy == pytest.approx(row[f"{kind}_accuracy"], abs=1e-3)
    assert path.name.endswith(f"_{mark}{accuracy:.2f}.pth")
    assert path.stat().st_size < 500_000
    plain = torch.load(path, weights_only=True)  # as somebody without this package reads it
    assert plain["model_state_dict"].keys() == load_model(path).state_dict().keys()


def test_the_released_best_network_reads_the_test_set_as_its_row_says():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = load_mnist()
    model, content = load_model(released_checkpoint()), load_checkpoint(released_checkpoint())
    if digits.source == "sample":  # which has no test set, but was trained on
        seen = evaluate(model, digits.train_images, digits.train_labels)
        assert seen.accuracy > 99
        return
    seen = evaluate(model, digits.test_images, digits.test_labels)
    assert (
        abs(seen.accuracy - content["test_accuracy"]) < 0.021
    )  # two images, by another's rounding
