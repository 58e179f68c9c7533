"""Every command that a document or a notebook names does its job, from the clone and elsewhere.

The commands are collected from the texts, so a new one is tried, too. Those that train are given
shorter settings, and what they write goes to a folder of the test. They run in this process, on the
tiny digits, which pass for MNIST; in `make stress` those that execute notebooks run as they are.
"""

import hashlib
import re
import shlex
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mnistlib.data
from mnistlib import RECIPES, augment
from mniststudy.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "outputs" / "README.md"]
TEXTS += [*sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]
WHOLE = "\n".join(path.read_text(encoding="utf-8").replace('\\"', '"') for path in TEXTS)
START = r"(?:`|^)(?:\.venv/bin/)?((?:mnist|python -m mniststudy|papermill) [^`\n]+)"
FOUND = re.findall(START, WHOLE, re.M)
COMMANDS = sorted({line.replace("python -m mniststudy", "mnist") for line in FOUND})
SHORT = "--batch-size 50 --epoch-images 100 --epochs 1 --device cpu"
# what a sentence leaves out, and what makes a command short or has it write elsewhere
OMITTED = {
    "mnist teach": "TEACHERS", "mnist train --resume": "CHECKPOINT", "mnist predict": "photo.png",
}  # fmt: skip
SHORTER = {
    "train": SHORT, "sweep": f"{SHORT} --seeds 0:2", "teach": "--views 1", "report": "--check",
    "export": "--folder NEW/export", "audit": "--ledger LEDGER", "notebooks": "--folder NEW",
}  # fmt: skip
LEFT_OUT = {
    "mnist notebooks 03 --in-place": "changes committed files",
    "mnist notebooks --in-place": "changes committed files",
}
REFUSED = {"mnist notebooks 03 -p max_lrr 0.05": "no notebook has a parameter 'max_lrr'"}
LONG = [line for line in COMMANDS if "notebooks" in line and line not in LEFT_OUT | REFUSED]


def idx(values: torch.Tensor) -> bytes:
    """Return values as an idx file, whose type is 8 for bytes and 12 for whole numbers."""
    array = values.numpy().astype(">i4" if values.dtype == torch.int32 else np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8 if array.itemsize == 1 else 12, array.ndim]) + sizes + array.tobytes()


@pytest.fixture(scope="module")
def desk(tiny_digits, tmp_path_factory):
    """Return a folder with all that the commands name; the tiny digits are MNIST in it."""
    folder = tmp_path_factory.mktemp("desk")
    digits, writers = tiny_digits, torch.full((600, 8), -1, dtype=torch.int32)
    writers[:, 0] = digits.train_labels
    writers[:, 1], writers[:, 2] = 4 * (torch.arange(600) % 2), torch.arange(600) // 6
    tensors = digits.train_images[:, 0], digits.train_labels, digits.test_images[:, 0]
    files = dict(zip(mnistlib.data.FILES, map(idx, (*tensors, digits.test_labels)), strict=True))
    tables = {part: f"qmnist-{part}-labels-idx2-int" for part in ("train", "test")}
    files |= dict.fromkeys(tables.values(), idx(writers))
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in files.items()}
    picture = Image.fromarray(255 - digits.test_images[3, 0].numpy())
    (folder / "scans").mkdir()
    for path in (folder / "photo.png", folder / "scans" / "a.png", folder / "scans" / "b.png"):
        picture.resize((200, 200)).save(path)
    calls = []

    def stopping(images, **amounts):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return augment(images, **amounts)

    with pytest.MonkeyPatch.context() as m:
        writers = {part: hashes.pop(name) for part, name in tables.items()}
        m.setattr(mnistlib.data, "WRITERS_SHA256", writers)
        m.setattr(mnistlib.data, "FILES", hashes)
        few = partial(mnistlib.data.split_by_writer, per_partition=50)
        m.setattr(mnistlib.data, "split_by_writer", few)
        m.setattr("mniststudy.runs.sweep._digits", mnistlib.load_mnist)  # which is cached
        m.setenv("MNISTLIB_DATA", str(folder))
        m.setenv("MNISTLIB_POOLS", str(folder / "pools"))
        where = f"--folder {folder / 'stopped'} --ledger {folder / 'ledger'}"
        assert main(f"train {SHORT} --ledger {folder / 'ledger'} --folder {folder}".split()) == 0
        with m.context() as stops:
            stops.setattr(sys.modules["mnistlib.train"], "augment", stopping)
            assert main(f"train {SHORT} --epochs 2 {where}".split()) == 130
        assert main(words("mnist teach", folder, folder)[1:]) == 0
        (pool,) = (folder / "pools").iterdir()
        pool.rename(folder / "pools" / RECIPES["best"].pool)
        yield folder


