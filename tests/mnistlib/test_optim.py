"""Optimizers and schedules: what each step and each learning rate is."""

import math

import pytest
import torch
from torch import nn

from mnistlib import RECIPES, Config, build, learning_rates
from mnistlib.muon import orthogonal
from mnistlib.optim import make_optimizer, make_scheduler

# after each epoch, from the reference's table
PUBLISHED = [
    "0.001808", "0.005205", "0.008599", "0.010000", "0.009903",
    "0.009618", "0.009156", "0.008534", "0.007776", "0.006911",
    "0.005973", "0.004998", "0.004022", "0.003084", "0.002220",
    "0.001463", "0.000841", "0.000380", "0.000096", "0.000000",
]  # fmt: skip


# Optimizers


def steps_of(model, optimizer, n=5) -> list[torch.Tensor]:
    """Take steps on the same random images and return the weights."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        x = torch.randn(7, 5, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "muon"])
def test_optimizers_are_torchs_and_sgd_and_muon_decay_matrices_alone(name):
    """Without filters of 3x3, Muon is SGD."""
    ours, theirs = (nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    if name in ("sgd", "muon"):
        vectors = [theirs[1].bias, *theirs[0].parameters()]
        groups = [{"params": [theirs[1].weight], "weight_decay": 0.1}, {"params": vectors}]
        known = torch.optim.SGD(groups, 0.03, momentum=0.9, nesterov=True)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        known = kind(theirs.parameters(), lr=0.03, weight_decay=0.1)
    made = make_optimizer(ours, Config(optimizer=name, max_lr=0.03, weight_decay=0.1))
    for a, b in zip(steps_of(ours, made), steps_of(theirs, known), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(8, 72), (32, 9)])
def test_an_orthogonal_step_keeps_the_singular_vectors_and_evens_the_values(shape):
    """Each singular value goes its own way by Jordan's a * x + b * x^3 + c * x^5, five times."""
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    torch.testing.assert_close(left.T @ orthogonal(matrix) @ right.T, x.diag(), rtol=0, atol=1e-5)
    assert 0.5 < x.min() < x.max() < 1.3


def test_muon_turns_only_inner_filters_and_decays_the_other_matrices():
    model = build("reference", dropout=0.0)
    optimizer = make_optimizer(model, Config(optimizer="muon", max_lr=0.2, weight_decay=0.25))
    group_of = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    groups = {name: group_of[id(p)] for name, p in model.named_parameters()}
    turned = [name for name, g in groups.items() if g["orthogonal"]]
    assert turned == ["conv2.weight", "conv3.weight", "conv4.weight", "conv5.weight"]
    decays = {name: g["weight_decay"] for name, g in groups.items() if g["weight_decay"]}
    assert decays == dict.fromkeys(("conv1.weight", "onecross.weight", "conv6.weight"), 0.25)
    before = model.conv4.weight.detach().clone()
    model(torch.rand(8, 1, 28, 28)).square().sum().backward()
    optimizer.step()
    # the learning rate of 0.2 times a tenth
    values = torch.linalg.svdvals((model.conv4.weight.detach() - before).flatten(1) / 0.02)
    assert 0.5 < values.median() < values.max() < 1.3


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_momentum_falls_to_085_at_the_peak_and_rises_again_only_where_it_cycles(optimizer):
    for cycles in (True, False):
        config = Config(optimizer=optimizer, cycle_momentum=cycles, pct_start=0.5)
        made = make_optimizer(build("reference"), config)
        scheduler = make_scheduler(made, config, 10)
        found = []
        for _ in range(10):
            group = made.param_groups[0]
            found.append(group["betas"][0] if "betas" in group else group["momentum"])
            made.step()
            scheduler.step()
        if cycles:
            assert (found[0], min(found), found[-1]) == pytest.approx((0.95, 0.85, 0.95), abs=0.01)
            assert found.index(min(found)) == 4
        else:
            assert found == [0.9] * 10


# Schedules


def rates(**settings) -> list[float]:
    return learning_rates(Config(epochs=1, cycle_momentum=False, max_lr=1.0, **settings), 100)


def test_391_batches_an_epoch_reproduce_all_twenty_published_learning_rates():
    ends = learning_rates(RECIPES["reference"], 391)[391::391]
    assert [f"{rate:.6f}" for rate in ends] == PUBLISHED


def test_schedules_rise_in_a_straight_line_and_stay_or_fall_to_a_tenth_twice_or_to_nothing():
    random_state = torch.get_rng_state()
    constant = rates(anneal="constant", pct_start=0.2)
    assert constant[:20] == pytest.approx([0.04 + 0.96 * step / 20 for step in range(20)])
    assert constant[20:] == rates(anneal="constant", pct_start=0.0)[20:] == [1.0] * 81
    step = rates(anneal="step", pct_start=0.1)
    assert step[10:] == pytest.approx([1.0] * 50 + [0.1] * 25 + [0.01] * 16)
    linear = rates(anneal="linear", pct_start=0.2)
    assert linear[19:100] == pytest.approx([1 - step / 80 for step in range(81)], abs=1e-4)
    assert linear[100] == 0
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("anneal", ["cos", "linear", "step", "constant"])
def test_every_allowed_warm_up_has_a_schedule_however_short_the_run(anneal):
    for steps in (1, 2, 3, 4, 5, 7, 10, 20):
        for pct_start in (0.0, 1 / 20, 0.1, 1 / 7, 0.2, 0.25, 1 / 3, 0.5, 0.95):
            config = Config(epochs=1, pct_start=pct_start, anneal=anneal, cycle_momentum=False)
            found = learning_rates(config, steps)
            assert len(found) == steps + 1
            assert all(math.isfinite(rate) and 0 <= rate <= 0.01 + 1e-9 for rate in found)
            assert max(found) > 0
