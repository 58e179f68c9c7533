"""The command `export`: a checkpoint in other formats, its model card, and how fast it answers."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from string import Template
from timeit import Timer
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from mnistlib import Budget, CheckpointError, Config, ConfigError, Digits, Evaluation, ReferenceNet
from mnistlib.checkpoint import load_checkpoint, load_model
from mnistlib.config import NOT_HASHED
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder, runs_folder, write_atomically

from ..runs.ledger import append_rows, commit, read_results, runs_for
from ..runs.stats import mean_interval
from . import formats

LARGEST_DIFFERENCE = 1e-5  # of a probability, between torch and the float ONNX file
LATENCY_COLUMNS = (
    "go", "network", "runtime", "batch", "repetition", "calls", "seconds", "threads", "parameters",
    "multiply_accumulates", "bytes", "device", "torch", "onnxruntime", "commit",
)  # fmt: skip
SOURCES = {
    "mnist": "MNIST has 60,000 training and 10,000 test images.",
    "sample": "The embedded sample has 5,000 training images of MNIST and no test images.",
}
SPLITS = {
    "none": "The network was trained on all training images; none were held out.",
    "writers": "All images of some of the writers were held out for validation.",
    "random": "Some of the training images, drawn at random, were held out for validation.",
    "last": "The last of the training images were held out for validation.",
}
TAUGHT = """
It was trained by distillation: it saw fixed augmented views of them and learned the mean answers of
other networks, its teachers; `outputs/results/pools.csv` lists the teachers of a pool."""


def read_calibration(checkpoint: Path) -> dict[str, Any]:
    """Return `calibration.json` beside a checkpoint, or defaults if there is none that is its.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint.with_name("calibration.json")
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        remedy = "write it again with mnist calibrate"
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from None
    if found.get("checkpoint") != checkpoint.name:
        found = {"temperature": 1.0, "sure": 0.8, "evidence": None}
    return found


def export(checkpoint: Path, digits: Digits, folder: Path | None = None) -> list[Path]:
    """Write a checkpoint in other formats, with a model card and a page; return the files.

    Temperature and thresholds are those of `calibration.json` beside the checkpoint. The page is
    written for `ReferenceNet` only. Nothing is written if the ONNX file does not answer as torch.

    Args:
        checkpoint: file of a finished run.
        digits: digits to calibrate the integers on, and to measure the files on: the test images,
            or of the sample the training images.
        folder: by default that of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or a file differs from it or cannot be written.
        ConfigError: the extra `export` is not installed.
    """
    formats.check_extra()
    content, network = load_checkpoint(checkpoint), load_model(checkpoint)
    calibration, config = read_calibration(checkpoint), Config(**content["config"])
    folder, name = folder or checkpoint.parent, config.recipe
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    logits = predict_logits(network, images)
    expected = (logits / calibration["temperature"]).softmax(1).numpy()
    parameters = sum(p.numel() for p in network.parameters())
    about = {"name": name, "model": config.model, "parameters": parameters, "seed": config.seed}
    about |= {"config_hash": content["config_hash"], "temperature": calibration["temperature"]}
    plain = formats.to_onnx(network, calibration["temperature"])
    integers = formats.to_int8(plain, digits.train_images)
    where = f"{len(images):,} {'test' if digits.test else 'training'} images"
    files = {f"{name}.safetensors": formats.to_safetensors(network, about)}
    for file, part in ((f"{name}.onnx", plain), (f"{name}-int8.onnx", integers)):
        measured = {"measured_on": where} | formats.measure(part, images, labels, expected)
        files[file] = formats.with_metadata(part, about | measured)
        print(f"{file}: {measured}")
        far = float(measured["largest_difference"]) > LARGEST_DIFFERENCE
        if part is plain and (measured["changed"] or far):
            fault = f"as ONNX answers otherwise than torch ({measured}), so nothing was written"
            raise CheckpointError(f"{checkpoint} {fault}; use the releases of requirements.lock")
    if isinstance(network, ReferenceNet):
        files["draw.html"] = formats.to_page(network, about | calibration, digits).encode()
    try:
        for file, raw in files.items():
            write_atomically(folder / file, raw)
        card = model_card(checkpoint, calibration, folder)
        write_atomically(folder / "MODEL_CARD.md", card.encode())
    except OSError as error:
        fault = f"{folder} cannot be written to ({error.strerror}); name another folder"
        raise CheckpointError(fault) from None
    return [folder / file for file in (*files, "MODEL_CARD.md")]


