"""The ledger: one record per finished run, and the CSV tables collected from the records."""

import csv
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnistlib import Budget, Config, Evaluation, MnistlibError, Run
from mnistlib.paths import only_here, outputs_folder, runs_folder, write_atomically

if TYPE_CHECKING:
    import pandas as pd

# explained in outputs/README.md
COLUMNS = (
    "recipe", "config_hash", "seed", "source", "split", "model", "parameters",
    "multiply_accumulates", "epochs", "n_val", "val_accuracy", "val_loss", "train_accuracy",
    "train_loss", "n_test", "test_accuracy", "test_loss", "seconds", "memory_mb", "optimizer_mb",
    "checkpoint_bytes", "device", "threads", "torch", "python", "platform", "commit", "finished",
    "config",
)  # fmt: skip
EPOCH_COLUMNS = (
    "config_hash", "seed", "epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr",
    "seconds",
)  # fmt: skip
MISREAD_COLUMNS = ("config_hash", "seed", "n", "wrong")
POOL_COLUMNS = ("pool", "source", "split", "views", "augmentation", "teachers")
# in the order of writing: a run in `runs` must already be complete in the others
TABLES = {"history": EPOCH_COLUMNS, "misread": MISREAD_COLUMNS, "runs": COLUMNS}
# The columns of text of all tables; the rest are numbers. A hash such as 528686e9 or 12345678 would
# be read as one, so rows with text in another column are not written
TEXT = frozenset((
    "recipe", "config_hash", "source", "split", "model", "device", "torch", "python", "platform",
    "commit", "finished", "config", "pool", "augmentation", "teachers", "go", "kind", "name",
    "base", "network", "runtime", "onnxruntime", "fault", "what", "how", "case",
))  # fmt: skip
# whole numbers, which no row lacks
WHOLE = frozenset(("seed", "epoch", "epochs", "n_val", "threads"))
# what the report reads in tables that are not collected from records
READ = {
    "claims": "parameters accuracy how source",
    "published": "epoch val_loss val_acc",
    "speed": "go kind name repetition threads images seconds whole_images evaluations "
    "evaluation_seconds",
    "latency": "go network runtime batch repetition calls seconds parameters",
    "robustness": "case severity recipe accuracy",
    "pictures": "kind n right confident",
    "faults": "fault what tries bad finished",
}
# columns that may differ between the same run in another process or on another machine
HOST_COLUMNS = (
    "seconds", "memory_mb", "optimizer_mb", "checkpoint_bytes", "platform", "python", "commit",
    "finished",
)  # fmt: skip

Rows = list[dict[str, Any]]


class LedgerError(MnistlibError):
    """A table or record of the ledger is missing, damaged or cannot be written."""


# what is read within stays so until it is written
_writing = partial(only_here, name=".lock", error=LedgerError)


