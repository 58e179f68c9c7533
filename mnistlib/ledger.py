"""The ledger: one CSV row per finished run, one per epoch, and what is read off them."""

import csv
import io
import json
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import Budget
from .checkpoint import versions
from .config import Config, outputs_folder, runs_folder
from .evaluate import Evaluation
from .train import Run

if TYPE_CHECKING:
    import pandas as pd

# what a row says is written down in outputs/README.md
COLUMNS = (
    "recipe", "config_hash", "seed", "source", "split", "model", "parameters",
    "multiply_accumulates", "epochs", "n_val", "val_accuracy", "val_loss", "train_accuracy",
    "train_loss", "n_test", "test_accuracy", "test_loss", "seconds", "memory_mb", "optimizer_mb",
    "checkpoint_bytes", "device", "threads", "torch", "python", "platform", "commit", "finished",
    "config",
)  # fmt: skip
# columns that may differ where the same run was made by another process, machine or engine
OF_THE_HOST = (
    "seconds", "memory_mb", "optimizer_mb", "checkpoint_bytes", "platform", "python", "commit",
    "finished",
)  # fmt: skip
MISREAD_COLUMNS = ("config_hash", "seed", "n", "wrong")
EPOCH_COLUMNS = (
    "config_hash", "seed", "epoch", "train_loss", "val_loss", "train_acc", "val_acc", "lr",
    "seconds",
)  # fmt: skip


def record(
    run: Run,
    test: Evaluation | None = None,
    folder: Path | None = None,
    memory_mb: float | None = None,
    optimizer_mb: float | None = None,
) -> dict[str, object]:
    """Append a finished run to `runs.csv` and its epochs to `history.csv`; return the row.

    Which test images it misread, where it saw them, goes to `misread.csv`.

    A run that is there already (same config hash and seed) is not written again.

    Args:
        run: the run; interrupted ones are refused.
        test: its final weights on the test set, where they were evaluated.
        folder: the ledger's folder; by default `runs_folder()`, which git ignores.
        memory_mb: peak resident size that the process added above `import torch`, in MB.
        optimizer_mb: how much of it the mere making of a torch optimizer adds.

    Raises:
        ValueError: the run was interrupted.
    """
    if run.interrupted:
        raise ValueError("an interrupted run has no row in the ledger; resume it first")
    folder = folder or runs_folder()
    digest, last, known = run.config.hash(run.source), run.history[-1], versions()
    row = {
        "recipe": run.config.recipe,
        "config_hash": digest,
        "seed": run.config.seed,
        "source": run.source,
        "split": run.config.split,
        "model": run.config.model,
        "parameters": run.parameters,
        "multiply_accumulates": Budget(run.model).multiply_accumulates,
        "epochs": run.config.epochs,
        "n_val": run.n_val,
        "val_accuracy": round(last["val_acc"], 4),
        "val_loss": round(last["val_loss"], 6),
        "train_accuracy": round(last["train_acc"], 4),
        "train_loss": round(last["train_loss"], 6),
        "n_test": test.n if test else None,
        "test_accuracy": round(test.accuracy, 4) if test else None,
        "test_loss": round(test.loss, 6) if test else None,
        "seconds": round(run.seconds, 1),
        "memory_mb": None if memory_mb is None else round(memory_mb),
        "optimizer_mb": None if optimizer_mb is None else round(optimizer_mb),
        "checkpoint_bytes": run.checkpoint.stat().st_size if run.checkpoint else None,
        "device": run.device,
        "threads": run.threads,
        "torch": known["torch"],
        "python": known["python"],
        "platform": known["platform"],
        "commit": commit(),
        "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "config": json.dumps(asdict(run.config)),
    }
    epochs = [{"config_hash": digest, "seed": run.config.seed, **h} for h in run.history]
    for e in epochs:
        e.update({k: round(v, 8) for k, v in e.items() if isinstance(v, float)})
    # the run itself comes last: what a kill leaves behind before it is made whole the next time
    append(folder / "history.csv", EPOCH_COLUMNS, epochs, ("config_hash", "seed", "epoch"))
    if test:
        wrong = " ".join(map(str, test.wrong))
        misread = {"config_hash": digest, "seed": run.config.seed, "n": test.n, "wrong": wrong}
        append(folder / "misread.csv", MISREAD_COLUMNS, [misread], ("config_hash", "seed"))
    append(folder / "runs.csv", COLUMNS, [row], ("config_hash", "seed"))
    return row


