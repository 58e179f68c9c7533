"""Runs notebooks with papermill: checks parameters, executes, extracts figures, summarises."""

import ast
import base64
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill

from mnistlib import Config, ConfigError, Digits, MnistlibError, configure, load_mnist
from mnistlib.paths import outputs_folder, runs_folder, write_atomically

from .runs.report import describe

NUMBERS = {bool: (bool,), int: (int,), float: (int, float)}  # types accepted for each type
# at the default log level an interrupted kernel prints its own traceback
PAPERMILL: dict[str, Any] = {"kernel_name": "python3", "extra_arguments": ["--log-level=CRITICAL"]}


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks whose file names start with the given names; without names, all.

    Raises:
        ConfigError: no notebook has such a name.
    """
    known = sorted((outputs_folder().parent / "notebooks").glob("[0-9]*.ipynb"))
    there = ", ".join(p.stem for p in known) or "none: run this in a clone of the repository"
    chosen = []
    for name in names or ("",):
        chosen += (fits := [p for p in known if p.name.startswith(Path(name).name)])
        if not fits:
            raise ConfigError(f"there is no notebook {name!r}; there are {there}")
    return chosen


def read_value(text: str) -> Any:
    """Read a parameter's value: null, true, false, a Python literal, else text."""
    words = {"null": None, "true": True, "false": False}
    try:
        return words[text] if text in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check_parameters(notebooks: Sequence[Path], parameters: Mapping[str, Any]) -> None:
    """Check parameters before a kernel starts; papermill itself only warns of unknown ones.

    Raises:
        ConfigError: no notebook has a parameter of that name, `Config` refuses its value, or the
            notebook's default is a number and the value is not.
    """
    known: dict[str, Any] = {}
    for path in notebooks:
        known |= papermill.inspect_notebook(path)
    if unknown := parameters.keys() - known.keys():
        there = ", ".join(known) or "none"
        raise ConfigError(f"no notebook has a parameter {min(unknown)!r}; there are {there}")
    settings = {*vars(Config()), "recipe"}
    configure(**{k: v for k, v in parameters.items() if k in settings and v is not None})
    for name in parameters.keys() - settings:
        value, kind = parameters[name], type(read_value(known[name]["default"]))
        if kind in NUMBERS and type(value) not in NUMBERS[kind]:
            raise ConfigError(f"{name} is {value!r}, but it must be of type {kind.__name__}")


def run_notebooks(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], folder: str | Path | None = None
) -> Path:
    """Execute notebooks into a folder, with their checkpoints and figures; return the folder.

    A notebook gets its final name when its execution has ended, so none is half written.

    Args:
        notebooks: paths.
        parameters: values for the cells tagged `parameters`, by name.
        folder: a folder inside `runs_folder()`; by default one named by the time.

    Raises:
        ConfigError: a parameter is unknown or not allowed, or the folder is not inside
            `runs_folder()` or cannot be created.
        MnistlibError: a cell failed or its kernel died; the notebook is in the folder.
    """
    check_parameters(notebooks, parameters)
    top = runs_folder().resolve()
    target = (top / (folder or f"{datetime.now():%Y%m%d_%H%M%S}")).resolve()
    try:
        if top not in target.parents:
            raise NotADirectoryError(0, "it lies elsewhere")
        # if a folder named by the time exists, another process is using it
        target.mkdir(parents=True, exist_ok=bool(folder))
    except OSError as error:
        what = f"{target} cannot be the folder ({error.strerror})"
        raise ConfigError(f"{what}; name one below {top}, or set MNISTLIB_RUNS") from None
    with patch.dict(os.environ, MNISTLIB_RUNS=str(target)):  # kernels inherit it
        for path in notebooks:
            _execute(path, parameters, target)
    return target


def _execute(notebook: Path, parameters: Mapping[str, Any], folder: Path) -> None:
    own = papermill.inspect_notebook(notebook)
    given = {name: value for name, value in parameters.items() if name in own}
    part, whole = folder / f".running-{notebook.name}", folder / notebook.name
    print(notebook.name, file=sys.stderr)
    try:
        papermill.execute_notebook(notebook, part, given, cwd=notebook.parent, **PAPERMILL)
    except papermill.PapermillExecutionError as error:
        ours = error.ename in {kind.__name__ for kind in MnistlibError.__subclasses__()}
        what = f"cell {error.exec_count} of {notebook.name} failed: {error.ename}: {error.evalue}"
        raise MnistlibError(error.evalue if ours else what.splitlines()[0].rstrip(": ")) from None
    except RuntimeError as error:  # the kernel did not start, or died, e.g. for lack of memory
        raise MnistlibError(f"{notebook.name} was given up: {error}") from None
    finally:
        if part.exists():
            part.replace(whole)
    extract_figures(whole, folder / "figures")


def summarise(folder: Path, digits: Digits) -> str:
    """Describe a folder of executed notebooks: the trained networks and all files."""
    folder = folder.relative_to(here) if folder.is_relative_to(here := Path.cwd()) else folder
    note = "ON THE EMBEDDED SAMPLE of 5,000 digits, not on MNIST: see the warning above"
    lines = [note, ""] if digits.source == "sample" else []
    lines += [describe(path, digits, True) for path in sorted(folder.rglob("mnist_model_*.pth"))]
    figures = list((folder / "figures").glob("*.png"))
    lines.append(f"figures     {folder / 'figures'} ({len(figures)} pictures)")
    lines += [f"notebook    {path}" for path in sorted(folder.glob("*.ipynb"))]
    return "\n".join(lines)


def extract_figures(notebook: Path, folder: Path) -> None:
    """Write each figure of an executed notebook to `folder` as a PNG and remove earlier ones."""
    for old in folder.glob(f"{notebook.stem}-*.png"):
        old.unlink()
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    pictures = [o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    for number, picture in enumerate(pictures, 1):
        write_atomically(folder / f"{notebook.stem}-{number}.png", base64.b64decode(picture))


def clean_notebook(notebook: Path) -> None:
    """Remove what differs from run to run: metadata of papermill, timings, what libraries log."""
    content = nbformat.read(notebook, as_version=4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    for cell in content.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == "tags" and v}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    nbformat.write(content, notebook)


def execute_in_place(notebooks: Sequence[Path]) -> None:
    """Execute the committed notebooks again, clean them and extract their figures.

    If one of them fails, none is changed.

    Raises:
        ConfigError: only the embedded sample is available.
        MnistlibError: as for `run_notebooks`.
    """
    if load_mnist().source != "mnist":
        raise ConfigError("committed notebooks need the full MNIST; set MNISTLIB_DATA")
    folder = run_notebooks(notebooks, {})
    for path in notebooks:
        clean_notebook(folder / path.name)
        write_atomically(path, (folder / path.name).read_bytes())
        extract_figures(path, outputs_folder() / "figures")