def record(
    run: Run,
    test: Evaluation | None = None,
    folder: Path | None = None,
    memory_mb: int | None = None,
    optimizer_mb: int | None = None,
) -> dict[str, Any]:
    """Write the record of a finished run, `run.json` in the run's own folder; return its row.

    The file holds the row of `runs.csv`, the rows of `history.csv`, and the positions of the
    misclassified test images. It is written atomically and replaces an earlier one of the run.

    Args:
        run: a finished run.
        test: evaluation of its final weights on the test set, if there was one.
        folder: the ledger's folder; by default `runs_folder()`, which git ignores.
        memory_mb: peak resident memory of the process beyond that after `import torch`, in MB.
        optimizer_mb: the part of it that creating the first torch optimizer adds.

    Raises:
        LedgerError: the folder cannot be written to.
        ValueError: the run was interrupted.
    """
    if run.interrupted:
        raise ValueError("an interrupted run has no row in the ledger; resume it first")
    key = {"config_hash": run.config.hash(run.source), "seed": run.config.seed}
    settings, last = asdict(run.config), run.history[-1]
    row = settings | run.versions | key | {
        "recipe": run.config.recipe, "source": run.source, "parameters": run.parameters,
        "multiply_accumulates": Budget(run.model).multiply_accumulates, "n_val": run.n_val,
        "val_accuracy": round(last["val_acc"], 4), "val_loss": round(last["val_loss"], 6),
        "train_accuracy": round(last["train_acc"], 4), "train_loss": round(last["train_loss"], 6),
        "n_test": test and test.n, "test_accuracy": test and round(test.accuracy, 4),
        "test_loss": test and round(test.loss, 6), "seconds": round(run.seconds, 1),
        "memory_mb": memory_mb, "optimizer_mb": optimizer_mb,
        "checkpoint_bytes": run.checkpoint and run.checkpoint.stat().st_size,
        "threads": int(run.versions["threads"]), "commit": commit(),
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "config": json.dumps(settings),
    }  # fmt: skip
    content = {
        "row": {column: row[column] for column in COLUMNS},
        "history": [key | {k: round(v, 8) for k, v in epoch.items()} for epoch in run.history],
        "wrong": test and test.wrong,
    }
    # JSON has no nan: null means not measured
    content = json.loads(json.dumps(content), parse_constant=lambda nan: None)
    folder = folder or runs_folder()
    path = folder / run.config.run_name(run.source) / "run.json"
    with _writing(folder):
        write_atomically(path, json.dumps(content, indent=1).encode())
    return content["row"]


def collect(folder: Path | None = None) -> None:
    """Update the tables of a ledger from the records in its folder.

    Existing rows keep their order and text; new ones follow in the order in which their runs
    finished. If table and record both have a run, the table counts, except that a record with test
    results replaces a row without them. Records are not removed.

    Raises:
        LedgerError: a table or a record is damaged, or the folder cannot be written to.
    """
    folder = folder or runs_folder()
    with _writing(folder):
        for name, rows in _with_records(folder).items():
            if rows != _read_table(path := folder / f"{name}.csv"):
                _write_table(path, TABLES[name], rows)


def check_ledger(folder: Path | None = None, configs: Iterable[Config] = ()) -> None:
    """Check, before anything is trained, that a ledger can be read and written.

    A config hash has the name of a network, not what the name stands for. So the networks of
    `configs` must be as large as in the rows that the ledger has of them.

    Raises:
        LedgerError: a table or a record is damaged, the folder cannot be written to, or a name
            stood for another network.
    """
    folder = folder or runs_folder()
    with _writing(folder):
        rows = _with_records(folder)["runs"]
    size = "{parameters} parameters and {multiply_accumulates} multiply-accumulates"
    for name in {config.model for config in configs}:
        now = size.format_map(vars(Budget(name)))
        for was in {size.format_map(row) for row in rows if row["model"] == name} - {now}:
            fault = f"in the ledger in {folder}, {name!r} is a network of {was}; it now has {now}"
            raise LedgerError(f"{fault}: give it another name, or name another ledger")


def finished(folder: Path | None = None, test: bool = False) -> set[tuple[str, int]]:
    """Return config hash and seed of each run in a ledger; with `test`, only of those tested.

    Raises:
        LedgerError: a table or a record is damaged.
    """
    rows = _with_records(folder or runs_folder(), ("runs",))["runs"]
    return {(r["config_hash"], int(r["seed"])) for r in rows if not test or _tested(r)}


def append_rows(path: Path, columns: Sequence[str], rows: Rows) -> None:
    """Append rows to a table that is not collected from records; a missing one is created.

    Any number of processes may append to a table at the same time.

    Raises:
        LedgerError: the file has other columns, is no table, or cannot be written.
        ValueError: there is text in a column that would be read as numbers.
    """
    odd = {key for row in rows for key, value in row.items() if isinstance(value, str)} - TEXT
    if odd & {*columns}:
        raise ValueError(f"{sorted(odd)} hold text; add them to `TEXT` of the ledger")
    with _writing(path.parent):
        _write_table(path, columns, [*_read_table(path, columns), *rows])


