"""Sweeps: every run once, whatever stops them; the ledger is what they go by."""

import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from unittest.mock import Mock

import pytest
from faults import note, short_and_long
from joblib import parallel_config

from mnistlib import CheckpointError, Config, TrainingError, train
from mnistlib.paths import only_here
from mniststudy.runs.ledger import (
    LedgerError,
    finished,
    read_results,
    record,
    without_host_columns,
)
from mniststudy.runs.sweep import MAX_ATTEMPTS, sweep

SWEEP = sys.modules["mniststudy.runs.sweep"]
LOOP = sys.modules["mnistlib.train"]
ONE = Config(epochs=1, epoch_images=100, batch_size=25, max_lr=0.01, device="cpu")


@pytest.fixture
def here(tiny_digits, monkeypatch):
    """Sweep in this process, on tiny digits: one worker needs no process of its own."""
    monkeypatch.setattr(SWEEP, "_digits", lambda data: tiny_digits)
    return lambda configs, folder, **more: sweep(configs, folder, workers=1, **more)


def seeds(n):
    return [replace(ONE, seed=seed) for seed in range(n)]


def count_steps(monkeypatch, act=lambda n: None) -> list[int]:
    """Count the steps of all runs in this process, and call `act` with the number of each."""
    step, steps = LOOP.train_step, []

    def watched(*args):
        steps.append(1)
        act(len(steps))
        step(*args)

    monkeypatch.setattr(LOOP, "train_step", watched)
    return steps


def same_results(*folders) -> bool:
    """Whether ledgers have the same runs with the same values, to the last digit."""
    return all(
        without_host_columns(table, folder).equals(without_host_columns(table, folders[0]))
        for table in ("runs", "history")
        for folder in folders
    )


# What a sweep does


def test_each_run_gets_a_row_as_it_gives_alone_and_is_not_run_again(
    here, tmp_path, tiny_digits, monkeypatch, capsys
):
    assert here(seeds(2), tmp_path) == (2, 0)
    said = capsys.readouterr().out
    assert "2 runs, 0 of them in the ledger" in said
    assert re.search(r"1 of 2, 0 failed, \d+ min left: custom seed", said)
    rows = read_results(folder=tmp_path)
    assert rows[["threads", "n_test", "checkpoint_bytes"]].isna().to_numpy().sum() == 4
    assert rows["threads"].tolist() == [1, 1]  # the Config left it open
    run = train(replace(ONE, seed=1, threads=1), tiny_digits, save=False, verbose=False)
    assert rows.set_index("seed")["val_loss"][1] == round(run.history[-1]["val_loss"], 6)
    left = {path.relative_to(tmp_path).parts for path in tmp_path.glob("*/**/[!.]*")}
    names = [replace(c, threads=1).run_name("mnist") for c in seeds(2)]
    assert left == {(name, "run.json") for name in names}  # and nothing of the training
    before, steps = (tmp_path / "runs.csv").read_text(), count_steps(monkeypatch)
    record(replace(run, config=replace(run.config, seed=5)), None, tmp_path)  # not collected
    assert here([*seeds(3), *seeds(3), replace(ONE, seed=5)], tmp_path) == (1, 0)
    assert len(steps) == 4  # of one run
    assert (tmp_path / "runs.csv").read_text().startswith(before)


def test_the_minutes_left_are_so_many_for_each_run_as_the_runs_so_far_took(
    here, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(SWEEP, "time", Mock(time=count(10**9, 600).__next__))  # seconds
    here(seeds(3), tmp_path)
    assert re.findall(r"(\d+) min left", capsys.readouterr().out) == ["20", "10", "0"]


def test_only_the_end_is_evaluated_unless_curves_are_wanted(here, tmp_path):
    two = replace(ONE, epochs=2)
    here([two], tmp_path / "end")
    here([two], tmp_path / "all", curves=True)
    end, every = (read_results("history", tmp_path / name) for name in ("end", "all"))
    assert end["val_acc"].isna().tolist() == [True, False]
    assert every["val_acc"].notna().all()
    assert end["val_acc"].iloc[-1] == every["val_acc"].iloc[-1]


def test_a_run_without_test_figures_is_trained_again_for_them_and_its_row_replaced(
    here, tmp_path, tiny_digits, monkeypatch
):
    here(seeds(3), tmp_path)
    before = read_results(folder=tmp_path)
    assert here(seeds(2), tmp_path, test=True) == (2, 0)
    after = read_results(folder=tmp_path)
    assert after["n_test"].notna().tolist() == [True, True, False]
    for column in ("seed", "val_loss"):  # in their places
        assert after[column].tolist() == before[column].tolist()
    assert here(seeds(2), tmp_path, test=True) == here(seeds(3), tmp_path) == (0, 0)
    untested = replace(tiny_digits, test_images=None, test_labels=None)
    monkeypatch.setattr(SWEEP, "_digits", lambda data: untested)  # they are not asked for again
    assert here(seeds(3), tmp_path, test=True) == (0, 0)


def test_a_run_that_fails_is_named_and_the_others_go_on(here, tmp_path, monkeypatch, capsys):
    def fails(config, *args, **more):
        if config.seed == 1:
            raise TrainingError("the loss is not finite")
        if config.seed == 2:
            raise KeyError("a mistake")
        return train(config, *args, **more)

    monkeypatch.setattr(SWEEP, "train", fails)
    assert here(seeds(4), tmp_path) == (2, 2)
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 3]
    said = capsys.readouterr()
    assert "FAILED: custom seed 1: the loss is not finite\n" in said.err
    assert "FAILED: custom seed 2: KeyError('a mistake')\n" in said.err
    assert "FAILED" not in said.out
    monkeypatch.setattr(SWEEP, "train", train)
    assert here(seeds(4), tmp_path) == (2, 0)


