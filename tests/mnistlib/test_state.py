"""What changes during training, in parts: each keeps its state, and none can be left out."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from core_helpers import CPU, same, state_in, stop_after, weights, without_seconds
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnistlib import CheckpointError, Config, build, load_checkpoint, train
from mnistlib.checkpoint import save_checkpoint
from mnistlib.state import Progress, RandomState, TrainingState, WeightAverage

PARTS = ["model", "average", "optimizer", "scheduler", "sampler", "random", "progress"]
STEPS = 12
# a small network in three epochs of four steps, with everything switched on that has a state
EVERYTHING = Config(
    model="c4k5s2p d pooled", epochs=3, epoch_images=100, batch_size=25, focus=0.7, ema_decay=0.9,
    dropout=0.3, degrees=10, elastic=0.5, max_lr=0.05, label_smoothing=0.05, norm_images=50, seed=3,
    device="cpu",
    threads=1,
)  # fmt: skip


def test_a_training_state_has_these_parts_each_with_a_state(tiny_config):
    state = TrainingState(tiny_config, 500, CPU)
    assert list(vars(state)) == list(state.state_dict()) == PARTS


def moved(model, generator) -> None:
    """Move all weights and statistics as training would."""
    with torch.no_grad():
        for v in model.state_dict().values():
            if v.is_floating_point():
                v.add_(torch.randn(v.shape, generator=generator))


# The averaged weights


def test_the_average_is_torchs_own_moving_average():
    model, generator = build("early"), torch.Generator().manual_seed(0)
    average = WeightAverage(model, 0.9)
    known = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for n in range(1, 6):
        moved(model, generator)
        average.update()
        known.update_parameters(model)
        assert average.steps == n
        found = average.model.state_dict()
        for name, value in known.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_the_first_update_copies_the_weights():
    model = build("early")
    average = WeightAverage(model, 0.99)
    moved(model, torch.Generator().manual_seed(0))
    average.update()
    assert same(average.model.state_dict(), model.state_dict())


def test_the_average_leaves_the_network_under_training_alone():
    model = build("early")
    average = WeightAverage(model, 0.9)
    before = copy.deepcopy(model.state_dict())
    average.update()
    moved(average.model, torch.Generator().manual_seed(0))
    assert same(model.state_dict(), before)


def test_without_a_decay_the_network_is_its_own_average():
    model = build("early")
    average = WeightAverage(model, 0.0)
    assert average.model is model
    before = copy.deepcopy(model.state_dict())
    average.update()
    assert same(model.state_dict(), before)
    assert average.state_dict() == {}


def test_a_weight_that_two_layers_share_is_averaged_once():
    model = build("c4p r1 = pooled", dropout=0.0)
    average = WeightAverage(model, decay=0.5)
    average.update()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    before = [p.clone() for p in average.model.parameters()]
    average.update()
    for old, new in zip(before, average.model.parameters(), strict=True):
        torch.testing.assert_close(new, (old + 1) / 2)


def test_renewed_statistics_are_those_of_the_images_in_the_averaged_network():
    model = build("c4 p r1 p pooled", dropout=0.5)
    average = WeightAverage(model, decay=0.9)
    average.update()
    images = torch.rand(1000, 1, 28, 28)
    average.renew_statistics(images)
    first, norm = average.model[0][0], average.model[0][1]
    with torch.no_grad():
        maps = first((images - 0.1307) / 0.3081)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert norm.momentum == 0.1
    assert not torch.equal(norm.running_mean, model[0][1].running_mean)


def test_an_average_goes_on_from_its_state():
    generator = torch.Generator().manual_seed(0)
    model = build("early")
    average = WeightAverage(model, 0.9)
    for _ in range(2):
        moved(model, generator)
        average.update()
    twin = WeightAverage(copy.deepcopy(model), 0.9)
    moved(twin.model, generator)  # another past
    twin.load_state_dict(copy.deepcopy(average.state_dict()))
    other = copy.deepcopy(model)
    fresh = WeightAverage(other, 0.9)
    fresh.load_state_dict(copy.deepcopy(average.state_dict()))
    moved(model, torch.Generator().manual_seed(1))
    moved(other, torch.Generator().manual_seed(1))
    average.update()
    fresh.update()
    assert same(fresh.state_dict(), average.state_dict())
    assert not same(twin.state_dict(), average.state_dict())


# Random numbers


def test_augmentation_draws_from_its_own_source_by_the_seed():
    states = [RandomState(seed, CPU).augmentation.get_state() for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert RandomState(5, CPU).augmentation.initial_seed() == 5 + 2**31


def test_both_sources_go_back_to_where_they_were():
    with torch.random.fork_rng(devices=[]):
        random = RandomState(0, CPU)
        torch.rand(3)
        torch.rand(3, generator=random.augmentation)
        state = random.state_dict()
        wanted = torch.rand(4), torch.rand(4, generator=random.augmentation)
        torch.manual_seed(9)
        other = RandomState(7, CPU)
        other.load_state_dict(state)
        assert torch.equal(torch.rand(4), wanted[0])
        assert torch.equal(torch.rand(4, generator=other.augmentation), wanted[1])


# Progress


def test_progress_keeps_loss_and_correct_predictions_of_every_step():
    progress = Progress(3, CPU)
    for loss, correct in ((2.5, 7), (1.25, 9)):
        progress.record(torch.tensor(loss), torch.tensor(correct))
    progress.evals.append([2, 12.5])
    assert progress.step == 2
    assert progress.curve() == {"loss": [2.5, 1.25], "eval_step": [2], "eval_error": [12.5]}
    assert progress.state_dict()["correct"].tolist() == [7, 9]
    other = Progress(3, CPU)
    other.load_state_dict(progress.state_dict())
    other.record(torch.tensor(0.5), torch.tensor(10))
    assert other.curve()["loss"] == [2.5, 1.25, 0.5]
    other.history.append({})
    other.evals.append([3, 0.0])
    assert (progress.history, progress.evals, progress.step) == ([], [[2, 12.5]], 2)


# All of it


def test_initial_weights_follow_torchs_random_state_and_lie_channels_last(tiny_config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = TrainingState(tiny_config, 500, CPU)
        torch.manual_seed(3)
        assert same(state.model.state_dict(), build("reference").state_dict())
    assert state.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_schedule_is_as_long_as_the_run(tiny_config):
    config = replace(tiny_config, epochs=7, batch_size=30)
    state = TrainingState(config, 500, CPU)
    assert state.scheduler.total_steps == 7 * 17 == len(state.progress.loss)
    assert state.sampler.size == 500
    part = TrainingState(replace(config, epoch_images=95), 500, CPU)
    assert part.scheduler.total_steps == 7 * 4 == len(part.progress.loss)
    assert (part.sampler.n, part.sampler.size) == (500, 95)


@pytest.fixture(scope="module")
def whole(tiny_digits, tmp_path_factory):
    """Return the run without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return train(EVERYTHING, tiny_digits, folder=folder, eval_every=3, verbose=False)