PLACES = ["the clone", "elsewhere"]


@pytest.fixture
def place(request, tmp_path, monkeypatch):
    """Stand in the clone or in an empty folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(ROOT if request.param == "the clone" else folder)
    yield folder
    assert not list(folder.iterdir())


def words(line: str, new: Path, desk: Path) -> list[str]:
    """Return the words of a command in the short form that is executed."""
    line = f"{line} {OMITTED.get(line, '')}"
    if "--resume" not in line:
        line += f" {SHORTER.get(line.split()[1], '')}"
    if "sweep" in line and "--stacked" not in line:
        line += " --workers 1"
    for name, meant in {
        "outputs/results": new, "outputs/checkpoints/NAME": new, "outputs/03": new / "03",
        " notebooks/": f" {ROOT}/notebooks/", "photo.png": desk / "photo.png",
        "scan.png": desk / "photo.png", " scans/": f" {desk}/scans/",
        "CHECKPOINT_OR_FOLDER": desk / "stopped", "LEDGER": desk / "ledger", "NEW": new,
        "CHECKPOINT": next(desk.glob("stopped/*.pth"), ""), "NAME": "best",
        "TEACHERS": "outputs/checkpoints/teacher/seeds/*0.pth",
    }.items():  # fmt: skip
        line = line.replace(name, str(meant))
    found = [sorted(ROOT.glob(word)) if "*" in word else [word] for word in shlex.split(line)]
    return [str(word) for several in found for word in several]


def committed() -> dict[Path, int]:
    """Return when each file was changed that a command could change by mistake."""
    paths = [
        ROOT / "README.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("notebooks/*"),
        *ROOT.glob("outputs/[!r]*/**/*"),
    ]
    paths += ROOT.glob("outputs/results/*")
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def cases():
    """Give each short command from both places; two slow ones are left to `make stress` in one."""
    for line in COMMANDS:
        for place in PLACES if line not in [*LONG, *LEFT_OUT] else ():
            slow = line in ("mnist export", "mnist report") and place == "the clone"
            yield pytest.param(line, place, marks=[pytest.mark.stress] * slow)


@pytest.mark.parametrize(("line", "place"), list(cases()), indirect=["place"])
def test_a_command_does_its_job_and_changes_nothing_committed(line, place, desk, tmp_path, capsys):
    before = committed()
    try:
        code = main(words(line, tmp_path / "new", desk)[1:])
    except SystemExit as end:  # --help
        code = end.code
    out, err = capsys.readouterr()
    assert (code, REFUSED.get(line, "") in err) == (int(line in REFUSED), True), err
    assert bool(out) == (line not in REFUSED)
    assert committed() == before


@pytest.mark.stress
@pytest.mark.parametrize("place", PLACES, indirect=True)
@pytest.mark.parametrize("line", LONG)
def test_a_command_that_executes_a_notebook_does_so(line, place, tmp_path):
    """In its own process, and on the digits that are there."""
    photo = Image.new("L", (200, 200), 255)
    photo.paste(0, (92, 40, 108, 160))
    photo.save(tmp_path / "photo.png")
    shorter = " -p settings 'epochs=1 epoch_images=1000'" if " 03" in line or "/03" in line else ""
    program, *rest = words(line + shorter, tmp_path / "new", tmp_path)
    module = {"mnist": "mniststudy"}.get(program, program)
    before = committed()
    (tmp_path / "new").mkdir()
    subprocess.run([sys.executable, "-m", module, *rest], check=True)
    assert list((tmp_path / "new").glob("*.ipynb"))
    assert committed() == before


def test_every_target_of_make_that_a_document_names_is_there():
    targets = {*re.findall(r"(?:`|^)make ([a-z]+)", WHOLE, re.MULTILINE)}
    assert len(targets) > 10
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_commands_are_found_and_those_that_are_left_out_are_among_them():
    assert {line.split()[1] for line in COMMANDS if "papermill" not in line} == set(SHORTER) | {
        "evaluate", "predict"
    }  # fmt: skip
    assert {*LEFT_OUT, *REFUSED, *OMITTED} < {*COMMANDS}
