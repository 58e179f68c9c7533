"""Where things lie, and the one way in which files are written: whole or not at all."""

import errno
import io
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest

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
    for nothing in ("", None):
        if nothing is None:
            monkeypatch.delenv("MNISTLIB_RUNS")
        else:
            monkeypatch.setenv("MNISTLIB_RUNS", nothing)
        assert runs_folder() == outputs_folder() / "runs"


# Writing


class Killed(BaseException):
    """Ends a write as a kill would: no `except Exception` or `except OSError` sees it."""


def watch_file_system(monkeypatch, act) -> None:
    """Have `act(name)` called before each file-system call of a write."""

    def watched(name, real):
        def call(*args, **kwargs):
            act(name)
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(tempfile, "mkstemp", watched("mkstemp", tempfile.mkstemp))
    for name in ("open", "fdopen", "fsync", "replace"):
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))


def test_a_file_is_written_with_its_folders_and_everybody_can_read_it(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"first")
    assert path.read_bytes() == b"first"
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(path.parent.iterdir()) == [path]


def test_bytes_reach_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    calls, path = [], tmp_path / "file"
    watch_file_system(monkeypatch, calls.append)
    write_atomically(path, b"content")
    kept = [name for name in calls if name in ("mkstemp", "fsync", "replace")]
    assert kept == ["mkstemp", "fsync", "replace", "fsync"]  # the last one: the folder's entry


def test_what_reaches_the_disk_first_is_all_of_it(tmp_path, monkeypatch):
    path, sizes, fsync = tmp_path / "file", [], os.fsync

    def look(handle):
        sizes.append(os.fstat(handle).st_size)
        assert not path.exists() or len(sizes) == 2
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(path, bytes(100_000))
    assert sizes[0] == 100_000
    assert len(sizes) == 2


def test_the_temporary_file_lies_in_the_same_folder(tmp_path, monkeypatch):
    """Only within one file system can it be renamed."""
    seen, mkstemp = [], tempfile.mkstemp

    def look(*args, **kwargs):
        handle, name = mkstemp(*args, **kwargs)
        seen.append(Path(name))
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", look)
    write_atomically(tmp_path / "run" / "file", b"content")
    assert [path.parent for path in seen] == [tmp_path / "run"]
    assert seen[0].name.startswith(".writing-")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), Killed(), KeyboardInterrupt()],
    ids=["an error", "a kill", "Ctrl-C"],
)  # fmt: skip
def test_a_write_that_fails_anywhere_leaves_what_was_there(tmp_path, monkeypatch, error):
    path, failed_at = tmp_path / "file", []
    write_atomically(path, b"earlier")
    while True:
        left = list(range(len(failed_at) + 1))  # this many calls, the last of which fails

        def act(name, left=left):
            if left and left.pop() == 0:
                failed_at.append(name)
                raise error

        with monkeypatch.context() as m:
            watch_file_system(m, act)
            if len(failed_at) >= 5:  # the name is given: the file is the new one, but whole
                path.write_bytes(b"later")
            try:
                write_atomically(path, b"later")
                failed = False
            except type(error) as raised:
                failed = raised is error
        assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"
        if not failed:
            break
        renamed = failed_at.index("replace") + 1 if "replace" in failed_at else len(failed_at)
        assert path.read_bytes() == (b"earlier" if len(failed_at) <= renamed else b"later")
    assert set(failed_at) == {"mkstemp", "open", "fdopen", "fsync", "replace"}


def test_a_disk_that_fills_up_in_the_middle_leaves_the_earlier_file(tmp_path, monkeypatch):
    path, fdopen, written = tmp_path / "file", os.fdopen, []
    write_atomically(path, b"earlier")

    class Full(io.BufferedIOBase):
        def __init__(self, handle: int, mode: str) -> None:
            self.file = fdopen(handle, mode)

        def write(self, data: bytes) -> int:
            written.append(self.file.write(data[:1000]))
            self.file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self) -> None:
            self.file.close()
            super().close()

    monkeypatch.setattr(os, "fdopen", Full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, bytes(5000))
    assert written == [1000]
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"earlier"]


def test_what_killed_writes_left_behind_is_removed_and_a_write_at_work_is_not(tmp_path):
    old, new, other = tmp_path / ".writing-old", tmp_path / ".writing-new", tmp_path / "old"
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - ABANDONED - 5,) * 2)
    os.utime(new, (time.time() - ABANDONED + 60,) * 2)
    write_atomically(tmp_path / "file", b"content")
    assert ABANDONED == 600
    assert {p.name for p in tmp_path.iterdir()} == {".writing-new", "old", "file"}


def test_another_process_that_ends_its_write_meanwhile_is_no_trouble(tmp_path, monkeypatch):
    (tmp_path / ".writing-gone").write_bytes(b"")
    os.utime(tmp_path / ".writing-gone", (0, 0))
    unlink = Path.unlink

    def gone(path, missing_ok=False):
        if path.name == ".writing-gone":
            unlink(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", gone)
    write_atomically(tmp_path / "file", b"content")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("place", ["/proc/mnistlib/file", "/dev/null/mnistlib/file"])
def test_a_place_that_nobody_can_write_to_is_an_error(place):
    with pytest.raises(OSError, match="mnistlib"):
        write_atomically(Path(place), b"content")
