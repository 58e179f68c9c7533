"""How much memory this process has needed since this module was imported."""

import sys


def _peak_mb() -> float:
    if sys.platform == "win32":
        return 0.0  # unknown
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kB elsewhere


AT_IMPORT = _peak_mb()


def peak_memory_mb() -> int | None:
    """Return how far peak resident memory is above that at import, in MB; None: unknown."""
    return round(_peak_mb() - AT_IMPORT) if AT_IMPORT else None
