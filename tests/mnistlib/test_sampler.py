"""Which images an epoch sees: each equally often, or the hard ones more."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from core_helpers import CPU, after_step

from mnistlib import train
from mnistlib.sampler import Sampler


@pytest.mark.parametrize(("n", "size"), [(60, 60), (60, 7), (7, 60), (50, 100), (1, 3)])
def test_a_longer_epoch_passes_over_the_images_equally_often(n, size):
    sampler = Sampler(n, size, 0.0, 0, CPU)
    for _ in range(2):
        drawn = sampler.sample_epoch().tolist()
        counts = Counter(drawn)
        assert len(drawn) == size
        often = [counts[i] for i in range(n)]
        assert (min(often), max(often)) == (size // n, math.ceil(size / n))
        # pass after pass, not a shuffle of all of them
        assert all(len(set(drawn[i : i + n])) == len(drawn[i : i + n]) for i in range(0, size, n))
        sampler.end_epoch()


def test_focus_takes_the_greatest_losses_and_the_rest_is_drawn_from_all_others_and_shuffled():
    seen: Counter = Counter()
    early: Counter = Counter()
    for seed in range(100):
        sampler = Sampler(200, 60, 0.5, seed, CPU)
        sampler.last_loss.copy_(torch.arange(200.0))
        drawn = sampler.sample_epoch().tolist()
        assert len(set(drawn)) == 60
        seen.update(drawn)
        early.update(i >= 170 for i in drawn[:30])
    assert all(seen[i] == 100 for i in range(170, 200))
    others = [seen[i] for i in range(170)]  # 30 of 170 each time: 18 of 100
    assert sum(others) == 30 * 100
    assert 4 < min(others) <= max(others) < 36
    assert 0.42 < early[True] / (30 * 100) < 0.58


def test_focus_shows_unseen_images_before_any_a_second_time():
    sampler = Sampler(500, 100, 1.0, 0, CPU)
    seen = []
    for _ in range(5):
        seen += sampler.sample_epoch().tolist()
        sampler.record(torch.full((100,), 0.5))
        sampler.end_epoch()
    assert sorted(seen) == list(range(500))


def test_losses_are_kept_for_the_images_they_belong_to():
    """By batches, the last of which is short; images that an epoch leaves out keep theirs."""
    sampler = Sampler(50, 20, 0.5, 0, CPU)
    known = torch.full((50,), math.inf)
    for epoch in range(4):
        drawn = sampler.sample_epoch().clone()
        for ids in drawn.split(8):
            sampler.record(ids.float() + 100 * epoch)
        sampler.end_epoch()
        known[drawn] = drawn.float() + 100 * epoch
        torch.testing.assert_close(sampler.last_loss, known.bfloat16())


def test_a_focus_on_an_epoch_of_all_images_draws_as_none():
    plain, focused = Sampler(50, 70, 0.0, 0, CPU), Sampler(50, 70, 0.7, 0, CPU)
    for _ in range(2):  # as the recipes with a focus do on the embedded sample
        drawn = focused.sample_epoch()
        assert torch.equal(plain.sample_epoch(), drawn)
        focused.record(drawn.float())
        plain.end_epoch()
        focused.end_epoch()


def test_training_remembers_the_loss_that_each_image_had(tiny_config, tiny_digits, monkeypatch):
    states = []
    after_step(monkeypatch, lambda state, *_: states.append(state))
    config = replace(
        tiny_config, epochs=1, epoch_images=100, batch_size=30, focus=0.7, ema_decay=0, degrees=0,
        pixels=0, scale=0, shear=0, dropout=0, max_lr=1e-8,
    )  # fmt: skip
    train(config, tiny_digits, verbose=False)
    sampler, model = states[-1].sampler, states[-1].model.train()
    ids = tiny_digits.split("random")[0][sampler.drawn]
    logits = torch.cat([model(tiny_digits.train_images[part]) for part in ids.split(30)])
    labels = tiny_digits.train_labels[ids].long()
    wanted = F.cross_entropy(
        logits, labels, label_smoothing=config.label_smoothing, reduction="none"
    )
    found = sampler.last_loss[sampler.drawn].float()
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-3)
    assert int(sampler.last_loss.isinf().sum()) == 400
