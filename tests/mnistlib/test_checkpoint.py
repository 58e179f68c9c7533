"""Checkpoints: nothing damaged is loaded, the latest whole one is found, the older ones go."""

import math
import os
import pickle
import random
import re
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from core_helpers import CPU, packed, same, seal, stop_after, weights

import mnistlib.checkpoint
from mnistlib import (
    RECIPES,
    CheckpointError,
    Config,
    MnistlibError,
    build,
    load_checkpoint,
    load_model,
    predict,
    released_checkpoint,
    train,
)
from mnistlib.checkpoint import (
    FORMAT,
    LARGEST,
    TRAILER,
    checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from mnistlib.state import TrainingState

NAME = re.compile(r"mnist_model_(\d{8}_\d{6})_(acc\d+\.\d\d|test\d+\.\d\d|accNA)\.pth")
REMEDY = re.compile(r"\b(use|do not use|train again|check the path|free space)\b")
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


def assert_refused(path) -> str:
    """Check that a file is refused with a sentence of its name and a remedy; return it."""
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert isinstance(error.value, MnistlibError)
    assert str(path) in message
    assert REMEDY.search(message.replace(str(path), "")), message
    return message


# Names


@pytest.mark.parametrize(
    ("validated", "tested", "ending"),
    [
        (99.376, math.nan, "acc99.38"),
        (100.0, math.nan, "acc100.00"),
        (math.nan, 99.53, "test99.53"),
        (math.nan, 9.8, "test9.80"),
        (math.nan, math.nan, "accNA"),
    ],
)
def test_the_name_says_when_and_which_accuracy(content, folder, validated, tested, ending):
    before = datetime.now().replace(microsecond=0)
    path = save_checkpoint(content | {"val_accuracy": validated, "test_accuracy": tested}, folder)
    found = NAME.fullmatch(path.name)
    assert found[2] == ending
    assert before <= datetime.strptime(found[1], "%Y%m%d_%H%M%S") <= datetime.now()
    assert same(load_checkpoint(path)["val_accuracy"], validated)


def test_a_name_that_is_taken_is_left_alone(content, folder):
    paths = [save_checkpoint(content, folder) for _ in range(4)]
    assert len(set(paths)) == 4
    assert all(NAME.fullmatch(path.name) for path in paths)
    assert set(folder.iterdir()) == set(paths)


# What a checkpoint holds


def test_a_checkpoint_holds_what_the_reference_promises_and_what_resuming_needs(trained, content):
    assert {"model_state_dict", "optimizer_state_dict", "history", "val_accuracy"} < set(content)
    assert set(content) == KEYS
    assert content["format"] == FORMAT == 2
    assert content["config"] == asdict(trained.config)
    assert (content["source"], content["config_hash"]) == ("mnist", trained.config.hash("mnist"))
    assert content["val_accuracy"] == trained.history[-1]["val_acc"]
    assert math.isnan(content["test_accuracy"])
    assert content["history"] == trained.history
    assert content["optimizer_state_dict"]["state"][0]["exp_avg"].shape == (8, 1, 3, 3)
    assert list(content["training"]) == [
        "model", "average", "optimizer", "scheduler", "sampler", "random", "progress",
    ]  # fmt: skip
    assert content["versions"] == trained.versions
    assert {"torch", "numpy", "python", "platform", "device", "threads"} == set(content["versions"])
    assert content["versions"]["torch"] == torch.__version__


def test_plain_torch_load_reads_a_checkpoint(trained, content):
    plain = torch.load(trained.checkpoint, weights_only=True)
    assert plain.keys() == content.keys()
    model = build("reference")
    model.load_state_dict(plain["model_state_dict"])
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(plain["optimizer_state_dict"])


def test_what_is_saved_comes_back(trained, content, folder, tiny_digits):
    path = save_checkpoint(content, folder)
    assert same(load_checkpoint(str(path)), content)
    assert same(content["model_state_dict"], weights(trained))
    model = load_model(path)
    assert not model.training
    images = tiny_digits.test_images
    assert torch.equal(predict(model, images), predict(trained.model, images))


def test_the_model_that_is_loaded_has_the_dropout_of_its_config(content, tmp_path):
    config = content["config"] | {"dropout": 0.4}
    model = load_model(forge(content | {"config": config}, tmp_path / "dropout.pth"))
    assert (model.drop1.p, model.drop2.p) == (0.4, 0.4)


def test_loading_moves_no_random_state(trained):
    before = torch.get_rng_state()
    load_checkpoint(trained.checkpoint)
    load_model(trained.checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("ema_decay", [0.0, 0.99])
def test_a_run_of_the_reference_recipe_fits_into_400_kb(tiny_digits, folder, ema_decay):
    config = replace(RECIPES["reference"], ema_decay=ema_decay, device="cpu")
    state = TrainingState(config, 50_000, CPU)
    for p in state.model.parameters():
        p.grad = torch.randn_like(p)
    state.optimizer.step()  # fills its state
    progress = state.progress
    progress.step = len(progress.loss)
    progress.loss.normal_()
    progress.correct.random_(128)
    row = dict.fromkeys(["train_loss", "val_loss", "train_acc", "val_acc", "lr", "seconds"], 0.1)
    progress.history += [{"epoch": epoch, **row} for epoch in range(1, 21)]
    from mnistlib.train import checkpoint_content

    path = save_checkpoint(checkpoint_content(state, config, tiny_digits), folder)
    assert len(load_checkpoint(path)["training"]["progress"]["loss"]) == 7_820
    assert path.stat().st_size < 400_000


# What is refused


def test_a_flipped_bit_is_refused(trained, tmp_path):
    raw = bytearray(trained.checkpoint.read_bytes())
    path = tmp_path / "flipped.pth"
    g = random.Random(0)
    ends = [0, 8 * len(raw) - 1, 8 * (len(raw) - TRAILER), 8 * (len(raw) - TRAILER) - 1]
    for bit in ends + [g.randrange(8 * len(raw)) for _ in range(200)]:
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        assert_refused(path)
        raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    load_checkpoint(path)


def test_a_truncated_file_is_refused(trained, tmp_path):
    raw = trained.checkpoint.read_bytes()
    path = tmp_path / "short.pth"
    lengths = [0, 1, 3, TRAILER - 1, TRAILER, TRAILER + 1, len(raw) - TRAILER, len(raw) - 1]
    for length in lengths + [len(raw) * i // 40 for i in range(40)]:
        path.write_bytes(raw[:length])
        assert_refused(path)


def test_a_file_with_bytes_added_is_refused(trained, tmp_path):
    raw = trained.checkpoint.read_bytes()
    for number, longer in enumerate([raw + b"\0", b"\0" + raw, raw + raw]):
        path = tmp_path / f"{number}.pth"
        path.write_bytes(longer)
        assert_refused(path)


def test_what_is_no_checkpoint_is_refused(trained, tmp_path):
    text, foreign, huge = tmp_path / "notes.txt", tmp_path / "foreign.pth", tmp_path / "huge.pth"
    text.write_text("not a checkpoint\n" * 100)
    torch.save(trained.model.state_dict(), foreign)
    huge.touch()
    os.truncate(huge, LARGEST + 1)
    for path in (text, foreign, huge, tmp_path):
        assert "is not a whole mnistlib checkpoint" in assert_refused(path)
    assert "No such file" in assert_refused(tmp_path / "missing.pth")


def test_a_pipe_that_has_no_end_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is not a whole mnistlib checkpoint" in assert_refused(tmp_path / "pipe.pth")
    assert_refused(Path("/dev/zero"))


class Evil:
    """Pickles into a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("shape", ["a key of a checkpoint", "in place of it", "a bare pickle"])
def test_no_code_in_a_forged_file_is_run(content, tmp_path, shape):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    if shape == "a bare pickle":
        path.write_bytes(seal(pickle.dumps(Evil(marker), protocol=2) + b"\0\0"))
        pickle.loads(path.read_bytes())
    else:
        evil = Evil(marker)
        forge(content | {"history": [evil]} if shape == "a key of a checkpoint" else evil, path)
        torch.load(path, weights_only=False)
    assert marker.exists()  # the file is as evil as it should be
    marker.unlink()
    assert "was not loaded; do not use it" in assert_refused(path)
    with pytest.raises(CheckpointError):
        load_model(path)
    assert not marker.exists()


def test_a_checkpoint_of_the_first_format_is_refused_with_what_to_do(content, tmp_path):
    """It had its parts side by side, and one accuracy that could be either."""
    old = {k: content[k] for k in ("config", "source", "history", "val_accuracy", "versions")}
    old |= {"format": 1, "accuracy": 99.4, "accuracy_kind": "validation"}
    old |= {k: content[k] for k in ("model_state_dict", "optimizer_state_dict")}
    old["training"] = {"step": 4, "weights": content["model_state_dict"], "history": []}
    path = forge(old, tmp_path / "mnist_model_20260101_000000_acc99.40.pth")
    said = "has checkpoint format 1, this release reads format 2; use the mnistlib that wrote it"
    assert said in assert_refused(path)
    with pytest.raises(CheckpointError, match="format 1"):
        load_model(path)


@pytest.mark.parametrize("number", [3, 0, None, "2"])
def test_another_format_is_refused(content, tmp_path, number):
    message = assert_refused(forge(content | {"format": number}, tmp_path / "new.pth"))
    assert f"format {number!r}" in message


def test_content_that_is_no_dict_with_a_format_is_refused(content, tmp_path):
    for other in ([content], torch.zeros(3), {"history": []}):
        assert_refused(forge(other, tmp_path / "other.pth"))


def test_a_file_where_the_folder_should_be_is_said(content, tmp_path, trained, tiny_digits):
    folder = tmp_path / "taken"
    folder.write_text("mine")
    with pytest.raises(CheckpointError, match="name another folder") as error:
        save_checkpoint(content, folder)
    assert str(folder) in str(error.value)
    with pytest.raises(CheckpointError, match="name another folder"):
        train(trained.config, tiny_digits, folder=folder / "run", verbose=False)
    assert folder.read_text() == "mine"


def test_a_folder_whose_name_is_too_long_is_said(content, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing could be saved in .*name another folder"):
        save_checkpoint(content, tmp_path / ("x" * 300))


# Released checkpoints


def test_the_released_checkpoint_of_a_recipe_is_found_or_its_absence_said(tmp_path, monkeypatch):
    monkeypatch.setattr(mnistlib.checkpoint, "outputs_folder", lambda: tmp_path)
    for recipe in ("best", "reference"):
        path = tmp_path / "checkpoints" / recipe / f"mnist_model_{recipe}.pth"
        path.parent.mkdir(parents=True)
        path.touch()
        assert released_checkpoint(recipe) == path
    assert released_checkpoint().parent.name == "best"
    with pytest.raises(CheckpointError, match="no released checkpoint of 'sprint'; name a file"):
        released_checkpoint("sprint")


# The latest of a folder, and what older ones are for


@pytest.fixture
def config(tiny_config):
    """Return twelve steps in three epochs on few images."""
    return replace(tiny_config, epochs=3, epoch_images=100, batch_size=25)


def steps(folder) -> list[int]:
    return [step for step, _, _ in checkpoints(folder)]


def die():
    raise MemoryError


@pytest.fixture
def died(config, tiny_digits, monkeypatch, tmp_path):
    """Return the folder of a run that died in its third epoch."""
    with monkeypatch.context() as m:
        stop_after(m, 10, die)
        with pytest.raises(MemoryError):
            train(config, tiny_digits, folder=tmp_path / "run", verbose=False)
    return tmp_path / "run"


@pytest.fixture(scope="module")
def whole(tiny_digits):
    """Return the weights at the end of a run that nothing interrupts."""
    found = {}

    def end(config):
        if config not in found:
            found[config] = weights(train(config, tiny_digits, save=False, verbose=False))
        return found[config]

    return end


def test_an_unfinished_run_has_two_checkpoints_and_a_finished_one_its_last(
    died, config, tiny_digits, whole
):
    assert steps(died) == [4, 8]
    run = train(config, tiny_digits, died, folder=died, verbose=False)
    assert steps(died) == [12]
    assert list(died.iterdir()) == [run.checkpoint]
    assert same(weights(run), whole(config))


@pytest.mark.parametrize("damage", ["a bit", "an end", "all"])
def test_of_a_damaged_latest_checkpoint_the_one_before_is_taken_loudly(
    died, config, tiny_digits, capsys, damage, whole
):
    latest = latest_checkpoint(died)
    raw = bytearray(latest.read_bytes())
    raw[len(raw) // 2] ^= 1
    latest.write_bytes({"a bit": raw, "an end": raw[:-1], "all": b""}[damage])
    assert steps(died) == [4]
    assert capsys.readouterr().err.count(f"WARNING: not used: {latest} ") == 1
    run = train(config, tiny_digits, died, folder=died, verbose=False)
    assert f"WARNING: not used: {latest}" in capsys.readouterr().err
    assert same(weights(run), whole(config))


def test_a_checkpoint_is_the_latest_itself_and_is_not_read_for_it(tmp_path):
    assert latest_checkpoint(str(tmp_path / "any.pth")) == tmp_path / "any.pth"


def test_a_folder_without_a_whole_checkpoint_is_an_error(tmp_path, config, tiny_digits, capsys):
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


def test_checkpoints_of_other_runs_in_the_folder_stay(died, config, tiny_digits):
    other = train(replace(config, seed=9), tiny_digits, folder=died, verbose=False).checkpoint
    found = checkpoints(died)
    assert [(step, content["config"]["seed"]) for step, _, content in found] == [
        (4, 3), (8, 3), (12, 9),
    ]  # fmt: skip
    run = train(config, tiny_digits, found[1][1], folder=died, verbose=False)
    assert set(died.iterdir()) == {other, run.checkpoint}


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


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("max_lr", 0.03, "max_lr 0.02 there, 0.03 here"),
        ("seed", 4, "seed 3 there, 4 here"),
        ("epochs", 4, "epochs 3 there, 4 here"),
        ("split", "last", "split 'random' there, 'last' here"),
    ],
)
def test_another_run_is_not_resumed(config, tiny_digits, died, field, value, text):
    path = latest_checkpoint(died)
    with pytest.raises(CheckpointError, match=text) as error:
        train(replace(config, **{field: value}), tiny_digits, path)
    assert str(path) in str(error.value)
    assert "resume with the same settings" in str(error.value)
    assert "dropout" not in str(error.value)  # what agrees is not listed


def test_a_run_on_other_digits_is_not_resumed(config, tiny_digits, died):
    sample = replace(tiny_digits, source="sample")
    with pytest.raises(CheckpointError, match="data source 'mnist' there, 'sample' here"):
        train(config, sample, died)


def test_a_checkpoint_from_before_a_setting_was_added_is_resumed_and_compared(
    config, tiny_digits, died, whole
):
    """Settings that are added later have the old behaviour as their default."""
    content = load_checkpoint(latest_checkpoint(died))
    del content["config"]["elastic"]
    path = forge(content, died.parent / "older.pth")
    assert same(weights(train(config, tiny_digits, path, verbose=False)), whole(config))
    with pytest.raises(CheckpointError, match="seed 3 there, 5 here"):
        train(replace(config, seed=5), tiny_digits, path)


def test_threads_and_device_may_differ_when_a_run_is_resumed(
    config, tiny_digits, monkeypatch, tmp_path
):
    config = replace(config, model="c4k5s2p pooled")
    with monkeypatch.context() as m:
        stop_after(m, 6)
        train(config, tiny_digits, folder=tmp_path, verbose=False)
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda check_available=False: None
    )
    run = train(replace(config, threads=0, device="auto"), tiny_digits, tmp_path, verbose=False)
    assert (run.interrupted, len(run.history)) == (False, 3)