def append(
    path: Path,
    columns: tuple[str, ...],
    rows: list[dict[str, object]],
    by: tuple[str, ...] = (),
) -> None:
    """Append rows to a table, one process at a time; a line that a kill cut short is removed.

    Args:
        path: of the table; made with its header if it is not there.
        columns: of the table.
        rows: what to append, in one write.
        by: columns that together identify a row: rows that are there are left out.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.parent / ".lock"), path.open("a+b", buffering=0) as file:
        file.seek(0)
        whole = _whole_lines(file.read())
        file.truncate(len(whole.encode()))
        known = {tuple(row[c] for c in by) for row in csv.DictReader(io.StringIO(whole))}
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if not whole:
            writer.writeheader()
        writer.writerows(r for r in rows if not by or tuple(str(r[c]) for c in by) not in known)
        file.write(text.getvalue().encode())


def finished(path: Path, by: str = "config_hash") -> set[tuple[str, int]]:
    """Return config hash (or what else identifies a run) and seed of every run in a table."""
    if not path.exists():
        return set()
    rows = csv.DictReader(io.StringIO(_whole_lines(path.read_bytes())))
    return {(row[by], int(row["seed"])) for row in rows}


def _whole_lines(raw: bytes) -> str:
    """Return a table's text without a last line that has no end: its row was never finished."""
    return raw[: raw.rfind(b"\n") + 1].decode()


@cache
def commit() -> str:
    """Return the short commit of the checkout, `+` behind it if files differ; empty if unknown.

    It is asked once a process, and by those who train before they do: the code may change later.
    """
    here = Path(__file__).parent
    try:
        ask = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def read_results(name: str = "runs", folder: Path | None = None) -> "pd.DataFrame":
    """Return a table of the committed ledger: `runs` or `history`, in the order of its rows."""
    import pandas as pd

    path = (folder or outputs_folder() / "results") / f"{name}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; the ledger is part of the repository")
    return pd.read_csv(path, dtype={"config_hash": str, "commit": str})


def comparable(name: str = "runs", folder: Path | None = None) -> "pd.DataFrame":
    """Return a table sorted and without columns of time and host: equal whoever made the runs."""
    table = read_results(name, folder)
    by = [c for c in ("config_hash", "seed", "epoch") if c in table]
    table = table.drop(columns=[c for c in OF_THE_HOST if c in table])
    return table.sort_values(by, ignore_index=True)


def runs_of(config: Config, folder: Path | None = None) -> "pd.DataFrame":
    """Return the committed runs of a Config, whatever their seeds, devices and threads."""
    runs = read_results(folder=folder)
    wanted = [
        Config(**json.loads(c) | {"seed": config.seed}).hash("mnist") == config.hash("mnist")
        for c in runs["config"]
    ]
    return runs[wanted]


def quote(recipe: str, folder: Path | None = None) -> str:
    """Say in a sentence what the committed runs of a recipe reach at their last epoch.

    Raises:
        ValueError: the ledger has no run of that recipe.
    """
    runs = read_results(folder=folder)
    rows = runs[runs["recipe"] == recipe]
    if rows.empty:
        raise ValueError(f"the ledger has no run of the recipe {recipe!r}")
    last = rows.iloc[-1]
    part, kind = ("val", "validation") if last["n_val"] else ("test", "test")
    seen = rows[f"{part}_accuracy"]
    return (
        f"{recipe}: {seen.mean():.2f} % {kind} accuracy after {images_seen(last):,} images in "
        f"{last['epochs']} epochs, mean of n = {len(rows)} seeds (range {seen.min():.2f} to "
        f"{seen.max():.2f}), last epoch, {int(last[f'n_{part}']):,} {kind} images, "
        f"{last['parameters']:,} parameters"
    )


def images_seen(row: "pd.Series") -> int:
    """Return how many training images a run of the ledger saw, repetitions counted."""
    return int(row["epochs"]) * (json.loads(row["config"])["epoch_images"] or 60_000 - row["n_val"])
