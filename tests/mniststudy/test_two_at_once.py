"""Several processes at once on one table, run, sweep or cache: nothing is lost, doubled or half."""

import contextlib
import hashlib
import http.server
import multiprocessing
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import short_and_long

import mnistlib.data
import mniststudy.runs.pages
import mniststudy.runs.sweep  # noqa: F401
from mnistlib import load_checkpoint
from mnistlib.data import FILES
from mnistlib.paths import only_here
from mniststudy.cli import main
from mniststudy.runs.ledger import append_rows, read_results

ROUNDS = 20
QUICK = "--data sample --epochs 2 --epoch-images 200 --batch-size 50 --device cpu"
REFUSED = "(another process is at work in it); wait"
PROCESSES = multiprocessing.get_context("fork")  # which need not import everything again


def command(line: str, start, said: Path) -> None:
    """Execute a command in this process when all are ready, and write what it says to a file."""
    file = os.open(said, os.O_CREAT | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    with open(1, "w", buffering=1) as sys.stdout, open(2, "w", buffering=1) as sys.stderr:
        start.wait(60)
        sys.exit(main(line.split()))


def at_once(line: str, folder: Path) -> list[tuple[int, str]]:
    """Execute a command twice at the same time; return the exit code and what each says."""
    start, texts = PROCESSES.Barrier(2), [folder.with_suffix(f".{name}") for name in "ab"]
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MNISTLIB_RUNS", str(folder))
        m.setenv("XDG_CACHE_HOME", str(folder))
        m.delenv("MNISTLIB_DATA", raising=False)
        jobs = [PROCESSES.Process(target=command, args=(line, start, said)) for said in texts]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
    ends = [(job.exitcode, said.read_text()) for job, said in zip(jobs, texts, strict=True)]
    assert not any("Traceback" in said for _, said in ends), ends
    return ends


@pytest.fixture
def warm(monkeypatch):
    """Do once, for all processes, what takes each of them seconds: imports, reading the sample."""
    torch.optim.SGD([torch.zeros(1)], lr=1.0)  # torch imports its compiler
    sample = mnistlib.load_mnist("sample")
    monkeypatch.setattr(mnistlib.data, "_load_sample", lambda: sample)


def append(path: Path, number: int, n: int, start) -> None:
    start.wait()
    for k in range(n):
        append_rows(path, ("name", "seed", "n"), [{"name": "a", "seed": number, "n": k}])


@short_and_long(5, 125)
def test_no_row_of_eight_processes_is_lost_or_doubled(tmp_path, n):
    path, start = tmp_path / "table.csv", PROCESSES.Barrier(8)
    jobs = [PROCESSES.Process(target=append, args=(path, i, n, start)) for i in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0] * 8  # 1 after a traceback
    table = read_results("table", tmp_path)
    assert sorted(zip(table["seed"], table["n"], strict=True)) == [
        (i, k) for i in range(8) for k in range(n)
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", ".lock"}


def test_a_long_wait_for_a_lock_is_said_once(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("mnistlib.paths.SILENT", 0.1)
    path, start = tmp_path / "table.csv", PROCESSES.Barrier(1)
    job = PROCESSES.Process(target=append, args=(path, 0, 1, start))
    with only_here(tmp_path, ".lock", OSError):
        job.start()
        time.sleep(1)
        assert not path.exists()
    job.join()
    assert len(read_results("table", tmp_path)) == 1
    said = f"waiting for another process that is at work in {tmp_path}\n"
    assert capfd.readouterr().err == said


@pytest.mark.stress
def test_of_two_equal_trainings_one_is_recorded_once(tmp_path, warm):
    """The other is refused in a sentence, or comes late and trains the same again."""
    refused = 0
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        ends = at_once(f"train {QUICK}", folder)
        for code, said in ends:
            assert (code, said.count("error: ")) == ((1, 1) if REFUSED in said else (0, 0)), said
        refused += (lost := sum(code for code, _ in ends))
        assert lost < 2
        assert len(read_results(folder=folder)) == 1
        assert len(read_results("history", folder)) == 2
        (path,) = folder.rglob("*.pth")
        assert len(load_checkpoint(path)["history"]) == 2
        assert not list(folder.rglob(".writing-*"))
    print(f"of {ROUNDS} rounds, the second was refused in {refused}")
    assert refused  # else they never met


@pytest.mark.stress
def test_two_equal_sweeps_record_each_run_once(tmp_path, warm):
    met = 0
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        workers = 1 + (number % 10 == 0)  # one works in the process itself, two take seconds
        ends = at_once(f"sweep {QUICK} --seeds 0:3 --workers {workers}", folder)
        assert [code for code, _ in ends] == [0, 0], ends
        assert not any("FAILED" in said for _, said in ends), ends
        met += any("another process has trained it" in said for _, said in ends)
        assert sorted(read_results(folder=folder)["seed"]) == [0, 1, 2]
        epochs = read_results("history", folder)[["seed", "epoch"]]
        assert sorted(epochs.itertuples(index=False)) == [(s, e) for s in range(3) for e in (1, 2)]
        assert not [*folder.rglob("unfinished"), *folder.rglob(".writing-*")]
    print(f"in {met} of {ROUNDS} rounds, one waited for a run of the other")
    assert met


@contextlib.contextmanager
def serving(folder: Path):
    """Give the address of a server of a folder's files, and the paths that it was asked for."""
    asked = []

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Files, directory=folder)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.stress
def test_two_that_begin_with_an_empty_cache_both_get_whole_digits(tmp_path, monkeypatch):
    """Made-up ones, from a server on this machine."""
    rng, raws = np.random.default_rng(0), {}
    for name in FILES:
        n = 6_000 if name.startswith("train") else 100
        many, most = (n, 256) if "labels" not in name else (n, 10)
        sizes = (many, 28, 28) if "images" in name else (many,)
        header = b"".join(size.to_bytes(4, "big") for size in sizes)
        values = rng.integers(0, most, sizes, dtype=np.uint8).tobytes()
        raws[name] = bytes([0, 0, 8, len(sizes)]) + header + values
        (tmp_path / f"{name}.gz").write_bytes(raws[name])  # not zipped, which is allowed, and quick
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in raws.items()}
    monkeypatch.setattr(mnistlib.data, "FILES", hashes)
    monkeypatch.setenv("no_proxy", "*")
    both = 0
    with serving(tmp_path) as (address, asked):
        monkeypatch.setattr(mnistlib.data, "MNIST_URLS", (address,))
        for number in range(ROUNDS):
            folder = tmp_path / str(number)
            for code, said in at_once("evaluate", folder):
                assert (code, "6,000 training images, 100 test images" in said) == (0, True), said
            cache = {p.name: p.read_bytes() for p in (folder / "mnistlib").iterdir()}
            assert cache == raws  # and nothing else
            both += len(asked) > len(raws)
            asked.clear()
    print(f"in {both} of {ROUNDS} rounds, both downloaded")
    assert both
