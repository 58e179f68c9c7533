"""What tests of the core share: bitwise comparison, stops at a given step, forged files."""

import hashlib
import io
import itertools
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mnistlib.data
from mnistlib import Config, Digits, Run, augment, load_checkpoint, train
from mnistlib.checkpoint import MARK, TRAILER

LOOP = sys.modules["mnistlib.train"]  # the package's attribute of that name is the function
CPU = torch.device("cpu")
ctrl_c = partial(signal.raise_signal, signal.SIGINT)


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and a.flatten().view(torch.uint8).equal(b.flatten().view(torch.uint8))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def without_seconds(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def state_in(path: Path) -> dict[str, Any]:
    """Return the training state in a checkpoint, but for the seconds that it took."""
    state = load_checkpoint(path)["training"]
    rows = without_seconds(state["progress"]["history"])
    return state | {"progress": state["progress"] | {"seconds": 0.0, "history": rows}}


def within_step(monkeypatch, number: int, action: Callable[[], object]) -> None:
    """Have `action()` called in the middle of a step of the next run; steps count from 1."""
    steps = itertools.count(1)

    def watched(images, **amounts):
        if next(steps) == number:
            action()
        return augment(images, **amounts)

    monkeypatch.setattr(LOOP, "augment", watched)


def after_step(monkeypatch, action: Callable[..., object]) -> None:
    """Have `action(state, images, labels)` called after each step of the next runs."""
    step = LOOP.train_step

    def watched(state, slices, config, images, labels, *more):
        step(state, slices, config, images, labels, *more)
        action(state, images, labels)

    monkeypatch.setattr(LOOP, "train_step", watched)


def stop_after(monkeypatch, number: int, action: Callable[[], object] = ctrl_c) -> None:
    """Have `action()` called after a step of the next runs, by default what Ctrl-C does."""
    after_step(monkeypatch, lambda s, *_: action() if s.progress.step == number else None)


def write_runs(digits: Digits, folder: Path, seeds: range) -> None:
    """Train three short epochs with each seed, saving into one folder after each of them."""
    for seed in seeds:
        config = Config(
            epochs=3, epoch_images=50, batch_size=25, seed=seed, device="cpu", threads=1
        )  # fmt: skip
        train(config, digits, folder=folder, verbose=False)


def seal(archive: bytes) -> bytes:
    """Add a checksum that fits, as anyone who knows the format could."""
    body = archive[:-2] + TRAILER.to_bytes(2, "little")
    return body + MARK + hashlib.sha256(body).hexdigest().encode()


def packed(content: Any) -> bytes:
    """Return a checkpoint of any content whose checksum fits."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return seal(buffer.getvalue())


def idx(values: np.ndarray) -> bytes:
    """Write an array as an idx file: two zero bytes, type, dimensions, sizes, values."""
    kind, big = {1: (8, values.tobytes()), 4: (12, values.astype(">i4").tobytes())}[values.itemsize]
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + big


def made_up_mnist(monkeypatch) -> dict[str, bytes]:
    """Return the four files of a made-up MNIST, 60 and 100 images, that pass for the real ones."""
    rng, raws = np.random.default_rng(0), {}
    for part, n in (("train", 60), ("t10k", 100)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        raws |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in raws.items()}
    monkeypatch.setattr(mnistlib.data, "FILES", hashes)
    return raws
