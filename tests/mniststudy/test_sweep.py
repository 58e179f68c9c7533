"""Sweeps: every run once, whatever stops them; the ledger is what they go by."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
from faults import note, short_and_long
from joblib import parallel_config

from mnistlib import Config, TrainingError, train
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


def test_each_run_gets_one_row_with_one_thread(here, tmp_path):
    assert here(seeds(3), tmp_path) == (3, 0)
    rows = read_results(folder=tmp_path)
    assert sorted(rows["seed"]) == [0, 1, 2]
    assert set(rows["threads"]) == {1}
    assert rows["n_test"].isna().all()
    assert rows["checkpoint_bytes"].isna().all()


def test_a_row_is_what_the_run_alone_gives(here, tmp_path, tiny_digits):
    here(seeds(2), tmp_path, test=True)
    row = read_results(folder=tmp_path).set_index("seed").loc[1]
    run = train(replace(ONE, seed=1, threads=1), tiny_digits, save=False, verbose=False)
    assert row["val_loss"] == round(run.history[-1]["val_loss"], 6)
    assert row["n_test"] == 100


def test_only_the_end_is_evaluated_unless_curves_are_wanted(here, tmp_path):
    two = replace(ONE, epochs=2)
    here([two], tmp_path / "end")
    here([two], tmp_path / "all", curves=True)
    end, every = (read_results("history", tmp_path / name) for name in ("end", "all"))
    assert end["val_acc"].isna().tolist() == [True, False]
    assert every["val_acc"].notna().all()
    assert end["val_acc"].iloc[-1] == every["val_acc"].iloc[-1]


def test_tables_are_collected_and_only_records_are_left(here, tmp_path):
    here(seeds(2), tmp_path)
    assert (tmp_path / "runs.csv").is_file()
    left = {path.relative_to(tmp_path).parts for path in tmp_path.glob("*/**/*")}
    names = [replace(c, threads=1).run_name("mnist") for c in seeds(2)]
    assert left == {(name, "run.json") for name in names}


def test_what_the_ledger_has_is_not_run_again_and_nothing_is_run_twice(
    here, tmp_path, capsys, monkeypatch
):
    here(seeds(2), tmp_path)
    before = (tmp_path / "runs.csv").read_text()
    steps = count_steps(monkeypatch)
    assert here([*seeds(3), *seeds(3)], tmp_path) == (1, 0)
    assert len(steps) == 4  # of one run
    assert (tmp_path / "runs.csv").read_text().startswith(before)
    assert here(seeds(3), tmp_path) == (0, 0)
    assert "3 runs, 3 of them in the ledger" in capsys.readouterr().out


def test_runs_recorded_but_not_collected_are_not_run_again(here, tmp_path, tiny_digits):
    record(train(replace(ONE, threads=1), tiny_digits, save=False, verbose=False), None, tmp_path)
    assert here(seeds(1), tmp_path) == (0, 0)
    assert len(read_results(folder=tmp_path)) == 1


def test_a_run_without_test_figures_is_trained_again_for_them_and_its_row_replaced(here, tmp_path):
    here(seeds(3), tmp_path)
    before = read_results(folder=tmp_path)
    assert here(seeds(2), tmp_path, test=True) == (2, 0)
    after = read_results(folder=tmp_path)
    assert after["seed"].tolist() == before["seed"].tolist()  # in their places
    assert after["n_test"].notna().tolist() == [True, True, False]
    assert after["val_loss"].tolist() == before["val_loss"].tolist()
    assert len(read_results("history", tmp_path)) == 3
    assert read_results("misread", tmp_path)["seed"].tolist() == [0, 1]
    assert here(seeds(2), tmp_path, test=True) == here(seeds(3), tmp_path) == (0, 0)


def test_digits_without_a_test_set_are_not_trained_again_for_it(
    here, tmp_path, tiny_digits, monkeypatch
):
    sample = replace(tiny_digits, test_images=None, test_labels=None)
    monkeypatch.setattr(SWEEP, "_digits", lambda data: sample)
    assert here(seeds(1), tmp_path, test=True) == (1, 0)
    assert here(seeds(1), tmp_path, test=True) == (0, 0)


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


def test_progress_says_how_many_are_done_and_how_long_the_rest_takes(here, tmp_path, capsys):
    here(seeds(2), tmp_path)
    said = capsys.readouterr().out
    assert "2 runs, 0 of them in the ledger" in said
    assert "1 of 2, 0 failed, 0 min left: custom seed" in said
    assert "2 of 2" in said


@pytest.mark.parametrize("what", ["a table", "a record", "a file in its place"])
def test_what_is_no_ledger_is_refused_before_anything_is_loaded_or_trained(
    tmp_path, monkeypatch, what
):
    monkeypatch.setattr(SWEEP, "_digits", lambda data: pytest.fail("digits were loaded"))
    folder = tmp_path / "ledger"
    if what == "a table":
        folder.mkdir()
        (folder / "history.csv").write_text("a,b\n")
    elif what == "a record":
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "run.json").write_text("{")
    else:
        folder.write_text("")
    with pytest.raises(LedgerError, match="ledger"):
        sweep(seeds(1), folder)


def test_a_checkpoint_of_ones_own_run_is_not_touched(here, tmp_path, tiny_digits):
    config = replace(ONE, threads=1)
    own = train(config, tiny_digits, folder=tmp_path / config.run_name("mnist"), verbose=False)
    assert here([config], tmp_path) == (1, 0)
    assert own.checkpoint.exists()


# What stops it


def test_a_run_cut_off_goes_on_from_its_last_epoch_to_the_same_bits(
    here, tmp_path, monkeypatch, tiny_digits
):
    three = replace(ONE, epochs=3, seed=5, threads=1)

    def dies(n):
        if n == 11:  # 4 steps an epoch: two epochs are saved
            raise MemoryError

    steps = count_steps(monkeypatch, dies)
    assert here([three], tmp_path) == (0, 1)
    assert len(list(tmp_path.rglob("*.pth"))) == 2
    assert here([three], tmp_path) == (1, 0)
    assert len(steps) == 11 + 4  # not from the beginning
    whole = train(three, tiny_digits, save=False, verbose=False)
    row = read_results(folder=tmp_path).iloc[0]
    assert row["val_loss"] == round(whole.history[-1]["val_loss"], 6)
    assert list(tmp_path.rglob("*.pth")) == []  # nothing is left behind


def test_a_run_that_was_trained_but_not_recorded_is_only_recorded(here, tmp_path, monkeypatch):
    def killed(*args):
        raise MemoryError

    steps = count_steps(monkeypatch)
    with monkeypatch.context() as m:
        m.setattr(SWEEP, "record", killed)
        assert here(seeds(1), tmp_path) == (0, 1)
    assert here(seeds(1), tmp_path) == (1, 0)
    assert len(steps) == 4


def test_a_damaged_checkpoint_of_a_run_cut_off_is_named_and_the_run_begun_again(
    here, tmp_path, capsys
):
    folder = tmp_path / replace(ONE, threads=1).run_name("mnist") / "unfinished"
    folder.mkdir(parents=True)
    (folder / "mnist_model_20260101_000000_accNA.pth").write_bytes(b"half a file")
    assert here([ONE], tmp_path) == (1, 0)
    assert capsys.readouterr().err.count("not used: ") == 2  # before it begins, and when it prunes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_in_one_process_ends_at_a_signal_and_goes_on_later(
    here, tmp_path, monkeypatch, capsys, number
):
    three = [replace(c, epochs=3) for c in seeds(2)]
    steps = count_steps(monkeypatch, lambda n: n == 18 and signal.raise_signal(number))
    with pytest.raises(KeyboardInterrupt):
        here(three, tmp_path)
    assert "1 of 2 runs are left; the same command continues" in capsys.readouterr().out
    assert len(read_results(folder=tmp_path)) == 1
    assert here(three, tmp_path) == (1, 0)
    assert len(steps) == 24  # none is taken twice
    assert here(three, tmp_path / "whole") == (2, 0)
    assert same_results(tmp_path, tmp_path / "whole")


def test_a_run_that_began_too_often_in_one_sweep_is_given_up(here, tmp_path, monkeypatch, capsys):
    """As when its workers were killed: here it finds the starts that they left behind."""
    folder = tmp_path / replace(ONE, threads=1).run_name("mnist") / "unfinished"
    folder.mkdir(parents=True)
    monkeypatch.setattr(SWEEP, "time", SimpleNamespace(time=lambda: 1.5))
    starts = folder / f"starts-{os.getpid()}-1.5"
    starts.write_text("123\n" * MAX_ATTEMPTS)
    assert here(seeds(2), tmp_path) == (1, 1)
    assert (
        f"FAILED: custom seed 0: its worker was killed {MAX_ATTEMPTS} times"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(SWEEP.time, "time", lambda: 2.5)  # another sweep counts anew
    assert here(seeds(2), tmp_path) == (1, 0)


# Processes


SCRIPT = """
import sys
from pathlib import Path
from mnistlib import Config
from mniststudy.runs.sweep import sweep

