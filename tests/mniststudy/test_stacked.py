"""Seeds side by side: each is the run that it is alone."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mnistlib import (
    CheckpointError,
    Config,
    ConfigError,
    TrainingError,
    build,
    configure,
    evaluate,
    load_model,
    train,
)
from mniststudy.runs.ledger import read_results
from mniststudy.runs.stacked import stack, sweep_stacked, train_stacked

STACKED = sys.modules["mniststudy.runs.stacked"]

SPECS = (
    "reference",
    "c8 rs2 = p s12 r1 = p rs1 shared",
    "silu c8p r1 p = depthwise",
    "c8k5s2 r1 p x12 r1 separable",
    "bias c8 p rs1 p pooled",
)
SHORT = configure(
    "reference-fast", epochs=3, epoch_images=700, slices=1, elastic=0.5, max_lr=0.02, device="cpu"
)


@pytest.fixture
def double():
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(usual)


@pytest.mark.parametrize("spec", SPECS)
def test_each_network_of_a_stack_gives_the_logits_and_gradients_that_it_gives_alone(spec, double):
    torch.manual_seed(0)
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


def test_networks_of_a_stack_do_not_mix():
    models = [build("reference", dropout=0.0) for _ in range(2)]
    wide = stack(models).eval()
    images = torch.rand(4, 2, 28, 28)
    before = wide(images)[:, :10]
    images[:, 1] = torch.rand(4, 28, 28)
    assert torch.equal(wide(images)[:, :10], before)


def test_a_stacked_seed_is_the_run_that_it_is_alone(tiny_digits):
    settings = replace(SHORT, norm_images=200)
    runs = train_stacked([replace(settings, seed=seed) for seed in (3, 4)], tiny_digits)
    for run, seed in zip(runs, (3, 4), strict=True):
        alone = train(replace(settings, seed=seed), tiny_digits, save=False, verbose=False)
        assert (run.config, run.source) == (alone.config, alone.source)
        assert [row["epoch"] for row in run.history] == [1, 2, 3]
        for row, own in zip(run.history, alone.history, strict=True):
            assert row["train_loss"] == pytest.approx(own["train_loss"], rel=2e-3)
            assert row["lr"] == pytest.approx(own["lr"])
        assert run.curve["loss"] == pytest.approx(alone.curve["loss"], rel=5e-3)
        assert not any(module.training for module in run.model.modules())
        assert run.history[-1]["val_loss"] == pytest.approx(alone.history[-1]["val_loss"], rel=5e-3)


def test_a_seed_does_not_depend_on_what_it_is_stacked_with(tiny_digits):
    settings = replace(SHORT, epochs=1)
    one, other = (
        train_stacked([replace(settings, seed=seed) for seed in seeds], tiny_digits)[0]
        for seeds in ((7,), (7, 8, 9))
    )
    assert one.history[-1]["train_loss"] == pytest.approx(other.history[-1]["train_loss"], 1e-3)


@pytest.mark.parametrize(
    "configs",
    [
        [SHORT, replace(SHORT, seed=1, epochs=4)],
        [configure("reference")],
        [replace(SHORT, slices=2)],
        [Config(optimizer="sgd", cycle_momentum=False, dropout=0.1)],
    ],
)
def test_configs_that_cannot_be_stacked_are_refused(configs, tiny_digits):
    with pytest.raises(ConfigError, match="stack"):
        train_stacked(configs, tiny_digits)


def test_weights_that_are_not_finite_are_an_error_that_names_the_seed(tiny_digits):
    wild = replace(SHORT, max_lr=99.0, seed=5, epochs=1, ema_decay=0.0)
    with pytest.raises(TrainingError, match="seed 5"):
        train_stacked([wild], tiny_digits)


def test_a_stacked_sweep_records_each_seed_once_and_goes_on(tiny_digits, monkeypatch, tmp_path):
    monkeypatch.setattr(STACKED, "load_mnist", lambda data: tiny_digits)
    short = replace(SHORT, epochs=1)
    configs = [replace(short, seed=seed) for seed in range(2)]
    other = replace(short, model="c4p r1 p pooled", seed=5)
    assert sweep_stacked([*configs, other], tmp_path) == (3, 0)
    rows = read_results(folder=tmp_path)
    assert sorted(rows["seed"]) == [0, 1, 5]
    assert set(rows["model"]) == {"reference", "c4p r1 p pooled"}
    assert rows["test_accuracy"].isna().all()
    assert sweep_stacked([*configs, replace(short, seed=2)], tmp_path) == (1, 0)
    assert sweep_stacked(configs, tmp_path, test=True) == (2, 0)
    assert read_results(folder=tmp_path)["test_accuracy"].notna().sum() == 2


def test_kept_weights_are_those_of_the_row_and_cannot_be_resumed(
    tiny_digits, monkeypatch, tmp_path
):
    monkeypatch.setattr(STACKED, "load_mnist", lambda data: tiny_digits)
    config = replace(SHORT, epochs=1, split="none")
    sweep_stacked([config], tmp_path / "ledger", test=True, keep=tmp_path / "kept")
    (path,) = (tmp_path / "kept").glob("*/*.pth")
    row = read_results(folder=tmp_path / "ledger").iloc[0]
    seen = evaluate(load_model(path), *tiny_digits.test)
    assert seen.accuracy == pytest.approx(row["test_accuracy"], abs=1e-4)
    assert path.stem.endswith(f"_test{row['test_accuracy']:.2f}")
    with pytest.raises(CheckpointError, match="final weights only"):
        train(config, tiny_digits, path)


def test_a_stack_that_fails_is_reported_and_the_others_go_on(
    tiny_digits, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(STACKED, "load_mnist", lambda data: tiny_digits)
    short = replace(SHORT, epochs=1)
    wild = replace(short, max_lr=99.0, seed=5, ema_decay=0.0)
    assert sweep_stacked([wild, short], tmp_path) == (1, 1)
    assert "FAILED: custom, 1 seeds: the weights of seed 5" in capsys.readouterr().err


def test_nothing_is_trained_if_one_of_the_configs_cannot_be_stacked(
    tiny_digits, monkeypatch, tmp_path
):
    monkeypatch.setattr(STACKED, "load_mnist", lambda data: tiny_digits)
    monkeypatch.setattr(STACKED, "train_stacked", lambda *args: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="slices=1"):
        sweep_stacked([SHORT, replace(SHORT, slices=2)], tmp_path)
