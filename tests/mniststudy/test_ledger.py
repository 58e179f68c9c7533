"""The ledger: a record per finished run, tables collected from them, and a report of its own."""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from mnistlib import RECIPES, Config, ConfigError, Evaluation, Run, build, train
from mnistlib.runtime import versions
from mniststudy.runs import ledger, report
from mniststudy.runs.ledger import (
    COLUMNS,
    EPOCH_COLUMNS,
    MISREAD_COLUMNS,
    TABLES,
    LedgerError,
    append_rows,
    check_ledger,
    collect,
    finished,
    read_results,
    record,
    runs_for,
    without_host_columns,
)
from mniststudy.runs.report import BEGIN, END, summary_sentence, write_report

COMMITTED = Path(__file__).parent.parent.parent / "outputs" / "results"
ROW = {"train_loss": 0.123456789, "val_loss": 0.2, "train_acc": 95.0, "lr": 1e-3, "seconds": 1.5}
TEST = Evaluation(0.05, 97, 100, (3, 14, 15))
BLOCKS = ("headline", "speed", "promises")
MARKS = "\n\n".join(f"{BEGIN.format(name)}\nold\n{END.format(name)}" for name in BLOCKS)


def made_up(config: Config, val_acc: float = 98.76543) -> Run:
    """Return a finished run without training it."""
    history = [{"epoch": e + 1, "val_acc": val_acc, **ROW} for e in range(config.epochs)]
    model = build(config.model, config.dropout)
    about = versions() | {"device": "cpu", "threads": "1"}
    return Run(config, "mnist", model, history, {}, 1.5, 10_000, None, about)


@pytest.fixture
def run(tiny_config):
    return made_up(tiny_config)


