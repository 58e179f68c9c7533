"""From ink to digits: candidate cuts and groups of its pieces are read, and the best path counts.

Over-segmentation with dynamic programming, as for the amounts on cheques (Y. LeCun et al., Proc.
IEEE 86 (1998) 2278-2324, section V): the ink of each word is cut into pieces that are parts of
one digit at most; all groups of neighbouring pieces are read in one batch; the groups that explain
the word best are its digits.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from mnistlib.evaluate import predict_logits

from .lines import slope_of, without_lines
from .mnist_form import stroke_width, to_mnist
from .pictures import Page

EIGHT = np.ones((3, 3), bool)  # neighbours of a pixel, the diagonal ones included
MOST = 600  # pieces of ink of a page; more are a texture
SLANTED = 0.4  # of a word, at least, to be set upright
SPECK = 0.25  # of the height of the writing: smaller pieces of ink are no digits
TOGETHER, PARTS = 4, 12  # components and pieces of a digit, at most
# prices, in units of -log(probability); chosen on pages with validation digits
CUT, JOIN, GAP, SKIP, WIDE, TALL = 0.5, 0.5, 4.0, 3.0, 2.5, 2.0
DOUBT = 6.0  # times -log(probability) of what is cut out: it must read better than the whole
NARROW, PAIR = 4.0, 1.0  # a cut costs more in what is narrower, of its height, than two digits
# width to height that four of five digits 0 to 9 of MNIST have at most
WIDTHS = (1.05, 0.6, 1.11, 0.95, 0.95, 1.18, 0.85, 0.9, 0.9, 0.8)
SHARP = 3.0  # how much more often the cheaper way is right than prices say
SURELY = 0.5  # a digit below it is none
# mean confidences of a word that is read and of one that is not; height of print to writing
CLEAR, UNCLEAR, SMALLER = 0.9, 0.6, 0.7

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Calibration:
    """What turns logits into an answer."""

    temperature: float = 1.0
    """logits are divided by it"""
    sure: float = 0.8
    """a confidence below it is `not sure`"""
    twin: Mapping[str, Any] | None = field(default=None, repr=False)
    """the run on whose validation images both were fitted; None: they are these defaults"""


@dataclass(frozen=True, repr=False)
class Reading:
    """The answer to one mark."""

    answer: str
    """a digit, `not sure` or `not a digit`"""
    probabilities: list[float]
    """of the ten digits"""
    confidence: float
    """largest probability times that of the way in which the ink was divided into marks"""
    box: Box
    """in pixels of the page"""
    crop: np.ndarray
    """ink within the box, `(h, w)` from 0 to 1"""
    image: Tensor
    """the same in MNIST's format, `(1, 28, 28)` uint8, light on dark"""

    @property
    def ranking(self) -> list[int]:
        """The digits, the most probable first."""
        return sorted(range(10), key=lambda k: -self.probabilities[k])

    @property
    def reason(self) -> str:
        """Why there is no digit as answer, if there is none."""
        largest = max(self.probabilities)
        if self.answer.isdigit():
            return ""
        if self.answer == "not a digit":
            return "unlike any digit"
        if self.confidence < 0.8 * largest:
            return "its ink may be divided otherwise"
        return "may be {} or {}".format(*self.ranking)

    def __repr__(self) -> str:
        """Give the answer and its confidence."""
        if self.answer == "not a digit":
            return self.answer
        best = "" if self.answer.isdigit() else f"perhaps {self.ranking[0]}, "
        return f"{self.answer} ({best}{100 * self.confidence:.1f} %)"


