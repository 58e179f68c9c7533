"""What notebook 09 compares runs by tells any bit; its figure shows any difference."""

import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

from mnistlib import Config, build, train
from mniststudy.figures import reproducibility
from mniststudy.figures.reproducibility import digest, overlay_resumed, train_in_new_process


def test_the_digest_tells_a_single_bit_of_any_tensor():
    torch.manual_seed(0)
    model = build("reference")
    first = digest(model)
    assert digest(model) == first
    for tensor in (model.conv6.weight, model.bn5.running_var, model.bn1.bias):
        bits = tensor.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert digest(model) != first
        bits[-1] ^= 1
    assert digest(model) == first


def test_a_process_that_fails_says_why():
    assert "no such digits" in train_in_new_process(Config(), "raise SystemExit('no such digits')")


def test_a_new_process_is_asked_for_the_same_training(tiny_digits, tiny_config, monkeypatch):
    """The script runs here, with digits of its own; only the process is not new."""
    told = {}

    def run(command, **more):
        script = command[-1].replace("load_mnist()", "digits").replace("print(", "told.append(")
        told["environment"] = more["env"]["PYTHONHASHSEED"]
        told["digests"] = []
        exec(script, {"digits": tiny_digits, "told": told["digests"]})
        return SimpleNamespace(stdout=told["digests"][0] + "\n", stderr="")

    monkeypatch.setattr(reproducibility.subprocess, "run", run)
    found = train_in_new_process(tiny_config, "import math", PYTHONHASHSEED="7")
    assert found == digest(train(tiny_config, tiny_digits, save=False, verbose=False).model)
    assert told["environment"] == "7"


def test_training_is_killed_once_so_many_epochs_are_saved(tmp_path, tiny_config, monkeypatch):
    """A program in its place saves four steps every so often and never ends."""
    program = """
import sys, time
from pathlib import Path
folder = Path(sys.argv[-1])
for epoch in range(1, 100):
    time.sleep(0.3)
    (folder / f"mnist_model_{epoch:03}.pth").write_text(str(4 * epoch))
    if epoch > 2:
        (folder / f"mnist_model_{epoch - 2:03}.pth").unlink()
"""
    commands = []

    class Popen(reproducibility.subprocess.Popen):
        def __init__(self, command, **more):
            commands.append(command)
            super().__init__([sys.executable, "-c", program, str(tmp_path)], **more)

    def load_checkpoint(path):
        return {"training": {"progress": {"step": int(path.read_text())}}}

    monkeypatch.setattr(reproducibility.subprocess, "Popen", Popen)
    monkeypatch.setattr(reproducibility, "load_checkpoint", load_checkpoint)
    assert reproducibility.train_and_kill(tiny_config, tmp_path, 3) in (12, 16)
    assert {"--seed=3", "--ema-decay=0.9", f"--folder={tmp_path}"} <= set(commands[0])


@pytest.mark.parametrize("off", [0.0, 0.01])
def test_the_overlay_shows_the_difference_of_the_losses(off):
    losses = [2.0, 1.0, 0.5, 0.25]
    whole = SimpleNamespace(curve={"loss": losses})
    resumed = SimpleNamespace(curve={"loss": [*losses[:3], losses[3] + off]})
    overlay_resumed(whole, resumed, 2, "A title", "a subtitle")
    top, bottom = plt.gcf().axes
    assert [line.get_ydata()[-1] for line in top.lines[:2]] == [0.25, 0.25 + off]
    difference = bottom.lines[1].get_ydata().tolist()
    assert difference == pytest.approx([0, 0, 0, off])
    assert (bottom.get_ylim() == (-1, 1)) is (off == 0)
    assert [line.get_xdata()[0] for line in (top.lines[2], bottom.lines[0])] == [2, 2]
    plt.close("all")
