"""Distillation: what a pool holds, and that a run on it is one like any other."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from core_helpers import stop_after

from mnistlib import Config, ConfigError, augment, configure, load_model, train
from mnistlib.distill import TEMPERATURE, build_pool, distillation_loss, load_pool, pool_folder
from mniststudy.cli import main
from mniststudy.runs.ledger import read_results
from mniststudy.runs.stacked import train_stacked

CPU = torch.device("cpu")
AUGMENTED = Config(degrees=10, pixels=1, elastic=0.5)
TEACHER = configure(
    "reference-fast", model="c4k5s2p d pooled", epochs=1, epoch_images=100, slices=1, device="cpu"
)
STUDENT = replace(
    TEACHER, degrees=0, pixels=0, scale=0, shear=0, epochs=3, epoch_images=200, max_lr=0.02, seed=4
)


@pytest.fixture(scope="module")
def pool(tiny_digits, tmp_path_factory):
    """A pool of three views by two teachers: its name, the folder of runs, the teachers."""
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNISTLIB_RUNS", str(runs))
        teachers = [
            train(replace(TEACHER, seed=s), tiny_digits, verbose=False).checkpoint for s in (1, 2)
        ]
        name = build_pool(teachers, tiny_digits, AUGMENTED, 3, CPU)
    return name, runs, teachers


@pytest.fixture(autouse=True)
def in_its_folder(pool, monkeypatch):
    monkeypatch.setenv("MNISTLIB_RUNS", str(pool[1]))


def test_each_view_is_an_augmentation_and_has_the_mean_answer_of_the_teachers(pool, tiny_digits):
    found = load_pool(Config(pool=pool[0], split="none"), tiny_digits, CPU)
    n = len(tiny_digits.train_labels)
    assert found.images.shape == (3, n, 28, 28)
    assert found.images.dtype == torch.uint8
    assert found.targets.shape == (3, n, 10)
    draw = torch.Generator().manual_seed(2)
    some = tiny_digits.train_images[:1000].float() / 255
    made = augment(some, **AUGMENTED.augmentation, generator=draw)
    assert torch.equal(found.images[2, : len(some)], (made * 255).round().byte()[:, 0])
    models = [load_model(path) for path in pool[2]]
    seen = found.images[1].unsqueeze(1)
    with torch.no_grad():
        answers = torch.stack([(m(seen) / TEMPERATURE).softmax(1) for m in models]).mean(0)
    torch.testing.assert_close(found.targets[1].float(), answers, rtol=0, atol=1e-3)


def test_a_drawn_image_comes_with_its_own_target(pool, tiny_digits):
    found = load_pool(Config(pool=pool[0], split="none"), tiny_digits, CPU)
    ids = torch.tensor([5, 3, 5, 5, 5, 5])
    images, targets = found.draw(ids, torch.Generator().manual_seed(0))
    places = []
    for image, target, k in zip(images, targets, ids, strict=True):
        (view,) = (v for v in range(3) if torch.equal(found.images[v, k], image[0]))
        assert torch.equal(found.targets[view, k].float(), target)
        places.append(view)
    assert len(set(places)) > 1


def test_the_loss_is_lowest_where_the_student_answers_like_the_teachers():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 10, requires_grad=True), torch.arange(8)
    targets = (logits.detach() / TEMPERATURE).softmax(1)
    truth = torch.cat((targets, labels[:, None]), 1)
    (gradient,) = torch.autograd.grad(distillation_loss(logits, truth).sum(), logits)
    (hard,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), logits)
    torch.testing.assert_close(gradient, 0.1 * hard, rtol=1e-4, atol=1e-6)
    moved = distillation_loss(logits.detach() + torch.randn(8, 10), truth)
    assert moved.mean() > distillation_loss(logits.detach(), truth).mean()


def test_building_again_changes_nothing_and_a_missing_view_is_made_again(pool, tiny_digits):
    name, _, teachers = pool
    views = sorted(pool_folder(name).glob("*.f16"))
    before = [path.read_bytes() for path in views]
    stamp = views[0].stat().st_mtime_ns
    views[1].unlink()
    with pytest.raises(ConfigError, match="not wholly"):
        load_pool(Config(pool=name), tiny_digits, CPU)
    assert build_pool(teachers, tiny_digits, AUGMENTED, 3, CPU) == name
    assert [path.read_bytes() for path in views] == before
    assert views[0].stat().st_mtime_ns == stamp


def test_the_name_follows_from_teachers_views_and_augmentation(pool, tiny_digits):
    name, _, teachers = pool
    others = [
        build_pool(teachers[:1], tiny_digits, AUGMENTED, 3, CPU),
        build_pool(teachers, tiny_digits, AUGMENTED, 2, CPU),
        build_pool(teachers, tiny_digits, Config(degrees=5), 3, CPU),
    ]
    assert len({name, *others}) == 4


def test_a_student_trains_on_the_pool_alone_and_stacked(pool, tiny_digits):
    student = replace(STUDENT, pool=pool[0], split="random")
    alone = train(student, tiny_digits, save=False, verbose=False)
    plain = train(replace(student, pool=""), tiny_digits, save=False, verbose=False)
    assert alone.curve["loss"] != plain.curve["loss"]
    (stacked,) = train_stacked([student], tiny_digits)
    assert stacked.curve["loss"] == pytest.approx(alone.curve["loss"], rel=5e-3)
    slow = train(replace(student, slices=2), tiny_digits, save=False, verbose=False)
    assert slow.curve["loss"][0] == pytest.approx(alone.curve["loss"][0], rel=0.2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"pool": "12345678"}, "pool 12345678 is not, or not wholly,.*mnist teach"),
        ({"split": "last"}, "were trained with split random, on images that split last"),
    ],
)
def test_a_pool_that_does_not_fit_is_refused_before_training(settings, said, pool, tiny_digits):
    with pytest.raises(ConfigError, match=said):
        train(replace(STUDENT, **({"pool": pool[0]} | settings)), tiny_digits, save=False)


def test_a_pool_of_other_digits_is_refused(pool, tiny_digits):
    with pytest.raises(ConfigError, match="was built on"):
        load_pool(Config(pool=pool[0]), replace(tiny_digits, source="other"), CPU)


def test_teachers_of_different_splits_are_refused(pool, tiny_digits):
    other = train(replace(TEACHER, split="last"), tiny_digits, verbose=False).checkpoint
    with pytest.raises(ConfigError, match=r"different splits \(last, random\)"):
        build_pool([*pool[2], other], tiny_digits, AUGMENTED, 3, CPU)


@pytest.mark.parametrize(
    "settings",
    [{"pool": "abc"}, {"pool": "0123456G"}, {"pool": "01234567", "degrees": 5},
     {"pool": "01234567", "label_smoothing": 0.1}],
)  # fmt: skip
def test_a_name_that_is_none_and_a_second_augmentation_are_refused(settings):
    with pytest.raises(ConfigError, match="pool"):
        Config(**settings)


def test_a_pool_says_what_it_was_made_of(pool):
    about = json.loads((pool_folder(pool[0]) / "pool.json").read_text())
    assert about["views"] == 3
    assert about["split"] == "random"
    assert len(about["teachers"]) == 2
    assert about["augmentation"] == AUGMENTED.augmentation


def test_the_command_builds_a_pool_and_adds_it_to_the_ledger_once(
    pool, tiny_digits, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("mnistlib.load_mnist", lambda source: tiny_digits)
    words = ["teach", *map(str, pool[2]), "--views", "2"]
    for _ in range(2):
        assert main([*words, "--ledger", str(tmp_path)]) == 0
    name = capsys.readouterr().out.split("train with --pool ")[-1].strip()
    row = read_results("pools", tmp_path).astype(str).squeeze()
    assert row["pool"] == name
    assert (row["split"], row["views"]) == ("random", "2")
    assert row["augmentation"] == "degrees 10, pixels 1.5, scale 0.1, shear 6, elastic 0.5"
    seeds = [teacher.rpartition("-")[2] for teacher in row["teachers"].split()]
    assert seeds == ["1", "2"]
    (tmp_path / "pools.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    assert main([*words, "--ledger", str(tmp_path)]) == 1
    assert "pools.csv has other columns" in capsys.readouterr().err


def test_a_truncated_view_is_refused_and_made_again(pool, tiny_digits):
    name, _, teachers = pool
    path = pool_folder(name) / "0.f16"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ConfigError, match="not wholly"):
        load_pool(Config(pool=name), tiny_digits, CPU)
    build_pool(teachers, tiny_digits, AUGMENTED, 3, CPU)
    assert path.read_bytes() == whole


def test_teachers_of_another_source_are_refused(pool, tiny_digits):
    with pytest.raises(ConfigError, match="not all teachers were trained on the source 'other'"):
        build_pool(pool[2], replace(tiny_digits, source="other"), AUGMENTED, 3, CPU)


def test_a_student_goes_on_in_the_middle_of_an_epoch_to_the_same_bits(
    pool, tiny_digits, monkeypatch, tmp_path
):
    student = replace(STUDENT, pool=pool[0], split="random", norm_images=50)
    whole = train(student, tiny_digits, save=False, verbose=False)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(student, tiny_digits, folder=tmp_path, verbose=False).interrupted
    resumed = train(student, tiny_digits, tmp_path, folder=tmp_path, verbose=False)
    assert resumed.curve["loss"] == whole.curve["loss"]
    for a, b in zip(
        resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
