"""Temperature and threshold: whose they are, how they are fitted, and on which twin."""

import json
import math

import pytest
import torch

import mnistlib
from mnistlib import CheckpointError, ConfigError, load_model
from mnistlib.evaluate import predict_logits
from mniststudy.use import calibrate as study
from mniststudy.use.calibrate import Calibration, calibrate, calibrate_released, load_calibration
from mniststudy.use.pictures import find_ink
from mniststudy.use.rendered import pages
from mniststudy.use.segment import read_page


def test_a_calibration_is_used_for_the_checkpoint_that_it_names(tmp_path):
    about = {"checkpoint": "a.pth", "temperature": 0.5, "sure": 0.7, "twin": {"seed": 0}}
    (tmp_path / "calibration.json").write_text(json.dumps(about), encoding="utf-8")
    assert load_calibration(tmp_path / "a.pth") == Calibration(0.5, 0.7, {"seed": 0})
    assert load_calibration(tmp_path / "b.pth") == Calibration()
    assert load_calibration(tmp_path / "elsewhere" / "a.pth") == Calibration()
    for damaged in ("{", "[]", '{"checkpoint": "a.pth"}'):
        (tmp_path / "calibration.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"calibration\.json is damaged .*; restore it"):
            load_calibration(tmp_path / "a.pth")
    for key, value, said in (
        ("temperature", -1, "from 0.01 to 100"), ("temperature", 0, "from 0.01 to 100"),
        ("temperature", "warm", "a finite number"), ("temperature", math.nan, "a finite number"),
        ("sure", 1.01, "from 0 to 1"), ("sure", None, "a finite number"),
    ):  # fmt: skip
        (tmp_path / "calibration.json").write_text(json.dumps(about | {key: value}), "utf-8")
        said = rf"is damaged \({key} is {value!r}.*, but it must be {said}\); restore it"
        with pytest.raises(CheckpointError, match=said):
            load_calibration(tmp_path / "a.pth")


def test_the_fit_makes_confidence_match_accuracy_and_loses_nearly_no_right_answer():
    sample = mnistlib.load_mnist("sample")
    model = load_model(mnistlib.released_checkpoint("smoothed"))
    images, labels = sample.train_images[:200], sample.train_labels[:200].clone()
    labels[:4] = (labels[:4] + 1) % 10  # so that two answers in a hundred are wrong
    found = calibrate(model, images, labels, 6)
    assert found.temperature < 1  # label smoothing made the network too modest
    sure = (predict_logits(model, images) / found.temperature).softmax(1).amax(1)
    assert abs(float(sure.mean()) - 0.98) < 0.01
    for drawn, truth in pages("digits", 6, images, labels):
        (reading,) = read_page(model, find_ink(drawn), found).readings
        assert reading.answer == truth


@pytest.fixture
def desk(tiny_digits, tmp_path, monkeypatch):
    """Return a folder where names stand for checkpoints with other settings."""
    content = mnistlib.load_checkpoint(mnistlib.released_checkpoint())
    changes = {"none": {"pool": ""}, "whole": {"split": "none"}, "wide": {"dropout": 0.3}}
    changes |= {"pool": {}, "other": {"pool": "1" * 8, "seed": 5}}

    def load(path):
        config = content["config"] | {"split": "random"} | changes[path.stem]
        return content | {"config": config}

    monkeypatch.setattr("mnistlib.load_checkpoint", load)
    monkeypatch.setattr("mnistlib.load_model", lambda path: None)
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    return tmp_path


def test_what_is_fitted_on_the_images_that_the_twin_held_out_is_written_beside_the_network(
    desk, tiny_digits, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        study, "calibrate", lambda *given: asked.append(given) or Calibration(0.5, 0.6)
    )
    found = calibrate_released(desk / "other.pth", desk / "pool.pth")
    held_out = tiny_digits.split("random")[1]
    assert torch.equal(asked[0][2], tiny_digits.train_labels[held_out])
    assert found == load_calibration(desk / "pool.pth")
    assert (found.temperature, found.sure) == (0.5, 0.6)
    seen = found.twin["pool"], found.twin["seed"], found.twin["n"]
    assert seen == ("1" * 8, 5, len(held_out))  # the twin's own


def test_only_a_twin_with_the_same_settings_and_images_held_out_will_do(desk):
    """Twin and network may differ in their teachers, who must not know the twin's digits."""
    for twin, network in (("none", "pool"), ("pool", "none"), ("wide", "pool"), ("whole", "pool")):
        with pytest.raises(ConfigError, match=rf"{twin}\.pth is no twin of .*{network}\.pth"):
            calibrate_released(desk / f"{twin}.pth", desk / f"{network}.pth")
    assert not list(desk.glob("*.json"))
