"""Faults on purpose: short in `make test`, long and written down by `make stress`."""

import errno
import gzip
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from faults import STRESS, note, tries
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torchvision.datasets.mnist import read_image_file, read_label_file

from mnistlib import (
    CheckpointError,
    Config,
    DatasetError,
    load_checkpoint,
    read_results,
    save_checkpoint,
    sweep,
    train,
)
from mnistlib.checkpoint import KEYS, MARK, TRAILER, TRAINING, load_model
from mnistlib.data import FILES, check_hash, parse_idx, read_file
from mnistlib.headless import run_notebooks
from mnistlib.ledger import comparable, finished
from mnistlib.process import workers
from mnistlib.resume import checkpoints

NAME = re.compile(r"mnist_model_\d{8}_\d{6}_acc(\d+\.\d\d|NA)\.pth")
CONFIG = Config(
    epochs=2, epoch_images=175, batch_size=25, max_lr=0.02, degrees=5, ema_decay=0.9, seed=3,
    device="cpu", threads=1,
)  # fmt: skip


def same(a, b) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()
    return type(a) is type(b) and a == b


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a finished run with everything in its checkpoint that one can hold."""
    return train(CONFIG, tiny_digits, folder=tmp_path_factory.mktemp("trained"), verbose=False)


@pytest.fixture
def content(trained):
    return load_checkpoint(trained.checkpoint)


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


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "the hash missing"])
def test_no_flipped_bit_of_a_checkpoint_is_read_silently(trained, tmp_path, cut):
    n, path = tries(100, 1000), tmp_path / "flipped.pth"
    raw, whole = trained.checkpoint.read_bytes(), load_checkpoint(trained.checkpoint)

    def load(flipped):
        path.write_bytes(flipped)
        return load_checkpoint(path)

    wrong = silent(load, whole, flips(raw[:-TRAILER] if cut else raw, n, seed=0))
    note("bit flips of a checkpoint", "mnistlib, hash missing" if cut else "mnistlib", n, wrong)
    assert wrong == 0


def test_torch_and_safetensors_alone_read_flipped_bits(trained):
    """The same flips where nothing checks: the test above would notice if none did harm."""
    n, content = tries(100, 1000), load_checkpoint(trained.checkpoint)
    buffer = io.BytesIO()
    torch.save(content, buffer)

    def load(raw):
        return torch.load(io.BytesIO(raw), weights_only=True)

    wrong = silent(load, content, flips(buffer.getvalue(), n, seed=0))
    note("bit flips of a checkpoint", "torch alone", n, wrong)
    assert wrong > n // 2
    weights = {k: v.contiguous() for k, v in content["model_state_dict"].items()}
    wrong = silent(load_safetensors, weights, flips(save_safetensors(weights), n, seed=0))
    note("bit flips of a checkpoint", "safetensors", n, wrong)
    assert wrong > n // 2


# Corruption that has a name, most of it with a checksum that fits


class Evil:
    """Pickles into a call that creates a file."""

    def __init__(self, call, *arguments) -> None:
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def seal(archive: bytes) -> bytes:
    """Add a checksum that fits, as anyone who knows the format could."""
    body = archive[:-2] + TRAILER.to_bytes(2, "little")
    return body + MARK + hashlib.sha256(body).hexdigest().encode()


def packed(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return seal(buffer.getvalue())


def forgeries(content, marker: Path):
    """Give name and bytes of checkpoints with one thing wrong and a checksum that fits."""
    whole = {"format": 1} | content
    for key in KEYS:
        yield f"no {key}", packed({k: v for k, v in whole.items() if k != key})
        yield f"{key} is None", packed(whole | {key: None})
        yield f"{key} is a tensor", packed(whole | {key: torch.zeros(2)})
    for number in (0, 2, -1, "1", None, 1.5):
        yield f"format {number!r}", packed(whole | {"format": number})
    for key in sorted(TRAINING):
        parts = {k: v for k, v in content["training"].items() if k != key}
        yield f"no training {key}", packed(whole | {"training": parts})
    for key, tensor in content["model_state_dict"].items():
        changed = {"another shape": torch.zeros(3, 5), "no tensor": 1.0}
        if tensor.is_floating_point():
            changed["nan"] = torch.full_like(tensor, float("nan"))
        for how, value in changed.items():
            weights = content["model_state_dict"] | {key: value}
            yield f"{key}: {how}", packed(whole | {"model_state_dict": weights})
    for field, value in {
        "model": "vgg", "epochs": 0, "batch_size": 1, "max_lr": "high", "split": "mine",
        "optimizer": "lbfgs", "dropout": 2, "seed": -1, "momentum": 0.9, "model ": "reference",
    }.items():  # fmt: skip
        config = content["config"] | {field: value}
        yield f"config {field}={value!r}", packed(whole | {"config": config})
    for name, call in {
        "touch": Evil(Path.touch, marker),
        "system": Evil(os.system, f"touch {marker}"),
        "eval": Evil(eval, f"open({str(marker)!r}, 'w')"),
        "exec": Evil(exec, f"open({str(marker)!r}, 'w')"),
        "open": Evil(open, str(marker), "w"),
        "spawn": Evil(subprocess.call, ["touch", str(marker)]),
    }.items():
        yield f"malicious {name}, in history", packed(whole | {"history": [call]})
        yield f"malicious {name}, instead of all", packed(call)
        bare = pickle.dumps(call, protocol=2) + b"\0\0"
        yield f"malicious {name}, a bare pickle", seal(bare)


def damages(raw: bytes):
    """Give name and bytes of a checkpoint that something has happened to."""
    n = len(raw)
    for part in range(20):
        yield f"cut after {part} twentieths", raw[: n * part // 20]
    for k in (1, 2, TRAILER - 1, TRAILER, TRAILER + 1):
        yield f"{k} bytes short", raw[:-k]
    for k in range(10):
        start = n * k // 10
        yield f"a block of zeros at {k} tenths", raw[:start] + bytes(512) + raw[start + 512 :]
    half = n // 2
    yield "halves swapped", raw[half:] + raw[:half]
    yield "twice", raw + raw
    yield "a byte before", b"\0" + raw
    yield "a byte behind", raw + b"\0"
    yield "line ends of Windows", raw.replace(b"\n", b"\r\n")
    yield "read as text", raw.decode("latin-1").encode("utf-8")
    yield "another checksum", raw[:-64] + b"0" * 64
    for name, other in {
        "empty": b"", "text": b"not a checkpoint\n" * 99, "json": b'{"format": 1}',
        "html": b"<html>404</html>", "png": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "gzip": b"\x1f\x8b" + bytes(99), "zip of nothing": b"PK\5\6" + bytes(18),
        "numpy": b"\x93NUMPY" + bytes(99), "zeros": bytes(n),
    }.items():  # fmt: skip
        yield f"a file of {name}", other


def test_named_corruptions_are_refused_with_one_error_and_no_code_is_run(
    trained, content, tmp_path
):
    path, marker = tmp_path / "damaged.pth", tmp_path / "marker"
    raw = trained.checkpoint.read_bytes()
    names, harmful = set(), []
    for name, bad in itertools.chain(damages(raw), forgeries(content, marker)):
        names.add(name)
        assert bad != raw, name
        path.write_bytes(bad)
        for load in (load_checkpoint, load_model):
            try:
                load(path)
                harmful.append(name)
            except CheckpointError as error:
                if str(path) not in str(error):
                    harmful.append(name)
        if marker.exists():
            harmful.append(name)
    note("named corruptions of a checkpoint", "mnistlib", len(names), len(set(harmful)))
    assert len(names) >= 100
    assert harmful == []
    evil = Evil(Path.touch, marker)
    pickle.loads(pickle.dumps(evil))
    assert marker.exists()  # they are as evil as they should be


# Every file-system call of a save in turn


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


class Killed(BaseException):
    """Ends a save as a kill would: no `except Exception` or `except OSError` sees it."""


def watch_file_system(monkeypatch, act) -> None:
    """Have `act(name)` called before each file-system call of a save."""

    def watched(name, real):
        def call(*args, **kwargs):
            act(name)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(tempfile, "mkstemp", watched("mkstemp", tempfile.mkstemp))
    for name in ("open", "fdopen", "fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))


def outcome(content, folder) -> Path | BaseException:
    try:
        return save_checkpoint(content, folder)
    except (CheckpointError, Killed) as error:
        return error


def test_bytes_reach_the_disk_before_they_get_their_name(content, folder, monkeypatch):
    calls = []
    watch_file_system(monkeypatch, calls.append)
    save_checkpoint(content, folder)
    kept = [name for name in calls if name in ("mkstemp", "fsync", "replace")]
    assert kept == ["mkstemp", "fsync", "replace", "fsync"]  # the last one: the folder's entry


@pytest.mark.parametrize(
    ("what", "error", "expected"),
    [
        ("an error", OSError(errno.ENOSPC, "No space left"), CheckpointError),
        ("a kill", Killed(), Killed),
    ],
)
def test_a_save_that_fails_anywhere_leaves_the_earlier_checkpoint(
    content, folder, monkeypatch, what, error, expected
):
    earlier = save_checkpoint(content | {"accuracy": 1.0}, folder)
    raw = earlier.read_bytes()
    failed_at = []
    while True:
        left = list(range(len(failed_at) + 1))  # this many calls, the last of which fails

        def act(name, left=left):
            if left and left.pop() == 0:
                failed_at.append(name)
                raise error

        with monkeypatch.context() as m:
            watch_file_system(m, act)
            result = outcome(content | {"accuracy": 2.0}, folder)
        assert earlier.read_bytes() == raw
        for path in folder.iterdir():
            assert NAME.fullmatch(path.name), "a temporary file was left behind"
            load_checkpoint(path)
        if left:
            break  # there was no call left to fail
        assert type(result) is expected
        if expected is CheckpointError:
            assert str(folder) in str(result)
            assert "free space there or name another folder" in str(result)
    assert isinstance(result, Path)
    note(f"{what} at a file-system call of a save", "mnistlib", len(failed_at), 0)
    assert {"mkstemp", "open", "fdopen", "fsync", "replace"} == set(failed_at)


def test_a_disk_that_fills_up_in_the_middle_of_a_file_leaves_the_earlier_one(
    content, folder, monkeypatch
):
    earlier = save_checkpoint(content | {"accuracy": 1.0}, folder)
    raw, fdopen, written = earlier.read_bytes(), os.fdopen, []

    class Full(io.BufferedIOBase):
        def __init__(self, handle: int, mode: str) -> None:
            self.file = fdopen(handle, mode)

        def write(self, data: bytes) -> int:
            written.append(self.file.write(data[:1000]))
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()
            super().close()

    monkeypatch.setattr(os, "fdopen", Full)
    with pytest.raises(CheckpointError, match=r"No space left.*free space"):
        save_checkpoint(content | {"accuracy": 2.0}, folder)
    assert written == [1000]
    assert [p.read_bytes() for p in folder.iterdir()] == [raw]


# Kills


IN_PLACE = "in place"


def save_on(checkpoint, folder, how, started) -> None:
    """Save one checkpoint after the other until the process is killed."""
    content = load_checkpoint(checkpoint)
    for i in itertools.count():
        if how == IN_PLACE:
            torch.save(content, folder / "latest.pth")
        else:
            save_checkpoint(content | {"accuracy": float(i % 5)}, folder)
        if not started.is_set():
            started.set()


def kill_while_saving(checkpoint, folder, n: int, how: str) -> int:
    """Kill a process that saves, `n` times; return after how many no good checkpoint was there."""
    processes = multiprocessing.get_context("spawn" if sys.platform == "win32" else "fork")
    g, lost = random.Random(0), 0
    folder.mkdir()
    for _ in range(n):
        started = processes.Event()
        child = processes.Process(target=save_on, args=(checkpoint, folder, how, started))
        child.start()
        assert started.wait(60)
        time.sleep(g.uniform(0, 0.02))
        child.kill()
        child.join()
        if how == IN_PLACE:
            try:
                torch.load(folder / "latest.pth", weights_only=True)
            except Exception:  # torch has an error of its own for each way to fail
                lost += 1
        else:
            files = list(folder.glob("mnist_model_*.pth"))
            lost += len(checkpoints(folder)) != len(files) or not files
            for file in files[:-2]:
                file.unlink()
    return lost


def test_after_a_kill_while_saving_every_checkpoint_loads(trained, tmp_path):
    n = tries(10, 200)
    lost = kill_while_saving(trained.checkpoint, tmp_path / "run", n, "whole")
    note("kills while saving", "mnistlib", n, lost)
    assert lost == 0
    lost = kill_while_saving(trained.checkpoint, tmp_path / "place", n, IN_PLACE)
    note("kills while saving", "torch.save in place", n, lost)
    assert lost > 0  # so the kills do come while something is written


def test_a_run_goes_on_from_every_step_to_the_same_bits_in_a_fresh_process(
    trained, tiny_digits, tmp_path
):
    """Five of the 14 steps; the long form takes all, and other optimizers, focus and dropout.

    That every step can be resumed from within one process, `test_train.py` shows.
    """
    kinds = [{}, {"optimizer": "sgd", "max_lr": 0.01}, {"optimizer": "muon", "max_lr": 0.01},
             {"focus": 0.5}, {"optimizer": "adam", "dropout": 0.3, "elastic": 0.5}]  # fmt: skip
    torch.save(vars(tiny_digits) | {"folder": None}, tmp_path / "digits.pt")
    script = tmp_path / "resumes.py"
    script.write_text(RESUMES)
    points = wrong = 0
    stops = [1, 6, 7, 8, 13] if not STRESS else list(range(1, 15))
    for kind in kinds[: tries(1, len(kinds))]:
        done = subprocess.run(
            [sys.executable, script, tmp_path, json.dumps(kind), json.dumps(stops)],
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        equal = [line == "True" for line in done.stdout.split()]
        points, wrong = points + len(equal), wrong + equal.count(False)
        assert len(equal) == len(stops)
    note("resumed from a step in a fresh process", "mnistlib", points, wrong)
    assert wrong == 0


# The parent imports and does nothing else, so that each forked child is as a fresh interpreter
RESUMES = """
import json, multiprocessing, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import mnistlib.train
from mnistlib import Config, Digits, load_checkpoint, train

