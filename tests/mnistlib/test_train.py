"""The training loop: what it computes, what it returns, and that stopping it loses nothing."""

import math
import re
import signal
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from core_helpers import (
    LOOP,
    after_step,
    ctrl_c,
    same,
    state_in,
    stop_after,
    weights,
    within_step,
    without_seconds,
)
from torch.optim.swa_utils import update_bn

from mnistlib import (
    RECIPES,
    CheckpointError,
    Config,
    ConfigError,
    TrainingError,
    augment,
    build,
    evaluate,
    learning_rates,
    load_checkpoint,
    load_model,
    train,
)
from mnistlib.checkpoint import checkpoints, save_checkpoint
from mnistlib.paths import only_here
from mnistlib.runtime import stop_on_signal

KEYS = ["epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "seconds"]
QUICK = Config(  # two epochs of four steps
    epochs=2, epoch_images=100, batch_size=25, max_lr=0.02, degrees=5, pixels=1, scale=0.05,
    shear=2, ema_decay=0.9, label_smoothing=0.05, seed=3, device="cpu", threads=1,
)  # fmt: skip
STEPS = 8


@pytest.fixture
def quick(tiny_digits):
    """Return `train` on the tiny digits, without its table."""
    return partial(train, digits=tiny_digits, verbose=False)


@pytest.fixture(scope="module")
def whole(tiny_digits, tmp_path_factory):
    """Return the run of `QUICK`, without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return train(QUICK, tiny_digits, folder=folder, eval_every=3, verbose=False)


# What it computes: the same as a loop that one would write in a notebook


def bare_loop(config, digits) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Train by AdamW and OneCycleLR in plain lines.

    Return a row of loss, correct answers, images and learning rate for each step, and the averaged
    weights.
    """
    ids = digits.split(config.split)[0]
    order = torch.Generator().manual_seed(config.seed)
    amounts = torch.Generator().manual_seed(config.seed + 2**31)
    torch.manual_seed(config.seed)
    model = build(config.model, config.dropout).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.max_lr, weight_decay=config.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.max_lr, epochs=config.epochs, steps_per_epoch=4, pct_start=0.2
    )
    rows, average = [], {}
    for _ in range(config.epochs):
        for batch in ids[torch.randperm(len(ids), generator=order)].split(config.batch_size):
            images, labels = digits.train_images[batch], digits.train_labels[batch].long()
            if config.augmentation:
                images = augment(images.float() / 255, **config.augmentation, generator=amounts)
            logits = model(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            right = int((logits.argmax(1) == labels).sum())
            rows.append([loss.item(), right, len(batch), optimizer.param_groups[0]["lr"]])
            optimizer.step()
            scheduler.step()
            now = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
            if average and config.ema_decay:
                now = {k: v.lerp(now[k], 1 - config.ema_decay) for k, v in average.items()}
            average = now
    if config.norm_images:
        model.load_state_dict(average, strict=False)
        update_bn(digits.train_images[ids[: config.norm_images]].split(50), model)
        average = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
    return np.array(rows), average


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 130, "dropout": 0.0, "norm_images": 50},
        {"dropout": 0.2, "ema_decay": 0.0, "label_smoothing": 0.0, "seed": 5}
        | dict.fromkeys(("degrees", "pixels", "scale", "shear"), 0),
    ],
    ids=["everything but dropout", "nothing but dropout"],
)
def test_it_computes_what_a_bare_loop_does_to_the_last_bit(
    tiny_config, tiny_digits, quick, settings
):
    config = replace(tiny_config, **settings)
    run = quick(config)
    with torch.random.fork_rng(devices=[]):
        rows, average = bare_loop(config, tiny_digits)
    losses, right, sizes, rates = rows.T
    assert run.curve["loss"] == losses.tolist()
    assert run.curve["lr"] == rates.tolist()
    assert same({k: weights(run)[k] for k in average}, average)
    for epoch, row in enumerate(run.history):  # every image counts once
        part = slice(4 * epoch, 4 * epoch + 4)
        mean = np.average(losses[part], weights=sizes[part])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert row["train_acc"] == pytest.approx(100 * right[part].sum() / 500)
    content = load_checkpoint(run.checkpoint)
    assert same(content["model_state_dict"], weights(run))
    assert same(content["training"]["model"], weights(run)) == (not config.ema_decay)
    assert same(load_model(run.checkpoint).state_dict(), weights(run))


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "muon"])
def test_the_seed_decides_every_bit(quick, optimizer):
    config = replace(QUICK, optimizer=optimizer, epochs=1)
    first, again, other = (quick(replace(config, seed=seed)) for seed in (1, 1, 2))
    assert same(weights(first), weights(again))
    assert first.curve == again.curve
    assert not same(weights(first), weights(other))


