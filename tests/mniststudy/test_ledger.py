"""The ledger: a record per finished run, tables collected from them, and what texts say of it."""

import csv
import json
import math
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

from mnistlib import MODELS, RECIPES, Config, ConfigError, Evaluation, Run, build
from mnistlib.runtime import versions
from mniststudy.cli import main
from mniststudy.runs import ledger, pages, report
from mniststudy.runs.ledger import (
    COLUMNS,
    HOST_COLUMNS,
    POOL_COLUMNS,
    TABLES,
    LedgerError,
    append_rows,
    check_ledger,
    collect,
    commit,
    finished,
    read_results,
    record,
    record_pool,
    runs_for,
    without_host_columns,
)
from mniststudy.runs.pages import BEGIN, END, write_report
from mniststudy.runs.report import summary_sentence
from mniststudy.runs.sweep import sweep

COMMITTED = Path(__file__).parent.parent.parent / "outputs" / "results"
ROW = {"train_loss": 0.123456789, "val_loss": 0.2, "train_acc": 95.0, "lr": 1e-3, "seconds": 1.5}
TEST = Evaluation(0.05, 97, 100, (3, 14, 15))


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


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tables(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.csv")}


# Records


def test_a_finished_run_gives_one_row_and_its_epochs(run, runs_folder):
    run.history[0] |= {"val_loss": math.nan, "val_acc": math.nan}
    row = record(run, TEST, memory_mb=123)
    assert tuple(row) == COLUMNS
    assert {
        "config_hash": run.config.hash("mnist"), "seed": 3, "source": "mnist", "epochs": 2,
        "parameters": 13_912, "multiply_accumulates": 1_895_712, "n_val": 10_000, "threads": 1,
        "val_accuracy": 98.7654, "train_loss": 0.123457, "n_test": 100, "test_accuracy": 97.0,
        "memory_mb": 123, "optimizer_mb": None, "checkpoint_bytes": None,
    }.items() <= row.items()  # fmt: skip
    assert Config(**json.loads(row["config"])) == run.config
    path = runs_folder / run.config.run_name("mnist") / "run.json"
    content = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content["history"][0]["val_loss"] is None
    assert not (runs_folder / "runs.csv").exists()
    collect()
    (written,) = rows_of(runs_folder / "runs.csv")
    assert written == {k: "" if v is None else str(v) for k, v in row.items()}
    assert [e["val_acc"] for e in rows_of(runs_folder / "history.csv")] == ["", "98.76543"]
    (misread,) = rows_of(runs_folder / "misread.csv")
    assert (misread["n"], misread["wrong"], misread["seed"]) == ("100", "3 14 15", "3")


def test_a_record_is_whole_at_once_and_an_interrupted_run_has_none(run, tmp_path, monkeypatch):
    record(run, folder=tmp_path)
    (path,) = tmp_path.glob("*/run.json")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        record(run, TEST, folder=tmp_path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"interrupted.*resume"):
        record(replace(run, signal=2), folder=tmp_path / "ledger")


# Tables


def test_new_rows_follow_in_the_order_in_which_their_runs_finished(run, tmp_path, monkeypatch):
    hours = [datetime(2026, 11, 24, hour) for hour in (4, 3, 2, 1)]
    monkeypatch.setattr(ledger, "datetime", Mock(now=Mock(side_effect=hours)))
    for seed in (1, 2, 3, 4):
        record(other(run, seed), folder=tmp_path)
        if seed == 2:
            collect(tmp_path)
    collect(tmp_path)
    assert [row["seed"] for row in rows_of(tmp_path / "runs.csv")] == ["2", "1", "4", "3"]
    assert [row["seed"] for row in rows_of(tmp_path / "history.csv")] == list("22114433")


def test_a_row_without_a_test_figure_alone_gives_way_to_a_record_with_one(run, tmp_path):
    assert finished(tmp_path / "nowhere") == set()
    for seed in (1, 2, 3):
        record(other(run, seed), folder=tmp_path)
        collect(tmp_path)
    before = tables(tmp_path)
    assert finished(tmp_path, test=True) == set()
    again = replace(other(run, 2), seconds=2.5, history=[h | {"seconds": 9} for h in run.history])
    row = record(again, TEST, tmp_path)
    for _ in range(2):  # joined with the record, then collected
        assert len(finished(tmp_path)) == 3
        assert finished(tmp_path, test=True) == {(row["config_hash"], 2)}
        assert read_results(folder=tmp_path)["seconds"].tolist() == [1.5, 2.5, 1.5]
        assert read_results("history", tmp_path)["seconds"].tolist() == [1.5, 1.5, 9, 9, 1.5, 1.5]
        collect(tmp_path)
    after = tables(tmp_path)
    for name, changed in {"runs.csv": {2}, "history.csv": {3, 4}}.items():
        old, new = before[name].splitlines(), after[name].splitlines()
        assert {i for i in range(len(old)) if new[i] != old[i]} == changed
    for test in (None, Evaluation(0.07, 1, 100, (1,))):  # else the table counts
        record(replace(again, seconds=7.0), test, tmp_path)
        collect(tmp_path)
        assert tables(tmp_path) == after
    record(replace(run, source="sample"), folder=tmp_path)  # another run
    assert len(read_results(folder=tmp_path)) == 4


@pytest.mark.parametrize("whole", [1, 2])
def test_a_collection_cut_short_between_two_tables_is_made_whole_by_the_next(
    run, tmp_path, monkeypatch, whole
):
    for seed in (1, 2):
        record(other(run, seed), TEST, tmp_path)
    write, paths = ledger.write_atomically, []

    def killed(path, content):
        paths.append(path)
        if len(paths) > whole:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(ledger, "write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path)
    assert len(read_results(folder=tmp_path)) == 2
    monkeypatch.setattr(ledger, "write_atomically", write)
    collect(tmp_path)
    assert [len(rows_of(tmp_path / f"{name}.csv")) for name in TABLES] == [4, 2, 2]


def test_rows_written_at_the_same_time_are_neither_lost_nor_doubled(run, tmp_path):
    """Each call opens the lock's file anew, so threads exclude each other as processes do."""
    pool = tmp_path / "pools" / "12345678"
    pool.mkdir(parents=True)
    about = {"source": "mnist", "views": 2, "augmentation": {"degrees": 5}, "split": "none"}
    (pool / "pool.json").write_text(json.dumps(about | {"teachers": ["a-1", "b-2"]}))

    def work(number: int) -> None:
        record_pool(pool, tmp_path)
        for k in range(5):
            seed = 5 * number + k
            append_rows(tmp_path / "speed.csv", ("name", "seconds"), [{"seconds": seed}])
            record(other(run, seed), folder=tmp_path)
            collect(tmp_path)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert sorted(int(row["seconds"]) for row in rows_of(tmp_path / "speed.csv")) == [*range(15)]
    assert sorted(int(row["seed"]) for row in rows_of(tmp_path / "runs.csv")) == [*range(15)]
    assert len(rows_of(tmp_path / "history.csv")) == 30
    assert [row["pool"] for row in rows_of(tmp_path / "pools.csv")] == ["12345678"]


def test_what_looks_like_a_number_stays_a_name(run, tmp_path):
    for name in ("528686e9", "12345678"):
        about = dict.fromkeys(POOL_COLUMNS, name) | {"views": 20}
        append_rows(tmp_path / f"{name}.csv", POOL_COLUMNS, [about])
        table = read_results(name, tmp_path)
        assert table.iloc[0].to_dict() == about
        assert table["views"].dtype.kind == "i"
    row = record(run, Evaluation(0.05, 99, 100, (7,)), tmp_path)
    assert read_results("misread", tmp_path)["wrong"].tolist() == ["7"]
    row |= {"config_hash": "1e234567", "commit": "0012345", "recipe": "NA"}
    append_rows(tmp_path / "runs.csv", COLUMNS, [row])
    seen = read_results(folder=tmp_path).iloc[0]
    assert [seen[k] for k in ("config_hash", "commit", "recipe")] == ["1e234567", "0012345", "NA"]
    with pytest.raises(ValueError, match=r"\['colour'\] hold text; add them to `TEXT`"):
        append_rows(tmp_path / "new.csv", ("colour",), [{"colour": "12345678"}])


def test_rows_are_appended_to_other_tables(tmp_path):
    path = tmp_path / "new" / "speed.csv"
    append_rows(path, ("name", "seconds"), [{"name": "a, b", "seconds": 1}])
    append_rows(path, ("name", "seconds"), [{"name": 'c "d"', "seconds": None}])
    assert path.read_text() == 'name,seconds\n"a, b",1\n"c ""d""",\n'
    with pytest.raises(LedgerError, match=r"nothing\.csv is not there .*name a folder"):
        read_results("nothing", tmp_path)


def test_what_a_host_may_change_is_left_out_of_a_comparison(run, tmp_path):
    ledgers = []
    for name, seconds, seeds in (("a", 1.5, (1, 2)), ("b", 9.0, (2, 1)), ("c", 1.5, (1, 3))):
        for seed in seeds:
            record(replace(other(run, seed), seconds=seconds), TEST, tmp_path / name)
            collect(tmp_path / name)
        ledgers.append(without_host_columns("runs", tmp_path / name))
    here, there, different = ledgers
    assert set(COLUMNS) - set(here) == set(HOST_COLUMNS)
    assert here.equals(there)
    assert not here.equals(different)


# What is no ledger


HEADER = ",".join(TABLES["misread"]).encode()
WHOLE = HEADER + b"\n12345678,0,10,\n"
BROKEN = {
    "a directory": (None, "cannot be read as a table .Is a directory.; move it away"),
    "an empty file": (b"", "has other columns than it should"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "cannot be read as a table .*utf-8"),
    "another table": (b"a,b\n1,2\n", r"has other columns than it should .'a, b"),
    "a short row": (WHOLE + b"12345678,1,10\n", r"line 3 of .* is not a whole row; restore"),
    "a long row": (WHOLE + b"12345678,1,10,3,4\n", r"line 3 of .* is not a whole row"),
    "no seed": (WHOLE + b"12345678,1.0,10,\n", r"line 3 of .* is not a whole row"),
    "an open quote": (WHOLE + b'12345678,1,10,"3\n', "cannot be read as a table"),
}


def test_a_byte_order_mark_before_a_table_is_no_part_of_it(run, tmp_path):
    record(run, TEST, tmp_path)
    collect(tmp_path)
    before = tables(tmp_path)
    for path in tmp_path.glob("*.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_results(folder=tmp_path)["recipe"].tolist() == ["custom"]
    record(other(run, 5), TEST, tmp_path)
    collect(tmp_path)
    for name, raw in tables(tmp_path).items():
        assert raw.startswith(before[name])


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_table_is_refused_in_a_sentence_and_stays(tmp_path, what):
    content, fault = BROKEN[what]
    path = tmp_path / "misread.csv"
    path.mkdir() if content is None else path.write_bytes(content)
    for use in (
        lambda: check_ledger(tmp_path),
        lambda: collect(tmp_path),
        lambda: read_results("misread", tmp_path),
        lambda: append_rows(path, TABLES["misread"], []),
    ):
        with pytest.raises(LedgerError, match=fault) as error:
            use()
        assert "misread.csv" in str(error.value)
    assert path.is_dir() if content is None else path.read_bytes() == content


def test_a_broken_record_is_refused_in_a_sentence(tmp_path, run):
    record(run, TEST, tmp_path)
    (path,) = tmp_path.glob("*/run.json")
    content = json.loads(path.read_text())
    row = {column: value for column, value in content["row"].items() if column != "finished"}
    wrong = [content], {"row": content["row"]}, content | {"row": row}, content | {"history": None}
    for broken in (b"\xff\xfe", path.read_bytes()[:-1], *(json.dumps(w).encode() for w in wrong)):
        path.write_bytes(broken)
        for use in (check_ledger, collect, finished, lambda folder: read_results(folder=folder)):
            with pytest.raises(LedgerError, match=r"run\.json is not the record .*; remove it"):
                use(tmp_path)


def test_a_folder_that_cannot_be_one_is_refused_in_a_sentence(tmp_path, run):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "ledger", Path("/proc/mnistlib")):
        for use in (check_ledger, lambda folder: record(run, folder=folder)):
            with pytest.raises(LedgerError, match=r"cannot be used now \(.*another folder"):
                use(folder)


def test_a_name_that_stood_for_another_network_is_refused(run, tmp_path, monkeypatch, capsys):
    small = replace(run.config, model="net-697", seed=1)
    record(made_up(small), folder=tmp_path)
    check_ledger(tmp_path, [run.config, small])
    monkeypatch.setitem(MODELS, "net-697", "c8k5s2p full")
    check_ledger(tmp_path, [run.config])
    for use in (check_ledger, lambda folder, runs: sweep(runs, folder)):
        with pytest.raises(LedgerError, match=r"'net-697' .* of 693 .* it now has 4136 "):
            use(tmp_path, [replace(small, seed=2)])
    assert main(["train", "--model", "net-697", "--ledger", str(tmp_path), "--data", "none"]) == 1
    assert "it now has 4136 " in capsys.readouterr().err


def test_the_commit_is_never_that_of_a_foreign_clone_around_it(tmp_path, monkeypatch):
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", "x")):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    for root, known in ((tmp_path, True), (tmp_path / "env", False)):
        (root / "mniststudy" / "runs").mkdir(parents=True)
        monkeypatch.setattr(ledger, "__file__", str(root / "mniststudy" / "runs" / "ledger.py"))
        assert bool(commit.__wrapped__()) == known


# The committed ledger


def test_the_committed_ledger_keeps_every_byte_and_a_new_run_is_a_line_at_its_end(tmp_path, run):
    copy = Path(shutil.copytree(COMMITTED, tmp_path / "copy"))
    before = tables(copy)
    check_ledger(copy, RECIPES.values())  # whose networks are what they were
    collect(copy)
    for name in ("speed", "curves", "faults", "pools"):
        append_rows(copy / f"{name}.csv", tuple(rows_of(copy / f"{name}.csv")[0]), [])
    assert tables(copy) == before
    record(run, TEST, copy)
    collect(copy)
    for name, n in {"runs.csv": 1, "history.csv": 2, "misread.csv": 1}.items():
        after = (copy / name).read_bytes()
        assert after.startswith(before[name])
        assert after[len(before[name]) :].count(b"\n") == n


def test_every_column_of_text_in_the_committed_tables_is_known():
    for path in COMMITTED.glob("*.csv"):
        known = pd.read_csv(path, dtype={"config_hash": str, "commit": str})
        table = read_results(path.stem)
        pd.testing.assert_frame_equal(table, known)
        text = set(table) - set(table.select_dtypes("number"))
        assert text - {"wrong"} <= ledger.TEXT, path.name


def test_the_runs_of_a_config_are_those_whose_own_config_is_the_same():
    """By the hash of each row's seed, which is quicker than building each row's Config."""
    runs, config = read_results(), replace(RECIPES["reference"], seed=7, threads=2)
    free = {"seed": 0, "threads": 0, "device": "auto"}
    wanted = [
        replace(Config(**json.loads(c)), **free) == replace(config, **free) for c in runs["config"]
    ]
    assert runs_for(config).equals(runs[wanted].query("seed < 100"))  # others served to choose
    assert len(runs_for(config)) >= 20


def test_seeds_from_100_served_to_choose_and_are_no_result(run, tmp_path):
    for seed in (0, 99, 100):
        record(other(run, seed), folder=tmp_path)
    assert runs_for(run.config, tmp_path)["seed"].tolist() == [0, 99]


# The report


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Two texts with marks for three blocks and something around them."""

    def a():
        return "| a |"

    def b():
        return "| b |"

    def c():
        return "c"

    monkeypatch.setattr(pages, "BLOCKS", {"README.md": (a, b), "docs.md": (c,)})
    for name, blocks in pages.BLOCKS.items():
        names = [block.__name__ for block in blocks]
        marks = "\n\n".join(f"{BEGIN.format(name)}\nold\n{END.format(name)}" for name in names)
        text = f"# Title\n\n{marks}\n\nThe rest: 100 %, ±.\n"
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "README.md", tmp_path / "docs.md"


def test_the_report_goes_between_its_marks(texts):
    before = [text.read_text(encoding="utf-8") for text in texts]
    root = texts[0].parent
    assert write_report(check=True, root=root)
    assert [text.read_text(encoding="utf-8") for text in texts] == before
    assert write_report(root=root)
    after = [text.read_text(encoding="utf-8") for text in texts]
    assert not write_report(root=root)
    assert after[0] == before[0].replace("old", "| a |", 1).replace("old", "| b |", 1)
    assert after[1] == before[1].replace("old", "c")


def test_a_text_without_its_marks_stays_as_it_is_and_so_does_the_one_before(texts):
    root, path = texts[0].parent, texts[1]
    text, first, last = path.read_text("utf-8"), BEGIN.format("c"), END.format("c")
    readme = texts[0].read_text("utf-8")
    swapped = text.replace(last, "").replace(first, f"{last} between {first}")
    for wrong in (text.replace(last, ""), text.replace(first, ""), swapped):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(LedgerError, match=r"docs\.md must have the marks"):
            write_report(root=root)
        assert (path.read_text("utf-8"), texts[0].read_text("utf-8")) == (wrong, readme)
    path.unlink()
    with pytest.raises(LedgerError, match=r"docs\.md is not there"):
        write_report(root=root)


def test_how_many_times_as_fast_is_a_ratio_within_a_round_of_the_last_session(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(ledger, "outputs_folder", lambda: tmp_path)
    run = made_up(RECIPES["reference"], 98.0)
    for row, accuracy in zip(run.history, (97.0, 98.9, 98.0, 99.1), strict=False):
        row["val_acc"] = accuracy
    record(run, folder=tmp_path / "results")
    lines = [
        "go,kind,name,repetition,seconds,threads,images,evaluation_seconds,whole_images,evaluations",
        "1,run,fast,1,99,2,1000,0.5,1000,0",  # an earlier session
        # rounds of 20 epochs of 18 s and 2 s of evaluation, then of 21 s and 3 s
        "2,run,conventional,1,18,2,50000,2,1000000,20",
        "2,run,fast,1,20,2,1000,0.5,1000,0",
        "2,run,conventional,2,21,2,50000,3,1000000,20",
        "2,run,fast,2,16,2,1000,0.5,1000,0",
        "2,run,sprint,2,4,2,1000,0.5,1000,0",  # until 99.0 %, which is in the fourth epoch of 20
    ]
    (tmp_path / "results" / "speed.csv").write_text("\n".join(lines))
    found = report.speed_ratios()
    assert found["seconds"].tolist() == [400, 20, 480, 16, 4]
    assert found["ratio"].tolist() == pytest.approx([1, 20, 1, 30, 480 / 4 * 4 / 20])
    for seed in (1, 2):  # most seeds never reach 99.0 %
        record(replace(made_up(replace(run.config, seed=seed), 98.0)), folder=tmp_path / "results")
    assert report.speed_ratios()["ratio"].iloc[-1] == math.inf


def test_a_recipe_is_quoted_with_its_mean_and_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "outputs_folder", lambda: tmp_path)
    for seed, accuracy in enumerate([99.0, 99.2, 99.4]):
        run = made_up(replace(RECIPES["reference"], seed=seed), accuracy)
        record(run, folder=tmp_path / "results")
    assert summary_sentence("reference") == (
        "reference: 99.20 % validation accuracy after 1,000,000 images in 20 epochs, mean of "
        "n = 3 seeds (range 99.00 to 99.40), last epoch, 10,000 validation images, 13,912 "
        "parameters"
    )
    for seed in range(3):  # all but one are tested
        run = replace(made_up(replace(RECIPES["teacher"], seed=seed), math.nan), n_val=0)
        record(run, Evaluation(0.1, 99, 100) if seed < 2 else None, tmp_path / "results")
    assert "99.00 % test accuracy" in summary_sentence("teacher")
    assert "mean of n = 2 seeds" in summary_sentence("teacher")
    with pytest.raises(LedgerError, match="no run of the recipe 'sprint' as it is now"):
        summary_sentence("sprint")
    with pytest.raises(ConfigError, match="recipe is 'slow', but it must be one of"):
        summary_sentence("slow")


def test_a_range_says_of_how_many_values_it_is_where_some_are_missing(monkeypatch):
    rows = runs_for(RECIPES["reference"]).reset_index(drop=True)
    monkeypatch.setattr(report, "runs_for", lambda config: rows)
    some = f", n = {len(rows) - 1} of {len(rows)})"
    assert some not in report.promises()
    rows.loc[0, ["val_accuracy", "seconds"]] = math.nan  # a mean with its range and a median
    assert report.promises().count(some) == 2
