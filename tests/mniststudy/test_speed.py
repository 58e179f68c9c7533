"""The benchmark: the loops it compares train the same thing, and each row says what was timed."""

import csv
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch
from joblib import parallel_config

from mnistlib import RECIPES, Budget, Config, build, evaluate
from mnistlib.paths import outputs_folder
from mniststudy.cli import main
from mniststudy.figures import speed
from mniststudy.figures.speed import BASELINES, bench, curves, measures, recipe_steps
from mniststudy.figures.speed_loop import LOOP_STEPS, LoopOptions, TutorialLoop, training_setup
from mniststudy.runs import ledger
from mniststudy.runs.ledger import LedgerError

SMALL = Config(
    model="c8s2 r1 p full", epochs=2, batch_size=100, max_lr=0.01, dropout=0.0, ema_decay=0.9,
    device="cpu",
)  # fmt: skip
TUTORIAL = LoopOptions()


def trained(digits, options, config=SMALL):
    """Train by the tutorial's loop with some options."""
    loop = TutorialLoop(training_setup(config), digits, options, seed=1)
    for _ in loop:
        pass
    return loop


# the loader shuffles by another draw, half precision computes something else
@pytest.mark.parametrize(
    "name",
    ["kept as uint8", "loss read at the end", "channels_last", "fused optimizer",
     "freed memory kept", "denormals flushed"],
)  # fmt: skip
def test_whatever_the_options_the_same_is_computed(tiny_digits, name):
    def precise(options):
        setup = training_setup(SMALL)
        double = replace(setup, build=lambda: setup.build().double())
        loop = TutorialLoop(double, tiny_digits, options, seed=1)
        assert list(loop) == list(range(1, 11))
        return loop.average.model.state_dict()

    other = precise(LOOP_STEPS[name][1])
    for key, value in precise(LOOP_STEPS["tensors in memory"][1]).items():
        assert torch.allclose(value, other[key], rtol=1e-6, atol=1e-8), key


def test_denormals_are_flushed_while_the_loop_that_says_so_runs_and_no_longer(tiny_digits):
    def flushed():
        return bool(torch.tensor([1e-40]).mul(1.0).eq(0).item())

    loop = TutorialLoop(training_setup(SMALL), tiny_digits, LOOP_STEPS["denormals flushed"][1])
    steps = iter(loop)
    next(steps)
    inside = flushed()
    steps.close()
    assert (inside, flushed()) == (True, False)


def test_each_step_of_the_loop_differs_from_the_one_it_builds_on_in_one_option():
    for base, options in list(LOOP_STEPS.values())[1:]:
        here, there = asdict(options), asdict(LOOP_STEPS[base][1])
        assert sum(here[k] != there[k] for k in here) == 1


@pytest.mark.parametrize("options", [TUTORIAL, LOOP_STEPS["kept as uint8"][1]])
def test_a_pass_shows_every_image_once_with_its_label(tiny_digits, options):
    loop = TutorialLoop(training_setup(SMALL), tiny_digits, options)
    shown = list(loop.batches(loop.train_ids, training=True))
    assert [len(labels) for _, labels in shown] == [100] * 5
    seen = {(p * 255).round().to(torch.uint8).numpy().tobytes(): int(y)
            for pixels, labels in shown for p, y in zip(pixels, labels, strict=True)}  # fmt: skip
    images, labels = tiny_digits.train_images, tiny_digits.train_labels
    assert seen == {images[i].numpy().tobytes(): int(labels[i]) for i in loop.train_ids.tolist()}
    first, second = ([y.tolist() for _, y in loop.batches(loop.train_ids, True)] for _ in range(2))
    assert first != second


@pytest.mark.parametrize("options", [TUTORIAL, LOOP_STEPS["fused optimizer"][1]])
def test_it_learns_and_its_accuracy_is_what_evaluate_finds(tiny_digits, options):
    loop = trained(tiny_digits, options, replace(SMALL, epochs=6, max_lr=0.03))
    _, ids = tiny_digits.split()
    images, labels = tiny_digits.train_images[ids], tiny_digits.train_labels[ids]
    seen = evaluate(loop.average.model, images, labels)
    assert loop.accuracy() == pytest.approx(seen.accuracy)
    assert seen.accuracy > 50


