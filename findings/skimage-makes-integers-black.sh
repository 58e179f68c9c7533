#!/usr/bin/env bash
# Guess: resize and rotate treat a digit alike whether its 0 to 255 are bytes or larger integers.
# So:    scikit-image divides by the largest value of the type: int64, as read_csv and loadtxt give,
#        comes out below 1e-16, which is black; bytes come out in 0 to 1 and floats as they were.
# Here:  digits from a CSV file that are turned or scaled before a network sees them.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check scikit-image==0.26.0 numpy==2.4.6 scipy==1.17.1
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np
import skimage
from skimage.transform import resize

digit = np.zeros((28, 28), np.int64)
digit[6:22, 12:16] = 255
kinds = ("uint8", "int32", "int64", "float64")
seen = {kind: float(resize(digit.astype(kind), (20, 20)).max()) for kind in kinds}
print("scikit-image", skimage.__version__, "numpy", np.__version__)
for kind, top in seen.items():
    print(f"{kind}: 255 becomes at most {top:.3g}")
assert 0.5 < seen["uint8"] <= 1 and 128 < seen["float64"] <= 255, "bytes or floats changed"
assert seen["int32"] < 1e-6 and seen["int64"] < 1e-16, "integers are no longer black"
PYTHON
