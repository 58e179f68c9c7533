"""What the tests share: tiny digits made on the spot, folders of their own, quiet matplotlib."""

import signal

import matplotlib
import pytest
import torch

from mnistlib import Config, Digits

matplotlib.use("agg")  # not by MPLBACKEND: kernels that tests start would inherit that
# tests that run side by side with others are faster on one thread each than on shared two
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard():
    """Shells start background jobs with Ctrl-C ignored; the tests want a process that hears it."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.fixture(autouse=True)
def runs_folder(tmp_path, monkeypatch):
    """Every test writes its runs into a folder of its own."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("MNISTLIB_RUNS", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_digits() -> Digits:
    """600 training and 100 test images that a network learns in seconds: a bright bar per class."""
    g = torch.Generator().manual_seed(0)
    n = 700
    labels = (torch.arange(n) % 10).to(torch.uint8)
    images = torch.randint(0, 60, (n, 1, 28, 28), generator=g, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 4:24, 2 + 2 * label : 5 + 2 * label] = 220
    return Digits(images[:600], labels[:600], images[600:], labels[600:], "mnist")


@pytest.fixture
def tiny_config() -> Config:
    """Two epochs of four steps with everything switched on that has a state."""
    return Config(
        epochs=2, batch_size=125, max_lr=0.02, degrees=5, pixels=1, scale=0.05, shear=2,
        ema_decay=0.9, label_smoothing=0.05, seed=3, device="cpu", threads=1,
    )  # fmt: skip
