"""Where outputs and runs lie, and the one way in which files are written."""

import contextlib
import os
import tempfile
import time
from pathlib import Path

ABANDONED = 600  # seconds after which a temporary file cannot belong to a write still at work


def outputs_folder() -> Path:
    """Return `outputs` of the checkout that this package lies in, else of the working folder."""
    checkout = Path(__file__).resolve().parent.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()) / "outputs"


def runs_folder() -> Path:
    """Return where runs are written: `MNISTLIB_RUNS`, else `outputs/runs`, which git ignores."""
    return Path(os.environ.get("MNISTLIB_RUNS") or outputs_folder() / "runs")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, making its folder where there is none.

    The bytes go to a temporary file, to the disk, and only then to their name: a kill or a full
    disk at any moment leaves what was there before. What killed writes left behind is removed.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".writing-*"):
        with contextlib.suppress(OSError):  # another process may have just finished with it
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes files that only their owner can read
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name itself must reach the disk; only POSIX can and needs to
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
