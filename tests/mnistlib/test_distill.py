"""Distillation: what a pool hands out, its loss, and that a run on it is one like any other."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from core_helpers import CPU, same, state_in, stop_after

from mnistlib import Config, ConfigError, augment, train
from mnistlib.distill import checksum, distillation_loss, load_pool, pool_folder

DISTILL = sys.modules["mnistlib.distill"]
NAME, VIEWS = "0123abcd", 3
AUGMENTED = Config(degrees=10, pixels=1, elastic=0.5)
STUDENT = Config(
    model="c4k5s2p d pooled", epochs=3, epoch_images=200, optimizer="sgd", max_lr=0.02, focus=0.5,
    cycle_momentum=False, dropout=0.0, ema_decay=0.9, norm_images=50, pool=NAME, seed=4,
    device="cpu", threads=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def targets(tiny_digits, runs_folder):
    """A pool of random answers in the folder of runs; return them, `(V, N, 10)`."""
    n = len(tiny_digits.train_labels)
    logits = torch.randn(VIEWS, n, 10, generator=torch.Generator().manual_seed(0))
    answers = logits.softmax(2).half()
    pool_folder(NAME).mkdir(parents=True)
    about = {"source": "mnist", "views": VIEWS, "split": "random"}
    about |= {"augmentation": AUGMENTED.augmentation}
    (pool_folder(NAME) / "pool.json").write_text(json.dumps(about), encoding="utf-8")
    for view, part in enumerate(answers):
        (pool_folder(NAME) / f"{view}.f16").write_bytes(part.numpy().tobytes())
    return answers


def test_each_view_is_an_augmentation_and_is_drawn_with_its_own_target(targets, tiny_digits):
    found = load_pool(STUDENT, tiny_digits, CPU)
    n = len(tiny_digits.train_labels)
    assert (found.images.shape, found.images.dtype) == ((VIEWS, n, 28, 28), torch.uint8)
    assert torch.equal(found.targets, targets)
    draw = torch.Generator().manual_seed(2)
    made = augment(tiny_digits.train_images.float() / 255, **AUGMENTED.augmentation, generator=draw)
    assert torch.equal(found.images[2], (made * 255).round().byte()[:, 0])
    ids, places = torch.tensor([5, 3, 5, 5, 5, 5]), []
    images, answers = found.draw(ids, torch.Generator().manual_seed(0))
    for image, answer, k in zip(images, answers, ids, strict=True):
        (view,) = (v for v in range(VIEWS) if torch.equal(found.images[v, k], image[0]))
        assert torch.equal(targets[view, k].float(), answer)
        places.append(view)
    assert len(set(places)) > 1


def test_the_loss_weighs_teachers_nine_to_one_at_twice_the_usual_temperature():
    """By its gradient. The factor 1 is 2, the temperature, times 1/2 of the chain rule."""
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    answers = torch.randn(8, 10).softmax(1)
    truth = torch.cat((answers, labels[:, None]), 1)
    (gradient,) = torch.autograd.grad(distillation_loss(logits, truth).sum(), logits)
    soft = 2 * ((logits / 2).softmax(1) - answers) / 2
    hard = logits.softmax(1) - F.one_hot(labels, 10)
    torch.testing.assert_close(gradient, 0.9 * soft + 0.1 * hard)


def test_a_student_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(
    tiny_digits, monkeypatch, tmp_path
):
    whole = train(STUDENT, tiny_digits, folder=tmp_path / "whole", verbose=False)
    plain = train(replace(STUDENT, pool=""), tiny_digits, save=False, verbose=False)
    assert whole.curve["loss"] != plain.curve["loss"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(STUDENT, tiny_digits, folder=tmp_path, verbose=False).interrupted
    resumed = train(STUDENT, tiny_digits, tmp_path, folder=tmp_path, verbose=False)
    assert resumed.curve == whole.curve
    assert same(state_in(resumed.checkpoint), state_in(whole.checkpoint))


@pytest.mark.parametrize(
    ("settings", "source", "said"),
    [
        ({"pool": "12345678"}, "mnist", "pool 12345678 is not, or not wholly,.*mnist teach"),
        ({"split": "last"}, "mnist", "trained with split random, on images that split last"),
        ({}, "other", "was built on mnist, not other"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_before_training(settings, source, said, tiny_digits):
    with pytest.raises(ConfigError, match=said):
        train(replace(STUDENT, **settings), replace(tiny_digits, source=source), save=False)


def test_a_pool_whose_answers_or_loss_have_changed_since_is_refused(tiny_digits, monkeypatch):
    paths = [pool_folder(NAME) / f"{view}.f16" for view in range(VIEWS)]
    noted = "".join(map(checksum, paths))
    (pool_folder(NAME) / "SHA256SUMS").write_text(noted, encoding="utf-8")
    load_pool(STUDENT, tiny_digits, CPU)
    for name in ("TEMPERATURE", "SOFT"):
        with monkeypatch.context() as patch:
            patch.setattr(DISTILL, name, 0.5)
            with pytest.raises(ConfigError, match="for another temperature or weight"):
                load_pool(STUDENT, tiny_digits, CPU)
    paths[1].write_bytes(bytes(paths[1].stat().st_size))
    with pytest.raises(ConfigError, match=r"its answers were altered.*mnist teach"):
        train(STUDENT, tiny_digits, save=False)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 20)])
def test_a_pool_with_a_view_that_is_missing_or_cut_short_is_refused(tiny_digits, damage):
    damage(pool_folder(NAME) / "0.f16")
    with pytest.raises(ConfigError, match="not wholly"):
        load_pool(STUDENT, tiny_digits, CPU)
