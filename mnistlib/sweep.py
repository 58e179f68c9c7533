"""Many runs: one process per core with one thread each; what the ledger has is not run again."""

import shutil
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from .config import Config, runs_folder
from .data import Digits, load_mnist
from .evaluate import Evaluation, evaluate
from .ledger import commit, finished, record
from .process import cores
from .process import workers as start_workers
from .resume import checkpoints
from .train import Run, train

TRIES = 4  # pools that a run may be in when one of their workers is killed
# Random numbers and threads are a process's, so the threads of an engine's worker take turns
ONE_AT_A_TIME = threading.Lock()


def sweep(
    configs: Sequence[Config],
    ledger: Path | None = None,
    *,
    data: str = "auto",
    test: bool = False,
    curves: bool = False,
    workers: int = 0,
    executor: Executor | None = None,
) -> tuple[int, int]:
    """Train each Config that the ledger lacks and record it; return the runs done and failed.

    A row is written as soon as its run ends, by this process alone. Whatever stops the sweep, the
    same call again does the rest: runs that were in flight go on from the checkpoint of their last
    epoch, to the same bits; those of a killed worker do so by themselves, in a new one. Two cores
    train more images a second as two runs of one thread than as one run of two (notebook 08).

    Args:
        configs: the runs; each gets one thread unless its `threads` says otherwise.
        ledger: folder of the ledger; by default `runs_folder()`.
        data: as for `load_mnist`; each worker loads it once.
        test: evaluate the final weights of each run on the test set.
        curves: evaluate the validation images after every epoch, not only after the last.
        workers: processes; 0: one per core.
        executor: any `concurrent.futures` executor to use instead of processes made here, as of
            Dask, or the like of one, as of submitit: of `submit`, and of `done` and `result` of
            the jobs. Its workers see the same files, and it replaces them itself.
    """
    commit()  # what runs now; files may change before the last run ends
    source = _digits(data).source
    known = finished((ledger or runs_folder()) / "runs.csv")
    todo = {}
    for config in configs:
        key = (config.hash(source), config.seed)
        if key not in known:
            todo.setdefault(key, replace(config, threads=config.threads or 1))
    print(f"{len(configs)} runs, {len(configs) - len(todo)} of them in the ledger", flush=True)
    total, done, failed, began = len(todo), 0, 0, time.perf_counter()
    left, tries = list(todo.values()), Counter[Config]()
    try:
        while left:
            processes = min(workers or cores(), len(left))
            lost = []
            with nullcontext(executor) if executor else start_workers(processes) as pool:
                for config, job in _ended(pool, left, data, test, curves):
                    try:
                        run, seen = job.result()
                    # a worker was killed, which ends all that are there, or asked to end
                    except (BrokenExecutor, InterruptedError):
                        lost.append(config)
                        continue
                    except Exception as error:  # of any kind: the other runs go on
                        failed += 1
                        _say_failed(config, error)
                        continue
                    record(run, seen, ledger)
                    shutil.rmtree(_folder(config, source), ignore_errors=True)
                    done += 1
                    ended = done + failed
                    rest = (time.perf_counter() - began) / ended * (total - ended)
                    fails = f"{failed} failed, " if failed else ""
                    print(f"{ended} of {total}, {fails}{rest / 60:.0f} min left: {config.recipe} "
                          f"seed {config.seed}: {run}", flush=True)  # fmt: skip
            tries.update(lost)
            left = [c for c in lost if tries[c] < TRIES and not executor]
            if left:
                print(f"a worker was killed: {len(left)} runs go on in new ones", file=sys.stderr)
            for config in [c for c in lost if c not in left]:
                failed += 1
                _say_failed(config, "its worker was killed, or another one of the same engine")
    except KeyboardInterrupt:
        print(f"interrupted after {done} of {total} runs; the same command goes on")
        raise
    return done, failed


def _ended(
    pool: Executor, configs: Sequence[Config], data: str, test: bool, curves: bool
) -> Iterator[tuple[Config, Future]]:
    """Submit the runs and give each as it ends, or as its pool breaks."""
    jobs = []
    for config in configs:
        try:
            job = pool.submit(_one, config, data, test, curves)
        except BrokenExecutor as error:
            job = Future()
            job.set_exception(error)
        jobs.append((config, job))
    while jobs:  # asked one by one: not every engine's jobs are futures of Python's own
        ended = [(config, job) for config, job in jobs if job.done()]
        jobs = [(config, job) for config, job in jobs if (config, job) not in ended]
        yield from ended
        if not ended:
            time.sleep(0.05)


def _say_failed(config: Config, why: object) -> None:
    print(f"FAILED: {config.recipe} seed {config.seed}: {why}", file=sys.stderr)


_digits = cache(load_mnist)


def _one(config: Config, data: str, test: bool, curves: bool) -> tuple[Run, Evaluation | None]:
    """Train and evaluate one Config; runs in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent has said already what the digits are
        digits: Digits = _digits(data)
    with ONE_AT_A_TIME:
        torch.set_num_threads(config.threads)  # for the evaluation too
        folder = _folder(config, digits.source)
        resume = folder if checkpoints(folder) else None
        every = 0 if curves else None
        run = train(config, digits, resume, folder=folder, eval_every=every, verbose=False)
        if run.interrupted:  # by SIGTERM, as from a cluster that wants its machine back
            raise InterruptedError(f"its worker was stopped by signal {run.signal}")
        seen = None
        if test and digits.test_images is not None:
            seen = evaluate(run.model, digits.test_images, digits.test_labels)
    return replace(run, checkpoint=None), seen  # which lies on the worker's machine


def _folder(config: Config, source: str) -> Path:
    """Return where a run keeps its checkpoint until its row is written."""
    return runs_folder() / "sweep" / config.run_name(source)
