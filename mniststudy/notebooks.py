"""Runs notebooks with papermill: checks parameters, executes, extracts figures, summarises."""

import ast
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import quote

import nbformat
import papermill
from nbconvert.preprocessors import ExtractOutputPreprocessor
from papermill.utils import nb_kernel_name, nb_language
from tqdm.auto import tqdm

from mnistlib import Config, ConfigError, Digits, MnistlibError, configure, load_mnist
from mnistlib.checkpoint import load_checkpoint
from mnistlib.config import DEFAULT_RECIPE, cast, read_settings
from mnistlib.distill import pool_folder
from mnistlib.paths import folder_from, outputs_folder, runs_folder, write_atomically

from .runs.describe import describe

# At the default log level an interrupted kernel prints its own traceback, and figures are PNGs
# whatever a profile of IPython says
KERNEL = ["--log-level=CRITICAL", "--InlineBackend.figure_formats={'png'}"]


def kernel_environment(runs: Path) -> dict[str, str]:
    """Return what kernels must know: absolute folders, as they may run elsewhere, and to draw."""
    told = {"MNISTLIB_RUNS": str(runs), "MNISTLIB_POOLS": str(pool_folder(""))}
    data = folder_from("MNISTLIB_DATA")
    told |= {"MNISTLIB_DATA": str(data)} if data else {}
    return told | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def open_lab() -> None:
    """Start JupyterLab on the notebooks; its root is the clone, where their pictures lie."""
    from jupyterlab.labapp import main

    os.environ.update(kernel_environment(runs_folder()))
    root = outputs_folder().parent
    main([f"--ServerApp.root_dir={root}", "--LabApp.default_url=/lab/tree/notebooks"])


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """Return the notebooks of the given numbers or beginnings of file names; without any, all.

    Raises:
        ConfigError: no notebook has such a name.
    """
    known = sorted((outputs_folder().parent / "notebooks").glob("[0-9]*.ipynb"))
    there = ", ".join(p.stem for p in known) or "none: run this in a clone of the repository"
    chosen = []
    for name in names or ("",):
        start = f"{int(name):02}_" if name.isdecimal() else Path(name).name
        chosen += (fits := [p for p in known if p.name.startswith(start)])
        if not fits:
            raise ConfigError(f"there is no notebook {name!r}; there are {there}")
    return list(dict.fromkeys(chosen))


def _defaults(notebook: Path) -> dict[str, Any]:
    """Return the parameters of a notebook with their defaults, those that are literals.

    Read as Python; papermill reads lines, and misses or cuts some (findings).
    """
    try:
        content = nbformat.read(notebook, as_version=4)
        nb_kernel_name(content)  # raises ValueError if there is none
        if (language := nb_language(content)) != "python":
            raise ValueError(f"its language is {language}")
        tagged = (c for c in content.cells if "parameters" in c.metadata.get("tags", ()))
        cell = next(tagged, nbformat.v4.new_code_cell())
        found = {}
        for line in ast.parse(cell.source).body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", 0)]
            for target in targets:
                with suppress(ValueError):  # it is computed
                    if isinstance(target, ast.Name) and line.value:
                        found[target.id] = ast.literal_eval(line.value)
    except (ValueError, TypeError, AttributeError, SyntaxError, nbformat.ValidationError) as error:
        remedy = "save it in JupyterLab with the kernel Python 3"
        raise ConfigError(f"{notebook.name} cannot be executed ({error}); {remedy}") from error
    return found


