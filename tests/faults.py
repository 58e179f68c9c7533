"""What the fault tests share: their two lengths, and the table that the long form writes."""

import os
from datetime import UTC, datetime

from mnistlib.checkpoint import versions
from mnistlib.config import outputs_folder
from mnistlib.ledger import append, commit

STRESS = bool(os.environ.get("MNISTLIB_STRESS"))
FOLDER = outputs_folder() / "results"
COLUMNS = ("fault", "what", "tries", "bad", "torch", "python", "platform", "commit", "finished")


def tries(short: int, long: int) -> int:
    """Return how often a fault is tried: `make stress` takes the long form."""
    return long if STRESS else short


def note(fault: str, what: str, n: int, bad: int) -> None:
    """In the long form, write a row of `faults.csv`: of `n` tries of a fault, `bad` did harm."""
    if not STRESS:
        return
    known = versions()
    row = {"fault": fault, "what": what, "tries": n, "bad": bad, "commit": commit(),
           "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
           **{k: known[k] for k in ("torch", "python", "platform")}}  # fmt: skip
    append(FOLDER / "faults.csv", COLUMNS, [row])
