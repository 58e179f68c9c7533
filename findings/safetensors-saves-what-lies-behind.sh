#!/usr/bin/env bash
# Guess: safetensors.numpy saves the values of an array, as numpy.save does, or refuses a view as
#        safetensors.torch does ("non contiguous tensor").
# So:    it writes the memory behind the array: a transposed matrix comes back with the right shape
#        and other values, without an error.
# Here:  weights of a linear layer transposed for another framework, (in, out) for (out, in).
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np
import safetensors
from safetensors.numpy import load, save

weights = np.arange(6, dtype=np.float32).reshape(2, 3)
seen = load(save({"w": weights.T}))["w"]
copied = load(save({"w": np.ascontiguousarray(weights.T)}))["w"]
print("safetensors", safetensors.__version__, "numpy", np.__version__)
print("saved: ", weights.T.tolist())
print("loaded:", seen.tolist())
print("loaded after ascontiguousarray:", copied.tolist())
assert seen.tolist() == [[0, 1], [2, 3], [4, 5]], "save of a view changed"
assert copied.tolist() == weights.T.tolist(), "save of a copy changed"
PYTHON