def other(run: Run, seed: int) -> Run:
    return replace(run, config=replace(run.config, seed=seed))


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Return the folder of a committed ledger, in a checkout of its own."""
    monkeypatch.setattr(ledger, "outputs_folder", lambda: tmp_path / "outputs")
    monkeypatch.setattr(report, "outputs_folder", lambda: tmp_path / "outputs")
    monkeypatch.setattr(ledger, "commit", lambda: "0012345")
    return tmp_path / "outputs" / "results"


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


# Records


def test_a_finished_run_gives_one_row_and_its_epochs(tiny_config, tiny_digits, runs_folder):
    run = train(tiny_config, tiny_digits)
    row = record(run, Evaluation(0.05, 97, 100), memory_mb=123.4, optimizer_mb=45.6)
    assert tuple(row) == COLUMNS
    assert not (runs_folder / "runs.csv").exists()
    collect()
    (written,) = rows_of(runs_folder / "runs.csv")
    assert written == {k: "" if v is None else str(v) for k, v in row.items()}
    last = run.history[-1]
    assert (row["config_hash"], row["seed"]) == (tiny_config.hash("mnist"), 3)
    assert (row["parameters"], row["epochs"], row["n_val"]) == (13_912, 2, 100)
    assert row["multiply_accumulates"] == 1_895_712
    assert (row["model"], row["split"], row["source"]) == ("reference", "random", "mnist")
    assert (row["val_accuracy"], row["n_test"], row["test_accuracy"]) == (last["val_acc"], 100, 97)
    assert row["train_loss"] == pytest.approx(last["train_loss"], abs=1e-6)
    assert (row["memory_mb"], row["optimizer_mb"]) == (123, 46)
    assert (row["device"], row["threads"]) == ("cpu", 1)
    assert {row[k] for k in ("torch", "python", "platform")} <= set(versions().values())
    assert row["checkpoint_bytes"] == run.checkpoint.stat().st_size
    epochs = rows_of(runs_folder / "history.csv")
    assert [tuple(e) for e in epochs] == [EPOCH_COLUMNS, EPOCH_COLUMNS]
    for there, here in zip(epochs, run.history, strict=True):
        assert (there["config_hash"], there["seed"]) == (row["config_hash"], "3")
        for key, value in here.items():
            assert float(there[key]) == pytest.approx(value, abs=1e-7)


def test_what_was_not_measured_is_an_empty_cell_and_null(run, tmp_path):
    run.history[0] |= {"val_loss": math.nan, "val_acc": math.nan}
    record(run, folder=tmp_path)
    (path,) = tmp_path.glob("*/run.json")
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["history"][0]["val_loss"] is content["row"]["n_test"] is content["wrong"] is None
    collect(tmp_path)
    (written,) = rows_of(tmp_path / "runs.csv")
    empty = ("n_test", "test_accuracy", "test_loss", "memory_mb", "optimizer_mb")
    assert {written[k] for k in (*empty, "checkpoint_bytes")} == {""}
    assert [row["val_acc"] for row in rows_of(tmp_path / "history.csv")] == ["", "98.76543"]
    assert not (tmp_path / "misread.csv").exists()


def test_a_record_lies_in_the_folder_of_its_run_and_is_whole_at_once(run, tmp_path, monkeypatch):
    record(run, folder=tmp_path)
    (path,) = tmp_path.rglob("*.*")
    assert path == tmp_path / run.config.run_name("mnist") / "run.json"
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record(run, TEST, folder=tmp_path)
    assert path.read_bytes() == before
    assert list(tmp_path.rglob("*.*")) == [path]


def test_the_same_run_is_not_kept_twice(run, tmp_path):
    record(run, folder=tmp_path)
    record(replace(run, seconds=99.0), folder=tmp_path)
    collect(tmp_path)
    record(run, folder=tmp_path)
    collect(tmp_path)
    assert len(rows_of(tmp_path / "runs.csv")) == 1
    assert len(rows_of(tmp_path / "history.csv")) == 2
    record(other(run, 4), folder=tmp_path)
    record(replace(run, source="sample"), folder=tmp_path)
    collect(tmp_path)
    assert len(rows_of(tmp_path / "runs.csv")) == 3
    assert len(rows_of(tmp_path / "history.csv")) == 6


def test_an_interrupted_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"interrupted.*resume"):
        record(replace(run, signal=2), folder=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_the_config_of_a_row_builds_the_config_again(run, tmp_path):
    row = record(run, folder=tmp_path)
    assert Config(**json.loads(row["config"])) == run.config


def test_the_test_images_misread_are_kept_with_the_run(run, tmp_path):
    record(run, TEST, tmp_path)
    collect(tmp_path)
    (row,) = rows_of(tmp_path / "misread.csv")
    assert tuple(row) == MISREAD_COLUMNS
    assert (row["n"], row["wrong"], int(row["seed"])) == ("100", "3 14 15", run.config.seed)
    assert (read_results("misread", tmp_path)["wrong"] == "3 14 15").all()


def test_a_run_that_misreads_nothing_has_a_row_all_the_same(run, tmp_path):
    record(run, Evaluation(0.05, 100, 100), tmp_path)
    assert read_results("misread", tmp_path)["n"].tolist() == [100]


# Tables


def test_new_rows_follow_in_the_order_in_which_their_runs_finished(run, tmp_path, monkeypatch):
    class Clock(ledger.datetime):
        hour = 23

        @classmethod
        def now(cls, zone):
            cls.hour -= 1
            return ledger.datetime(2026, 11, 24, cls.hour, tzinfo=zone)

    monkeypatch.setattr(ledger, "datetime", Clock)
    for seed in (1, 2, 3, 4):
        record(other(run, seed), folder=tmp_path)
        if seed == 2:
            collect(tmp_path)
    collect(tmp_path)
    assert [row["seed"] for row in rows_of(tmp_path / "runs.csv")] == ["2", "1", "4", "3"]
    assert [row["seed"] for row in rows_of(tmp_path / "history.csv")] == list("22114433")


def test_where_table_and_record_both_have_a_run_the_table_counts(run, tmp_path):
    record(run, TEST, tmp_path)
    collect(tmp_path)
    before = tables(tmp_path)
    record(replace(run, seconds=99.0), Evaluation(0.07, 1, 100, (1,)), tmp_path)
    collect(tmp_path)
    assert tables(tmp_path) == before
    assert read_results(folder=tmp_path)["seconds"].tolist() == [1.5]


def test_a_row_without_a_test_figure_gives_way_to_a_record_with_one(run, tmp_path):
    for seed in (1, 2, 3):
        record(other(run, seed), folder=tmp_path)
        collect(tmp_path)
    before = tables(tmp_path)
    assert len(finished(tmp_path)) == 3
    assert finished(tmp_path, test=True) == set()
    again = replace(other(run, 2), seconds=2.5, history=[h | {"seconds": 9} for h in run.history])
    row = record(again, TEST, tmp_path)
    for _ in range(2):  # joined with the record, then collected
        assert finished(tmp_path, test=True) == {(row["config_hash"], 2)}
        assert read_results(folder=tmp_path)["seconds"].tolist() == [1.5, 2.5, 1.5]
        assert read_results("history", tmp_path)["seconds"].tolist() == [1.5, 1.5, 9, 9, 1.5, 1.5]
        collect(tmp_path)
    for name in ("runs.csv", "history.csv"):  # all other rows have their places and text
        old, new = before[name].splitlines(), (tmp_path / name).read_bytes().splitlines()
        assert [line for line in new if line in old] == [
            line for i, line in enumerate(old) if i not in ((2,) if name == "runs.csv" else (3, 4))
        ]
    record(replace(again, seconds=7.0), None, tmp_path)
    collect(tmp_path)
    assert finished(tmp_path, test=True) == {(row["config_hash"], 2)}  # it is not lost again


def test_finished_runs_are_those_of_tables_and_of_records(run, tmp_path):
    assert finished(tmp_path / "nowhere") == set()
    record(other(run, 1), folder=tmp_path)
    collect(tmp_path)
    record(other(run, 2), TEST, tmp_path)
    keys = {(replace(run.config, seed=seed).hash("mnist"), seed) for seed in (1, 2)}
    assert finished(tmp_path) == keys
    assert {seed for _, seed in finished(tmp_path, test=True)} == {2}


def test_a_collection_cut_short_between_two_tables_is_made_whole_by_the_next(
    run, tmp_path, monkeypatch
):
    for seed in (1, 2):
        record(other(run, seed), TEST, tmp_path)
    write, done = ledger.write_atomically, []
    for stop_after in (1, 2):

        def killed(path, content, stop_after=stop_after):
            if len(done) == stop_after:
                raise KeyboardInterrupt
            done.append(path.name)
            write(path, content)

        monkeypatch.setattr(ledger, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path)
        assert len(read_results(folder=tmp_path)) == 2
    monkeypatch.setattr(ledger, "write_atomically", write)
    collect(tmp_path)
    assert {name: len(rows_of(tmp_path / f"{name}.csv")) for name in TABLES} == {
        "runs": 2, "history": 4, "misread": 2
    }  # fmt: skip


COLLECTS = """
import sys
from pathlib import Path
from mniststudy.runs.ledger import collect
print(flush=True)
sys.stdin.readline()
for i in range(10):
    collect(Path(sys.argv[1]))