@pytest.fixture(scope="module")
def stopped(tiny_digits, tmp_path_factory):
    """Return what is in the checkpoint of the run when it is stopped amid its second epoch."""
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 6)
        folder = tmp_path_factory.mktemp("stopped")
        run = train(EVERYTHING, tiny_digits, folder=folder, eval_every=3, verbose=False)
    return load_checkpoint(run.checkpoint)


def leaves(part, path=()) -> list[tuple]:
    """Return the path of each value in nested dicts, and of each part of a TrainingState."""
    if not isinstance(part, dict):
        return [path]
    inner = [p for key, value in part.items() for p in leaves(value, (*path, key))]
    return inner if len(path) != 1 else [path, *inner]


NOWHERE = object()


def found(state, path):
    for key in path:
        if not isinstance(state, dict) or key not in state:
            return NOWHERE
        state = state[key]
    return state


def changed(content, path, value) -> dict:
    """Return a checkpoint's content with one value of its training state replaced or left out."""
    content = copy.deepcopy(content)
    *outer, last = path
    inner = found(content["training"], outer)
    if value is NOWHERE:
        del inner[last]
    else:
        inner[last] = value
    return content


def differs(content, whole, tiny_digits, folder) -> bool:
    """Whether a run that goes on from a checkpoint is refused or ends in other bits."""
    path = save_checkpoint(content, folder)
    try:
        run = train(EVERYTHING, tiny_digits, path, folder=folder, eval_every=3, verbose=False)
    except (CheckpointError, KeyError, RuntimeError, ValueError, TypeError):
        return True
    return not same(state_in(run.checkpoint), state_in(whole.checkpoint))


def test_a_run_that_lacks_nothing_ends_in_the_same_bits(stopped, whole, tiny_digits, tmp_path):
    assert set(stopped["training"]) == set(PARTS)
    assert not differs(stopped, whole, tiny_digits, tmp_path)