LOOP = sys.modules["mnistlib.train"]
folder, kind = Path(sys.argv[1]), json.loads(sys.argv[2])
config = replace(Config(epochs=2, epoch_images=175, batch_size=25, max_lr=0.02, degrees=5,
                        ema_decay=0.9, seed=3, device="cpu", threads=1), **kind)


def run(stop, resume, to):
    digits = Digits(**torch.load(folder / "digits.pt"))
    torch.set_num_threads(1)
    step = LOOP._step

    def watched(t, *batch):
        step(t, *batch)
        if t.step == stop:
            signal.raise_signal(signal.SIGTERM)

    LOOP._step = watched
    done = train(config, digits, resume, folder=to, verbose=False)
    assert done.interrupted == (0 < stop < 14)


def bits(to):
    (path,) = to.glob("*_acc*.pth") if len(list(to.glob("*.pth"))) == 1 else [None]
    content = load_checkpoint(path)
    state = content["training"] | {"seconds": 0, "history": 0}
    return json.dumps([str(v) if not isinstance(v, torch.Tensor) else v.float().tolist()
                       for v in flat([content["model_state_dict"], state])])


def flat(part):
    if isinstance(part, (dict, list)):
        for value in part.values() if isinstance(part, dict) else part:
            yield from flat(value)
    else:
        yield part


