#!/usr/bin/env bash
# Guess: inspect_notebook tells each parameter and its default as they are written.
# So:    lines are matched as text: a # ends the default even inside quotes ('run #3' becomes 'run),
#        and with a = in the text, two names in a line, or a semicolon the parameter is not listed,
#        though papermill passes it to the notebook all the same.
# Here:  whoever checks names and types of parameters before a run refuses, or misreads, valid ones.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check papermill==2.7.0 nbformat==5.11.1
cd "$work"
venv/bin/python - <<'PYTHON'
import logging

import nbformat
import papermill
from nbformat.v4 import new_code_cell, new_notebook

logging.getLogger("papermill").setLevel("ERROR")

def inspect(source):
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=[cell], metadata={"kernelspec": kernel}), "a.ipynb")
    return {name: found["default"] for name, found in papermill.inspect_notebook("a.ipynb").items()}

expected = {
    "seed = 0  # see #3": {"seed": "0"},
    "title = 'run #3'": {"title": "'run"},
    "title = 'lr = 0.1'": {},
    "lr = 0.1; epochs = 3": {},
    "lr, epochs = 0.1, 3": {},
}
print("papermill", papermill.__version__)
seen = {source: inspect(source) for source in expected}
for source, found in seen.items():
    print(f"{source:22} is inspected as {found}")
assert seen == expected, "inspect_notebook changed"
PYTHON
