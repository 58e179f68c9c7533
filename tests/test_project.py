"""The repository as a whole: dependencies, layers, ledger, published checkpoint, safety."""

import ast
import json
import re
import subprocess
import tomllib
import warnings
from pathlib import Path

import pytest

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
    published_checkpoint,
    read_results,
)
from mnistlib.report import write_report

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "mnistlib").glob("*.py"))
each_file = pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def requirement_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    return [re.match(r"[a-zA-Z0-9_-]+", line)[0] for line in wanted]


@pytest.mark.parametrize("name", requirement_names())
def test_every_direct_dependency_is_in_the_lock_and_in_the_conda_environment(name):
    assert re.search(rf"^{name}==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert re.search(rf"^ +- {name}[><=]", (ROOT / "environment.yml").read_text(), re.MULTILINE)


def test_every_locked_package_has_a_hash_and_no_line_names_a_host():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(r"^\S+==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    assert len(pinned) > 100
    assert all("--hash=sha256:" in block for block in pinned)
    assert "://" not in lock


def imports_of_package(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("name", ["model", "budget", "augment", "stats", "download", "process"])
def test_the_lowest_rooms_import_nothing_else_of_the_package(name):
    assert imports_of_package(ROOT / "mnistlib" / f"{name}.py") == set()


def test_training_knows_neither_plots_nor_ledger_nor_notebooks():
    for name in ("train", "state", "checkpoint", "resume", "evaluate", "data", "config"):
        upper = {
            "plots",
            "drawings",
            "ledger",
            "report",
            "sweep",
            "bench",
            "peers",
            "conventional",
            "machine",
            "headless",
            "audit",
            "ablations",
            "charts",
            "summary",
            "__main__",
        }
        assert not imports_of_package(ROOT / "mnistlib" / f"{name}.py") & upper


@each_file
def test_no_file_of_the_package_is_longer_than_250_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 250


def code_cells():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        yield pytest.param("\n".join(source), id=path.name)


@pytest.mark.parametrize(
    "source", [pytest.param(p.read_text(encoding="utf-8"), id=p.name) for p in PACKAGE]
    + list(code_cells()),
)  # fmt: skip
def test_nothing_is_unpickled_or_executed_from_a_file(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "marshal", "shelve", "dill", "joblib"} & set(names)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "yaml.load", "np.load", "torch.jit.load"}
            if called == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True"


def test_the_readme_says_what_the_ledger_says():
    assert not write_report(check=True), "run `python -m mnistlib report`"


def test_each_row_of_the_ledger_is_reproduced_by_its_config():
    runs = read_results()
    assert (runs["source"] == "mnist").all()
    assert not runs.duplicated(["config_hash", "seed"]).any()
    for row in runs.itertuples():
        config = Config(**json.loads(row.config))
        assert config.hash(row.source) == row.config_hash
        assert row.recipe in {config.recipe, "custom"}  # some were run before they had a name
        assert row.parameters == sum(p.numel() for p in build(row.model).parameters())


def test_the_recipes_are_the_ones_that_were_run():
    runs = read_results()
    for recipe, seeds in {
        "reference": {0, 1, 2},
        "reference-fast": {0, 1, 2, 3, 4},
        "fast": set(range(10)),
        "sprint": set(range(10)),
        "best": set(range(20)),
        "best-20k": set(range(20)),
    }.items():
        rows = runs[runs["recipe"] == recipe]
        assert seeds <= set(rows["seed"])
        assert set(rows["epochs"]) == {RECIPES[recipe].epochs}


def test_no_writer_of_the_digits_that_are_here_is_on_both_sides():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = load_mnist()
    if digits.source == "sample":
        with pytest.raises(DatasetError, match="nobody knows who wrote"):
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
    [("reference-fast", 5, 99.3), ("fast", 10, 99.4), ("sprint", 10, 99.0)],
)
def test_the_quick_recipes_reach_their_bars(recipe, n, accuracy):
    rows = read_results()
    rows = rows[(rows["recipe"] == recipe) & (rows["seed"] < n)]
    assert len(rows) == n
    assert rows["val_accuracy"].mean() >= accuracy
    assert rows["test_accuracy"].mean() >= accuracy
    assert (rows["parameters"] < 20_000).all()


@pytest.mark.parametrize(("recipe", "kind"), [("best", "test"), ("reference", "validation")])
def test_the_published_checkpoints_are_seed_0_and_what_their_rows_say(recipe, kind):
    path = published_checkpoint(recipe)
    assert [path] == list(path.parent.glob("*"))
    content = load_checkpoint(path)
    runs = read_results()
    row = runs[(runs["recipe"] == recipe) & (runs["seed"] == 0)].iloc[0]
    assert Config(**content["config"]) == Config(**json.loads(row["config"]))
    assert content["accuracy_kind"] == kind
    column = {"test": "test_accuracy", "validation": "val_accuracy"}[kind]
    assert content["accuracy"] == pytest.approx(row[column], abs=1e-3)
    assert f"acc{content['accuracy']:.2f}.pth" in path.name
    assert path.stat().st_size < 500_000


def test_the_published_best_network_reads_the_test_set_as_its_row_says():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        digits = load_mnist()
    model, content = load_model(published_checkpoint()), load_checkpoint(published_checkpoint())
    if digits.source == "sample":  # which has no test set, but was trained on
        seen = evaluate(model, digits.train_images, digits.train_labels)
        assert seen.accuracy > 99
        return
    seen = evaluate(model, digits.test_images, digits.test_labels)
    assert abs(seen.accuracy - content["accuracy"]) < 0.021  # two images, by another's rounding


def test_github_actions_may_only_read_and_are_pinned_by_commit():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text()
        assert re.search(r"^permissions:\n  contents: read$", text, re.MULTILINE)
        used = re.findall(r"uses: (\S+)", text)
        assert used
        assert all(re.search(r"@[0-9a-f]{40}$", action) for action in used)


def test_no_committed_output_of_a_notebook_is_active():
    """Only text, plain tables and PNG: nothing that a viewer would run or fetch."""
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                assert set(data) <= {"text/plain", "text/html", "image/png"}, path.name
                html = "".join(data.get("text/html", ""))
                found = re.search(r"(?i)<script|<iframe|<object|javascript:|\son\w+=|src=", html)
                assert not found, f"{found and found[0]} in {path.name}"


def test_the_lock_has_no_release_with_a_known_remote_hole():
    lock = (ROOT / "requirements.lock").read_text()
    for name, least in {"jupyter-server": (2, 20), "torch": (2, 10)}.items():
        for version in re.findall(rf"^{name}==([\d.]+)", lock, re.MULTILINE):
            assert tuple(map(int, version.split(".")[:2])) >= least


def test_no_tracked_file_names_a_path_of_one_machine():
    folders = "|".join(("work", "root", "home", "Users"))
    pattern = re.compile(rf"(?<![\w.$}}])/({folders})/[\w.]+")
    for path in tracked():
        if path.suffix not in {".png", ".pth"}:
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{found[0]} in {path.name}"


def test_the_working_tree_stays_under_ten_megabytes():
    assert sum(path.stat().st_size for path in tracked()) < 10_000_000
