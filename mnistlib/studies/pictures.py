"""The command `predict` and notebook 11: the reader's own pictures in MNIST's format."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import DatasetError


def read_picture(path: str | Path) -> Tensor:
    """Convert a picture of one digit to MNIST's format: `(1, 28, 28)` uint8, light on dark.

    As in MNIST, the ink is scaled to fit 20x20 pixels and its centre of mass is moved to the middle
    (Y. LeCun et al., Proc. IEEE 86 (1998) 2278-2324). A dark digit on a light background is
    inverted. A 28x28 picture is not scaled or moved.

    Raises:
        DatasetError: the file is no picture, or shows no digit.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > 50_000_000:
                raise DatasetError(f"{path} has over 50 million pixels; make it smaller")
            ink = ImageOps.exif_transpose(file).convert("RGBA")  # photos are often stored sideways
            ground = Image.new("RGBA", ink.size, "white")  # behind transparent pixels
            pixels = np.asarray(Image.alpha_composite(ground, ink).convert("L"), np.float32)
    except DatasetError:
        raise
    except Exception as error:  # each format's decoder fails in its own way
        fault = f"{path} cannot be read as a picture ({error})"
        raise DatasetError(f"{fault}; give a PNG or JPEG") from None
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels = 255 - pixels
    if pixels.max() - np.median(pixels) < 32:
        raise DatasetError(f"{path} shows no digit: nothing stands out from the background")
    if pixels.shape != (28, 28):
        pixels = _centre(pixels)
    return torch.from_numpy(pixels.round().astype(np.uint8)).unsqueeze(0)  # (1, 28, 28)


def _centre(pixels: np.ndarray) -> np.ndarray:
    """Crop to the ink, scale it to fit 20x20 and move its centre of mass to the middle."""
    low, high = float(np.median(pixels)), float(pixels.max())
    ink = Image.fromarray((((pixels - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8))
    ink = ink.crop(ink.point(lambda value: 255 * (value > 64)).getbbox())
    zoom = 20 / max(ink.size)
    width, height = (max(1, round(side * zoom)) for side in ink.size)
    ink = ink.resize((width, height), Image.Resampling.BOX)
    weights = np.asarray(ink, dtype=np.float64)
    right = round(13.5 - np.average(np.arange(width), weights=weights.sum(0)))
    down = round(13.5 - np.average(np.arange(height), weights=weights.sum(1)))
    out = Image.new("L", (28, 28))
    out.paste(ink, (min(max(right, 0), 28 - width), min(max(down, 0), 28 - height)))
    return np.asarray(out)
