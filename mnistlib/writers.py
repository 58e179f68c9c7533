"""Who wrote each training digit, by QMNIST's labels, and a split that keeps writers apart.

QMNIST traced MNIST's images back to NIST's forms: C. Yadav and L. Bottou, "Cold case: the lost
MNIST digits", NeurIPS 2019, arXiv 1905.10498.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .download import cache_folder, download_writers

NAME = "qmnist-train-labels-idx2-int"
SHA256 = "bb1b6e1ec7b04fd5696f1ed50b5f58f8ef195118edd5c93c81783df9740b8ac5"  # uncompressed
LABEL, PARTITION, WRITER = 0, 1, 2  # columns; the other five are not needed here
DRAWS = 200  # orders of the writers that are tried


def find_writers(folder: Path | None) -> Path:
    """Return the file of writers in a folder, else in the cache, else after a download into it.

    Raises:
        OSError: it is nowhere and cannot be downloaded.
    """
    for place in filter(None, (folder, cache_folder())):
        for inner in ("", "MNIST/raw", "QMNIST/raw"):
            for ending in ("", ".gz"):
                if (path := place / inner / (NAME + ending)).is_file():
                    return path
    download_writers(cache_folder())
    return find_writers(cache_folder())


def parse_writers(raw: bytes | bytearray, name: str) -> Tensor:
    """Return label, NIST partition (0 or 4) and writer of each training image, `(60000, 3)` int64.

    Raises:
        ValueError: the bytes are not those of QMNIST's file.
    """
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{name} is damaged or not the file {NAME}: its SHA-256 begins with {found[:8]}, not "
            f"{SHA256[:8]}; fetch the file again"
        )
    table = np.frombuffer(raw, ">i4", offset=12).reshape(-1, 8)  # two dimensions: 12 bytes of them
    return torch.from_numpy(table[:, [LABEL, PARTITION, WRITER]].astype(np.int64))


def split_by_writer(table: Tensor, seed: int, per_partition: int = 5_000) -> tuple[Tensor, Tensor]:
    """Indices (int64) to train on and to validate on; every writer is on one side only.

    Of 200 random orders of the writers, each giving up whole writers until a NIST partition has
    its validation images, that one is taken whose classes are nearest to the training set's shares.

    Args:
        table: label, NIST partition and writer of each image, `(N, 3)`.
        seed: of the orders.
        per_partition: validation images from each partition, as near as whole writers allow; by
            default as many as in the test set.
    """
    labels, partitions, writers = table.T  # each (N,)
    names, who = writers.unique(return_inverse=True)
    count = torch.zeros(len(names), 10, dtype=torch.int64)  # images by writer and class
    count.index_put_((who, labels), torch.ones_like(labels), accumulate=True)
    partition_of = torch.zeros_like(names).scatter_(0, who, partitions)
    wanted = count.sum(0) / len(labels)
    generator = torch.Generator().manual_seed(seed)
    best, least = names[:0], float("inf")
    for _ in range(DRAWS):
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
