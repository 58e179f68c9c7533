"""What is committed: the README, the ledger, the released checkpoints, the digits beside it."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from mnistlib import (
    RECIPES,
    Config,
    build,
    evaluate,
    load_checkpoint,
    load_mnist,
    load_model,
    released_checkpoint,
)
from mniststudy.figures.frontier import BUDGETS
from mniststudy.runs.ledger import read_results, runs_for
from mniststudy.runs.pages import write_report
from mniststudy.runs.teachers import made_of, pool_name

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = ROOT / "outputs" / "checkpoints"


@pytest.fixture(scope="module")
def digits():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_mnist()


def test_readme_and_docs_say_what_the_ledger_says():
    assert not write_report(check=True), "run `mnist report`"


def test_each_row_of_the_ledger_is_reproduced_by_its_config_and_ends_as_its_history():
    runs, history = read_results(), read_results("history").groupby(["config_hash", "seed"])
    parameters = {
        name: sum(p.numel() for p in build(name).parameters()) for name in set(runs.model)
    }
    other = runs[runs["source"] != "mnist"]  # Fashion-MNIST, in notebook 05
    assert set(other["source"]) == {"set-d1fd84a8"}
    assert other["test_accuracy"].isna().all()
    assert not runs.duplicated(["config_hash", "seed"]).any()
    for row in runs.itertuples():
        config = Config(**json.loads(row.config))
        assert config.hash(row.source) == row.config_hash
        # some were run before they had a name, some by a recipe that has changed since
        assert "custom" in (row.recipe, config.recipe) or row.recipe == config.recipe
        assert row.parameters == parameters[row.model]
        epochs = history.get_group((row.config_hash, row.seed))
        assert epochs["epoch"].tolist() == list(range(1, row.epochs + 1))
        last = epochs["val_acc"].iloc[-1]
        assert last == pytest.approx(row.val_accuracy, abs=1e-3, nan_ok=not row.n_val)


def test_the_recipes_are_the_ones_that_were_run():
    recipes = ["reference", "reference-fast", "sprint", "smoothed", "smoothed-20k", "teacher"]
    seeds = {
        "fast": 40,
        "best-682": 10,
        "best-920": 10,
        "best-1816": 10,
        "tiny": 4,
    }  # all but the first on two cores
    for recipe in [*recipes, *BUDGETS.values(), "fast", "tiny"]:
        rows = runs_for(RECIPES[recipe])
        assert set(range(seeds.get(recipe, 20))) <= set(rows["seed"])
        assert set(rows["epochs"]) == {RECIPES[recipe].epochs}


@pytest.mark.parametrize("recipe", sorted(p.parent.name for p in CHECKPOINTS.glob("*/*.pth")))
def test_a_released_checkpoint_is_seed_0_and_reads_digits_as_its_row_says(recipe, digits):
    path = released_checkpoint(recipe)
    assert [path] == list(path.parent.glob("*.pth"))
    assert path.stat().st_size < 450_000
    content, model = load_checkpoint(path), load_model(path)
    plain = torch.load(path, weights_only=True)  # as somebody without this package reads it
    assert plain["model_state_dict"].keys() == model.state_dict().keys()
    row = runs_for(RECIPES[recipe]).query("seed == 0").iloc[0]
    assert content["config_hash"] == Config(**content["config"]).hash("mnist") == row["config_hash"]
    kind, mark = ("val", "acc") if recipe == "reference" else ("test", "test")
    assert content[f"{kind}_accuracy"] == pytest.approx(row[f"{kind}_accuracy"], abs=1e-3)
    assert path.name.endswith(f"_{mark}{row[f'{kind}_accuracy']:.2f}.pth")
    if not digits.test:  # the sample, which was trained on
        assert evaluate(model, digits.train_images, digits.train_labels).accuracy > 98
    elif recipe in ("best", "reference"):
        seen = evaluate(model, *digits.test)
        assert seen.accuracy == row["test_accuracy"]
        assert seen.loss == pytest.approx(row["test_loss"], abs=2e-5)
    else:  # every fifth image is enough to tell networks apart: which are misclassified is known
        seen = evaluate(model, *(part[::5] for part in digits.test))
        listed = read_results("misread").query("config_hash == @row.config_hash and seed == 0")
        wrong = [int(i) for i in listed["wrong"].item().split()]
        assert sorted(seen.wrong) == [i // 5 for i in wrong if i % 5 == 0]


def test_the_pool_of_the_recipes_is_named_after_the_committed_teachers():
    contents = [load_checkpoint(p) for p in sorted((CHECKPOINTS / "teacher/seeds").glob("*.pth"))]
    assert [content["config"]["seed"] for content in contents] == list(range(20))
    name = pool_name(contents, made_of(contents, "mnist", RECIPES["teacher"], 20))
    names = ("best", "best-20k", "best-7918", "best-6174", "smoothed", "teacher")
    released = [load_checkpoint(name) for name in names]
    others = pool_name(released, made_of(released, "mnist", RECIPES["teacher"], 20))
    mixed = pool_name(released, made_of(released, "mnist", RECIPES["teacher"], 20, 60_000))
    assert {c.pool for c in RECIPES.values()} == {"", name, others, mixed}
    assert (RECIPES["tiny"].pool, RECIPES["careful"].pool) == (others, mixed)


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
