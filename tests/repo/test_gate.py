"""How `make test` runs: notebooks on two workers, cells that time out, the tests left out."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[2]


def flags(name):
    """Return the options that the Makefile gives to pytest."""
    line = re.search(rf"^{name} +:= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    return line.split("pytest ")[-1].split()


@pytest.fixture
def project(tmp_path):
    """Return a folder with this repository's settings of pytest and no tests."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "notebooks").mkdir()
    return tmp_path


def write(project, name, *cells):
    """Write a notebook whose cells are run, but not compared."""
    tags = {"tags": ["nbval-ignore-output"]}
    code = [new_code_cell(c, execution_count=i, metadata=tags) for i, c in enumerate(cells, 1)]
    nbformat.write(new_notebook(cells=code), project / "notebooks" / f"{name}.ipynb")


def run_pytest(project, *options):
    """Run pytest there as make does; return its exit status and what it said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "MNISTLIB_RUNS"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=200,
        env=kept,
    )
    return done.returncode, done.stdout


def test_the_cells_of_a_notebook_run_in_order_in_one_kernel_with_a_folder_of_its_own(project):
    use = """
import os
with open("../seen", "a") as file:
    file.write(f"{name} {i} {os.getpid()} {os.getppid()} {os.environ['MNISTLIB_RUNS']}\\n")
i += 1
"""
    for name in "abc":
        write(project, name, f"name, i = {name!r}, 0", use, use, use)
    unit = "import os\n\ndef test_it():\n    assert 'MNISTLIB_RUNS' not in os.environ\n"
    (project / "test_unit.py").write_text(unit)
    status, said = run_pytest(
        project, *flags("PYTEST"), *flags("NBVAL"), "notebooks", "test_unit.py"
    )
    assert status == 0, said
    seen = [line.split() for line in (project / "seen").read_text().splitlines()]
    for name in "abc":
        _, order, kernels, _, folders = zip(*(s for s in seen if s[0] == name), strict=True)
        assert order == ("0", "1", "2")
        assert len(set(kernels)) == 1
        assert set(folders) == {str(project / "outputs" / "runs" / "nbval" / name)}
    assert len({s[2] for s in seen}) == 3
    assert len({s[3] for s in seen}) == 2


def test_a_cell_that_times_out_fails_whatever_it_does_with_the_interrupt(project):
    caught = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    pass"
    write(project, "caught", "x = 1", caught, "x = 2")
    write(project, "last", "x = 1", caught)
    options = (*flags("PYTEST"), *flags("NBVAL"), "--nbval-cell-timeout=1", "-rA", "notebooks")
    status, said = run_pytest(project, *options)
    assert status == 1, said
    verdicts = dict(re.findall(r"^\w+ notebooks/(.+)\.ipynb::Cell (\d)", said, re.MULTILINE))
    assert verdicts.keys() == {"caught", "last"}
    bad = set(re.findall(r"^FAILED notebooks/(.+?) - ", said, re.MULTILINE))
    wanted = {"caught": (1, 2), "last": (1,)}
    assert bad == {f"{name}.ipynb::Cell {i}" for name, cells in wanted.items() for i in cells}


def test_the_long_tests_and_those_in_a_browser_run_only_when_they_are_asked_for(project):
    marks = ("stress", "browser")
    marked = [f"@pytest.mark.{mark}\ndef test_{mark}(): pass\n" for mark in marks]
    text = "\n".join(["import pytest\n", *marked, "def test_short(): pass\n"])
    (project / "test_unit.py").write_text(text)
    quick = ("-p", "no:nbval")  # which takes two seconds to import
    assert "1 passed, 2 deselected" in run_pytest(project, *quick, "test_unit.py")[1]
    for mark in marks:
        status, said = run_pytest(project, *quick, "-m", mark, "test_unit.py", "-rA")
        assert status == 0
        assert re.findall(r"^PASSED (\S+)", said, re.MULTILINE) == [f"test_unit.py::test_{mark}"]
        assert f"-m {mark}" in (ROOT / "Makefile").read_text()
