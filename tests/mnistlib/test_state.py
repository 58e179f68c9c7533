"""What changes during training, in parts: each keeps its state, and none can be left out."""

import copy
from dataclasses import replace

import pytest
import torch
from core_helpers import CPU, same, state_in, stop_after, without_seconds
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnistlib import CheckpointError, Config, build, load_checkpoint, train
from mnistlib.checkpoint import save_checkpoint
from mnistlib.state import TrainingState, WeightAverage

PARTS = ["model", "average", "optimizer", "scheduler", "sampler", "random", "progress"]
STEPS = 12
# a small network in three epochs of four steps, with everything switched on that has a state
EVERYTHING = Config(
    model="c4k5s2p d pooled", epochs=3, epoch_images=100, batch_size=25, focus=0.7, ema_decay=0.9,
    dropout=0.3, degrees=10, elastic=0.5, max_lr=0.05, label_smoothing=0.05, norm_images=50, seed=3,
    device="cpu",
    threads=1,
)  # fmt: skip


def moved(model, generator) -> None:
    """Move all weights and statistics as training would."""
    with torch.no_grad():
        for v in model.state_dict().values():
            if v.is_floating_point():
                v.add_(torch.randn(v.shape, generator=generator))


# The averaged weights


def test_the_average_is_torchs_own_moving_average_and_leaves_the_network_alone():
    model, generator = build("early"), torch.Generator().manual_seed(0)
    average = WeightAverage(model, 0.9)
    known = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for n in range(1, 5):
        moved(model, generator)
        before = copy.deepcopy(model.state_dict())
        average.update()
        known.update_parameters(model)
        assert average.steps == n
        found = average.model.state_dict()
        assert same(found, before) == (n == 1)  # the first update copies the weights
        assert same(model.state_dict(), before)
        for name, value in known.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


def test_without_a_decay_the_network_is_its_own_average():
    model = build("early")
    average = WeightAverage(model, 0.0)
    before = copy.deepcopy(model.state_dict())
    average.update()
    assert average.model is model
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
    random_state = torch.get_rng_state()
    average.renew_statistics(images)
    assert torch.equal(torch.get_rng_state(), random_state)  # nothing was dropped
    assert not any(m.training for m in average.model.modules())
    first, norm = average.model[0][0], average.model[0][1]
    with torch.no_grad():
        maps = first((images - 0.1307) / 0.3081)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert norm.momentum == 0.1
    assert not torch.equal(norm.running_mean, model[0][1].running_mean)


# All of it


def test_initial_weights_follow_torchs_random_state_and_augmentation_has_its_own(tiny_config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        state = TrainingState(tiny_config, 500, CPU)
        torch.manual_seed(3)
        assert same(state.model.state_dict(), build("reference").state_dict())
    assert list(vars(state)) == list(state.state_dict()) == PARTS
    assert state.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert state.random.augmentation.initial_seed() == 3 + 2**31


def test_a_schedule_is_as_long_as_the_run(tiny_config):
    config = replace(tiny_config, epochs=7, batch_size=30)
    for images, steps, size in ((0, 7 * 17, 500), (95, 7 * 4, 95)):
        state = TrainingState(replace(config, epoch_images=images), 500, CPU)
        assert state.scheduler.total_steps == steps == len(state.progress.loss)
        assert (state.sampler.n, state.sampler.size) == (500, size)


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
    """Return the path of each value in nested dicts."""
    if not isinstance(part, dict):
        return [path]
    return [p for key, value in part.items() for p in leaves(value, (*path, key))]


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


def test_no_part_of_the_training_state_can_be_left_out_or_be_as_at_the_beginning(
    stopped, whole, tiny_digits, tmp_path
):
    """All parts without their inner values, and each inner value that is not torch's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(EVERYTHING.seed)
        fresh = copy.deepcopy(TrainingState(EVERYTHING, 500, CPU).state_dict())
    ours = ("average", "sampler", "random", "progress")
    paths = [(part,) for part in PARTS]
    paths += [p for p in leaves(stopped["training"]) if len(p) == 2 and p[0] in ours]
    paths += [("optimizer", "param_groups"), ("optimizer", "state"), ("scheduler", "last_epoch")]
    paths += [("average", "weights")]
    assert len(paths) == 24
    idle = []
    for i, path in enumerate(paths):
        beginning = found(fresh, path)
        for value in (NOWHERE, beginning):
            if value is beginning and path == ("progress", "seconds"):
                continue
            content = changed(stopped, path, value)
            if not differs(content, whole, tiny_digits, tmp_path / f"{i}"):
                idle.append((path, value is NOWHERE))
    assert idle == []


KINDS = {
    "everything": {},
    "sgd": {"optimizer": "sgd", "cycle_momentum": False},
    "muon": {"optimizer": "muon", "model": "c4k5s2p r1 d pooled", "cycle_momentum": False},
    "slices": {"slices": 3, "dropout": 0, "threads": 2},
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
    for step in (1, 3, 4, 5, 8, 11, 12) if kind == "everything" else (4, 7):
        folder = tmp_path / f"{step}"
        with monkeypatch.context() as m:
            stop_after(m, step)
            part = train(config, tiny_digits, folder=folder, **options)
        assert part.interrupted == (step < STEPS)
        again = train(replace(config, threads=1), tiny_digits, folder, folder=folder, **options)
        assert same(state_in(again.checkpoint), wanted), step
        assert again.curve == whole.curve, step
        assert same(without_seconds(again.history), without_seconds(whole.history)), step


def test_seconds_add_up_over_an_interruption(stopped, tiny_digits, tmp_path):
    content = copy.deepcopy(stopped)
    assert content["training"]["progress"]["seconds"] > 0
    content["training"]["progress"]["seconds"] = 1000.0
    run = train(EVERYTHING, tiny_digits, save_checkpoint(content, tmp_path), verbose=False)
    assert 1000 < run.history[1]["seconds"] < run.history[2]["seconds"] == run.seconds < 1100
    assert 0 < run.history[0]["seconds"] < 1000
