"""The folders of outputs and runs, and the atomic writing of files."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

ABANDONED = 600  # seconds after which a temporary file cannot belong to a running write


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
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp creates files that only their owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name must reach the disk, too; only POSIX needs this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