"""


def test_processes_that_collect_while_runs_are_recorded_lose_and_double_nothing(run, tmp_path):
    command = [sys.executable, "-c", COLLECTS, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for job in jobs:
        job.stdout.readline()  # it has imported everything
    for job in jobs:
        job.stdin.write("go\n")
        job.stdin.flush()
    for seed in range(20):
        record(other(run, seed), folder=tmp_path)
    for job in jobs:
        job.communicate(timeout=60)
        assert job.returncode == 0
    assert len(finished(tmp_path)) == 20
    collect(tmp_path)
    assert sorted(int(row["seed"]) for row in rows_of(tmp_path / "runs.csv")) == list(range(20))
    assert len(rows_of(tmp_path / "history.csv")) == 40


def test_read_results_gives_a_table_of_rows_and_records(run, results):
    record(run, folder=results)
    for _ in range(2):
        table = read_results()
        assert tuple(table.columns) == COLUMNS
        assert table["val_accuracy"].tolist() == [98.7654]
        assert tuple(read_results("history").columns) == EPOCH_COLUMNS
        assert read_results("history", results)["epoch"].tolist() == [1, 2]
        collect(results)


def test_a_hash_that_looks_like_a_number_stays_as_it_is(results):
    append_rows(results / "made.csv", ("config_hash", "commit", "seed"), [
        {"config_hash": "00123456", "commit": "0012345", "seed": 0},
        {"config_hash": "12e45678", "commit": "1", "seed": 0},
    ])  # fmt: skip
    table = read_results("made")
    assert table["config_hash"].tolist() == ["00123456", "12e45678"]
    assert table["commit"].tolist() == ["0012345", "1"]


@pytest.mark.parametrize("name", ["runs", "history", "misread", "speed"])
def test_a_table_that_is_not_there_is_said(tmp_path, name):
    with pytest.raises(LedgerError, match=rf"{name}\.csv is not there .*name a folder"):
        read_results(name, tmp_path)


def test_rows_are_appended_to_other_tables(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    append_rows(path, ("name", "seconds"), [{"name": "a, b", "seconds": 1}])
    append_rows(path, ("name", "seconds"), [{"name": 'c "d"', "seconds": None}])
    assert path.read_text() == 'name,seconds\n"a, b",1\n"c ""d""",\n'