def record_pool(pool: Path, folder: Path | None = None) -> None:
    """Add a pool to `pools.csv`, with what it is made of, unless it is there.

    Args:
        pool: its folder.
        folder: the ledger's folder; by default `runs_folder()`.

    Raises:
        LedgerError: `pools.csv` is another table, or cannot be written.
    """
    path = (folder or runs_folder()) / "pools.csv"
    about = json.loads((pool / "pool.json").read_bytes())
    others = {"others": about["others"]} if "others" in about else {}
    amounts = ", ".join(f"{k} {v:g}" for k, v in (about["augmentation"] | others).items())
    about |= {"augmentation": amounts, "teachers": " ".join(about["teachers"]), "pool": pool.name}
    with _writing(path.parent):
        known = _read_table(path, POOL_COLUMNS)
        if pool.name not in [row["pool"] for row in known]:
            _write_table(path, POOL_COLUMNS, [*known, about])


def read_results(name: str = "runs", folder: Path | None = None) -> "pd.DataFrame":
    """Return a table of the ledger, followed by the rows of records that are not yet collected.

    Args:
        name: `runs`, `history`, `misread`, or another CSV file of the folder.
        folder: the ledger's folder; by default that of the committed ledger.

    Raises:
        LedgerError: the table is missing, empty or damaged.
    """
    import pandas as pd  # here, because training one network does not need it

    folder = folder or outputs_folder() / "results"
    path, known = folder / f"{name}.csv", name in TABLES
    rows = _with_records(folder, ("runs", name))[name] if known else _read_table(path)
    if not rows:
        raise LedgerError(f"{path} is not there or has no rows; name a folder that holds a ledger")
    if lacks := {*READ.get(name, "").split()} - rows[0].keys():
        raise LedgerError(f"{path} has no column {min(lacks)!r}; restore the file")
    table = io.StringIO(_text(TABLES.get(name, tuple(rows[0])), rows))
    text = dict.fromkeys(TEXT | {"wrong"} if name == "misread" else TEXT, str)
    found = pd.read_csv(table, dtype=text, keep_default_na=False, na_values=["", "nan"])
    for column in found.columns.difference([*text]):
        if found[column].dtype.kind not in "iuf":
            fault = f"{path} has something else than numbers in the column {column!r}"
            raise LedgerError(f"{fault}; restore the file")
    return found


def without_host_columns(name: str = "runs", folder: Path | None = None) -> "pd.DataFrame":
    """Return a table, sorted and without columns of time and host, to compare runs of two hosts."""
    table = read_results(name, folder).drop(columns=list(HOST_COLUMNS), errors="ignore")
    by = [column for column in ("config_hash", "seed", "epoch") if column in table]
    return table.sort_values(by, ignore_index=True)


def runs_for(config: Config, folder: Path | None = None, source: str = "mnist") -> "pd.DataFrame":
    """Return the runs on MNIST of a Config with any seed below 100, device and number of threads.

    Seeds from 100 served to choose settings, so they are no part of a result. With `source`, those
    on other images.
    """
    runs = read_results(folder=folder).query("source == @source and seed < 100")
    wanted = {replace(config, seed=seed).hash(source) for seed in runs["seed"].unique()}
    return runs[runs["config_hash"].isin(wanted)]


