#!/usr/bin/env bash
# Guess: numpy sums in pairs, so means of float32 are good to six digits, along any axis.
# So:    it does so along the last axis of contiguous memory only. Over the first one the values are
#        added one after the other: the mean of 60,000 images, each pixel 33.3, is 33.28.
# Here:  mean and standard deviation of each pixel for normalising, from float32 images of 0 to 255.
#        dtype=np.float64 in mean() mends it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np

images = np.full((60_000, 16), np.float32(33.3))
true = float(np.float32(33.3))
off = {
    "all at once": abs(float(images.mean()) - true),
    "over the images (axis 0)": abs(float(images.mean(0)[0]) - true),
    "the same, images last": abs(float(np.ascontiguousarray(images.T).mean(1)[0]) - true),
    "axis 0 in float64": abs(float(images.mean(0, dtype=np.float64)[0]) - true),
}
print("numpy", np.__version__)
for name, error in off.items():
    print(f"{name}: wrong by {error:.6f}")
assert off.pop("over the images (axis 0)") > 0.01, "the mean over axis 0 is better now"
assert max(off.values()) < 1e-4, "the other means are worse now"
PYTHON
