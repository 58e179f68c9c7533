"""Sweeps: every run once, whatever stops them; the ledger is what they go by."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import pytest

from mnistlib import Config, TrainingError, load_mnist, read_results, sweep, train
from mnistlib.ledger import OF_THE_HOST, comparable

SWEEP = sys.modules["mnistlib.sweep"]  # the package's attribute of that name is the function
LOOP = sys.modules["mnistlib.train"]
ONE = Config(epochs=1, epoch_images=100, batch_size=25, max_lr=0.01, device="cpu")


class AtOnce:
    """An executor that does each job as it is submitted."""

    def __init__(self):
        self.jobs = []

    def submit(self, job, *args):
        self.jobs.append(args[0])
        future = Future()
        try:
            future.set_result(job(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture(autouse=True)
def loads_tiny(tiny_digits, monkeypatch):
    monkeypatch.setattr(SWEEP, "_digits", lambda data: tiny_digits)


def seeds(n):
    return [replace(ONE, seed=seed) for seed in range(n)]


def test_each_run_gets_one_row_with_one_thread(tmp_path):
    assert sweep(seeds(3), tmp_path, executor=AtOnce()) == (3, 0)
    rows = read_results(folder=tmp_path)
    assert sorted(rows["seed"]) == [0, 1, 2]
    assert set(rows["threads"]) == {1}
    assert rows["n_test"].isna().all()


def test_a_row_is_what_the_run_alone_gives(tmp_path, tiny_digits):
    sweep(seeds(2), tmp_path, test=True, executor=AtOnce())
    row = read_results(folder=tmp_path).set_index("seed").loc[1]
    run = train(replace(ONE, seed=1, threads=1), tiny_digits, save=False, verbose=False)
    assert row["val_loss"] == pytest.approx(run.history[-1]["val_loss"], abs=1e-6)
    assert row["n_test"] == 100


def test_only_the_end_is_evaluated_unless_curves_are_wanted(tmp_path):
    two = replace(ONE, epochs=2)
    sweep([two], tmp_path / "end", executor=AtOnce())
    sweep([two], tmp_path / "all", curves=True, executor=AtOnce())
    end, every = (read_results("history", tmp_path / name) for name in ("end", "all"))
    assert end["val_acc"].isna().tolist() == [True, False]
    assert every["val_acc"].notna().all()
    assert end["val_acc"].iloc[-1] == every["val_acc"].iloc[-1]


def test_what_the_ledger_has_is_not_run_again_and_nothing_is_run_twice(tmp_path, capsys):
    sweep(seeds(2), tmp_path, executor=AtOnce())
    before = (tmp_path / "runs.csv").read_text()
    second = AtOnce()
    assert sweep([*seeds(3), *seeds(3)], tmp_path, executor=second) == (1, 0)
    assert [c.seed for c in second.jobs] == [2]
    assert (tmp_path / "runs.csv").read_text().startswith(before)
    assert sweep(seeds(3), tmp_path, executor=AtOnce()) == (0, 0)
    assert "3 runs, 3 of them in the ledger" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(config, *args, **more):
        if config.seed == 1:
            raise TrainingError("the loss is not finite")
        return train(config, *args, **more)

    monkeypatch.setattr(SWEEP, "train", fails)
    assert sweep(seeds(3), tmp_path, executor=AtOnce()) == (2, 1)
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 2]
    assert "FAILED: custom seed 1: the loss is not finite" in capsys.readouterr().err


def test_progress_says_how_many_are_done_and_how_long_the_rest_takes(tmp_path, capsys):
    sweep(seeds(2), tmp_path, executor=AtOnce())
    said = capsys.readouterr().out
    assert "2 runs, 0 of them in the ledger" in said
    assert "1 of 2, 0 min left: custom seed" in said
    assert "2 of 2" in said


def test_an_interrupted_sweep_keeps_what_ended_and_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        interrupted.calls += 1
        if interrupted.calls > 2:
            raise KeyboardInterrupt
        return recorded(*args)

    interrupted.calls, recorded = 0, SWEEP.record
    with monkeypatch.context() as m:
        m.setattr(SWEEP, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(seeds(4), tmp_path, executor=AtOnce())
    assert "interrupted after 2 of 4 runs" in capsys.readouterr().out
    assert len(read_results(folder=tmp_path)) == 2
    assert sweep(seeds(4), tmp_path, executor=AtOnce()) == (2, 0)
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 1, 2, 3]


COMMAND = [sys.executable, "-m", "mnistlib", "sweep", "--data", "sample", "--epochs", "1",
           "--batch-size", "25", "--device", "cpu", "--workers", "2"]  # fmt: skip


def test_the_command_runs_processes_side_by_side(tmp_path):
    short = [*COMMAND, "--epoch-images", "50", "--seeds", "0:3", "--ledger", str(tmp_path)]
    done = subprocess.run(short, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 1, 2]
    assert "3 of 3" in done.stdout


def test_ctrl_c_ends_the_command_and_its_workers(tmp_path):
    long = [*COMMAND, "--epoch-images", "10000000", "--seeds", "0:2", "--ledger", str(tmp_path)]
    with subprocess.Popen(long, stdout=subprocess.PIPE, text=True, start_new_session=True) as job:
        assert "2 runs, 0 of them" in job.stdout.readline()
        time.sleep(1)
        os.killpg(job.pid, signal.SIGINT)
        job.wait(60)
    assert job.returncode == 130
    assert not (tmp_path / "runs.csv").exists()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(job.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a worker is still there")


def test_seeds_that_are_none_are_refused(capsys):
    from mnistlib.__main__ import main

    for text in ("3:1", "a", "-1:2"):
        with pytest.raises(SystemExit) as error:
            main(["sweep", f"--seeds={text}"])
        assert error.value.code == 2
        assert "0:20" in capsys.readouterr().err


def test_a_run_cut_off_goes_on_from_its_last_epoch_to_the_same_bits(
    tmp_path, monkeypatch, runs_folder, tiny_digits
):
    three, step, steps = replace(ONE, epochs=3, seed=5, threads=1), LOOP._step, []

    def dies(t, *batch):
        if len(steps) == 10 and not dies.dead:  # 4 steps an epoch: two epochs are saved
            dies.dead = True
            raise MemoryError
        steps.append(1)
        step(t, *batch)

    dies.dead = False
    monkeypatch.setattr(LOOP, "_step", dies)
    assert sweep([three], tmp_path, executor=AtOnce()) == (0, 1)
    assert len(list((runs_folder / "sweep").rglob("*.pth"))) == 2
    assert sweep([three], tmp_path, executor=AtOnce()) == (1, 0)
    assert len(steps) == 10 + 4  # not from the beginning
    whole = train(three, tiny_digits, save=False, verbose=False)
    row = read_results(folder=tmp_path).iloc[0]
    assert row["val_loss"] == round(whole.history[-1]["val_loss"], 6)
    assert list((runs_folder / "sweep").iterdir()) == []  # nothing is left behind


def test_a_damaged_checkpoint_of_a_run_cut_off_is_named_and_the_run_begun_again(
    tmp_path, capsys, runs_folder
):
    folder = runs_folder / "sweep" / replace(ONE, threads=1).run_name("mnist")
    folder.mkdir(parents=True)
    (folder / "mnist_model_20260101_000000_accNA.pth").write_bytes(b"half a file")
    assert sweep([ONE], tmp_path, executor=AtOnce()) == (1, 0)
    assert "not used: " in capsys.readouterr().err


def test_a_sweep_killed_outright_again_and_again_loses_and_doubles_nothing(
    tmp_path, runs_folder, monkeypatch
):
    command = [*COMMAND, "--epochs", "4", "--epoch-images", "200", "--seeds", "0:2"]
    command += ["--workers", "1", "--ledger", str(tmp_path)]

    def under_way():
        return list((runs_folder / "sweep").rglob("*.pth"))

    def first_row():
        return (tmp_path / "runs.csv").exists()

    for moment in (under_way, first_row):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as job:
            while not moment():
                assert job.poll() is None, "it ended before it was killed"
                time.sleep(0.005)
            job.kill()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, timeout=120)
    for table in ("runs", "history"):
        rows = read_results(table, tmp_path)
        assert sorted(set(rows["seed"])) == [0, 1]
        assert not rows.duplicated(["seed", "epochs" if table == "runs" else "epoch"]).any()
    first = read_results(folder=tmp_path).iloc[0]
    config = replace(Config(**json.loads(first["config"])), device="cpu")
    monkeypatch.setattr(SWEEP, "_digits", load_mnist)
    undisturbed = [replace(config, seed=seed) for seed in (0, 1)]
    assert sweep(undisturbed, tmp_path / "whole", data="sample", executor=AtOnce()) == (2, 0)
    ends = [read_results(folder=f).set_index("seed")["val_loss"].sort_index()
            for f in (tmp_path, tmp_path / "whole")]  # fmt: skip
    assert ends[0].equals(ends[1])


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = (
        "import os, time\n"
        "from mnistlib.process import workers\n"
        "if __name__ == '__main__':\n"
        "    with workers(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True
    ) as job:
        worker = int(job.stdout.readline())
        os.kill(worker, 0)  # it is there
        job.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


class Cluster:
    """An engine whose jobs are no futures of Python's own, as submitit's are not."""

    class Job:
        def __init__(self, work, arguments):
            self.work, self.arguments, self.asked = work, arguments, 0

        def done(self):
            self.asked += 1
            return self.asked > 2

        def result(self):
            assert self.asked > 2
            return self.work(*self.arguments)

    def submit(self, work, *arguments):
        return self.Job(work, arguments)


def test_an_engine_needs_submit_done_and_result_alone(tmp_path):
    assert sweep(seeds(2), tmp_path, executor=Cluster()) == (2, 0)
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 1]


def test_runs_in_the_threads_of_one_process_take_turns(tmp_path, tiny_digits):
    """Random numbers and the number of threads are a process's."""
    with ThreadPoolExecutor(4) as pool:
        assert sweep(seeds(6), tmp_path / "four", executor=pool) == (6, 0)
    assert sweep(seeds(6), tmp_path / "one", executor=AtOnce()) == (6, 0)
    assert comparable("runs", tmp_path / "four").equals(comparable("runs", tmp_path / "one"))
    assert comparable("history", tmp_path / "four").equals(comparable("history", tmp_path / "one"))


