"""What changes during training, in parts: the average, and that each part keeps its state."""

import copy
from dataclasses import replace

import pytest
import torch
from core_helpers import same, state_in, stop_after, without_seconds
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnistlib import Config, build, load_checkpoint, train
from mnistlib.checkpoint import save_checkpoint
from mnistlib.state import WeightAverage

STEPS = 12
# a small network in three epochs of four steps, with everything switched on that has a state
EVERYTHING = Config(
    model="c4k5s2p d pooled", epochs=3, epoch_images=100, batch_size=25, focus=0.7, ema_decay=0.9,
    dropout=0.3, degrees=10, elastic=0.5, max_lr=0.05, label_smoothing=0.05, norm_images=50, seed=3,
    device="cpu",
    threads=1,
)  # fmt: skip


# The averaged weights


@pytest.mark.parametrize("spec", ["early", "c4p r1 = pooled"])  # the latter shares weights
def test_the_average_is_torchs_own_moving_average_and_leaves_the_network_alone(spec):
    model, generator = build(spec), torch.Generator().manual_seed(0)
    average = WeightAverage(model, 0.9)
    known = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for n in range(1, 5):
        with torch.no_grad():  # move all weights and statistics as training would
            for v in (*model.parameters(), *model.buffers()):
                if v.is_floating_point():
                    v.add_(torch.randn(v.shape, generator=generator))
        before = copy.deepcopy(model.state_dict())
        average.update()
        known.update_parameters(model)
        found = average.model.state_dict()
        assert same(found, before) == (n == 1)  # the first update copies the weights
        assert same(model.state_dict(), before)
        for name, value in known.module.state_dict().items():
            if value.is_floating_point():
                torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


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


def test_seconds_add_up_over_an_interruption(tiny_digits, monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        stop_after(m, 6)
        run = train(EVERYTHING, tiny_digits, verbose=False)
    content = load_checkpoint(run.checkpoint)
    assert content["training"]["progress"]["seconds"] > 0
    content["training"]["progress"]["seconds"] = 1000.0
    run = train(EVERYTHING, tiny_digits, save_checkpoint(content, tmp_path), verbose=False)
    assert 1000 < run.history[1]["seconds"] < run.history[2]["seconds"] == run.seconds < 1100
    assert 0 < run.history[0]["seconds"] < 1000