def test_what_a_host_may_change_is_left_out_of_a_comparison(run, tmp_path):
    for seed in (1, 2):
        record(other(run, seed), TEST, tmp_path)
    collect(tmp_path)
    table, whole = without_host_columns("runs", tmp_path), read_results("runs", tmp_path)
    assert set(whole) - set(table) == set(ledger.HOST_COLUMNS)
    assert {"val_loss", "test_accuracy", "config", "torch", "threads", "device"} <= set(table)
    shutil.rmtree(next(tmp_path.glob("*/")))
    whole.iloc[::-1].to_csv(tmp_path / "runs.csv", index=False)
    assert without_host_columns("runs", tmp_path).equals(table)
    whole.assign(val_loss=whole["val_loss"] + 1e-6).to_csv(tmp_path / "runs.csv", index=False)
    assert not without_host_columns("runs", tmp_path).equals(table)


# What is no ledger


def ledger_with(folder, name, content) -> None:
    folder.mkdir(exist_ok=True)
    if content is None:
        (folder / f"{name}.csv").mkdir()
    else:
        (folder / f"{name}.csv").write_bytes(content)


def lines_of(name, *rows) -> bytes:
    return "\n".join([",".join(TABLES[name]), *rows, ""]).encode()


BROKEN = {
    "a directory": (None, "cannot be read as a table .Is a directory.; move it away"),
    "an empty file": (b"", "has other columns than it should"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "cannot be read as a table .*utf-8"),
    "zeros": (bytes(200_000), "cannot be read as a table .*field limit"),
    "UTF-16": ("config_hash,seed\n1,2\n".encode("utf-16"), "cannot be read as a table .*utf-8"),
    "UTF-16 without a mark": ("config_hash\n".encode("utf-16-le"), "has other columns"),
    "another table": (b"a,b\n1,2\n", r"has other columns than it should .a, b"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_table_is_refused_in_a_sentence(tmp_path, run, name, what):
    content, fault = BROKEN[what]
    ledger_with(tmp_path / "ledger", name, content)
    record(run, folder=tmp_path / "ledger")
    for use in (check_ledger, collect, lambda folder: read_results(name, folder)):
        with pytest.raises(LedgerError, match=fault) as error:
            use(tmp_path / "ledger")
        assert f"{name}.csv" in str(error.value)
        assert "\n" not in str(error.value)
    if name == "runs":
        with pytest.raises(LedgerError, match=fault):
            finished(tmp_path / "ledger")
    path = tmp_path / "ledger" / f"{name}.csv"
    with pytest.raises(LedgerError, match=fault):
        append_rows(path, TABLES[name], [])
    assert path.is_dir() if content is None else path.read_bytes() == content


@pytest.mark.parametrize("change", ["one column more", "one less", "another order", "a BOM"])
def test_a_table_with_other_columns_is_refused(tmp_path, run, change):
    record(run, folder=tmp_path)
    collect(tmp_path)
    check_ledger(tmp_path)
    path = tmp_path / "runs.csv"
    table = pd.read_csv(path)
    if change == "one column more":
        table = table.assign(note="")
    elif change == "one less":
        table = table.drop(columns="finished")
    elif change == "another order":
        table = table[list(COLUMNS[::-1])]
    table.to_csv(path, index=False, encoding="utf-8-sig" if change == "a BOM" else "utf-8")
    with pytest.raises(LedgerError, match=r"runs\.csv has other columns"):
        check_ledger(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        "12345678,1,10",
        "12345678,1,10,3,4",
        "12345678,x,10,",
        "12345678,1.0,10,",
        '12345678,1,10,"3',
    ],
    ids=["too short", "too long", "no seed", "seed with a point", "an open quote"],
)
def test_a_row_that_is_not_whole_is_refused_with_its_line(tmp_path, row):
    ledger_with(tmp_path, "misread", lines_of("misread", "12345678,0,10,", row))
    with pytest.raises(LedgerError, match=r"line 3 of .*misread\.csv|misread\.csv cannot be read"):
        check_ledger(tmp_path)
    ledger_with(tmp_path, "misread", lines_of("misread", "12345678,0,10,", "12345678,1,10,3"))
    check_ledger(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: b"",
        lambda c: b"\xff\xfe",
        lambda c: json.dumps(c).encode()[:-1],
        lambda c: json.dumps([c]).encode(),
        lambda c: json.dumps({"row": c["row"]}).encode(),
        lambda c: json.dumps(c | {"row": list(c["row"])}).encode(),
        lambda c: json.dumps(c | {"row": c["row"] | {"note": 1}}).encode(),
        lambda c: json.dumps(c | {"history": [{"epoch": 1}]}).encode(),
        lambda c: json.dumps(c | {"history": None}).encode(),
        lambda c: json.dumps(c | {"wrong": 3}).encode(),
        None,
    ],
)
def test_a_broken_record_is_refused_in_a_sentence(tmp_path, run, change):
    record(run, TEST, tmp_path)
    check_ledger(tmp_path)
    (path,) = tmp_path.glob("*/run.json")
    content = json.loads(path.read_text())
    if change:
        path.write_bytes(change(content))
    else:
        path.unlink()
        path.mkdir()
    for use in (check_ledger, collect, finished, lambda folder: read_results(folder=folder)):
        with pytest.raises(LedgerError, match=r"run\.json is not the record of a run; remove it"):
            use(tmp_path)


