"""Many runs: one process per core with one thread each; what the ledger has is not run again."""

import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor, as_completed
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
    epoch, to the same bits. Two cores train more images a second as two runs of one thread than as
    one run of two threads (notebook 08).

    Args:
        configs: the runs; each gets one thread unless its `threads` says otherwise.
        ledger: folder of the ledger; by default `runs_folder()`.
        data: as for `load_mnist`; each worker loads it once.
        test: evaluate the final weights of each run on the test set.
        curves: evaluate the validation images after every epoch, not only after the last.
        workers: processes; 0: one per core.
        executor: any `concurrent.futures` executor to use instead of processes made here.
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
    if not todo:
        return 0, 0
    done, failed, began = 0, 0, time.perf_counter()
    processes = min(workers or cores(), len(todo))
    with nullcontext(executor) if executor else start_workers(processes) as pool:
        jobs = {pool.submit(_one, config, data, test, curves): config for config in todo.values()}
        try:
            for job in as_completed(jobs):
                config = jobs[job]
                try:
                    run, seen = job.result()
                except Exception as error:  # of any kind: the other runs go on
                    failed += 1
                    print(f"FAILED: {config.recipe} seed {config.seed}: {error}", file=sys.stderr)
                    continue
                record(run, seen, ledger)
                shutil.rmtree(_folder(config, source), ignore_errors=True)
                done += 1
                ended = done + failed
                left = (time.perf_counter() - began) / ended * (len(jobs) - ended)
                lost = f"{failed} failed, " if failed else ""
                print(f"{ended} of {len(jobs)}, {lost}{left / 60:.0f} min left: {config.recipe} "
                      f"seed {config.seed}: {run}", flush=True)  # fmt: skip
        except KeyboardInterrupt:
            print(f"interrupted after {done} of {len(jobs)} runs; the same command goes on")
            raise
    return done, failed


_digits = cache(load_mnist)


def _one(config: Config, data: str, test: bool, curves: bool) -> tuple[Run, Evaluation | None]:
    """Train and evaluate one Config; runs in a worker."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent has said already what the digits are
        digits: Digits = _digits(data)
    torch.set_num_threads(config.threads)  # for the evaluation too
    every = 0 if curves else None
    folder = _folder(config, digits.source)
    resume = checkpoints(folder)[-1:]
    run = train(
        config, digits, folder if resume else None, folder=folder, eval_every=every, verbose=False
    )
    seen = None
    if test and digits.test_images is not None:
        seen = evaluate(run.model, digits.test_images, digits.test_labels)
    return replace(run, checkpoint=None), seen  # which lies on the worker's machine


def _folder(config: Config, source: str) -> Path:
    """Return where a run keeps its checkpoint until its row is written."""
    return runs_folder() / "sweep" / config.run_name(source)
