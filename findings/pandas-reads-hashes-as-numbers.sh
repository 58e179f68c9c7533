#!/usr/bin/env bash
# Guess: a column of hexadecimal names, such as commits or hashes of settings, is read as text.
# So:    where each is digits with at most one e between, pandas reads a column of numbers: zeros at
#        the start go, 795552e5 becomes 7.95552e10, and 4802e597 infinity. A single other name keeps
#        the whole column text, so it happens in small tables only. dtype={...: str} helps.
# Here:  hashes and commits of a table of runs, all of one setting; about one hash of eight digits
#        in 27 looks like a number. These four occur in a table of results.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pandas==3.1.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import io
import math

import pandas as pd

def read(*names, **options):
    table = "\n".join(("config_hash,seed", *(f"{name},0" for name in names)))
    return pd.read_csv(io.StringIO(table), **options)["config_hash"].tolist()

names = ("00145114", "795552e5", "4802e597", "000e8271")
seen = [read(name)[0] for name in names]
print("pandas", pd.__version__)
print("alone:             ", dict(zip(names, seen)))
print("with another:      ", read(*names, "3e42c577"))
print("with dtype str:    ", read(*names, dtype={"config_hash": str}))
assert seen == [145114, 795552e5, math.inf, 0.0], "read_csv changed"
assert read(*names, "3e42c577") == [*names, "3e42c577"], "the mixed column changed"
assert read(*names, dtype={"config_hash": str}) == list(names), "dtype changed"
PYTHON
