"""The training loop: what it computes, what it returns, and that stopping it loses nothing."""

import copy
import itertools
import math
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

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

from mnistlib import (
    MnistlibError,
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

KEYS = ["epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "seconds"]
STEPS = 8  # of tiny_config on the 500 training images of tiny_digits


@pytest.fixture
def quick_config(tiny_config):
    """Return the same eight steps on fewer images, for tests that train often."""
    return replace(tiny_config, epoch_images=100, batch_size=25)


@pytest.fixture
def quick(tiny_digits):
    """Return `train` on the tiny digits, without its table."""
    return partial(train, digits=tiny_digits, verbose=False)


@pytest.fixture(scope="module")
def finished(tiny_digits, tmp_path_factory):
    """Return a function that trains without an interruption, each Config once for all tests."""

    @cache
    def run(config):
        folder = tmp_path_factory.mktemp("whole")
        return train(config, tiny_digits, folder=folder, eval_every=3, verbose=False)

    return run


def poison(state) -> None:
    with torch.no_grad():
        state.model.conv1.weight.fill_(math.nan)


# What it computes: the same as a loop that one would write in a notebook


def bare_loop(config, digits) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Train by AdamW and OneCycleLR in plain lines; return losses, rates and averaged weights."""
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
    losses, rates, average = [], [], None
    for _ in range(config.epochs):
        for batch in ids[torch.randperm(len(ids), generator=order)].split(config.batch_size):
            images, labels = digits.train_images[batch], digits.train_labels[batch].long()
            if config.degrees:
                images = augment(
                    images.float() / 255, degrees=config.degrees, pixels=config.pixels,
                    scale=config.scale, shear=config.shear, generator=amounts,
                )  # fmt: skip
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
            now = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
            if average is None or not config.ema_decay:
                average = {k: v.clone() for k, v in now.items()}
            else:
                average = {k: v.lerp(now[k], 1 - config.ema_decay) for k, v in average.items()}
    return losses, rates, average


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.0, "dropout": 0.2, "label_smoothing": 0.0},
        {"degrees": 0.0, "pixels": 0.0, "scale": 0.0, "shear": 0.0, "seed": 5},
    ],
    ids=["everything", "no average", "nothing augmented"],
)
def test_it_computes_what_a_bare_loop_does_to_the_last_bit(
    tiny_config, tiny_digits, quick, settings
):
    config = replace(tiny_config, **settings)
    run = quick(config)
    with torch.random.fork_rng(devices=[]):
        losses, rates, average = bare_loop(config, tiny_digits)
    assert run.curve["loss"] == losses
    assert run.curve["lr"] == rates
    assert same({k: weights(run)[k] for k in average}, average)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_the_seed_decides_every_bit(quick_config, quick, optimizer):
    config = replace(quick_config, optimizer=optimizer)
    torch.manual_seed(1)
    first = quick(config)
    torch.manual_seed(2)
    again = quick(config)
    other = quick(replace(config, seed=4))
    assert same(weights(first), weights(again))
    assert without_seconds(first.history) == without_seconds(again.history)
    assert first.curve == again.curve
    assert not torch.equal(weights(first)["conv6.weight"], weights(other)["conv6.weight"])


def test_training_learns_the_tiny_digits(tiny_config, tiny_digits, quick):
    run = quick(replace(tiny_config, epochs=4, batch_size=50, ema_decay=0.8))
    assert run.history[-1]["val_acc"] > 90
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] / 2
    assert evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy > 90


def test_the_weights_that_count_are_the_average_over_the_steps(tiny_config, quick, monkeypatch):
    raw = []
    after_step(monkeypatch, lambda s, *_: raw.append(copy.deepcopy(s.model.state_dict())))
    run = quick(tiny_config)
    content = load_checkpoint(run.checkpoint)
    assert same(weights(run), content["model_state_dict"])
    assert same(weights(run), load_model(run.checkpoint).state_dict())
    assert same(content["training"]["average"]["weights"], weights(run))
    assert same(content["training"]["model"], raw[-1])
    for name in ("conv1.weight", "conv6.weight", "bn1.bias", "bn1.running_mean", "bn5.running_var"):
        mean = raw[0][name].double()
        for later in raw[1:]:
            mean = 0.9 * mean + 0.1 * later[name].double()
        torch.testing.assert_close(weights(run)[name].double(), mean, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weights(run)[name], raw[-1][name], rtol=1e-2, atol=1e-4)


def test_without_averaging_the_raw_weights_count(quick_config, quick):
    run = quick(replace(quick_config, ema_decay=0))
    assert same(weights(run), load_checkpoint(run.checkpoint)["training"]["model"])


def test_the_mean_of_single_losses_is_trained_on_where_images_are_mined(quick_config, quick):
    """To the last bit the same first epoch, since unseen images come in the order of chance."""
    plain = quick(replace(quick_config, epochs=1))
    focused = quick(replace(quick_config, epochs=1, focus=1e-9))  # of 100 images, none
    assert focused.curve["loss"][0] == pytest.approx(plain.curve["loss"][0], rel=0.2)
    assert focused.history[0]["train_loss"] == pytest.approx(
        np.mean(focused.curve["loss"]), rel=1e-6
    )


def test_training_images_are_shuffled_anew_every_epoch(
    tiny_config, tiny_digits, quick, monkeypatch
):
    batches = []
    after_step(monkeypatch, lambda _, images, labels: batches.append((images, labels)))
    quick(tiny_config)
    ids = tiny_digits.split("random")[0]
    known = {p.numpy().tobytes(): i for i, p in enumerate(tiny_digits.train_images)}
    shown = [known[p.numpy().tobytes()] for images, _ in batches for p in images]
    first, second = shown[:500], shown[500:]
    assert sorted(first) == sorted(second) == sorted(ids.tolist())  # and no validation image
    assert first != second
    assert first != ids.tolist()
    assert torch.cat([labels for _, labels in batches]).equal(
        tiny_digits.train_labels[shown].long()
    )
    assert {images.dtype for images, _ in batches} == {torch.uint8}


# What it returns


def test_history_has_one_dict_of_plain_numbers_per_epoch(quick_config, quick):
    run = quick(quick_config)
    assert [list(row) for row in run.history] == [KEYS, KEYS]
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {type(v) for row in run.history for v in row.values()} == {int, float}
    assert 0 < run.history[0]["seconds"] < run.history[1]["seconds"] == run.seconds
    assert (run.n_val, run.source, run.config) == (100, "mnist", quick_config)
    assert (run.interrupted, run.signal, run.parameters) == (False, 0, 13_912)
    assert (run.versions["device"], run.versions["threads"]) == ("cpu", "1")


def test_learning_rates_are_told_by_step_and_for_the_end_of_each_epoch(quick_config, quick):
    run, rates = quick(quick_config), learning_rates(quick_config, 4)
    assert run.curve["lr"] == rates[:8]
    assert [row["lr"] for row in run.history] == [rates[4], rates[8]]


def test_a_run_describes_itself_in_one_line(quick_config, tiny_digits, quick):
    run = quick(quick_config)
    text = f"{100 - run.history[-1]['val_acc']:.2f} % error on 100 validation images"
    assert repr(run).startswith(f"reference: {text} after 2 of 2 epochs, ")
    assert repr(run).endswith(f", {run.seconds:.0f} s, 13,912 parameters")
    nothing = quick(replace(quick_config, split="none"))
    assert repr(nothing).startswith("reference: trained after 2 of 2 epochs, not validated, ")
    sample = quick(quick_config, digits=replace(tiny_digits, source="sample"))
    assert "epochs of the embedded SAMPLE, " in repr(sample)
    assert "INTERRUPTED" not in repr(run)


def test_the_network_of_a_run_is_on_the_cpu_in_eval_mode_and_its_own(quick_config, quick):
    model = quick(quick_config).model
    assert not any(m.training for m in model.modules())
    assert all(p.is_contiguous() and p.device.type == "cpu" for p in model.parameters())


def test_every_image_counts_once_in_the_training_loss(tiny_config, quick, monkeypatch):
    right = []
    after_step(
        monkeypatch, lambda s, *_: right.append(int(s.progress.correct[s.progress.step - 1]))
    )
    run = quick(replace(tiny_config, batch_size=200))  # steps of 200, 200, 100
    for epoch, row in enumerate(run.history):
        losses = run.curve["loss"][3 * epoch : 3 * epoch + 3]
        mean = np.average(losses, weights=[200, 200, 100])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert abs(row["train_loss"] - np.mean(losses)) > 1e-3
        assert row["train_acc"] == pytest.approx(sum(right[3 * epoch : 3 * epoch + 3]) / 5)


def test_correct_predictions_are_counted_on_what_was_trained_on(tiny_config, quick, monkeypatch):
    """By a second pass over the batch before its step, without dropout and augmentation."""
    config = replace(tiny_config, dropout=0, degrees=0, pixels=0, scale=0, shear=0, epochs=1)
    wanted, step = [], LOOP.train_step

    def watched(state, slices, config, images, labels, *more):
        twin = copy.deepcopy(state.model)
        wanted.append(int((twin(images).argmax(1) == labels).sum()))
        step(state, slices, config, images, labels, *more)

    monkeypatch.setattr(LOOP, "train_step", watched)
    assert quick(config).history[0]["train_acc"] == pytest.approx(sum(wanted) / 5)


def test_the_history_is_what_evaluating_the_run_gives(quick_config, tiny_digits, quick):
    run = quick(quick_config)
    ids = tiny_digits.split("random")[1]
    seen = evaluate(run.model, tiny_digits.train_images[ids], tiny_digits.train_labels[ids])
    assert run.history[-1]["val_acc"] == seen.accuracy
    assert run.history[-1]["val_loss"] == pytest.approx(seen.loss, rel=1e-5)


def test_a_longer_epoch_has_more_steps(tiny_config, quick):
    run = quick(replace(tiny_config, epochs=1, epoch_images=1200))
    assert len(run.curve["loss"]) == 10
    mean = np.average(run.curve["loss"], weights=[125] * 9 + [75])
    assert run.history[0]["train_loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_eval_every_fills_the_curve_and_changes_no_bit(quick_config, quick, ema_decay):
    config = replace(quick_config, ema_decay=ema_decay)
    plain = quick(config)
    run = quick(config, eval_every=3)
    assert (plain.curve["eval_step"], plain.curve["eval_error"]) == ([], [])
    assert run.curve["eval_step"] == [3, 6]
    assert all(0 <= error <= 100 for error in run.curve["eval_error"])
    assert {len(run.curve["loss"]), len(run.curve["lr"])} == {STEPS}
    assert same(weights(plain), weights(run))
    last = quick(config, eval_every=4).curve["eval_error"]
    assert last == [100 - row["val_acc"] for row in run.history]


def test_without_evaluation_in_between_only_the_last_epoch_is_validated(quick_config, quick):
    config = replace(quick_config, epochs=3)
    run, usual = quick(config, eval_every=None), quick(config)
    assert [math.isnan(row["val_acc"]) for row in run.history] == [True, True, False]
    assert [math.isnan(row["val_loss"]) for row in run.history] == [True, True, False]
    assert without_seconds(run.history[-1:]) == without_seconds(usual.history[-1:])
    assert same(weights(run), weights(usual))


def test_the_table_has_the_columns_of_the_reference(quick_config, tiny_digits, capsys):
    run = train(quick_config, tiny_digits)
    out, err = capsys.readouterr()
    title, *rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    reference = ["Epoch", "Train Loss", "Val Loss", "Train Acc", "Val Acc", "LR"]
    assert title == [*reference, "Seconds"]
    assert err == ""  # no terminal, no progress
    assert rows == [
        [f"{h['epoch']}", f"{h['train_loss']:.4f}", f"{h['val_loss']:.4f}",
         f"{h['train_acc']:.2f}%", f"{h['val_acc']:.2f}%", f"{h['lr']:.6f}", f"{h['seconds']:.1f}"]
        for h in run.history
    ]  # fmt: skip


@pytest.mark.parametrize("split", ["random", "none"])
def test_the_columns_of_the_table_end_where_their_titles_end(
    quick_config, tiny_digits, capsys, split
):
    train(replace(quick_config, split=split), tiny_digits)
    title, *rows = capsys.readouterr().out.splitlines()
    ends = [m.end() for m in re.finditer(r"\w+( \w+)?", title)]
    assert len(rows) == 2
    for row in rows:
        found = [m.end() for m in re.finditer(r"\S+", row)]
        # the percent sign may stand beyond
        assert all(0 <= b - a <= 1 for a, b in zip(ends, found, strict=True)), (title, row)


def test_a_run_that_is_not_verbose_prints_nothing(quick_config, quick, capsys):
    quick(quick_config)
    assert capsys.readouterr() == ("", "")


# Validation and test


def test_with_validation_the_test_images_are_not_touched(
    quick_config, tiny_digits, quick, tmp_path
):
    without = replace(tiny_digits, test_images=None, test_labels=None)
    first, second = (
        quick(quick_config, digits=digits, folder=tmp_path / f"{i}")
        for i, digits in enumerate((tiny_digits, without))
    )
    assert same(weights(first), weights(second))
    assert without_seconds(first.history) == without_seconds(second.history)
    content = load_checkpoint(first.checkpoint)
    assert content["val_accuracy"] == first.history[-1]["val_acc"]
    assert math.isnan(content["test_accuracy"])


def test_split_none_trains_on_everything_and_names_the_test_accuracy(
    tiny_config, tiny_digits, quick, monkeypatch
):
    labels = []
    after_step(monkeypatch, lambda _, __, batch: labels.append(batch))
    run = quick(replace(tiny_config, split="none"))
    assert len(torch.cat(labels)) == 2 * 600
    assert run.n_val == 0
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_acc"]) for row in run.history)
    content = load_checkpoint(run.checkpoint)
    accuracy = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy
    assert math.isnan(content["val_accuracy"])
    assert content["test_accuracy"] == accuracy
    assert run.checkpoint.name.endswith(f"_test{accuracy:.2f}.pth")


def test_split_none_looks_at_no_test_image_before_the_end(
    quick_config, tiny_digits, quick, monkeypatch
):
    looked = []
    monkeypatch.setattr(LOOP, "evaluate", lambda *args: looked.append(1) or evaluate(*args))
    with monkeypatch.context() as m:
        stop_after(m, 7)  # in the second epoch
        run = quick(replace(quick_config, split="none"), eval_every=1)
    assert looked == []
    assert run.checkpoint.name.endswith("_accNA.pth")
    quick(replace(quick_config, split="none"))
    assert looked == [1]


def test_without_a_test_set_split_none_names_no_accuracy(quick_config, tiny_digits, quick):
    without = replace(tiny_digits, test_images=None, test_labels=None)
    run = quick(replace(quick_config, split="none"), digits=without)
    assert run.checkpoint.name.endswith("_accNA.pth")


# Checkpoints


def test_only_the_latest_checkpoint_of_a_run_stays(tiny_config, quick, runs_folder):
    run = quick(replace(tiny_config, epochs=3))
    folder = runs_folder / run.config.run_name("mnist")
    assert list(folder.iterdir()) == [run.checkpoint]
    assert run.checkpoint.name.endswith(f"_acc{run.history[-1]['val_acc']:.2f}.pth")


@pytest.mark.parametrize("name", ["20200101_000000", "20990101_000000"])
def test_trained_anew_into_its_folder_a_run_keeps_its_new_checkpoint(
    quick_config, quick, tmp_path, name
):
    """Whatever the clock said when the earlier one was saved."""
    earlier = quick(quick_config, folder=tmp_path).checkpoint
    earlier = earlier.rename(tmp_path / f"mnist_model_{name}_acc50.00.pth")
    run = quick(quick_config, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [run.checkpoint]


def test_a_run_that_is_not_saved_writes_nothing_and_has_the_same_bits(
    quick_config, quick, tmp_path
):
    run = quick(quick_config, folder=tmp_path / "kept out", save=False)
    assert run.checkpoint is None
    assert list(tmp_path.rglob("*.pth")) == []
    assert same(weights(run), weights(quick(quick_config)))


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoints_before_stay(
    quick_config, quick, finished, monkeypatch, tmp_path, step
):
    def spoil(state, *_):
        if state.progress.step == step:
            state.progress.loss[step - 1] = [math.nan, math.inf, -math.inf][step % 3]

    with monkeypatch.context() as m:
        after_step(m, spoil)
        message = rf"^the loss is not finite at step {step} of 8; .*max_lr is 0\.02\): try a tenth"
        with pytest.raises(TrainingError, match=message) as refused:
            quick(quick_config, folder=tmp_path)
    assert isinstance(refused.value, MnistlibError)
    assert [step for step, _, _ in checkpoints(tmp_path)] == ([4] if step > 4 else [])
    if step > 4:
        again = quick(quick_config, resume=tmp_path)
        assert same(weights(again), weights(finished(quick_config)))


def test_weights_that_turn_to_nan_are_noticed_by_the_loss_of_the_next_step(
    quick_config, quick, monkeypatch, tmp_path
):
    after_step(monkeypatch, lambda s, *_: poison(s) if s.progress.step == 5 else None)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 6 of 8"):
        quick(quick_config, folder=tmp_path)


def test_too_high_a_learning_rate_leaves_no_checkpoint_that_cannot_be_loaded(
    tiny_config, quick, tmp_path
):
    config = replace(tiny_config, optimizer="sgd", max_lr=100)
    with pytest.raises(TrainingError, match=r"not finite at step \d of 8.*max_lr is 100"):
        quick(config, folder=tmp_path)
    for path in tmp_path.glob("*.pth"):
        load_checkpoint(path)


@pytest.mark.parametrize("step", [6, 8], ids=["then interrupted", "at the end of the run"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(
    quick_config, quick, monkeypatch, tmp_path, step, ema_decay
):
    """The loss of a step is computed before its update, so the last update can go unseen."""

    def act(state, *_):
        if state.progress.step == step:
            poison(state)
            if step < 8:
                ctrl_c()

    after_step(monkeypatch, act)
    with pytest.raises(TrainingError, match=f"^the weights are not finite at step {step} of 8"):
        quick(replace(quick_config, ema_decay=ema_decay), folder=tmp_path)
    (left,) = tmp_path.glob("*.pth")
    assert load_checkpoint(left)["training"]["progress"]["step"] == 4


def test_an_average_that_is_not_finite_is_noticed_too(quick_config, quick, monkeypatch, tmp_path):
    def act(state, *_):
        if state.progress.step == 8:
            state.average.model.bn5.running_var[0] = math.inf

    after_step(monkeypatch, act)
    with pytest.raises(TrainingError, match="weights are not finite"):
        quick(quick_config, folder=tmp_path)


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_interrupted_at_any_step_resumes_to_the_same_bits(
    quick_config, tiny_digits, quick, finished, monkeypatch, tmp_path, number
):
    whole = finished(quick_config)
    for step in range(1, STEPS + 1) if number == signal.SIGINT else (3, 4):
        folder = tmp_path / f"{step}"
        with monkeypatch.context() as m:
            within_step(m, step, partial(signal.raise_signal, number))
            run = quick(quick_config, folder=folder, eval_every=3)
        assert (run.interrupted, run.signal) == ((True, number) if step < STEPS else (False, 0))
        assert (", INTERRUPTED" in repr(run)) == run.interrupted
        assert {len(run.curve["loss"]), len(run.curve["lr"])} == {step}
        assert len(run.history) == step // 4
        content = load_checkpoint(run.checkpoint)
        assert content["training"]["progress"]["step"] == step
        assert same(content["model_state_dict"], weights(run))
        seen = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels)
        assert math.isfinite(seen.loss)
        again = quick(quick_config, resume=run.checkpoint, folder=folder, eval_every=3)
        assert not again.interrupted
        assert same(weights(again), weights(whole)), step
        assert same(state_in(again.checkpoint), state_in(whole.checkpoint)), step
        assert again.curve == whole.curve
        assert again.seconds > run.seconds or step == STEPS


@pytest.mark.parametrize("step", [1, 4, 5, 8])
def test_a_second_ctrl_c_ends_it_at_once_and_the_last_epoch_is_on_the_disk(
    quick_config, quick, finished, monkeypatch, tmp_path, step
):
    def twice():
        ctrl_c()
        ctrl_c()

    with monkeypatch.context() as m:
        within_step(m, step, twice)
        with pytest.raises(KeyboardInterrupt):
            quick(quick_config, folder=tmp_path)
    found = checkpoints(tmp_path) if tmp_path.exists() else []
    assert [number for number, _, _ in found] == ([4] if step > 4 else [])
    again = quick(quick_config, resume=tmp_path if found else None, folder=tmp_path)
    assert same(weights(again), weights(finished(quick_config)))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_save_torn_apart_leaves_a_checkpoint_to_go_on_from(
    quick_config, quick, finished, monkeypatch, tmp_path, when, epoch
):
    saves = itertools.count(1)

    def torn(content, folder):
        this = next(saves) == epoch
        if this and when == "before":
            raise KeyboardInterrupt
        path = save_checkpoint(content, folder)
        if this:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as m:
        m.setattr(LOOP, "save_checkpoint", torn)
        with pytest.raises(KeyboardInterrupt):
            quick(quick_config, folder=tmp_path)
    done = epoch if when == "after" else epoch - 1
    assert [step for step, _, _ in checkpoints(tmp_path)] == [4, 8][:done]
    again = quick(quick_config, resume=tmp_path if done else None)
    assert same(weights(again), weights(finished(quick_config)))


def test_ctrl_c_while_saving_waits_for_the_save_and_stops_after_it(
    quick_config, quick, finished, monkeypatch, tmp_path
):
    def interrupted(content, folder):
        if content["training"]["progress"]["step"] == 4:
            ctrl_c()
        return save_checkpoint(content, folder)

    with monkeypatch.context() as m:
        m.setattr(LOOP, "save_checkpoint", interrupted)
        run = quick(quick_config, folder=tmp_path)
    assert (run.interrupted, len(run.history), len(run.curve["loss"])) == (True, 1, 4)
    assert list(tmp_path.iterdir()) == [run.checkpoint]
    again = quick(quick_config, resume=run.checkpoint)
    assert same(weights(again), weights(finished(quick_config)))


def test_resuming_a_finished_run_returns_it(quick_config, tiny_digits, capsys):
    done = train(quick_config, tiny_digits)
    raw = done.checkpoint.read_bytes()
    capsys.readouterr()
    for place in (done.checkpoint, done.checkpoint.parent):
        again = train(quick_config, tiny_digits, place)
        assert same(weights(again), weights(done))
        assert again.history == done.history
        assert (again.curve, again.seconds) == (done.curve, done.seconds)
        assert (again.checkpoint, again.interrupted) == (done.checkpoint, False)
        assert again.checkpoint.read_bytes() == raw
        assert capsys.readouterr().out == ""


def test_a_run_resumed_into_another_folder_keeps_what_it_came_from(
    quick_config, quick, monkeypatch, tmp_path
):
    with monkeypatch.context() as m:
        within_step(m, 6, ctrl_c)
        stopped = quick(quick_config, folder=tmp_path / "stopped")
    raw = stopped.checkpoint.read_bytes()
    again = quick(quick_config, resume=str(stopped.checkpoint), folder=tmp_path / "new")
    assert again.checkpoint.parent == tmp_path / "new"
    assert stopped.checkpoint.read_bytes() == raw


def test_training_works_in_a_thread_that_gets_no_signals(quick_config, quick):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(quick, quick_config).result(timeout=60)
    assert same(weights(run), weights(quick(quick_config)))


def test_a_device_that_is_not_here_is_refused_before_anything_is_done(quick_config, quick):
    absent = {"cuda", "mps", "xpu"} - {str(torch.accelerator.current_accelerator())}
    with pytest.raises(ValueError, match="use one of these"):
        quick(replace(quick_config, device=sorted(absent)[0]))