@dataclass(frozen=True, repr=False)
class Answer:
    """What is read on a page."""

    readings: Sequence[Reading] = ()
    """by rows from the top, each from the left"""
    notes: Sequence[str] = ()
    """what was removed, left out, cut or joined"""
    left_out: Sequence[Reading] = ()
    """marks that are taken for text"""
    reason: str = ""
    """why nothing is read, if nothing is"""
    mask: np.ndarray | None = None
    """the ink that was read, as the page lies, `(H, W)` bool"""

    @property
    def text(self) -> str:
        """The digits, with `?` for a mark that is not answered."""
        return "".join(r.answer if r.answer.isdigit() else "?" for r in self.readings)

    @property
    def confidence(self) -> float:
        """Probability that all marks are right, if their errors are independent."""
        return math.prod(reading.confidence for reading in self.readings) if self.readings else 0.0

    def worth(self, highest: float = math.inf, lines: np.ndarray | None = None) -> float:
        """How well the page reads: a mark counts from -3 to 1, or -1 if it is a line.

        Args:
            highest: in pixels; a 1 above it is a line.
            lines: where they are, `(H, W)` bool; another digit that is made of them is none.
        """
        total = 0.0
        for mark in self.readings:
            left, top, right, bottom = (max(side, 0) for side in mark.box)
            line = mark.ranking[0] == 1 and bottom - top > highest
            if mark.ranking[0] != 1 and lines is not None and self.mask is not None:
                own = self.mask[top:bottom, left:right]
                line = bool((own & lines[top:bottom, left:right]).sum() > 0.5 * own.sum())
            total += -1 if line else 4 * mark.confidence - 3
        return total

    def __repr__(self) -> str:
        """Give the answers and the confidence of all together."""
        return f"{', '.join(map(repr, self.readings)) or self.reason}"


def read_page(model: nn.Module, page: Page, calibration: Calibration) -> Answer:
    """Read all digits on a page.

    The lines of a form are removed if it reads better without them, and a page of several digits is
    turned if it reads better so.
    """
    if page.reason:
        return Answer(reason=page.reason)
    if page.whole is not None:  # 28x28 pixels as in MNIST
        chances = _read(model, [page.whole], calibration)[0]
        side = round(28 / page.scale)
        reading = _reading(
            (0, 0, side, side), page.ink, page.whole, chances, float(chances.max()), calibration
        )
        return Answer([reading], mask=page.mask)
    found = _read_ways(model, page, calibration)
    n = len(found.readings)
    if n == 2 and found.worth() <= 0 and (one := _as_one(model, page, calibration)):
        return one
    if n > 1 and found.worth() < 0.5 * n:
        plain = replace(page, mask=_without(page, 0.4 * max(page.mask.shape)))
        best = found.worth() / n + 0.5
        for turn in (1, 3, 2) if n > 2 else (1, 3):  # two digits upside down read too well
            turned = plain.turned(turn)
            other = _read_ways(model, turned, calibration)
            mean = other.worth() / max(len(other.readings), 1)
            if len(other.readings) > 1 and mean > best:
                best, found = mean, _turned_back(other, turn, turned.ink.shape)
    if found.readings and found.worth() <= 0 and (one := _as_one(model, page, calibration)):
        return one
    return found


def _as_one(model: nn.Module, page: Page, calibration: Calibration) -> Answer | None:
    """Read all ink of a page as one digit, of strokes with gaps; None if it reads badly."""
    labels, n = ndimage.label(page.mask, EIGHT)
    places = ndimage.find_objects((labels > 0).astype(np.uint8))
    if not 1 < n <= PARTS:
        return None
    ((rows, columns),) = places
    crop = page.ink[rows, columns] * ndimage.binary_dilation(page.mask[rows, columns], EIGHT)
    image = torch.from_numpy(to_mnist(crop))[None]
    chances = _read(model, [image], calibration)[0]
    if chances.max() < max(SURELY, calibration.sure):
        return None
    box = columns.start, rows.start, columns.stop, rows.stop
    reading = _reading(box, crop, image, chances, float(chances.max()), calibration)
    return Answer([reading], [f"{n} pieces of ink are taken for one digit"], mask=page.mask)


def _turned_back(answer: Answer, turn: int, shape: tuple[int, ...]) -> Answer:
    """Give boxes of a page `shape` that was turned by quarters in the pixels of the page itself."""
    readings = []
    for reading in answer.readings:
        left, top, right, bottom = reading.box
        height, width = shape
        for _ in range(turn):  # back, clockwise
            left, top, right, bottom = height - bottom, left, height - top, right
            height, width = width, height
        readings.append(replace(reading, box=(left, top, right, bottom)))
    note = f"turned by {90 * turn} degrees counterclockwise, because it reads better so"
    return replace(answer, readings=readings, notes=[note, *answer.notes])


