"""Checkpoints: nothing damaged is loaded, the latest whole one is found, the older ones go."""

import math
import os
import re
import shutil
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from core_helpers import packed, same, stop_after, weights

import mnistlib.checkpoint
from mnistlib import (
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


def refusal(path) -> str:
    """Check that a file is refused with a sentence of its name; return it."""
    with pytest.raises(CheckpointError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    return str(error.value)


# Names


def test_the_name_says_when_and_which_accuracy(content, tmp_path):
    nan = math.nan
    for validated, tested, ending in (
        (99.376, nan, "acc99.38"), (100.0, nan, "acc100.00"), (nan, 9.8, "test9.80"),
        (nan, nan, "accNA"),
    ):  # fmt: skip
        before = datetime.now().replace(microsecond=0)
        accuracies = {"val_accuracy": validated, "test_accuracy": tested}
        found = NAME.fullmatch(save_checkpoint(content | accuracies, tmp_path / ending).name)
        assert found[2] == ending
        assert before <= datetime.strptime(found[1], "%Y%m%d_%H%M%S") <= datetime.now()


def test_a_name_that_is_taken_is_left_alone(content, folder):
    paths = [save_checkpoint(content, folder) for _ in range(4)]
    assert len(set(paths)) == 4
    assert all(NAME.fullmatch(path.name) for path in paths)
    assert set(folder.iterdir()) == set(paths)


# What a checkpoint holds


def test_a_checkpoint_holds_what_the_reference_promises_and_what_resuming_needs(trained, content):
    assert set(content) == KEYS
    assert content["format"] == 2
    assert content["config"] == asdict(trained.config)
    assert (content["source"], content["config_hash"]) == ("mnist", trained.config.hash("mnist"))
    assert content["val_accuracy"] == trained.history[-1]["val_acc"]
    assert math.isnan(content["test_accuracy"])
    assert content["history"] == trained.history
    assert list(content["training"]) == [
        "model", "average", "optimizer", "scheduler", "sampler", "random", "progress",
    ]  # fmt: skip
    assert content["versions"] == trained.versions
    assert {"torch", "numpy", "python", "platform", "device", "threads"} == set(content["versions"])
    plain = torch.load(trained.checkpoint, weights_only=True)  # without mnistlib
    model = build("reference")
    model.load_state_dict(plain["model_state_dict"])
    torch.optim.AdamW(model.parameters()).load_state_dict(plain["optimizer_state_dict"])


def test_what_is_saved_comes_back_without_moving_the_random_state(
    trained, content, folder, tiny_digits
):
    before = torch.get_rng_state()
    path = save_checkpoint(content, folder)
    assert same(load_checkpoint(str(path)), content)
    assert same(content["model_state_dict"], weights(trained))
    model = load_model(path)
    assert not model.training
    images = tiny_digits.test_images
    assert torch.equal(predict(model, images), predict(trained.model, images))
    assert torch.equal(torch.get_rng_state(), before)
    config = content["config"] | {"dropout": 0.4}
    model = load_model(forge(content | {"config": config}, folder / "dropout.pth"))
    assert model.drop1.p == 0.4


# What is refused; flipped bits, named corruptions and forgeries are in test_faults.py


def test_what_is_no_checkpoint_or_has_no_end_is_refused_at_once(trained, tmp_path):
    text, foreign, huge = tmp_path / "notes.txt", tmp_path / "foreign.pth", tmp_path / "huge.pth"
    text.write_text("not a checkpoint\n" * 100)
    torch.save(trained.model.state_dict(), foreign)
    huge.touch()
    os.truncate(huge, LARGEST + 1)
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (text, foreign, huge, tmp_path, tmp_path / "pipe.pth", Path("/dev/zero")):
        assert "is not a whole mnistlib checkpoint" in refusal(path)
    assert "No such file" in refusal(tmp_path / "missing.pth")


def test_a_checkpoint_of_another_format_is_refused_with_what_to_do(content, tmp_path):
    for number in (1, 3, None, "2"):
        said = refusal(forge(content | {"format": number}, tmp_path / "other.pth"))
        assert f"has checkpoint format {number!r}, this release reads format 2; use the" in said


def test_a_folder_that_cannot_be_written_to_is_said(content, tmp_path, trained, tiny_digits):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for place in (taken, taken / "run", tmp_path / ("x" * 300), Path("/proc/mnistlib")):
        said = f"nothing could be saved in {re.escape(str(place))} .*; free space there or name"
        with pytest.raises(CheckpointError, match=said):
            save_checkpoint(content, place)
    with pytest.raises(CheckpointError, match="name another folder"):
        train(trained.config, tiny_digits, folder=taken / "run", verbose=False)
    assert taken.read_text() == "mine"


# Released checkpoints


def test_the_released_checkpoint_is_that_of_a_clone_or_installed_or_its_absence_is_said(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(mnistlib.checkpoint, "outputs_folder", lambda: tmp_path / "outputs")
    monkeypatch.setattr(mnistlib.checkpoint, "__file__", str(tmp_path / "mnistlib" / "x.py"))
    with pytest.raises(CheckpointError, match="no released checkpoint of 'best'; name a file"):
        released_checkpoint()
    places = {
        "installed": tmp_path / "mnistlib" / "released" / "mnist_model_1.pth",
        "best": tmp_path / "outputs" / "checkpoints" / "best" / "mnist_model_2.pth",
        "reference": tmp_path / "outputs" / "checkpoints" / "reference" / "mnist_model_3.pth",
    }
    for name, path in places.items():
        path.parent.mkdir(parents=True)
        path.touch()
        assert released_checkpoint(name.replace("installed", "best")) == path
    with pytest.raises(CheckpointError, match="no released checkpoint of 'sprint'; name a file"):
        released_checkpoint("sprint")


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


def die():
    raise MemoryError


@pytest.fixture(scope="module")
def once(config, tiny_digits, tmp_path_factory):
    """Return the folder of a run that died in its third epoch."""
    folder = tmp_path_factory.mktemp("died") / "run"
    with pytest.MonkeyPatch.context() as m:
        stop_after(m, 10, die)
        with pytest.raises(MemoryError):
            train(config, tiny_digits, folder=folder, verbose=False)
    return folder


@pytest.fixture
def died(once, tmp_path):
    """Return a copy of it."""
    return Path(shutil.copytree(once, tmp_path / "run"))


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
    assert list(died.iterdir()) == [run.checkpoint]
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


def test_a_file_is_the_latest_itself_and_a_folder_without_a_whole_one_is_an_error(
    tmp_path, config, tiny_digits, capsys
):
    assert latest_checkpoint(str(tmp_path / "any.pth")) == tmp_path / "any.pth"
    (tmp_path / "mnist_model_20260101_000000_accNA.pth").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; start the run again"):
        train(config, tiny_digits, tmp_path)
    assert "WARNING" in capsys.readouterr().err


def test_the_latest_is_the_one_with_most_steps_whatever_its_name_and_time_say(died):
    second, first = (path for _, path, _ in reversed(checkpoints(died)))
    kept, first_name = load_checkpoint(second), first.name
    kept["training"]["progress"]["step"] = 100  # as text, 100 comes before 4 and 8
    forged = save_checkpoint(kept, died)
    first.rename(died / "mnist_model_20990101_000000_acc99.99.pth")
    forged.rename(died / first_name)
    os.utime(died / first_name, (0, 0))
    assert steps(died) == [4, 8, 100]
    assert latest_checkpoint(died) == died / first_name


def test_pruning_keeps_the_latest_and_of_an_unfinished_run_the_one_before(content, folder):
    paths = {}
    for step in (3, 1, 4, 2):  # not in the order of the names
        content["training"]["progress"]["step"] = step
        paths[step] = save_checkpoint(content, folder)
    stranger = save_checkpoint(content | {"config_hash": "00000000"}, folder)
    note = folder / "notes.pth"
    note.write_text("not a checkpoint")
    prune_checkpoints(paths[4], finished=False)
    assert set(folder.iterdir()) == {paths[3], paths[4], stranger, note}
    prune_checkpoints(paths[4], finished=False)
    assert set(folder.iterdir()) == {paths[3], paths[4], stranger, note}
    prune_checkpoints(paths[4], finished=True)
    assert set(folder.iterdir()) == {paths[4], stranger, note}


# Only a run's own checkpoint is resumed


def test_a_run_of_other_settings_or_digits_is_not_resumed(config, tiny_digits, died):
    sample, path = replace(tiny_digits, source="sample"), latest_checkpoint(died)
    for other, digits, text in (
        (replace(config, max_lr=0.03), tiny_digits, "max_lr 0.02 there, 0.03 here"),
        (replace(config, seed=4), tiny_digits, "seed 3 there, 4 here"),
        (replace(config, split="last"), tiny_digits, "split 'random' there, 'last' here"),
        (config, sample, "data source 'mnist' there, 'sample' here"),
    ):
        said = rf"{path} belongs to another run \({text}\); resume with the same settings"
        with pytest.raises(CheckpointError, match=said):
            train(other, digits, path)


def test_a_checkpoint_from_before_a_setting_was_added_is_resumed_and_compared(
    config, tiny_digits, died, whole
):
    """Settings that are added later have the old behaviour as their default."""
    content = load_checkpoint(latest_checkpoint(died))
    del content["config"]["elastic"]
    path = forge(content, died.parent / "older.pth")
    assert same(weights(train(config, tiny_digits, path, verbose=False)), whole)
    with pytest.raises(CheckpointError, match="seed 3 there, 5 here"):
        train(replace(config, seed=5), tiny_digits, path)


def test_threads_and_device_may_differ_when_a_run_is_resumed(
    config, tiny_digits, monkeypatch, died
):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    run = train(replace(config, threads=0, device="auto"), tiny_digits, died, verbose=False)
    assert (run.interrupted, len(run.history)) == (False, 3)
