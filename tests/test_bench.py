"""The benchmark: the loops it compares train the same thing, and each row says what was timed."""

import csv
import json
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import pairwise

import matplotlib.pyplot as plt
import pytest
import torch

from mnistlib import RECIPES, Config, drawings, evaluate
from mnistlib import bench as bench_module
from mnistlib import peers as peers_module
from mnistlib.__main__ import main
from mnistlib.bench import COLUMNS, WAYS, Measure, bench, ladder, measures
from mnistlib.conventional import Training, Way, course_of, curve
from mnistlib.machine import OPERATORS, matmul, operators, pair_seconds, shared, side_by_side
from mnistlib.peers import COURSES, CURVE_COLUMNS, curves
from mnistlib.report import staircase

SMALL = Config(epochs=2, batch_size=100, max_lr=0.01, dropout=0.0, ema_decay=0.9, device="cpu")


def trained(digits, way, config=SMALL):
    """Train by the conventional loop in some way; return the weights and the accuracy."""
    training = Training(course_of(config), digits, seed=1, way=way)
    for _ in training:
        pass
    torch.set_flush_denormal(False)
    return training


# the loader shuffles by another draw, half precision computes something else
@pytest.mark.parametrize(
    "name",
    ["kept as uint8", "loss read at the end", "channels_last", "fused optimizer",
     "freed memory kept", "denormals flushed"],
)  # fmt: skip
def test_whatever_the_way_the_same_is_computed(tiny_digits, name):
    def precise(way):
        course = course_of(SMALL)
        training = Training(replace(course, build=lambda: course.build().double()), tiny_digits,
                            seed=1, way=way)  # fmt: skip
        assert list(training) == list(range(1, 11))
        torch.set_flush_denormal(False)
        return training.network.state_dict()

    other = precise(WAYS[name][1])
    for key, value in precise(WAYS["tensors in memory"][1]).items():
        assert torch.allclose(value, other[key], rtol=1e-6, atol=1e-8), key


def test_each_way_differs_from_the_one_it_builds_on_in_one_habit():
    for base, way in list(WAYS.values())[1:]:
        here, there = asdict(way), asdict(WAYS[base][1])
        assert sum(here[k] != there[k] for k in here) == 1


@pytest.mark.parametrize("way", [Way(), WAYS["kept as uint8"][1]])
def test_a_pass_shows_every_image_once_with_its_label(tiny_digits, way):
    training = Training(course_of(SMALL), tiny_digits, way=way)
    shown = list(training.batches(training.train_ids, shuffle=True))
    assert [len(labels) for _, labels in shown] == [100] * 5
    seen = {(p * 255).round().to(torch.uint8).numpy().tobytes(): int(y)
            for pixels, labels in shown for p, y in zip(pixels, labels, strict=True)}  # fmt: skip
    images, labels = tiny_digits.train_images, tiny_digits.train_labels
    assert seen == {
        images[i].numpy().tobytes(): int(labels[i]) for i in training.train_ids.tolist()
    }
    first, second = ([y.tolist() for _, y in training.batches(training.train_ids, True)]
                     for _ in range(2))  # fmt: skip
    assert first != second


@pytest.mark.parametrize("way", [Way(), WAYS["fused optimizer"][1]])
def test_it_learns_and_its_accuracy_is_what_evaluate_finds(tiny_digits, way):
    training = trained(tiny_digits, way, replace(SMALL, epochs=6, max_lr=0.03))
    _, ids = tiny_digits.split()
    seen = evaluate(training.network, tiny_digits.train_images[ids], tiny_digits.train_labels[ids])
    assert training.accuracy() == pytest.approx(seen.accuracy)
    assert seen.accuracy > 50


def test_pictures_are_distorted_one_by_one_in_training_alone(tiny_digits):
    config = replace(SMALL, degrees=20.0)
    for way in (Way(), WAYS["tensors in memory"][1]):
        training = Training(course_of(config), tiny_digits, way=way)
        plain = {p.numpy().tobytes() for p in tiny_digits.train_images.float() / 255}
        for shuffle, wanted in ((True, 0), (False, 100)):
            shown = [p for pixels, _ in training.batches(training.val_ids, shuffle) for p in pixels]
            assert sum(p.numpy().tobytes() in plain for p in shown) == wanted


