#!/usr/bin/env bash
# Guess: ImageOps.contain fits any picture into a box, and what it returns has pixels.
# So:    a picture more than about 40 times as high as wide is rounded to a width of 0, and the
#        digit is gone without an error; Image.thumbnail keeps one pixel.
# Here:  the crop of a thin 1, or of a ruled line, that is to be fitted into MNIST's 20x20 pixels.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0
cd "$work"
venv/bin/python - <<'PYTHON'
import PIL
from PIL import Image, ImageOps

print("pillow", PIL.__version__)
for width, size in ((10, (0, 20)), (11, (1, 20))):
    crop = Image.new("L", (width, 420), 255)
    small = crop.copy()
    small.thumbnail((20, 20))
    found = ImageOps.contain(crop, (20, 20)).size
    print(f"{crop.size} in a box of 20x20: contain gives {found}, thumbnail {small.size}")
    assert found == size, "contain changed"
    assert small.size == (1, 20), "thumbnail changed"
PYTHON
