"""The training loop: what it returns, what it leaves alone, and that stopping it loses nothing."""

import itertools
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch

from mnistlib import (
    CheckpointError,
    TrainingError,
    evaluate,
    load_checkpoint,
    load_model,
    random_distortion,
    save_checkpoint,
    train,
)
from mnistlib.state import TrainingState

LOOP = sys.modules["mnistlib.train"]  # the package's attribute of that name is the function
KEYS = ["epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr", "seconds"]
STEPS = 8  # of tiny_config on the 500 training images of tiny_digits
CPU = torch.device("cpu")
ctrl_c = partial(signal.raise_signal, signal.SIGINT)


def same(a, b) -> bool:
    """Whether two nests of dicts, lists and tensors are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def weights(run) -> dict[str, torch.Tensor]:
    return run.model.state_dict()


def without_seconds(history) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def training_state(path) -> dict:
    """Return the training state in a checkpoint, but for the seconds that it took."""
    state = load_checkpoint(path)["training"]
    return state | {"seconds": 0.0, "history": without_seconds(state["history"])}


@pytest.fixture
def quick_config(tiny_config):
    """Return the same eight steps on fewer images, for tests that train often."""
    return replace(tiny_config, epoch_images=100, batch_size=25)


@pytest.fixture(scope="module")
def finished(tiny_digits, tmp_path_factory):
    """Return a function that trains without an interruption, each Config once for all tests."""

    @cache
    def run(config):
        return train(config, tiny_digits, folder=tmp_path_factory.mktemp("whole"), eval_every=3)

    return run


def within_step(monkeypatch, number, action) -> None:
    """Have `action()` called in the middle of a step of the next run; steps count from 1."""
    steps = itertools.count(1)

    def distort(images, **ranges):
        if next(steps) == number:
            action()
        return random_distortion(images, **ranges)

    monkeypatch.setattr(LOOP, "random_distortion", distort)


def after_step(monkeypatch, action) -> None:
    """Have `action(state, pixels, labels)` called after each step of the next runs."""
    step = LOOP._step

    def watched(t, pixels, labels):
        step(t, pixels, labels)
        action(t, pixels, labels)

    monkeypatch.setattr(LOOP, "_step", watched)


def fail(error: type[BaseException]) -> None:
    raise error


def poison(t) -> None:
    with torch.no_grad():
        t.model.conv1.weight.fill_(math.nan)


def test_history_has_one_dict_of_plain_numbers_per_epoch(quick_config, tiny_digits):
    run = train(quick_config, tiny_digits)
    assert [list(row) for row in run.history] == [KEYS, KEYS]
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {type(v) for row in run.history for v in row.values()} == {int, float}
    assert 0 < run.history[0]["seconds"] < run.history[1]["seconds"] == run.seconds
    assert (run.n_val, run.device, run.threads, run.interrupted) == (100, "cpu", 1, False)


def test_a_run_says_itself_in_one_line(quick_config, tiny_digits):
    run = train(quick_config, tiny_digits)
    text = f"{100 - run.history[-1]['val_acc']:.2f} % error on 100 validation images"
    assert repr(run).startswith(f"reference: {text} after 2 of 2 epochs, ")
    assert repr(run).endswith(" s, 13,912 parameters")


def test_training_learns_the_tiny_digits(tiny_config, tiny_digits):
    run = train(replace(tiny_config, epochs=4, batch_size=50, ema_decay=0.8), tiny_digits)
    assert run.history[-1]["val_acc"] > 90
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] / 2
    assert evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy > 90


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_seed_decides_every_bit(quick_config, tiny_digits, optimizer):
    config = replace(quick_config, optimizer=optimizer)
    torch.manual_seed(1)
    first = train(config, tiny_digits)
    torch.manual_seed(2)
    again = train(config, tiny_digits)
    other = train(replace(config, seed=4), tiny_digits)
    assert same(weights(first), weights(again))
    assert without_seconds(first.history) == without_seconds(again.history)
    assert first.curve == again.curve
    assert not torch.equal(weights(first)["conv6.weight"], weights(other)["conv6.weight"])


def test_the_published_weights_are_the_average_over_the_steps(
    tiny_config, tiny_digits, monkeypatch
):
    raw = []
    after_step(
        monkeypatch,
        lambda t, *_: raw.append({k: v.clone() for k, v in t.model.state_dict().items()}),
    )
    run = train(tiny_config, tiny_digits)
    content = load_checkpoint(run.checkpoint)
    assert same(weights(run), content["model_state_dict"])
    assert same(weights(run), load_model(run.checkpoint).state_dict())
    assert same(content["training"]["weights"], raw[-1])
    for name in ("conv1.weight", "conv6.weight", "bn1.bias", "bn1.running_mean", "bn5.running_var"):
        mean = raw[0][name].double()
        for later in raw[1:]:
            mean = 0.9 * mean + 0.1 * later[name].double()
        torch.testing.assert_close(weights(run)[name].double(), mean, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weights(run)[name], raw[-1][name], rtol=1e-2, atol=1e-4)


def test_without_averaging_the_raw_weights_are_published(quick_config, tiny_digits):
    run = train(replace(quick_config, ema_decay=0), tiny_digits)
    assert same(weights(run), load_checkpoint(run.checkpoint)["training"]["weights"])


def test_every_image_counts_once_in_the_training_loss(tiny_config, tiny_digits):
    run = train(replace(tiny_config, batch_size=200), tiny_digits)  # steps of 200, 200, 100
    for epoch, row in enumerate(run.history):
        losses = run.curve["loss"][3 * epoch : 3 * epoch + 3]
        mean = np.average(losses, weights=[200, 200, 100])
        assert row["train_loss"] == pytest.approx(mean, rel=1e-6)
        assert abs(row["train_loss"] - np.mean(losses)) > 1e-3
        assert row["train_acc"] * 5 == pytest.approx(round(row["train_acc"] * 5), abs=1e-9)


def test_the_history_is_what_evaluating_the_run_gives(quick_config, tiny_digits):
    run = train(quick_config, tiny_digits)
    ids = tiny_digits.split("random")[1]
    seen = evaluate(run.model, tiny_digits.train_images[ids], tiny_digits.train_labels[ids])
    assert run.history[-1]["val_acc"] == seen.accuracy
    assert run.history[-1]["val_loss"] == pytest.approx(seen.loss, rel=1e-5)


@pytest.mark.parametrize("epoch_images", [0, 70, 500, 1200])
def test_a_longer_epoch_passes_over_the_images_equally_often(tiny_config, epoch_images):
    t = TrainingState(replace(tiny_config, epoch_images=epoch_images), CPU, 500)
    counts = Counter(t.draw_order(500).tolist())
    wanted = epoch_images or 500
    assert sum(counts.values()) == wanted
    often = [counts[i] for i in range(500)]
    assert (min(often), max(often)) == (wanted // 500, math.ceil(wanted / 500))


@pytest.fixture
def focused(tiny_config):
    """Return four epochs of 100 images, 70 of them those with the greatest losses."""
    return replace(tiny_config, epochs=4, epoch_images=100, batch_size=30, focus=0.7)


def test_focus_takes_its_share_from_the_images_with_the_greatest_losses(focused):
    t = TrainingState(focused, CPU, 500)
    t.last_loss = torch.arange(500).to(torch.bfloat16)  # the last images are the hardest
    order = t.draw_order(500).tolist()
    assert len(set(order)) == 100
    assert len([i for i in order if i >= 428]) >= 70  # bfloat16 makes neighbours equal
    assert len([i for i in order if i < 428]) > 20
    assert order != sorted(order)


def test_focus_shows_unseen_images_before_any_a_second_time(focused, tiny_digits):
    t = TrainingState(replace(focused, focus=1.0), CPU, 500)
    seen = []
    for _ in range(5):
        seen += t.draw_order(500).tolist()
        t.epoch_loss.fill_(0.5)
        t.end_epoch()
    assert sorted(seen) == list(range(500))


def test_focus_remembers_the_loss_that_each_image_had(focused, tiny_digits, monkeypatch):
    states = []
    after_step(monkeypatch, lambda t, *_: states.append(t))
    train(replace(focused, ema_decay=0.0, degrees=0, pixels=0, scale=0, shear=0, dropout=0.0,
                  epochs=1, max_lr=1e-8), tiny_digits)  # fmt: skip
    t = states[-1]
    ids = tiny_digits.split("random")[0][t.drawn]
    logits = t.model.train()(tiny_digits.train_images[ids[:30]])
    labels = tiny_digits.train_labels[ids[:30]].long()
    wanted = torch.nn.functional.cross_entropy(
        logits, labels, label_smoothing=focused.label_smoothing, reduction="none"
    )
    assert torch.allclose(t.last_loss[t.drawn[:30]].float(), wanted, rtol=0.02)
    assert int(t.last_loss.isinf().sum()) == 400


def test_without_focus_nothing_is_remembered(tiny_config):
    assert "last_loss" not in TrainingState(tiny_config, CPU, 500).state()


def test_a_longer_epoch_has_more_steps(tiny_config, tiny_digits):
    run = train(replace(tiny_config, epochs=1, epoch_images=1200), tiny_digits)
    assert len(run.curve["loss"]) == 10
    mean = np.average(run.curve["loss"], weights=[125] * 9 + [75])
    assert run.history[0]["train_loss"] == pytest.approx(mean, rel=1e-6)


def test_training_images_are_shuffled_anew_every_epoch(tiny_config, tiny_digits, monkeypatch):
    batches = []
    after_step(monkeypatch, lambda _, pixels, labels: batches.append((pixels, labels)))
    train(tiny_config, tiny_digits)
    ids = tiny_digits.split("random")[0]
    known = {p.numpy().tobytes(): i for i, p in enumerate(tiny_digits.train_images)}
    shown = [known[p.numpy().tobytes()] for pixels, _ in batches for p in pixels]
    first, second = shown[:500], shown[500:]
    assert sorted(first) == sorted(second) == sorted(ids.tolist())  # and no validation image
    assert first != second
    assert first != ids.tolist()
    assert torch.cat([labels for _, labels in batches]).equal(tiny_digits.train_labels[shown])


def test_with_validation_the_test_images_are_not_touched(quick_config, tiny_digits):
    without = replace(tiny_digits, test_images=None, test_labels=None)
    first, second = train(quick_config, tiny_digits), train(quick_config, without)
    assert same(weights(first), weights(second))
    assert without_seconds(first.history) == without_seconds(second.history)
    assert load_checkpoint(first.checkpoint)["accuracy_kind"] == "validation"


def test_split_none_trains_on_everything_and_names_the_test_accuracy(
    tiny_config, tiny_digits, monkeypatch, capsys
):
    labels = []
    after_step(monkeypatch, lambda _, __, batch: labels.append(batch))
    config = replace(tiny_config, split="none")
    run = train(config, tiny_digits)
    title, *rows = capsys.readouterr().out.splitlines()
    assert all(row.split()[2] == row.split()[4] == "-" for row in rows)  # not "nan"
    assert {len(row) for row in rows} == {len(title)}
    assert len(torch.cat(labels)) == 2 * 600
    assert run.n_val == 0
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_acc"]) for row in run.history)
    content = load_checkpoint(run.checkpoint)
    accuracy = evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).accuracy
    assert (content["accuracy_kind"], content["accuracy"]) == ("test", accuracy)
    assert run.checkpoint.name.endswith(f"_acc{accuracy:.2f}.pth")


def test_split_none_looks_at_no_test_image_before_the_end(quick_config, tiny_digits, monkeypatch):
    within_step(monkeypatch, 7, ctrl_c)  # in the second epoch
    run = train(replace(quick_config, split="none"), tiny_digits)
    content = load_checkpoint(run.checkpoint)
    assert (content["accuracy_kind"], run.checkpoint.name[-10:]) == ("none", "_accNA.pth")


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted", "interrupted twice"])
def test_the_process_is_left_as_it_was(quick_config, tiny_digits, monkeypatch, how):
    seen = []

    def act():
        seen.append(torch.get_num_threads())
        if how == "failed":
            raise ZeroDivisionError
        if how == "interrupted":
            ctrl_c()
        if how == "interrupted twice":
            raise KeyboardInterrupt

    def handler(number, frame):
        raise AssertionError("Ctrl-C got past the run")

    def process():
        numpy = np.random.get_state()[1].tolist()  # noqa: NPY002 - the global one is meant
        threads, caught = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
        return torch.get_rng_state().tolist(), random.getstate(), numpy, threads, caught

    within_step(monkeypatch, 6, act)
    usual = signal.signal(signal.SIGINT, handler)
    try:
        before = process()
        config = replace(quick_config, threads=torch.get_num_threads() + 1)
        if how == "failed":
            with pytest.raises(ZeroDivisionError):
                train(config, tiny_digits)
        else:
            assert train(config, tiny_digits).interrupted == (how != "finished")
        assert process() == before
        assert seen == [config.threads]  # it had been another
    finally:
        signal.signal(signal.SIGINT, usual)


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


def test_a_run_that_is_not_verbose_prints_nothing(quick_config, tiny_digits, capsys):
    train(quick_config, tiny_digits, verbose=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_eval_every_fills_the_curve_and_changes_no_bit(quick_config, tiny_digits, ema_decay):
    config = replace(quick_config, ema_decay=ema_decay)
    plain = train(config, tiny_digits)
    run = train(config, tiny_digits, eval_every=3)
    assert plain.curve["eval_step"] == []
    assert run.curve["eval_step"] == [3, 6]
    assert all(0 <= error <= 100 for error in run.curve["eval_error"])
    assert {len(run.curve["loss"]), len(run.curve["lr"])} == {STEPS}
    assert same(weights(plain), weights(run))
    last = train(config, tiny_digits, eval_every=4).curve["eval_error"]
    assert last == [100 - row["val_acc"] for row in run.history]


def test_only_the_latest_checkpoint_of_a_run_stays(tiny_config, tiny_digits, runs_folder):
    run = train(replace(tiny_config, epochs=3), tiny_digits)
    folder = runs_folder / run.config.run_name("mnist")
    assert list(folder.iterdir()) == [run.checkpoint]
    assert run.checkpoint.name.endswith(f"_acc{run.history[-1]['val_acc']:.2f}.pth")


def test_a_run_that_is_not_saved_writes_nothing_and_has_the_same_bits(
    quick_config, tiny_digits, runs_folder, tmp_path
):
    run = train(quick_config, tiny_digits, folder=tmp_path / "kept out", save=False)
    assert run.checkpoint is None
    assert list(tmp_path.rglob("*.pth")) == []
    assert same(weights(run), weights(train(quick_config, tiny_digits)))


def test_a_loss_that_is_not_finite_stops_the_run(quick_config, tiny_digits, monkeypatch, tmp_path):
    after_step(monkeypatch, lambda t, *_: poison(t) if t.step == 5 else None)
    with pytest.raises(TrainingError, match=r"not finite at step 6 of 8.*learning rate.*0\.02"):
        train(quick_config, tiny_digits, folder=tmp_path)
    (left,) = tmp_path.glob("*.pth")
    assert load_checkpoint(left)["training"]["step"] == 4


def test_too_high_a_learning_rate_leaves_no_checkpoint_that_cannot_be_loaded(
    tiny_config, tiny_digits, tmp_path
):
    config = replace(tiny_config, optimizer="sgd", max_lr=100)
    with pytest.raises(TrainingError, match=r"not finite at step \d of 8.*max_lr is 100"):
        train(config, tiny_digits, folder=tmp_path)
    for path in tmp_path.glob("*.pth"):
        load_checkpoint(path)


@pytest.mark.parametrize("step", [6, 8], ids=["then interrupted", "at the end of the run"])
def test_weights_that_are_not_finite_replace_no_good_checkpoint(
    quick_config, tiny_digits, monkeypatch, tmp_path, step
):
    """The loss of a step is computed before its update, so the last update can go unseen."""
    after_step(monkeypatch, lambda t, *_: poison(t) if t.step == step else None)
    within_step(monkeypatch, 6, ctrl_c if step == 6 else lambda: None)
    with pytest.raises(TrainingError, match="not finite"):
        train(quick_config, tiny_digits, folder=tmp_path)
    (left,) = tmp_path.glob("*.pth")
    assert load_checkpoint(left)["training"]["step"] == 4


def test_a_run_interrupted_at_any_step_resumes_to_the_same_bits(
    quick_config, tiny_digits, finished, monkeypatch, tmp_path
):
    whole = finished(quick_config)
    for step in range(1, STEPS + 1):
        with monkeypatch.context() as m:
            within_step(m, step, ctrl_c)
            run = train(quick_config, tiny_digits, folder=tmp_path / f"{step}", eval_every=3)
        assert run.interrupted == (step < STEPS)
        assert ("interrupted" in repr(run)) == run.interrupted
        assert len(run.curve["loss"]) == step
        assert len(run.history) == step // 4
        content = load_checkpoint(run.checkpoint)
        assert content["training"]["step"] == step
        assert same(content["model_state_dict"], weights(run))
        assert math.isfinite(
            evaluate(run.model, tiny_digits.test_images, tiny_digits.test_labels).loss
        )
        again = train(
            quick_config, tiny_digits, run.checkpoint, folder=tmp_path / f"{step}", eval_every=3
        )
        assert not again.interrupted
        assert same(weights(again), weights(whole)), step
        assert training_state(again.checkpoint).keys() == training_state(whole.checkpoint).keys()
        assert same(training_state(again.checkpoint), training_state(whole.checkpoint)), step
        assert again.curve == whole.curve
        assert again.seconds > run.seconds or step == STEPS


@pytest.mark.parametrize(
    "action", [lambda: fail(KeyboardInterrupt), lambda: (ctrl_c(), ctrl_c())],
    ids=["an exception", "a second Ctrl-C"],
)  # fmt: skip
def test_a_step_torn_apart_goes_back_to_the_last_checkpoint(
    quick_config, tiny_digits, finished, monkeypatch, tmp_path, action
):
    whole = finished(quick_config)
    for step in range(1, STEPS + 1):
        with monkeypatch.context() as m:
            within_step(m, step, action)
            run = train(quick_config, tiny_digits, folder=tmp_path / f"{step}")
        assert run.interrupted
        assert len(run.history) == (step - 1) // 4
        if step <= 4:
            assert run.checkpoint is None
        else:
            assert same(load_checkpoint(run.checkpoint)["model_state_dict"], weights(run))
        again = train(quick_config, tiny_digits, run.checkpoint)
        assert same(weights(again), weights(whole)), step


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_save_torn_apart_leaves_run_and_checkpoint_in_step(
    quick_config, tiny_digits, finished, monkeypatch, tmp_path, when, epoch
):
    whole = finished(quick_config)
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
        run = train(quick_config, tiny_digits, folder=tmp_path)
    step = load_checkpoint(run.checkpoint)["training"]["step"] if run.checkpoint else 0
    assert run.interrupted == (step < STEPS)
    assert len(run.history) == step // 4
    assert same(weights(train(quick_config, tiny_digits, run.checkpoint)), weights(whole))


@pytest.fixture
def stopped(quick_config, tiny_digits, monkeypatch, tmp_path):
    """Return a run that was interrupted in the middle of its second epoch."""
    with monkeypatch.context() as m:
        within_step(m, 6, ctrl_c)
        return train(quick_config, tiny_digits, folder=tmp_path / "stopped")


def test_a_fresh_process_resumes_to_the_same_bits(
    quick_config, tiny_digits, finished, stopped, tmp_path
):
    whole = finished(quick_config)
    torch.save(vars(tiny_digits), tmp_path / "digits.pt")
    script = """
