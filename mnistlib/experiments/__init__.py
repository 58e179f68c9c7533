"""Many runs: the ledger that keeps them, sweeps, statistics and the tables of the README."""
