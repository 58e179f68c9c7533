"""What a run does to the process around it: threads, random state, Ctrl-C, its printed table."""

import signal
import sys
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
    any other there is nothing to do; nor in a process that was started to ignore them.
    """
    caught: list[int] = []
    usual = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or usual in (signal.SIG_IGN, None):
        yield caught
        return

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, usual)


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
            print(
                f"{h['epoch']:5d}  {h['train_loss']:10.4f}  {h['val_loss']:8.4f}  "
                f"{h['train_acc']:8.2f}%  {h['val_acc']:6.2f}%  {h['lr']:.6f}  {h['seconds']:7.1f}",
                flush=True,
            )
