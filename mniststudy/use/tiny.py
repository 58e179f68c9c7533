"""A network with rounded weights as one file of a kilobyte or two, read by `read_tiny.py`."""

import base64
import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnistlib import CheckpointError, Config, Digits, load_checkpoint, load_mnist, load_model
from mnistlib.evaluate import predict_logits
from mnistlib.paths import runs_folder, write_atomically
from mnistlib.spec import MODELS

from ..runs.ledger import append_rows
from . import read_tiny

READER = Path(read_tiny.__file__)
TINY_COLUMNS = (
    "config_hash", "seed", "parameters", "bytes", "program_bytes", "n", "correct", "changed",
)  # fmt: skip


class _Number:
    """What `read_tiny.read` takes from, built the other way round: the last is put in first."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, int, int]] = []  # counts below, own count, sum of counts
        self.signs, self.octaves, self.halves = [1] * 2, [1] * 16, [1] * 16

    def put(self, counts: list[int], numbers: Tensor, learn: int = 1) -> None:
        """Add whole numbers from 0 to less than `len(counts)`."""
        for k in numbers.long().flatten().tolist():
            self.parts.append((sum(counts[:k]), counts[k], sum(counts)))
            counts[k] += learn

    def put_fine(self, counts: list[int], values: Tensor) -> None:
        """Add numbers from 0 to 16 in 32nds: their whole parts, then the rest."""
        parts = (32 * values).round().clamp(0, 511)
        self.put(counts, parts // 32)
        self.put([1] * 32, parts % 32, learn=0)

    def put_factors(self, values: Tensor) -> None:
        """Add factors, in 32nds of an octave."""
        self.put(self.signs, values < 0)
        self.put_fine(self.octaves, values.abs().log2() + 12)

    def to_bytes(self) -> bytes:
        """Return the number, with its largest digit first."""
        left = 0
        for below, own, total in reversed(self.parts):
            left = left // own * total + below + left % own
        return left.to_bytes(-(-left.bit_length() // 8), "big")


@torch.no_grad()
def to_tiny(network: nn.Module, spec: str) -> bytes:
    """Return a network with rounded weights as bytes; `read_tiny.py` has their meaning.

    Weights are exact. Factors and shifts, which come from the BatchNorms, are rounded.

    Args:
        network: from `build`, in eval mode.
        spec: its name or spec, of the words w3 to w15, c, r, p and =, with the head `shared`.

    Raises:
        CheckpointError: the network has other words, or weights that are not rounded.
    """
    spec = MODELS.get(spec, spec)
    if not re.fullmatch(r"w(3|5|7|15) ((w(3|5|7|15)|c\d+|r\d|p|=) )+shared", spec):
        remedy = "write it with rounded weights, as w3 c8 r2 p shared, and train it"
        raise CheckpointError(f"the network is {spec!r}, which has no tiny format; {remedy}")
    number, written = _Number(), set()

    def steps(convs: list[Any]) -> list[Tensor]:
        """Add the weights of convolutions that are new; return the steps of their channels."""
        rounded = [conv.rounded() for conv in convs]
        for conv, (whole, _) in zip(convs, rounded, strict=True):
            if conv not in written:
                number.put([1] * conv.levels, whole + conv.levels // 2)
        written.update(convs)
        return [step.flatten() for _, step in rounded]

    *layers, head = [layer for layer in network.children() if isinstance(layer, nn.Sequential)]
    for layer in layers:
        norms = [m for m in layer if isinstance(m, nn.BatchNorm2d)]
        sizes = steps([m for m in layer if isinstance(m, nn.Conv2d)])
        for norm, step in zip(norms, sizes, strict=True):
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None
            assert variance is not None
            factor = norm.weight / (variance + norm.eps).sqrt()
            number.put_factors(factor * step)
            number.put_fine(number.halves, 2 * (norm.bias - mean * factor) + 8)
    window, classes = steps(list(head))
    number.put_factors(window * classes)
    return spec.encode() + b"\n" + number.to_bytes()


def to_script(raw: bytes) -> bytes:
    """Return a program, a zip file, that has the network in it: python NAME.pyz IMAGES.npy."""
    code = READER.read_text("utf-8").partition("if __name__")[0]
    main = (
        f"print(*read(base64.b85decode({base64.b85encode(raw)!r}), np.load(sys.argv[1])).argmax(1))"
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        member = zipfile.ZipInfo("__main__.py")  # with a fixed date
        archive.writestr(member, f"{code}import base64\n\n{main}\n", zipfile.ZIP_DEFLATED, 9)
    return file.getvalue()


def measure(checkpoint: Path, digits: Digits) -> tuple[bytes, dict[str, Any]]:
    """Return a checkpoint as a tiny file, and its row of the table `tiny`: bytes and answers.

    Args:
        checkpoint: file of a run with rounded weights.
        digits: on whose test images, or of the sample training images, the file is tried.
    """
    content, network = load_checkpoint(checkpoint), load_model(checkpoint)
    raw = to_tiny(network, content["config"]["model"])
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    seen = [read_tiny.read(raw, part[:, 0].numpy()).argmax(1) for part in images.split(500)]
    answers, expected = np.concatenate(seen), predict_logits(network, images).argmax(1).numpy()
    row = {"config_hash": content["config_hash"], "seed": content["config"]["seed"]}
    row |= {"parameters": sum(p.numel() for p in network.parameters()), "bytes": len(raw)}
    row |= {"program_bytes": len(to_script(raw)), "n": len(images)}
    right, changed = answers == labels.numpy(), answers != expected
    return raw, row | {"correct": int(right.sum()), "changed": int(changed.sum())}


def measure_all(checkpoints: Iterable[Path]) -> Path:
    """Write the table `tiny` of the runs anew, a row for each checkpoint; return its path."""
    path, digits = runs_folder() / "tiny.csv", load_mnist("mnist")
    rows = [measure(checkpoint, digits)[1] for checkpoint in checkpoints]
    path.unlink(missing_ok=True)
    append_rows(path, TINY_COLUMNS, rows)
    return path


def export_tiny(checkpoint: Path, digits: Digits, folder: Path | None = None) -> list[Path]:
    """Write a checkpoint as NAME.tiny, its reader, and both in one program; return the files.

    Args:
        checkpoint: file of a run with rounded weights.
        digits: as for `measure`.
        folder: by default that of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, its network has no tiny format, or a file cannot
            be written.
    """
    name = Config(**load_checkpoint(checkpoint)["config"]).recipe
    (raw, row), folder = measure(checkpoint, digits), folder or checkpoint.parent
    where = f"{row['n']:,} {'test' if digits.test else 'training'} images"
    print(f"{name}.tiny: {len(raw):,} bytes, {row['correct']:,} of {where} right")
    files = {f"{name}.tiny": raw, f"{name}.pyz": to_script(raw)}
    try:
        for file, content in (files | {READER.name: READER.read_bytes()}).items():
            write_atomically(folder / file, content)
    except OSError as error:
        fault = f"{folder} cannot be written to ({error.strerror}); name another folder"
        raise CheckpointError(fault) from None
    return [folder / file for file in (*files, READER.name)]
