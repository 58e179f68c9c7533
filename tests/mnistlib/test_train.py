"""The training loop: what it computes, what it returns, and that stopping it loses nothing."""

import copy
import math
import re
import signal
from concurrent.futures import ThreadPoolExecutor
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

from mnistlib import (
    Config,
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
def whole(tiny_digits, tmp_path_factory):
    """Return the run of `quick_config`, without an interruption."""
    config = Config(
        epochs=2, epoch_images=100, batch_size=25, max_lr=0.02, degrees=5, pixels=1, scale=0.05,
        shear=2, ema_decay=0.9, label_smoothing=0.05, seed=3, device="cpu", threads=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("whole")
    return train(config, tiny_digits, folder=folder, eval_every=3, verbose=False)


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
    [{}, {"ema_decay": 0.0, "dropout": 0.2, "label_smoothing": 0.0, "degrees": 0.0, "seed": 5}],
    ids=["everything", "nothing but dropout"],
)
def test_it_computes_what_a_bare_loop_does_to_the_last_bit(
    tiny_config, tiny_digits, quick, settings
):
    config = replace(tiny_config, **settings)
    if not config.degrees:
        config = replace(config, pixels=0, scale=0, shear=0)
    run = quick(config)
    with torch.random.fork_rng(devices=[]):
        losses, rates, average = bare_loop(config, tiny_digits)
    assert run.curve["loss"] == losses
    assert run.curve["lr"] == rates
    assert same({k: weights(run)[k] for k in average}, average)
    content = load_checkpoint(run.checkpoint)
    assert same(content["model_state_dict"], weights(run))
    assert same(content["training"]["model"], weights(run)) == (not config.ema_decay)
    assert same(load_model(run.checkpoint).state_dict(), weights(run))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_the_seed_decides_every_bit(quick_config, quick, optimizer):
    config = replace(quick_config, optimizer=optimizer, epochs=1)
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
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] / 2
    assert evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy > 90


# What it returns


def test_a_run_tells_what_it_measured(whole, quick_config, tiny_digits):
    run, rates = whole, learning_rates(quick_config, 4)
    assert [list(row) for row in run.history] == [KEYS, KEYS]
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {type(v) for row in run.history for v in row.values()} == {int, float}
    assert 0 < run.history[0]["seconds"] < run.history[1]["seconds"] == run.seconds
    assert (run.n_val, run.source, run.config) == (100, "mnist", quick_config)
    assert (run.interrupted, run.signal, run.parameters) == (False, 0, 13_912)
    assert (run.versions["device"], run.versions["threads"]) == ("cpu", "1")
    assert run.curve["lr"] == rates[:8]
    assert [row["lr"] for row in run.history] == [rates[4], rates[8]]
    assert not any(m.training for m in run.model.modules())
    assert all(p.is_contiguous() and p.device.type == "cpu" for p in run.model.parameters())
    ids = tiny_digits.split("random")[1]
    seen = evaluate(run.model, tiny_digits.train_images[ids], tiny_digits.train_labels[ids])
    assert run.history[-1]["val_acc"] == seen.accuracy
    assert run.history[-1]["val_loss"] == pytest.approx(seen.loss, rel=1e-5)