def test_training_learns_the_tiny_digits(tiny_config, tiny_digits, quick):
    run = quick(replace(tiny_config, epochs=4, batch_size=50, ema_decay=0.8))
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] / 2
    assert evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy > 90


# What it returns


def test_a_run_tells_what_it_measured(whole, tiny_digits):
    run, rates = whole, learning_rates(QUICK, 4)
    assert [list(row) for row in run.history] == [KEYS, KEYS]
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {type(v) for row in run.history for v in row.values()} == {int, float}
    assert 0 < run.history[0]["seconds"] < run.history[1]["seconds"] == run.seconds
    assert (run.n_val, run.source, run.config) == (100, "mnist", QUICK)
    assert (run.interrupted, run.signal, run.parameters) == (False, 0, 13_912)
    assert (run.versions["device"], run.versions["threads"]) == ("cpu", "1")
    assert [row["lr"] for row in run.history] == [rates[4], rates[8]]
    assert not any(m.training for m in run.model.modules())
    assert all(p.is_contiguous() and p.device.type == "cpu" for p in run.model.parameters())
    ids = tiny_digits.split("random")[1]
    seen = evaluate(run.model, tiny_digits.train_images[ids], tiny_digits.train_labels[ids])
    assert run.history[-1]["val_acc"] == seen.accuracy
    assert run.history[-1]["val_loss"] == pytest.approx(seen.loss, rel=1e-5)


def test_the_history_is_a_table_and_a_recipe_may_be_named(whole, quick, monkeypatch):
    assert whole.table.reset_index().to_dict("records") == whole.history
    with pytest.raises(ConfigError, match="recipe is 'bset', but it must be one of"):
        quick("bset")
    stop_after(monkeypatch, 1)
    assert quick("reference", save=False).config == RECIPES["reference"]


@pytest.mark.parametrize(
    ("images", "batch", "slices"),
    [(101, 25, 1), (101, 50, 2), (100, 5, 4), (103, 20, 2), (0, 499, 1)],
)
def test_an_image_that_would_be_alone_in_its_batch_or_slice_is_refused_before_training(
    quick, images, batch, slices
):
    """Where maps end at 1x1, BatchNorm cannot train on it; elsewhere its statistics are poor."""
    config = Config(epoch_images=images, batch_size=batch, slices=slices, dropout=0, device="cpu")
    with pytest.raises(ConfigError, match=f"batch_size {batch} and slices {slices} would have"):
        quick(config, save=False)


def test_mining_that_has_no_effect_is_said(quick):
    config = replace(QUICK, epochs=1, epoch_images=500, batch_size=250, focus=0.5)
    with pytest.warns(UserWarning, match="focus is 0.5 without effect: .* below the 500 training"):
        quick(config, save=False)


def test_fine_tuning_starts_from_a_released_network_with_the_same_tensors(quick):
    slow = {"start": "best-6174", "epochs": 1, "max_lr": 1e-8, "weight_decay": 0.0, "dropout": 0.0}
    tuned = quick(replace(QUICK, model="rounded-6174", **slow)).model.state_dict()
    for name, weight in load_model("best-6174").named_parameters():
        torch.testing.assert_close(tuned[name], weight, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="start is 'best-6174', which has other tensors than mod"):
        quick(replace(QUICK, model="net-7918", **slow))
    with pytest.raises(CheckpointError, match="no released checkpoint of 'fast'"):
        quick(replace(QUICK, **slow | {"start": "fast"}))


def test_a_run_describes_itself_in_one_line(whole):
    text = f"{100 - whole.history[-1]['val_acc']:.2f} % error on 100 validation images"
    cost = f"{whole.seconds:.0f} s, 13,912 parameters"
    assert repr(whole) == f"reference: {text} after 2 of 2 epochs, {cost}"
    other = replace(whole, history=[], source="sample", signal=2)
    text = "trained after 0 of 2 epochs, not validated of the embedded SAMPLE, INTERRUPTED"
    assert repr(other) == f"reference: {text}, {cost}"