def test_the_rate_of_our_course_is_stepped_per_batch_and_of_a_published_one_per_epoch(tiny_digits):
    training = Training(course_of(SMALL), tiny_digits)
    rates = [training.optimizer.param_groups[0]["lr"] for _ in training]
    assert len(set(rates)) == len(rates) == 10
    training = Training(replace(COURSES["pytorch"], epochs=3, batch_size=250), tiny_digits)
    rates = [training.optimizer.param_groups[0]["lr"] for _ in training]
    assert rates == pytest.approx([1, 1, 0.7, 0.7, 0.49, 0.49])


@pytest.mark.parametrize(("name", "parameters"), [("keras", 34_826), ("pytorch", 1_199_882)])
def test_the_peers_have_their_published_parameters(name, parameters):
    model = COURSES[name].build()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_the_curve_has_a_point_per_epoch(tiny_digits):
    points = list(curve(Training(course_of(SMALL), tiny_digits)))
    assert [epoch for epoch, _, _ in points] == [1, 2]
    assert points[0][1] < points[1][1]


def test_the_ladder_leads_from_reference_to_fast():
    steps = [RECIPES["reference"], *ladder().values()]
    assert steps[-1] == RECIPES["fast"]
    assert all(a != b for a, b in pairwise(steps))


def test_everything_that_notebook_08_shows_is_measured(tiny_digits):
    found = {(m.kind, m.name): m for m in measures(tiny_digits)}
    names = {"step": [*WAYS, "our loop, evaluated at the end", *ladder()],
             "peer": ["keras", "pytorch"],
             "matmul": ["1 threads"], "run": ["fast", "sprint", "conventional"]}  # fmt: skip
    for kind, wanted in names.items():
        assert [n for k, n in found if k == kind] == wanted
    assert found["step", "focus on hard images"].whole_images == 240_000
    assert found["step", "conventional loop"].evaluations == 19
    assert found["run", "conventional"].once


def test_short_runs_are_timed_by_either_loop(tiny_digits, monkeypatch):
    monkeypatch.setattr(bench_module, "UNIT", 300)
    for take in (
        lambda: bench_module._ours(SMALL, tiny_digits),
        lambda: bench_module._conventional(course_of(replace(SMALL, epochs=9)), Way(), tiny_digits),
    ):
        seconds, evaluation = take()
        assert 0 < seconds < 10
        assert 0 < evaluation < 10


@pytest.mark.parametrize(("job", "processes"), [(side_by_side, 1), (side_by_side, 2), (shared, 2)])
def test_two_processes_train_side_by_side(job, processes):
    assert 0 < pair_seconds(job, processes, replace(SMALL, batch_size=25), 50, "sample") < 60


def test_products_take_time():
    assert 0 < matmul(1) < 60


def test_the_time_of_the_operators_adds_up_to_no_more_than_the_run(tiny_digits):
    names = (*OPERATORS, "the rest")
    seconds = {name: operators(SMALL, 200, tiny_digits, name) for name in names}
    assert all(value >= 0 for value in seconds.values())
    assert seconds["convolution"] > seconds["distortion"] == 0  # the config has none
    assert max(seconds.values()) == max(seconds["convolution"], seconds["the rest"])


def test_rows_go_round_the_measures_and_say_what_was_timed(tmp_path, monkeypatch, tiny_digits):
    model = COURSES["keras"].build()
    two = [
        Measure("step", "a", lambda: (1.5, 0.5), 100, model, SMALL, 5000, 3),
        Measure("run", "b", lambda: (9.0, 0.0), 200, threads=1, processes=2, once=True),
    ]
    monkeypatch.setattr(bench_module, "measures", lambda digits: iter(two))
    monkeypatch.setattr(bench_module, "load_mnist", lambda source: tiny_digits)
    bench(tmp_path, repetitions=2)
    path = bench(tmp_path, repetitions=1, only="run: b")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames) == COLUMNS
    assert [(r["name"], r["repetition"]) for r in rows] == [
        ("a", "1"), ("b", "1"), ("a", "2"), ("b", "1"),
    ]  # fmt: skip
    assert rows[0]["seconds"] == "1.5"
    assert rows[0]["parameters"] == "34826"
    assert rows[0]["config_hash"] == SMALL.hash("mnist")
    assert (rows[1]["processes"], rows[1]["evaluation_seconds"]) == ("2", "")


