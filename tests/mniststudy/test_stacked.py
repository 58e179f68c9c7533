"""Seeds side by side: each is the run that it is alone."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mnistlib import (
    CheckpointError,
    ConfigError,
    build,
    configure,
    evaluate,
    load_model,
    train,
)
from mnistlib.paths import only_here
from mniststudy.runs.ledger import read_results
from mniststudy.runs.stacked import stack, sweep_stacked, train_stacked

# all that a stack can do: hard examples, averaged weights, statistics anew, every augmentation
SHORT = configure(
    "reference-fast", model="c4 r1 p = p shared", epochs=2, epoch_images=400, slices=1,
    elastic=0.5, max_lr=0.02, norm_images=200, device="cpu", threads=1,
)  # fmt: skip


@pytest.fixture
def double():
    """In float64 a stack and single runs differ by the order of sums only, so hardly at all."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


@pytest.fixture
def at_hand(tiny_digits, monkeypatch):
    monkeypatch.setattr(sys.modules[sweep_stacked.__module__], "load_mnist", lambda _: tiny_digits)


STACKED = [
    "reference", "c8 rs2 = p s12 r1 = p rs1 shared", "gelu bias c8p r1 p = depthwise", "net-682",
    "w7 c8 w3 r1 p = w15 shared",
]  # fmt: skip


@pytest.mark.parametrize("spec", STACKED)
def test_each_network_of_a_stack_gives_the_logits_and_gradients_that_it_gives_alone(spec, double):
    models = [build(spec, dropout=0.0) for _ in range(3)]
    images, labels = torch.rand(5, 3, 28, 28), torch.randint(10, (5, 3))
    wide = stack(models)
    logits = wide(images).view(5, 3, 10)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    together = torch.autograd.grad(loss, list(wide.parameters()))
    for k, model in enumerate(models):
        alone = model(images[:, k : k + 1])
        torch.testing.assert_close(logits[:, k], alone, rtol=0, atol=1e-12)
        loss = F.cross_entropy(alone, labels[:, k], reduction="sum")
        own = torch.autograd.grad(loss, list(model.parameters()))
        for gradient, part in zip(own, together, strict=True):
            torch.testing.assert_close(part.chunk(3)[k], gradient, rtol=0, atol=1e-11)


def test_a_stacked_seed_is_the_run_that_it_is_alone(tiny_digits, double):
    runs = train_stacked([replace(SHORT, seed=seed) for seed in (3, 4)], tiny_digits)
    for run, seed in zip(runs, (3, 4), strict=True):
        alone = train(
            replace(SHORT, seed=seed), tiny_digits, eval_every=None, save=False, verbose=False
        )
        assert (run.config, run.source, run.n_val) == (alone.config, alone.source, alone.n_val)
        for row, own in zip(run.history, alone.history, strict=True):
            same = {name: own[name] for name in own if name != "seconds"}
            assert {name: row[name] for name in same} == pytest.approx(same, rel=1e-9, nan_ok=True)
        for name in ("loss", "lr"):
            assert run.curve[name] == pytest.approx(alone.curve[name], rel=1e-9)
        for weight, own in zip(run.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(weight, own, rtol=0, atol=1e-9)
        assert not any(module.training for module in run.model.modules())


@pytest.mark.parametrize(
    "configs",
    [
        [SHORT, replace(SHORT, seed=1, epochs=4)],
        [configure("reference")],
        [replace(SHORT, slices=2)],
        [replace(SHORT, dropout=0.1)],
        [replace(SHORT, start="best-6174")],
    ],
)
def test_configs_that_cannot_be_stacked_are_refused(configs, tiny_digits):
    with pytest.raises(ConfigError, match="stack"):
        train_stacked(configs, tiny_digits)


def test_a_stacked_sweep_records_each_seed_once_and_goes_on(tiny_digits, at_hand, tmp_path, capsys):
    short = replace(SHORT, epochs=1)
    configs = [replace(short, seed=seed) for seed in range(2)]
    other = replace(short, model="c4p r1 p pooled", seed=5)
    assert sweep_stacked([*configs, other], tmp_path) == (3, 0)
    rows = read_results(folder=tmp_path)
    assert sorted(rows["seed"]) == [0, 1, 5]
    assert set(rows["model"]) == {SHORT.model, other.model}
    assert rows["test_accuracy"].isna().all()
    assert sweep_stacked(configs, tmp_path, test=True) == (2, 0)
    assert read_results(folder=tmp_path)["test_accuracy"].notna().sum() == 2
    with pytest.raises(ConfigError, match="slices=1"):  # before anything is trained
        sweep_stacked([replace(short, seed=9), replace(short, slices=2)], tmp_path)
    with (  # as the same command does, given twice at once
        only_here(tmp_path / replace(short, seed=7).run_name("mnist"), ".training", OSError),
        pytest.raises(CheckpointError, match="another process"),
    ):
        sweep_stacked([replace(short, seed=7)], tmp_path)
    wild = replace(short, max_lr=99.0, seed=6, ema_decay=0.0)
    assert sweep_stacked([*configs, wild, replace(short, seed=2)], tmp_path) == (1, 1)
    assert "FAILED: custom, 1 seeds: the weights of seed 6" in capsys.readouterr().err
    assert sorted(read_results(folder=tmp_path)["seed"]) == [0, 1, 2, 5]


def test_kept_weights_are_those_of_the_row_and_cannot_be_resumed(tiny_digits, at_hand, tmp_path):
    config = replace(SHORT, epochs=1, split="none")
    sweep_stacked([config], tmp_path / "ledger", test=True, keep=tmp_path / "kept")
    (path,) = (tmp_path / "kept").glob("*/*.pth")
    row = read_results(folder=tmp_path / "ledger").iloc[0]
    seen = evaluate(load_model(path), *tiny_digits.test)
    assert seen.accuracy == pytest.approx(row["test_accuracy"], abs=1e-4)
    assert path.stem.endswith(f"_test{row['test_accuracy']:.2f}")
    with pytest.raises(CheckpointError, match="final weights only"):
        train(config, tiny_digits, path)
