"""Checkpoints: nothing damaged is loaded, and no failed save costs an earlier one."""

import hashlib
import io
import math
import os
import pickle
import random
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from mnistlib import (
    RECIPES,
    CheckpointError,
    Config,
    build,
    load_checkpoint,
    load_model,
    predict,
    save_checkpoint,
    train,
)
from mnistlib.checkpoint import KEYS, LARGEST, MARK, TRAILER, checkpoint_path
from mnistlib.state import TrainingState

NAME = re.compile(r"mnist_model_\d{8}_\d{6}_acc(\d+\.\d\d|NA)\.pth")
REMEDY = re.compile(r"\b(use|do not use|train again|check the path|free space)\b")


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a run of one short epoch, with everything in its checkpoint that one can hold."""
    config = Config(
        epochs=1, epoch_images=100, batch_size=25, degrees=5, ema_decay=0.5, device="cpu", threads=1
    )  # fmt: skip
    return train(config, tiny_digits, folder=tmp_path_factory.mktemp("trained"))


@pytest.fixture
def content(trained):
    return load_checkpoint(trained.checkpoint)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def seal(archive: bytes) -> bytes:
    """Add a checksum that fits, as anyone who knows the format could."""
    body = archive[:-2] + TRAILER.to_bytes(2, "little")
    return body + MARK + hashlib.sha256(body).hexdigest().encode()


def forge(content, path: Path) -> Path:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(seal(buffer.getvalue()))
    return path


def assert_refused(path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert str(path) in message
    assert REMEDY.search(message.replace(str(path), "")), message
    return message


def changed(content, **keys):
    """Return the content with some values inside its dicts changed; None takes one out."""
    content = {"format": 1} | content
    for key, value in keys.items():
        parts = content[key] | value
        content[key] = {k: v for k, v in parts.items() if v is not None}
    return content


@pytest.mark.parametrize(("accuracy", "ending"), [(99.41, "99.41"), (100.0, "100.00")])
def test_the_name_holds_time_and_accuracy(accuracy, ending, tmp_path):
    assert NAME.fullmatch(checkpoint_path(tmp_path, accuracy).name)[1] == ending


def test_a_name_that_is_taken_is_left_alone(tmp_path):
    first = checkpoint_path(tmp_path, 99.0)
    first.touch()
    second = checkpoint_path(tmp_path, 99.0)
    assert second != first
    assert NAME.fullmatch(second.name)


def test_an_unknown_accuracy_is_na_in_the_name(content, folder):
    path = save_checkpoint(content | {"accuracy": math.nan}, folder)
    assert NAME.fullmatch(path.name)[1] == "NA"
    load_checkpoint(path)


def test_a_checkpoint_holds_what_the_reference_promises_and_what_resuming_needs(trained, content):
    assert {"model_state_dict", "optimizer_state_dict", "history", "val_accuracy"} < set(content)
    assert set(content) == {"format", *KEYS}
    assert content["config"] == asdict(trained.config)
    assert (content["source"], content["accuracy_kind"]) == ("mnist", "validation")
    assert content["val_accuracy"] == content["accuracy"] == trained.history[-1]["val_acc"]
    assert content["history"] == trained.history
    assert content["optimizer_state_dict"]["state"][0]["exp_avg"].shape == (8, 1, 3, 3)
    assert {"weights", "optimizer", "scheduler", "average", "rng", "order", "distort"} < set(
        content["training"]
    )
    assert {"torch", "numpy", "python", "platform", "device", "threads"} == set(content["versions"])
    assert content["versions"]["torch"] == torch.__version__


def test_plain_torch_load_reads_a_checkpoint(trained, content):
    plain = torch.load(trained.checkpoint, weights_only=True)
    assert plain.keys() == content.keys()
    model = build("reference")
    model.load_state_dict(plain["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(plain["optimizer_state_dict"])


def test_what_is_saved_comes_back(trained, content, folder, tiny_digits):
    path = save_checkpoint(content, folder)
    again = load_checkpoint(str(path))
    assert again["history"] == content["history"]
    for key, tensor in content["model_state_dict"].items():
        assert torch.equal(again["model_state_dict"][key], tensor)
    model = load_model(path)
    assert not model.training
    images = tiny_digits.test_images
    assert torch.equal(predict(model, images), predict(trained.model, images))


def test_loading_moves_no_random_state(trained):
    before = torch.get_rng_state()
    load_checkpoint(trained.checkpoint)
    load_model(trained.checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_a_run_of_the_reference_recipe_fits_into_400_kb(tiny_digits, folder, ema_decay):
    config = replace(RECIPES["reference"], ema_decay=ema_decay, device="cpu")
    t = TrainingState(config, torch.device("cpu"), 50_000)
    for p in t.model.parameters():
        p.grad = torch.randn_like(p)
    t.optimizer.step()  # fills its state
    t.step = t.total_steps
    t.loss.normal_()
    t.correct.random_(128)
    row = dict.fromkeys(["train_loss", "val_loss", "train_acc", "val_acc", "lr", "seconds"], 0.1)
    t.history = [{"epoch": epoch, **row} for epoch in range(1, 21)]
    path = sys.modules["mnistlib.train"]._save(t.state(), t, tiny_digits, folder)
    assert t.total_steps == 7_820
    assert len(load_checkpoint(path)["training"]["loss"]) == 7_820
    assert path.stat().st_size < 400_000


def test_a_flipped_bit_is_refused(trained, tmp_path):
    raw = bytearray(trained.checkpoint.read_bytes())
    path = tmp_path / "flipped.pth"
    g = random.Random(0)
    ends = [0, 8 * len(raw) - 1, 8 * (len(raw) - TRAILER), 8 * (len(raw) - TRAILER) - 1]
    for bit in ends + [g.randrange(8 * len(raw)) for _ in range(300)]:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert_refused(path)
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    load_checkpoint(path)


def test_a_truncated_file_is_refused(trained, tmp_path):
    raw = trained.checkpoint.read_bytes()
    path = tmp_path / "short.pth"
    lengths = [0, 1, 3, TRAILER - 1, TRAILER, TRAILER + 1, len(raw) - TRAILER, len(raw) - 1]
    for length in lengths + [len(raw) * i // 40 for i in range(40)]:
        path.write_bytes(raw[:length])
        assert_refused(path)


def test_a_file_with_bytes_added_is_refused(trained, tmp_path):
    raw = trained.checkpoint.read_bytes()
    for number, longer in enumerate([raw + b"\0", b"\0" + raw, raw + raw]):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(longer)
        assert_refused(path)


def test_what_is_no_checkpoint_is_refused(trained, tmp_path):
    text, foreign, huge = tmp_path / "notes.txt", tmp_path / "foreign.pth", tmp_path / "huge.pth"
    text.write_text("not a checkpoint\n" * 100)
    torch.save(trained.model.state_dict(), foreign)
    huge.touch()
    os.truncate(huge, LARGEST + 1)
    assert "no checksum" in assert_refused(text)
    assert "another program" in assert_refused(foreign)
    assert "cut off" in assert_refused(huge)
    assert_refused(tmp_path)
    assert "No such file" in assert_refused(tmp_path / "missing.pth")


class Evil:
    """Pickles into a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("shape", ["a key of a checkpoint", "in place of it", "a bare pickle"])
