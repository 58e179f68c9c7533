"""Where things lie, and the one way in which files are written: whole or not at all."""

import os
import stat
import time
from pathlib import Path

import mnistlib.paths
from mnistlib.paths import ABANDONED, outputs_folder, runs_folder, write_atomically


def test_outputs_lie_in_the_checkout_and_elsewhere_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert outputs_folder() == Path(mnistlib.paths.__file__).parents[1] / "outputs"
    installed = tmp_path / "site-packages" / "mnistlib" / "paths.py"
    monkeypatch.setattr(mnistlib.paths, "__file__", str(installed))
    assert outputs_folder() == tmp_path / "outputs"


def test_runs_go_where_the_environment_says_and_else_to_the_outputs(monkeypatch, tmp_path):
    monkeypatch.setenv("MNISTLIB_RUNS", str(tmp_path / "elsewhere"))
    assert runs_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("MNISTLIB_RUNS", "")
    assert runs_folder() == outputs_folder() / "runs"


# Writing; a save that fails at each of its calls is in test_faults.py


def test_a_file_is_written_with_its_folders_and_everybody_can_read_it(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_all_bytes_reach_the_disk_in_the_same_folder_before_they_get_their_name(
    tmp_path, monkeypatch
):
    path, seen, fsync = tmp_path / "file", [], os.fsync

    def look(handle):
        seen.append((os.fstat(handle).st_size, [p.name[:9] for p in tmp_path.iterdir()]))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, bytes(100_000))
    assert seen[0] == (100_000, [".writing-"])
    assert [names for _, names in seen] == [[".writing-"], ["file"]]  # the second: the folder


def test_what_killed_writes_left_behind_is_removed_and_a_write_at_work_is_not(tmp_path):
    old, new, other = tmp_path / ".writing-old", tmp_path / ".writing-new", tmp_path / "old"
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - ABANDONED - 5,) * 2)
    os.utime(new, (time.time() - ABANDONED + 60,) * 2)
    write_atomically(tmp_path / "file", b"content")
    assert {p.name for p in tmp_path.iterdir()} == {".writing-new", "old", "file"}
