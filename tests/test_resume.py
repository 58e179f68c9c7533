"""What a run goes on from: the latest checkpoint that is whole, and only one of its own."""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from mnistlib import CheckpointError, TrainingError, load_checkpoint, save_checkpoint, train
from mnistlib.__main__ import main
from mnistlib.resume import SAVING, checkpoints, find_checkpoint

LOOP = sys.modules["mnistlib.train"]
STEP = LOOP._step


@pytest.fixture
def config(tiny_config):
    """Return twelve steps in three epochs on few images."""
    return replace(tiny_config, epochs=3, epoch_images=100, batch_size=25)


def stop_at(monkeypatch, step, act) -> None:
    def watched(t, *batch):
        STEP(t, *batch)
        if t.step == step:
            act()

    monkeypatch.setattr(LOOP, "_step", watched)


def steps(folder) -> list[int]:
    return [step for step, _, _ in checkpoints(folder)]


@pytest.fixture
def cut_off(config, tiny_digits, monkeypatch, tmp_path):
    """Return the folder of a run that died in its third epoch."""

    def die():
        raise MemoryError

    with monkeypatch.context() as m:
        stop_at(m, 10, die)
        with pytest.raises(MemoryError):
            train(config, tiny_digits, folder=tmp_path / "run")
    return tmp_path / "run"


def same_end(run, config, tiny_digits) -> bool:
    whole = train(config, tiny_digits, save=False, verbose=False).model.state_dict()
    return all(torch.equal(v, whole[k]) for k, v in run.model.state_dict().items())


def test_an_unfinished_run_has_two_checkpoints_and_a_finished_one_its_last(
    cut_off, config, tiny_digits
):
    assert steps(cut_off) == [4, 8]
    run = train(config, tiny_digits, cut_off, folder=cut_off)
    assert steps(cut_off) == [12]
    assert list(cut_off.iterdir()) == [run.checkpoint]
    assert same_end(run, config, tiny_digits)


@pytest.mark.parametrize("damage", ["a bit", "an end", "all"])
def test_of_a_damaged_latest_checkpoint_the_one_before_is_taken_loudly(
    cut_off, config, tiny_digits, capsys, damage
):
    latest = find_checkpoint(cut_off)
    raw = bytearray(latest.read_bytes())
    raw[len(raw) // 2] ^= 1
    latest.write_bytes({"a bit": raw, "an end": raw[:-1], "all": b""}[damage])
    assert main(["train", "--resume", str(cut_off), "--data", "sample"]) == 1
    said = capsys.readouterr().err
    assert said.count(f"WARNING: not used: {latest} ") == 1
    assert "is of another run" in said  # of other digits; but a whole checkpoint was found
    capsys.readouterr()
    run = train(config, tiny_digits, cut_off, folder=cut_off)
    assert f"WARNING: not used: {latest}" in capsys.readouterr().err
    assert same_end(run, config, tiny_digits)


def test_a_folder_without_a_whole_checkpoint_is_an_error(tmp_path, config, tiny_digits, capsys):
    (tmp_path / "mnist_model_20260101_000000_accNA.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no checkpoint to go on from; begin the run anew"):
        train(config, tiny_digits, tmp_path)
    assert "WARNING" in capsys.readouterr().err


def test_the_latest_is_the_one_with_most_steps_whatever_its_name_and_time_say(
    cut_off, config, tiny_digits
):
    second, first = (path for _, path, _ in reversed(checkpoints(cut_off)))
    kept = load_checkpoint(second)
    kept["training"]["step"], first_name = 100, first.name  # as text, 100 comes before 4 and 8
    forged = save_checkpoint(kept, cut_off)
    first.rename(cut_off / "mnist_model_20990101_000000_acc99.99.pth")
    forged.rename(cut_off / first_name)
    os.utime(cut_off / first_name, (0, 0))
    assert steps(cut_off) == [4, 8, 100]
    assert find_checkpoint(cut_off) == cut_off / first_name


def test_what_killed_saves_left_behind_is_removed_and_a_save_at_work_is_not(cut_off):
    old, new = cut_off / ".saving-old.pth", cut_off / ".saving-new.pth"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - SAVING - 5,) * 2)
    assert steps(cut_off) == [4, 8]
    assert not old.exists()
    assert new.exists()


def test_checkpoints_of_other_runs_in_the_folder_stay(cut_off, config, tiny_digits):
    other = train(replace(config, seed=9), tiny_digits, folder=cut_off).checkpoint
    mine = checkpoints(cut_off)[1][1]
    run = train(config, tiny_digits, mine, folder=cut_off)
    assert set(cut_off.iterdir()) == {other, run.checkpoint}


