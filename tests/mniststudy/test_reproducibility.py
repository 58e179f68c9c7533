"""What notebook 11 compares runs by tells any bit; the notebook itself kills and repeats runs."""

import sys
from dataclasses import replace

import torch

from mnistlib import build, train
from mniststudy.figures import reproducibility
from mniststudy.figures.reproducibility import digest, train_and_kill, train_in_new_process


def test_the_digest_tells_a_single_bit_of_any_tensor():
    model = build("reference")
    first = digest(model)
    for tensor in (model.conv6.weight, model.bn5.running_var, model.bn1.bias):
        bits = tensor.data.view(torch.int32).flatten()
        bits[-1] ^= 1
        assert digest(model) != first
        bits[-1] ^= 1
    assert digest(model) == first


def test_a_training_that_is_killed_has_come_to_the_last_step_that_it_saved(
    tiny_config, tiny_digits, tmp_path, monkeypatch
):
    for epochs in (1, 2):  # of four steps
        config = replace(tiny_config, epochs=epochs)
        train(config, tiny_digits, folder=tmp_path, verbose=False)
    sleep = [sys.executable, "-c", "import time; time.sleep(300)"]
    monkeypatch.setattr(reproducibility, "_command", lambda *_: sleep)
    assert train_and_kill(config, tmp_path, 2) == 8


def test_a_new_process_gets_its_environment_and_says_why_it_fails(tiny_config):
    first = "import os; raise SystemExit('no such digits: ' + os.environ['PYTHONHASHSEED'])"
    said = train_in_new_process(tiny_config, first, PYTHONHASHSEED="12345")
    assert said == "no such digits: 12345\n"
