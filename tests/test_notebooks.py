"""The committed notebooks: whole, clean, true to the ledger; and proof that nbval can fail."""

import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from mnistlib import MODELS, RECIPES, Budget, build, read_results, runs_of
from mnistlib.peers import COURSES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def cells(path, kind):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


def test_the_notebooks_are_there():
    assert [p.stem[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "08", "09"]


@each_notebook
def test_it_was_executed_top_to_bottom_without_an_error(path):
    code = cells(path, "code")
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert all(o.output_type != "error" for c in code for o in c.outputs)


@each_notebook
def test_it_carries_no_trace_of_the_machine_that_ran_it(path):
    content = nbformat.read(path, as_version=4)
    assert set(content.metadata) == {"kernelspec", "language_info"}
    assert all(set(c.metadata) <= {"tags"} for c in content.cells)
    assert not re.search(r"/(home|root|tmp|work|Users)/\w", path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 1_000_000


@each_notebook
def test_its_title_is_a_question_and_a_figure_comes_early(path):
    first = cells(path, "markdown")[0].source.splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith("?")
    pictures = [i for i, c in enumerate(cells(path, "code")) if "image/png" in json.dumps(c)]
    assert pictures[0] <= 5


@each_notebook
def test_its_cells_are_short(path):
    lines = [len(c.source.splitlines()) for c in cells(path, "code")]
    assert max(lines) <= 25
    assert statistics.median(lines) <= 5


@each_notebook
def test_it_defines_no_long_function_and_reaches_for_no_path_or_package(path):
    for cell in cells(path, "code"):
        assert "sys.path" not in cell.source
        assert not re.search(r"^[!%]", cell.source, re.MULTILINE)
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 12


def test_no_function_is_defined_in_two_notebooks():
    names = []
    for path in NOTEBOOKS:
        tree = ast.parse("\n".join(c.source for c in cells(path, "code")))
        names += [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    assert len(names) == len(set(names))


@each_notebook
def test_seven_of_ten_cells_with_text_output_are_compared(path):
    shown = [c for c in cells(path, "code") if c.outputs]
    exempt = [c for c in shown if "nbval-ignore-output" in c.metadata.get("tags", [])]
    assert len(exempt) <= 0.3 * len(shown)


@each_notebook
def test_its_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
            assert (path.parent / target).exists(), target


def known_numbers():
    """Every number with a per cent sign or a thousands comma that prose may state."""
    budget, published = Budget(build()), read_results("published")
    totals = {name: Budget(build(name)).parameters for name in MODELS}
    weights = {layer.name: layer.parameters for layer in budget.layers}
    work = {layer.name: layer.multiply_accumulates for layer in budget.layers}
    threes = ("conv1", "conv2", "conv3", "conv4", "conv5")
    counts = [*totals.values(), weights["conv6"], 10_000, 50_000, 60_000, 5_000, 1_000, 14_000]
    counts += [20_000]  # the requirement
    counts += [RECIPES["best"].epoch_images, 10_000 - 15]  # without the disputed labels of 05
    counts += [sum(p.numel() for p in course.build().parameters()) for course in COURSES.values()]
    shares = [
        weights["conv6"] / budget.parameters,
        work["conv6"] / budget.multiply_accumulates,
        sum(weights[name] for name in threes) / budget.parameters,
        sum(work[name] for name in threes) / budget.multiply_accumulates,
    ]
    known = {f"{n:,}" for n in counts} | {f"{100 * s:.1f} %" for s in shares}
    targets = {"99.0 %", "99.4 %"}  # of sprint and fast; notebook 08 asserts that they are met
    targets |= {"99.65 %", "99.70 %"}  # of best and best-20k; notebook 06 says that they are missed
    means = {recipe: runs_of(RECIPES[recipe])["test_accuracy"] for recipe in ("best", "best-20k")}
    headline = {f"{test.mean():.2f} %" for test in means.values()}
    return known | {f"{published['val_acc'].max():.1f} %"} | targets | headline


@each_notebook
def test_no_number_in_its_prose_is_made_up(path):
    known = known_numbers()
    for cell in cells(path, "markdown"):
        for number in re.findall(r"\d+\.\d+ %|\d{1,3}(?:,\d{3})+", cell.source):
            assert number in known, f"{number} in {cell.source[:80]!r}"


def nbval(path):
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", str(path)]
    return subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)


def test_a_changed_parameter_count_makes_nbval_red(tmp_path):
    content = nbformat.read(ROOT / "notebooks" / "02_parameter_budget.ipynb", as_version=4)
    keep = next(i for i, c in enumerate(content.cells) if "== 13_912" in c.source)
    content.cells = content.cells[: keep + 1]
    nbformat.write(content, tmp_path / "true.ipynb")
    assert nbval(tmp_path / "true.ipynb").returncode == 0
    text = (tmp_path / "true.ipynb").read_text(encoding="utf-8")
    assert "Total Trainable Parameters: 13,912" in text
    changed = text.replace(
        "Total Trainable Parameters: 13,912", "Total Trainable Parameters: 13,911"
    )
    (tmp_path / "false.ipynb").write_text(changed, encoding="utf-8")
    result = nbval(tmp_path / "false.ipynb")
    assert result.returncode == 1
    assert "13,911" in result.stdout
