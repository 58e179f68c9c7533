"""Runs notebooks without a screen: parameters checked first, papermill, figures taken out."""

import base64
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat

from .checkpoint import load_checkpoint, load_model
from .config import Config, ConfigError, configure, outputs_folder, runs_folder
from .data import Digits, load_mnist
from .evaluate import evaluate


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
        ConfigError: no notebook has a parameter of that name, or `Config` refuses its value.
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


def run_notebooks(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Execute notebooks into a folder, with their checkpoints and figures; return the folder.

    Raises:
        ConfigError: a parameter is unknown or cannot be.
        papermill.PapermillExecutionError: a cell failed; its notebook is in the folder.
    """
    check_parameters(notebooks, parameters)
    folder = folder or runs_folder() / f"{datetime.now():%Y%m%d_%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    with _runs_in(folder):
        _execute(notebooks, parameters, folder)
    return folder


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


def _execute(notebooks: Sequence[Path], parameters: Mapping[str, Any], folder: Path) -> None:
    import papermill

    for number, path in enumerate(notebooks, 1):
        print(f"[{number}/{len(notebooks)}] {path.name}", file=sys.stderr, flush=True)
        own = papermill.inspect_notebook(str(path))
        papermill.execute_notebook(
            str(path),
            str(folder / path.name),
            {k: v for k, v in parameters.items() if k in own},
            cwd=str(path.parent),
            kernel_name="python3",
            extra_arguments=["--log-level=ERROR"],
            progress_bar={"bar_format": "  {n_fmt}/{total_fmt} cells |{bar:30}| {elapsed}"},
        )
        extract_figures(folder / path.name, folder / "figures")


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


def summarise(folder: Path, digits: Digits, began: float) -> str:
    """Say what a folder of executed notebooks holds: the trained networks and where all is."""
    lines = []
    if digits.source == "sample":
        lines += ["ON THE EMBEDDED SAMPLE of 5,000 digits, not on MNIST: see the warning above", ""]
    for path in sorted(folder.rglob("mnist_model_*.pth")):
        lines += [f"{name:12}{text}" for name, text in describe(path, digits)]
        lines.append(f"{'checkpoint':12}{path}")
    figures = list((folder / "figures").glob("*.png"))
    lines.append(f"{'figures':12}{folder / 'figures'} ({len(figures)} pictures)")
    lines += [f"{'notebook':12}{path}" for path in sorted(folder.glob("*.ipynb"))]
    lines.append(f"{'all in':12}{time.time() - began:.0f} s")
    return "\n".join(lines)


def describe(checkpoint: Path, digits: Digits) -> list[tuple[str, str]]:
    """Evaluate a checkpoint on the validation images of its split and on the test set."""
    content = load_checkpoint(checkpoint)
    model, config = load_model(checkpoint), Config(**content["config"])
    n = sum(p.numel() for p in model.parameters())
    seconds = content["training"]["seconds"]
    rows = [
        ("data", repr(digits)),
        ("network", f"{config.model}, {n:,} parameters"),
        ("training", f"{config.recipe}, seed {config.seed}, {len(content['history'])} of "
         f"{config.epochs} epochs in {seconds:.0f} s on {content['versions'].get('device')}"),
    ]  # fmt: skip
    if content["source"] != digits.source:
        rows.append(("note", f"trained on the source {content['source']!r}, so validation is out"))
    elif len(ids := digits.split(config.split)[1]):
        seen = evaluate(model, digits.train_images[ids], digits.train_labels[ids])
        rows.append(("validation", repr(seen)))
    if digits.test_images is not None:
        rows.append(("test", repr(evaluate(model, digits.test_images, digits.test_labels))))
    else:
        rows.append(("test", "none: the embedded sample has no test set"))
    return rows
