"""Runs notebooks with papermill: checks parameters, executes, extracts figures, summarises."""

import os
from ast import literal_eval
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import papermill
from nbconvert.preprocessors import ExtractOutputPreprocessor

from mnistlib import Config, ConfigError, Digits, MnistlibError, configure, load_mnist
from mnistlib.config import cast
from mnistlib.paths import outputs_folder, runs_folder, write_atomically

from .runs.report import describe

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


def read_parameters(notebooks: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with values of the types of their defaults, which must be literals.

    Checked before a kernel starts: papermill itself only warns of a name that no notebook has.

    Args:
        notebooks: paths.
        given: values by name, as text or of their own type.

    Raises:
        ConfigError: no notebook has a parameter of that name, or its value has another type or is
            one that `Config` refuses.
    """
    known = {k: v["default"] for p in notebooks for k, v in papermill.inspect_notebook(p).items()}
    if unknown := given.keys() - known.keys():
        there = ", ".join(known) or "none"
        raise ConfigError(f"no notebook has a parameter {min(unknown)!r}; there are {there}")
    settings = vars(Config()).keys()
    config = configure(**{k: v for k, v in given.items() if k in {*settings, "recipe"}})
    return {
        k: getattr(config, k) if k in settings else cast(k, v, type(literal_eval(known[k])))
        for k, v in given.items()
    }


def run_notebooks(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], folder: str | Path | None = None
) -> Path:
    """Execute notebooks into a folder, with their checkpoints and figures; return the folder.

    A notebook gets its final name when its execution has ended, so none is half written.

    Args:
        notebooks: paths.
        parameters: values for the cells tagged `parameters`, by name, as text or of their own type.
        folder: a folder, relative to `runs_folder()`; by default one named by the time.

    Raises:
        ConfigError: a parameter is unknown or not allowed, or the folder cannot be created.
        MnistlibError: a cell failed or its kernel died; the notebook is in the folder.
    """
    values = read_parameters(notebooks, parameters)
    target = (runs_folder() / (folder or f"{datetime.now():%Y%m%d_%H%M%S}")).resolve()
    try:
        # if a folder named by the time exists, another process is using it
        target.mkdir(parents=True, exist_ok=bool(folder))
    except OSError as error:
        raise ConfigError(f"{target} cannot be a folder ({error.strerror}); name another") from None
    with patch.dict(os.environ, MNISTLIB_RUNS=str(target)):  # kernels inherit it
        for path in notebooks:
            _execute(path, values, target)
            extract_figures(target / path.name, target / "figures")
    return target


def _execute(notebook: Path, values: Mapping[str, Any], folder: Path) -> None:
    own = {name: values[name] for name in papermill.inspect_notebook(notebook).keys() & values}
    part = folder / f".running-{notebook.name}"
    shown = {"desc": notebook.stem}
    try:
        papermill.execute_notebook(
            notebook, part, own, cwd=notebook.parent, progress_bar=shown, **PAPERMILL
        )
    except papermill.PapermillExecutionError as error:
        ours = error.ename in {kind.__name__ for kind in MnistlibError.__subclasses__()}
        what = f"cell {error.exec_count} of {notebook.name} failed: {error.ename}: {error.evalue}"
        raise MnistlibError(error.evalue if ours else what.splitlines()[0].rstrip(": ")) from None
    except RuntimeError as error:  # the kernel did not start, or died, e.g. for lack of memory
        raise MnistlibError(f"{notebook.name} was given up: {error}") from None
    finally:
        if part.exists():
            part.replace(folder / notebook.name)


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
    extract = ExtractOutputPreprocessor(extract_output_types={"image/png"})
    _, found = extract.preprocess(nbformat.read(notebook, as_version=4), {"outputs": {}})
    for number, picture in enumerate(found["outputs"].values(), 1):
        write_atomically(folder / f"{notebook.stem}-{number}.png", picture)


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
