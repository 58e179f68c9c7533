"""Device, random state, memory and signals of a run."""

import ctypes
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return the device of a Config; `auto` is the accelerator that torch finds, else the CPU.

    Raises:
        ConfigError: the device is not available.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return found or torch.device("cpu")
    if name != "cpu" and (found is None or found.type != name):
        has = f"cpu and {found.type}" if found else "cpu alone"
        raise ConfigError(f"device is {name!r}, but torch finds {has} here; use one of these")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {
        "torch": str(torch.__version__),  # torch.load with weights_only refuses a TorchVersion
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


@contextmanager
def run_context(seed: int) -> Iterator[None]:
    """Set torch's random state for the length of a run, and keep freed memory in the process."""
    with torch.random.fork_rng(), keep_freed_memory():
        torch.manual_seed(seed)
        yield


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Make glibc keep freed memory instead of returning it to the system; elsewhere do nothing.

    Each training step allocates and frees the same megabytes. If they are returned, the next step
    gets fresh pages, at the cost of about a thousand page faults, a tenth to a quarter of its time.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc, threshold, trim = ctypes.CDLL(None), -3, -1  # M_MMAP_ and M_TRIM_THRESHOLD of malloc.h
    libc.mallopt(threshold, 1 << 25)  # the maximum
    libc.mallopt(trim, (1 << 31) - 1)
    try:
        yield
    finally:
        # glibc raises both as blocks are freed, until they are set: then never again. Set back to
        # where they begin, they would leave the process slower than it was, so to where they end
        libc.mallopt(trim, 1 << 26)
        libc.malloc_trim(0)


@contextmanager
def stop_on_signal(*numbers: int) -> Iterator[list[int]]:
    """Collect signals, by default Ctrl-C and SIGTERM, in a list, to stop a run between two steps.

    A second signal of a kind has its usual effect. Nothing is done outside the main thread, which
    alone gets signals, or for a signal that the process was started to ignore.
    """
    caught: list[int] = []
    here = threading.current_thread() is threading.main_thread()
    numbers = numbers or (signal.SIGINT, signal.SIGTERM)
    known: dict[int, Any] = {n: signal.getsignal(n) for n in numbers}
    usual = {n: v for n, v in known.items() if here and v not in (signal.SIG_IGN, None)}

    def hook(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(number, usual[number])

    for number in usual:
        signal.signal(number, hook)
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
