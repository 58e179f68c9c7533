"""What a run does to its process: threads, random state, Ctrl-C. All of it is put back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def settings(threads: int, seed: int) -> Iterator[None]:
    """Set threads (0: leave them) and seed for the length of a run."""
    usual = torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            if threads:
                torch.set_num_threads(threads)
            torch.manual_seed(seed)
            yield
        finally:
            torch.set_num_threads(usual)


@contextmanager
def collected_interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C in a list instead of raising it, so that a run stops between two steps.

    A second Ctrl-C raises KeyboardInterrupt as usual. Signals reach the main thread alone, so in
    any other there is nothing to do.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    usual = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, usual)