def read_parameters(notebooks: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with values of the types of their defaults, which must be literals.

    Checked before a kernel starts: papermill itself only warns of a name that no notebook has.

    Args:
        notebooks: paths.
        given: values by name, as text or of their own type.

    Raises:
        ConfigError: a notebook is damaged or not in Python, none has a parameter of that name, or
            its value has another type or is one that `Config` refuses.
    """
    known = {name: default for path in notebooks for name, default in _defaults(path).items()}
    if unknown := given.keys() - known.keys():
        there = ", ".join(known) or "none"
        raise ConfigError(f"no notebook has a parameter {min(unknown)!r}; there are {there}")
    fields = vars(Config()).keys()
    settings = {k: v for k, v in given.items() if k in fields}
    settings |= read_settings(given.get("settings", ""))
    config = configure(given.get("recipe", DEFAULT_RECIPE), **settings)
    for name in given.keys() - fields:
        if (kind := type(known[name])) not in (bool, int, float, str):
            raise ConfigError(f"{name} is a {kind.__name__}, which cannot be given; edit the cell")
    return {
        k: getattr(config, k) if k in fields else cast(k, v, type(known[k]))
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
    with patch.dict(os.environ, kernel_environment(target)):
        for path in notebooks:
            _execute(path, values, target)
            extract_figures(target / path.name, target / "figures")
    return target


class Epochs:
    """Passes on the table of a training while its cell runs, and nothing else that cells print."""

    def write(self, text: str) -> None:
        """Write the lines of `text` that are of such a table, above the progress bar."""
        for line in text.splitlines():
            if re.match(r"Epoch  Train Loss| {0,4}\d+ +[\d.]+ .*%", line):
                tqdm.write(line, sys.stderr)

    def flush(self) -> None:
        """Do nothing: a line is written at once."""


def _execute(notebook: Path, values: Mapping[str, Any], folder: Path) -> None:
    own = {name: values[name] for name in _defaults(notebook).keys() & values}
    part = folder / f".running-{notebook.name}"
    shown = {"desc": notebook.stem}
    try:
        # in the folder of the caller, who may name files
        papermill.execute_notebook(
            notebook, part, own, kernel_name="python3", progress_bar=shown, extra_arguments=KERNEL,
            stdout_file=Epochs(),
        )  # fmt: skip
    except papermill.PapermillExecutionError as error:
        ours = error.ename in {kind.__name__ for kind in MnistlibError.__subclasses__()}
        what = f"cell {error.exec_count} of {notebook.name} failed: {error.ename}: {error.evalue}"
        raise MnistlibError(error.evalue if ours else what.splitlines()[0].rstrip(": ")) from None
    except RuntimeError as error:  # the kernel did not start, or died, e.g. for lack of memory
        raise MnistlibError(f"{notebook.name} was given up: {error}") from None
    finally:
        if part.exists():
            part.write_bytes(_relinked(part, "..", _clone_from(folder)))
            part.replace(folder / notebook.name)


def _clone_from(folder: Path) -> str:
    """Return the way from a folder to the clone, as links have it."""
    return quote(Path(os.path.relpath(outputs_folder().parent, folder)).as_posix())


def _relinked(notebook: Path, old: str, new: str) -> bytes:
    """Return a notebook whose links and pictures lead to the clone from another folder."""
    text = notebook.read_text(encoding="utf-8")
    return re.sub(rf'(\]\(|src=\\"){re.escape(old)}/', rf"\g<1>{new}/", text).encode()


def summarise(folder: Path, digits: Digits) -> str:
    """Describe a folder of executed notebooks: the longest of their trainings, and all files."""
    folder = folder.relative_to(here) if folder.is_relative_to(here := Path.cwd()) else folder
    note = "ON THE EMBEDDED SAMPLE of 5,000 digits, not on MNIST: see the warning above"
    lines = [note, ""] if digits.source == "sample" else []
    took = {
        path: load_checkpoint(path)["training"]["progress"]["seconds"]
        for path in sorted(folder.rglob("mnist_model_*.pth"))
    }
    trained = sorted(took, key=lambda path: -took[path])
    lines += [describe(path, digits, True) for path in trained[:1]]
    lines += [f"also        {path}" for path in trained[1:]]
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
        if "check" in cell.metadata.get("tags", ()):  # shown closed, and not on the site
            cell.metadata["jupyter"] = {"source_hidden": True}
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
        write_atomically(path, _relinked(folder / path.name, _clone_from(folder), ".."))
        extract_figures(path, outputs_folder() / "figures")