def test_no_part_of_the_training_state_can_be_left_out(stopped, whole, tiny_digits, tmp_path):
    paths = leaves(stopped["training"])
    assert len(paths) > 50
    assert {path[0] for path in paths if len(path) == 1} == set(PARTS)
    needless = {
        ("scheduler", key) for key in stopped["training"]["scheduler"] if key != "last_epoch"
    }  # torch's scheduler sets these itself, or works without
    idle = []
    for i, path in enumerate(p for p in paths if p not in needless):
        content = changed(stopped, path, NOWHERE)
        if not differs(content, whole, tiny_digits, tmp_path / f"{i}"):
            idle.append(path)
    assert idle == []


def test_no_part_of_the_training_state_can_be_as_at_the_beginning(
    stopped, whole, tiny_digits, tmp_path
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(EVERYTHING.seed)
        fresh = copy.deepcopy(TrainingState(EVERYTHING, 500, CPU).state_dict())
    idle, tried = [], set()
    for i, path in enumerate(leaves(stopped["training"])):
        beginning = found(fresh, path)
        as_it_is = same(beginning, found(stopped["training"], path))
        if beginning is NOWHERE or as_it_is or path == ("progress", "seconds"):
            continue
        if path[0] == "scheduler" and path[1:] not in ((), ("last_epoch",)):
            continue  # counts that torch's scheduler keeps for itself
        tried.add(path)
        content = changed(stopped, path, beginning)
        if not differs(content, whole, tiny_digits, tmp_path / f"{i}"):
            idle.append(path)
    assert idle == []
    assert tried >= {(part,) for part in PARTS} | {
        ("average", "steps"), ("optimizer", "param_groups"),
        ("scheduler", "last_epoch"), ("sampler", "epoch_start"), ("sampler", "seen"),
        ("sampler", "last_loss"), ("sampler", "epoch_loss"), ("random", "device"),
        ("random", "augmentation"), ("progress", "step"), ("progress", "loss"),
        ("progress", "correct"), ("progress", "history"), ("progress", "evals"),
    }  # fmt: skip


KINDS = {
    "everything": {},
    "sgd": {"optimizer": "sgd", "cycle_momentum": False},
    "muon": {"optimizer": "muon", "model": "c4k5s2p r1 d pooled", "cycle_momentum": False},
    "adam, no average": {"optimizer": "adam", "ema_decay": 0},
    "steps": {"anneal": "step", "cycle_momentum": False},
    "no focus, a short last batch": {"focus": 0, "batch_size": 30},
    "all images, nothing augmented": {
        "epoch_images": 0, "batch_size": 125, "focus": 0, "degrees": 0, "elastic": 0
    },
    "more than all images": {"epoch_images": 700, "batch_size": 175, "focus": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_goes_on_from_any_step_to_the_same_bits(kind, tiny_digits, monkeypatch, tmp_path):
    config = replace(EVERYTHING, **KINDS[kind])
    options = {"eval_every": 3, "verbose": False}
    whole = train(config, tiny_digits, folder=tmp_path / "whole", **options)
    wanted = state_in(whole.checkpoint)
    every = range(1, STEPS + 1)
    for step in every if kind in ("everything", "all images, nothing augmented") else (1, 4, 7):
        folder = tmp_path / f"{step}"
        with monkeypatch.context() as m:
            stop_after(m, step)
            part = train(config, tiny_digits, folder=folder, **options)
        assert part.interrupted == (step < STEPS)
        again = train(config, tiny_digits, folder, folder=folder, **options)
        assert same(state_in(again.checkpoint), wanted), step
        assert same(weights(again), weights(whole)), step
        assert again.curve == whole.curve, step
        assert same(without_seconds(again.history), without_seconds(whole.history)), step


def test_seconds_add_up_over_an_interruption(tiny_digits, monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        stop_after(m, 6)
        part = train(EVERYTHING, tiny_digits, folder=tmp_path, verbose=False)
    content = load_checkpoint(part.checkpoint)
    assert content["training"]["progress"]["seconds"] == part.seconds > 0
    content["training"]["progress"]["seconds"] = 1000.0
    path = save_checkpoint(content, tmp_path / "later")
    run = train(EVERYTHING, tiny_digits, path, verbose=False)
    assert 1000 < run.history[1]["seconds"] < run.history[2]["seconds"] == run.seconds < 1100
    assert math.isfinite(run.history[0]["seconds"])
