"""The wheel: what it holds, and that it works without the repository that it was built from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image

from mnistlib import load_mnist, released_checkpoint
from mniststudy.use.calibrate import load_calibration

ROOT = Path(__file__).resolve().parents[2]
RELEASED = "best", "careful"
SCRIPT = """
import mnistlib
from mniststudy.cli import main
from mniststudy.use.calibrate import load_calibration
print(load_calibration(mnistlib.released_checkpoint("careful")))
print(mnistlib.__file__, main(["predict", "digit.png"]))
quick = ["--epochs", "1", "--epoch-images", "256", "--threads", "1", "--device", "cpu"]
print(main(["train", "--data", "sample", *quick]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, because building leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for part in ("mnistlib", "mniststudy", *(f"outputs/checkpoints/{name}" for name in RELEASED)):
        shutil.copytree(ROOT / part, folder / "copy" / part)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "copy")
    options = ["-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    build = [sys.executable, "-m", "pip", "wheel", *options, folder / "copy"]
    subprocess.run(build, check=True, timeout=100)
    (built,) = folder.glob("*.whl")
    return ZipFile(built)


def test_it_holds_every_module_the_two_released_networks_and_no_other_data(wheel):
    modules = {
        str(path.relative_to(ROOT))
        for package in ("mnistlib", "mniststudy")
        for path in (ROOT / package).rglob("*.py")
    }
    released = {
        f"{name}/{path.name}"
        for name in RELEASED
        for path in (ROOT / "outputs/checkpoints" / name).glob("*.pth")
    }
    tables = {f"{name}/calibration.json" for name in RELEASED}
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files - modules == {
        "mnistlib/mnistlib.mplstyle", "mniststudy/use/model_card.md", "mniststudy/use/page.html",
        *(f"mnistlib/released/{name}" for name in tables | released),
    }  # fmt: skip
    assert modules <= files
    assert len(released) == 2
    (scripts,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert wheel.read(scripts).decode().split("\n")[:2] == [
        "[console_scripts]", "mnist = mniststudy.cli:main",
    ]  # fmt: skip


def test_installed_elsewhere_it_predicts_as_calibrated_and_trains_on_the_sample(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "elsewhere"
    wheel.extractall(site)
    here.mkdir()
    digits = load_mnist("sample")
    Image.fromarray(digits.train_images[0, 0].numpy()).save(here / "digit.png")
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MNISTLIB_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=here, env=settings | {"PYTHONPATH": str(site)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    said = done.stdout.splitlines()
    assert said[0] == str(load_calibration(released_checkpoint("careful"))), done.stderr
    assert said[1].startswith(f"digit.png: {int(digits.train_labels[0])} (")
    assert said[2] == f"{site / 'mnistlib' / '__init__.py'} 0"
    assert said[-1] == "0"
    (checkpoint,) = (here / "outputs" / "runs").rglob("*.pth")
    assert said[-2].endswith(str(checkpoint))
