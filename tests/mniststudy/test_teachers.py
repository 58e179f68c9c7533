"""Building a pool: each answer is the teachers' mean, the name says what it was made of."""

import json
from dataclasses import replace

import pytest
import torch

from mnistlib import (
    RECIPES,
    Config,
    ConfigError,
    Digits,
    load_mnist,
    load_model,
    predict,
    released_checkpoint,
    train,
)
from mnistlib.distill import TEMPERATURE, load_pool, pool_folder
from mniststudy.cli import main
from mniststudy.runs.ledger import read_results
from mniststudy.runs.stacked import train_stacked
from mniststudy.runs.teachers import build_pool
from mniststudy.use.others import draw_others

CPU = torch.device("cpu")
AUGMENTED = Config(degrees=10, pixels=1, elastic=0.5)
TEACHER = Config(model="c4k5s2p d pooled", epochs=1, epoch_images=100, device="cpu", threads=1)
STUDENT = replace(TEACHER, optimizer="sgd", max_lr=0.02, cycle_momentum=False, dropout=0, seed=4)


@pytest.fixture(scope="module")
def made(tiny_digits, tmp_path_factory):
    """A pool of two views by two teachers, the folder of runs, and a teacher of another split."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNISTLIB_RUNS", str(runs))
        configs = replace(TEACHER, seed=1), replace(TEACHER, seed=2), replace(TEACHER, split="last")
        *teachers, other = (train(c, tiny_digits, verbose=False).checkpoint for c in configs)
        name = build_pool(teachers, tiny_digits, AUGMENTED, 2, CPU)
    return name, teachers, runs, other


@pytest.fixture(autouse=True)
def in_its_folder(made, monkeypatch):
    monkeypatch.setenv("MNISTLIB_RUNS", str(made[2]))


def test_a_pool_holds_the_mean_answers_of_the_teachers_and_what_it_was_made_of(made, tiny_digits):
    name, teachers, _, _ = made
    found = load_pool(Config(pool=name, split="none"), tiny_digits, CPU)
    models = [load_model(path) for path in teachers]
    seen = found.images[1].unsqueeze(1)
    with torch.no_grad():
        answers = torch.stack([(m(seen) / TEMPERATURE).softmax(1) for m in models]).mean(0)
    torch.testing.assert_close(found.targets[1].float(), answers, rtol=0, atol=1e-4)
    about = json.loads((pool_folder(name) / "pool.json").read_text())
    assert (about["views"], about["split"], about["source"]) == (2, "random", "mnist")
    assert [teacher.rpartition("-")[2] for teacher in about["teachers"]] == ["1", "2"]
    assert about["augmentation"] == AUGMENTED.augmentation


@pytest.mark.parametrize("damage", [lambda raw: raw[:-20], lambda raw: bytes(len(raw))])
def test_building_again_makes_what_is_missing_or_damaged_and_nothing_else(
    made, tiny_digits, damage
):
    name, teachers, _, _ = made
    whole, cut = (pool_folder(name) / f"{view}.f16" for view in range(2))
    before, stamp = cut.read_bytes(), whole.stat().st_mtime_ns
    cut.write_bytes(damage(before))
    assert build_pool(teachers, tiny_digits, AUGMENTED, 2, CPU) == name
    assert cut.read_bytes() == before
    assert whole.stat().st_mtime_ns == stamp


def test_the_name_follows_from_teachers_views_augmentation_and_the_loss(
    made, tiny_digits, monkeypatch
):
    name, teachers, _, _ = made
    others = [
        build_pool(teachers, tiny_digits, AUGMENTED, 2, CPU, others=3),
        build_pool(teachers[:1], tiny_digits, AUGMENTED, 2, CPU),
        build_pool(teachers, tiny_digits, AUGMENTED, 1, CPU),
        build_pool(teachers, tiny_digits, Config(degrees=5), 2, CPU),
    ]
    monkeypatch.setattr("mniststudy.runs.teachers.SOFT", 0.5)
    others.append(build_pool(teachers, tiny_digits, AUGMENTED, 2, CPU))
    assert len({name, *others}) == 6


def test_teachers_of_other_digits_or_of_different_splits_are_refused(made, tiny_digits):
    _, teachers, _, other = made
    with pytest.raises(ConfigError, match="not all teachers were trained on the source 'other'"):
        build_pool(teachers, replace(tiny_digits, source="other"), AUGMENTED, 2, CPU)
    with pytest.raises(ConfigError, match=r"different splits \(last, random\)"):
        build_pool([*teachers, other], tiny_digits, AUGMENTED, 2, CPU)


def test_a_stacked_student_trains_on_the_pool_as_one_alone_does(made, tiny_digits):
    student = replace(STUDENT, pool=made[0])
    alone = train(student, tiny_digits, save=False, verbose=False)
    (stacked,) = train_stacked([student], tiny_digits)
    assert stacked.curve["loss"] == pytest.approx(alone.curve["loss"], rel=5e-3)


@pytest.fixture(scope="module")
def mixed(made, tiny_digits):
    """The name of the same pool with 60 images that show no digit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNISTLIB_RUNS", str(made[2]))
        return build_pool(made[1], tiny_digits, AUGMENTED, 2, CPU, others=60)


