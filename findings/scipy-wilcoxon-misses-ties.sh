#!/usr/bin/env bash
# Guess: wilcoxon on accuracies with two decimals sees the ties and zeros that a reader sees.
# So:    differences of 0.01 points are not equal as floats (99.41 - 99.40 and 99.51 - 99.50), so
#        ties get ranks of their own, by rounding. The p-value changes; rounding the differences, or
#        counting correct images, gives back the ties.
# Here:  two recipes compared over seeds, accuracies in percent of 10,000 images.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check scipy==1.17.1 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np
import scipy
from scipy.stats import wilcoxon

rng = np.random.default_rng(0)
right_a = np.rint(9950 + 5 * rng.standard_normal(20)).astype(int)
right_b = right_a + np.rint(1 + 3 * rng.standard_normal(20)).astype(int)
a, b = right_a / 100, right_b / 100
difference = b - a
p = {
    "accuracies in percent": wilcoxon(b, a).pvalue,
    "differences rounded": wilcoxon(difference.round(2)).pvalue,
    "correct images": wilcoxon(right_b, right_a).pvalue,
}
sizes = len(set(np.abs(difference))), len(set(np.abs(difference).round(2)))
print("scipy", scipy.__version__, "numpy", np.__version__)
print(f"20 pairs, {sizes[1]} different sizes of a difference, as floats {sizes[0]}")
for name, value in p.items():
    print(f"{name}: p = {value:.5f}")
assert sizes[0] > sizes[1], "the floats are tied now"
assert p["differences rounded"] == p["correct images"] != p["accuracies in percent"], "p changed"
PYTHON
