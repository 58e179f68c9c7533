"""Checkpoints: nothing damaged is loaded, the latest whole one is found, the older ones go."""

import io
import math
import os
import re
import zipfile
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
from core_helpers import packed, same, seal, stop_after, weights

import mnistlib.checkpoint
from mnistlib import (
    RECIPES,
    CheckpointError,
    Config,
    build,
    load_checkpoint,
    load_model,
    predict,
    released_checkpoint,
    train,
)
from mnistlib.checkpoint import (
    LARGEST,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)

NAME = re.compile(r"mnist_model_(\d{8}_\d{6})_(acc\d+\.\d\d|test\d+\.\d\d|accNA)\.pth")
KEYS = {
    "format", "config", "config_hash", "source", "history", "val_accuracy", "test_accuracy",
    "model_state_dict", "optimizer_state_dict", "training", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return a run of one short epoch, with everything in its checkpoint that one can hold."""
    config = Config(
        epochs=1, epoch_images=100, batch_size=25, degrees=5, ema_decay=0.5, device="cpu", threads=1
    )  # fmt: skip
    return train(config, tiny_digits, folder=tmp_path_factory.mktemp("trained"), verbose=False)


@pytest.fixture
def content(trained):
    return load_checkpoint(trained.checkpoint)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def forge(content, path: Path) -> Path:
    path.write_bytes(packed(content))
    return path


# Names


def test_the_name_says_when_and_which_accuracy_and_is_never_taken_twice(content, folder):
    nan, seen = math.nan, set()
    for validated, tested, ending in (
        (99.376, nan, "acc99.38"), (100.0, nan, "acc100.00"), (nan, 9.8, "test9.80"),
        (nan, nan, "accNA"), (nan, nan, "accNA"), (nan, nan, "accNA"),
    ):  # fmt: skip
        before = datetime.now().replace(microsecond=0)
        accuracies = {"val_accuracy": validated, "test_accuracy": tested}
        path = save_checkpoint(content | accuracies, folder)
        found = NAME.fullmatch(path.name)
        assert found[2] == ending
        assert before <= datetime.strptime(found[1], "%Y%m%d_%H%M%S") <= before + timedelta(0, 4)
        seen.add(path)
    assert len(seen) == 6
    assert set(folder.iterdir()) == seen


# What a checkpoint holds


def test_a_checkpoint_holds_what_the_reference_promises_and_what_resuming_needs(trained, content):
    assert set(content) == KEYS
    assert (content["format"], content["config"]) == (2, asdict(trained.config))
    assert (content["source"], content["config_hash"]) == ("mnist", trained.config.hash("mnist"))
    assert content["val_accuracy"] == trained.history[-1]["val_acc"]
    assert math.isnan(content["test_accuracy"])
    assert content["history"] == trained.history
    assert list(content["training"]) == [
        "model", "average", "optimizer", "scheduler", "sampler", "random", "progress",
    ]  # fmt: skip
    assert {"torch", "numpy", "python", "platform", "device", "threads"} == set(content["versions"])
    plain = torch.load(trained.checkpoint, weights_only=True)  # without mnistlib
    model = build("reference")
    model.load_state_dict(plain["model_state_dict"])
    torch.optim.AdamW(model.parameters()).load_state_dict(plain["optimizer_state_dict"])


def test_what_is_saved_comes_back_without_moving_the_random_state(
    trained, content, folder, tiny_digits
):
    before, images = torch.get_rng_state(), tiny_digits.test_images
    content["config"]["dropout"] = 0.4
    path = save_checkpoint(content, folder)
    assert same(load_checkpoint(str(path)), content)
    model = load_model(path)
    assert (model.training, model.drop1.p) == (False, 0.4)
    assert same(model.state_dict(), trained.model.state_dict())
    # not to the last bit: its layout in memory is another
    torch.testing.assert_close(predict(model, images), predict(trained.model, images))
    assert torch.equal(torch.get_rng_state(), before)


# What is refused; flipped bits, named corruptions and forgeries are in test_faults.py


def test_what_is_no_checkpoint_or_has_no_end_is_refused_at_once(trained, content, tmp_path):
    text, foreign, huge = tmp_path / "notes.txt", tmp_path / "foreign.pth", tmp_path / "huge.pth"
    text.write_text("not a checkpoint\n" * 100)
    torch.save(trained.model.state_dict(), foreign)
    huge.touch()
    os.truncate(huge, LARGEST + 1)
    os.mkfifo(tmp_path / "pipe.pth")
    unfit = "is not a whole mnistlib checkpoint"
    of_old = "has checkpoint format 1, this release reads format 2; use the mnistlib that wrote it"
    for path, said in {
        text: unfit, foreign: unfit, huge: unfit, tmp_path: unfit, tmp_path / "pipe.pth": unfit,
        Path("/dev/zero"): unfit, tmp_path / "missing.pth": "cannot be read .No such file",
        forge(content | {"format": 1}, tmp_path / "old.pth"): of_old,
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=f"^{path} {said}"):
            load_checkpoint(path)


def test_a_checkpoint_of_another_release_or_network_is_refused_in_a_sentence(content, tmp_path):
    less = {key: value for key, value in content.items() if key != "config"}
    progress = {"progress": {"step": "8", "seconds": 1.0}}
    for changed, said in (
        (content | {"config": content["config"] | {"colour": 1}}, "another release .*'colour'"),
        (content | {"config": content["config"] | {"epochs": 0}}, "another release .*epochs is 0"),
        (less, "another release .*config is None"),
        (content | {"history": [1.5]}, "another release .*a part of history is 1.5"),
        (content | {"training": progress}, "another release .*step is '8'"),
        (content | {"config": content["config"] | {"model": "early"}}, "do not fit .*'early'"),
        (content | {"model_state_dict": {"conv1.weight": "text"}}, "do not fit .*'reference'"),
    ):
        path = forge(changed, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=rf"^{path} [^\n]*{said}[^\n]*; use .*$"):
            load_model(path)


def test_a_small_file_that_would_take_much_memory_is_refused(content, tmp_path, monkeypatch):
    forged = io.BytesIO(packed(content | {"more": torch.zeros(500_000)}))
    with zipfile.ZipFile(forged) as old, zipfile.ZipFile(small := io.BytesIO(), "w", 8) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    path = tmp_path / "small.pth"
    path.write_bytes(seal(small.getvalue()))
    assert path.stat().st_size < 1_000_000
    load_checkpoint(path)
    monkeypatch.setattr(mnistlib.checkpoint, "LARGEST", 1_000_000)
    with pytest.raises(CheckpointError, match="contains more than 1,000,000 bytes, or"):
        load_checkpoint(path)


def test_a_training_state_that_does_not_fit_is_refused_in_a_sentence(trained, tiny_digits, content):
    path = trained.checkpoint.with_name("changed.pth")
    for part, key, value in (
        ("progress", "step", 3), ("progress", "step", 300), ("progress", "evals", [1]),
        ("scheduler", "last_epoch", "4"),
        ("random", "device", None), ("average", "weights", {}), ("optimizer", "param_groups", []),
    ):  # fmt: skip
        changed = {part: content["training"][part] | {key: value}}
        forge(content | {"training": content["training"] | changed}, path)
        with pytest.raises(CheckpointError, match=r"state that cannot be restored .*; start the"):
            train(trained.config, tiny_digits, path, save=False, verbose=False)


def test_a_folder_that_cannot_be_written_to_is_said(content, tmp_path):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for place in (taken, taken / "run", tmp_path / ("x" * 300), Path("/proc/mnistlib")):
        said = f"nothing could be saved in {place} .*; free space there or name another folder"
        with pytest.raises(CheckpointError, match=said):
            save_checkpoint(content, place)
    assert taken.read_text() == "mine"


# Released checkpoints


def test_the_released_checkpoint_is_that_of_a_clone_or_installed_or_its_absence_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(mnistlib.checkpoint, "outputs_folder", lambda: tmp_path)
    monkeypatch.setattr(mnistlib.checkpoint, "__file__", str(tmp_path / "x.py"))
    for recipe, folder in (
        ("best", "released/best"), ("best", "checkpoints/best"),
        ("reference", "checkpoints/reference"),
    ):  # fmt: skip
        path = tmp_path / folder / f"mnist_model_{recipe}.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        assert released_checkpoint(recipe) == path
    for call in (released_checkpoint, load_model, load_checkpoint):
        with pytest.raises(CheckpointError, match="no released checkpoint of 'sprint'; name a"):
            call("sprint")


def test_a_released_network_is_loaded_by_the_name_of_its_recipe():
    assert load_checkpoint("best-682")["config_hash"] == RECIPES["best-682"].hash("mnist")
    assert sum(p.numel() for p in load_model("best-682").parameters()) == 682


# The latest of a folder, and what older ones are for


@pytest.fixture(scope="module")
def config():
    """Return twelve steps in three epochs on few images."""
    return Config(
        model="c4k5s2p pooled", epochs=3, epoch_images=100, batch_size=25, max_lr=0.02, degrees=5,
        ema_decay=0.9, seed=3, device="cpu", threads=1,
    )  # fmt: skip


def steps(folder) -> list[int]:
    return [step for step, _, _ in checkpoints(folder)]


@pytest.fixture
def died(config, tiny_digits, tmp_path):
    """Return the folder of a run that died in its third epoch."""
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 10, lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config, tiny_digits, folder=tmp_path / "run", verbose=False)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(config, tiny_digits):
    """Return the weights at the end of a run that nothing interrupts."""
    return weights(train(config, tiny_digits, save=False, verbose=False))


def test_an_unfinished_run_has_two_checkpoints_and_a_finished_one_its_last(
    died, config, tiny_digits, whole
):
    assert steps(died) == [4, 8]
    run = train(config, tiny_digits, died, folder=died, verbose=False)
    assert steps(died) == [12]
    assert list(died.glob("[!.]*")) == [run.checkpoint]
    assert same(weights(run), whole)


def test_of_a_damaged_latest_checkpoint_the_one_before_is_taken_loudly(
    died, config, tiny_digits, capsys, whole
):
    latest = latest_checkpoint(died)
    latest.write_bytes(latest.read_bytes()[:-1])
    assert steps(died) == [4]
    assert capsys.readouterr().err.count(f"WARNING: not used: {latest} ") == 1
    run = train(config, tiny_digits, died, folder=died, verbose=False)
    assert f"WARNING: not used: {latest}" in capsys.readouterr().err
    assert same(weights(run), whole)


def test_a_file_is_the_latest_itself_and_a_folder_without_a_whole_one_is_an_error(tmp_path, capsys):
    assert latest_checkpoint(str(tmp_path / "any.pth")) == tmp_path / "any.pth"
    (tmp_path / "mnist_model_20260101_000000_accNA.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; start the run again"):
        latest_checkpoint(tmp_path)
    assert "WARNING" in capsys.readouterr().err


def test_of_a_run_the_checkpoints_with_the_most_steps_are_kept_whatever_their_names_and_times_say(
    content, folder
):
    paths = {}
    for step in (30, 1, 100, 2):  # not in the order of the names; as text, 100 comes before 2
        content["training"]["progress"]["step"] = step
        paths[step] = save_checkpoint(content, folder)
    os.utime(paths[100], (0, 0))
    assert latest_checkpoint(folder) == paths[100]
    stranger = save_checkpoint(content | {"config_hash": "00000000"}, folder)
    note = folder / "notes.pth"
    note.write_text("not a checkpoint")
    for _ in range(2):
        prune_checkpoints(paths[100], finished=False)
        assert set(folder.iterdir()) == {paths[30], paths[100], stranger, note}
    prune_checkpoints(paths[30], finished=False)  # a run that was started again
    assert set(folder.iterdir()) == {paths[30], paths[100], stranger, note}
    prune_checkpoints(paths[30], finished=True)
    assert set(folder.iterdir()) == {paths[30], stranger, note}


def test_of_a_folder_with_several_runs_the_one_meant_is_taken_or_it_is_asked_for(content, folder):
    finished = save_checkpoint(content | {"config_hash": "11111111"}, folder)
    content["training"]["progress"]["step"] = 2
    cut = save_checkpoint(content | {"config_hash": "22222222", "history": []}, folder)
    assert latest_checkpoint(folder) == cut  # which has fewer steps
    assert latest_checkpoint(folder, "11111111") == finished
    other = save_checkpoint(content | {"config_hash": "33333333", "history": []}, folder)
    with pytest.raises(CheckpointError, match=rf"several runs.*: {cut.name}, {other.name}$"):
        latest_checkpoint(folder)


# Only a run's own checkpoint is resumed


def test_a_run_of_other_settings_or_digits_is_not_resumed(config, tiny_digits, died):
    sample, path = replace(tiny_digits, source="sample"), latest_checkpoint(died)
    content = load_checkpoint(path)
    del content["config"]["elastic"]  # from before this setting was added
    older = forge(content, died.parent / "older.pth")
    for place, other, digits, text in (
        (path, replace(config, max_lr=0.03), tiny_digits, "max_lr 0.02 there, 0.03 here"),
        (path, replace(config, split="last"), tiny_digits, "split 'random' there, 'last' here"),
        (path, config, sample, "data source 'mnist' there, 'sample' here"),
        (older, replace(config, seed=5), tiny_digits, "seed 3 there, 5 here"),
    ):
        said = rf"{place} belongs to another run \({text}\); resume with the same settings"
        with pytest.raises(CheckpointError, match=said):
            train(other, digits, place)


def test_threads_device_and_settings_that_were_added_since_may_differ(
    config, tiny_digits, monkeypatch, died, whole
):
    """Settings that are added later have the old behaviour as their default."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    content = load_checkpoint(latest_checkpoint(died))
    del content["config"]["elastic"]
    path = forge(content, died.parent / "older.pth")
    run = train(replace(config, threads=2, device="auto"), tiny_digits, path, verbose=False)
    assert same(weights(run), whole)
