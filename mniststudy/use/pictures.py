"""The command `predict` and notebook 10: from the reader's own pictures to readings."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from mnistlib import DatasetError
from mnistlib.evaluate import predict_logits
from mnistlib.paths import write_atomically

# decoded here; Pillow hands some others to another program
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
LARGEST, SIDE = 50_000_000, 1200  # pixels of a file; longer side of what is looked at
# chosen on validation digits; ink is above NOISE times the noise, LOW of the darkest ink of the
# page and EDGE of the darkest ink of its own mark
NOISE, LOW, EDGE = 7.0, 0.25, 0.4
SLOPE, ACROSS = 0.07, 0.6  # of ruled lines, at most; share of the width that they cover, at least
STROKE = 2.0  # pixels of 28 to which thinner strokes are thickened
HOLES, LENGTH = 2, 36  # of a digit, at most; pixels of 28 of all strokes
BOX = Image.Resampling.BOX
EIGHT = np.ones((3, 3), bool)  # neighbours of a pixel, the diagonal ones included


@dataclass(frozen=True, repr=False)
class Mark:
    """Ink that belongs together, and so may be a digit."""

    box: tuple[int, int, int, int]
    """left, top, right, bottom in the pixels of the `Page`"""
    crop: np.ndarray
    """ink within the box, `(h, w)` from 0 to 1"""
    image: Tensor
    """the same in MNIST's format, `(1, 28, 28)` uint8, light on dark"""


@dataclass(frozen=True, repr=False)
class Page:
    """A picture and each step from it to its marks."""

    pixels: np.ndarray
    """the picture upright, `(H, W, 3)` float from 0 to 255"""
    ink: np.ndarray
    """difference from the paper in the direction of the ink's colour, `(H, W)` from 0 to 1"""
    mask: np.ndarray
    """where there is ink, without ruled lines and specks, `(H, W)` bool"""
    marks: Sequence[Mark] = ()
    """by rows from the top, each from the left"""
    reason: str = ""
    """why there are no marks, if there are none"""
    scale: int = 1
    """pixels of the picture for one pixel here"""


@dataclass(frozen=True)
class Calibration:
    """What turns logits into an answer."""

    temperature: float = 1.0
    """logits are divided by it"""
    sure: float = 0.8
    """a largest probability below it is `not sure`"""
    twin: Mapping[str, Any] | None = field(default=None, repr=False)
    """the run on whose validation images both were fitted; None: they are these defaults"""


@dataclass(frozen=True, repr=False)
class Reading:
    """The answer to one mark."""

    answer: str
    """a digit, `not sure` or `not a digit`"""
    probabilities: list[float]
    mark: Mark

    def as_dict(self, scale: int) -> dict[str, object]:
        """Return everything but the pixels, with the box in pixels of the picture, upright."""
        digit = int(self.answer) if self.answer.isdigit() else None
        chances = [round(p, 6) for p in self.probabilities]
        box = [scale * side for side in self.mark.box]
        return {"answer": self.answer, "digit": digit, "probabilities": chances, "box": box}

    def __repr__(self) -> str:
        """Give the answer and the probability of the most probable digit."""
        p = max(self.probabilities)
        best = "" if self.answer.isdigit() else f"{self.probabilities.index(p)} at "
        return f"{self.answer} ({best}{100 * p:.1f} %)"


