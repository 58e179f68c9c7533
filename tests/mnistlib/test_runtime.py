"""The process that a run is in: it is set for the run, and left as it was."""

import ctypes
import platform
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from core_helpers import after_step, ctrl_c, within_step

from mnistlib import ConfigError, train
from mnistlib.runtime import keep_freed_memory, pick_device, run_context, stop_on_signal


def test_auto_is_the_accelerator_and_what_is_not_here_is_refused(monkeypatch):
    for found, refused in ((None, "cuda"), ("cuda", "xpu"), ("mps", "cuda")):
        device = torch.device(found) if found else None
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda d=device, **_: d)
        assert pick_device("auto").type == pick_device(found or "cpu").type == (found or "cpu")
        assert pick_device("cpu").type == "cpu"
        has = f"cpu and {found}" if found else "cpu alone"
        said = f"^device is '{refused}', but torch finds {has} here"
        with pytest.raises(ConfigError, match=said):
            pick_device(refused)


# Threads, seed, random state


def process_state():
    """Return all that a run may change in a process."""
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is meant
    threads = torch.get_num_threads()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    return torch.get_rng_state().tolist(), random.getstate(), numpy, threads, handlers


def test_the_seed_is_set_for_the_run_alone():
    before, drawn = process_state(), []
    for seed in (5, 5, 6):
        with suppress(ZeroDivisionError), run_context(seed):
            drawn.append(torch.rand(3).tolist())
            raise ZeroDivisionError
        assert process_state() == before
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted", "interrupted twice"])
def test_training_leaves_the_process_as_it_was(tiny_config, tiny_digits, monkeypatch, how):
    seen, error = [], {"failed": ZeroDivisionError, "interrupted twice": KeyboardInterrupt}.get(how)

    def act():
        seen.append(torch.get_num_threads())
        if how == "failed":
            raise ZeroDivisionError
        for _ in range(["finished", "interrupted", "interrupted twice"].index(how)):
            ctrl_c()

    within_step(monkeypatch, 6, act)
    torch.set_num_threads(2)
    try:
        before = process_state()
        config = replace(tiny_config, model="c4k5s2p pooled", epoch_images=100, batch_size=25)
        with pytest.raises(error) if error else nullcontext():
            run = train(config, tiny_digits, verbose=False)
            assert run.interrupted == (how != "finished")
        assert process_state() == before
        assert seen == [1]  # it had been another
    finally:
        torch.set_num_threads(1)


# Memory


class Libc:
    """Stands for glibc and writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls = []
        self.mallopt = lambda which, value: self.calls.append((which, value))
        self.malloc_trim = lambda pad: self.calls.append(("trim", pad))


def test_memory_is_kept_while_training_and_given_back_after(tiny_config, tiny_digits, monkeypatch):
    libc = Libc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    after_step(monkeypatch, lambda *_: libc.calls.append("step"))
    train(replace(tiny_config, epochs=1), tiny_digits, save=False, verbose=False)
    kept, back = [(-3, 1 << 25), (-1, (1 << 31) - 1)], [(-1, 1 << 26), ("trim", 0)]
    assert libc.calls == [*kept, *["step"] * 4, *back]
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        raise ZeroDivisionError
    assert libc.calls[-4:] == kept + back
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # macOS, Windows, musl
    with keep_freed_memory():
        assert libc.calls[-4:] == kept + back


# Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(params=SIGNALS)
def number(request):
    """One of the signals, whose usual effect is put back after the test."""
    usual = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, usual)


def test_the_first_signal_is_collected_and_the_second_does_what_it_usually_does(number):
    heard = []
    signal.signal(number, lambda *arguments: heard.append(arguments[0]))
    handlers = [signal.getsignal(n) for n in SIGNALS]
    with stop_on_signal() as stopped:
        assert not stopped
        signal.raise_signal(number)
        assert (stopped, heard) == ([number], [])
        signal.raise_signal(number)
        assert (stopped, heard) == ([number], [number])
    assert [signal.getsignal(n) for n in SIGNALS] == handlers


def test_a_signal_that_the_process_ignores_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with stop_on_signal() as stopped:
        signal.raise_signal(number)
        assert not stopped
    assert signal.getsignal(number) is signal.SIG_IGN


def test_in_a_thread_there_is_nothing_to_do():
    def enter() -> bool:
        before = [signal.getsignal(n) for n in SIGNALS]
        with stop_on_signal():
            return [signal.getsignal(n) for n in SIGNALS] == before

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result(timeout=60)
