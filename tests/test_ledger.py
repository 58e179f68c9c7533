"""The ledger: a row per finished run, whoever else is writing, and a report that is its own."""

import contextlib
import csv
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pytest

from mnistlib import (
    RECIPES,
    Config,
    Evaluation,
    Run,
    build,
    ledger,
    read_results,
    record,
    report,
    train,
)
from mnistlib.ledger import COLUMNS, EPOCH_COLUMNS, runs_of
from mnistlib.report import BEGIN, END, write_report

ROW = {"train_loss": 0.123456789, "val_loss": 0.2, "train_acc": 95.0, "lr": 1e-3, "seconds": 1.5}
BLOCKS = ("headline", "speed", "promises")
MARKS = "\n\n".join(f"{BEGIN.format(name)}\nold\n{END.format(name)}" for name in BLOCKS)


def made_up(config: Config, val_acc: float = 98.76543) -> Run:
    """Return a finished run without training it."""
    history = [{"epoch": e + 1, "val_acc": val_acc, **ROW} for e in range(config.epochs)]
    model = build(config.model, config.dropout)
    return Run(config, "mnist", model, history, {}, 1.5, 10_000, None, "cpu", 1)


@pytest.fixture
def run(tiny_config):
    return made_up(tiny_config)


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


def test_a_finished_run_gives_one_row_and_its_epochs(tiny_config, tiny_digits, runs_folder):
    run = train(tiny_config, tiny_digits)
    row = record(run, Evaluation(0.05, 97, 100), memory_mb=123.4, optimizer_mb=45.6)
    assert tuple(row) == COLUMNS
    (written,) = rows_of(runs_folder / "runs.csv")
    assert written == {k: "" if v is None else str(v) for k, v in row.items()}
    last = run.history[-1]
    assert (row["config_hash"], row["seed"]) == (tiny_config.hash("mnist"), 3)
    assert (row["parameters"], row["epochs"], row["n_val"]) == (13_912, 2, 100)
    assert (row["val_accuracy"], row["n_test"], row["test_accuracy"]) == (last["val_acc"], 100, 97)
    assert row["train_loss"] == pytest.approx(last["train_loss"], abs=1e-6)
    assert (row["memory_mb"], row["optimizer_mb"]) == (123, 46)
    assert (row["device"], row["threads"]) == ("cpu", 1)
    assert row["checkpoint_bytes"] == run.checkpoint.stat().st_size
    epochs = rows_of(runs_folder / "history.csv")
    assert [tuple(e) for e in epochs] == [EPOCH_COLUMNS, EPOCH_COLUMNS]
    for there, here in zip(epochs, run.history, strict=True):
        assert (there["config_hash"], there["seed"]) == (row["config_hash"], "3")
        for key, value in here.items():
            assert float(there[key]) == pytest.approx(value, abs=1e-7)


def test_what_was_not_measured_is_an_empty_cell(run, runs_folder):
    record(run)
    (written,) = rows_of(runs_folder / "runs.csv")
    empty = ("n_test", "test_accuracy", "test_loss", "memory_mb", "optimizer_mb")
    assert {written[k] for k in (*empty, "checkpoint_bytes")} == {""}


def test_the_same_run_is_not_written_twice(run, tmp_path):
    record(run, folder=tmp_path)
    record(replace(run, seconds=99.0, threads=2), folder=tmp_path)
    assert len(rows_of(tmp_path / "runs.csv")) == 1
    assert len(rows_of(tmp_path / "history.csv")) == 2
    record(replace(run, config=replace(run.config, seed=4)), folder=tmp_path)
    record(replace(run, source="sample"), folder=tmp_path)
    assert len(rows_of(tmp_path / "runs.csv")) == 3
    assert len(rows_of(tmp_path / "history.csv")) == 6