def test_a_run_describes_itself_in_one_line(whole):
    text = f"{100 - whole.history[-1]['val_acc']:.2f} % error on 100 validation images"
    cost = f"{whole.seconds:.0f} s, 13,912 parameters"
    assert repr(whole) == f"reference: {text} after 2 of 2 epochs, {cost}"
    other = replace(whole, history=[], source="sample", signal=2)
    text = "trained after 0 of 2 epochs, not validated of the embedded SAMPLE, INTERRUPTED"
    assert repr(other) == f"reference: {text}, {cost}"


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [({"batch_size": 200}, [200, 200, 100]), ({"epoch_images": 1200}, [125] * 9 + [75])],
    ids=["a short last batch", "more than all images"],
)
def test_every_image_counts_once_in_the_training_loss_and_accuracy(
    tiny_config, quick, monkeypatch, settings, sizes
):
    """The right ones are counted by a second pass over each batch, before its step."""
    plain = dict.fromkeys(("dropout", "degrees", "pixels", "scale", "shear"), 0)
    right, step = [], LOOP.train_step

    def watched(state, slices, config, images, labels, *more):
        twin = copy.deepcopy(state.model)
        right.append(int((twin(images).argmax(1) == labels).sum()))
        step(state, slices, config, images, labels, *more)

    monkeypatch.setattr(LOOP, "train_step", watched)
    run = quick(replace(tiny_config, epochs=1, **plain, **settings))
    (row,) = run.history
    mean = np.average(run.curve["loss"], weights=sizes)
    assert row["train_loss"] == pytest.approx(mean, rel=1e-6)
    assert row["train_loss"] != pytest.approx(np.mean(run.curve["loss"]), rel=1e-5)
    assert row["train_acc"] == pytest.approx(100 * sum(right) / sum(sizes))


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_how_often_is_validated_changes_no_bit(quick_config, quick, ema_decay):
    config = replace(quick_config, ema_decay=ema_decay)
    plain, often, once = (quick(config, eval_every=n) for n in (0, 4, None))
    assert (plain.curve["eval_step"], plain.curve["eval_error"]) == ([], [])
    assert often.curve["eval_step"] == [4, 8]
    assert often.curve["eval_error"] == [100 - row["val_acc"] for row in plain.history]
    assert [math.isnan(row["val_acc"]) for row in once.history] == [True, False]
    assert [math.isnan(row["val_loss"]) for row in once.history] == [True, False]
    assert without_seconds(once.history[-1:]) == without_seconds(plain.history[-1:])
    assert same(weights(plain), weights(often))
    assert same(weights(plain), weights(once))


@pytest.mark.parametrize("split", ["random", "none"])
def test_the_table_has_the_columns_of_the_reference_below_their_titles(
    quick_config, tiny_digits, capsys, split
):
    run = train(replace(quick_config, split=split), tiny_digits)
    out, err = capsys.readouterr()
    assert err == ""  # no terminal, no progress
    title, *rows = out.splitlines()
    columns = ["Epoch", "Train Loss", "Val Loss", "Train Acc", "Val Acc", "LR", "Seconds"]
    assert re.split(r"\s{2,}", title) == columns
    ends = [m.end() for m in re.finditer(r"\w+( \w+)?", title)]
    for row, h in zip(rows, run.history, strict=True):
        validated = split == "random"
        val_loss = f"{h['val_loss']:.4f}" if validated else "-"
        val_acc = f"{h['val_acc']:.2f}%" if validated else "-"
        wanted = [f"{h['epoch']}", f"{h['train_loss']:.4f}", val_loss, f"{h['train_acc']:.2f}%"]
        assert row.split() == [*wanted, val_acc, f"{h['lr']:.6f}", f"{h['seconds']:.1f}"]
        found = [m.end() for m in re.finditer(r"\S+", row)]
        # the percent sign may stand beyond
        assert all(0 <= b - a <= 1 for a, b in zip(ends, found, strict=True)), (title, row)


# Validation and test


def test_with_validation_the_test_images_are_not_touched(whole, tiny_digits, quick):
    without = replace(tiny_digits, test_images=None, test_labels=None)
    run = quick(whole.config, digits=without)
    assert same(weights(run), weights(whole))
    assert without_seconds(run.history) == without_seconds(whole.history)
    assert math.isnan(load_checkpoint(whole.checkpoint)["test_accuracy"])