def config_in(text: str) -> Config:
    """Return the settings of a run of the ledger from its column `config`.

    Raises:
        LedgerError: they are not the settings of a run.
    """
    try:
        return Config(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        fault = f"a row of the ledger has as its config {text!r:.60}, which is damaged ({error})"
        raise LedgerError(f"{fault}; restore the table") from None


def images_seen(row: "pd.Series") -> int:
    """Return how many training images a run of the ledger used, counting repetitions."""
    return int(row["epochs"]) * (config_in(row["config"]).epoch_images or 60_000 - row["n_val"])


def whole_seconds(timings: "pd.DataFrame") -> "pd.Series":
    """Return the seconds of whole trainings, evaluations included, from rows of `speed`."""
    pace = timings["seconds"] / timings["images"]
    evaluating = timings["evaluation_seconds"].fillna(0) * timings["evaluations"]
    return pace * timings["whole_images"] + evaluating


@cache
def commit() -> str:
    """Return the short commit of the clone, with `+` if files differ; empty if unknown.

    It is cached, and read before training starts, because files may change during a run.
    """
    root = Path(__file__).resolve().parents[2]
    # an environment or an unpacked archive may lie in the clone of something else
    ask = ["git", f"--git-dir={root / '.git'}", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(ask, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _with_records(folder: Path, names: Sequence[str] = tuple(TABLES)) -> dict[str, Rows]:
    """Return the rows of tables by name, including those of records."""
    tables: dict[str, dict[tuple[str, str], Rows]] = {name: {} for name in names}
    for name, runs in tables.items():
        for row in _read_table(folder / f"{name}.csv", TABLES[name]):
            runs.setdefault((row["config_hash"], row["seed"]), []).append(row)
    records = [_read_record(path) for path in sorted(folder.glob("*/run.json"))]
    for found in sorted(records, key=lambda f: (f["runs"][0]["finished"], f["runs"][0]["seed"])):
        (row,) = found["runs"]
        key = row["config_hash"], str(row["seed"])
        known = tables["runs"].get(key)
        if not known or (_tested(row) and not _tested(known[0])):
            for name, runs in tables.items():
                runs[key] = found[name]
    return {name: [row for rows in runs.values() for row in rows] for name, runs in tables.items()}


def _tested(row: Mapping[str, Any]) -> bool:
    return row["test_accuracy"] not in ("", None)


def _read_table(path: Path, columns: Sequence[str] = ()) -> Rows:
    """Return the rows of a table as text; a missing file has none.

    Raises:
        LedgerError: the file is no table or has other columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # editors may add a mark
            reader = csv.DictReader(file, strict=True)
            rows, header = list(reader), list(reader.fieldnames or ())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise LedgerError(f"{path} cannot be read as a table ({why}); move it away") from None
    if columns and header != list(columns):
        odd = ", ".join(sorted({*header} ^ {*columns}))
        raise LedgerError(f"{path} has other columns than it should ({odd!r:.60}); move it away")
    for line, row in enumerate(rows, start=2):
        if None in row or None in row.values() or not _are_whole(row):
            raise LedgerError(f"line {line} of {path} is not a whole row; restore the file")
    return rows


def _read_record(path: Path) -> dict[str, Rows]:
    """Return the rows of a record for each table, as text.

    Raises:
        LedgerError: the file is not the record of a run.
    """
    try:
        content = json.loads(path.read_bytes())
        row, wrong = content["row"], content["wrong"]
        config_in(row["config"])
        found = {"runs": [row], "history": content["history"], "misread": []}
        cells = [(c, r[c]) for name, rows in found.items() for r in rows for c in TABLES[name]]
        if all(_fits(*cell) for cell in cells) and all(map(_are_whole, [row, *found["history"]])):
            if wrong is not None:
                numbers = " ".join(f"{n:d}" for n in wrong)
                found["misread"] = [row | {"n": row["n_test"], "wrong": numbers}]
            return found
    except (OSError, ValueError, LookupError, TypeError, RecursionError, LedgerError):
        pass
    raise LedgerError(f"{path} is not the record of a run; remove it and train the run again")


def _fits(column: str, value: Any) -> bool:
    """Whether a value of a record can be written into a column of a table and read again."""
    if column in TEXT:
        return isinstance(value, str) and value.isprintable()
    whole = type(value) is int and abs(value) < 2**63
    return whole or value is None or isinstance(value, float)


def _are_whole(row: Mapping[str, Any]) -> bool:
    """Whether whole numbers are in the columns of a row that must have them."""
    values = (str(row[column]) for column in WHOLE & row.keys())
    return all(value.isdecimal() and len(value) < 19 for value in values)


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    lines = [columns, *([row.get(column) for column in columns] for row in rows)]
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _write_table(path: Path, columns: Sequence[str], rows: Rows) -> None:
    write_atomically(path, _text(columns, rows).encode())
