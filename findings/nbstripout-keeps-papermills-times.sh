#!/usr/bin/env bash
# Guess: nbstripout removes what differs from run to run: outputs, counts, times.
# So:    it removes Jupyter's times and widgets but keeps papermill's block in the notebook and in
#        each cell: durations, start times, the names of files given to it.
# Here:  an executed notebook that is committed through nbstripout changes with each run.
#        --extra-keys "metadata.papermill cell.metadata.papermill" removes the blocks.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check nbstripout==0.9.1 nbformat==5.11.1
cd "$work"
venv/bin/python - <<'PYTHON'
import subprocess
from importlib.metadata import version

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

def strip(*options):
    about = {"execution": {"iopub.execute_input": "2026-11-28T00:00:00Z"}, "papermill": {"duration": 1.5}}
    cell = new_code_cell("seed = 0", metadata={"tags": ["parameters"], **about}, execution_count=1)
    whole = {"papermill": {"duration": 2.5}, "widgets": {}}
    nbformat.write(new_notebook(cells=[cell], metadata=whole), "a.ipynb")
    subprocess.run(["venv/bin/nbstripout", *options, "a.ipynb"], check=True)
    found = nbformat.read("a.ipynb", as_version=4)
    return sorted(found.metadata), sorted(found.cells[0].metadata)

plain = strip()
extra = strip("--extra-keys", "metadata.papermill cell.metadata.papermill")
print("nbstripout", version("nbstripout"))
print("kept in the notebook and in its cell:", plain)
print("the same with --extra-keys:          ", extra)
assert plain == (["papermill"], ["papermill", "tags"]), "nbstripout changed"
assert extra == ([], ["tags"]), "--extra-keys changed"
PYTHON
