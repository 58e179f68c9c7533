"""Which images an epoch sees: each equally often, or the hard ones more."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from core_helpers import CPU, after_step, same
from hypothesis import given, settings
from hypothesis import strategies as st

from mnistlib import train
from mnistlib.sampler import Sampler

few = settings(max_examples=25, deadline=None, database=None, derandomize=True)


@few
@given(n=st.integers(1, 60), size=st.integers(1, 200), seed=st.integers(0, 1000))
def test_a_longer_epoch_passes_over_the_images_equally_often(n, size, seed):
    sampler = Sampler(n, size, 0.0, seed, CPU)
    for _ in range(2):
        drawn = sampler.sample_epoch().tolist()
        counts = Counter(drawn)
        assert len(drawn) == size
        often = [counts[i] for i in range(n)]
        assert (min(often), max(often)) == (size // n, math.ceil(size / n))
        # pass after pass, not a shuffle of all of them
        assert all(len(set(drawn[i : i + n])) == len(drawn[i : i + n]) for i in range(0, size, n))
        sampler.end_epoch()


def test_the_order_follows_from_the_seed_alone_and_leaves_the_random_state_alone():
    random_state = torch.get_rng_state()
    sampler = Sampler(500, 500, 0.0, 3, CPU)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        assert torch.equal(sampler.sample_epoch(), torch.randperm(500, generator=generator))
        sampler.end_epoch()
    assert torch.equal(torch.get_rng_state(), random_state)


def with_losses(losses: torch.Tensor, size: int, focus: float, seed: int = 0) -> Sampler:
    sampler = Sampler(len(losses), size, focus, seed, CPU)
    sampler.last_loss.copy_(losses)
    return sampler


@few
@given(
    n=st.integers(2, 100),
    share=st.floats(0.05, 0.95),
    focus=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_focus_takes_its_share_from_the_images_with_the_greatest_losses(n, share, focus, seed):
    size = max(1, round(share * n))
    if size == n:
        return
    losses = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).float()  # all differ
    sampler = with_losses(losses, size, focus, seed)
    drawn = sampler.sample_epoch()
    assert torch.equal(sampler.drawn, drawn)
    assert len(set(drawn.tolist())) == size
    hardest = set(losses.argsort(descending=True)[: round(focus * size)].tolist())
    assert hardest <= set(drawn.tolist())


def test_what_focus_does_not_take_is_drawn_from_all_the_others_and_all_is_shuffled():
    seen: Counter = Counter()
    early: Counter = Counter()
    for seed in range(100):
        drawn = with_losses(torch.arange(200.0), 60, 0.5, seed).sample_epoch().tolist()
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
        assert sampler.seen == 20
        sampler.end_epoch()
        assert sampler.seen == 0
        known[drawn] = drawn.float() + 100 * epoch
        torch.testing.assert_close(sampler.last_loss, known.bfloat16())


def test_a_focus_on_an_epoch_of_all_images_draws_as_none_and_keeps_the_losses():
    plain, focused = Sampler(50, 50, 0.0, 0, CPU), Sampler(50, 50, 0.7, 0, CPU)
    for _ in range(2):  # as the recipes with a focus do on the embedded sample
        drawn = focused.sample_epoch()
        assert torch.equal(plain.sample_epoch(), drawn)
        focused.record(drawn.float())
        plain.end_epoch()
        focused.end_epoch()
    assert torch.equal(focused.state_dict()["last_loss"], torch.arange(50).bfloat16())


@pytest.mark.parametrize("focus", [0.0, 0.6])
@pytest.mark.parametrize("recorded", [0, 3])
def test_a_sampler_goes_on_from_within_an_epoch(focus, recorded):
    """The epoch under way is drawn again, and only its missing losses are recorded."""

    def play(sampler, epochs) -> list[list[int]]:
        found = []
        for _ in range(epochs):
            drawn = sampler.sample_epoch()
            found.append(drawn.tolist())
            for ids in drawn[sampler.seen :].split(5):
                sampler.record(ids.float().sin().abs())
            sampler.end_epoch()
        return found

    whole, part = Sampler(50, 20, focus, 0, CPU), Sampler(50, 20, focus, 0, CPU)
    play(whole, 1)
    play(part, 1)
    for ids in part.sample_epoch().split(5)[:recorded]:
        if focus:
            part.record(ids.float().sin().abs())
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in part.state_dict().items()}
    fresh = Sampler(50, 20, focus, 99, CPU)
    fresh.load_state_dict(state)
    assert same(fresh.state_dict(), state)
    assert play(fresh, 3) == play(whole, 3)
    assert same(fresh.state_dict(), whole.state_dict())


def test_training_remembers_the_loss_that_each_image_had(tiny_config, tiny_digits, monkeypatch):
    states = []
    after_step(monkeypatch, lambda state, *_: states.append(state))
    config = replace(
        tiny_config, epochs=1, epoch_images=100, batch_size=30, focus=0.7, ema_decay=0, degrees=0,
        pixels=0, scale=0, shear=0, dropout=0, max_lr=1e-8,
    )  # fmt: skip
    train(config, tiny_digits, verbose=False)
    sampler, model = states[-1].sampler, states[-1].model
    ids = tiny_digits.split("random")[0][sampler.drawn]
    for batch in torch.arange(100).split(30):
        labels = tiny_digits.train_labels[ids[batch]].long()
        wanted = F.cross_entropy(
            model.train()(tiny_digits.train_images[ids[batch]]), labels,
            label_smoothing=config.label_smoothing, reduction="none",
        )  # fmt: skip
        found = sampler.last_loss[sampler.drawn[batch]].float()
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=1e-3)
    assert int(sampler.last_loss.isinf().sum()) == 400
