"""Optimizers and schedules: orthogonal steps, plain ones, and rates that fall when they should."""

import itertools

import pytest
import torch
from torch import nn

from mnistlib import Config, build, learning_rates
from mnistlib.optimizers import Muon, make_optimizer, orthogonal


@pytest.mark.parametrize("shape", [(8, 72), (16, 144), (32, 9), (8, 8)])
def test_an_orthogonal_step_keeps_the_singular_vectors_and_evens_the_values(shape):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(matrix, steps=8) @ right.T
    off_diagonal = inner - inner.diag().diag()
    assert off_diagonal.abs().max() < 1e-3
    assert inner.diag().min() > 0.5
    assert inner.diag().max() < 1.3


def test_without_orthogonal_groups_muon_is_nesterov_sgd():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    groups = [{"params": ours.parameters(), "orthogonal": False, "weight_decay": 0.01}]
    a = Muon(groups, lr=0.1)
    b = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_muon_turns_only_inner_filters_and_moves_every_parameter():
    model = build("reference", dropout=0.0)
    optimizer = make_optimizer(model, Config(optimizer="muon", max_lr=0.2))
    turned = {id(p) for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]}
    names = [name for name, p in model.named_parameters() if id(p) in turned]
    assert names == ["conv2.weight", "conv3.weight", "conv4.weight", "conv5.weight"]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    step = (model.conv4.weight - before["conv4.weight"]).flatten(1) / 0.02  # rate 0.2 x 0.1
    values = torch.linalg.svdvals(step.detach())
    assert values.median() > 0.5
    assert values.max() < 1.3


def rates(**settings):
    return learning_rates(Config(epochs=1, cycle_momentum=False, max_lr=1.0, **settings), 100)


def test_the_constant_schedule_warms_up_and_stays():
    found = rates(anneal="constant", pct_start=0.2)
    assert found[0] == pytest.approx(0.04)
    assert all(b > a for a, b in itertools.pairwise(found[:21]))
    assert found[20:] == [1.0] * 81


def test_the_step_schedule_falls_to_a_tenth_twice():
    found = rates(anneal="step", pct_start=0.1)
    assert found[10:60] == [1.0] * 50
    assert found[60:85] == pytest.approx([0.1] * 25)
    assert found[85:] == pytest.approx([0.01] * 16)


def test_without_warm_up_a_schedule_begins_at_its_peak():
    assert rates(anneal="constant", pct_start=0.0) == [1.0] * 101
