"""What the fault tests share: their two lengths, and the table that the long form writes.

    @short_and_long(10, 200)
    def test_after_a_kill_nothing_is_lost(n, request):
        ...
        note(request, "kills while saving", "mnistlib", n, lost)

The short form always runs. The long one has the marker `stress`, so `make stress` runs it.
"""

from datetime import UTC, datetime

import pytest

from mnistlib.paths import outputs_folder
from mnistlib.runtime import versions
from mniststudy.runs.ledger import append_rows, commit

COLUMNS = ("fault", "what", "tries", "bad", "torch", "python", "platform", "commit", "finished")


def short_and_long(short: object, long: object) -> pytest.MarkDecorator:
    """Give a test its argument `n`: how often the fault is tried, or what else makes it long."""
    return pytest.mark.parametrize("n", [short, pytest.param(long, marks=pytest.mark.stress)])


def note(request: pytest.FixtureRequest, fault: str, what: str, tries: int, bad: int) -> None:
    """In the long form, write a row of `faults.csv`: of so many tries, `bad` did harm."""
    if request.node.get_closest_marker("stress"):
        row = versions() | {"fault": fault, "what": what, "tries": tries, "bad": int(bad)}
        row |= {"commit": commit(), "finished": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
        append_rows(outputs_folder() / "results" / "faults.csv", COLUMNS, [row])
