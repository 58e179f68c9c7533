#!/usr/bin/env bash
# Guess: a scan with 16 bits a pixel can be straightened with Image.rotate, as one with 8 bits.
# So:    with BILINEAR or BICUBIC, rotate and transform work on single bytes of a picture of mode
#        I;16: white (65535) comes out as 255 at most. NEAREST, right angles and resize are right.
# Here:  a straightened 16-bit scan of a digit is almost black, and no error is raised.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
cd "$work"
venv/bin/python - <<'PYTHON'
import numpy as np
import PIL
from PIL import Image

digit = np.zeros((28, 28), np.uint16)
digit[6:22, 12:16] = 65535
picture = Image.fromarray(digit)
ways = {way.name: way for way in (Image.Resampling.NEAREST, Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)}
rotated = {name: int(np.asarray(picture.rotate(10, way)).max()) for name, way in ways.items()}
resized = {name: int(np.asarray(picture.resize((40, 40), way)).max()) for name, way in ways.items()}
print("pillow", PIL.__version__, "mode", picture.mode, "largest value", digit.max())
print("after rotate(10):", rotated)
print("after resize:    ", resized)
assert rotated == {"NEAREST": 65535, "BILINEAR": 255, "BICUBIC": 255}, "rotate changed"
assert set(resized.values()) == {65535}, "resize changed"
PYTHON
