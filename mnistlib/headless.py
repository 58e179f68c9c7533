"""Runs notebooks without a screen: parameters checked first, papermill, figures taken out."""

import ast
import base64
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat

from .config import Config, ConfigError, configure, outputs_folder, runs_folder
from .data import load_mnist
from .process import collected_interrupts

MARKER = "complete.json"


class Stopped(Exception):
    """Notebooks that a signal ended: `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks whose file names start with the given ones; all of them without names.

    Raises:
        ConfigError: a name fits no notebook.
    """
    known = sorted((outputs_folder().parent / "notebooks").glob("[0-9]*.ipynb"))
    if not known:
        raise ConfigError("there are no notebooks here; run this in a clone of the repository")
    chosen = []
    for name in names:
        fits = [p for p in known if p.name.startswith(Path(name).name)]
        if not fits:
            there = ", ".join(p.stem for p in known)
            raise ConfigError(f"there is no notebook {name!r}; there are {there}")
        chosen += fits
    return chosen or known


def check_parameters(notebooks: Sequence[Path], parameters: Mapping[str, Any]) -> None:
    """Refuse unknown or impossible parameters before a kernel starts; papermill only warns.

    Raises:
        ConfigError: no notebook has a parameter of that name, `Config` refuses its value, or it is
            of another type than the notebook's own value.
    """
    import papermill

    known: dict[str, Any] = {}
    for path in notebooks:
        known |= papermill.inspect_notebook(str(path))
    for name in parameters:
        if name not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"no notebook has a parameter {name!r}; there are {there}")
    settings = {f.name for f in fields(Config)} | {"recipe"}
    configure(**{k: v for k, v in parameters.items() if k in settings and v is not None})
    for name in parameters.keys() - settings:
        try:
            own = type(ast.literal_eval(known[name]["default"]))
        except ValueError:
            continue  # an expression: the cell itself will say what it takes
        fits = {int: (int,), float: (int, float), bool: (bool,)}.get(own)
        value = parameters[name]
        if fits and (not isinstance(value, fits) or (own is not bool and isinstance(value, bool))):
            raise ConfigError(
                f"{name} is {value!r}, but the notebook has {known[name]['default']} there: give "
                f"a value of type {own.__name__}"
            )


def run_notebooks(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Execute notebooks into a folder, with their checkpoints and figures; return the folder.

    A notebook gets its name there when it has ended, and `complete.json` is written last: what is
    there is whole. Ctrl-C and SIGTERM are passed on to the kernel, so that a training in it saves
    its checkpoint, and end the execution after the cell.

    Args:
        notebooks: paths.
        parameters: values for the cells tagged `parameters`, by name.
        folder: below `runs_folder()`; by default one named by the time.

    Raises:
        ConfigError: a parameter is unknown or cannot be, the folder lies elsewhere or another
            process is at work in it.
        Stopped: a signal ended it.
        papermill.PapermillExecutionError: a cell failed; its notebook is in the folder.
    """
    from filelock import FileLock, Timeout

    check_parameters(notebooks, parameters)
    top = runs_folder().resolve()
    folder = top / (folder or f"{datetime.now():%Y%m%d_%H%M%S}")
    if not folder.resolve().is_relative_to(top) or folder.resolve() == top:
        raise ConfigError(
            f"the folder {folder} is not below {top}, where runs go; name one there, or set "
            "MNISTLIB_RUNS"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / ".notebooks.lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"another process is at work in {folder}; name another folder") from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to ({error.strerror})") from None
    with held, _runs_in(folder):
        for left in (folder / MARKER, *folder.glob(".running-*.ipynb")):
            left.unlink(missing_ok=True)
        for number, path in enumerate(notebooks, 1):
            print(f"[{number}/{len(notebooks)}] {path.name}", file=sys.stderr, flush=True)
            _execute(path, parameters, folder)
        done = {"notebooks": [p.name for p in notebooks], "parameters": dict(parameters)}
        with _written(folder / MARKER) as part:
            part.write_text(json.dumps(done) + "\n", encoding="utf-8")
    return folder


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """Give a file to write that becomes `path` at the end, whole, whatever ends the writing."""
    part = path.with_name(f".running-{path.name}")
    try:
        yield part
    finally:
        if part.exists():
            os.replace(part, path)  # noqa: PTH105 - the atomic one on every platform


@contextmanager
def _runs_in(folder: Path) -> Iterator[None]:
    """Have kernels that are started now write their runs into a folder; they inherit the name."""
    usual = os.environ.get("MNISTLIB_RUNS")
    os.environ["MNISTLIB_RUNS"] = str(folder.resolve())
    try:
        yield
    finally:
        del os.environ["MNISTLIB_RUNS"]
        if usual is not None:
            os.environ["MNISTLIB_RUNS"] = usual


def _execute(notebook: Path, parameters: Mapping[str, Any], folder: Path) -> None:
    """Execute one notebook in a kernel that hears of Ctrl-C and SIGTERM."""
    import papermill
    from jupyter_client.manager import KernelManager

    own = papermill.inspect_notebook(str(notebook))
    kernel = KernelManager(kernel_name="python3")

    def pass_on(number: int) -> None:
        if kernel.has_kernel:  # in a session of its own, which no terminal's Ctrl-C reaches
            os.kill(kernel.provisioner.pid, signal.SIGINT)

    def stop(**_: object) -> None:
        if caught:
            raise Stopped(caught[0])

    with collected_interrupts(pass_on) as caught, _written(folder / notebook.name) as part:
        try:
            papermill.execute_notebook(
                str(notebook),
                str(part),
                {k: v for k, v in parameters.items() if k in own},
                cwd=str(notebook.parent),
                kernel_name="python3",
                km=kernel,
                on_cell_executed=stop,
                extra_arguments=["--log-level=ERROR"],
                progress_bar={"bar_format": "  {n_fmt}/{total_fmt} cells |{bar:30}| {elapsed}"},
            )
        except papermill.PapermillExecutionError:
            stop()  # an interrupted cell is no fault of its own
            raise
        finally:
            if kernel.has_kernel:
                kernel.shutdown_kernel(now=bool(caught))
    extract_figures(folder / notebook.name, folder / "figures")


def extract_figures(notebook: Path, folder: Path) -> list[Path]:
    """Write each picture of an executed notebook to `folder` as a PNG; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{notebook.stem}-*.png"):
        old.unlink()
    paths = []
    for cell in nbformat.read(notebook, as_version=4).cells:
        for output in cell.get("outputs", ()):
            if picture := output.get("data", {}).get("image/png"):
                paths.append(folder / f"{notebook.stem}-{len(paths) + 1}.png")
                paths[-1].write_bytes(base64.b64decode(picture))
    return paths


def clean_notebook(notebook: Path) -> None:
    """Take out what differs from run to run: papermill's traces, timings, machine's versions."""
    content = nbformat.read(notebook, as_version=4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in content.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
    nbformat.write(content, notebook)


def execute_in_place(notebooks: Sequence[Path]) -> None:
    """Execute the committed notebooks anew, clean them and take out their figures.

    Raises:
        ConfigError: only the embedded sample is here; committed outputs need the full MNIST.
    """
    if load_mnist().source != "mnist":
        raise ConfigError("committed notebooks need the full MNIST; set MNISTLIB_DATA")
    folder = run_notebooks(notebooks, {})
    for path in notebooks:
        clean_notebook(folder / path.name)
        os.replace(folder / path.name, path)  # noqa: PTH105 - the atomic one on every platform
        extract_figures(path, outputs_folder() / "figures")
