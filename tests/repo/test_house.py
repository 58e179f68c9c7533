"""What an import costs, and what works without the extras; `make lint` holds the one contract."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import importlib, os, pkgutil, signal, sys
from importlib.machinery import PathFinder

class WithoutExtras(PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] in sys.argv else super().find_spec(name, *where)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutExtras
import numpy, torch

def process():
    random_states = torch.get_rng_state().tolist(), str(numpy.random.get_state())
    return random_states, torch.get_num_threads(), {**os.environ}, signal.getsignal(signal.SIGINT)

before = process()
import mnistlib
from mniststudy.cli import main  # and what it imports before a command is known
assert process() == before
from mniststudy.runs import ledger
ledger.finished(ledger.outputs_folder() / "results")  # read before a training is measured
print({"pandas", "scipy", "matplotlib", "torchvision", "seaborn", "papermill"} & set(sys.modules))
import mniststudy
for package in (mnistlib, mniststudy):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        needing = (".__main__", ".notebooks", ".latency", ".formats", ".export", ".card")
        if not module.name.endswith(needing):
            importlib.import_module(module.name)
print({name for name in sys.argv if name in sys.modules})
main(["export"])
main(["train", "--help"])
"""


def test_importing_it_is_cheap_and_all_but_notebooks_and_export_works_without_the_extras():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = settings["optional-dependencies"]
    lines = [line for extra in extras.keys() - {"test"} for line in extras[extra]]
    names = [line.split(">")[0].replace("-", "_") for line in lines]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, timeout=100
    )
    heavy, loaded, *help_text = done.stdout.split("\n", 2)
    assert done.returncode == 0, done.stderr
    assert (heavy, loaded) == ("set()", "set()")
    assert "--recipe" in help_text[0]
    assert "error: No module named 'onnx'; pip install 'mnistlib[" in done.stderr
