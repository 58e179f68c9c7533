"""Many runs in parallel, resumed after any interruption."""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from joblib import Parallel, cpu_count, delayed

from mnistlib import CheckpointError, Config, Digits, MnistlibError, evaluate, load_mnist, train
from mnistlib.checkpoint import checkpoints
from mnistlib.paths import only_here, runs_folder
from mnistlib.runtime import stop_on_signal

from .ledger import check_ledger, collect, commit, finished, record

# How often a run may start in a sweep. With four, Dask would give up a run that kills its workers
# before we do; joblib 1.6 does not notice that and would wait forever
MAX_ATTEMPTS = 3
# Random state and torch's threads belong to the process, so a worker's threads take turns
ONE_AT_A_TIME = threading.Lock()


def sweep(
    configs: Sequence[Config],
    ledger: Path | None = None,
    *,
    data: str = "auto",
    test: bool = False,
    curves: bool = False,
    workers: int = 0,
) -> tuple[int, int]:
    """Train and record each Config that is not in the ledger; return the runs done and failed.

    Each run is recorded when it ends; the tables are collected at the end. If the sweep is stopped,
    the same call again does the rest: unfinished runs continue from the checkpoint of their last
    epoch, to the same bits. Runs of a killed worker are restarted within the sweep. Two runs on one
    thread each train more images a second than one run on two threads (notebook 08).

    joblib distributes the runs. Inside `with joblib.parallel_config(backend="dask"):` they go to
    the workers of a Dask cluster, which must have access to the ledger's folder.

    Args:
        configs: the runs; each gets one thread unless its `threads` says otherwise.
        ledger: folder of the ledger; by default `runs_folder()`.
        data: as for `load_mnist`; each worker loads it once.
        test: evaluate the final weights of each run on the test set; a run without test results in
            the ledger is trained again.
        curves: validate after every epoch, not only after the last.
        workers: number of processes; 0: one per core. A cluster has its own number.

    Raises:
        DatasetError: the digits are missing or damaged.
        KeyboardInterrupt: Ctrl-C was pressed; the workers have ended.
        LedgerError: the ledger is damaged or cannot be written to.
    """
    folder = (ledger or runs_folder()).absolute()
    check_ledger(folder, configs)
    digits = _digits(data)
    one_each = [replace(config, threads=config.threads or 1) for config in configs]
    left = runs_left(one_each, folder, digits, test)
    total, failed, rounds, began = len(left), 0, 0, time.time()
    common = folder, digits.source if data == "auto" else data, test, curves, os.getpid()

    def starts(config: Config) -> Path:
        own = folder / config.run_name(digits.source) / "unfinished"
        return own / f"starts-{os.getpid()}-{began}"

    how: dict[str, Any] = {"return_as": "generator_unordered", "batch_size": 1}
    how |= {"initializer": _serve, "initargs": (os.getpid(),), "idle_worker_timeout": 10}
    try:
        while left and rounds < MAX_ATTEMPTS + 2:
            rounds += 1
            # a killed worker ends the others too, so the runs that it ended are tried one by one
            lost = [config for config in left if starts(config).exists()]
            n = 2 if lost else min(workers or cpu_count(), len(left))
            pool = Parallel(n, pre_dispatch=1 if lost else "n_jobs", **how)
            jobs = [delayed(_train_one)(c, starts(c), *common) for c in lost or left]
            try:
                with closing(pool(jobs)) as ended:
                    for config, said, fails in ended:
                        if not said:
                            continue  # its worker was told to end; tried again in the next round
                        left.remove(config)
                        failed, rounds, n = failed + fails, 0, total - len(left)
                        rest = (time.time() - began) / n * len(left) / 60
                        line = f"{n} of {total}, {failed} failed, {rest:.0f} min left: "
                        line += f"{'FAILED: ' * fails}{config.recipe} seed {config.seed}: {said}"
                        print(line, file=sys.stderr if fails else sys.stdout, flush=True)
            except BrokenExecutor:
                print(f"a worker was killed, {len(left)} runs are left", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted, {len(left)} of {total} runs are left; the same command continues")
        raise
    for config in left:
        print(f"FAILED: {config.recipe} seed {config.seed}: its worker was killed", file=sys.stderr)
    collect(folder)
    return total - failed - len(left), failed + len(left)


def runs_left(configs: Sequence[Config], folder: Path, digits: Digits, test: bool) -> list[Config]:
    """Return each Config that is not in the ledger once, or not tested; print their number."""
    known = finished(folder, test and bool(digits.test))
    runs = {(config.hash(digits.source), config.seed): config for config in configs}
    left = [config for key, config in runs.items() if key not in known]
    print(f"{len(configs)} runs, {len(configs) - len(left)} of them in the ledger", flush=True)
    return left


_digits = cache(load_mnist)


def _serve(sweep_process: int) -> None:
    """Set up a worker: ignore Ctrl-C, which the sweep handles, and exit when the sweep does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == sweep_process:
            time.sleep(1)
        os._exit(1)  # an unfinished run continues from its checkpoint in the next sweep

    threading.Thread(target=watch, daemon=True).start()


def _train_one(
    config: Config, starts: Path, folder: Path, data: str, test: bool, curves: bool, sweep: int
) -> tuple[Config, str, bool]:
    """Train, evaluate and record a run in a worker; return it, a message, and whether it failed.

    The message is empty if the worker was told to end. The file `starts`, in the folder of the
    checkpoints, has one line, the process id, for each start of the run in this sweep; `sweep` is
    the id of the sweep's process.
    """
    try:
        own = starts.parent
        with only_here(own.parent, ".training", CheckpointError), ONE_AT_A_TIME:
            commit()  # cached now, because files may change before the run ends
            digits = _digits(data)
            images = digits.test if test else ()
            if (config.hash(digits.source), config.seed) in finished(folder, bool(images)):
                return config, "another process has trained it", False
            own.mkdir(parents=True, exist_ok=True)
            with starts.open("a") as file:
                file.write(f"{os.getpid()}\n")
            if len(starts.read_text().splitlines()) > MAX_ATTEMPTS:
                return config, f"its worker was killed {MAX_ATTEMPTS} times", True
            resume = max(checkpoints(own), default=(0, None))[1]
            every = 0 if curves else None
            with stop_on_signal(signal.SIGTERM):  # the run says so
                run = train(config, digits, resume, folder=own, eval_every=every, verbose=False)
            if run.interrupted and os.getpid() == sweep:
                raise KeyboardInterrupt
            if run.interrupted:
                return config, "", False
            seen = evaluate(run.model, *images, config.threads) if images else None
            record(replace(run, checkpoint=None), seen, folder)
            shutil.rmtree(own, ignore_errors=True)
            return config, str(run), False
    except Exception as error:  # of any kind: the other runs continue
        return config, str(error) if isinstance(error, MnistlibError) else repr(error), True
