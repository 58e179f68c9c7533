"""The benchmark: the loops it compares train the same thing, and each row says what was timed."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from mnistlib import Config, evaluate
from mnistlib.paths import outputs_folder
from mniststudy.figures import speed, speed_loop
from mniststudy.figures.speed_loop import KEPT, NOT_KEPT, TutorialLoop
from mniststudy.runs import ledger
from mniststudy.runs.ledger import LedgerError

SMALL = Config(
    model="c8s2 r1 p full", epochs=2, batch_size=100, max_lr=0.01, dropout=0.0, ema_decay=0.9,
    device="cpu",
)  # fmt: skip


def double(config, steps_per_epoch):
    model, *_ = speed_loop.config_parts(config, steps_per_epoch)
    model.double()
    optimizer = speed_loop.make_optimizer(model, config)
    return model, optimizer, speed_loop.make_scheduler(optimizer, config, steps_per_epoch)


def test_whatever_the_changes_the_same_is_computed(tiny_digits):
    def weights(changes):
        short = replace(SMALL, epochs=1)
        loop = TutorialLoop(short, tiny_digits, changes, seed=1, parts=double)
        assert list(loop) == list(range(1, 6))
        return loop.average.model.state_dict()

    first = weights(KEPT[:1])  # the loader shuffles by another draw
    for changes in (KEPT[:2], KEPT[:3], KEPT[:4], KEPT[:5], KEPT, (*KEPT, "denormals flushed")):
        for key, value in weights(changes).items():
            assert torch.allclose(value, first[key], rtol=1e-6, atol=1e-8), (changes, key)
    assert torch.tensor([1e-40]).mul(1.0) > 0  # denormals are not flushed after the loop


def test_every_change_that_has_a_name_is_one_that_the_loop_makes(tiny_digits, monkeypatch):
    asked = set()

    class Changes(tuple):
        def __contains__(self, name):
            asked.add(name)
            return super().__contains__(name)

    loop = TutorialLoop(SMALL, tiny_digits, Changes(KEPT[:1]))
    next(iter(loop))
    assert asked == {*KEPT, *NOT_KEPT}


@pytest.mark.parametrize("changes", [(), KEPT[:2]])
def test_a_pass_shows_every_image_once_with_its_label_and_augments_in_training(
    tiny_digits, changes
):
    loop = TutorialLoop(SMALL, tiny_digits, changes)
    first, second = (list(loop.batches(loop.train_ids, training=True)) for _ in range(2))
    assert [len(labels) for _, labels in first] == [100] * 5
    assert [y.tolist() for _, y in first] != [y.tolist() for _, y in second]

    def seen(passed):
        pairs = zip(*map(torch.cat, zip(*passed, strict=True)), strict=True)
        return {(pixels.numpy().tobytes(), int(label)) for pixels, label in pairs}

    images, labels = tiny_digits.train_images.float() / 255, tiny_digits.train_labels
    wanted = seen([(images[loop.train_ids], labels[loop.train_ids])])
    assert seen(first) == seen(second) == wanted
    turned = TutorialLoop(replace(SMALL, degrees=20.0), tiny_digits, changes)
    assert not seen(turned.batches(loop.train_ids, training=True)) & wanted
    assert seen(turned.batches(loop.train_ids, training=False)) == wanted


def test_its_accuracy_is_what_evaluate_finds_for_the_average(tiny_digits):
    _, ids = tiny_digits.split()
    images, labels = tiny_digits.train_images[ids], tiny_digits.train_labels[ids]
    for changes in ((), KEPT):
        config = replace(SMALL, epochs=3, max_lr=0.03, dropout=0.5)
        loop = TutorialLoop(config, tiny_digits, changes)
        assert len(list(loop)) == 15
        found = evaluate(loop.average.model, images, labels).accuracy
        assert loop.accuracy() == pytest.approx(found)
        assert found > 50


def test_the_learning_rate_of_ours_changes_at_every_step_of_a_published_one_after_an_epoch(
    tiny_digits,
):
    images, labels = tiny_digits.train_images[:60], tiny_digits.train_labels[:60]
    few = replace(tiny_digits, train_images=images, train_labels=labels)

    def rates(config, parts):
        loop = TutorialLoop(config, few, KEPT[:1], parts=parts)
        return [loop.optimizer.param_groups[0]["lr"] for _ in loop]

    short = Config(epochs=2, batch_size=25)
    assert len(set(rates(short, speed_loop.config_parts))) == 4
    assert rates(short, speed_loop.pytorch_parts) == pytest.approx([1, 0.7, 0.7, 0.49])
    assert set(rates(short, speed_loop.keras_parts)) == {1e-3}


def test_everything_that_notebook_08_shows_is_measured_and_described_as_it_was(tiny_digits):
    """All but what was measured: the columns of the rows of the last committed session."""
    rows = pd.read_csv(outputs_folder() / "results" / "speed.csv", dtype=str, keep_default_na=False)
    rows = rows[(rows["go"] == rows["go"].max()) & (rows["name"] != "1 threads")]
    alike = ["base", "images", "whole_images", "processes", "parameters", "multiply_accumulates",
             "config_hash", "evaluations"]  # fmt: skip
    known = rows.drop_duplicates(["kind", "name"]).set_index(["kind", "name"])[alike]
    thousands = replace(
        tiny_digits,
        train_images=tiny_digits.train_images[:1].expand(60_000, 1, 28, 28),
        train_labels=tiny_digits.train_labels.repeat(100),
    )
    torch.set_num_threads(2)  # as many as the session had
    try:
        found = [{"processes": 1, "evaluations": 0} | row for row, _ in speed.measures(thousands)]
    finally:
        torch.set_num_threads(1)
    for row in found:
        said = [str("" if row.get(column) is None else row[column]) for column in alike]
        assert said == known.loc[(row["kind"], row["name"])].tolist(), row["name"]
    assert len(found) == len(known)


def test_the_timers_time_a_warm_up_and_then_as_many_images_as_asked_for(tiny_digits, monkeypatch):
    asked, train = [], speed.train

    def short(config, *args, **more):
        asked.append((config.epochs, config.epoch_images, config.split))
        return train(replace(config, epochs=1, epoch_images=100), *args, **more)

    monkeypatch.setattr(speed, "train", short)
    for images, measured in ((12_800, (1, 12_800, "none")), (0, (2, 0, "none"))):
        seconds, _ = speed.time_our_loop(SMALL, tiny_digits, images)
        assert 0 < seconds < 10
        assert asked[-2:] == [(1, 1_000, "none"), measured]
    asked.clear()
    together = SimpleNamespace(wait=lambda: asked.append("together"))
    speed._train_beside(SMALL, tiny_digits, together)
    assert asked == [(1, 1_000, "none"), "together", (1, 12_800, "none"), "together"]
    steps, calls = [], []
    monkeypatch.setattr(TutorialLoop, "__iter__", lambda loop: map(steps.append, range(1000)))
    assert min(speed.time_tutorial_loop(SMALL, tiny_digits, images=250, changes=KEPT)) > 0
    assert len(steps) == speed.WARMUP_STEPS + 3
    assert speed.time_matmul()[0] > 0
    monkeypatch.setattr(speed, "timeit", lambda _, number: calls.append(number) or 1.0)
    assert (speed.time_matmul(), calls) == ((1.0, 0.0), [5, 20])


def test_a_bench_goes_round_the_measures_and_says_what_was_timed(monkeypatch, tiny_digits):
    a = {"kind": "step", "name": "a", "images": 100, "parameters": 34_826, "evaluations": 3}
    b = {"kind": "pair", "name": "b", "images": 200, "threads": 1, "processes": 2}
    two = [(a, lambda: (1.5, 0.5)), (b, lambda: (9.0, 0.0))]
    monkeypatch.setattr(speed, "measures", lambda digits: iter(two))
    monkeypatch.setattr(speed, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    rows = pd.read_csv(speed.bench(repetitions=2))
    assert list(rows) == list(ledger.read_results("speed"))
    assert rows["name"].tolist() == ["a", "b", "a", "b"]
    assert rows["repetition"].tolist() == [1, 1, 2, 2]
    assert rows["evaluation_seconds"].fillna(0).tolist() == [0.5, 0, 0.5, 0]
    seen = ["seconds", "evaluations", "threads", "processes"]
    assert rows[seen].values[:2].tolist() == [[1.5, 3, 1, 1], [9.0, 0, 1, 2]]
    assert rows["go"].nunique() == 1


def test_of_a_session_that_is_interrupted_whole_rounds_are_left(
    monkeypatch, tiny_digits, runs_folder
):
    """Half a round would be the last session, in which the README's table finds no yardstick."""
    took = iter([1.0, 2.0, 3.0])  # and no fourth
    row = {"kind": "step", "images": 100}
    two = [(row | {"name": name}, lambda: (next(took), 0.0)) for name in "ab"]
    monkeypatch.setattr(speed, "measures", lambda digits: iter(two))
    monkeypatch.setattr(speed, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setattr(speed, "ProcessPoolExecutor", lambda n, context: ThreadPoolExecutor(n))
    with pytest.raises((StopIteration, RuntimeError)):
        speed.bench(repetitions=2)
    rows = pd.read_csv(runs_folder / "speed.csv")
    assert rows["seconds"].tolist() == [1.0, 2.0]


def test_curves_have_a_row_for_each_epoch_of_a_training(runs_folder, monkeypatch, tiny_digits):
    monkeypatch.setattr(speed, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setitem(speed.BASELINES, "keras", (SMALL, speed_loop.config_parts))
    speed.curves("keras", seed=0)
    rows = pd.read_csv(speed.curves("keras", seed=1))
    assert list(rows) == list(ledger.read_results("curves"))
    assert rows[["seed", "epoch"]].values.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    assert (rows["seconds"].diff()[1::2] > 0).all()
    assert rows["val_accuracy"].between(1, 100).all()
    (runs_folder / "curves.csv").write_text("not,the,columns\n")
    with pytest.raises(LedgerError, match=r"curves\.csv"):
        speed.curves("keras")


@pytest.fixture
def timed(tmp_path):
    """Write a ledger of two sessions and three seeds; the second session is the one that counts."""
    config = replace(SMALL, seed=0)
    table = pd.DataFrame(
        [("1", "slow", "", 99), ("2", "slow", "", 2), ("2", "tried", "slow", 4),
         ("2", "bfloat16", "slow", 5), ("2", "quick", "slow", 1), ("2", "slow", "", 4),
         ("2", "slow", "", 3)],
        columns=["go", "name", "base", "seconds"],
    )  # fmt: skip
    trained = table["name"].isin(["quick", "bfloat16"])
    table["config_hash"] = trained.map({True: config.hash("mnist"), False: "00000000"})
    usual = {"kind": "step", "images": 100, "whole_images": 1000}
    usual |= {"evaluation_seconds": 0.5, "evaluations": 2, "repetition": 1, "threads": 1}
    table.assign(**usual).to_csv(tmp_path / "speed.csv", index=False)
    rows = []
    for seed, accuracy in [(0, 99.1), (1, 99.2), (2, 99.3), (100, 90.0)]:
        config = replace(config, seed=seed)
        run = {"config_hash": config.hash("mnist"), "config": json.dumps(asdict(config))}
        run |= {"seed": seed, "val_accuracy": accuracy, "epochs": 1, "n_val": 10, "threads": 1}
        rows.append(dict.fromkeys(ledger.COLUMNS) | run)
    ledger.append_rows(tmp_path / "runs.csv", ledger.COLUMNS, rows)
    return speed.step_table(tmp_path)


def test_the_table_of_steps_is_what_the_last_session_measured(timed):
    assert timed.index.tolist() == ["slow", "tried", "bfloat16", "quick"]
    assert timed.loc["slow", "seconds"] == pytest.approx(3 / 100 * 1000 + 2 * 0.5)
    assert timed.loc["slow", ["fastest", "slowest"]].tolist() == pytest.approx([21, 41])
    assert timed.loc["quick", "us"] == pytest.approx(1e4)
    assert timed["base"].tolist() == ["", "slow", "slow", "slow"]
    assert timed["kept"].tolist() == [True, False, False, True]
    # the ledger's runs are in full precision
    assert timed["accuracy"].tolist() == [[], [], [], [99.1, 99.2, 99.3]]


def test_the_staircase_names_the_steps_that_were_not_kept_and_writes_what_each_reaches(timed):
    speed.staircase(timed.drop("bfloat16"), "A title")
    (ax,) = plt.gcf().axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["slow", "tried (not kept)", "quick"]
    assert {"  31 s", "99.20 %, n = 3"} <= {t.get_text() for t in ax.texts}
    plt.close("all")
