"""How `make test` runs: notebooks apart from each other, wrong ones red, long tests left out."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytest_plugins = ["pytester"]
ROOT = Path(__file__).resolve().parents[2]
USES = "import os\nprint(os.environ['MNISTLIB_RUNS'])"
WAITS = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
UNIT = """
import os
import pytest

def test_it():
    assert 'MNISTLIB_RUNS' not in os.environ

@pytest.mark.stress
def test_stress(): pass

@pytest.mark.browser
def test_browser(): pass
"""


@pytest.fixture
def project(pytester, monkeypatch):
    """Return a folder with this repository's settings of pytest and no tests."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, pytester.path)
    pytester.mkdir("notebooks")
    monkeypatch.delenv("MNISTLIB_RUNS")
    return pytester


def write(project, name, *cells):
    """Write a notebook of cells (source, what it printed)."""
    code = [
        new_code_cell(
            source, execution_count=i, outputs=[new_output("stream", text=said)] * bool(said)
        )
        for i, (source, said) in enumerate(cells, 1)
    ]
    nbformat.write(new_notebook(cells=code), project.path / "notebooks" / f"{name}.ipynb")


def outcomes(project, *options):
    """Run pytest there; return the tests and cells by outcome."""
    # hypothesis would be imported anew by each of these runs
    reports = project.inline_run("-p", "no:hypothesispytest", *options).getreports(
        "pytest_runtest_logreport"
    )
    found = {}
    for report in reports:
        if report.when == "call":
            found.setdefault(report.outcome, []).append(report.nodeid.split("/")[-1])
    return found


def test_a_wrong_number_or_a_cell_that_takes_too_long_is_red_and_each_notebook_has_its_folder(
    project,
):
    folders = project.path / "outputs" / "runs" / "nbval"
    write(project, "a", (USES, f"{folders / 'a'}\n"), ("print(13_912)", "13912\n"))
    write(project, "b", (USES, f"{folders / 'b'}\n"), ("print(13_911)", "13912\n"))
    write(project, "c", ("x = 1", ""), (WAITS, ""), ("x = 2", ""))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    flags = re.search(r"^NBVAL +:= (.+)$", makefile, re.MULTILINE)[1].split()
    found = outcomes(project, *flags, "--nbval-cell-timeout=2", "notebooks")
    assert found == {
        "passed": ["a.ipynb::Cell 0", "a.ipynb::Cell 1", "b.ipynb::Cell 0", "c.ipynb::Cell 0"],
        # the cell after it, too, and whatever the cell itself does with the interrupt
        "failed": ["b.ipynb::Cell 1", "c.ipynb::Cell 1", "c.ipynb::Cell 2"],
    }


def test_without_loadscope_notebooks_are_refused_and_not_failed_cell_by_cell(project):
    write(project, "a", ("x = 1", ""), ("x", ""))
    how = ("-n", "2", "-p", "no:hypothesispytest")
    for dist in ("load", "worksteal"):
        done = project.runpytest_inprocess(*how, "--dist", dist, "--nbval", "notebooks")
        assert done.ret == pytest.ExitCode.USAGE_ERROR
        said = f"ERROR: --nbval does not go with --dist {dist}; add --dist loadscope"
        done.stderr.fnmatch_lines([said])


def test_the_long_tests_and_those_in_a_browser_run_only_when_they_are_asked_for(project):
    project.makepyfile(test_unit=UNIT)
    assert outcomes(project) == {"passed": ["test_unit.py::test_it"]}
    for mark in ("stress", "browser"):
        assert outcomes(project, "-m", mark) == {"passed": [f"test_unit.py::test_{mark}"]}
        assert f"-m {mark}" in (ROOT / "Makefile").read_text(encoding="utf-8")