@pytest.mark.parametrize("step", [1, 6, 9])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(
    config, tiny_digits, monkeypatch, tmp_path, step, number
):
    before = signal.getsignal(number)
    with monkeypatch.context() as m:
        stop_at(m, step, partial(signal.raise_signal, number))
        run = train(config, tiny_digits, folder=tmp_path)
    assert (run.interrupted, run.signal) == (True, number)
    assert load_checkpoint(run.checkpoint)["training"]["step"] == step
    assert signal.getsignal(number) is before
    again = train(config, tiny_digits, tmp_path, folder=tmp_path)
    assert (again.interrupted, again.signal) == (False, 0)
    assert same_end(again, config, tiny_digits)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_ends_with_the_code_of_the_signal(
    tiny_digits, monkeypatch, tmp_path, capsys, number, code
):
    monkeypatch.setattr("mnistlib.__main__.load_mnist", lambda data: tiny_digits)
    stop_at(monkeypatch, 3, partial(signal.raise_signal, number))
    command = ["train", "--epochs", "2", "--epoch-images", "100", "--batch-size", "25"]
    assert main([*command, "--folder", str(tmp_path / "run")]) == code
    assert "Go on with: python -m mnistlib train --resume" in capsys.readouterr().out


def forged(folder, change, training=True):
    """Save a checkpoint with something changed in it, its checksum right; return its path."""
    content = load_checkpoint(find_checkpoint(folder))
    change(content["training"] if training else content)
    return save_checkpoint(content, folder.parent / "forged")


def poisoned(tensor):
    tensor[(0,) * tensor.ndim] = float("nan")


FORGERIES = {
    "a step below zero": lambda s: s.update(step=-1),
    "a step beyond the end": lambda s: s.update(step=13),
    "a step that is no number": lambda s: s.update(step="8"),
    "a step that is none": lambda s: s.update(step=True),
    "fewer losses than steps": lambda s: s.update(loss=s["loss"][:-1]),
    "no counts": lambda s: s.update(correct=None),
    "a history of another length": lambda s: s["history"].pop(),
    "weights of another network": lambda s: s["weights"].pop("conv1.weight"),
    "weights of another shape": lambda s: s["weights"].update({"bn1.weight": torch.ones(3)}),
    "weights that are no dict": lambda s: s.update(weights=[1]),
    "weights that are not finite": lambda s: poisoned(s["weights"]["conv2.weight"]),
    "a running variance that is not": lambda s: poisoned(s["weights"]["bn3.running_var"]),
    "averaged weights that are not": lambda s: poisoned(s["average"]["module.conv1.weight"]),
    "a momentum that is not": lambda s: poisoned(s["optimizer"]["state"][0]["exp_avg"]),
    "no optimizer": lambda s: s.update(optimizer={}),
    "an optimizer without groups": lambda s: s["optimizer"].update(param_groups=[]),
    "a schedule that is none": lambda s: s.update(scheduler=3),
    "random state of no generator": lambda s: s.update(rng=torch.zeros(3)),
    "an order of no generator": lambda s: s.update(order=torch.zeros(5, dtype=torch.uint8)),
    "a distortion of no generator": lambda s: s.update(distort=7),
    "an average of none": lambda s: s.update(average={}),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_training_state_is_refused(cut_off, config, tiny_digits, name):
    path = forged(cut_off, FORGERIES[name])
    with pytest.raises(CheckpointError, match=r"use another checkpoint|train again") as error:
        train(config, tiny_digits, path)
    assert str(path) in str(error.value)


def test_a_random_state_is_not_moved_by_a_checkpoint_that_is_refused(cut_off, config, tiny_digits):
    path = forged(cut_off, lambda s: s.update(distort=7))
    before = torch.get_rng_state()
    with pytest.raises(CheckpointError):
        train(config, tiny_digits, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_keeps_the_checkpoints_before(
    config, tiny_digits, monkeypatch, tmp_path
):
    step = random.Random(0).randrange(9, 13)

    def poison(t, *batch):
        STEP(t, *batch)
        if t.step == step:
            t.loss[t.step - 1] = float("nan")

    with monkeypatch.context() as m:
        m.setattr(LOOP, "_step", poison)
        with pytest.raises(TrainingError, match=f"not finite at step {step} of 12"):
            train(config, tiny_digits, folder=tmp_path)
    assert steps(tmp_path) == [4, 8]
    assert same_end(train(config, tiny_digits, tmp_path), config, tiny_digits)