def _read_ways(model: nn.Module, page: Page, calibration: Calibration) -> Answer:
    """Read a page with its lines and without them, and return what reads better."""
    level, upright = page.lines
    slope = slope_of([line for line in level if line.length > 0.2 * max(page.mask.shape)])
    found = _read_mask(model, page, page.mask, slope, calibration)
    if lines := [*level, *upright]:
        longest = max(line.length for line in lines)
        # the writing is as high as it looks with the lines, or without the longest of them
        heights = [
            _height(ndimage.find_objects(_writing(ndimage.label(mask, EIGHT)[0])))
            for mask in (page.mask, _without(page, 0.4 * longest))
        ]
        highest, tried = 1.3 * heights[0], {0}
        thick = 3 * float(np.median([line.thick for line in lines]))  # more may be bars of digits
        for height, thickest in itertools.product(heights, (math.inf, thick)):
            least = 1.3 * height
            n = sum(line.length >= least and line.thick <= thickest for line in lines)
            if n not in tried:
                tried.add(n)
                left = _without(page, least, thickest)
                other = _read_mask(model, page, left, slope, calibration)
                rest = _without(page, max(least, 0.4 * max(page.mask.shape)), thickest)
                better = other.worth(highest) - found.worth(highest, page.mask & ~rest)
                if other.readings and better > 0.3:
                    found = replace(other, notes=[f"{n} lines are removed", *other.notes])
    return found


def _without(page: Page, least: float, thickest: float = math.inf) -> np.ndarray:
    """Return the ink of a page `(H, W)` without the lines of a length and what remains of them."""
    rows, columns = (
        [line for line in way if line.length >= least and line.thick <= thickest]
        for way in page.lines
    )
    left = without_lines(without_lines(page.mask, rows).T, columns).T
    labels, n = ndimage.label(left, EIGHT)
    beside = ndimage.binary_dilation(page.mask & ~left, EIGHT, 3)
    return left & (ndimage.mean(beside, labels, np.arange(n + 1)) < 0.7)[labels]


def _boxes(places: Sequence[tuple[slice, ...]]) -> np.ndarray:
    """Return left, top, right and bottom of the places of components, `(n, 4)`."""
    return np.array([(x.start, y.start, x.stop, y.stop) for y, x in places], int).reshape(-1, 4)


def _height(places: Sequence[tuple[slice, ...]]) -> float:
    """Return the height of the writing: of the component in the middle of all heights, no bars."""
    box = _boxes(places)
    width, heights = (box[:, 2:] - box[:, :2]).T
    heights = np.sort(
        heights[width > 0.25 * heights] if (width > 0.25 * heights).any() else heights
    )
    if not len(heights):
        return 0.0
    total = heights.cumsum()
    return float(heights[np.searchsorted(total, 0.5 * total[-1])])


def _read_mask(
    model: nn.Module, page: Page, mask: np.ndarray, slope: float | None, calibration: Calibration
) -> Answer:
    """Read the digits of a mask `(H, W)` on a page."""
    labels, _ = ndimage.label(mask, EIGHT)
    labels = _writing(labels)
    places = ndimage.find_objects(labels)
    if not places:
        return Answer(reason="all marks are tiny or reach the edge", mask=labels > 0)
    if len(places) > MOST:
        return Answer(reason=f"{len(places)} separate marks are no digits", mask=labels > 0)
    box = _boxes(places)
    words = [_Word(page.ink, labels, ids, box[ids]) for ids in _words(box)]
    words = [word for word in words if word.arcs and not word.is_dash]
    if not words:
        return Answer(reason="all marks are tiny", mask=labels > 0)
    images = [image for word in words for image in word.images]
    chances, k = _read(model, images, calibration), 0
    read: list[list[Reading]] = []
    changes: list[tuple[int, int, int]] = []
    for word in words:
        own, k = chances[k : k + len(word.images)], k + len(word.images)
        path = word.best_path(own)
        marks = [
            _reading(word.box(a), word.crop(a), word.images[a], own[a], confidence, calibration)
            for a, confidence in path
        ]
        changes.append(word.changes([word.arcs[a] for a, _ in path]))
        read.append(marks)
    text = _text(read, words)
    texts = [mark for marks, out in zip(read, text, strict=True) if out for mark in marks]
    readings = [mark for marks, out in zip(read, text, strict=True) if not out for mark in marks]
    cut, joined, skipped = (sum(counts) for counts in zip(*changes, strict=True))
    notes = [
        f"{n} {'mark' if n == 1 else 'marks'} {what}"
        for n, what in ((cut, "cut from ink that hangs together"), (joined, "joined from pieces"),
                        (skipped, "left out as too small"), (len(texts), "left out as text"))
        if n
    ]  # fmt: skip
    if not readings:
        return Answer((), notes, reason="all marks are tiny", mask=labels > 0)
    return Answer(_in_rows(readings, slope), notes, texts, mask=labels > 0)