def test_the_average_is_what_is_evaluated(tiny_digits):
    loop = trained(tiny_digits, TUTORIAL)
    assert loop.average.model is not loop.model
    before = loop.accuracy()
    for p in loop.model.parameters():
        torch.nn.init.zeros_(p)
    assert loop.accuracy() == before
    plain = trained(tiny_digits, TUTORIAL, replace(SMALL, ema_decay=0.0))
    assert plain.average.model is plain.model


def test_pictures_are_augmented_one_by_one_in_training_alone(tiny_digits):
    config = replace(SMALL, degrees=20.0)
    for options in (TUTORIAL, LOOP_STEPS["tensors in memory"][1]):
        loop = TutorialLoop(training_setup(config), tiny_digits, options)
        plain = {p.numpy().tobytes() for p in tiny_digits.train_images.float() / 255}
        for training, wanted in ((True, 0), (False, 100)):
            shown = [p for pixels, _ in loop.batches(loop.val_ids, training) for p in pixels]
            assert sum(p.numpy().tobytes() in plain for p in shown) == wanted


def learning_rates(setup, digits):
    """The learning rate after each step, of a network that is quick to train."""
    quick = replace(setup, build=training_setup(SMALL).build)
    loop = TutorialLoop(quick, digits, LOOP_STEPS["tensors in memory"][1])
    return [loop.optimizer.param_groups[0]["lr"] for _ in loop]


def test_the_learning_rate_of_ours_changes_at_every_step_of_a_published_one_after_an_epoch(
    tiny_digits,
):
    rates = learning_rates(training_setup(SMALL), tiny_digits)
    assert len(set(rates)) == len(rates) == 10
    pytorch = BASELINES["pytorch"]
    short = replace(pytorch, config=replace(pytorch.config, epochs=3, batch_size=250))
    assert learning_rates(short, tiny_digits) == pytest.approx([1, 0.7, 0.7, 0.49, 0.49, 0.343])
    keras = BASELINES["keras"]
    short = replace(keras, config=replace(keras.config, epochs=1))
    assert set(learning_rates(short, tiny_digits)) == {1e-3}


@pytest.mark.parametrize(("name", "parameters"), [("keras", 34_826), ("pytorch", 1_199_882)])
def test_the_baselines_have_their_published_parameters(name, parameters):
    model = BASELINES[name].build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_epochs_have_a_point_each(tiny_digits):
    points = list(TutorialLoop(training_setup(SMALL), tiny_digits, TUTORIAL).epochs())
    assert [epoch for epoch, _, _ in points] == [1, 2]
    assert points[0][1] < points[1][1]


def test_the_steps_of_the_recipe_lead_from_reference_to_fast():
    steps = [RECIPES["reference"], *recipe_steps().values()]
    assert steps[-1] == RECIPES["fast"]
    assert all(a != b for a, b in pairwise(steps))