@pytest.mark.parametrize("place", ["a file", "below a file", "/proc/mnistlib", "/dev/null/x"])
def test_a_folder_that_cannot_be_one_is_refused_in_a_sentence(tmp_path, run, place):
    (tmp_path / "a file").write_text("")
    folder = {
        "a file": tmp_path / "a file", "below a file": tmp_path / "a file" / "ledger"
    }.get(place, Path(place))  # fmt: skip
    for use in (check_ledger, lambda folder: record(run, folder=folder)):
        with pytest.raises(LedgerError, match=r"cannot be the folder of a ledger \(.*name another"):
            use(folder)


def test_a_good_ledger_passes_the_check_and_the_check_leaves_nothing(tmp_path, run):
    record(run, TEST, tmp_path / "ledger")
    collect(tmp_path / "ledger")
    before = sorted((tmp_path / "ledger").rglob("*"))
    check_ledger(tmp_path / "ledger")
    assert sorted((tmp_path / "ledger").rglob("*")) == before
    check_ledger(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_check_loads_no_pandas():
    """It runs before a training whose memory is measured."""
    script = (
        "import sys, mniststudy.runs.ledger as ledger\n"
        f"ledger.check_ledger(ledger.Path({str(COMMITTED)!r}).parent / 'runs')\n"
        f"ledger.finished(ledger.Path({str(COMMITTED)!r}))\n"
        "print('pandas' in sys.modules, 'scipy' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


# The committed ledger


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(COMMITTED, tmp_path / "copy"))


def test_collecting_the_committed_ledger_leaves_every_byte(copy):
    before = tables(copy)
    assert len(before) >= 7
    stamps = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    check_ledger(copy)
    collect(copy)
    assert tables(copy) == before
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == stamps


def test_a_new_run_is_a_line_at_the_end_of_the_committed_ledger(copy, run):
    before = tables(copy)
    record(run, TEST, copy)
    collect(copy)
    for name, n in {"runs.csv": 1, "history.csv": 2, "misread.csv": 1}.items():
        after = (copy / name).read_bytes()
        assert after.startswith(before[name])
        assert len(after.splitlines()) == len(before[name].splitlines()) + n
    assert all((copy / name).read_bytes() == before[name] for name in ("speed.csv", "faults.csv"))


def test_appending_to_the_committed_tables_leaves_their_lines(copy):
    for name in ("speed", "curves", "faults", "published"):
        before = (copy / f"{name}.csv").read_bytes()
        append_rows(copy / f"{name}.csv", tuple(rows_of(copy / f"{name}.csv")[0]), [])
        assert (copy / f"{name}.csv").read_bytes() == before


def test_every_row_of_the_committed_ledger_loads_and_its_hash_is_that_of_its_config():
    runs = read_results()
    assert len(runs) == len(finished(COMMITTED)) >= 709
    assert set(runs["source"]) == {"mnist"}
    for row in runs.itertuples():
        config = Config(**json.loads(row.config))
        assert (config.hash("mnist"), config.seed) == (row.config_hash, row.seed)
        assert (config.model, config.epochs, config.split) == (row.model, row.epochs, row.split)
    for name in TABLES:
        known = pd.read_csv(COMMITTED / f"{name}.csv", dtype={"config_hash": str, "commit": str})
        pd.testing.assert_frame_equal(read_results(name), known)


def test_the_runs_of_a_config_are_those_whose_own_config_is_the_same():
    """By the hash of each row's seed, which is quicker than building each row's Config."""
    runs = read_results()
    for config in (RECIPES["fast"], replace(RECIPES["reference"], seed=7, threads=2)):
        wanted = [
            replace(Config(**json.loads(c)), seed=0, threads=0, device="auto")
            == replace(config, seed=0, threads=0, device="auto")
            for c in runs["config"]
        ]
        assert runs_for(config).equals(runs[wanted].query("seed < 100"))  # others served to choose
        assert len(runs_for(config)) > 2


# The report


def committed(results) -> None:
    """Write a ledger of three runs of one recipe, one of another and one of none."""
    for seed, accuracy in enumerate([99.0, 99.2, 99.4]):
        run = made_up(replace(RECIPES["reference"], seed=seed), accuracy)
        run.history[4]["val_acc"] = accuracy + 0.3  # the best epoch is not the last
        test = Evaluation(0.05, 9_900 + seed, 10_000)
        record(run, test, results, memory_mb=100 + seed, optimizer_mb=60 + seed)
    record(made_up(RECIPES["fast"], 98.5), folder=results, memory_mb=90)  # no test: no row
    record(made_up(RECIPES["best"], 99.0), Evaluation(0.04, 9_950, 10_000), results)
    record(made_up(Config(epochs=1, seed=7), 50.0), folder=results)
    collect(results)
    (results / "published.csv").write_text("epoch,val_acc\n1,97.6\n2,98.8\n3,98.7\n")
    # rounds of an epoch of 18 s and 2 s of evaluation, then of 21 s and 3 s: 400 s and 480 s
    times = [(1, "fast", 1, 99)]
    for turn, slower in ((1, 1.0), (2, 1.2)):
        times += [(2, "conventional", turn, f"{17 + turn + 2 * (turn > 1)}")]
        for name, seconds in (("reference-fast", 32), ("fast", 20), ("sprint", 4)):
            times += [(2, name, turn, seconds * slower)]
    lines = [
        f"{go},run,{name},{turn},{seconds},2,"
        + (f"50000,{1 + turn},1000000,20\n" if name == "conventional" else "1000,0.5,1000,0\n")
        for go, name, turn, seconds in times
    ]
    header = "go,kind,name,repetition,seconds,threads,images,evaluation_seconds,whole_images,"
    (results / "speed.csv").write_text(f"{header}evaluations\n" + "".join(lines))


def test_the_report_goes_between_its_marks(results, tmp_path):
    committed(results)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{MARKS}\n\nThe rest: 100 %, ±.\n", encoding="utf-8")
    assert write_report()
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{BEGIN.format('headline')}\n| recipe |")
    assert text.endswith(f" |\n{END.format('promises')}\n\nThe rest: 100 %, ±.\n")
    assert "old" not in text
    headline, rest = text.split(BEGIN.format("speed"))
    speed, promises = rest.split(BEGIN.format("promises"))
    reference, best = [line for line in headline.splitlines() if line.startswith("| `")]
    assert reference == (  # the seconds of the conventional loop's rounds
        "| `reference` | 13,912 | 99.01 % [98.99 to 99.03] | 0.050 | 3 | 440 |"
    )
    assert best == "| `best` | 13,912 | 99.50 % (one seed) | 0.040 | 1 | 2 |"  # of the ledger
    conventional = (
        "| `reference` by the conventional loop | 2 | 2 | 440.0 (400.0 to 480.0) | 1 |  |"
    )
    assert conventional in speed
    # the last session alone; ratios are within a round: 400 to 20 and 480 to 24
    assert "| `fast` | 2 | 2 | 22.0 (20.0 to 24.0) | 20 (20 to 20) | the whole" in speed
    assert "| `reference-fast` | 2 | 2 | 35.2 (32.0 to 38.4) | 12 (12 to 12) | the" in speed
    # all three made-up references are at 99.0 % in the first of their twenty epochs
    assert "| `sprint` | 2 | 2 | 4.4 (4.0 to 4.8) | 5 (5 to 5) | the conventional run to" in speed
    assert "best epoch | 98.80 % (one run) | 99.50 % (99.30 to 99.70) |" in promises
    assert "last epoch | 98.70 % (one run) | 99.20 % (99.00 to 99.40) |" in promises
    assert (
        "| 102 MB more than after `import torch`; the first optimizer accounts for 62 MB |"
        in promises
    )
    for block in (headline, speed, promises):  # each is a table of one width
        table = [line.count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(table)) == 1


def test_a_report_twice_is_a_report_once(results, tmp_path):
    committed(results)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{MARKS}\nafter\n", encoding="utf-8")
    assert write_report()
    once = readme.read_bytes()
    assert not write_report()
    assert readme.read_bytes() == once


def test_checking_a_report_writes_nothing(results, tmp_path):
    committed(results)
    readme = tmp_path / "elsewhere.md"
    readme.write_text(MARKS, encoding="utf-8")
    assert write_report(check=True, readme=readme)
    assert readme.read_text(encoding="utf-8") == MARKS
    write_report(readme=readme)
    renewed = readme.read_bytes()
    assert not write_report(check=True, readme=readme)
    assert readme.read_bytes() == renewed


FIRST, LAST = BEGIN.format("headline"), END.format("headline")


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        MARKS.replace(LAST, ""),
        MARKS.replace(FIRST, ""),
        MARKS + MARKS,
        MARKS.replace(LAST, "").replace(FIRST, f"{LAST} between {FIRST}"),
    ],
    ids=["none", "no end", "no begin", "twice", "the wrong way round"],
)
def test_a_readme_without_its_marks_stays_as_it_is(results, tmp_path, text):
    committed(results)
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    with pytest.raises(LedgerError, match=r"README\.md must have the marks"):
        write_report()
    assert readme.read_text(encoding="utf-8") == text


def test_the_runs_of_a_config_are_its_seeds(results):
    committed(results)
    assert runs_for(replace(RECIPES["reference"], seed=9, threads=1))["seed"].tolist() == [0, 1, 2]
    assert len(runs_for(RECIPES["fast"])) == 1
    assert runs_for(RECIPES["sprint"]).empty


def test_a_recipe_is_quoted_with_its_mean_and_its_seeds(results):
    committed(results)
    assert summary_sentence("reference") == (
        "reference: 99.20 % validation accuracy after 1,000,000 images in 20 epochs, mean of "
        "n = 3 seeds (range 99.00 to 99.40), last epoch, 10,000 validation images, 13,912 "
        "parameters"
    )
    with pytest.raises(LedgerError, match="no run of the recipe 'sprint' as it is now"):
        summary_sentence("sprint")
    with pytest.raises(ConfigError, match="recipe is 'slow', but it must be one of"):
        summary_sentence("slow")


def test_the_committed_readme_is_what_the_committed_ledger_gives():
    assert not write_report(check=True)


def test_a_readme_that_is_not_there_is_said(results):
    committed(results)
    with pytest.raises(LedgerError, match=r"README\.md is not there"):
        write_report()
