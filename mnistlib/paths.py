"""The folders of outputs and runs, and the atomic writing of files."""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

ABANDONED = 600  # seconds after which a temporary file cannot belong to a running write
SILENT = 3  # seconds that a lock is waited for before anything is said


def outputs_folder() -> Path:
    """Return `outputs` in the clone that holds this package, else in the working folder."""
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "outputs"


def folder_from(variable: str) -> Path | None:
    """Return the folder that an environment variable names, absolute and without `~`, or None."""
    named = os.environ.get(variable)
    return Path(named).expanduser().absolute() if named else None


def runs_folder() -> Path:
    """Return the folder of runs: `MNISTLIB_RUNS`, else `outputs/runs`, which git ignores."""
    return folder_from("MNISTLIB_RUNS") or outputs_folder() / "runs"


@contextlib.contextmanager
def only_here(folder: Path, name: str, error: type[Exception], wait: bool = True) -> Iterator[None]:
    """Hold a lock of a folder, so that one process at a time does what it is for.

    Args:
        folder: made if missing.
        name: file of the lock, which stays.
        error: raised if the folder cannot be used, or another process holds the lock and is not
            waited for.
        wait: until another process lets go; if that takes long, it is said on standard error.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name, timeout=SILENT if wait else 0)
        try:
            held = lock.acquire()
        except Timeout:
            if not wait:
                raise
            print(f"waiting for another process that is at work in {folder}", file=sys.stderr)
            held = lock.acquire(timeout=-1)
        with held:
            yield
    except BrokenPipeError:  # who reads what is printed has ended; the folder has no fault
        raise
    except OSError as fault:  # a Timeout, too
        why = fault.strerror or "another process is at work in it"
        remedy = "wait or free space there, or name another folder"
        raise error(f"{folder} cannot be used now ({why}); {remedy}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file completely or not at all; its folder is created if missing.

    The bytes go to a temporary file, which is flushed to the disk and then renamed. A kill or a
    full disk at any moment leaves the old file intact. Temporary files of killed writes are
    removed.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".writing-*"):
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:  # by mkstemp it would not get the user's umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name must reach the disk, too; only POSIX needs this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
