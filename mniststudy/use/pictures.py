"""The command `predict` and notebook 11: from the reader's own pictures to readings."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from scipy import ndimage
from torch import Tensor, nn

from mnistlib import DatasetError
from mnistlib.evaluate import predict_logits
from mnistlib.paths import write_atomically

if TYPE_CHECKING:
    from .calibrate import Calibration

LARGEST, SIDE = 50_000_000, 1200  # pixels of a file; longer side of what is looked at
# chosen on validation digits; ink is above NOISE times the noise, LOW of the darkest ink of the
# page and EDGE of the darkest ink of its own mark
NOISE, LOW, EDGE = 7.0, 0.25, 0.4
SLOPE, ACROSS = 0.07, 0.6  # of ruled lines, at most; share of the width that they cover, at least
STROKE = 2.0  # pixels of 28 to which thinner strokes are thickened
HOLES, LENGTH = 2, 36  # of a digit, at most; pixels of 28 of all strokes
OURS = "mnist predict --show "
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
    paper: np.ndarray
    """estimate of the paper without ink, `(H, W, 3)`"""
    ink: np.ndarray
    """difference from the paper in the direction of the ink's colour, `(H, W)` from 0 to 1"""
    mask: np.ndarray
    """where there is ink, without ruled lines and specks, `(H, W)` bool"""
    marks: list[Mark]
    """by rows from the top, each from the left"""
    reason: str
    """why there are no marks, if there are none"""
    scale: int = 1
    """pixels of the picture for one pixel here"""


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
    notes: list[str] = []
    remedy = "give a PNG or JPEG"
    path = Path(path)
    if not path.is_file():  # a pipe would wait for ever
        why = "it is a folder or a device, not a file" if path.exists() else "there is no such file"
        raise DatasetError(f"{path} cannot be read: {why}; {remedy}")
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as file:
            if file.width * file.height > LARGEST:
                raise DatasetError(f"{path} has over 50 million pixels; make it smaller")
            if (frames := getattr(file, "n_frames", 1)) > 1:
                notes.append(f"only the first of {frames} frames is used")
            picture = ImageOps.exif_transpose(file)  # photos are often stored sideways
            scale = math.ceil(max(picture.size) / SIDE)
            pixels = _as_rgb(picture, scale)
    except DatasetError:
        raise
    except Exception as error:  # each format's decoder fails in its own way
        why = "the file is empty" if path.stat().st_size == 0 else str(error)
        raise DatasetError(f"{path} cannot be read as a picture ({why}); {remedy}") from None
    return replace(find_marks(pixels), scale=scale), notes


def _as_rgb(picture: Image.Image, step: int) -> np.ndarray:
    """Convert a picture of any mode to `(H, W, 3)` float32 from 0 to 255, `step` times smaller."""
    if picture.mode[0] in "IF":  # 16 or 32 bits: their range differs from program to program
        values = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
        values = (values - values.min()) / max(float(np.ptp(values)), 1e-9) * 255
        picture = Image.fromarray(values.astype(np.uint8))
    picture = picture.convert("RGBA").reduce(step)
    rgba = np.asarray(picture, np.float32)
    colour, opaque = rgba[..., :3], rgba[..., 3:] / 255
    ground: np.ndarray = np.full(3, 255.0)
    if opaque.min() < 1 and opaque.max() > 0:
        seen = (colour * opaque).sum((0, 1)) / opaque.sum()  # mean visible colour, (3,)
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
    if colour.sum() < 0:  # dark ink: where there is half the light there is half the contrast
        light = paper.mean(2)
        signed *= light.max() / light.clip(light.max() / 5 + 1)
    smooth = ndimage.gaussian_filter(signed, min(1.0, max(height, width) / 400))
    noise = 1.4826 * float(np.median(np.abs(smooth)))
    top = float(smooth.max())
    nothing = np.zeros((height, width), bool)
    ink = (signed / max(top, 1.0)).clip(0, 1)
    if top < max(NOISE * noise, 10):
        return Page(pixels, paper, ink, nothing, [], "nothing stands out from the paper")
    mimic = _as_it_is(pixels, colour)
    if mimic is not None:
        mark = Mark((0, 0, 28, 28), mimic / 255, torch.from_numpy(mimic)[None])
        return Page(pixels, paper, ink, mimic > 127, [mark], "")
    faint = smooth > max(LOW / 2 * top, 5 * noise)  # faint lines must not look broken
    mask = without_lines(without_lines(faint).T).T & (smooth > LOW * top)
    labels, n = ndimage.label(mask, EIGHT)
    peaks = ndimage.maximum(smooth, labels, np.arange(n + 1))
    mask &= smooth > EDGE * peaks[labels]  # faint ink beside dark ink is no stroke
    labels, n = ndimage.label(mask, EIGHT)
    groups = _group(labels, n)
    if not 0 < len(groups) <= 100:
        why = f"{len(groups)} separate marks" if groups else "all marks are tiny or reach the edge"
        return Page(pixels, paper, ink, nothing, [], why)
    marks = [_mark(ink, np.isin(labels, group)) for group in groups]
    return Page(pixels, paper, ink, np.isin(labels, np.concatenate(groups)), _in_rows(marks), "")