def test_how_often_is_validated_changes_no_bit(quick):
    plain, often, once = (quick(QUICK, eval_every=n) for n in (0, 4, None))
    assert (plain.curve["eval_step"], plain.curve["eval_error"]) == ([], [])
    assert often.curve["eval_step"] == [4, 8]
    assert often.curve["eval_error"] == [100 - row["val_acc"] for row in plain.history]
    assert [math.isnan(row["val_acc"]) for row in once.history] == [True, False]
    assert without_seconds(once.history[-1:]) == without_seconds(plain.history[-1:])
    assert same(weights(plain), weights(often))
    assert same(weights(plain), weights(once))


@pytest.mark.parametrize("split", ["random", "none"])
def test_the_table_has_the_columns_of_the_reference(tiny_digits, capsys, split):
    run = train(replace(QUICK, split=split), tiny_digits)
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    title, *rows = out.splitlines()
    columns = ["Epoch", "Train Loss", "Val Loss", "Train Acc", "Val Acc", "LR", "Seconds"]
    assert re.split(r"\s{2,}", title) == columns
    for row, h in zip(rows, run.history, strict=True):
        seen = f"{h['val_loss']:.4f}", f"{h['val_acc']:.2f}%"
        val_loss, val_acc = seen if split == "random" else ("-", "-")
        wanted = [f"{h['epoch']}", f"{h['train_loss']:.4f}", val_loss, f"{h['train_acc']:.2f}%"]
        assert row.split() == [*wanted, val_acc, f"{h['lr']:.6f}", f"{h['seconds']:.1f}"]
        assert len(row) == len(title)


# Validation and test


def test_with_validation_the_test_images_are_not_touched(whole, tiny_digits, quick):
    run = quick(QUICK, digits=replace(tiny_digits, test_images=None, test_labels=None))
    assert same(weights(run), weights(whole))
    assert without_seconds(run.history) == without_seconds(whole.history)
    assert math.isnan(load_checkpoint(whole.checkpoint)["test_accuracy"])


def test_split_none_trains_on_everything_and_names_the_test_accuracy_at_the_end(
    tiny_digits, quick, monkeypatch
):
    looked, shown = [], []
    config = replace(QUICK, split="none", epoch_images=0, batch_size=150)
    monkeypatch.setattr(LOOP, "evaluate", lambda *args: looked.append(1) or evaluate(*args))
    after_step(monkeypatch, lambda _, __, labels: shown.extend(labels.tolist()))
    with monkeypatch.context() as m:
        stop_after(m, 7)  # in the second epoch
        run = quick(config, eval_every=1)
    assert (looked, run.checkpoint.name[-10:]) == ([], "_accNA.pth")
    assert sorted(shown[:600]) == sorted(tiny_digits.train_labels.tolist())
    run = quick(config, resume=run.checkpoint)
    assert looked == [1]
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_acc"]) for row in run.history)
    accuracy = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy
    assert load_checkpoint(run.checkpoint)["test_accuracy"] == accuracy
    assert run.checkpoint.name.endswith(f"_test{accuracy:.2f}.pth")
    without = replace(tiny_digits, test_images=None, test_labels=None)
    assert quick(config, digits=without).checkpoint.name.endswith("_accNA.pth")


# Checkpoints


def test_a_run_that_is_neither_saved_nor_verbose_leaves_nothing_and_has_the_same_bits(
    whole, quick, tmp_path, capsys
):
    run = quick(QUICK, folder=tmp_path / "kept out", save=False)
    assert run.checkpoint is None
    assert list(tmp_path.rglob("*.pth")) == []
    assert capsys.readouterr() == ("", "")
    assert same(weights(run), weights(whole))


def test_a_loss_that_is_not_finite_is_named_and_the_checkpoints_before_stay(
    whole, quick, monkeypatch, tmp_path
):
    def spoil(state, *_):
        if state.progress.step == 5:
            state.progress.loss[4] = math.nan

    with monkeypatch.context() as m:
        after_step(m, spoil)
        message = r"^the loss is not finite at step 5 of 8; .*max_lr is 0\.02\): try a tenth"
        with pytest.raises(TrainingError, match=message):
            quick(QUICK, folder=tmp_path)
    assert [step for step, _, _ in checkpoints(tmp_path)] == [4]
    assert same(weights(quick(QUICK, resume=tmp_path)), weights(whole))