def read_picture(path: str | Path) -> tuple[Page, list[str]]:
    """Read a picture file and find the marks on it; also return what the user must know.

    A picture of 28x28 pixels that looks like MNIST's is taken as it is.

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
            frames = getattr(file, "n_frames", 1)
            picture = ImageOps.exif_transpose(file)  # photos are often stored sideways
            scale = math.ceil(max(picture.size) / SIDE)
            pixels = _as_rgb(picture, scale)
    except Exception as error:  # each format's decoder fails in its own way
        remedy = "give a PNG or JPEG of at most 50 million pixels"
        raise DatasetError(f"{path} cannot be read as a picture ({error}); {remedy}") from None
    notes = [f"only the first of {frames} frames is used"] if frames > 1 else []
    return replace(find_marks(pixels), scale=scale), notes


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


def find_marks(pixels: np.ndarray) -> Page:
    """Find the marks on a picture `(H, W, 3)`, 0 to 255, of any ink on any smooth paper."""
    height, width, _ = pixels.shape
    paper = estimate_paper(pixels)
    off = pixels - paper
    weight = np.linalg.norm(off, axis=2, keepdims=True) ** 2
    colour = (off * weight).sum((0, 1))  # from the paper's colour to the ink's
    colour /= max(float(np.linalg.norm(colour)), 1e-9)
    signed = off @ colour  # -> (H, W)
    if not (light_ink := colour.sum() > 0):  # with half the light dark ink has half the contrast
        light = paper.mean(2)
        signed *= light.max() / light.clip(light.max() / 5 + 1)
    smooth = ndimage.gaussian_filter(signed, min(1.0, max(height, width) / 400))
    noise = 1.4826 * float(np.median(np.abs(smooth)))
    top = float(smooth.max())
    ink = (signed / max(top, 1.0)).clip(0, 1)
    page = Page(pixels, ink, mask=np.zeros((height, width), bool))
    if top < max(NOISE * noise, 10):
        return replace(page, reason="nothing stands out from the paper")
    grey = pixels.mean(2) if light_ink else 255 - pixels.mean(2)
    if grey.shape == (28, 28) and np.median(grey) <= 40 and grey.max() >= 200:  # as MNIST has it
        image = torch.from_numpy(grey.round().astype(np.uint8))[None]
        return replace(page, mask=grey > 127, marks=[Mark((0, 0, 28, 28), grey / 255, image)])
    faint = smooth > max(LOW / 2 * top, 5 * noise)  # faint lines must not look broken
    mask = without_lines(without_lines(faint).T).T & (smooth > LOW * top)
    labels, n = ndimage.label(mask, EIGHT)
    peaks = ndimage.maximum(smooth, labels, np.arange(n + 1))
    mask &= smooth > EDGE * peaks[labels]  # faint ink beside dark ink is no stroke
    groups = _group(ndimage.label(mask, EIGHT)[0])
    places = [(k, place) for k, place in enumerate(ndimage.find_objects(groups), 1) if place]
    if not 0 < len(places) <= 100:
        why = f"{len(places)} separate marks" if places else "all marks are tiny or reach the edge"
        return replace(page, reason=why)
    marks = [_mark(ink[place], groups[place] == k, place) for k, place in places]
    return replace(page, mask=groups > 0, marks=_in_rows(marks))


def estimate_paper(pixels: np.ndarray) -> np.ndarray:
    """Estimate the paper `(H, W, 3)` behind the ink of a picture of the same shape.

    A smooth surface of second order is fitted to the pixels that are near it, so that ink has no
    weight; what is left of them, blurred, is added.
    """
    height, width, _ = pixels.shape
    step = max(1.0, max(height, width) / 64)
    small = _resize(pixels, (math.ceil(height / step), math.ceil(width / step)), BOX)  # (h, w, 3)
    y, x = np.mgrid[: small.shape[0], : small.shape[1]] / max(small.shape)
    basis = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=2).astype(np.float32)
    fit = np.broadcast_to(np.median(small, axis=(0, 1)), small.shape)
    for _ in range(8):
        off = np.abs(small - fit).max(2)
        near = off <= max(2.5 * float(np.median(off)), 4)
        fit = basis @ np.linalg.lstsq(basis[near], small[near], rcond=None)[0]
    blur, near = (max(small.shape) / 10,) * 2 + (0,), near[..., None]
    weight = ndimage.gaussian_filter(near.astype(np.float32), blur)
    fit = fit + ndimage.gaussian_filter((small - fit) * near, blur) / (weight + 0.05)
    return _resize(fit.astype(np.float32), (height, width), Image.Resampling.BILINEAR)


def _resize(values: np.ndarray, shape: tuple[int, int], way: Image.Resampling) -> np.ndarray:
    """Resample each plane of `(H, W, C)` float32 to another height and width."""
    planes = (Image.fromarray(plane) for plane in np.moveaxis(values, 2, 0))
    return np.dstack([np.asarray(plane.resize(shape[::-1], way)) for plane in planes])


def without_lines(mask: np.ndarray) -> np.ndarray:
    """Remove thin straight near-horizontal lines across most of a mask `(H, W)`.

    Where a stroke crosses a line, the ink is higher than the line is thick, and stays.
    """
    height, width = mask.shape
    columns = np.linspace(0, width - 1, min(width, 120)).astype(int)
    for _ in range(4 if height > 28 else 0):  # lines of a photo are not quite parallel
        thicker = ndimage.binary_dilation(mask[:, columns], np.ones((3, 1), bool))
        slopes = np.arange(-SLOPE, SLOPE, 3 / width)
        covers = [_cover(thicker, slope * (columns - width / 2)) for slope in slopes]
        best = int(np.argmax([(cover**8).sum() for cover in covers]))  # the sharpest lines
        lines = covers[best] > ACROSS
        lines &= ~ndimage.binary_opening(lines, np.ones(math.ceil(4 + height / 40)))  # thick bars
        if not lines.any():
            break
        thick = np.bincount(ndimage.label(lines)[0])[1:].max()
        strokes = ndimage.binary_opening(mask, np.ones((thick + 1, 1), bool))
        y = _rows_along(height, -slopes[best] * (np.arange(width) - width / 2)).clip(0, height - 1)
        mask = mask & (strokes | ~ndimage.binary_dilation(lines)[y])
    return mask


def _cover(mask: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """Return for each row, shifted so in each column, the share of it in a mask `(H, W)`."""
    y, height = _rows_along(len(mask), shift), len(mask)
    within = (y >= 0) & (y < height)
    share = (np.take_along_axis(mask, y.clip(0, height - 1), 0) & within).sum(1)
    return share / within.sum(1).clip(0.3 * mask.shape[1])  # (height,) from 0 to 1


def _rows_along(height: int, shift: np.ndarray) -> np.ndarray:
    """Return the rows `(height, W)` that each row meets where it is shifted so in each column."""
    return np.arange(height)[:, None] + np.rint(shift).astype(int)


def _boxes(places: Sequence[tuple[slice, ...]]) -> np.ndarray:
    """Return left, top, right and bottom of the places of components, `(n, 4)`."""
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in places]).reshape(-1, 4)


def _group(labels: np.ndarray) -> np.ndarray:
    """Group the components of a labelled page `(H, W)` into marks, without specks and frames.

    Returns:
        The page with a number for each mark, `(H, W)`; not all numbers are used.
    """
    places = ndimage.find_objects(labels)
    box = _boxes(places)
    extent = (box[:, 2:] - box[:, :2]).max(1)  # the longer side
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    contact = np.bincount(edge, minlength=len(box) + 1)[1:]
    # a desk beside the paper is no digit
    keep = (extent >= 6) & (contact < 0.3 * min(labels.shape))
    for i in np.flatnonzero(keep):  # a frame is thin and has something inside
        inside = (box[:, :2] > box[i, :2]).all(1) & (box[:, 2:] < box[i, 2:]).all(1)
        own = labels[places[i]] == i + 1
        v, u = (side // 6 for side in own.shape)
        hollow = own[v : len(own) - v, u : own.shape[1] - u].sum() < 0.15 * own.sum()
        keep[i] = not (hollow and (extent[inside & keep] >= 0.3 * extent[i]).any())
    number = np.zeros(len(box) + 1, int)
    number[1:][keep] = 1 + (np.arange(keep.sum()) if keep.sum() > 300 else _joined(box[keep]))
    groups = number[labels]
    box = _boxes(ndimage.find_objects(groups))
    width, height = (box[:, 2:] - box[:, :2]).T
    longer = np.maximum(width, height)
    small = (longer < max(8, 0.3 * longer.max(initial=0))) | (height < 0.3 * width)  # speck, dash
    groups[np.isin(groups, 1 + np.flatnonzero(small))] = 0
    return groups


def _joined(box: np.ndarray) -> np.ndarray:
    """Return for each box `(n, 4)` the number of its mark, from 0: pieces of a digit are joined."""
    low, high = box[:, :2], box[:, 2:]
    width, height = (high - low).T
    longer = np.maximum(width, height)
    gap = np.maximum(low[:, None], low) - np.minimum(high[:, None], high)  # (n, n, 2)
    over = -gap[..., 0] / np.minimum.outer(width, width)
    near = gap / np.maximum.outer(longer, longer)[..., None]
    piece = np.minimum.outer(height, height) < 0.6 * np.maximum.outer(height, height)
    above = (over > np.where(piece, 0.3, 0.5)) & (near[..., 1] < np.where(piece, 0.3, 0.1))
    return connected_components(above | piece & (near.max(2) < 0.1))[1]


def _mark(ink: np.ndarray, own: np.ndarray, place: tuple[slice, ...]) -> Mark:
    """Cut a mark, given as a mask `(h, w)`, from the ink at its place."""
    crop = ink * ndimage.binary_dilation(own, EIGHT)
    rows, columns = place
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return Mark(box, crop, torch.from_numpy(to_mnist(crop))[None])


def to_mnist(crop: np.ndarray) -> np.ndarray:
    """Bring ink `(h, w)` from 0 to 1 into MNIST's format, `(28, 28)` uint8.

    As in MNIST, it is scaled to fit 20x20 pixels and centred by mass (Y. LeCun et al., Proc. IEEE
    86 (1998) 2278-2324). The shorter side is in the middle of the 20 pixels, to parts of a pixel:
    four of five digits of MNIST are an even number of pixels wide, with two edges equally grey.
    Hairlines are thickened before, and the contrast is restored after.
    """
    thin = STROKE * max(crop.shape) / 20 - _stroke_width(crop > 0.5 * crop.max())
    if thin > 1:
        extra = math.ceil(thin / 2)
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


def _stroke_width(body: np.ndarray) -> float:
    """Return the mean width of the strokes of a mask: four times the mean distance to the edge."""
    distance = ndimage.distance_transform_edt(np.pad(body, 1))
    return 4 * float(distance.sum()) / max(int(body.sum()), 1)


def _in_rows(marks: list[Mark]) -> list[Mark]:
    """Sort marks by rows from the top, and each row from the left."""
    rows: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda m: m.box[1] + m.box[3]):
        if not rows or mark.box[1] + mark.box[3] >= 2 * max(m.box[3] for m in rows[-1]):
            rows.append([])
        rows[-1].append(mark)
    return [mark for row in rows for mark in sorted(row, key=lambda m: m.box[0])]


def is_digit_like(image: np.ndarray) -> bool:
    """Whether an image `(28, 28)` uint8 has no more holes and strokes than a digit can have."""
    body = image > 127
    labels, _ = ndimage.label(~np.pad(image >= 100, 1))
    holes = (np.bincount(labels[labels > 0]) > 7).sum() - 1  # beside the outside
    return bool(holes <= HOLES and body.sum() <= LENGTH * _stroke_width(body))


def read_marks(model: nn.Module, marks: Sequence[Mark], calibration: Calibration) -> list[Reading]:
    """Let a network read marks; probabilities are softmax(logits / temperature)."""
    if not marks:
        return []
    logits = predict_logits(model, torch.stack([mark.image for mark in marks]))  # (N, 10)
    readings = []
    for mark, chances in zip(marks, (logits / calibration.temperature).softmax(1), strict=True):
        answer = str(int(chances.argmax())) if chances.max() >= calibration.sure else "not sure"
        if not is_digit_like(mark.image[0].numpy()):
            answer = "not a digit"
        readings.append(Reading(answer, chances.tolist(), mark))
    return readings


def save_readings(path: str | Path, readings: Sequence[Reading]) -> Path:
    """Draw what the network saw and answered beside a picture, as `NAME-read.png`; return its path.

    Raises:
        DatasetError: a file of that name is not by this function, or the folder is read-only.
    """
    path = Path(path)
    shown, source = path.with_name(f"{path.stem}-read.png"), f"mnist predict --show {path.name!a}"
    figure = Figure((1.5 * len(readings), 1.75), layout="constrained")
    axes = figure.subplots(1, len(readings), squeeze=False)[0]
    for ax, reading in zip(axes, readings, strict=True):
        ax.imshow(reading.mark.image[0], cmap="gray_r")
        ax.set_title(str(reading), fontsize=9)
        ax.axis("off")
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Source": source})
    try:
        if shown.exists() and source.encode() not in shown.read_bytes():
            raise DatasetError(f"{shown} was not written for {path.name}; move it, then try again")
        write_atomically(shown, buffer.getvalue())
    except OSError as error:
        raise DatasetError(f"{shown} cannot be written ({error.strerror})") from None
    return shown