def _as_it_is(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray | None:
    """Return a picture of MNIST's size and contrast as `(28, 28)` uint8, light on dark."""
    if pixels.shape[:2] != (28, 28):
        return None
    grey = pixels.mean(2) if colour.sum() > 0 else 255 - pixels.mean(2)
    return grey.round().astype(np.uint8) if np.median(grey) <= 40 and grey.max() >= 200 else None


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
    planes = [
        Image.fromarray(values[..., c]).resize(shape[::-1], way) for c in range(values.shape[2])
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def without_lines(mask: np.ndarray) -> np.ndarray:
    """Remove thin straight near-horizontal lines across most of a mask `(H, W)`.

    Where a stroke crosses a line, the ink is higher than the line is thick, and stays.
    """
    height, width = mask.shape
    columns = np.linspace(0, width - 1, min(width, 120)).astype(int)
    slopes = np.arange(-SLOPE, SLOPE, 3 / width)
    for _ in range(4 if height > 28 else 0):  # lines of a photo are not quite parallel
        thicker = ndimage.binary_dilation(mask[:, columns], np.ones((3, 1), bool))
        best, rows = -1.0, np.zeros(0)
        for slope in slopes:
            y = np.arange(height)[:, None] + np.rint(slope * (columns - width / 2)).astype(int)
            within = (y >= 0) & (y < height)
            covered = (np.take_along_axis(thicker, y.clip(0, height - 1), 0) & within).sum(1)
            covered = covered / within.sum(1).clip(0.3 * len(columns))  # (height,) from 0 to 1
            if (sharp := float((covered**8).sum())) > best:
                best, rows, steepest = sharp, covered > ACROSS, slope
        ends = np.flatnonzero(np.diff(np.pad(rows.astype(int), 1))).reshape(-1, 2)
        thick = {int(a): int(b - a) for a, b in ends if b - a < 4 + height / 40}
        if not thick:
            break
        band = np.zeros(height, bool)
        for a, t in thick.items():
            band[max(0, a - 1) : a + t + 1] = True
        y = np.arange(height)[:, None] - np.rint(steepest * (np.arange(width) - width / 2)).astype(
            int
        )
        strokes = ndimage.binary_opening(mask, np.ones((max(thick.values()) + 1, 1), bool))
        mask = mask & (strokes | ~band[y.clip(0, height - 1)])
    return mask


def _group(labels: np.ndarray, n: int) -> list[list[int]]:
    """Group the components 1 to n of a labelled page into marks, without specks and frames."""
    places = ndimage.find_objects(labels)
    box = np.array([(x.start, y.start, x.stop, y.stop) for y, x in places]).reshape(-1, 4)
    size = (box[:, 2:] - box[:, :2]).astype(float)  # (n, 2): width, height
    extent = size.max(1)
    keep = extent >= 6
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    contact = np.bincount(edge, minlength=n + 1)[1:]
    keep &= contact < 0.3 * min(labels.shape)  # a desk beside the paper, not a digit
    for i in np.flatnonzero(keep):  # a frame is thin and has something inside
        inside = (box[:, :2] > box[i, :2]).all(1) & (box[:, 2:] < box[i, 2:]).all(1)
        if (extent[inside & keep] >= 0.3 * extent[i]).any() and _is_frame(
            labels[places[i]] == i + 1
        ):
            keep[i] = False
    if not keep.any() or keep.sum() > 300:
        return [[int(i)] for i in np.flatnonzero(keep)]
    group = np.arange(n)
    for i in np.flatnonzero(keep):
        for j in np.flatnonzero(keep[:i]):
            big = max(extent[i], extent[j])
            gap = np.maximum(box[i, :2], box[j, :2]) - np.minimum(box[i, 2:], box[j, 2:])
            over, near = -gap / np.minimum(size[i], size[j]), gap / big
            piece = min(size[i, 1], size[j, 1]) < 0.6 * max(size[i, 1], size[j, 1])
            if (over[0] > (0.3 if piece else 0.5) and near[1] < (0.3 if piece else 0.1)) or (
                piece and near.max() < 0.1
            ):
                group[group == group[i]] = group[j]
    members = [np.flatnonzero(keep & (group == g)) for g in np.unique(group[keep])]
    sides = [box[m, 2:].max(0) - box[m, :2].min(0) for m in members]
    least = max(8, 0.3 * max(max(side) for side in sides))
    return [
        [int(k) + 1 for k in m]
        for m, side in zip(members, sides, strict=True)
        if max(side) >= least and side[1] >= 0.3 * side[0]  # no speck, no dash
    ]


def _is_frame(own: np.ndarray) -> bool:
    """Whether nearly all of a mask `(h, w)` is near its sides and reaches all four of them."""
    height, width = own.shape
    inner = own[height // 6 : -(height // 6) or None, width // 6 : -(width // 6) or None]
    return bool(inner.sum() < 0.15 * own.sum())


def _mark(ink: np.ndarray, own: np.ndarray) -> Mark:
    """Cut a mark, given as a mask `(H, W)`, from the ink."""
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    place = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    crop = ink[place] * ndimage.binary_dilation(own, EIGHT)[place]
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Mark(box, crop, torch.from_numpy(to_mnist(crop))[None])


def to_mnist(crop: np.ndarray) -> np.ndarray:
    """Bring ink `(h, w)` from 0 to 1 into MNIST's format, `(28, 28)` uint8.

    As in MNIST, it is scaled to fit 20x20 pixels and its centre of mass is moved to the middle
    (Y. LeCun et al., Proc. IEEE 86 (1998) 2278-2324). Hairlines are thickened before, and the
    contrast is restored after.
    """
    zoom = 20 / max(crop.shape)
    body = crop > 0.5 * crop.max()
    # the mean distance to the edge is a quarter of a stroke's width
    thin = STROKE / zoom - 4 * float(
        ndimage.distance_transform_edt(np.pad(body, 1)).sum() / body.sum()
    )
    if thin > 1:
        extra = math.ceil(thin / 2)
        crop = ndimage.grey_dilation(np.pad(crop, extra), footprint=_disc(extra))
        zoom = 20 / max(crop.shape)
    height, width = (max(1, round(side * zoom)) for side in crop.shape)
    way = Image.Resampling.BOX if zoom < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(crop.astype(np.float32)).resize((width, height), way))
    small = small / np.quantile(small[small > 0.3 * small.max()], 0.8)
    small = (small.clip(0, 1) * 255).round().astype(np.uint8)
    y, x = ndimage.center_of_mass(small)
    down, right = (
        min(max(round(13.5 - y), 0), 28 - height),
        min(max(round(13.5 - x), 0), 28 - width),
    )
    out = np.zeros((28, 28), np.uint8)
    out[down : down + height, right : right + width] = small
    return out


def _disc(radius: int) -> np.ndarray:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return x * x + y * y <= radius * radius + 1


def _in_rows(marks: list[Mark]) -> list[Mark]:
    """Sort marks by rows from the top, and each row from the left."""
    rows: list[list[Mark]] = []
    for mark in sorted(marks, key=lambda m: m.box[1] + m.box[3]):
        middle = (mark.box[1] + mark.box[3]) / 2
        if rows and middle < max(m.box[3] for m in rows[-1]):
            rows[-1].append(mark)
        else:
            rows.append([mark])
    return [mark for row in rows for mark in sorted(row, key=lambda m: m.box[0])]


def is_digit_like(image: np.ndarray) -> bool:
    """Whether an image `(28, 28)` uint8 has no more holes and strokes than a digit can have."""
    body = np.pad(image > 127, 1)
    labels, _ = ndimage.label(~np.pad(image >= 100, 1))
    holes = (np.bincount(labels[labels > 0]) > 7).sum() - 1  # beside the outside
    width = 4 * ndimage.distance_transform_edt(body).sum() / max(body.sum(), 1)
    return bool(holes <= HOLES and body.sum() <= LENGTH * width)


def read_marks(
    model: nn.Module, marks: Sequence[Mark], calibration: "Calibration"
) -> list[Reading]:
    """Let a network read marks; probabilities are softmax(logits / temperature)."""
    if not marks:
        return []
    logits = predict_logits(model, torch.stack([mark.image for mark in marks]))  # (N, 10)
    chances = (logits / calibration.temperature).softmax(1)
    readings = []
    for mark, row in zip(marks, chances, strict=True):
        answer = str(int(row.argmax())) if row.max() >= calibration.sure else "not sure"
        if not is_digit_like(mark.image[0].numpy()):
            answer = "not a digit"
        readings.append(Reading(answer, row.tolist(), mark))
    return readings


def save_readings(path: str | Path, readings: Sequence[Reading]) -> Path:
    """Draw what the network saw and answered beside a picture, as `NAME-read.png`; return its path.

    Raises:
        DatasetError: a file of that name is not by this function, or the folder is read-only.
    """
    path = Path(path)
    shown = path.with_name(f"{path.stem}-read.png")
    if shown.exists():
        try:
            with Image.open(shown) as old:
                ours = old.info.get("Source") == OURS + path.name
        except OSError:
            ours = False
        if not ours:
            raise DatasetError(f"{shown} was not written for {path.name}; move it, then try again")
    canvas = Image.new("L", (max(1, len(readings)) * 150 + 10, 175), 255)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for k, reading in enumerate(readings):
        image = Image.fromarray(255 - reading.mark.image[0].numpy()).resize((140, 140))
        canvas.paste(image, (150 * k + 10, 5))
        draw.text((150 * k + 80, 160), str(reading), 0, font, anchor="mm")
    if not readings:
        draw.text((80, 80), "not a digit", 0, font, anchor="mm")
    about, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    about.add_text("Source", OURS + path.name)
    canvas.save(buffer, "PNG", pnginfo=about)
    try:
        write_atomically(shown, buffer.getvalue())
    except OSError as error:
        raise DatasetError(f"{shown} cannot be written ({error.strerror})") from None
    return shown