import sys
import torch
from mnistlib import Config, Digits, load_checkpoint, train
digits, checkpoint, result = sys.argv[1:]
config = Config(**load_checkpoint(checkpoint)["config"])
run = train(config, Digits(**torch.load(digits)), checkpoint)
torch.save(run.model.state_dict(), result)
"""
    files = [str(tmp_path / "digits.pt"), str(stopped.checkpoint), str(tmp_path / "result.pt")]
    subprocess.run([sys.executable, "-c", script, *files], check=True, timeout=100)
    assert same(torch.load(tmp_path / "result.pt"), weights(whole))


@pytest.mark.parametrize(
    "field", ["weights", "optimizer", "scheduler", "average", "rng", "order", "distort", "step"]
)
def test_no_part_of_the_training_state_can_be_left_out(
    quick_config, tiny_digits, finished, stopped, tmp_path, field
):
    whole = finished(quick_config)
    content = load_checkpoint(stopped.checkpoint)
    complete = train(quick_config, tiny_digits, save_checkpoint(content, tmp_path))
    assert same(weights(complete), weights(whole))
    fresh = TrainingState(quick_config, CPU, 500).state()
    content["training"][field] = fresh[field]
    forged = save_checkpoint(content, tmp_path / "forged")
    try:
        lacking = train(quick_config, tiny_digits, forged)
    except (CheckpointError, RuntimeError, ValueError):
        return  # refused, which is as good
    assert not same(weights(lacking), weights(whole))


@pytest.mark.parametrize("stop", [5, 6, 8, 11])
def test_a_focused_run_resumes_to_the_same_bits(
    focused, tiny_digits, finished, monkeypatch, tmp_path, stop
):
    with monkeypatch.context() as m:
        within_step(m, stop, ctrl_c)
        part = train(focused, tiny_digits, folder=tmp_path)
    assert part.interrupted
    assert same(weights(train(focused, tiny_digits, part.checkpoint)), weights(finished(focused)))


@pytest.mark.parametrize("field", ["last_loss", "epoch_loss"])
def test_no_part_of_what_focus_remembers_can_be_left_out(
    focused, tiny_digits, finished, monkeypatch, tmp_path, field
):
    with monkeypatch.context() as m:
        within_step(m, 7, ctrl_c)
        part = train(focused, tiny_digits, folder=tmp_path)
    content = load_checkpoint(part.checkpoint)
    content["training"][field] = TrainingState(focused, CPU, 500).state()[field]
    lacking = train(focused, tiny_digits, save_checkpoint(content, tmp_path / "forged"))
    assert not same(weights(lacking), weights(finished(focused)))
    del content["training"][field]
    with pytest.raises(CheckpointError, match=f"lacks {field}"):
        train(focused, tiny_digits, save_checkpoint(content, tmp_path / "without"))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("max_lr", 0.03, "max_lr 0.02 there, 0.03 here"),
        ("seed", 4, "seed 3 there, 4 here"),
        ("epochs", 3, "epochs 2 there, 3 here"),
        ("split", "last", "split 'random' there, 'last' here"),
    ],
)
def test_another_run_is_not_resumed(quick_config, tiny_digits, stopped, field, value, text):
    with pytest.raises(CheckpointError, match=text) as error:
        train(replace(quick_config, **{field: value}), tiny_digits, stopped.checkpoint)
    assert str(stopped.checkpoint) in str(error.value)
    assert "dropout" not in str(error.value)  # what agrees is not listed


def test_a_run_on_other_digits_is_not_resumed(quick_config, tiny_digits, stopped):
    labels = (torch.arange(600) % 10).to(torch.uint8)  # as many of each class, as in the sample
    sample = replace(tiny_digits, train_labels=labels, source="sample")
    with pytest.raises(CheckpointError, match="data source 'mnist' there, 'sample' here"):
        train(quick_config, sample, stopped.checkpoint)


def test_threads_may_differ_when_a_run_is_resumed(quick_config, tiny_digits, stopped):
    run = train(replace(quick_config, threads=2), tiny_digits, stopped.checkpoint)
    assert (run.interrupted, run.threads, len(run.history)) == (False, 2, 2)


def test_resuming_a_finished_run_returns_it(quick_config, tiny_digits, capsys):
    done = train(quick_config, tiny_digits)
    raw = done.checkpoint.read_bytes()
    capsys.readouterr()
    again = train(quick_config, tiny_digits, done.checkpoint)
    assert same(weights(again), weights(done))
    assert (again.history, again.curve, again.seconds) == (done.history, done.curve, done.seconds)
    assert (again.checkpoint, again.interrupted) == (done.checkpoint, False)
    assert again.checkpoint.read_bytes() == raw
    assert capsys.readouterr().out == ""


def test_a_run_resumed_into_another_folder_keeps_what_it_came_from(
    quick_config, tiny_digits, stopped, tmp_path
):
    raw = stopped.checkpoint.read_bytes()
    again = train(quick_config, tiny_digits, str(stopped.checkpoint), folder=tmp_path / "new")
    assert again.checkpoint.parent == tmp_path / "new"
    assert stopped.checkpoint.read_bytes() == raw


def test_training_works_in_a_thread_that_gets_no_signals(quick_config, tiny_digits):
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, quick_config, tiny_digits).result(timeout=60)
    assert same(weights(run), weights(train(quick_config, tiny_digits)))


def test_memory_is_kept_while_training_and_given_back_after(tiny_config, tiny_digits, monkeypatch):
    from mnistlib import process

    calls = []

    class Libc:
        def mallopt(self, which, value):
            calls.append((which, value))

        def malloc_trim(self, pad):
            calls.append("trim")

    monkeypatch.setattr(process, "_glibc", Libc)
    after_step(monkeypatch, lambda *_: calls.append("step"))
    train(tiny_config, tiny_digits, save=False)
    assert calls == [(-3, 1 << 25), (-1, (1 << 31) - 1), *["step"] * STEPS,
                     (-3, 131072), (-1, 131072), "trim"]  # fmt: skip


def test_without_glibc_memory_is_left_alone(tiny_config, tiny_digits, monkeypatch):
    from mnistlib import process

    monkeypatch.setattr(process, "_glibc", lambda: None)
    assert len(train(tiny_config, tiny_digits, save=False).history) == 2


def test_the_average_is_torchs_own_moving_average(tiny_config):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    t = TrainingState(tiny_config, CPU, 500)
    known = AveragedModel(t.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        with torch.no_grad():
            for p in [*t.model.parameters(), *t.model.buffers()]:
                if p.is_floating_point():
                    p.add_(torch.randn_like(p))
        t.update_average()
        known.update_parameters(t.model)
    found = t.average.module.state_dict()
    for name, value in known.module.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(found[name], value, rtol=1e-6, atol=1e-7), name
    assert t.average.n_averaged == known.n_averaged == 5
