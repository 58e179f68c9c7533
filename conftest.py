"""What every pytest run of this repository shares, nbval's over the notebooks included."""

from pathlib import Path

import pytest

NOTEBOOK_RUNS = Path(__file__).parent / "outputs" / "runs" / "nbval"


def pytest_configure(config):
    """Refuse to hand the cells of one notebook to several workers, each with its own kernel."""
    how = config.getoption("dist", "no")
    if config.getoption("nbval", False) and how not in ("no", "loadscope", "loadfile"):
        raise pytest.UsageError(f"--nbval does not go with --dist {how}; add --dist loadscope")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """Give each notebook a folder of its own for its runs: two of them run at the same time."""
    with pytest.MonkeyPatch.context() as environment:
        if item.path.suffix == ".ipynb":  # its kernel is started here and inherits this
            from mniststudy.notebooks import kernel_environment

            for name, value in kernel_environment(NOTEBOOK_RUNS / item.path.stem).items():
                environment.setenv(name, value)
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Fail a cell that timed out, and those after it: nbval expects them to and lets them pass.

    The cell itself can pass too, if it takes the interrupt that nbval sends, as training does.
    """
    report = yield
    if call.when == "call" and getattr(item.parent, "timed_out", False) and not report.failed:
        report.outcome = "failed"
        report.longrepr = "a cell of this notebook was not run to its end in time"
    return report
