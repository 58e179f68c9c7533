"""Many runs: the ledger, sweeps, statistics and the tables of the README."""