def _text(read: Sequence[Sequence[Reading]], words: "Sequence[_Word]") -> list[bool]:
    """Say which words are text beside the digits: they read badly, and are printed smaller."""
    height = np.array([word.height for word in words])
    sure = np.array([sum(m.confidence for m in marks) / max(len(marks), 1) for marks in read])
    several = np.array([len(set(word.of)) > 2 for word in words])
    if not (sure >= CLEAR).any():
        return [False] * len(words)
    small = height < SMALLER * height[sure >= CLEAR].max()
    text = several & (sure < np.where(small, CLEAR, UNCLEAR))
    if (small & text).any():  # figures within the text
        text |= small & (height <= 1.15 * height[small & text].max())
    return text.tolist()


def _writing(labels: np.ndarray) -> np.ndarray:
    """Number the components of a labelled page `(H, W)` anew, without specks, frames and edges."""
    places = ndimage.find_objects(labels)
    box = _boxes(places)
    extent = (box[:, 2:] - box[:, :2]).max(1, initial=0)  # the longer side
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    contact = np.bincount(edge, minlength=len(box) + 1)[1:]
    # a desk beside the paper is no digit
    keep = (extent >= 6) & (contact < 0.3 * min(labels.shape))
    for i in np.flatnonzero(keep & (extent > 40)):
        inside = (box[:, :2] > box[i, :2]).all(1) & (box[:, 2:] < box[i, 2:]).all(1)
        keep[i] = not (
            (extent[inside] > 0.1 * extent[i]).any() and _is_frame(labels[places[i]] == i + 1)
        )
    height = _height([place for place, fine in zip(places, keep, strict=True) if fine])
    keep &= extent >= max(6, SPECK * height)
    wide, high = (box[:, 2:] - box[:, :2]).T
    keep &= (high > 0.15 * wide) | (wide < 1.2 * height)  # a line
    area = np.bincount(labels.ravel(), minlength=len(box) + 1)[1:]
    keep &= area[keep].sum() > area[extent < 6].sum()  # or it is noise
    number = np.zeros(len(box) + 1, int)
    number[1:][keep] = 1 + np.arange(keep.sum())
    return number[labels]


def _is_frame(own: np.ndarray) -> bool:
    """Whether a component `(h, w)` runs along all four sides of its box."""
    v, u = (math.ceil(0.2 * side) for side in own.shape)
    sides = own[:v].any(0), own[-v:].any(0), own[:, :u].any(1), own[:, -u:].any(1)
    return all(side.mean() > 0.9 for side in sides)


def _words(box: np.ndarray) -> list[np.ndarray]:
    """Group boxes `(n, 4)` into words: beside each other, or pieces of a digit; their indices."""
    low, high = box[:, :2], box[:, 2:]
    height = high[:, 1] - low[:, 1]
    gap = np.maximum(low[:, None], low) - np.minimum(high[:, None], high)  # (n, n, 2)
    taller = np.maximum.outer(height, height)
    over = -gap / np.maximum(np.minimum(*np.broadcast_arrays((high - low)[:, None], high - low)), 1)
    beside = (over[..., 1] > 0.4) & (gap[..., 0] < 0.4 * taller)
    piece = np.minimum.outer(height, height) < 0.6 * taller
    above = piece & (over[..., 0] > 0.3) & (gap[..., 1] < 0.3 * taller)
    above |= piece & (gap.max(-1) < 0.15 * taller)
    n, number = connected_components(beside | above)
    return [np.flatnonzero(number == k) for k in range(n)]