@pytest.mark.parametrize("step", [6, 8], ids=["then interrupted", "at the end of the run"])
@pytest.mark.parametrize("part", ["model", "average"])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(
    quick, monkeypatch, tmp_path, step, part
):
    """The loss of a step is computed before its update, so the last update can go unseen."""

    def act(state, *_):
        if state.progress.step == step:
            network = state.model if part == "model" else state.average.model
            network.bn5.running_var[0] = math.inf
            if step < STEPS:
                ctrl_c()

    after_step(monkeypatch, act)
    with pytest.raises(TrainingError, match=f"^the weights are not finite at step {step} of 8"):
        quick(QUICK, folder=tmp_path)
    assert [step for step, _, _ in checkpoints(tmp_path)] == [4]


# Stopping and going on; that every part of the state is kept is tested with the state


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGINT, 8)]
)
def test_a_run_that_a_signal_stops_says_so_and_resumes_to_the_same_bits(
    whole, quick, monkeypatch, tmp_path, number, step
):
    with monkeypatch.context() as m:
        within_step(m, step, partial(signal.raise_signal, number))
        with stop_on_signal(signal.SIGTERM) as repeated:
            run = quick(QUICK, folder=tmp_path, eval_every=3)
    # for the program, which may be about to train more; in a notebook Ctrl-C returns the run
    assert repeated == [number] * (number == signal.SIGTERM)
    assert (run.interrupted, run.signal) == ((True, number) if step < STEPS else (False, 0))
    assert {len(run.curve["loss"]), len(run.curve["lr"])} == {step}
    assert len(run.history) == step // 4
    content = load_checkpoint(run.checkpoint)
    assert content["training"]["progress"]["step"] == step
    assert same(content["model_state_dict"], weights(run))
    raw = run.checkpoint.read_bytes()
    again = quick(QUICK, resume=str(run.checkpoint), folder=tmp_path / "2", eval_every=3)
    assert (again.interrupted, run.checkpoint.read_bytes()) == (False, raw)
    assert same(state_in(again.checkpoint), state_in(whole.checkpoint))
    assert again.curve == whole.curve


def test_a_second_ctrl_c_ends_it_at_once_and_the_last_epoch_is_on_the_disk(
    whole, quick, monkeypatch, tmp_path
):
    with monkeypatch.context() as m:
        within_step(m, 5, lambda: [ctrl_c(), ctrl_c()])
        with pytest.raises(KeyboardInterrupt):
            quick(QUICK, folder=tmp_path)
    assert [step for step, _, _ in checkpoints(tmp_path)] == [4]
    assert same(weights(quick(QUICK, resume=tmp_path)), weights(whole))


def test_ctrl_c_while_saving_waits_for_the_save_and_stops_after_it(quick, monkeypatch, tmp_path):
    def interrupted(content, folder):
        ctrl_c()
        return save_checkpoint(content, folder)

    monkeypatch.setattr(LOOP, "save_checkpoint", interrupted)
    run = quick(QUICK, folder=tmp_path)
    assert (run.interrupted, len(run.history), len(run.curve["loss"])) == (True, 1, 4)
    assert list(tmp_path.glob("[!.]*")) == [run.checkpoint]


def test_while_another_process_trains_a_run_it_is_not_trained_in_the_same_folder(quick, tmp_path):
    with only_here(tmp_path, f".training-{QUICK.hash('mnist')}", CheckpointError):
        with pytest.raises(CheckpointError, match=rf"{tmp_path} .*another process.*another folder"):
            quick(QUICK, folder=tmp_path)
        assert quick(QUICK, folder=tmp_path, save=False).checkpoint is None
        assert quick(replace(QUICK, seed=8), folder=tmp_path).checkpoint.is_file()
    assert quick(QUICK, folder=tmp_path).checkpoint.is_file()


def test_resuming_a_finished_run_returns_it(whole, tiny_digits, capsys):
    raw = whole.checkpoint.read_bytes()
    for place in (whole.checkpoint, whole.checkpoint.parent):
        again = train(QUICK, tiny_digits, place)
        assert same(weights(again), weights(whole))
        assert (again.history, again.curve) == (whole.history, whole.curve)
        assert (again.seconds, again.checkpoint) == (whole.seconds, whole.checkpoint)
        assert again.checkpoint.read_bytes() == raw
        assert capsys.readouterr().out == ""
