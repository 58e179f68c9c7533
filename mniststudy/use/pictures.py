"""From a picture file to its ink: the paper, its light and its pattern are taken away."""

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from mnistlib import DatasetError

from .lines import Line, find_lines
from .mnist_form import laid_out_as_mnist

# decoded here; Pillow hands some others to another program
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST, SIDE = 50_000_000, 1200  # pixels of a file; longer side of what is looked at
SMALL = 120  # pixels; a picture with a shorter longer side is enlarged
# chosen on validation digits; ink is above NOISE times the noise, LOW of the darkest ink of the
# page and EDGE of the darkest ink of its own mark
NOISE, LOW, EDGE = 5.0, 0.25, 0.4
WINDOW = 0.12  # of the longer side: what is wider is a shadow, not a stroke
BLANK = "nothing stands out from the paper"


@dataclass(frozen=True, repr=False)
class Page:
    """A picture and its ink."""

    pixels: np.ndarray
    """the picture upright, `(H, W, 3)` float from 0 to 255"""
    ink: np.ndarray
    """difference from the paper in the direction of the ink's colour, `(H, W)` from 0 to 1"""
    mask: np.ndarray
    """where there is ink, `(H, W)` bool"""
    faint: np.ndarray
    """the same with fainter ink, so that faint lines have no gaps"""
    reason: str = ""
    """why there is no ink, if there is none"""
    scale: float = 1
    """pixels of the picture for one pixel here"""
    whole: Tensor | None = None
    """the picture itself, light on dark, `(1, 28, 28)` uint8, if it is laid out as in MNIST"""

    @cached_property
    def lines(self) -> tuple[list[Line], list[Line]]:
        """The near-horizontal lines, and the near-vertical ones of the transpose."""
        return find_lines(self.faint), find_lines(self.faint.T)

    def turned(self, turn: int) -> "Page":
        """Return the page turned by quarters, counterclockwise."""
        turned = {n: np.rot90(getattr(self, n), turn) for n in ("pixels", "ink", "mask", "faint")}
        return replace(self, **turned)


def pictures_in(path: Path) -> list[Path]:
    """Return the pictures in a folder, by name, or the file itself."""
    if not path.is_dir():
        return [path]
    kinds = Image.registered_extensions()
    found = [file for file in sorted(path.iterdir()) if kinds.get(file.suffix.lower()) in FORMATS]
    found = [file for file in found if not file.stem.endswith("-read")]  # written by --show
    if not found:
        raise DatasetError(f"{path} has no picture; give a folder of PNG or JPEG files")
    return found


