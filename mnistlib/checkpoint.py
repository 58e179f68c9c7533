"""Checkpoints: saved so that a kill loses nothing, loaded only if every byte is as it was saved.

A checkpoint is an ordinary `torch.save` archive. Its zip comment holds the SHA-256 of all bytes
before it, so file and checksum are one: no moment exists in which they could disagree, and plain
`torch.load(path, weights_only=True)` reads the file as well.
"""

import hashlib
import io
import math
import os
import platform
import tempfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .config import Config, ConfigError, outputs_folder
from .model import build

FORMAT = 1
MARK = b"mnistlib-sha256:"
TRAILER = len(MARK) + 64
LARGEST = 100_000_000  # bytes; ours have about 300,000
KEYS: dict[str, type] = {
    "config": dict,
    "source": str,
    "history": list,
    "accuracy": float,
    "accuracy_kind": str,
    "val_accuracy": float,
    "model_state_dict": dict,
    "optimizer_state_dict": dict,
    "training": dict,
    "versions": dict,
}

TRAINING = {
    "weights", "optimizer", "scheduler", "average", "rng", "device_rng", "order", "distort", "step",
    "seconds", "loss", "correct", "history", "evals",
}  # fmt: skip


class CheckpointError(Exception):
    """A checkpoint that cannot be saved, trusted or used: says which, why and what to do."""


def versions() -> dict[str, str]:
    """Versions that a result may depend on."""
    return {
        "torch": str(torch.__version__),  # a TorchVersion is refused by weights_only
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def checkpoint_path(folder: Path, accuracy: float) -> Path:
    """Return a free path: `mnist_model_YYYYMMDD_HHMMSS_acc99.41.pth`, the time now or soon after.

    Without an accuracy (nan) the name ends in `accNA`.
    """
    shown = "NA" if math.isnan(accuracy) else f"{accuracy:.2f}"
    moment = datetime.now()
    while (path := folder / f"mnist_model_{moment:%Y%m%d_%H%M%S}_acc{shown}.pth").exists():
        moment += timedelta(seconds=1)  # another run saved in this second: its file stays
    return path


def save_checkpoint(content: dict[str, Any], folder: Path) -> Path:
    """Write a checkpoint into `folder` under the reference's name and return its path.

    The bytes go to a temporary file, to the disk, and only then to their name: a kill or a full
    disk at any moment leaves the earlier checkpoints untouched and no half-written one.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    body = bytearray(buffer.getvalue())
    body[-2:] = TRAILER.to_bytes(2, "little")  # last field of a zip file: length of the comment
    raw = bytes(body) + MARK + hashlib.sha256(body).hexdigest().encode()
    path = checkpoint_path(folder, content["accuracy"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".saving-", suffix=".pth", dir=folder)
        try:
            Path(temporary).chmod(0o644)  # mkstemp makes files that only their owner can read
            with os.fdopen(handle, "wb") as file:
                file.write(raw)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 - the atomic one on every platform
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(folder)
    except OSError as error:
        raise CheckpointError(
            f"no checkpoint could be saved in {folder} ({error}); free space there or name "
            "another folder. Earlier checkpoints are as they were"
        ) from error
    return path


def _sync_folder(folder: Path) -> None:
    """Bring the new name itself to the disk; only POSIX systems can and need to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint: checksum, safe unpickling, schema, shapes, finite weights.

    Raises:
        CheckpointError: anything is not as it was saved; no code of the file is ever run.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        # a device or a pipe has no size and may have no end
        raw = path.read_bytes() if size <= LARGEST and not path.is_fifo() and size else b""
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check the path") from None
    body, trailer = raw[:-TRAILER], raw[-TRAILER:]
    if not trailer.startswith(MARK):
        raise CheckpointError(
            f"{path} is not a whole mnistlib checkpoint ({size:,} bytes, no checksum at its end); "
            "it was cut off or made by another program: use another checkpoint"
        )
    if hashlib.sha256(body).hexdigest().encode() != trailer[len(MARK) :]:
        raise CheckpointError(
            f"{path} was altered after it was saved (its SHA-256 does not match); "
            "use another checkpoint or train again"
        )
    try:
        content = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # a forged file can make the unpickler fail in any way
        raise CheckpointError(
            f"{path} holds something other than tensors and plain values and was not loaded "
            f"({type(error).__name__}); do not use this file"
        ) from None
    check_content(content, path)
    return content


def check_content(content: Any, path: Path | str) -> None:
    """Refuse a checkpoint whose parts do not fit together, naming the part."""
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found!r}; this release reads format {FORMAT}: "
            "use the mnistlib that wrote it"
        )
    for key, kind in KEYS.items():
        if not isinstance(content.get(key), kind):
            raise CheckpointError(
                f"{path} has no valid {key!r} (a {kind.__name__}); use another file"
            )
    try:
        config = Config(**content["config"])
    except (TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{path} has a config that cannot be ({error}); use another file"
        ) from None
    wanted = TRAINING | ({"last_loss", "epoch_loss"} if config.focus else set())
    if missing := wanted - set(content["training"]):
        raise CheckpointError(f"{path} lacks {', '.join(sorted(missing))}; use another file")
    expected = _blank_model(config).state_dict()
    weights = content["model_state_dict"]
    shapes = {
        k: tuple(v.shape)
        if isinstance(v, Tensor) and v.layout == torch.strided and v.device.type == "cpu"
        else None
        for k, v in weights.items()
    }
    if shapes != {k: tuple(v.shape) for k, v in expected.items()}:
        raise CheckpointError(
            f"{path} does not hold the tensors of the model {config.model!r}; use another file"
        )
    broken = [k for k, v in weights.items() if not torch.isfinite(v).all()]
    if broken:
        raise CheckpointError(f"{path} has values that are not finite in {broken[0]}; train again")


def _blank_model(config: Config) -> nn.Module:
    """Return a network whose weights will be overwritten; the random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        return build(config.model, config.dropout)


def load_model(path: str | Path) -> nn.Module:
    """Return the network of a checkpoint, ready to predict."""
    content = load_checkpoint(path)
    model = _blank_model(Config(**content["config"]))
    model.load_state_dict(content["model_state_dict"])
    return model.eval()


def published_checkpoint(recipe: str = "best") -> Path:
    """Return the path of the checkpoint that comes with the repository: seed 0 of a recipe.

    Raises:
        CheckpointError: there is none, as for most recipes, or outside a clone.
    """
    found = sorted((outputs_folder() / "checkpoints" / recipe).glob("*.pth"))
    if not found:
        raise CheckpointError(f"no published checkpoint of {recipe!r} is here; name one yourself")
    return found[-1]