def test_split_none_trains_on_everything_and_names_the_test_accuracy_at_the_end(
    quick_config, tiny_digits, quick, monkeypatch
):
    looked, shown = [], []
    config = replace(quick_config, split="none", epoch_images=0, batch_size=150)
    monkeypatch.setattr(LOOP, "evaluate", lambda *args: looked.append(1) or evaluate(*args))
    after_step(monkeypatch, lambda _, __, labels: shown.extend(labels.tolist()))
    with monkeypatch.context() as m:
        stop_after(m, 7)  # in the second epoch
        run = quick(config, eval_every=1)
    assert (looked, run.checkpoint.name[-10:]) == ([], "_accNA.pth")
    assert sorted(shown[:600]) == sorted(tiny_digits.train_labels.tolist())
    run = quick(config, resume=run.checkpoint)
    assert looked == [1]
    assert run.n_val == 0
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_acc"]) for row in run.history)
    content = load_checkpoint(run.checkpoint)
    accuracy = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy
    assert math.isnan(content["val_accuracy"])
    assert content["test_accuracy"] == accuracy
    assert run.checkpoint.name.endswith(f"_test{accuracy:.2f}.pth")
    without = replace(tiny_digits, test_images=None, test_labels=None)
    assert quick(config, digits=without).checkpoint.name.endswith("_accNA.pth")


# Checkpoints


@pytest.mark.parametrize("name", ["20200101_000000", "20990101_000000"])
def test_only_the_latest_checkpoint_of_a_run_stays_whatever_the_clock_said_before(
    whole, quick, tmp_path, name
):
    earlier = tmp_path / f"mnist_model_{name}_acc50.00.pth"
    earlier.write_bytes(whole.checkpoint.read_bytes())
    run = quick(whole.config, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [run.checkpoint]
    assert run.checkpoint.name.endswith(f"_acc{run.history[-1]['val_acc']:.2f}.pth")


def test_a_run_that_is_neither_saved_nor_verbose_leaves_nothing_and_has_the_same_bits(
    whole, quick, tmp_path, capsys
):
    run = quick(whole.config, folder=tmp_path / "kept out", save=False)
    assert run.checkpoint is None
    assert list(tmp_path.rglob("*.pth")) == []
    assert capsys.readouterr() == ("", "")
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize(("step", "value"), [(4, math.nan), (5, math.inf)])
def test_a_loss_that_is_not_finite_is_named_and_the_checkpoints_before_stay(
    whole, quick, monkeypatch, tmp_path, step, value
):
    def spoil(state, *_):
        if state.progress.step == step:
            state.progress.loss[step - 1] = value

    with monkeypatch.context() as m:
        after_step(m, spoil)
        message = rf"^the loss is not finite at step {step} of 8; .*max_lr is 0\.02\): try a tenth"
        with pytest.raises(TrainingError, match=message) as refused:
            quick(whole.config, folder=tmp_path)
    assert isinstance(refused.value, MnistlibError)
    assert [step for step, _, _ in checkpoints(tmp_path)] == ([4] if step > 4 else [])
    if step > 4:
        assert same(weights(quick(whole.config, resume=tmp_path)), weights(whole))


@pytest.mark.parametrize("step", [6, 8], ids=["then interrupted", "at the end of the run"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(
    quick_config, quick, monkeypatch, tmp_path, step, ema_decay
):
    """The loss of a step is computed before its update, so the last update can go unseen."""

    def act(state, *_):
        if state.progress.step == step:
            if ema_decay:  # in the average alone
                state.average.model.bn5.running_var[0] = math.inf
            else:
                poison(state)
            if step < 8:
                ctrl_c()

    after_step(monkeypatch, act)
    with pytest.raises(TrainingError, match=f"^the weights are not finite at step {step} of 8"):
        quick(replace(quick_config, ema_decay=ema_decay), folder=tmp_path)
    (left,) = tmp_path.glob("*.pth")
    assert load_checkpoint(left)["training"]["progress"]["step"] == 4


# Stopping and going on; that every part of the state is kept is tested with the state


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGINT, 8)]
)
def test_a_run_that_a_signal_stops_says_so_and_resumes_to_the_same_bits(
    whole, quick, monkeypatch, tmp_path, number, step
):
    with monkeypatch.context() as m:
        within_step(m, step, partial(signal.raise_signal, number))
        run = quick(whole.config, folder=tmp_path, eval_every=3)
    assert (run.interrupted, run.signal) == ((True, number) if step < STEPS else (False, 0))
    assert {len(run.curve["loss"]), len(run.curve["lr"])} == {step}
    assert len(run.history) == step // 4
    content = load_checkpoint(run.checkpoint)
    assert content["training"]["progress"]["step"] == step
    assert same(content["model_state_dict"], weights(run))
    raw = run.checkpoint.read_bytes()
    again = quick(whole.config, resume=str(run.checkpoint), folder=tmp_path / "2", eval_every=3)
    assert (again.interrupted, run.checkpoint.read_bytes()) == (False, raw)
    assert same(state_in(again.checkpoint), state_in(whole.checkpoint))
    assert again.curve == whole.curve


