"""What notebook 09 compares runs by tells any bit; the notebook itself kills and repeats runs."""

import torch

from mnistlib import build
from mniststudy.figures.reproducibility import digest, train_in_new_process


def test_the_digest_tells_a_single_bit_of_any_tensor():
    model = build("reference")
    first = digest(model)
    for tensor in (model.conv6.weight, model.bn5.running_var, model.bn1.bias):
        bits = tensor.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert digest(model) != first
        bits[-1] ^= 1
    assert digest(model) == first


def test_a_new_process_gets_its_environment_and_says_why_it_fails(tiny_config):
    first = "import os; raise SystemExit('no such digits: ' + os.environ['PYTHONHASHSEED'])"
    said = train_in_new_process(tiny_config, first, PYTHONHASHSEED="12345")
    assert said == "no such digits: 12345\n"
