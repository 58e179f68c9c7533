"""Faults on purpose, in files and processes of the core; the long form writes `faults.csv`."""

import errno
import gzip
import io
import itertools
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import time
import tracemalloc
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from core_helpers import made_up_mnist, packed, same, seal, state_in, stop_after, write_runs
from faults import note, short_and_long
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torchvision.datasets.mnist import read_image_file, read_label_file

import mnistlib.data
from mnistlib import (
    CheckpointError,
    Config,
    DatasetError,
    Digits,
    load_checkpoint,
    load_mnist,
    train,
)
from mnistlib.checkpoint import TRAILER, checkpoints, save_checkpoint
from mnistlib.runtime import stop_on_signal

NAME = re.compile(r"mnist_model_\d{8}_\d{6}_(acc\d+\.\d\d|accNA)\.pth")
CONFIG = Config(
    epochs=2, epoch_images=175, batch_size=25, max_lr=0.02, degrees=5, ema_decay=0.9, seed=3,
    device="cpu", threads=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a finished run with everything in its checkpoint that one can hold."""
    return train(CONFIG, tiny_digits, folder=tmp_path_factory.mktemp("trained"), verbose=False)


@pytest.fixture
def content(trained):
    return load_checkpoint(trained.checkpoint)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


# Bits


def flips(raw: bytes, n: int, seed: int):
    """Give `n` copies of some bytes, in each of which another single bit is flipped."""
    for bit in random.Random(seed).sample(range(8 * len(raw)), n):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def silent(load, whole, raws) -> int:
    """Count the bytes that load without an error to something else than `whole`."""
    wrong = 0
    for raw in raws:
        try:
            found = load(raw)
        except Exception:  # of any kind: a reader that fails is not silent
            continue
        wrong += not same(whole, found)
    return wrong


@short_and_long(20, 1000)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "the hash missing"])
def test_no_flipped_bit_of_a_checkpoint_is_read_silently(trained, tmp_path, cut, n, request):
    path = tmp_path / "flipped.pth"
    raw, whole = trained.checkpoint.read_bytes(), load_checkpoint(trained.checkpoint)

    def load(flipped):
        path.write_bytes(flipped)
        return load_checkpoint(path)

    wrong = silent(load, whole, flips(raw[:-TRAILER] if cut else raw, n, seed=0))
    what = "mnistlib, hash missing" if cut else "mnistlib"
    note(request, "bit flips of a checkpoint", what, n, wrong)
    assert wrong == 0


@short_and_long(20, 1000)
def test_torch_and_safetensors_alone_read_flipped_bits(trained, n, request):
    """The same flips where nothing checks: the test above would notice if none did harm."""
    content = load_checkpoint(trained.checkpoint)
    buffer = io.BytesIO()
    torch.save(content, buffer)

    def load(raw):
        return torch.load(io.BytesIO(raw), weights_only=True)

    wrong = silent(load, content, flips(buffer.getvalue(), n, seed=0))
    note(request, "bit flips of a checkpoint", "torch alone", n, wrong)
    assert wrong > n // 2
    weights = {k: v.contiguous() for k, v in content["model_state_dict"].items()}
    wrong = silent(load_safetensors, weights, flips(save_safetensors(weights), n, seed=0))
    note(request, "bit flips of a checkpoint", "safetensors", n, wrong)
    assert wrong > n // 2


# Corruption that has a name, some of it with a checksum that fits


class Evil:
    """Pickles into a call that creates a file."""

    def __init__(self, call, *arguments) -> None:
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def forgeries(content, marker: Path):
    """Give name and bytes of what is no checkpoint of ours, with a checksum that fits."""
    for number in (0, 1, 3, -1, "2", None, 1.5):
        yield f"format {number!r}", packed(content | {"format": number})
    yield "no format", packed({k: v for k, v in content.items() if k != "format"})
    for name, other in {"a list": [content], "a tensor": torch.zeros(3), "nothing": None}.items():
        yield f"{name} in place of all", packed(other)
    for name, call in {
        "touch": Evil(Path.touch, marker),
        "system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "open": Evil(open, str(marker), "w"),
        "spawn": Evil(subprocess.call, ["touch", str(marker)]),
    }.items():
        for key in ("history", "model_state_dict", "training", "versions"):
            yield f"malicious {name}, in {key}", packed(content | {key: [call]})
        yield f"malicious {name}, instead of all", packed(call)
        yield f"malicious {name}, a bare pickle", seal(pickle.dumps(call, protocol=2) + b"\0\0")


def damages(raw: bytes):
    """Give name and bytes of a checkpoint that something has happened to."""
    n, g = len(raw), random.Random(0)
    for part in range(20):
        yield f"cut after {part} twentieths", raw[: n * part // 20]
    for k in (1, 2, TRAILER - 1, TRAILER, TRAILER + 1):
        yield f"{k} bytes short", raw[:-k]
    for k in range(10):
        start = n * k // 10
        yield f"a block of zeros at {k} tenths", raw[:start] + bytes(512) + raw[start + 512 :]
        yield f"another block at {k} tenths", raw[:start] + g.randbytes(512) + raw[start + 512 :]
        yield f"a block lost at {k} tenths", raw[:start] + raw[start + 512 :]
        yield f"a block twice at {k} tenths", raw[: start + 512] + raw[start:]
    yield from {
        "halves swapped": raw[n // 2 :] + raw[: n // 2], "twice": raw + raw,
        "a byte before": b"\0" + raw, "a byte behind": raw + b"\0",
        "read as text": raw.decode("latin-1").encode("utf-8"),
        "another checksum": raw[:-64] + b"0" * 64,
        "a checksum in capitals": raw[:-64] + raw[-64:].upper(),
        "a file of nothing": b"", "text": b"not a checkpoint\n" * 99, "zeros": bytes(n),
        "zip of nothing": b"PK\5\6" + bytes(18), "nothing, sealed": seal(b"\0\0"),
    }.items()  # fmt: skip


@short_and_long(0, 1)
def test_named_corruptions_are_refused_with_one_error_and_no_code_is_run(
    trained, content, tmp_path, n, request
):
    path, marker = tmp_path / "damaged.pth", tmp_path / "marker"
    cases = [*damages(trained.checkpoint.read_bytes()), *forgeries(content, marker)]
    bad = cases if n else cases[::4]
    for name, changed in bad:
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_checkpoint(path)
        assert not marker.exists(), name
    note(request, "named corruptions of a checkpoint", "mnistlib", len(bad), 0)
    pickle.loads(pickle.dumps(Evil(Path.touch, marker)))
    assert marker.exists()  # they are as evil as they should be


# Every file-system call of a save in turn


class Killed(BaseException):
    """Ends a save as a kill would: no `except Exception` or `except OSError` sees it."""


@short_and_long(0, 1)
@pytest.mark.parametrize("what", ["an error", "a kill"])
def test_a_save_that_fails_anywhere_leaves_the_earlier_checkpoint(
    content, folder, monkeypatch, what, n, request
):
    error = OSError(errno.ENOSPC, "No space left") if what == "an error" else Killed()
    expected = CheckpointError if what == "an error" else Killed
    earlier = save_checkpoint(content | {"val_accuracy": 1.0}, folder)
    raw, calls, failed = earlier.read_bytes(), [], True
    for number in itertools.count(1):  # of the call that fails

        def watched(name, real, number=number):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) == number:
                    raise error
                return real(*args, **kwargs)

            return call

        calls.clear()
        with monkeypatch.context() as m, suppress(expected):
            m.setattr(Path, "open", watched("create", Path.open))
            for name in ("open", "fsync", "replace"):
                m.setattr(os, name, watched(name, getattr(os, name)))
            save_checkpoint(content | {"val_accuracy": 2.0}, folder)
            failed = False  # there was no call left to fail
        assert earlier.read_bytes() == raw
        for path in folder.iterdir():  # whole checkpoints, and no temporary file
            assert NAME.fullmatch(path.name)
            load_checkpoint(path)
        if not failed:
            break
    note(request, f"{what} at a file-system call of a save", "mnistlib", len(calls), 0)
    assert {"create", "open", "fsync", "replace"} == set(calls)


# Kills


def save_on(save, content, started) -> None:
    for i in itertools.count():
        save(content | {"val_accuracy": float(i % 5)})
        started.set()


@short_and_long(4, 200)
def test_after_a_kill_while_saving_every_checkpoint_loads(content, tmp_path, n, request):
    folder, place = tmp_path / "run", tmp_path / "latest.pth"
    processes, g = multiprocessing.get_context("fork"), random.Random(0)

    def lost_of_ours() -> bool:
        files = list(folder.glob("mnist_model_*.pth"))
        whole = len(checkpoints(folder))
        for file in files[:-2]:
            file.unlink()
        return whole != len(files) or not files

    def lost_in_place() -> bool:
        try:
            torch.load(place, weights_only=True)
        except Exception:  # torch has an error of its own for each way to fail
            return True
        return False

    for what, save, is_lost in (
        ("mnistlib", lambda changed: save_checkpoint(changed, folder), lost_of_ours),
        ("torch.save in place", lambda changed: torch.save(changed, place), lost_in_place),
    ):
        lost = 0
        for _ in range(n):
            started = processes.Event()
            child = processes.Process(target=save_on, args=(save, content, started))
            child.start()
            assert started.wait(60)
            time.sleep(g.uniform(0, 0.02))
            child.kill()
            child.join()
            lost += is_lost()
        note(request, "kills while saving", what, n, lost)
        # in place some are lost, so the kills do come while something is written
        assert (lost > 0) == (what != "mnistlib")


KINDS = [{}, {"optimizer": "sgd", "max_lr": 0.01}, {"optimizer": "muon", "max_lr": 0.01},
         {"focus": 0.5}, {"optimizer": "adam", "dropout": 0.3, "elastic": 0.5}]  # fmt: skip


def train_until(step: int, config: Config, digits: Path, resume: Path | None, folder: Path) -> None:
    """Train in this process, which gets a SIGTERM after a step; 0: none."""
    torch.set_num_threads(1)
    stop_after(pytest.MonkeyPatch(), step, lambda: signal.raise_signal(signal.SIGTERM))
    loaded = Digits(**torch.load(digits))
    with stop_on_signal(signal.SIGTERM):
        run = train(config, loaded, resume, folder=folder, verbose=False)
    assert run.interrupted == (0 < step < 14)


@short_and_long(1, len(KINDS))
def test_a_run_goes_on_from_every_step_to_the_same_bits_in_a_fresh_process(
    tiny_digits, tmp_path, monkeypatch, n, request
):
    """One of the 14 steps, in a forked process; the long form takes all in fresh interpreters.

    That every step can be resumed from within one process, `test_state.py` shows.
    """
    # children of the server are fresh interpreters that have imported this file and done no more
    processes = multiprocessing.get_context("fork" if n == 1 else "forkserver")
    here = Path(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here.parent, here.parents[1]))))
    processes.set_forkserver_preload([here.stem])
    torch.save(vars(tiny_digits) | {"folder": None}, tmp_path / "digits.pt")

    def fresh(*arguments) -> None:
        child = processes.Process(target=train_until, args=arguments)
        child.start()
        child.join()
        assert child.exitcode == 0

    def end(folder):
        (path,) = folder.glob("*.pth")
        return state_in(path)

    equal = []
    for k, kind in enumerate(KINDS[:n]):
        about = (replace(CONFIG, **kind), tmp_path / "digits.pt")
        fresh(0, *about, None, tmp_path / f"whole-{k}")
        for stop in [7] if n == 1 else range(1, 15):
            folder = tmp_path / f"{k}-{stop}"
            fresh(stop, *about, None, folder)
            if stop < 14:
                fresh(0, *about, folder, folder)
            equal.append(same(end(folder), end(tmp_path / f"whole-{k}")))
    note(request, "resumed from a step in a fresh process", "mnistlib", len(equal), equal.count(0))
    assert all(equal)


def test_two_processes_that_save_into_one_folder_lose_nothing(tiny_digits, folder):
    processes = multiprocessing.get_context("fork")
    other = processes.Process(target=write_runs, args=(tiny_digits, folder, range(10, 12)))
    other.start()
    write_runs(tiny_digits, folder, range(2))
    other.join()
    assert other.exitcode == 0
    found = [(content["config"]["seed"], step) for step, _, content in checkpoints(folder)]
    assert sorted(found) == [(seed, 6) for seed in (0, 1, 10, 11)]


def test_a_disk_without_room_leaves_the_earlier_checkpoint(content, folder):
    """A real limit of the system on the size of files, reached in the middle of a save."""
    earlier = save_checkpoint(content, folder)
    raw, limits = earlier.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(raw) // 2, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="nothing could be saved in"):
            save_checkpoint(content, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.read_bytes() for p in folder.iterdir()] == [raw]


# Digits


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return a folder of made-up digits that pass for the real ones, and the bytes of each file."""
    raws = made_up_mnist(monkeypatch)
    for name, raw in raws.items():
        (tmp_path / name).write_bytes(raw)
    return tmp_path, raws


@short_and_long(20, 400)
def test_no_flipped_bit_of_the_digits_is_read_silently(made, n, request):
    """On made-up digits, since it is the checksum that notices; torchvision has none for these."""
    folder, raws = made
    wrong = {"mnistlib": 0, "torchvision": 0}
    for name, theirs in (
        ("t10k-images-idx3-ubyte", read_image_file), ("t10k-labels-idx1-ubyte", read_label_file),
    ):  # fmt: skip
        path, header = folder / name, 4 + 4 * raws[name][3]
        for what, read in zip(wrong, (lambda _: vars(load_mnist(folder)), theirs), strict=True):

            def load(raw, path=path, read=read):
                path.write_bytes(raw)
                return read(str(path))

            whole = load(raws[name])
            flipped = (raws[name][:header] + f for f in flips(raws[name][header:], n // 2, seed=1))
            wrong[what] += silent(load, whole, flipped)
        path.write_bytes(raws[name])
    for what, bad in wrong.items():
        note(request, "bit flips of images and labels", what, n, bad)
    assert wrong == {"mnistlib": 0, "torchvision": n}


def fuzzed(g: random.Random) -> tuple[bytes, bool]:
    """Return the bytes of an idx file, random but for its start, and whether they are zipped."""
    raw = bytes([0, 0, g.choice([8, 9, 13]), g.randrange(5)]) + g.randbytes(g.randrange(60))
    if zipped := g.random() < 0.5:  # up to three bytes differ, or the end is missing
        archive = bytearray(gzip.compress(raw, mtime=0))
        for _ in range(g.randrange(4)):
            archive[g.randrange(len(archive))] = g.randrange(256)
        raw = bytes(archive[: g.randint(0, len(archive))])
    return raw, zipped


@short_and_long(60, 10_000)
def test_fuzzed_idx_files_raise_their_one_error_and_take_no_memory(made, n, request, monkeypatch):
    """The first is an archive that unpacks to a hundred times what is wanted."""
    folder, limit, g = made[0], 100_000, random.Random(0)
    monkeypatch.setattr(mnistlib.data, "LARGEST", limit)
    path = folder / "t10k-labels-idx1-ubyte"
    path.unlink()
    bad = []
    for i in range(n):
        raw, zipped = fuzzed(g) if i else (gzip.compress(bytes(100 * limit)), True)
        place = path.with_suffix(".gz") if zipped else path
        place.write_bytes(raw)
        tracemalloc.start()
        with pytest.raises(DatasetError, match=path.name):
            load_mnist(folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        bad += [raw] * (peak > 10 * limit)
        place.unlink()
    note(request, "fuzzed idx files", "mnistlib", n, len(bad))
    assert bad == []
