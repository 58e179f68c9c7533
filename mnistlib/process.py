"""Processes: what a run does to the one it is in, and the workers that share many runs."""

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch


@contextmanager
def kept_memory() -> Iterator[None]:
    """Have glibc keep what is freed instead of giving it back to the system; elsewhere do nothing.

    Each training step allocates and frees the same megabytes. Given back, they come as fresh pages
    the next time, some thousand page faults a step: a tenth to a quarter of its time.
    """
    threshold, trim = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    usual = 128 * 1024  # of both, as mallopt(3) says
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(threshold, 1 << 25)  # the most that it takes
    libc.mallopt(trim, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(threshold, usual)
        libc.mallopt(trim, usual)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # macOS, Windows, musl
        return None


@contextmanager
def settings(threads: int, seed: int) -> Iterator[None]:
    """Set threads (0: leave them) and seed for the length of a run, and keep its memory."""
    usual = torch.get_num_threads()
    with torch.random.fork_rng(), kept_memory():
        try:
            if threads:
                torch.set_num_threads(threads)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(usual)


@contextmanager
def collected_interrupts(
    act: Callable[[int], object] = lambda number: None,
) -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list, so that a run stops between two steps and saves.

    A second one does what it usually does. Signals reach the main thread alone, so in any other
    there is nothing to do; nor for a signal that the process was started to ignore.

    Args:
        act: is called with the signal's number.
    """
    caught: list[int] = []
    usual = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        usual = {k: v for k, v in known.items() if v not in (signal.SIG_IGN, None)}

    def as_usual() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        caught.append(number)
        as_usual()
        act(number)

    for number in usual:
        signal.signal(number, note)
    try:
        yield caught
    finally:
        as_usual()


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def workers(n: int) -> Iterator[ProcessPoolExecutor]:
    """Start `n` processes; an exception, Ctrl-C among them, ends them amid their work."""
    # not forked: a copy of a process whose threads are at work may hang
    pool = ProcessPoolExecutor(n, get_context("spawn"), initializer=_serve)
    try:
        yield pool
    except BaseException:
        started = list((pool._processes or {}).values())  # public only from Python 3.14 on
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()  # asked politely, a run would go on to save; it has its last epoch
        raise
    pool.shutdown()


def _serve() -> None:
    """Leave Ctrl-C to the parent, which ends its workers, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)  # what was in flight goes on from its checkpoint in the next sweep

    if parent:
        threading.Thread(target=watch, daemon=True).start()


class Table:
    """Prints the reference's table, a row per epoch, and on a terminal the steps in between."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown
        self.live = shown and sys.stderr.isatty()
        if shown:
            print("Epoch  Train Loss  Val Loss  Train Acc  Val Acc  LR        Seconds")

    def progress(self, step: int, per_epoch: int) -> None:
        """Show, on a terminal, how far the epoch has come."""
        if self.live:
            epoch, done = divmod(step - 1, per_epoch)
            text = f"\repoch {epoch + 1}, step {done + 1} of {per_epoch} "
            print(text, end="", file=sys.stderr, flush=True)

    def row(self, h: dict[str, float]) -> None:
        """Print the row of an epoch."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if self.shown:
            loss, accuracy = f"{h['val_loss']:.4f}", f"{h['val_acc']:.2f}%"
            if math.isnan(h["val_acc"]):
                loss = accuracy = "-"  # nothing was validated
            print(
                f"{h['epoch']:5d}  {h['train_loss']:10.4f}  {loss:>8}  "
                f"{h['train_acc']:8.2f}%  {accuracy:>7}  {h['lr']:.6f}  {h['seconds']:7.1f}",
                flush=True,
            )
