"""What is committed: the README, the ledger, the released checkpoints, the digits beside it."""

import json
import warnings

import pytest
import torch

from mnistlib import (
    RECIPES,
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
from mnistlib.experiments.ledger import read_results, runs_for
from mnistlib.experiments.report import write_report


def test_the_readme_says_what_the_ledger_says():
    assert not write_report(check=True), "run `python -m mnistlib report`"


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
        "best": set(range(20)),
        "best-20k": set(range(20)),
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