def test_a_checkpoint_of_ones_own_run_is_not_touched(here, tmp_path, tiny_digits):
    config = replace(ONE, threads=1)
    own = train(config, tiny_digits, folder=tmp_path / config.run_name("mnist"), verbose=False)
    assert here([config], tmp_path) == (1, 0)
    assert own.checkpoint.exists()


def test_a_run_that_another_process_is_training_is_waited_for_and_not_trained_again(
    here, tmp_path, tiny_digits, monkeypatch, capsys
):
    steps, run = count_steps(monkeypatch), train(ONE, tiny_digits, save=False, verbose=False)
    held, left = threading.Event(), SWEEP.runs_left

    def other() -> None:
        with only_here(tmp_path / ONE.run_name("mnist"), ".training", CheckpointError):
            held.set()
            time.sleep(0.3)
            record(run, None, tmp_path)

    thread = threading.Thread(target=other)
    monkeypatch.setattr(SWEEP, "runs_left", lambda *a: [left(*a), thread.start(), held.wait()][0])
    assert here([ONE], tmp_path) == (1, 0)
    thread.join()
    assert len(steps) == 4
    assert "custom seed 0: another process has trained it" in capsys.readouterr().out
    assert len(read_results(folder=tmp_path)) == 1
    assert not list(tmp_path.rglob("unfinished"))


def test_what_is_no_ledger_is_refused_before_anything_is_loaded_or_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(SWEEP, "_digits", lambda data: pytest.fail("digits were loaded"))
    (tmp_path / "history.csv").write_text("a,b\n")
    with pytest.raises(LedgerError, match="other columns"):
        sweep(seeds(1), tmp_path)


# What stops it


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_in_one_process_ends_at_a_signal_and_goes_on_later(
    here, tmp_path, monkeypatch, capsys, number
):
    two = [replace(c, epochs=2) for c in seeds(2)]
    steps = count_steps(monkeypatch, lambda n: n == 13 and signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        here(two, tmp_path)
    assert "1 of 2 runs are left; the same command continues" in capsys.readouterr().out
    assert len(read_results(folder=tmp_path)) == 1
    assert here(two, tmp_path) == (1, 0)
    assert len(steps) == 16  # none is taken twice


def test_a_run_cut_off_goes_on_from_its_last_good_checkpoint_to_the_same_bits(
    here, tmp_path, monkeypatch, tiny_digits, capsys
):
    three = replace(ONE, epochs=3, seed=5, threads=1)

    def dies(n):
        if n == 11:  # 4 steps an epoch: two epochs are saved
            raise MemoryError

    steps = count_steps(monkeypatch, dies)
    assert here([three], tmp_path) == (0, 1)
    _, last = sorted(tmp_path.rglob("*.pth"))
    last.write_bytes(b"half a file")
    assert here([three], tmp_path) == (1, 0)
    assert len(steps) == 11 + 8  # from the first epoch's checkpoint
    assert "not used: " in capsys.readouterr().err
    whole = train(three, tiny_digits, save=False, verbose=False)
    row = read_results(folder=tmp_path).iloc[0]
    assert row["val_loss"] == round(whole.history[-1]["val_loss"], 6)
    assert list(tmp_path.rglob("*.pth")) == []  # nothing is left behind


def test_a_run_whose_worker_is_told_to_end_is_tried_again(here, tmp_path, monkeypatch):
    """As by a machine that shuts down; here the worker's process has another number each time."""
    monkeypatch.setattr(SWEEP, "os", Mock(getpid=Mock(side_effect=count())))
    steps = count_steps(monkeypatch, lambda n: n == 2 and signal.raise_signal(signal.SIGTERM))
    assert here(seeds(2), tmp_path) == (2, 0)
    assert len(steps) == 8  # none is taken twice


def test_a_run_that_began_too_often_in_one_sweep_is_given_up(here, tmp_path, monkeypatch, capsys):
    """As when its workers were killed: here it finds the starts that they left behind."""
    folder = tmp_path / replace(ONE, threads=1).run_name("mnist") / "unfinished"
    folder.mkdir(parents=True)
    (folder / f"starts-{os.getpid()}-1.5").write_text("123\n" * MAX_ATTEMPTS)
    for now, ended in ((1.5, (1, 1)), (2.5, (1, 0))):  # another sweep counts anew
        monkeypatch.setattr(SWEEP, "time", Mock(time=lambda now=now: now))
        with parallel_config(backend="threading"):
            assert here(seeds(2), tmp_path) == ended
    assert f"custom seed 0: its worker was killed {MAX_ATTEMPTS} times" in capsys.readouterr().err


def test_a_sweep_none_of_whose_workers_lives_gives_up(here, tmp_path, capsys, monkeypatch):
    def broken(jobs):
        yield from ()
        raise BrokenExecutor

    monkeypatch.setattr(SWEEP, "Parallel", lambda *args, **how: broken)
    assert here(seeds(2), tmp_path) == (0, 2)
    said = capsys.readouterr().err
    assert said.count("a worker was killed, 2 runs are left") == MAX_ATTEMPTS + 2
    assert said.count(": its worker was killed") == 2


# Processes


SCRIPT = """
import sys
from pathlib import Path
from mnistlib import Config
from mniststudy.runs.sweep import sweep

base = {"epoch_images": 10_000_000, "batch_size": 25, "device": "cpu"}
sweep([Config(seed=seed, **base) for seed in (0, 1)], Path(sys.argv[1]), data="sample", workers=2)
"""


def wait_until(true, seconds=60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def group_is_gone(number) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.stress)]
)
def test_a_sweep_that_is_stopped_or_killed_takes_its_workers_with_it(tmp_path, number):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as job:  # fmt: skip
        wait_until(lambda: len(list(tmp_path.glob("*/unfinished/starts-*"))) == 2)
        # Ctrl-C goes to all of them
        os.killpg(job.pid, number) if number == signal.SIGINT else job.kill()
        out, err = job.communicate(timeout=60)
        wait_until(lambda: group_is_gone(job.pid), 5)
    assert ("interrupted, 2 of 2 runs are left" in out) == (number == signal.SIGINT)
    assert err.count("Traceback") == (number == signal.SIGINT)  # the workers say nothing
    assert finished(tmp_path) == set()