def test_an_interrupted_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"interrupted.*resume"):
        record(replace(run, signal=2), folder=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_a_record_cut_short_can_be_made_again(run, tmp_path, monkeypatch):
    """A kill between the two files must not leave epochs that a second try doubles."""
    append, calls = ledger.append, count(1)

    def killed(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        append(*args)

    with monkeypatch.context() as m:
        m.setattr(ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            record(run, folder=tmp_path)
    record(run, folder=tmp_path)
    assert len(rows_of(tmp_path / "runs.csv")) == 1
    assert len(rows_of(tmp_path / "history.csv")) == 2


def test_the_config_of_a_row_builds_the_config_again(run, tmp_path):
    record(run, folder=tmp_path)
    (row,) = rows_of(tmp_path / "runs.csv")
    assert Config(**json.loads(row["config"])) == run.config


def test_read_results_gives_a_table(run, results):
    record(run, folder=results)
    table = read_results()
    assert tuple(table.columns) == COLUMNS
    assert table["val_accuracy"].tolist() == [98.7654]
    assert tuple(read_results("history").columns) == EPOCH_COLUMNS
    assert read_results("history", results)["epoch"].tolist() == [1, 2]


def test_a_hash_that_looks_like_a_number_stays_as_it_is(results):
    results.mkdir(parents=True)
    (results / "runs.csv").write_text("config_hash,commit,seed\n00123456,0012345,0\n12e45678,1,0\n")
    table = read_results()
    assert table["config_hash"].tolist() == ["00123456", "12e45678"]
    assert table["commit"].tolist() == ["0012345", "1"]


def test_a_ledger_that_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"runs\.csv is not there; .*repository"):
        read_results(folder=tmp_path)


def test_threads_that_start_a_ledger_at_once_write_one_header(run, tmp_path, monkeypatch):
    """Both are held where each has found no file; where only one may be there, it goes on."""
    both, header = threading.Barrier(2), csv.DictWriter.writeheader

    def meet(writer):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)
        return header(writer)

    monkeypatch.setattr(csv.DictWriter, "writeheader", meet)
    runs = [replace(run, config=replace(run.config, seed=seed)) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda r: record(r, folder=tmp_path), runs))
    assert sorted(row["seed"] for row in rows_of(tmp_path / "runs.csv")) == ["1", "2"]
    assert len(rows_of(tmp_path / "history.csv")) == 4


def test_threads_do_not_mix_their_lines(run, tmp_path):
    record(run, folder=tmp_path)
    runs = [replace(run, config=replace(run.config, seed=seed)) for seed in range(10, 26)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda r: record(r, folder=tmp_path), runs))
    rows = rows_of(tmp_path / "runs.csv")
    assert sorted(int(row["seed"]) for row in rows) == [3, *range(10, 26)]
    assert {Config(**json.loads(row["config"])).seed for row in rows} == {3, *range(10, 26)}
    assert len(rows_of(tmp_path / "history.csv")) == 2 * 17


def run_at_once(script, path) -> None:
    """Run a script in two processes, marked a and b, that begin together."""
    command = [sys.executable, "-c", script, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([*command, mark], **pipes) for mark in "ab"]
    for writer in writers:
        writer.stdout.readline()  # it has imported everything
    for writer in writers:  # both, before either is waited for
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0


def test_processes_do_not_mix_their_lines(tmp_path):
    script = """
import sys
from pathlib import Path
from mnistlib.ledger import append
path, mark = Path(sys.argv[1]), sys.argv[2]
print(flush=True)
sys.stdin.readline()
for i in range(200):
    append(path, ("who", "what"), [{"who": mark, "what": mark * 5000}, {"who": mark, "what": i}])
"""
    path = tmp_path / "rows.csv"
    ledger.append(path, ("who", "what"), [])
    run_at_once(script, path)
    rows = rows_of(path)
    for mark in "ab":
        own = [row["what"] for row in rows if row["who"] == mark]
        assert own == [text for i in range(200) for text in (mark * 5000, str(i))]
    assert len(rows) == 800


def test_processes_that_record_the_same_run_at_once_write_it_once(tmp_path):
    script = """
import sys
from pathlib import Path
from mnistlib.ledger import append
print(flush=True)
sys.stdin.readline()
for seed in range(100):
    rows = [{"run": "abc", "seed": seed, "text": sys.argv[2] * 3000}] * 2
    append(Path(sys.argv[1]), ("run", "seed", "text"), rows, ("run", "seed"))
"""
    path = tmp_path / "rows.csv"
    run_at_once(script, path)
    rows = rows_of(path)
    assert sorted(int(row["seed"]) for row in rows) == sorted([*range(100), *range(100)])
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first == second  # both lines of a run come from one process