def model_card(
    checkpoint: Path,
    calibration: Mapping[str, Any],
    folder: Path | None = None,
    ledger: Path | None = None,
) -> str:
    """Return the model card of a checkpoint; its text is `model_card.md` beside this file.

    What was measured on images is read from the metadata of the ONNX files, so the text is the
    same wherever it is written.

    Args:
        checkpoint: file.
        calibration: content of `calibration.json`.
        folder: that of the exported files; by default that of the checkpoint.
        ledger: folder of the ledger; by default that of the committed ledger.
    """
    content, cost = load_checkpoint(checkpoint), Budget(load_model(checkpoint))
    config, folder = Config(**content["config"]), folder or checkpoint.parent
    ledger, name, usual = ledger or outputs_folder() / "results", config.recipe, asdict(Config())
    settings = {k: v for k, v in asdict(config).items() if v != usual[k] and k not in NOT_HASHED}
    measured = {file: _metadata(folder / file) for file in (f"{name}.onnx", f"{name}-int8.onnx")}
    names = (checkpoint.name, "calibration.json", *measured, f"{name}.safetensors", "draw.html")
    there = [path for path in (folder / file for file in names) if path.is_file()]
    page = "`draw.html` is a page to draw digits on; open it in a browser, also offline."
    if folder / "draw.html" not in there:
        page = "There is no page to draw on: it is made for the network `reference` only."
    text = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        {"name": name, "model": config.model, "checkpoint": checkpoint.name, "seed": config.seed},
        config_hash=content["config_hash"],
        parameters=f"{cost.parameters:,}",
        multiply_accumulates=f"{cost.multiply_accumulates:,}",
        data=f"{SOURCES[content['source']]}\n{SPLITS[config.split]}{TAUGHT if config.pool else ''}",
        settings=", ".join(f"{key} {value}" for key, value in settings.items()),
        results=_results(config, ledger),
        measured_on=measured[f"{name}.onnx"]["measured_on"],
        accuracy=markdown(pd.DataFrame([_accuracy(*item) for item in measured.items()])),
        temperature=calibration["temperature"],
        calibration=_calibration(calibration),
        robustness=_robustness(name, ledger),
        files=markdown(pd.DataFrame([_file(path) for path in there])),
        page=page,
    )


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown, numbers to the right."""
    marks = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in table.dtypes]
    rows = [list(table.columns), marks, *table.astype(object).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(_text, row)) + " |" for row in rows)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _metadata(path: Path) -> dict[str, str]:
    import onnx

    return {prop.key: prop.value for prop in onnx.load(path).metadata_props}


def _results(config: Config, ledger: Path) -> str:
    """Describe what the ledger says of a run and of its other seeds."""
    rows = runs_for(config, ledger).dropna(subset="test_accuracy")
    if config.seed not in [*rows["seed"]]:
        return "The ledger has no test results of this run."
    run = rows[rows["seed"] == config.seed].iloc[0]
    n, accuracy = int(run["n_test"]), list(rows["test_accuracy"])
    seen = Evaluation(run["test_loss"], round(run["test_accuracy"] * n / 100), n)
    text = f"- Test accuracy: {seen}.\n- Test loss: {seen.loss:.4f} nats, without temperature.\n"
    listed = read_results("misread", ledger).query("config_hash == @run.config_hash")
    for images in listed["wrong"]:
        wrong = [int(i) for i in images.split()]
        first, certain = sum(i < n // 2 for i in wrong), {*wrong} - Digits.DISPUTED
        text += f"- Errors: {first} in the first half of the test images, {len(wrong) - first} in "
        text += f"the second, which other writers wrote; {len(certain)} on undisputed labels.\n"
    if len(accuracy) > 1:
        mean, low, high = mean_interval(accuracy)
        text += f"- Mean test accuracy of this recipe over n = {len(accuracy)} seeds: "
        text += f"{mean:.2f} % [{low:.2f} to {high:.2f}].\n"
    return text.rstrip()


def _accuracy(file: str, about: Mapping[str, str]) -> dict[str, str]:
    """Return the row of an ONNX file in the table of results."""
    return {
        "file": f"`{file}`",
        "correct": f"{100 * int(about['correct']) / int(about['n']):.2f} %",
        "other digits than torch": about["changed"],
        "largest difference of a probability": f"{float(about['largest_difference']):g}",
        "loss": about["loss"],
        "calibration error": f"{about['calibration_error']} points",
    }


def _file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256(raw := path.read_bytes()).hexdigest()
    return {"file": f"`{path.name}`", "bytes": len(raw), "SHA-256": f"`{digest}`"}


def _calibration(calibration: Mapping[str, Any]) -> str:
    """Describe thresholds and their origin in sentences."""
    text = f"An answer whose largest probability is below {calibration['sure']} is *not sure*.\n"
    if calibration["evidence"] is not None:
        text += "An image whose logsumexp(`logits`), without temperature, is below "
        text += f"{calibration['evidence']} is *not a digit*.\n"
    if not (twin := calibration.get("twin")):
        return text + "These numbers are defaults: they were not fitted."
    text += "Temperature and threshold were fitted on the validation images of a second network, "
    text += "which was trained by the same recipe with images held out"
    text += ", from teachers that had not seen them either" if twin.get("pool") else ""
    text += ", and are used unchanged "
    return text + f"({', '.join(f'{key} {value}' for key, value in twin.items())})."


def _robustness(name: str, ledger: Path) -> str:
    """Return the tables that other studies made of the recipe's released network, if any."""
    text = ""
    if (ledger / "robustness.csv").is_file():
        table = read_results("robustness", ledger).query("recipe == @name")
        seen = table["severity"].map("{:g}: ".format) + table["accuracy"].map("{:.2f}".format)
        rows = [(case, ", ".join(own)) for case, own in seen.groupby(table["case"], sort=False)]
        shown = markdown(pd.DataFrame(rows, columns=["case", "severity: accuracy in percent"]))
        text += f"Changed test images (notebook 10), n = {table['n'].max():,} each:\n\n{shown}\n\n"
    if (ledger / "pictures.csv").is_file():
        shown = markdown(read_results("pictures", ledger))
        text += "Synthetic pictures (notebook 11); *wrong* is a wrong digit, or one where there is "
        text += "none, *confident* the same with a probability of 90 % or more; no page without a "
        text += f"digit counts as right:\n\n{shown}\n\n"
    return f"## Robustness\n\n{text}" if text else ""