def fresh(*arguments):
    child = processes.Process(target=run, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0


processes = multiprocessing.get_context("fork" if sys.platform != "win32" else "spawn")
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # has torch import its compiler, once for all children
if __name__ == "__main__":
    name = f"{config.optimizer}-{config.focus}-{config.elastic}"
    fresh(0, None, folder / f"whole-{name}")
    for stop in json.loads(sys.argv[3]):
        to = folder / f"{stop}-{name}"
        fresh(stop, None, to)
        if stop < 14:
            fresh(0, to, to)
        print(bits(to) == bits(folder / f"whole-{name}"))
"""


WRITES = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from mnistlib import Config, Digits, train
digits = Digits(**torch.load(sys.argv[1]))
for seed in range(int(sys.argv[3]), int(sys.argv[3]) + 3):
    config = Config(epochs=3, epoch_images=50, batch_size=25, max_lr=0.01, seed=seed,
                    device="cpu", threads=1)
    train(config, digits, folder=Path(sys.argv[2]), verbose=False)
"""


def test_two_processes_that_save_into_one_folder_lose_nothing(tiny_digits, tmp_path):
    torch.save(vars(tiny_digits) | {"folder": None}, tmp_path / "digits.pt")
    command = [sys.executable, "-c", WRITES, tmp_path / "digits.pt", tmp_path / "run"]
    jobs = [subprocess.Popen([*command, first], text=True) for first in ("0", "10")]
    assert [job.wait(200) for job in jobs] == [0, 0]
    found = [
        (content["config"]["seed"], step) for step, _, content in checkpoints(tmp_path / "run")
    ]
    assert sorted(found) == [(seed, 6) for seed in (0, 1, 2, 10, 11, 12)]


def test_a_disk_without_room_leaves_the_earlier_checkpoint(trained, tmp_path):
    """A real limit of the system on the size of files, reached in the middle of a save."""
    folder, size = tmp_path / "run", trained.checkpoint.stat().st_size
    earlier = save_checkpoint(load_checkpoint(trained.checkpoint), folder)
    raw, limits = earlier.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    content = load_checkpoint(trained.checkpoint)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        with pytest.raises(
            CheckpointError, match=r"no checkpoint could be saved.*free space there"
        ):
            save_checkpoint(content, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.read_bytes() for p in folder.iterdir()] == [raw]


def test_a_folder_that_nobody_can_write_to_is_an_error(content):
    for place in ("/proc/mnistlib", "/dev/null/mnistlib"):
        with pytest.raises(CheckpointError, match=f"no checkpoint could be saved in {place}"):
            save_checkpoint(content, Path(place))


# Digits


def idx(values: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def test_no_flipped_bit_of_the_digits_is_read_silently(tmp_path, monkeypatch):
    """On made-up digits, since it is the checksum that notices; torchvision has none for these."""
    rng = np.random.default_rng(0)
    n, path = tries(40, 400), tmp_path / "flipped"
    made = {"t10k-images-idx3-ubyte": rng.integers(0, 256, (500, 28, 28), dtype=np.uint8),
            "t10k-labels-idx1-ubyte": rng.integers(0, 10, 500, dtype=np.uint8)}  # fmt: skip
    known = {k: (hashlib.sha256(idx(v)).hexdigest(), v.shape) for k, v in made.items()}
    monkeypatch.setattr("mnistlib.data.FILES", FILES | known)
    readers = {"t10k-images-idx3-ubyte": read_image_file, "t10k-labels-idx1-ubyte": read_label_file}
    ours = theirs = 0
    for name, values in made.items():
        header = len(idx(values)) - values.size
        whole = torch.from_numpy(values.astype(np.int64))

        def load(raw, name=name):
            path.write_bytes(raw)
            raw = read_file(path, limit=500 * 784 + 16)
            check_hash(raw, name, path)
            return torch.from_numpy(parse_idx(raw).astype(np.int64))

        def load_theirs(raw, name=name):
            path.write_bytes(raw)
            return readers[name](str(path)).long()

        raws = [idx(values)[:header] + f for f in flips(idx(values)[header:], n // 2, seed=1)]
        ours += silent(load, whole, raws)
        theirs += silent(load_theirs, whole, raws)
    note("bit flips of images and labels", "mnistlib", n, ours)
    note("bit flips of images and labels", "torchvision", n, theirs)
    assert (ours, theirs) == (0, n)


fuzzed = st.binary(max_size=60) | st.builds(
    lambda kind, dimensions, shape, body: (
        bytes([0, 0, kind, dimensions]) + b"".join(s.to_bytes(4, "big") for s in shape) + body
    ),
    st.sampled_from([8, 8, 8, 9, 13]),
    st.integers(0, 4),
    st.lists(st.sampled_from([0, 1, 2, 5, 28, 2**31, 2**32 - 1]), max_size=4)
    | st.tuples(st.integers(0, 2**32 - 1), st.just(28), st.just(28)),
    st.binary(max_size=6),
)


def test_fuzzed_idx_files_raise_their_one_error_and_take_no_memory(tmp_path):
    """Parsed without the checksum in front, which would refuse them all."""
    n, limit = tries(200, 10_000), 100_000
    seen, bad = [], []
    path = tmp_path / "fuzzed"

    @settings(max_examples=n, deadline=None, database=None, derandomize=True)
    @given(fuzzed)
    def parse(raw):
        path.write_bytes(raw)
        tracemalloc.start()
        try:
            parse_idx(read_file(path, limit))
        except DatasetError:
            pass
        except Exception as error:  # what the test looks for
            bad.append(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        seen.append(peak)

    parse()
    bad += [peak for peak in seen if peak > 2 * limit]
    note("fuzzed idx files", "mnistlib", len(seen), len(bad))
    assert len(seen) >= n
    assert bad == []


def test_an_archive_that_unpacks_to_ten_times_what_is_expected_takes_no_more_memory(tmp_path):
    bomb, limit = tmp_path / "bomb.gz", 20_000_000
    bomb.write_bytes(gzip.compress(bytes(10 * limit), compresslevel=1))
    tracemalloc.start()
    try:
        with pytest.raises(DatasetError):
            parse_idx(read_file(bomb, limit))
        assert tracemalloc.get_traced_memory()[1] < 2 * limit
    finally:
        tracemalloc.stop()


# Sweeps


def tiny(n: int) -> list[Config]:
    """Return `n` different runs of two short epochs on the sample."""
    base = replace(CONFIG, epoch_images=100, focus=0.5)
    return [replace(base, seed=i, dropout=0.1 * (i % 2), pixels=float(i % 3)) for i in range(n)]


def workers_of(pool) -> list[int]:
    if pool is None:
        return [p.pid for p in multiprocessing.active_children()]
    return list(pool._client.run(os.getpid).values())


@contextmanager
def kills(folder: Path, pool, after: list[int]):
    """Kill one worker when the ledger has so many rows, for each number; give the kills done."""
    done, over = [], threading.Event()

    def watch() -> None:
        for rows in after:
            while len(finished(folder / "runs.csv")) < rows:
                if over.wait(0.02):
                    return
            if pids := workers_of(pool):
                os.kill(random.Random(rows).choice(pids), signal.SIGKILL)
                done.append(rows)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@pytest.fixture
def dask():
    """Return an executor of Dask's over two worker processes of one thread."""
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client.get_executor()


def test_tables_are_equal_over_the_engines_though_workers_are_killed(tmp_path, dask):
    n = tries(6, 64)
    configs, after = tiny(n), [2, n // 2][: tries(1, 2)]
    for name, pool in {"processes": None, "dask": dask}.items():
        with kills(tmp_path / name, pool, after) as done:
            assert sweep(configs, tmp_path / name, data="sample", executor=pool) == (n, 0)
        assert done == after, f"{name}: too quick to be killed"
    with ThreadPoolExecutor(1) as one:  # the third engine, of which nothing is killed
        assert sweep(configs, tmp_path / "thread", data="sample", executor=one) == (n, 0)
    wrong = 0
    for name in ("processes", "dask"):
        seeds = sorted(read_results(folder=tmp_path / name)["seed"])
        equal = all(
            comparable(table, tmp_path / name).equals(comparable(table, tmp_path / "thread"))
            for table in ("runs", "history")
        )
        wrong += seeds != list(range(n)) or not equal
        note(f"a sweep of {n} runs with {len(after)} workers killed", name, n, wrong)
    assert wrong == 0


def test_runs_whose_workers_are_killed_each_time_are_given_up(tmp_path, capsys, monkeypatch):
    """As when there is not the memory for any of them."""
    monkeypatch.setattr(sys.modules["mnistlib.sweep"], "TRIES", 2)
    configs = tiny(3)
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.05):
            for pid in workers_of(None):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        assert sweep(configs, tmp_path, data="sample") == (0, 3)
    finally:
        over.set()
        thread.join()
    said = capsys.readouterr().err
    assert said.count("a worker was killed: 3 runs go on in new ones") == 1
    assert said.count("its worker was killed") == 3
    assert sweep(configs, tmp_path, data="sample") == (3, 0)


def test_notebooks_with_parameters_sweep_over_an_executor(tmp_path, runs_folder):
    notebook = tmp_path / "01_sum.ipynb"
    cells = [
        new_code_cell("seed = 0", metadata={"tags": ["parameters"]}),
        new_code_cell("seed + 1"),
    ]
    metadata = {"kernelspec": {"display_name": "", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=metadata), notebook)
    with workers(2) as pool:
        jobs = [
            pool.submit(run_notebooks, [notebook], {"seed": seed}, f"seed{seed}")
            for seed in range(3)
        ]
        folders = [job.result() for job in jobs]
    assert folders == [runs_folder / f"seed{seed}" for seed in range(3)]
    for seed, folder in enumerate(folders):
        executed = nbformat.read(folder / notebook.name, as_version=4)
        assert executed.cells[-1].outputs[0].data["text/plain"] == str(seed + 1)
        assert (folder / "complete.json").exists()
