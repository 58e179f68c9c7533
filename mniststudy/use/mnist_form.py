"""Bringing a mark cut from a picture into the form of MNIST's images."""

import math

import numpy as np
from PIL import Image
from scipy import ndimage

STROKE = 2.0  # pixels of 28 to which thinner strokes are thickened
BOX = Image.Resampling.BOX


def to_mnist(crop: np.ndarray) -> np.ndarray:
    """Bring ink `(h, w)` from 0 to 1 into MNIST's format, `(28, 28)` uint8.

    As in MNIST, it is scaled to fit 20x20 pixels and centred by mass (Y. LeCun et al., Proc. IEEE
    86 (1998) 2278-2324). The shorter side is in the middle of the 20 pixels, to parts of a pixel:
    four of five digits of MNIST are an even number of pixels wide, with two edges equally grey.
    Hairlines are thickened before, and the contrast is restored after.
    """
    thin = STROKE * max(crop.shape) / 20 - stroke_width(crop > 0.5 * crop.max())
    if thin > 1 or min(crop.shape) < 3:  # Pillow's box filter can miss a single row
        extra = max(1, math.ceil(thin / 2))
        v, u = np.ogrid[-extra : extra + 1, -extra : extra + 1]
        disc = u * u + v * v <= extra * extra + 1
        crop = ndimage.grey_dilation(np.pad(crop, extra), footprint=disc)
    side = max(crop.shape)
    spare = [(side - length) / 2 for length in crop.shape]  # on either side of the shorter one
    square = np.pad(crop.astype(np.float32), [(math.ceil(part), math.ceil(part)) for part in spare])
    top, left = (math.ceil(part) - part for part in spare)
    way = BOX if side > 20 else Image.Resampling.BILINEAR
    box = (left, top, left + side, top + side)
    small = np.asarray(Image.fromarray(square).resize((20, 20), way, box))
    small = small / np.quantile(small[small > 0.3 * small.max()], 0.8)
    return centre((small.clip(0, 1) * 255).round().astype(np.uint8))


def centre(ink: np.ndarray) -> np.ndarray:
    """Move ink `(h, w)`, of at most 28x28 pixels, to its place in MNIST, `(28, 28)`.

    The centre of mass comes to pixel 14 of 0 to 27, not to the middle, 13.5: after a shift by whole
    pixels it is in [13.5, 14.5), down and across, as in 69,998 of the 70,000 images of MNIST. Ink
    that would leave the image stays at its edge.
    """
    ((rows, columns),) = ndimage.find_objects((ink > 0).astype(np.uint8))
    ink = ink[rows, columns]
    places = zip(ndimage.center_of_mass(ink), ink.shape, strict=True)
    y, x = (min(max(math.ceil(13.5 - mass), 0), 28 - side) for mass, side in places)
    (height, width), out = ink.shape, np.zeros((28, 28), ink.dtype)
    out[y : y + height, x : x + width] = ink
    return out


def stroke_width(body: np.ndarray) -> float:
    """Return the mean width of the strokes of a mask: four times the mean distance to the edge."""
    distance = ndimage.distance_transform_edt(np.pad(body, 1))
    return 4 * float(distance.sum()) / max(int(body.sum()), 1)


def laid_out_as_mnist(ink: np.ndarray) -> bool:
    """Whether ink `(28, 28)` fits 20x20 pixels and is centred by mass, as in all of MNIST."""
    ((rows, columns),) = ndimage.find_objects((ink > 0.15 * ink.max()).astype(np.uint8))
    longer = max(rows.stop - rows.start, columns.stop - columns.start)
    return 18 <= longer <= 20 and all(13.4 <= mass < 14.6 for mass in ndimage.center_of_mass(ink))
