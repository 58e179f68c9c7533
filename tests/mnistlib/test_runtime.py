"""The process that a run is in: it is set for the run, and left as it was."""

import ctypes
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core_helpers import after_step, ctrl_c, within_step

from mnistlib import ConfigError, train
from mnistlib.runtime import (
    keep_freed_memory,
    pick_device,
    run_context,
    stop_on_signal,
    versions,
)

# Devices and versions


@pytest.fixture
def accelerator(monkeypatch):
    """Return a function that makes torch see an accelerator, or none."""

    def see(name):
        found = torch.device(name) if name else None
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available=False: found
        )

    return see


@pytest.mark.parametrize("found", [None, "cuda", "mps"])
def test_auto_is_the_accelerator_and_else_the_cpu(accelerator, found):
    accelerator(found)
    assert pick_device("auto").type == (found or "cpu")
    assert pick_device("cpu").type == "cpu"
    if found:
        assert pick_device(found).type == found


@pytest.mark.parametrize(
    ("found", "wanted", "has"),
    [(None, "cuda", "cpu alone"), ("mps", "cuda", "cpu and mps"), ("cuda", "xpu", "cpu and cuda")],
)
def test_a_device_that_is_not_here_is_refused_with_those_that_are(accelerator, found, wanted, has):
    accelerator(found)
    with pytest.raises(ConfigError, match=rf"^device is '{wanted}', but torch finds {has} here"):
        pick_device(wanted)


def test_versions_are_plain_strings():
    found = versions()
    assert list(found) == ["torch", "numpy", "python", "platform"]
    assert {type(v) for v in found.values()} == {str}
    assert (found["torch"], found["numpy"]) == (torch.__version__, np.__version__)


# Threads, seed, random state


def process_state():
    """Return all that a run may change in a process."""
    numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is meant
    threads = torch.get_num_threads()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    return torch.get_rng_state().tolist(), random.getstate(), numpy, threads, handlers


def test_the_seed_is_set_for_the_run_alone():
    before = process_state()
    with run_context(5):
        first = torch.rand(3)
    assert process_state() == before
    with run_context(5):
        assert torch.equal(torch.rand(3), first)
    with run_context(6):
        assert not torch.equal(torch.rand(3), first)
    with pytest.raises(ZeroDivisionError), run_context(5):
        raise ZeroDivisionError
    assert process_state() == before


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted", "interrupted twice"])
def test_training_leaves_the_process_as_it_was(tiny_config, tiny_digits, monkeypatch, how):
    seen = []

    def act():
        seen.append(torch.get_num_threads())
        if how == "failed":
            raise ZeroDivisionError
        if how == "interrupted":
            ctrl_c()
        if how == "interrupted twice":
            ctrl_c()
            raise KeyboardInterrupt

    def handler(number, frame):
        raise AssertionError("Ctrl-C got past the run")

    within_step(monkeypatch, 6, act)
    usual = signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(2)
    try:
        before = process_state()
        config = replace(
            tiny_config,
            model="c4k5s2p pooled",
            epoch_images=100,
            batch_size=25,
        )
        error = {"failed": ZeroDivisionError, "interrupted twice": KeyboardInterrupt}.get(how)
        if error:
            with pytest.raises(error):
                train(config, tiny_digits, verbose=False)
        else:
            run = train(config, tiny_digits, verbose=False)
            assert run.interrupted == (how != "finished")
        assert process_state() == before
        assert seen == [1]  # it had been another
    finally:
        signal.signal(signal.SIGINT, usual)
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
    after_step(monkeypatch, lambda *_: libc.calls.append("step"))
    train(tiny_config, tiny_digits, save=False, verbose=False)
    assert libc.calls == [
        (-3, 1 << 25), (-1, (1 << 31) - 1), *["step"] * 8,
        (-1, 1 << 26), ("trim", 0),
    ]  # fmt: skip


def test_memory_is_given_back_when_training_fails(monkeypatch):
    libc = Libc()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        raise ZeroDivisionError
    assert libc.calls[2:] == [(-1, 1 << 26), ("trim", 0)]


def raising(error):
    def load(name):
        raise error

    return load


@pytest.mark.parametrize(
    "load",
    [lambda name: SimpleNamespace(), raising(OSError("not here")), raising(TypeError("no name"))],
    ids=["musl or macOS", "no library", "Windows"],
)
def test_without_glibc_memory_is_left_alone(monkeypatch, load):
    monkeypatch.setattr(ctypes, "CDLL", load)
    with keep_freed_memory():
        pass
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        raise ZeroDivisionError


# Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_collected_and_the_second_does_what_it_usually_does(number):
    heard = []
    usual = signal.signal(number, lambda *arguments: heard.append(arguments[0]))
    try:
        handlers = [signal.getsignal(n) for n in SIGNALS]
        with stop_on_signal() as stopped:
            assert not stopped
            signal.raise_signal(number)
            assert (stopped, heard) == ([number], [])
            signal.raise_signal(number)
            assert (stopped, heard) == ([number], [number])
        assert [signal.getsignal(n) for n in SIGNALS] == handlers
        signal.raise_signal(number)
        assert (stopped, heard) == ([number], [number, number])
    finally:
        signal.signal(number, usual)


def test_a_second_ctrl_c_is_a_keyboard_interrupt():
    with stop_on_signal() as stopped:
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        assert stopped == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_signals_are_as_before_when_the_run_fails():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(ZeroDivisionError), stop_on_signal():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_the_process_ignores_stays_ignored(number):
    usual = signal.signal(number, signal.SIG_IGN)
    try:
        with stop_on_signal() as stopped:
            signal.raise_signal(number)
            assert not stopped
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, usual)


def test_in_a_thread_there_is_nothing_to_do():
    def enter() -> list[int]:
        assert threading.current_thread() is not threading.main_thread()
        before = [signal.getsignal(n) for n in SIGNALS]
        with stop_on_signal() as stopped:
            assert [signal.getsignal(n) for n in SIGNALS] == before
            return stopped

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(partial(enter)).result(timeout=60) == []