def test_no_code_in_a_forged_file_is_run(content, tmp_path, shape):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    if shape == "a bare pickle":
        path.write_bytes(seal(pickle.dumps(Evil(marker), protocol=2) + b"\0\0"))
        pickle.loads(path.read_bytes())
    else:
        evil = Evil(marker)
        forge(content | {"history": [evil]} if shape == "a key of a checkpoint" else evil, path)
        torch.load(path, weights_only=False)
    assert marker.exists()  # the file is as evil as it should be
    marker.unlink()
    assert "do not use this file" in assert_refused(path)
    with pytest.raises(CheckpointError):
        load_model(path)
    assert not marker.exists()


@pytest.mark.parametrize("number", [2, 0, None, "1"])
def test_another_format_is_refused(content, tmp_path, number):
    message = assert_refused(forge(content | {"format": number}, tmp_path / "new.pth"))
    assert f"format {number!r}" in message


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_or_mistaken_part_is_refused(content, tmp_path, key):
    without = {k: v for k, v in content.items() if k != key}
    assert repr(key) in assert_refused(forge(without, tmp_path / "without.pth"))
    assert repr(key) in assert_refused(forge(content | {key: None}, tmp_path / "none.pth"))


def test_content_that_is_no_dict_is_refused(content, tmp_path):
    assert_refused(forge([content], tmp_path / "list.pth"))
    assert_refused(forge(torch.zeros(3), tmp_path / "tensor.pth"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"conv1.weight": torch.zeros(8, 1, 5, 5)},
        {"conv1.weight": torch.zeros(72)},
        {"conv1.weight": None},
        {"conv1.weight": 0.5},
        {"conv7.weight": torch.zeros(1)},
    ],
    ids=["another shape", "flat", "missing", "no tensor", "one more"],
)
def test_weights_of_another_shape_are_refused(content, tmp_path, tensors):
    forged = changed(content, model_state_dict=tensors)
    assert "reference" in assert_refused(forge(forged, tmp_path / "shapes.pth"))


def test_weights_of_another_model_are_refused(content, tmp_path):
    forged = changed(content, config={"model": "reference-pooled"})
    assert "reference-pooled" in assert_refused(forge(forged, tmp_path / "model.pth"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["conv6.weight", "bn3.running_var"])
def test_weights_that_are_not_finite_are_refused(content, tmp_path, key, value):
    tensor = content["model_state_dict"][key].clone()
    tensor[-1] = value
    forged = changed(content, model_state_dict={key: tensor})
    assert key in assert_refused(forge(forged, tmp_path / "nan.pth"))


@pytest.mark.parametrize(
    ("field", "value"), [("momentum", 0.9), ("epochs", 0), ("model", "vgg"), ("max_lr", "high")]
)
def test_a_config_that_cannot_be_is_refused(content, tmp_path, field, value):
    forged = changed(content, config={field: value})
    assert field in assert_refused(forge(forged, tmp_path / "config.pth"))


def test_a_file_where_the_folder_should_be_is_said(content, tmp_path, trained, tiny_digits):
    folder = tmp_path / "taken"
    folder.write_text("mine")
    with pytest.raises(CheckpointError, match="name another folder") as error:
        save_checkpoint(content, folder)
    assert str(folder) in str(error.value)
    with pytest.raises(CheckpointError, match="name another folder"):
        train(trained.config, tiny_digits, folder=folder / "run")
    assert folder.read_text() == "mine"