def test_what_a_host_may_change_is_left_out_of_a_comparison(tmp_path):
    sweep(seeds(2), tmp_path, executor=AtOnce())
    table, whole = comparable("runs", tmp_path), read_results("runs", tmp_path)
    assert set(whole) - set(table) == set(OF_THE_HOST)
    assert {"val_loss", "test_accuracy", "config", "torch", "threads", "device"} <= set(table)
    shuffled = whole.iloc[::-1]
    shuffled.to_csv(tmp_path / "runs.csv", index=False)
    assert comparable("runs", tmp_path).equals(table)
    shuffled = shuffled.assign(val_loss=shuffled["val_loss"] + 1e-6)
    shuffled.to_csv(tmp_path / "runs.csv", index=False)
    assert not comparable("runs", tmp_path).equals(table)


def test_a_run_whose_worker_is_asked_to_end_is_not_recorded_and_goes_on_later(
    tmp_path, monkeypatch, capsys, tiny_digits
):
    three, step, steps = replace(ONE, epochs=3, threads=1), LOOP._step, []

    def watched(t, *batch):
        steps.append(1)
        step(t, *batch)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(LOOP, "_step", watched)
    assert sweep([three], tmp_path, executor=AtOnce()) == (0, 1)
    assert "FAILED" in capsys.readouterr().err
    assert not (tmp_path / "runs.csv").exists()
    assert sweep([three], tmp_path, executor=AtOnce()) == (1, 0)
    assert len(steps) == 12  # the six that were done are not done again
    whole = train(three, tiny_digits, save=False, verbose=False)
    row = read_results(folder=tmp_path).iloc[0]
    assert row["val_loss"] == round(whole.history[-1]["val_loss"], 6)