def committed(name):
    with (outputs_folder() / "results" / f"{name}.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        return tuple(reader.fieldnames), list(reader)


def test_everything_that_notebook_08_shows_is_measured_and_described_as_it_was(tiny_digits):
    """All but what was measured: the columns of the rows of the last committed session."""
    columns, rows = committed("speed")
    assert columns == speed.COLUMNS
    assert committed("curves")[0] == speed.CURVE_COLUMNS
    thousands = replace(
        tiny_digits,
        train_images=tiny_digits.train_images[:1].expand(60_000, 1, 28, 28),
        train_labels=tiny_digits.train_labels.repeat(100),
    )
    alike = ("base", "images", "whole_images", "processes", "parameters", "multiply_accumulates",
             "config_hash", "evaluations")  # fmt: skip
    usual = {"processes": 1, "evaluations": 0}
    last = max(row["go"] for row in rows)
    rows = [row for row in rows if row["go"] == last]
    known = {(row["kind"], row["name"]): [row[c] for c in alike] for row in rows}
    torch.set_num_threads(2)  # as many as the session had
    try:
        found = {
            (row["kind"], row["name"]): [
                str(usual.get(c, "") if row.get(c) is None else row[c]) for c in alike
            ]
            for row, _ in measures(thousands)
        }
    finally:
        torch.set_num_threads(1)
    assert found == known


def test_short_runs_are_timed_by_either_loop(tiny_digits):
    setup = training_setup(replace(SMALL, epochs=9))
    tutorial = partial(speed.time_tutorial_loop, options=TUTORIAL)
    for timer in (speed.time_our_loop, tutorial):
        seconds, evaluation = timer(setup, tiny_digits, images=300)
        assert 0 < seconds < 10
        assert 0 < evaluation < 10


def test_whole_runs_are_timed_by_either_loop(tiny_digits):
    setup = training_setup(replace(SMALL, epochs=9))
    tutorial = partial(speed.time_tutorial_loop, options=TUTORIAL, images=0)
    for timer in (partial(speed.time_our_loop, images=0), tutorial):
        seconds, evaluation = timer(setup, tiny_digits)
        assert 0 < seconds < 10
        assert 0 < evaluation < 10


def test_our_loop_is_timed_over_as_many_images_as_asked_for_after_a_warm_up(
    tiny_digits, monkeypatch
):
    asked, train = [], speed.train

    def note(config, *args, **more):
        asked.append((config.epochs, config.epoch_images, config.split))
        return train(replace(config, epoch_images=100), *args, **more)

    monkeypatch.setattr(speed, "train", note)
    speed.time_our_loop(training_setup(SMALL), tiny_digits)
    assert asked == [(1, 1_000, "none"), (1, 12_800, "none")]


def test_two_processes_train_side_by_side(tiny_digits, monkeypatch):
    monkeypatch.setattr(speed, "IMAGES_PER_TIMING", 50)
    setup = training_setup(replace(SMALL, batch_size=25))
    for processes in (1, 2):
        assert 0 < speed.time_side_by_side(setup, tiny_digits, processes)[0] < 60


def test_products_take_time():
    assert 0 < speed.time_matmul(1)[0] < 60


@pytest.fixture
def two_measures(monkeypatch, tiny_digits):
    """Have two measures."""
    a = {"kind": "step", "name": "a", "images": 100, "parameters": 34_826, "evaluations": 3}
    b = {"kind": "pair", "name": "b", "images": 200, "threads": 1, "processes": 2}
    two = [(a, lambda: (1.5, 0.5)), (b, lambda: (9.0, 0.0))]
    monkeypatch.setattr(speed, "measures", lambda digits: iter(two))
    monkeypatch.setattr(speed, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setattr(speed, "in_new_process", lambda work, *arguments: work(*arguments))


def test_rows_go_round_the_measures_and_say_what_was_timed(tmp_path, two_measures):
    bench(tmp_path, repetitions=2)
    path = bench(tmp_path, repetitions=1, only="pair: b")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == speed.COLUMNS
    assert [(r["name"], r["repetition"]) for r in rows] == [
        ("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"), ("b", "1"),
    ]  # fmt: skip
    assert (rows[0]["seconds"], rows[0]["evaluation_seconds"]) == ("1.5", "0.5")
    assert (rows[0]["parameters"], rows[0]["evaluations"]) == ("34826", "3")
    assert (rows[0]["threads"], rows[0]["processes"]) == ("1", "1")
    assert (rows[1]["processes"], rows[1]["evaluation_seconds"]) == ("2", "")
    assert rows[1]["evaluations"] == "0"
    assert len({r["go"] for r in rows[:4]}) == 1


def test_another_table_is_refused_before_anything_is_timed(tmp_path, two_measures, monkeypatch):
    for name, call in (("speed", bench), ("curves", partial(curves, "keras", [0]))):
        (tmp_path / f"{name}.csv").write_text("not,the,columns\n")
        with pytest.raises(LedgerError, match=f"{name}.csv"):
            call(tmp_path)


@pytest.fixture
def here(monkeypatch, tiny_digits):
    """Have this process do what workers would, on the tiny digits with a short training."""
    monkeypatch.setattr(speed, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setitem(BASELINES, "reference", training_setup(SMALL))
    with parallel_config(backend="sequential"):
        yield


def test_curves_have_a_row_per_epoch_and_no_seed_twice(here, tmp_path, capsys):
    command = ["bench", "--curves", "reference", "--seeds", "0:2", "--ledger", str(tmp_path)]
    assert main(command) == 0
    path = curves("reference", [1, 2], tmp_path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == speed.CURVE_COLUMNS
    shown = [(int(r["seed"]), int(r["epoch"])) for r in rows]
    assert shown == [(s, e) for s in (0, 1, 2) for e in (1, 2)]
    assert rows[0]["parameters"] == str(Budget(build(SMALL.model)).parameters)
    told = capsys.readouterr().out
    assert [told.count(f"reference seed {seed}: ") for seed in (0, 1, 2)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["bench", "--curves", "alexnet"], "'alexnet', but it must be one of reference, "),
        (["bench", "--only", "no such step"], "no measure has 'no such step' in its name"),
        (["bench", "--repetitions", "0"], "repetitions"),
    ],
)
def test_what_cannot_be_timed_is_refused_in_a_sentence(two_measures, command, words, capsys):
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error


@pytest.fixture
def timed(tmp_path):
    """Write a ledger of two sessions and three seeds; the second session is the one that counts."""
    config = replace(SMALL, seed=0)
    lines = [
        "go,kind,name,base,repetition,images,seconds,evaluation_seconds,whole_images,evaluations,"
        "config_hash"
    ]
    for go, name, base, seconds in [
        ("1", "slow", "", 99), ("2", "slow", "", 2), ("2", "tried", "slow", 4),
        ("2", "bfloat16", "slow", 5), ("2", "quick", "slow", 1), ("2", "slow", "", 4),
        ("2", "slow", "", 3),
    ]:  # fmt: skip
        digest = config.hash("mnist") if name in ("quick", "bfloat16") else "00000000"
        lines.append(f"{go},step,{name},{base},1,100,{seconds},0.5,1000,2,{digest}")
    (tmp_path / "speed.csv").write_text("\n".join(lines) + "\n")
    rows = []
    for seed, accuracy in [(0, 99.1), (1, 99.2), (2, 99.3), (100, 90.0)]:
        settings = asdict(replace(config, seed=seed))
        run = {
            "config_hash": replace(config, seed=seed).hash("mnist"),
            "config": json.dumps(settings),
        }
        measured = dict.fromkeys(ledger.COLUMNS, "") | {"seed": seed, "val_accuracy": accuracy}
        rows.append(measured | run)
    ledger.append_rows(tmp_path / "runs.csv", ledger.COLUMNS, rows)
    return tmp_path


def test_the_table_of_steps_is_what_the_last_session_measured(timed):
    table = speed.step_table(timed)
    assert table.index.tolist() == ["slow", "tried", "bfloat16", "quick"]
    assert table.loc["slow", "seconds"] == pytest.approx(3 / 100 * 1000 + 2 * 0.5)
    assert table.loc["slow", ["fastest", "slowest"]].tolist() == pytest.approx([21, 41])
    assert table.loc["quick", "us"] == pytest.approx(1e4)
    assert table["base"].tolist() == ["", "slow", "slow", "slow"]
    assert table["kept"].tolist() == [True, False, False, True]
    assert table.loc["quick", "accuracy"] == [99.1, 99.2, 99.3]
    assert table.loc["bfloat16", "accuracy"] == []  # the ledger's runs are in full precision
    assert table.loc["slow", "accuracy"] == []


def test_the_staircase_can_be_drawn(timed):
    speed.staircase(speed.step_table(timed).drop("bfloat16"), "A title")
    (ax,) = plt.gcf().axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["slow", "tried (not kept)", "quick"]
    texts = [t.get_text() for t in ax.texts]
    assert "  31 s" in texts
    assert "99.20 %, n = 3" in texts
    plt.close("all")


def test_memory_is_told_by_stage():
    table = speed.memory_table(replace(SMALL, epochs=1, epoch_images=200))
    assert len(table) == (4 if sys.platform == "linux" else 0)
    assert (table >= 0).all()
    assert (table[1:2] > 50).all()  # torch's compiler
    assert table.sum() < 500
