"""The model card of an exported checkpoint; its text is `model_card.md` beside this file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

import onnx
import pandas as pd

from mnistlib import Budget, Config, load_checkpoint, load_model
from mnistlib.config import NOT_HASHED

from ..runs.ledger import read_results, runs_for
from ..runs.report import mean_with_interval
from ..runs.writers import one_network
from .calibrate import load_calibration

MEASURED = ["n", "correct", "changed", "largest_difference", "loss", "calibration_error"]


def model_card(checkpoint: Path, folder: Path | None = None) -> str:
    """Return the model card of a checkpoint.

    What was measured on images is read from the metadata of the ONNX files, so the text is the
    same wherever it is written.

    Args:
        checkpoint: file.
        folder: that of the exported files; by default that of the checkpoint.
    """
    content, cost = load_checkpoint(checkpoint), Budget(load_model(checkpoint))
    config, folder = Config(**content["config"]), folder or checkpoint.parent
    calibration, name, usual = load_calibration(checkpoint), config.recipe, asdict(Config())
    settings = {k: v for k, v in asdict(config).items() if v != usual[k] and k not in NOT_HASHED}
    measured = {file: _metadata(folder / file) for file in (f"{name}.onnx", f"{name}-int8.onnx")}
    names = (checkpoint.name, "calibration.json", *measured, f"{name}.safetensors", "draw.html")
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        content | asdict(config) | asdict(calibration),
        name=name,
        checkpoint=checkpoint.name,
        parameters=f"{cost.parameters:,}",
        multiply_accumulates=f"{cost.multiply_accumulates:,}",
        settings=_listed(settings),
        results=_results(config),
        measured_on=measured[f"{name}.onnx"]["measured_on"],
        measured=pd.DataFrame(measured).T[MEASURED].to_markdown(disable_numparse=True),
        fitted_on=_listed(calibration.twin or {}) or "none, both are defaults",
        robustness=_robustness(name),
        pictures=read_results("pictures").to_markdown(index=False, intfmt=","),
        runtimes=_runtimes(),
        files=_files([path for file in names if (path := folder / file).is_file()]),
    )


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _metadata(path: Path) -> dict[str, str]:
    return {prop.key: prop.value for prop in onnx.load(path).metadata_props}


def _results(config: Config) -> str:
    """Describe what the ledger says of a run and of its other seeds."""
    rows = runs_for(config).dropna(subset="test_accuracy")
    own = rows[rows["seed"] == config.seed]
    if own.empty:
        return "The ledger has no test results of this run."
    seen = one_network(own)
    mean = mean_with_interval(rows["test_accuracy"])
    return f"""- Test accuracy: {seen}.
- Test loss: {seen.loss:.4f} nats, without temperature.
- Mean test accuracy of this recipe over n = {len(rows)} seeds: {mean}."""


def _robustness(name: str) -> str:
    """Return the table of the recipe's network on changed test images."""
    rows = read_results("robustness").query("recipe == @name")
    seen = rows["severity"].map("{:g}: ".format) + rows["accuracy"].map("{:.2f}".format)
    cases = seen.groupby(rows["case"], sort=False).agg(", ".join)
    return cases.to_markdown(headers=["case", "severity: accuracy in percent"])


def _runtimes() -> str:
    """Return what `make runtimes` found in the ONNX files of `best`."""
    heads = ["runtime", "images", "float", "int8", "int8 right", "what to do"]
    rows = read_results("runtimes").convert_dtypes().astype(object).fillna("not read")
    return rows.to_markdown(index=False, intfmt=",", headers=heads)


def _files(paths: Sequence[Path]) -> str:
    """Return the table of files, each with its size and checksum."""
    sums = (sha256(path.read_bytes()).hexdigest() for path in paths)
    rows = [(f"`{p.name}`", p.stat().st_size, f"`{s}`") for p, s in zip(paths, sums, strict=True)]
    table = pd.DataFrame(rows, columns=["file", "bytes", "SHA-256"])
    return table.to_markdown(index=False, intfmt=",")
