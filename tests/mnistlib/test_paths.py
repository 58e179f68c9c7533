"""Where things lie, and the one way in which files are written: whole or not at all."""

import os
import stat
import time
from pathlib import Path

import pytest

import mnistlib.paths
from mnistlib import ConfigError
from mnistlib.paths import ABANDONED, only_here, outputs_folder, runs_folder, write_atomically


def test_outputs_lie_in_the_checkout_or_the_working_folder_and_runs_where_it_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert outputs_folder() == Path(mnistlib.paths.__file__).parents[1] / "outputs"
    monkeypatch.setattr(mnistlib.paths, "__file__", str(tmp_path / "site-packages" / "m" / "p.py"))
    assert outputs_folder() == tmp_path / "outputs"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for said, folder in (("a", "a"), ("~/a", "home/a"), ("/a", "/a"), ("", "outputs/runs")):
        folder = tmp_path / folder
        monkeypatch.setenv("MNISTLIB_RUNS", said)
        assert runs_folder() == folder


# Writing; a save that fails at each of its calls is in test_faults.py


def test_all_bytes_reach_the_disk_in_the_same_folder_before_they_get_their_name(
    tmp_path, monkeypatch
):
    path, seen, fsync = tmp_path / "a" / "b" / "file", [], os.fsync

    def look(handle):
        seen.append((os.fstat(handle).st_size, [p.name[:9] for p in path.parent.iterdir()]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, bytes(100_000))
    assert seen[0] == (100_000, [".writing-"])
    assert [names for _, names in seen] == [[".writing-"], ["file"]]  # the second: the folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o644  # everybody can read it
    usual = os.umask(0o027)
    try:
        write_atomically(path, b"second")
    finally:
        os.umask(usual)
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640  # as the user's umask has it


def test_what_killed_writes_left_behind_is_removed_and_a_write_at_work_is_not(tmp_path):
    for name, age in ((".writing-old", 5), (".writing-new", -60), ("old", 5)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - ABANDONED - age,) * 2)
    write_atomically(tmp_path / "file", b"content")
    assert {p.name for p in tmp_path.iterdir()} == {".writing-new", "old", "file"}


def test_a_reader_that_has_ended_is_no_fault_of_the_folder(tmp_path):
    """As `head` does behind a command that prints while it holds a folder."""
    with pytest.raises(BrokenPipeError), only_here(tmp_path, ".lock", ConfigError):
        raise BrokenPipeError(32, "Broken pipe")
    with pytest.raises(ConfigError, match="No space left"), only_here(tmp_path, "l", ConfigError):
        raise OSError(28, "No space left on device")