def read_picture(path: str | Path) -> Page:
    """Read a picture file and find the ink on it.

    Raises:
        DatasetError: the file is no picture, or too large.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise OSError("it is a folder or a device" if path.exists() else "no such file")
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            if file.width * file.height > LARGEST:
                raise OSError("it is too large")
            picture = ImageOps.exif_transpose(file)  # photos are often stored sideways
            scale = math.ceil(max(picture.size) / SIDE)
            pixels = _as_rgb(picture, scale)
    except Exception as error:  # each format's decoder fails in its own way
        remedy = "give a PNG or JPEG of at most 50 million pixels"
        raise DatasetError(f"{path} cannot be read as a picture ({error}); {remedy}") from None
    return find_ink(pixels, scale)


def _as_rgb(picture: Image.Image, step: int) -> np.ndarray:
    """Convert a picture of any mode to `(H, W, 3)` float32 from 0 to 255, `step` times smaller."""
    if picture.mode[0] in "IF":  # 16 or 32 bits: their range differs from program to program
        values = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-9) * 255
        picture = Image.fromarray(values.astype(np.uint8))
    rgba = np.asarray(picture.convert("RGBA").reduce(step), np.float32)
    colour, opaque = rgba[..., :3], rgba[..., 3:] / 255
    seen = (colour * opaque).sum((0, 1)) / max(opaque.sum(), 1e-9)  # mean visible colour, (3,)
    # few pixels are ink, which must differ from what is put behind it; many are the paper
    ground = seen if opaque.mean() > 0.5 else np.full(3, 0.0 if seen.mean() > 127 else 255.0)
    return (colour * opaque + ground * (1 - opaque)).astype(np.float32)


def find_ink(pixels: np.ndarray, scale: float = 1) -> Page:
    """Find the ink on a picture `(H, W, 3)`, 0 to 255, of any ink on any paper.

    Args:
        pixels: the picture; a small one is enlarged first.
        scale: pixels of the file for one of these.
    """
    small = pixels
    if (side := max(pixels.shape[:2])) < SMALL:
        larger = math.ceil(SMALL / side)
        shape = (larger * pixels.shape[0], larger * pixels.shape[1])
        pixels = _resize(pixels, shape, Image.Resampling.BICUBIC).clip(0, 255)
        scale /= larger
    height, width, _ = pixels.shape
    sheet = find_sheet(pixels)
    paper = estimate_paper(pixels, sheet)
    off = np.where(sheet[..., None], pixels - paper, 0)
    weight = np.linalg.norm(off, axis=2, keepdims=True) ** 2
    colour = (off * weight).sum((0, 1))  # from the paper's colour to the ink's
    colour /= max(float(np.linalg.norm(colour)), 1e-9)
    signed = off @ colour  # -> (H, W)
    shadow = _shadow(signed, sheet)
    signed -= shadow
    if colour.sum() <= 0:  # with half the light dark ink has half the contrast
        light = (paper + shadow[..., None] * colour).mean(2)
        signed *= light.max() / light.clip(light.max() / 5 + 1)
    smooth = ndimage.gaussian_filter(signed, min(1.0, max(height, width) / 400))
    below = smooth[sheet & (smooth < 0)]  # much ink is no noise
    noise = 1.4826 * float(np.median(-below)) if below.size else 0.0
    top = float(smooth.max())
    ink, none = (signed / max(top, 1.0)).clip(0, 1), np.zeros((height, width), bool)
    if top < max(NOISE * noise, 10):
        return Page(pixels, ink, none, none, BLANK, scale)
    low = LOW * top
    for _ in range(2):  # what is printed all over the paper is fainter than what is written on it
        ink_near = ndimage.binary_dilation(smooth > max(low, 0.5 * top), iterations=3)
        pattern = _everywhere(np.where(sheet & ~ink_near, smooth, 0))
        low = max(LOW * top, pattern + 0.25 * (top - pattern))
    mask = smooth > low
    faint = smooth > max(low / 2, 5 * noise)
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    peaks = ndimage.maximum(smooth, labels, np.arange(n + 1))[labels]
    mask &= smooth > EDGE * peaks  # faint ink beside dark ink is no stroke
    if not sheet.all():  # the edge of the sheet is no ink
        labels, _ = ndimage.label(mask, np.ones((3, 3)))
        rim = labels[sheet & ~ndimage.binary_erosion(sheet, iterations=3)]
        mask &= ~np.isin(labels, rim[rim > 0])
        faint &= ndimage.binary_dilation(mask, iterations=3)
    grey = (small if colour.sum() > 0 else 255 - small).mean(2)
    whole = None
    light_on_dark = grey.shape == (28, 28) and np.median(grey) <= 40 and grey.max() >= 200
    if light_on_dark and laid_out_as_mnist(grey):
        whole = torch.from_numpy(grey.round().astype(np.uint8))[None]
    return Page(pixels, ink, mask, faint, "", scale, whole)


def _everywhere(values: np.ndarray, blocks: int = 8) -> float:
    """Return the level that values `(H, W)` reach in half of the blocks of a page."""
    parts = [np.array_split(row, blocks, axis=1) for row in np.array_split(values, blocks)]
    return float(np.median([np.quantile(part, 0.97) for row in parts for part in row if part.size]))


def find_sheet(pixels: np.ndarray) -> np.ndarray:
    """Find the bright sheet on a dark table on a picture `(H, W, 3)`; without one, all `(H, W)`.

    The table is much darker, reaches the edge of the picture and begins abruptly; the sheet is
    convex.
    """
    height, width, _ = pixels.shape
    step = max(1.0, max(height, width) / 200)
    shape = (math.ceil(height / step), math.ceil(width / step))
    small = _resize(pixels, shape, Image.Resampling.BOX).mean(2)
    light = np.log(ndimage.grey_closing(small, (7, 7)) + 8)  # without thin ink
    bright = light > _otsu(light)
    bright = ndimage.binary_opening(np.pad(bright, 3, "edge"), iterations=2)[3:-3, 3:-3]
    labels, n = ndimage.label(bright)
    everything = np.ones((height, width), bool)
    if not n:
        return everything
    sizes = np.bincount(labels.ravel())[1:]
    sheet = labels == 1 + int(sizes.argmax())
    edge = np.concatenate([sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]])
    rim = ndimage.binary_dilation(sheet, iterations=2) & ~ndimage.binary_erosion(
        sheet, iterations=2, border_value=1
    )
    jump = ndimage.morphological_gradient(light, (5, 5))[rim]
    difference = light[sheet].mean() - light[~sheet].mean() if not sheet.all() else 0.0
    plain = difference < 0.7 or sheet.mean() < 0.25 or edge.mean() > 0.85
    if plain or np.median(jump) < 0.5 * difference:
        return everything
    from scipy.spatial import ConvexHull  # slow to import, and few pictures need it

    points = np.argwhere(sheet)
    hull = ConvexHull(points)
    v, u = np.mgrid[: shape[0], : shape[1]]
    inside = (
        hull.equations[:, :2] @ np.stack([v.ravel(), u.ravel()]) + hull.equations[:, 2:] <= 0
    ).all(0)
    if sheet.sum() < 0.93 * inside.sum():
        return everything
    inside = np.pad(inside.reshape(shape), 3, "edge")
    inside = ndimage.binary_erosion(inside, iterations=3)[3:-3, 3:-3]
    return (
        _resize(inside[..., None].astype(np.float32), (height, width), Image.Resampling.NEAREST)[
            ..., 0
        ]
        > 0.5
    )


def _otsu(values: np.ndarray) -> float:
    """Return the threshold that separates two classes best (N. Otsu, IEEE Trans. SMC 9 (1979))."""
    counts, edges = np.histogram(values, 64)
    middles = (edges[1:] + edges[:-1]) / 2
    below, sums = counts.cumsum()[:-1], (counts * middles).cumsum()[:-1]
    above = counts.sum() - below
    mean = (counts * middles).sum() - sums
    apart = below * above * (sums / below.clip(1) - mean / above.clip(1)) ** 2
    return float(edges[1 + int(apart.argmax())])


def estimate_paper(pixels: np.ndarray, sheet: np.ndarray | None = None) -> np.ndarray:
    """Estimate the paper `(H, W, 3)` behind the ink of a picture of the same shape.

    A smooth surface of second order is fitted to the pixels that are near it, so that ink has no
    weight; what is left of them, blurred, is added. The fit starts with what most of the rim
    shows, because a thick digit may cover more than half of the picture.
    """
    height, width, _ = pixels.shape
    step = max(1.0, max(height, width) / 64)
    shape = (math.ceil(height / step), math.ceil(width / step))
    small = _resize(pixels, shape, Image.Resampling.BOX)  # (h, w, 3)
    valid = np.ones(shape, bool)
    if sheet is not None:
        valid = (
            _resize(sheet[..., None].astype(np.float32), shape, Image.Resampling.BOX)[..., 0] > 0.99
        )
    grey = small.mean(2)
    ground, high = valid, grey > _otsu(grey[valid])
    if valid.all() and high.any() and not high.all():
        spread = max(float(grey[high].std()), float(grey[~high].std()), 1.0)
        if grey[high].mean() - grey[~high].mean() > 4 * spread:  # two tones
            rim = np.concatenate([high[0], high[-1], high[:, 0], high[:, -1]])
            ground = high == (rim.mean() > 0.5)
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2).astype(np.float32)
    fit = np.broadcast_to(np.median(small[ground], axis=0), small.shape)
    for _ in range(8):
        off = np.abs(small - fit).max(2)
        near = valid & (off <= max(2.5 * float(np.median(off[ground])), 4))
        fit = basis @ np.linalg.lstsq(basis[near], small[near], rcond=None)[0]
    blur, near = (max(shape) / 10,) * 2 + (0,), near[..., None]
    weight = ndimage.gaussian_filter(near.astype(np.float32), blur)
    fit = fit + ndimage.gaussian_filter((small - fit) * near, blur) / (weight + 0.05)
    return _resize(fit.astype(np.float32), (height, width), Image.Resampling.BILINEAR)


def _shadow(signed: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """Estimate what is left of a shadow in the difference from the paper `(H, W)`, else zeros.

    A shadow has soft edges and is wider than a stroke.
    """
    height, width = signed.shape
    step = max(1.0, max(height, width) / 300)
    shape = (math.ceil(height / step), math.ceil(width / step))
    small = _resize(signed[..., None].astype(np.float32), shape, Image.Resampling.BOX)[..., 0]
    top = float(np.quantile(small, 0.999))
    area = ndimage.binary_opening(small > 0.15 * top, np.ones((13, 13), bool))
    rim = area & ~ndimage.binary_erosion(area)
    steep = ndimage.morphological_gradient(small, (5, 5))[rim]
    if not rim.any() or np.median(steep) > 0.4 * top:
        return np.zeros_like(signed)
    wide = ndimage.grey_opening(small, (math.ceil(WINDOW * max(shape)),) * 2)
    wide = ndimage.gaussian_filter(wide, 2.0)[..., None].astype(np.float32)
    return np.where(sheet, _resize(wide, (height, width), Image.Resampling.BILINEAR)[..., 0], 0)


def _resize(values: np.ndarray, shape: tuple[int, int], way: Image.Resampling) -> np.ndarray:
    """Resample each plane of `(H, W, C)` float32 to another height and width."""
    planes = (Image.fromarray(plane) for plane in np.moveaxis(values, 2, 0))
    return np.dstack([np.asarray(plane.resize(shape[::-1], way)) for plane in planes])