class _Word:
    """The pieces of a word, and all groups of them that may be a digit."""

    def __init__(
        self, ink: np.ndarray, labels: np.ndarray, ids: np.ndarray, chosen: np.ndarray
    ) -> None:
        """Cut the components `ids` of a labelled page `(H, W)` and normalise all groups.

        Args:
            chosen: the boxes of the components, `(n, 4)`.
        """
        left, top = chosen[:, :2].min(0)
        right, bottom = chosen[:, 2:].max(0)
        area = labels[top:bottom, left:right]
        area = np.where(np.isin(area, ids + 1), area, 0)
        heights = chosen[:, 3] - chosen[:, 1]
        self.height = float(np.quantile(heights, 0.75, method="nearest"))
        several = (heights > 0.6 * self.height).sum() > 1  # not the flag of a 5
        self.slant = _slant(area) if several else 0.0
        spare = math.ceil(abs(self.slant) * len(area) / 2)
        self.corner = (int(left) - spare, int(top))
        self.middle = (len(area) - 1) / 2
        self.ink = _sheared(ink[top:bottom, left:right], self.slant, spare, 1)
        area = _sheared(area, self.slant, spare, 0)
        pieces: list[tuple[int, np.ndarray, float]] = []  # component, mask, price of the cut after
        for i in ids:
            if not (own := area == i + 1).any():
                continue
            cuts = _cuts(own, self.height)
            number = sum((np.arange(own.shape[1]) > seam[:, None]).astype(int) for seam, _ in cuts)
            for k in range(len(cuts) + 1):
                part = own & (number == k)
                if part.sum() > 10:
                    pieces.append((int(i), part, cuts[k][1] if k < len(cuts) else 0.0))
        pieces.sort(key=lambda piece: ndimage.center_of_mass(piece[1])[1])
        self.of = [piece[0] for piece in pieces]
        self.masks = [piece[1] for piece in pieces]
        self.after = [piece[2] for piece in pieces]
        self.place = _boxes([ndimage.find_objects(m.astype(np.uint8))[0] for m in self.masks])
        self.arcs = [
            (i, j)
            for i in range(len(pieces))
            for j in range(i + 1, min(len(pieces), i + PARTS) + 1)
            if j == i + 1 or self._fits(i, j)
        ]
        self.images = [
            torch.from_numpy(to_mnist(self.crop(a)))[None] for a in range(len(self.arcs))
        ]

    @property
    def is_dash(self) -> bool:
        """Whether it is much wider than high."""
        left, top, right, bottom = self._extent(0, len(self.masks))
        return bottom - top < 0.3 * (right - left) and len(set(self.of)) == 1

    def _extent(self, i: int, j: int) -> tuple[int, int, int, int]:
        """Return the box around the pieces i to j, j left out, within the word."""
        low, high = self.place[i:j, :2].min(0), self.place[i:j, 2:].max(0)
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])

    def _fits(self, i: int, j: int) -> bool:
        """Whether pieces together are not much larger than a digit, or one component."""
        left, top, right, bottom = self._extent(i, j)
        size = max(right - left, bottom - top)
        components = len(set(self.of[i:j]))
        return components == 1 or (size <= 2.2 * self.height and components <= TOGETHER)

    def crop(self, arc: int) -> np.ndarray:
        """Return the ink of a group `(h, w)`."""
        i, j = self.arcs[arc]
        left, top, right, bottom = self._extent(i, j)
        own = np.logical_or.reduce([m[top:bottom, left:right] for m in self.masks[i:j]])
        return self.ink[top:bottom, left:right] * ndimage.binary_dilation(own, EIGHT)

    def box(self, arc: int) -> Box:
        """Return the box of a group on the page."""
        left, top, right, bottom = self._extent(*self.arcs[arc])
        x, y = self.corner
        ends = sorted(self.slant * (row - self.middle) for row in (top, bottom - 1))
        x += round(sum(ends) / 2)  # where its middle was before the word was set upright
        return left + x, top + y, right + x, bottom + y

    def price(self, i: int, j: int, digit: int) -> float:
        """Return the price of taking the pieces i to j, j left out, for a digit."""
        left, top, right, bottom = self._extent(i, j)
        price = WIDE * max(0.0, (right - left) / (bottom - top) - WIDTHS[digit])
        price += TALL * max(0.0, abs(math.log((bottom - top) / self.height)) - 0.6)
        inside = set(self.of[i:j])
        for k, (of, after) in enumerate(zip(self.of, self.after, strict=True)):
            if after and of in inside:  # a cut of which one side is in the group
                following = next((m for m in range(k + 1, len(self.of)) if self.of[m] == of), None)
                if following is not None and (i <= k < j) != (i <= following < j):
                    price += after / 2
        parts = [self.place[[m for m in range(i, j) if self.of[m] == of]] for of in inside]
        spans = [(*p[:, :2].min(0), *p[:, 2:].max(0)) for p in parts]
        spans.sort(key=lambda s: s[1] - s[3])  # the tallest first
        for k, a in enumerate(spans[1:], 1):
            gaps = [
                max(max(a[0], b[0]) - min(a[2], b[2]), max(a[1], b[1]) - min(a[3], b[3]), 0)
                for b in spans[:k]
            ]
            price += JOIN + 1.5 * max(0.0, (a[3] - a[1]) / self.height - 0.3)
            price += GAP * min(gaps) / self.height
        return price

    def best_path(self, chances: Tensor) -> list[tuple[int, float]]:
        """Return the groups that explain the word best, each with its confidence.

        That is the probability, over all ways through the word, of a group at about this place that
        is the same digit (forward-backward algorithm).

        Args:
            chances: of the digits for each group, `(groups, 10)`.
        """
        n, (largest, digit) = len(self.masks), (values.tolist() for values in chances.max(1))
        steps = []
        for a, (i, j) in enumerate(self.arcs):
            whole = set(self.of[i:j]).isdisjoint(self.of[:i] + self.of[j:])
            unlike = -math.log(largest[a]) * (1 if whole else DOUBT)
            steps.append((i, j, SHARP * (self.price(i, j, digit[a]) + unlike), a))
        for i, (left, top, right, bottom) in enumerate(self.place):
            if bottom - top < 0.5 * self.height and self.of.count(self.of[i]) == 1:
                size = math.sqrt((right - left) * (bottom - top)) / self.height
                steps.append((i, i + 1, SHARP * SKIP * size, -1))
        steps.sort()
        best, back = [0.0] + [math.inf] * n, [(-1, -1)] * (n + 1)
        total, rest = [0.0] + [-math.inf] * n, [-math.inf] * n + [0.0]
        for i, j, cost, a in steps:
            total[j] = float(np.logaddexp(total[j], total[i] - cost))
            if best[i] + cost < best[j]:
                best[j], back[j] = best[i] + cost, (i, a)
        for i, j, cost, _ in reversed(steps):
            rest[i] = float(np.logaddexp(rest[i], rest[j] - cost))
        share = {a: math.exp(total[i] + rest[j] - cost - total[n]) for i, j, cost, a in steps}
        areas = np.cumsum([0, *(mask.sum() for mask in self.masks)])

        def same(a: int, b: int) -> bool:
            (i, j), (k, m) = self.arcs[a], self.arcs[b]
            both = areas[min(j, m)] - areas[max(i, k)]
            return digit[a] == digit[b] and both > 0.5 * (areas[max(j, m)] - areas[min(i, k)])

        path, j = [], n
        while j > 0:
            i, a = back[j]
            if a >= 0:
                near = [b for b in range(len(self.arcs)) if same(a, b)]
                path.append((a, sum(share[b] * largest[b] for b in near)))
            j = i
        return path[::-1]

    def changes(self, path: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        """Count the groups that are cut from a component, those of several, and what is in none."""
        parts = [set(self.of[i:j]) for i, j in path]
        cut = sum(any(part & other for other in parts if other is not part) for part in parts)
        skipped = len(self.of) - sum(j - i for i, j in path)
        return cut, sum(len(part) > 1 for part in parts), skipped


def _slant(area: np.ndarray) -> float:
    """Return the slant of a word, pixels to the right for one down, from moments of its components.

    Only what is more than usual counts: upright writing has a slant of 0.
    """
    together, down = 0.0, 1e-9
    for i in np.unique(area[area > 0]):
        y, x = np.nonzero(area == i)
        together += float(((y - y.mean()) * (x - x.mean())).sum())
        down += float(((y - y.mean()) ** 2).sum())
    slant = together / down
    return float(np.clip(slant, -0.8, 0.8)) if abs(slant) > SLANTED else 0.0


def _sheared(values: np.ndarray, slant: float, spare: int, order: int) -> np.ndarray:
    """Set a slanted word `(h, w)` upright, with spare columns on either side."""
    if not slant:
        return values
    values = np.pad(values, ((0, 0), (spare, spare)))
    back, shift = np.array([[1.0, 0.0], [slant, 1.0]]), [0.0, -slant * (len(values) - 1) / 2]
    moved = ndimage.affine_transform(
        values.astype(np.float64), back, shift, order=1 if order else 0
    )
    return moved.astype(values.dtype)


def _cuts(own: np.ndarray, height: float) -> list[tuple[np.ndarray, float]]:
    """Return candidate cuts of a component `(h, w)`, from the left, each with its price.

    A cut is a path from top to bottom, `(h,)`, at most half as slanted as a diagonal, that crosses
    little ink; those that cross least count.
    """
    ((rows, columns),) = ndimage.find_objects(own.astype(np.uint8))
    body = own[rows, columns]
    width = body.shape[1]
    if width < max(0.7 * height, 12) or len(body) < 0.5 * height:
        return []
    pairs = np.pad(body, ((0, len(body) % 2), (0, 0)))
    pairs = pairs[::2].astype(float) + pairs[1::2]
    cost, came = pairs[0].copy(), []
    for row in pairs[1:]:
        ways = np.stack([np.r_[np.inf, cost[:-1]] + 0.05, cost, np.r_[cost[1:], np.inf] + 0.05])
        came.append(ways.argmin(0) - 1)
        cost = ways.min(0) + row
    thick = stroke_width(body)
    margin = int(0.2 * height)
    found: list[tuple[float, np.ndarray]] = []
    for x in np.argsort(cost, kind="stable"):
        path = [int(x)]
        for step in reversed(came):
            path.append(path[-1] + int(step[path[-1]]))
        seam = np.repeat(path[::-1], 2)[: len(body)]
        middle = float(seam.mean())
        apart = all(abs(middle - other.mean()) > 0.15 * height for _, other in found)
        if apart and margin <= middle <= width - margin and cost[x] < 4 * thick:
            found.append((float(cost[x]), seam))
        if len(found) == 6:
            break
    whole = []
    for crossed, seam in sorted(found, key=lambda each: each[1].mean()):
        full = np.full(len(own), seam[0])
        full[rows] = seam
        full[rows.stop :] = seam[-1]
        price = CUT + 0.13 * max(0.0, crossed / thick - 1)
        price += NARROW * max(0.0, PAIR - width / max(height, len(body)))
        whole.append((full + columns.start, price))
    return whole


def _in_rows(marks: Sequence[Reading], slope: float | None) -> list[Reading]:
    """Sort marks by rows from the top, and each row from the left.

    The rows may rise or fall: their slope, if no lines show it, is that at which the marks lie
    closest to rows.
    """
    left, top, right, bottom = np.array([mark.box for mark in marks], float).T
    x, y, height = (left + right) / 2, (top + bottom) / 2, float(np.median(bottom - top))

    def spread(slope: float) -> float:
        return float(np.diff(np.sort(y - slope * x)).clip(0, 0.5 * height).sum())

    slopes = sorted(np.linspace(-0.15, 0.15, 61), key=abs)
    slope = min(slopes, key=spread) if slope is None else slope
    across = y - slope * x
    order = np.argsort(across, kind="stable")
    row = np.zeros(len(marks), int)
    row[order[1:]] = (np.diff(across[order]) > 0.5 * height).cumsum()
    return [marks[k] for k in np.lexsort((x, row))]


def _read(model: nn.Module, images: Sequence[Tensor], calibration: Calibration) -> Tensor:
    """Return probabilities `(N, 10)` of images `(1, 28, 28)`: softmax(logits / temperature)."""
    logits = predict_logits(model, torch.stack(list(images)))
    return (logits / calibration.temperature).softmax(1)


def _reading(
    box: Box, crop: np.ndarray, image: Tensor, chances: Tensor, confidence: float,
    calibration: Calibration,
) -> Reading:  # fmt: skip
    """Judge a mark by its probabilities `(10,)` and by its confidence."""
    answer = str(int(chances.argmax())) if confidence >= calibration.sure else "not sure"
    if float(chances.max()) < SURELY:
        answer = "not a digit"
    return Reading(answer, chances.tolist(), confidence, box, crop, image)
