"""Ruled lines, boxes and grids on a page: found as long straight runs of ink, and removed."""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.sparse.csgraph import connected_components

STRAIGHT = 0.15  # slope of a line, at most
COVERED = 0.6  # share of its length that is ink, at least


@dataclass(frozen=True, repr=False)
class Line:
    """A near-horizontal line on a mask, or a near-vertical one on the mask's transpose."""

    start: int
    stop: int
    curve: np.ndarray
    """coefficients of the row as polynomial of the column"""
    thick: float
    """pixels across"""
    length: int
    """pixels along, with the parts beyond gaps that continue it"""


def runs(mask: np.ndarray, axis: int) -> np.ndarray:
    """Return for each pixel of a mask `(H, W)` the length of its run along an axis."""
    if axis == 0:
        return runs(mask.T, 1).T
    at = np.arange(mask.shape[1])
    before = np.maximum.accumulate(np.where(mask, -1, at), axis=1)
    after = np.minimum.accumulate(np.where(mask, mask.shape[1], at)[:, ::-1], axis=1)[:, ::-1]
    return np.where(mask, after - before - 1, 0)


def find_lines(mask: np.ndarray) -> list[Line]:
    """Find near-horizontal lines on a mask `(H, W)`: thin, straight, and one across small gaps."""
    width = mask.shape[1]
    along, across = runs(mask, 1), runs(mask, 0)
    thin = mask & (across <= max(10, max(mask.shape) / 60)) & (along >= np.maximum(3 * across, 6))
    reach = max(5, width // 50)
    joined = ndimage.binary_dilation(thin, np.ones((1, 2 * reach + 1), bool))
    joined = ndimage.binary_dilation(joined, np.ones((3, 1), bool))
    labels, _ = ndimage.label(joined, np.ones((3, 3), bool))
    labels *= thin
    found = []
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        if not place or place[1].stop - place[1].start < 20:
            continue
        y, x = np.nonzero(labels[place] == number)
        y, x = y + place[0].start, x + place[1].start
        curve = np.polyfit(x, y, 2 if np.ptp(x) > 200 else 1)
        off = np.abs(y - np.polyval(curve, x))
        near = off <= max(2.0, 2 * float(np.median(off)))
        curve = np.polyfit(x[near], y[near], len(curve) - 1)
        off = np.abs(y[near] - np.polyval(curve, x[near]))
        start, stop = int(x[near].min()), int(x[near].max()) + 1
        thick = float(np.median(across[y[near], x[near]]))
        slope = abs(np.polyval(curve, stop) - np.polyval(curve, start)) / (stop - start)
        covered = len(np.unique(x[near])) / (stop - start)
        if covered >= COVERED and slope <= STRAIGHT and off.mean() <= max(1.0, 0.4 * thick):
            found.append(Line(start, stop, curve, thick, stop - start))
    return _continued(found)


def _continued(lines: list[Line]) -> list[Line]:
    """Give lines the length of all parts that continue each other, as across a digit."""
    ends = np.array([[line.start, line.stop] for line in lines]).reshape(-1, 2)
    near, straight = np.eye(len(lines), dtype=bool), [_straight(line) for line in lines]
    for i, a in enumerate(lines):
        for k, b in enumerate(lines):
            if a.stop <= b.start + 5:
                off = np.polyval(straight[i] - straight[k], (a.stop + b.start) / 2)
                near[i, k] |= abs(off) <= max(3.0, a.thick)
    n, number = connected_components(near)
    whole = [ends[number == k, 1].max() - ends[number == k, 0].min() for k in range(n)]
    covered = [np.diff(ends[number == k]).sum() / whole[k] for k in range(n)]
    return [
        replace(line, length=int(whole[k])) if covered[k] >= COVERED else line
        for line, k in zip(lines, number, strict=True)
    ]


def _straight(line: Line) -> np.ndarray:
    """Return the coefficients of a straight line through the ends of a line."""
    x = np.array([line.start, line.stop])
    return np.polyfit(x, np.polyval(line.curve, x), 1)


def without_lines(mask: np.ndarray, lines: list[Line]) -> np.ndarray:
    """Remove lines from a mask `(H, W)`; where a stroke crosses one, it stays."""
    height, _ = mask.shape
    across, kept = runs(mask, 0), mask.copy()
    for line in lines:
        x = np.arange(max(0, line.start - 2), min(mask.shape[1], line.stop + 2))
        half = line.thick / 2 + 1.5
        rows = np.polyval(line.curve, x)[None] + np.arange(-int(half + 1), int(half + 2))[:, None]
        y = np.rint(rows).astype(int)
        inside = (y >= 0) & (y < height) & (np.abs(y - np.polyval(line.curve, x)) <= half)
        y, x = y[inside], np.broadcast_to(x, inside.shape)[inside]
        gone = across[y, x] <= line.thick + 3
        kept[y[gone], x[gone]] = False
    return kept


def slope_of(lines: list[Line]) -> float | None:
    """Return the median slope of lines, or None if there are fewer than three."""
    slopes = [np.polyval(np.polyder(n.curve), (n.start + n.stop) / 2) for n in lines]
    return float(np.median(slopes)) if len(slopes) >= 3 else None
