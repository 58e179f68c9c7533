"""Checkpoints: saved atomically, loaded only if every byte is unchanged.

A checkpoint is an ordinary `torch.save` archive. Its zip comment holds the SHA-256 of all bytes
before it, so file and checksum cannot get out of step, and plain
`torch.load(path, weights_only=True)` can read the file as well.
"""

import hashlib
import io
import math
import sys
import zipfile
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from .config import RECIPES, Config
from .errors import CheckpointError, ConfigError
from .model import build
from .paths import outputs_folder, write_atomically
from .state import TrainingState, history_row

FORMAT = 2
MARK = b"mnistlib-sha256:"
TRAILER = len(MARK) + 64
LARGEST = 100_000_000  # bytes; ours have about 300,000


def checkpoint_content(
    config: Config,
    source: str,
    model: torch.nn.Module,
    history: list[dict[str, float]],
    test_accuracy: float,
) -> dict[str, Any]:
    """Return what the reference promises of a checkpoint: network, settings and results.

    Args:
        config: network and settings.
        source: data source.
        model: the network.
        history: a row per epoch.
        test_accuracy: percent; nan: not evaluated.
    """
    return {
        "config": asdict(config),
        "config_hash": config.hash(source),
        "source": source,
        "history": history,
        "val_accuracy": history[-1]["val_acc"] if history else math.nan,
        "test_accuracy": test_accuracy,
        "model_state_dict": model.state_dict(),
    }


def save_checkpoint(content: dict[str, Any], folder: Path) -> Path:
    """Write a checkpoint into `folder` and return its path.

    Its name follows the reference, `mnist_model_YYYYMMDD_HHMMSS_acc99.41.pth`, with the validation
    accuracy. If no images were held out it ends in `_test99.53`, the test accuracy, or in `_accNA`.
    If another run has saved in the same second, the name has the next free second.

    Raises:
        CheckpointError: the folder cannot be written to; earlier checkpoints are unchanged.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    body = bytearray(buffer.getvalue())
    body[-2:] = TRAILER.to_bytes(2, "little")  # last field of a zip file: length of the comment
    test, accuracy = content["test_accuracy"], content["val_accuracy"]  # nan: not evaluated
    shown = f"acc{accuracy:.2f}" if math.isnan(test) else f"test{test:.2f}"
    shown = shown.replace("accnan", "accNA")
    moment = datetime.now()
    try:
        while (path := folder / f"mnist_model_{moment:%Y%m%d_%H%M%S}_{shown}.pth").exists():
            moment += timedelta(seconds=1)
        write_atomically(path, bytes(body) + MARK + hashlib.sha256(body).hexdigest().encode())
    except OSError as error:
        remedy = "free space there or name another folder. Earlier checkpoints are unchanged"
        raise CheckpointError(f"nothing could be saved in {folder} ({error}); {remedy}") from error
    return path


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint without running code from the file.

    Args:
        path: file, or the name of a recipe with a released checkpoint.

    Raises:
        CheckpointError: the file is not a checkpoint, or was changed after it was saved.
    """
    path = Path(released_checkpoint(str(path)) if path in RECIPES else path)
    try:
        # a device or a pipe may have no end
        raw = path.read_bytes() if path.stat().st_size <= LARGEST and path.is_file() else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from None
    body = raw[:-TRAILER]
    if raw[-TRAILER:] != MARK + hashlib.sha256(body).hexdigest().encode():
        fault = "is not a whole mnistlib checkpoint, or was altered after it was saved"
        raise CheckpointError(f"{path} {fault} (its SHA-256 does not match); use another one")
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST:
                raise MemoryError
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        found = content.get("format")
    except Exception as error:  # a forged file can make the unpickler fail in any way
        kind = f"more than {LARGEST:,} bytes, or something other than tensors and plain values"
        fault = f"contains {kind} ({type(error).__name__})"
        raise CheckpointError(f"{path} {fault} and was not loaded; do not use it") from None
    if found != FORMAT:
        fault = f"has checkpoint format {found!r}, this release reads format {FORMAT}"
        raise CheckpointError(f"{path} {fault}; use the mnistlib that wrote it, or train again")
    rows = [history_row(1, 0.0, 0.0, 0.0, 0.0, None)]
    example = checkpoint_content(Config(), "", torch.nn.Module(), rows, math.nan) | {"config": {}}
    example |= {"training": {"progress": {"step": 0, "seconds": 0.0}}, "versions": {"device": ""}}
    try:
        _compare(content, example)
        Config(**content["config"])  # settings of older releases may be missing
    except (TypeError, ConfigError) as error:
        fault = f"was written by another release of mnistlib ({error})"
        raise CheckpointError(f"{path} {fault}; use that one, or train again") from None
    return content