# Engines


@contextmanager
def dask(processes: bool):
    """Give a client of a Dask cluster of two workers with a thread each."""
    distributed = pytest.importorskip("distributed")
    how = {"threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(n_workers=2, processes=processes, **how) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("backend", ["threading", "dask"])
def test_runs_in_the_threads_of_one_process_take_turns(here, tmp_path, backend):
    """Random numbers and the number of threads are a process's."""
    cluster = dask(processes=False) if backend == "dask" else nullcontext()
    with cluster, parallel_config(backend=backend):
        assert sweep(seeds(4), tmp_path / "four", workers=4) == (4, 0)
    assert here(seeds(4), tmp_path / "one") == (4, 0)
    assert same_results(tmp_path / "four", tmp_path / "one")


def workers_of(client) -> list[int]:
    """Return the processes of the workers; none while they are being replaced."""
    if client is None:
        return [process.pid for process in multiprocessing.active_children()]
    try:
        return list(client.run(os.getpid).values())
    except Exception:  # distributed has an error of its own for each moment
        return []


@contextmanager
def kills(folder, client, after: list[int]):
    """Kill one worker when the ledger has so many runs, for each number; give the kills done."""
    done, over = [], threading.Event()

    def watch() -> None:
        for rows in after:
            while len(finished(folder)) < rows or not (pids := workers_of(client)):
                if over.wait(0.02):
                    return
            os.kill(random.Random(rows).choice(pids), signal.SIGKILL)
            done.append(rows)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@short_and_long(4, 64)
def test_tables_are_equal_over_the_engines_though_workers_are_killed(tmp_path, n, request):
    base = Config(
        epochs=2, epoch_images=100, batch_size=25, max_lr=0.02, degrees=5, ema_decay=0.9, focus=0.5,
        device="cpu", threads=1,
    )  # fmt: skip
    configs = [replace(base, seed=i, dropout=0.1 * (i % 2), pixels=float(i % 3)) for i in range(n)]
    assert sweep(configs, tmp_path / "one", data="sample", workers=1) == (n, 0)
    after = [1] if n == 4 else [2, n // 4, n // 2, 3 * n // 4]
    for name in ("processes",) if n == 4 else ("processes", "dask"):
        with (
            dask(processes=True) if name == "dask" else nullcontext() as client,
            kills(tmp_path / name, client, after) as done,
            parallel_config(backend="dask" if client else "loky"),
        ):
            ended = sweep(configs, tmp_path / name, data="sample", workers=2)
        assert done == after, f"{name}: too quick to be killed"
        equal = ended == (n, 0) and same_results(tmp_path / name, tmp_path / "one")
        note(request, f"a sweep of {n} runs with {len(after)} workers killed", name, n, not equal)
        assert equal