@pytest.mark.parametrize("length", [1, 2, 5, 40, 100, -1])
def test_a_row_cut_short_by_a_kill_is_no_row_and_is_written_whole_the_next_time(
    run, tmp_path, length
):
    record(run, Evaluation(0.05, 97, 100, (3, 14, 15)), tmp_path)
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
    assert len(whole) == 3
    for name, content in whole.items():
        lines = content.splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[:-1]) + lines[-1][:-1][:length])
        assert len(ledger.finished(tmp_path / name)) == (name == "history.csv")
        record(run, Evaluation(0.05, 97, 100, (3, 14, 15)), tmp_path)
        again = (tmp_path / name).read_bytes()
        assert again.splitlines()[:-1] == content.splitlines()[:-1]
        assert len(again.splitlines()) == len(content.splitlines())
        if name != "runs.csv":  # whose rows say when they were written
            assert again == content


def test_the_test_images_misread_are_kept_with_the_run(run, tmp_path):
    record(run, Evaluation(0.05, 97, 100, (3, 14, 15)), tmp_path)
    record(run, Evaluation(0.05, 97, 100, (3, 14, 15)), tmp_path)
    (row,) = rows_of(tmp_path / "misread.csv")
    assert (row["n"], row["wrong"], int(row["seed"])) == ("100", "3 14 15", run.config.seed)


def committed(results) -> None:
    """Write a ledger of three runs of one recipe, one of another and one of none."""
    for seed, accuracy in enumerate([99.0, 99.2, 99.4]):
        run = made_up(replace(RECIPES["reference"], seed=seed), accuracy)
        run.history[4]["val_acc"] = accuracy + 0.3  # the best epoch is not the last
        test = Evaluation(0.05, 9_900 + seed, 10_000)
        record(run, test, results, memory_mb=100 + seed, optimizer_mb=60 + seed)
    record(made_up(RECIPES["fast"], 98.5), folder=results, memory_mb=90)
    record(made_up(Config(epochs=1, seed=7), 50.0), folder=results)
    (results / "published.csv").write_text("epoch,val_acc\n1,97.6\n2,98.8\n3,98.7\n")
    times = "".join(
        f"{go},run,{name},{seconds},2\n"
        for go, name, seconds in [
            ("1", "fast", 99), ("2", "conventional", 400), ("2", "fast", 21), ("2", "fast", 20),
            ("2", "fast", 18), ("2", "sprint", 4),
        ]
    )  # fmt: skip
    (results / "speed.csv").write_text("go,kind,name,seconds,threads\n" + times)


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
    reference, fast = [line for line in headline.splitlines() if line.startswith("| `")]
    assert reference == (
        "| `reference` | reference | 13,912 | 1,000,000 | 3 | 99.20 % [98.70 to 99.70] | "
        "99.01 % [98.99 to 99.03] | 0.010 |"
    )
    assert fast == (
        "| `fast` | early | 18,216 | 240,000 | 1 | 98.50 % (one seed) | not evaluated |  |"
    )
    assert (
        "| `reference` by the conventional loop | 2 | 1 | 400.0 (400.0 to 400.0) | 1.0 |  |"
        in speed
    )
    assert "| `fast` | 2 | 3 | 20.0 (18.0 to 21.0) | 20.0 | the whole" in speed  # the last go alone
    # all three made-up references are at 99.0 % in the first of their twenty epochs
    assert "| `sprint` | 2 | 1 | 4.0 (4.0 to 4.0) | 5.0 | the conventional run to 99.0 % |" in speed
    assert "best epoch | 98.80 % (one run) | 99.50 % (99.30 to 99.70) |" in promises
    assert "last epoch | 98.70 % (one run) | 99.20 % (99.00 to 99.40) |" in promises
    assert "| 102 MB above `import torch`, of which 62 MB come" in promises
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
    with pytest.raises(ValueError, match=r"README\.md must have the marks"):
        write_report()
    assert readme.read_text(encoding="utf-8") == text


def test_the_runs_of_a_config_are_its_seeds(results):
    committed(results)
    assert runs_of(replace(RECIPES["reference"], seed=9, threads=1))["seed"].tolist() == [0, 1, 2]
    assert len(runs_of(RECIPES["fast"])) == 1
    assert runs_of(RECIPES["sprint"]).empty


def test_a_recipe_is_quoted_with_its_mean_and_its_seeds(results):
    committed(results)
    assert ledger.quote("reference") == (
        "reference: 99.20 % validation accuracy after 1,000,000 images in 20 epochs, mean of "
        "n = 3 seeds (range 99.00 to 99.40), last epoch, 10,000 validation images, 13,912 "
        "parameters"
    )
    with pytest.raises(ValueError, match="no run of the recipe 'slow'"):
        ledger.quote("slow")