def _compare(found: Any, example: Any, name: str = "it") -> None:
    """Raise TypeError unless a value, with all that is in it, is of the same kind as an example."""
    kinds: Any = ((int, float), dict, type(example))
    if not isinstance(found, next(kind for kind in kinds if isinstance(example, kind))):
        raise TypeError(f"{name} is {found!r:.40}")
    if isinstance(example, dict):
        for key, value in example.items():
            _compare(found.get(key), value, key)
    elif isinstance(example, list) and example:
        for value in found:
            _compare(value, example[0], f"a part of {name}")


def load_model(path: str | Path) -> torch.nn.Module:
    """Return the network of a checkpoint in eval mode; for errors see `load_checkpoint`.

    Its weights lie in memory as channels_last, which halves the time of small convolutions on CPUs
    and changes the last bits of the answers. Training does not use it.
    """
    content = load_checkpoint(path)
    config = Config(**content["config"])
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
        model = build(config.model, config.dropout)
    try:
        model.load_state_dict(content["model_state_dict"])
    except (RuntimeError, AttributeError) as error:
        fault = f"has weights that do not fit its network, {config.model!r}"
        raise CheckpointError(f"{path} {fault}; use another one") from error
    return model.eval().to(memory_format=torch.channels_last)


def released_checkpoint(recipe: str = "best") -> Path:
    """Return the path of a recipe's checkpoint that comes with the project, its seed 0.

    The recipes of the leaderboard have one in a clone; a wheel installs those of `best` and
    `careful`.

    Raises:
        CheckpointError: there is none.
    """
    folder = outputs_folder() / "checkpoints" / recipe
    if not folder.is_dir():
        folder = Path(__file__).with_name("released") / recipe
    for path in folder.glob("*.pth"):
        return path
    raise CheckpointError(f"there is no released checkpoint of {recipe!r}; name a file instead")


def checkpoints(folder: Path) -> list[tuple[int, Path, dict[str, Any]]]:
    """Return step, path and content of each intact checkpoint in a folder, most steps last.

    The steps are read from the files, because a clock that is set back would give an older
    checkpoint the later name. Damaged ones are reported on standard error and left out.
    """
    found = []
    for path in sorted(folder.glob("mnist_model_*.pth")):
        try:
            content = load_checkpoint(path)
            found.append((content["training"]["progress"]["step"], path, content))
        except CheckpointError as error:
            print(f"WARNING: not used: {error}", file=sys.stderr)
    return sorted(found, key=lambda f: f[0])


def latest_checkpoint(path: str | Path, run: str = "") -> Path:
    """Return the intact checkpoint with the most steps in a run's folder; a file is returned as is.

    Args:
        path: folder or file.
        run: config hash of the run that is meant, if the folder has checkpoints of several runs;
            by default the one that is not finished.

    Raises:
        CheckpointError: the folder has no intact checkpoint, or it is not clear which run is meant.
    """
    if not Path(path).is_dir():
        return Path(path)
    runs = {content["config_hash"]: (p, content) for _, p, content in checkpoints(Path(path))}
    if run in runs:
        return runs[run][0]
    left = [p for p, c in runs.values() if len(c["history"]) < Config(**c["config"]).epochs]
    left = left or [p for p, _ in runs.values()]
    if not left:
        raise CheckpointError(f"{path} has no checkpoint to resume from; start the run again")
    if len(left) > 1:
        names = ", ".join(p.name for p in left)
        raise CheckpointError(f"{path} has checkpoints of several runs; name one of them: {names}")
    return left[0]


def restore(state: TrainingState, path: Path, config: Config, source: str) -> None:
    """Bring a new training state to that in a checkpoint of the same run.

    Raises:
        CheckpointError: it is damaged, or its settings or data differ.
    """
    content = load_checkpoint(path)
    if content["config_hash"] != config.hash(source):
        there = asdict(Config(**content["config"])) | {"data source": content["source"]}
        here = asdict(config) | {"data source": source}
        differ = [f"{k} {there[k]!r} there, {here[k]!r} here" for k in here if there[k] != here[k]]
        fault = f"belongs to another run ({'; '.join(differ)})"
        raise CheckpointError(f"{path} {fault}; resume with the same settings")
    if "model" not in content["training"]:
        raise CheckpointError(f"{path} has the final weights only; there is nothing to resume")
    training = content["training"]
    training["progress"]["history"] = content["history"]  # the same, and checked
    try:
        # other releases of torch keep more or less
        known = {k: v | training[k] for k, v in state.state_dict().items()}
        _compare(known, state.state_dict())
        state.load_state_dict(training)
    except Exception as error:  # each part fails in its own way
        fault = f"has a training state that cannot be restored ({error!r:.80})"
        raise CheckpointError(f"{path} {fault}; start the run again") from error


def prune_checkpoints(latest: Path, finished: bool) -> None:
    """Remove the other checkpoints of a run from the folder of its latest one.

    An unfinished run keeps that with the most steps among them, in case the latest is damaged.
    """
    run = load_checkpoint(latest)["config_hash"]
    found = checkpoints(latest.parent)
    others = [path for _, path, c in found if c["config_hash"] == run and path != latest]
    for path in others if finished else others[:-1]:
        path.unlink(missing_ok=True)
