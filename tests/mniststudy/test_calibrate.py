"""Temperature and threshold: whose they are, how they are fitted, and on which twin."""

import json
from dataclasses import asdict

import pytest
import torch

import mnistlib
from mnistlib import CheckpointError, Config, ConfigError, load_model, train
from mnistlib.evaluate import predict_logits
from mniststudy.use import calibrate as study
from mniststudy.use.calibrate import Calibration, calibrate, calibrate_released, load_calibration
from mniststudy.use.pictures import find_marks, read_marks
from mniststudy.use.rendered import pages


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
        (reading,) = read_marks(model, find_marks(drawn).marks, found)
        assert reading.answer == truth


@pytest.fixture(scope="module")
def checkpoint(tiny_digits, tmp_path_factory):
    config = Config(epochs=1, epoch_images=100, split="random", device="cpu", threads=1)
    folder = tmp_path_factory.mktemp("trained")
    return train(config, tiny_digits, folder=folder, verbose=False).checkpoint


@pytest.fixture
def desk(checkpoint, tiny_digits, tmp_path, monkeypatch):
    """Return the path of a network, beside which other names stand for it with other settings."""
    content = mnistlib.load_checkpoint(checkpoint)
    pools = {"none.pth": "", "pool.pth": "0" * 8, "other.pth": "1" * 8}
    changes = {name: {"pool": pool, "degrees": 0.0} for name, pool in pools.items()}
    changes |= {"whole.pth": {"split": "none"}, "wide.pth": {"dropout": 0.3}}

    def load(path):
        return content | {"config": content["config"] | changes.get(path.name, {})}

    monkeypatch.setattr("mnistlib.load_checkpoint", load)
    monkeypatch.setattr("mnistlib.load_model", lambda path: None)
    monkeypatch.setattr("mnistlib.load_mnist", lambda: tiny_digits)
    return tmp_path / checkpoint.name


def test_what_is_fitted_on_the_validation_images_of_the_twin_is_written_beside_the_network(
    desk, tiny_digits, monkeypatch
):
    asked = []
    fitted = Calibration(0.5, 0.6)
    monkeypatch.setattr(study, "calibrate", lambda *given: asked.append(given) or fitted)
    found = calibrate_released(desk, desk)
    held_out = tiny_digits.split("random")[1]
    assert torch.equal(asked[0][2], tiny_digits.train_labels[held_out])
    assert found == load_calibration(desk)
    assert found.twin["n"] == len(held_out)
    content = json.loads(desk.with_name("calibration.json").read_text(encoding="utf-8"))
    assert content["config_hash"] == content["twin"]["config_hash"]
    assert asdict(found).items() <= content.items()


def test_only_a_twin_with_the_same_settings_and_images_held_out_will_do(desk, monkeypatch):
    """Twin and network differ in their teachers, who must not know the twin's digits."""
    monkeypatch.setattr(study, "calibrate", lambda *_: Calibration(0.5, 0.6))
    named = {
        name: desk.with_name(f"{name}.pth") for name in ("none", "pool", "other", "whole", "wide")
    }
    for twin, network in (("none", "pool"), ("pool", "none"), ("wide", "none")):
        with pytest.raises(ConfigError, match=rf"{twin}\.pth is no twin of .*{network}\.pth"):
            calibrate_released(named[twin], named[network])
    with pytest.raises(ConfigError, match=r"whole\.pth was trained .* no validation images here"):
        calibrate_released(named["whole"], desk)
    assert not desk.with_name("calibration.json").exists()
    assert calibrate_released(named["other"], named["pool"]).twin["pool"] == "1" * 8