def test_a_fifth_of_what_a_mixed_pool_gives_shows_no_digit_and_is_answered_evenly(
    mixed, tiny_digits
):
    pool = load_pool(Config(pool=mixed, split="none"), tiny_digits, CPU)
    images, targets = pool.draw(torch.arange(40), torch.Generator().manual_seed(0))
    assert images.shape == (50, 1, 28, 28)
    assert (targets[40:] == 0.1).all()
    assert (targets[:40] != 0.1).any(1).all()
    known = {bytes(other.numpy().tobytes()) for other in pool.others}
    assert all(bytes(image.numpy().tobytes()) in known for image in images[40:, 0])
    assert not (pool.images.flatten(0, 1)[:, None] == pool.others[:5]).all((2, 3)).any()


def test_a_network_learns_from_a_mixed_pool_what_is_no_digit_and_still_reads_digits():
    sample = load_mnist("sample")
    few = sample.train_images[:600], sample.train_labels[:600]
    digits = Digits(*few, *few, "mnist")
    name = build_pool([released_checkpoint()], digits, Config(degrees=5), 1, CPU, others=300)
    config = replace(STUDENT, model="reference", start="best", pool=name, epochs=6, split="none")
    run = train(replace(config, epoch_images=300), digits, save=False, verbose=False)
    assert all(90 < row["train_acc"] <= 100 for row in run.history)  # of the digits alone
    unseen = draw_others(200, digits.train_images, digits.train_labels, seed=9)
    before, after = (
        float(predict(model, unseen).max(1).values.mean())
        for model in (load_model(released_checkpoint()), run.model)
    )
    assert after < before - 0.1


def test_a_mixed_pool_that_was_altered_or_is_stacked_is_refused(mixed, tiny_digits):
    config = replace(STUDENT, pool=mixed)
    with pytest.raises(ConfigError, match="images without a digit, which cannot be stacked"):
        train_stacked([config], tiny_digits)
    path = pool_folder(mixed) / "others.u8"
    before = path.read_bytes()
    path.write_bytes(bytes(len(before)))
    with pytest.raises(ConfigError, match="its answers were altered"):
        train(config, tiny_digits, save=False, verbose=False)
    path.write_bytes(before)


def test_images_without_a_digit_are_the_same_each_time_and_none_is_empty(tiny_digits):
    twice = [draw_others(40, tiny_digits.train_images, tiny_digits.train_labels) for _ in "ab"]
    assert torch.equal(*twice)
    assert twice[0].flatten(1).max(1).values.min() > 127
    assert len({image.numpy().tobytes() for image in twice[0]}) == 40


def test_the_command_builds_a_pool_and_adds_it_to_the_ledger_once(
    made, tiny_digits, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("mnistlib.load_mnist", lambda source: tiny_digits)
    words = ["teach", *map(str, made[1]), "--views", "1", "--ledger", str(tmp_path)]
    for _ in range(2):
        assert main(words) == 0
    name = capsys.readouterr().out.split("train with --pool ")[-1].strip()
    (row,) = read_results("pools", tmp_path).to_dict("records")
    assert (row["pool"], row["split"], row["views"]) == (name, "random", 1)
    amounts = (f"{k} {v:g}" for k, v in RECIPES["teacher"].augmentation.items())
    assert row["augmentation"] == ", ".join(amounts)
    assert [teacher.rpartition("-")[2] for teacher in row["teachers"].split()] == ["1", "2"]
    (tmp_path / "pools.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert main(words) == 1
    assert "pools.csv has other columns" in capsys.readouterr().err