def latency(
    networks: Mapping[str, nn.Module],
    digits: Digits,
    folder: Path | None = None,
    repetitions: int = 5,
) -> Path:
    """Time answers through torch and onnxruntime and append rows to `latency.csv`; return its path.

    One image and a thousand at a time, uint8, on one thread, which torch keeps; in rounds that go
    through all networks and runtimes.

    Args:
        networks: by name, each taking uint8 pixels `(N, 1, 28, 28)`.
        digits: digits to calibrate the integers on.
        folder: of the ledger; by default `runs_folder()`.
        repetitions: the rounds.

    Raises:
        ConfigError: the extra `export` is not installed, or repetitions is below 1.
        LedgerError: `latency.csv` is another table, or cannot be written.
    """
    formats.check_extra()
    if repetitions < 1:
        raise ConfigError(f"--repetitions is {repetitions}, but it must be at least 1")
    import onnxruntime

    path = (folder or runs_folder()) / "latency.csv"
    append_rows(path, LATENCY_COLUMNS, [])  # another table is refused before the work
    row: dict[str, Any] = {"go": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "threads": 1}
    row |= {"device": "cpu", "torch": str(torch.__version__), "commit": commit()}
    row["onnxruntime"] = onnxruntime.__version__
    torch.set_num_threads(1)
    jobs = [
        (row | _about(name, network) | {"runtime": runtime, "bytes": size}, answer)
        for name, network in networks.items()
        for runtime, size, answer in _runtimes(network, digits.train_images)
    ]
    pixels = digits.train_images[:1].repeat(1000, 1, 1, 1)
    for repetition in range(1, repetitions + 1):
        for (about, answer), batch in product(jobs, (1, 1000)):
            answer(pixels[:batch])  # the first call prepares
            calls, seconds = Timer(partial(answer, pixels[:batch])).autorange()
            timed = {"batch": batch, "repetition": repetition, "calls": calls}
            append_rows(path, LATENCY_COLUMNS, [about | timed | {"seconds": round(seconds, 5)}])
            what = f"{about['network']}, {about['runtime']}, {batch:,} at a time"
            print(f"round {repetition}  {what}, {calls} in {seconds:.2f} s", flush=True)
    return path


def _about(name: str, network: nn.Module) -> dict[str, Any]:
    cost = Budget(network)
    sizes = {"parameters": cost.parameters, "multiply_accumulates": cost.multiply_accumulates}
    return {"network": name} | sizes


def _runtimes(
    network: nn.Module, images: Tensor
) -> Iterator[tuple[str, int | None, Callable[[Tensor], object]]]:
    """Yield the name of each runtime, the bytes of its file, and what computes answers by it."""
    yield "torch", None, torch.inference_mode()(formats.Answer(network, 1.0).eval().forward)
    plain = formats.to_onnx(network, 1.0)
    for runtime, file in (
        ("onnxruntime", plain),
        ("onnxruntime int8", formats.to_int8(plain, images)),
    ):
        yield runtime, len(file), partial(formats.run_session, formats.session(file))