@pytest.fixture
def here(monkeypatch, tiny_digits):
    """Have the workers be this process, on the tiny digits and a short course."""
    started = []

    class Here:
        def submit(self, job, *args):
            started.append(args)
            future = Future()
            future.set_result(job(*args))
            return future

    @contextmanager
    def workers(n):
        yield Here()

    monkeypatch.setattr(peers_module, "workers", workers)
    monkeypatch.setattr(peers_module, "load_mnist", lambda source: tiny_digits)
    monkeypatch.setitem(COURSES, "reference", course_of(SMALL))
    return started


def test_curves_have_a_row_per_epoch_and_no_seed_twice(here, tmp_path, capsys):
    assert (
        main(["bench", "--curves", "reference", "--seeds", "0:2", "--ledger", str(tmp_path)]) == 0
    )
    path = curves("reference", [1, 2], tmp_path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == CURVE_COLUMNS
    shown = [(int(r["seed"]), int(r["epoch"])) for r in rows]
    assert sorted(shown) == [(s, e) for s in (0, 1, 2) for e in (1, 2)]
    assert all(e == 1 or shown[i - 1] == (s, 1) for i, (s, e) in enumerate(shown))
    assert [seed for _, seed in here] == [0, 1, 2]
    assert "reference seed 2:" in capsys.readouterr().out


def test_an_unknown_course_is_refused(capsys):
    assert main(["bench", "--curves", "alexnet"]) == 1
    assert "no course 'alexnet'; there are reference, " in capsys.readouterr().err


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
        ("2", "quick", "slow", 1), ("2", "slow", "", 4), ("2", "slow", "", 3),
    ]:  # fmt: skip
        digest = config.hash("mnist") if name == "quick" else "00000000"
        lines.append(f"{go},step,{name},{base},1,100,{seconds},0.5,1000,2,{digest}")
    (tmp_path / "speed.csv").write_text("\n".join(lines) + "\n")
    rows = ["seed,val_accuracy,config"]
    for seed, accuracy in [(0, 99.1), (1, 99.2), (2, 99.3), (100, 90.0)]:
        text = json.dumps(asdict(replace(config, seed=seed))).replace('"', '""')
        rows.append(f'{seed},{accuracy},"{text}"')
    (tmp_path / "runs.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_the_staircase_is_what_the_last_session_measured(timed):
    table = staircase(timed)
    assert table.index.tolist() == ["slow", "tried", "quick"]
    assert table.loc["slow", "seconds"] == pytest.approx(3 / 100 * 1000 + 2 * 0.5)
    assert table.loc["slow", ["fastest", "slowest"]].tolist() == pytest.approx([21, 41])
    assert table.loc["quick", "us"] == pytest.approx(1e4)
    assert table["kept"].tolist() == [True, False, True]
    assert table.loc["quick", "accuracy"] == [99.1, 99.2, 99.3]
    assert table.loc["slow", "accuracy"] == []


def test_the_staircase_can_be_drawn(timed):
    drawings.staircase(staircase(timed), "A title")
    (ax,) = plt.gcf().axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["slow", "tried (not kept)", "quick"]
    texts = [t.get_text() for t in ax.texts]
    assert "  31 s" in texts
    assert "99.20 %, n = 3" in texts
    plt.close("all")


def test_a_race_has_lines_for_trainings_and_points_for_whole_runs():
    drawings.race({"theirs": ([10, 20], [2.0, 1.0]), "ours": ([5], [0.6])}, "A title")
    (ax,) = plt.gcf().axes
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 1]
    assert [t.get_text().strip() for t in ax.texts] == ["theirs", "ours"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    plt.close("all")


@pytest.mark.parametrize(
    "command", [["bench", "--only", "no such step"], ["sweep", "--workers", "-1"]]
)
def test_what_cannot_be_is_refused_in_a_sentence(command, capsys, monkeypatch, tiny_digits):
    monkeypatch.setattr(bench_module, "load_mnist", lambda source: tiny_digits)
    assert main(command) == 1
    assert capsys.readouterr().err.startswith("error: ")
