"""Any value in any place of a file: it is accepted, or refused in one sentence; no traceback."""

import json
import math
from dataclasses import asdict, fields

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_ledger import TEST, made_up

from mnistlib import CheckpointError, Config, MnistlibError, load_checkpoint, load_model, train
from mnistlib.checkpoint import checkpoints, save_checkpoint
from mniststudy.runs import ledger, pages, report
from mniststudy.runs.describe import describe
from mniststudy.runs.ledger import READ, TABLES, LedgerError, check_ledger, collect, read_results
from mniststudy.runs.teachers import build_pool
from mniststudy.use.calibrate import load_calibration

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["1e999", "-1", "nan", "2026", 10**19, "c8 r1", "reference", [], {}, [[0]]])
)  # fmt: skip
VALUES = SCALARS | st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2)
)
# the same examples every time; to look for simpler ones would take minutes
many = settings(max_examples=50, derandomize=True, deadline=None, phases=[Phase.generate])


def places(value, way=()):
    """Give the way to each place in what JSON can hold, the first of a list for all."""
    if way:
        yield way
    inside = value.items() if isinstance(value, dict) else enumerate(value[:1])
    for key, part in inside:
        yield from places(part, (*way, key)) if isinstance(part, dict | list) else [(*way, key)]


def put(value, way, new):
    """Return a copy of a value in which another one is at a place."""
    first, *rest = way
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[first] = put(copy[first], rest, new) if rest else new
    return copy


def tried(*uses) -> None:
    """Use a file in several ways; anything but one line of an exception of ours goes on."""
    said = []
    for use in uses:
        try:
            use()
        except MnistlibError as error:
            said.append(str(error))
    assert all(len(text) > 20 and len(text.splitlines()) == 1 for text in said)


@many
@given(st.sampled_from([f.name for f in fields(Config)]), VALUES)
def test_any_value_of_a_setting(name, value):
    tried(lambda: Config(**{name: value}).hash("mnist"))


@many
@given(st.data())
def test_any_value_in_a_calibration(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    about = {"checkpoint": "a.pth", "temperature": 0.5, "sure": 0.7, "twin": {"seed": 0}}
    way = data.draw(st.sampled_from([(), *places(about)]))
    value = data.draw(VALUES)
    (folder / "calibration.json").write_text(json.dumps(put(about, way, value) if way else value))

    def use() -> None:
        found = load_calibration(folder / "a.pth")
        assert 0 < found.temperature < math.inf
        assert 0 <= found.sure <= 1
        assert asdict(found)["twin"] is None or dict(found.twin)

    tried(use)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the config of a run, and the files of its ledger, with the record of another one."""
    folder, config = tmp_path_factory.mktemp("ledger"), Config(epochs=1, device="cpu", threads=1)
    ledger.record(made_up(config), TEST, folder)
    collect(folder)
    (path,) = folder.glob("*/run.json")
    content = json.loads(path.read_bytes())
    content["row"] |= {"seed": 1, "config_hash": "12345678"}
    tables = {f"{name}.csv": (folder / f"{name}.csv").read_text() for name in TABLES}
    return config, tables | {"other/run.json": json.dumps(content)}


def use_ledger(folder, config, files) -> None:
    """Do with a ledger of these files what commands do."""
    (folder / "other").mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    tried(
        lambda: check_ledger(folder),
        lambda: ledger.finished(folder, test=True),
        lambda: collect(folder),
        lambda: ledger.runs_for(config, folder),
        lambda: [ledger.images_seen(row) for _, row in read_results("runs", folder).iterrows()],
        *(lambda name=name: read_results(name, folder) for name in TABLES),
    )


@many
@given(st.data())
def test_any_value_in_a_record(tmp_path_factory, files, data):
    folder = tmp_path_factory.getbasetemp()
    config, files = files
    content = json.loads(files["other/run.json"])
    way = data.draw(st.sampled_from([*places(content)]))
    changed = json.dumps(put(content, way, data.draw(VALUES)))
    use_ledger(folder, config, files | {"other/run.json": changed})
    (folder / "other" / "run.json").unlink()
    for name in TABLES:  # nothing that cannot be read was collected
        assert len(read_results(name, folder))


@many
@given(st.data())
def test_any_text_in_a_table(tmp_path_factory, files, data):
    config, files = files
    name = data.draw(st.sampled_from([f"{name}.csv" for name in TABLES]))
    cells = [line.split(",") for line in files[name].splitlines()]
    line = data.draw(st.integers(0, len(cells) - 1))
    text = data.draw(st.text(st.characters(codec="utf-8"), max_size=8) | VALUES.map(json.dumps))
    cells[line][data.draw(st.integers(0, len(cells[line]) - 1))] = text
    changed = "\n".join(map(",".join, cells))
    use_ledger(tmp_path_factory.getbasetemp(), config, files | {name: changed})


@pytest.fixture(scope="module")
def trained(tiny_digits, tmp_path_factory):
    """Return the folder and the content of a checkpoint of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    config = Config(
        model="c4k5s2p pooled", epochs=1, epoch_images=50, batch_size=25, ema_decay=0.5, seed=3,
        device="cpu", threads=1, max_lr=0.02,
    )  # fmt: skip
    path = train(config, tiny_digits, folder=folder, verbose=False).checkpoint
    content = load_checkpoint(path)
    path.unlink()
    return folder, content


@many
@given(st.data())
def test_any_value_in_a_checkpoint(trained, tiny_digits, data):
    folder, content = trained
    # the name of the file has two, some are for others to read, and torch takes any value in one
    kept = ("val_accuracy",), ("test_accuracy",), ("optimizer_state_dict",)
    kept += (("training", "optimizer", "state"),)
    ways = [way for way in places(content) if not any(way[: len(k)] == k for k in kept)]
    changed = put(content, data.draw(st.sampled_from(ways)), data.draw(VALUES))
    path = save_checkpoint(changed, folder)

    def resume() -> None:
        config = Config(**load_checkpoint(path)["config"])
        train(config, tiny_digits, path, save=False, verbose=False)

    tried(
        lambda: load_model(path), lambda: describe(path, tiny_digits), resume,
        lambda: checkpoints(folder),
        lambda: build_pool([path], tiny_digits, Config(), 0, torch.device("cpu")),
    )  # fmt: skip
    path.unlink()


def test_weights_that_are_no_tensors_make_no_teacher(trained, tiny_digits):
    folder, content = trained
    weights = dict.fromkeys(content["model_state_dict"], 0.5)
    path = save_checkpoint(content | {"model_state_dict": weights}, folder)
    with pytest.raises(CheckpointError, match="has weights that do not fit its network"):
        build_pool([path], tiny_digits, Config(), 1, torch.device("cpu"))
    path.unlink()


def test_a_table_that_lacks_a_column_that_the_report_reads_is_refused(tmp_path, monkeypatch):
    tables = {name: read_results(name) for name in READ}
    for name, columns in READ.items():
        for column in columns.split():
            tables[name].drop(columns=column).to_csv(tmp_path / f"{name}.csv", index=False)
            with pytest.raises(
                LedgerError, match=rf"{name}\.csv has no column '{column}'; restore"
            ):
                read_results(name, tmp_path)

    def narrow(name):  # it needs no others
        return tables[name][READ[name].split()] if name in READ else read_results(name)

    for module in (pages, report):
        monkeypatch.setattr(module, "read_results", narrow)
    last = pages.ANSWERS[-3:]  # which read tables that the other blocks do not
    for block in (report.headline, report.leaderboard, report.speed, report.latency, *last):
        assert block()
    assert "13,912" in report.promises()
