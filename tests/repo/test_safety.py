"""What must be in no file of the repository: code run out of a file, active outputs, paths."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
UNPICKLING = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
UNSAFE = {"eval", "exec", "yaml.load", "numpy.load", "pandas.read_pickle", "torch.jit.load"}
UNSAFE |= {"joblib.load", "joblib.dump"}


def tracked():
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def unsafe(source):
    """Return what in a piece of Python would unpickle or execute a file that others may write."""
    tree = ast.parse(source)
    modules, stands_for = set(), {"np": "numpy", "pd": "pandas"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {a.name for a in node.names}
            stands_for |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom):
            names = {a.asname or a.name: f"{node.module or ''}.{a.name}" for a in node.names}
            modules |= {node.module or "", *(a.name for a in node.names)}
            stands_for |= names
    found = {name for name in modules if name.split(".")[0] in UNPICKLING}
    verified = set()  # the uses of torch.load that take weights only
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if given.get("weights_only") == "True":
                verified.add(node.func)
        if isinstance(node, (ast.Attribute, ast.Name)):
            first, dot, rest = ast.unparse(node).partition(".")
            name = stands_for.get(first, first) + dot + rest
            if name in UNSAFE or (name == "torch.load" and node not in verified):
                found.add(name)
    return found


def code():
    for path in sorted((ROOT / "mnistlib").rglob("*.py")):
        yield pytest.param(path.read_text(encoding="utf-8"), id=str(path.relative_to(ROOT)))
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        yield pytest.param("\n".join(source), id=path.name)


CODE = list(code())


@pytest.mark.parametrize("source", CODE)
def test_nothing_is_unpickled_or_executed_from_a_file(source):
    assert not unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "from six.moves import shelve",
        "import joblib\njoblib.load(path)",
        "import joblib as j\nlist(map(j.load, paths))",
        "from joblib import dump as save\nsave(run, path)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import torch as t\nt.jit.load(path)",
        "import numpy as np\nnp.load(path)",
        "pd.read_pickle(path)",
        "exec(path.read_text())",
        "yaml.load(text)",
    ],
)
def test_what_would_unpickle_or_execute_a_file_is_noticed(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "from joblib import Parallel, delayed\nParallel(2)(delayed(train)(c) for c in configs)",
        "import torch\ntorch.load(path, map_location='cpu', weights_only=True)",
        "model.eval()",
        "json.load(file)",
    ],
)
def test_what_runs_no_file_is_allowed(source):
    assert not unsafe(source)


def test_no_committed_output_of_a_notebook_is_active():
    """Only text, plain tables, PNG and our own page: nothing else that a viewer would run."""
    page = '<iframe src="../outputs/checkpoints/best/draw.html" '
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                data = output.get("data", {})
                assert set(data) <= {"text/plain", "text/html", "image/png"}, path.name
                html = "".join(data.get("text/html", "")).replace(page, "")
                found = re.search(r"(?i)<script|<iframe|<object|javascript:|\son\w+=|src=", html)
                assert not found, f"{found and found[0]} in {path.name}"


def test_no_tracked_file_names_a_path_of_one_machine():
    folders = "|".join(("work", "root", "home", "Users"))
    pattern = re.compile(rf"(?<![\w.$}}])/({folders})/[\w.]+")
    for path in tracked():
        if path.suffix not in {".png", ".pth"}:
            found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
            assert not found, f"{found[0]} in {path.name}"


def test_the_working_tree_stays_under_sixteen_megabytes():
    # of which about 4 are the ledger, 3 the notebooks and 3 the released networks and teachers
    assert sum(path.stat().st_size for path in tracked()) < 16_000_000