@pytest.mark.parametrize("step", [4, 5])
def test_a_second_ctrl_c_ends_it_at_once_and_the_last_epoch_is_on_the_disk(
    whole, quick, monkeypatch, tmp_path, step
):
    with monkeypatch.context() as m:
        within_step(m, step, lambda: [ctrl_c(), ctrl_c()])
        with pytest.raises(KeyboardInterrupt):
            quick(whole.config, folder=tmp_path)
    found = checkpoints(tmp_path)
    assert [number for number, _, _ in found] == ([4] if step > 4 else [])
    again = quick(whole.config, resume=tmp_path if found else None, folder=tmp_path)
    assert same(weights(again), weights(whole))


@pytest.mark.parametrize("saved", [False, True], ids=["before", "after"])
def test_a_save_torn_apart_leaves_a_checkpoint_to_go_on_from(
    whole, quick, monkeypatch, tmp_path, saved
):
    def torn(content, folder):
        second = content["training"]["progress"]["step"] == 8
        path = save_checkpoint(content, folder) if saved or not second else None
        if second:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as m:
        m.setattr(LOOP, "save_checkpoint", torn)
        with pytest.raises(KeyboardInterrupt):
            quick(whole.config, folder=tmp_path)
    assert [step for step, _, _ in checkpoints(tmp_path)] == ([4, 8] if saved else [4])
    assert same(weights(quick(whole.config, resume=tmp_path)), weights(whole))


def test_ctrl_c_while_saving_waits_for_the_save_and_stops_after_it(
    whole, quick, monkeypatch, tmp_path
):
    def interrupted(content, folder):
        ctrl_c()
        return save_checkpoint(content, folder)

    with monkeypatch.context() as m:
        m.setattr(LOOP, "save_checkpoint", interrupted)
        run = quick(whole.config, folder=tmp_path)
    assert (run.interrupted, len(run.history), len(run.curve["loss"])) == (True, 1, 4)
    assert list(tmp_path.iterdir()) == [run.checkpoint]


def test_resuming_a_finished_run_returns_it(whole, tiny_digits, capsys):
    raw = whole.checkpoint.read_bytes()
    for place in (whole.checkpoint, whole.checkpoint.parent):
        again = train(whole.config, tiny_digits, place)
        assert same(weights(again), weights(whole))
        assert again.history == whole.history
        assert (again.curve, again.seconds) == (whole.curve, whole.seconds)
        assert (again.checkpoint, again.interrupted) == (whole.checkpoint, False)
        assert again.checkpoint.read_bytes() == raw
        assert capsys.readouterr().out == ""


def test_training_works_in_a_thread_that_gets_no_signals(whole, quick):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(quick, whole.config).result(timeout=60)
    assert same(weights(run), weights(whole))


def test_a_device_that_is_not_here_is_refused_before_anything_is_done(quick_config, quick):
    absent = {"cuda", "mps", "xpu"} - {str(torch.accelerator.current_accelerator())}
    with pytest.raises(ValueError, match="use one of these"):
        quick(replace(quick_config, device=sorted(absent)[0]))
