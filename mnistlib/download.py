"""Fetches MNIST into the cache, in a process of its own that can be stopped when it hangs."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

STALLED = 30.0  # seconds without a new byte after which a download is given up
RETRY_AFTER = 600.0  # seconds for which a failed download is not tried again
# nothing inside a process can stop a name look-up that hangs
COMMAND = "import sys, torchvision; torchvision.datasets.MNIST(sys.argv[1], download=True)"
WRITERS_COMMAND = (
    "import sys; from torchvision.datasets import QMNIST, utils; "
    "url, md5 = QMNIST.resources['train'][1]; "
    "utils.download_and_extract_archive(url, sys.argv[1], md5=md5)"
)


def cache_folder() -> Path:
    """Return where downloads are kept: `mnistlib` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "mnistlib"


def download(cache: Path, patient: bool = False) -> None:
    """Fetch the four files with torchvision; given up after 30 s without a new byte.

    A patient caller does not wait again for a download that failed in the last ten minutes:
    four notebooks in a row would otherwise hang four times.

    Raises:
        OSError: what went wrong, in a sentence.
    """
    failed = cache / "download-failed"
    if patient and failed.is_file() and time.time() - failed.stat().st_mtime < RETRY_AFTER:
        raise OSError(f"{failed.read_text()} (it is tried again after ten minutes)")
    cache.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(cache / "MNIST", ignore_errors=True)  # torchvision would keep damaged files
    print("Downloading MNIST (11 MB)", file=sys.stderr, flush=True)
    try:
        _run([sys.executable, "-c", COMMAND, str(cache)], cache)
    except OSError as error:
        failed.write_text(str(error))
        raise
    failed.unlink(missing_ok=True)


def download_writers(cache: Path) -> None:
    """Fetch QMNIST's table of writers from torchvision's address, with the same patience.

    Raises:
        OSError: what went wrong, in a sentence.
    """
    folder = cache / "QMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-c", WRITERS_COMMAND, str(folder)], folder)


def _run(command: list[str], folder: Path) -> None:
    """Run a command for as long as the folder it writes to keeps growing."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=quiet, stderr=subprocess.PIPE, text=True) as child:
        now, size, since = 0, -1, time.monotonic()
        try:
            while True:
                try:
                    errors = child.communicate(timeout=0.5)[1]
                    break
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(FileNotFoundError):  # a file was moved meanwhile
                        now = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
                    if now != size:
                        size, since = now, time.monotonic()
                    if time.monotonic() - since > STALLED:
                        waited = f"{STALLED:g} s without a new byte"
                        raise TimeoutError(f"the download was given up after {waited}") from None
        finally:
            child.kill()
    if child.returncode:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise ConnectionError(f"cannot be downloaded: {last}")
