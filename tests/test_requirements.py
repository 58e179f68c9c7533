"""The reference's four requirements, met by its network and missed by networks that break one."""

import copy

import pytest
import torch
from torch import nn

from mnistlib import build, requirements

PARAMETERS = "fewer than 20,000 parameters"
BATCHNORM = "BatchNorm in use"
DROPOUT = "Dropout in use"
SHAPE = "28x28 in, 10 out"


def small(norm=nn.BatchNorm2d, dropout=0.5, width=4, channels=1, side=28, head=10, spare=None):
    """All four requirements met, unless an argument breaks one."""
    first = nn.Conv2d(channels, width, kernel_size=4, stride=4, bias=False)
    if spare is not None:
        first.spare = spare  # part of the network, never called
    last = nn.Linear(width * (side // 4) ** 2, head)
    return nn.Sequential(first, norm(width), nn.Dropout(dropout), nn.Flatten(), last)


def missed(model, **limit):
    return [name for name, met in requirements(model, **limit).items() if not met]


def test_the_four_requirements_are_those_of_the_reference():
    assert list(requirements(build("reference"))) == [PARAMETERS, BATCHNORM, DROPOUT, SHAPE]
    assert missed(small()) == []


def test_total_parameter_count():
    assert requirements(build("reference"))[PARAMETERS]
    assert missed(small(width=50)) == [PARAMETERS]


@pytest.mark.parametrize(("limit", "met"), [(13_912, False), (13_913, True)])
def test_the_parameter_limit_itself_is_too_many(limit, met):
    checks = requirements(build("reference"), limit=limit)
    assert checks[f"fewer than {limit:,} parameters"] is met


def test_batch_normalization_usage():
    assert requirements(build("reference"))[BATCHNORM]
    assert missed(small(norm=nn.Identity)) == [BATCHNORM]


def test_batch_normalization_that_is_never_called_does_not_count():
    assert missed(small(norm=nn.Identity, spare=nn.BatchNorm2d(4))) == [BATCHNORM]
    model = build("reference")
    model.spare = model.bn1
    for k in range(1, 6):
        setattr(model, f"bn{k}", nn.Identity())
    assert missed(model) == [BATCHNORM]


def test_dropout_layer_usage():
    assert requirements(build("reference"))[DROPOUT]
    assert missed(build("reference", dropout=0.0)) == [DROPOUT]
    assert missed(small(dropout=0.0)) == [DROPOUT]


def test_dropout_that_is_never_called_does_not_count():
    assert missed(small(dropout=0.0, spare=nn.Dropout(0.5))) == [DROPOUT]


@pytest.mark.parametrize("head", [9, 11])
def test_input_and_output_shape(head):
    assert requirements(build("reference"))[SHAPE]
    assert missed(small(head=head)) == [SHAPE]


@pytest.mark.parametrize("sizes", [(10, 1, 1), (1, 10)])
def test_logits_with_more_than_two_dimensions_have_the_wrong_shape(sizes):
    model = small()
    model.append(nn.Unflatten(1, sizes))
    assert missed(model) == [SHAPE]


@pytest.mark.parametrize("other", [{"channels": 3}, {"side": 32}])
def test_a_network_of_other_images_fails_all_that_needs_a_whole_pass(other):
    assert missed(small(**other))[-2:] == [DROPOUT, SHAPE]
    assert requirements(small(**other))[PARAMETERS]


@pytest.mark.parametrize("training", [True, False])
def test_the_checks_leave_network_and_random_state_as_they_were(training):
    model = build("reference").train(training)
    model.bn1.train(not training)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    requirements(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in model.parameters())