folder, n, epochs, images, workers = Path(sys.argv[1]), *map(int, sys.argv[2:])
base = {"epochs": epochs, "epoch_images": images, "batch_size": 25, "max_lr": 0.01, "device": "cpu"}
print(sweep([Config(seed=seed, **base) for seed in range(n)], folder, data="sample",
            workers=workers))
"""


def command(folder, n, epochs, images, workers=2):
    return [sys.executable, "-c", SCRIPT, str(folder), *map(str, (n, epochs, images, workers))]


def wait_until(true, seconds=60.0) -> float:
    """Wait until something holds; return after how many seconds it did."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it takes too long"
        time.sleep(0.01)
    return time.monotonic() - began


def group_is_gone(number) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return True
    return False


def under_way(folder, n) -> bool:
    """Whether so many runs have begun."""
    return len(list(folder.glob("*/unfinished/starts-*"))) >= n


def test_ctrl_c_ends_a_sweep_and_its_workers(tmp_path):
    long = command(tmp_path, 2, 1, 10_000_000)
    with subprocess.Popen(
        long, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        wait_until(lambda: under_way(tmp_path, 2))
        os.killpg(job.pid, signal.SIGINT)
        job.wait(20)
        assert wait_until(lambda: group_is_gone(job.pid)) < 5
        out, err = job.communicate()
    assert "interrupted, 2 of 2 runs are left" in out
    assert err.count("Traceback") == 1  # the script's own; the workers say nothing
    assert finished(tmp_path) == set()


def test_a_sweep_killed_outright_again_and_again_loses_and_doubles_nothing(tmp_path):
    folder = tmp_path / "killed"
    again = command(folder, 3, 4, 200)
    moments = [
        lambda: list(folder.rglob("*.pth")),  # under way
        lambda: finished(folder),  # the first run has ended
    ]
    for moment in moments:
        with subprocess.Popen(
            again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        ) as job:
            wait_until(lambda job=job, moment=moment: moment() or job.poll() is not None)
            assert job.poll() is None, "it ended before it was killed"
            job.kill()
            job.wait()
            assert wait_until(lambda job=job: group_is_gone(job.pid)) < 5  # its workers, too
    configs = [replace(ONE, seed=seed, epochs=4, epoch_images=200) for seed in range(3)]
    done, failed = sweep(configs, folder, data="sample", workers=1)
    assert done < 3
    assert failed == 0
    for table in ("runs", "history"):
        rows = read_results(table, folder)
        assert sorted(set(rows["seed"])) == [0, 1, 2]
        assert not rows.duplicated(["seed", "epochs" if table == "runs" else "epoch"]).any()
    assert sweep(configs, tmp_path / "whole", data="sample", workers=1) == (3, 0)
    assert same_results(folder, tmp_path / "whole")


def test_a_run_whose_worker_is_asked_to_end_goes_on_in_the_same_sweep(tmp_path):
    """By SIGTERM, as from a machine that shuts down."""
    slow = [replace(ONE, seed=seed, epoch_images=6_000) for seed in range(2)]
    asked = []

    def ask() -> None:
        wait_until(lambda: under_way(tmp_path, 2))
        time.sleep(0.2)
        for process in multiprocessing.active_children():
            asked.append(process.pid)
            os.kill(process.pid, signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    assert sweep(slow, tmp_path, data="sample", workers=2) == (2, 0)
    thread.join()
    assert len(asked) == 2
    assert sweep(slow, tmp_path / "whole", data="sample", workers=1) == (2, 0)
    assert same_results(tmp_path, tmp_path / "whole")


def test_runs_in_the_threads_of_one_process_take_turns(here, tmp_path):
    """Random numbers and the number of threads are a process's."""
    with parallel_config(backend="threading"):
        assert sweep(seeds(6), tmp_path / "four", workers=4) == (6, 0)
    assert here(seeds(6), tmp_path / "one") == (6, 0)
    assert same_results(tmp_path / "four", tmp_path / "one")


# Workers that are killed


def tiny(n: int) -> list[Config]:
    """Return `n` different runs of two short epochs on the sample."""
    base = Config(
        epochs=2, epoch_images=100, batch_size=25, max_lr=0.02, degrees=5, ema_decay=0.9, focus=0.5,
        device="cpu", threads=1,
    )  # fmt: skip
    return [replace(base, seed=i, dropout=0.1 * (i % 2), pixels=float(i % 3)) for i in range(n)]


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


@pytest.fixture(scope="module")
def dask():
    """Return a client of a Dask cluster of two worker processes with a thread each."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@short_and_long(6, 64)
def test_tables_are_equal_over_the_engines_though_workers_are_killed(tmp_path, dask, n, request):
    configs, after = tiny(n), [2] if n < 10 else [2, n // 4, n // 2, 3 * n // 4]
    assert sweep(configs, tmp_path / "one", data="sample", workers=1) == (n, 0)
    wrong = 0
    for name, client in {"processes": None, "dask": dask}.items():
        with (
            kills(tmp_path / name, client, after) as done,
            parallel_config(backend="dask" if client else "loky"),
        ):
            ended = sweep(configs, tmp_path / name, data="sample", workers=2)
        assert done == after, f"{name}: too quick to be killed"
        seen = sorted(read_results(folder=tmp_path / name)["seed"])
        bad = ended != (n, 0) or seen != list(range(n))
        bad = bad or not same_results(tmp_path / name, tmp_path / "one")
        note(request, f"a sweep of {n} runs with {len(after)} workers killed", name, n, bad)
        wrong += bad
    assert wrong == 0


def test_a_run_whose_workers_are_killed_each_time_is_given_up_and_the_others_end(tmp_path, capsys):
    """As when there is not the memory for it."""
    poison = replace(ONE, epoch_images=10_000_000, threads=1)
    folder, over = tmp_path / poison.run_name("sample") / "unfinished", threading.Event()

    def kill_its_workers() -> None:
        killed = set()
        while not over.wait(0.02):
            for path in folder.glob("starts-*"):
                for pid in {*map(int, path.read_text().split())} - killed:
                    killed.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_its_workers)
    thread.start()
    try:
        assert sweep([poison, *seeds(3)[1:]], tmp_path, data="sample", workers=2) == (2, 1)
    finally:
        over.set()
        thread.join()
    assert f"custom seed 0: its worker was killed {MAX_ATTEMPTS} times" in capsys.readouterr().err
    assert sorted(read_results(folder=tmp_path)["seed"]) == [1, 2]


def test_a_sweep_none_of_whose_workers_lives_gives_up(tmp_path, capsys, monkeypatch):
    over = threading.Event()

    def kill_all() -> None:
        while not over.wait(0.05):
            for pid in workers_of(None):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        with monkeypatch.context() as m:
            m.setattr(SWEEP, "MAX_ATTEMPTS", 0)  # so two rounds
            assert sweep(tiny(3), tmp_path, data="sample", workers=2) == (0, 3)
    finally:
        over.set()
        thread.join()
    said = capsys.readouterr().err
    assert said.count("a worker was killed, 3 runs are left") == 2
    assert said.count(": its worker was killed") == 3
    assert sweep(tiny(3), tmp_path, data="sample", workers=2) == (3, 0)
