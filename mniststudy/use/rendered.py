"""Synthetic pages for notebook 10 and calibration: rendered, then read, then counted."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor, nn

from .pictures import find_ink
from .segment import Calibration, read_page

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneral",
         "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")  # fmt: skip
# kinds of pages, with the share of all pages of a kind that are read
KINDS = {"digits": 1.0, "light": 0.5, "ruled": 0.5, "several": 0.3,
         "blank": 0.25, "noise": 0.25, "letters": 0.52, "scribbles": 0.25,
         "brush": 0.1, "small28": 0.1, "tight": 0.1, "near": 0.1, "touching": 0.1, "pattern": 0.1,
         "table": 0.05, "form": 0.05, "side": 0.05, "print": 0.05, "many": 0.02}  # fmt: skip
SIZES = (40, 110, 300)  # pixels that stand for the 28 of a digit's image
PAPER, INK = 225.0, 40.0
BICUBIC = Image.Resampling.BICUBIC


def stroke(image: Tensor | np.ndarray, size: int, degrees: float = 0.0) -> np.ndarray:
    """Enlarge a digit `(1, 28, 28)` uint8 to ink `(size, size)` from 0 to 1 with sharp edges."""
    large = Image.fromarray(np.asarray(image).reshape(28, 28))
    large = large.resize((size, size), BICUBIC).rotate(degrees, BICUBIC)
    values = np.asarray(large, np.float32) / 255
    sharp = 0.5 + (values - 0.5) * max(1.0, size / 56)  # edges one or two pixels wide
    return sharp.clip(0, 1)


def page(
    inks: Sequence[np.ndarray], rng: np.random.Generator, *,
    light: float = 0.0, noise: float = 3.0, ruled: bool = False, white_on_black: bool = False,
) -> np.ndarray:  # fmt: skip
    """Put pieces of ink `(s, s)` in a row on synthetic paper; return it, `(H, W, 3)` float32.

    Args:
        inks: of equal size; none: a blank page.
        rng: gives positions, slopes and noise.
        light: share by which the light falls off from one side to the other.
        ruled: draw ruled lines, a little aslant.
        white_on_black: chalk on a board instead of ink on paper.
        noise: standard deviation of the pixels' noise, of 255 levels.
    """
    s = inks[0].shape[0] if inks else 200
    n = max(1, len(inks))
    height = max(80, round(s * rng.uniform(1.5, 2.5)))
    width = max(80, round(s * n * rng.uniform(1.2, 2)))
    cover = np.zeros((height, width), np.float32)
    x, base = 0, rng.uniform(0.1, 0.9) * (height - s)
    for k, ink in enumerate(inks):
        x = int(rng.integers(x, 1 + width - s * (n - k)))
        y = int(np.clip(base + 0.1 * s * rng.uniform(-1, 1), 0, height - s))
        cover[y : y + s, x : x + s] = ink
        x += s
    v, u = np.mgrid[:height, :width].astype(np.float32)
    reflected = np.full((height, width), PAPER, np.float32)
    if ruled:
        gap, slope = s * rng.uniform(0.3, 0.9), np.tan(np.radians(rng.uniform(-1.5, 1.5)))
        off = np.abs((v + slope * u + rng.uniform(0, gap)) % gap - gap / 2)  # from the next line
        reflected -= (max(1.0, s / 80) / 2 + 0.5 - off).clip(0, 1) * rng.uniform(50, 120)
    reflected += (INK - reflected) * cover
    if white_on_black:
        reflected = 255 - reflected
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * u / width + np.sin(angle) * v / height
    along = (along - along.min()) / np.ptp(along)
    values = reflected * (1 - light * along) + rng.normal(0, noise, reflected.shape)
    return np.repeat(values.clip(0, 255).round()[..., None], 3, axis=2).astype(np.float32)


def letter(
    rng: np.random.Generator,
    size: int,
    character: str,
    fonts: Sequence[str] = FONTS,
    turn: float = 10.0,
) -> np.ndarray:
    """Render a letter in one of some fonts of matplotlib as ink `(size, size)`."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{rng.choice(fonts)}.ttf", 0.75 * size)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), character, 255, font, anchor="mm")
    picture = picture.rotate(rng.uniform(-turn, turn), BICUBIC)
    return np.asarray(picture, np.float32) / 255


def scribble(rng: np.random.Generator, size: int = 110) -> np.ndarray:
    """Draw one to four smooth random strokes as ink `(size, size)`."""
    picture = Image.new("L", (size, size))
    for _ in range(rng.integers(1, 5)):
        points = rng.uniform(0.1 * size, 0.9 * size, (rng.integers(3, 8), 2))
        smooth = ndimage.zoom(points, (12, 1), order=3).clip(0.08 * size, 0.92 * size)
        ImageDraw.Draw(picture).line([tuple(p) for p in smooth], 255, max(2, size // 15), "curve")
    return np.asarray(picture, np.float32) / 255


def pen(image: Tensor | np.ndarray, height: int, rng: np.random.Generator, width: float = 0.09,
        slant: float = 0.0) -> np.ndarray:  # fmt: skip
    """Write a digit `(1, 28, 28)` uint8 as ink `(height, w)` with a pen `width` heights wide."""
    values = stroke(image, 224)
    back = np.array([[1.0, 0.0], [slant, 1.0]])
    values = ndimage.affine_transform(values, back, [0.0, -112 * slant], order=1)
    far = ndimage.distance_transform_edt(values > 0.5)
    ridge = (far >= ndimage.maximum_filter(far, 9) - 0.5) & (far > 2)  # about the skeleton
    ridge |= ndimage.binary_erosion(values > 0.5, iterations=max(1, int(0.6 * far[ridge].mean())))
    ((rows, columns),) = ndimage.find_objects(ridge.astype(np.uint8))
    zoom = height * (1 - width) / max(rows.stop - rows.start, 8)
    edge = math.ceil(height * width / 2 / zoom) + 1
    away = ndimage.distance_transform_edt(~np.pad(ridge[rows, columns], edge)) * zoom
    shape = [max(3, round(side * zoom)) for side in away.shape]
    away = np.asarray(Image.fromarray(away.astype(np.float32)).resize(shape[::-1], BICUBIC))
    soft = ndimage.gaussian_filter(rng.standard_normal(shape), height / 20)
    return (height * width / 2 * (1 + 0.1 * soft / soft.std()) - away + 0.5).clip(0, 1)


def row(inks: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Set pieces of ink `(h, w)` beside each other, `gap` pixels apart where they are nearest."""
    height = max(len(ink) for ink in inks)
    out = np.zeros((height, sum(ink.shape[1] + max(gap, 0) + height for ink in inks)), np.float32)
    right = np.full(height, -height)  # of the ink so far in each row
    for k, ink in enumerate(inks):
        body = np.pad(ink, ((height - len(ink), 0), (0, 0))) > 0.4
        left = np.where(body.any(1), body.argmax(1), 10**6)
        reach = ndimage.maximum_filter1d(right, 2 * max(gap, 0) + 3)
        x = max(0, int((reach + gap - left).max())) if k else 0
        place = out[height - len(ink) :, x : x + ink.shape[1]]
        np.maximum(place, ink, out=place)
        last = body.shape[1] - body[:, ::-1].argmax(1)
        right = np.where(body.any(1), np.maximum(right, x + last), right)
    return out[:, : int(right.max()) + 1]


def at(shape: tuple[int, int], *pieces: tuple[np.ndarray, float, float]) -> np.ndarray:
    """Put pieces of ink at x and y on an empty page of a shape; return its ink."""
    ink = np.zeros(shape, np.float32)
    for piece, x, y in pieces:
        place = ink[round(y) : round(y) + len(piece), round(x) : round(x) + piece.shape[1]]
        np.maximum(place, piece[: len(place), : place.shape[1]], out=place)
    return ink


def photo(
    ink: np.ndarray, rng: np.random.Generator, *, paper: float = PAPER, dark: float = INK,
    light: float = 0.1, noise: float = 2.0, ground: np.ndarray | float = 1.0,
) -> np.ndarray:  # fmt: skip
    """Take a photo `(H, W, 3)` float32 of ink `(H, W)`; `ground` is what paper reflects."""
    v, u = np.indices(ink.shape) / max(ink.shape)
    angle = rng.uniform(0, 2 * np.pi)
    shade = 1 - light * (0.5 + 0.5 * np.tanh(np.cos(angle) * (u - 0.5) + np.sin(angle) * (v - 0.5)))
    values = (paper * ground * (1 - ink) + dark * ink) * shade
    values = ndimage.gaussian_filter(values, 0.6) + rng.normal(0, noise, ink.shape)
    return np.repeat(values.clip(0, 255).round()[..., None], 3, axis=2).astype(np.float32)


def hard_page(
    kind: str, rng: np.random.Generator, draw: Callable[[int], tuple[list[Tensor], str]]
) -> tuple[np.ndarray, str]:
    """Render a page of a kind that is hard to read; `draw(k)` gives k digits and their labels."""
    size = int(rng.integers(44, 110))
    if kind in ("brush", "small28"):
        n = 1 if kind == "brush" or rng.random() < 0.5 else 2
        digits, shown = draw(n)
        side = 28 if kind == "small28" else int(rng.choice([28, 64, 160, 320]))
        high = int(rng.integers(12, 23)) if n == 1 else int(rng.integers(12, 20))
        high = high if kind == "small28" else int(side * rng.uniform(0.75, 0.97))
        width = 0.13 if kind == "small28" else rng.uniform(0.13, 0.24)
        line = row([pen(d, high, rng, width) for d in digits], 2)[:, : max(side, 28)]
        y, x = (rng.uniform(0.2, 0.8) * max(0, side - part) for part in line.shape)
        wide = max(side, line.shape[1] + 2)
        two = (0.0, 255.0) if rng.random() < 0.5 else (255.0, 0.0)
        return photo(at((side, wide), (line, x, y)), rng, paper=two[0], dark=two[1],
                     light=0, noise=0), shown  # fmt: skip
    if kind == "form":  # cells of a grid, or boxes in a row
        rows_, columns, cell = (
            (9, 9, 60) if rng.random() < 0.5 else (1, int(rng.integers(3, 9)), 80)
        )
        filled = np.sort(rng.choice(81, 20, False)) if rows_ > 1 else np.arange(columns)
        digits, shown = draw(len(filled))
        shape, places = (rows_ * cell + 80, columns * cell + 80), []
        for c, digit in zip(filled, digits, strict=True):
            piece = pen(digit, int(cell * rng.uniform(0.55, 0.7)), rng)
            down, across = (cell * (k + 0.5) + 40 for k in divmod(int(c), columns))
            x, y = across - piece.shape[1] / 2, down - piece.shape[0] / 2
            places.append((piece, x + rng.uniform(-4, 4), y + rng.uniform(-4, 4)))
        ink = at(shape, *places)
        for i in range(rows_ + 1):
            thick = 3 if i % 3 else 6
            ink[40 + i * cell : 40 + i * cell + thick, 40 : 43 + columns * cell] = 0.85
        for i in range(columns + 1):
            thick = 3 if i % 3 else 6
            ink[40 : 43 + rows_ * cell, 40 + i * cell : 40 + i * cell + thick] = 0.85
        tilted = ndimage.rotate(ink, rng.uniform(-5, 5), order=1).clip(0, 1)
        return photo(tilted, rng), shown
    if kind == "many":
        rows_, columns, step = int(rng.integers(6, 12)), int(rng.integers(8, 11)), 84
        digits, shown = draw(rows_ * columns)
        tilt = rng.uniform(-0.06, 0.06)
        places = [
            (pen(d, int(rng.uniform(44, 56)), rng),
             60 + c * step - tilt * r * step, 100 + r * step + tilt * (c - columns / 2) * step)
            for (r, c), d in zip(np.ndindex(rows_, columns), digits, strict=True)
        ]  # fmt: skip
        return photo(at((rows_ * step + 160, columns * step + 120), *places), rng), shown
    n = {"touching": int(rng.integers(2, 4)), "side": int(rng.integers(3, 6))}.get(
        kind, int(rng.integers(2, 6))
    )
    digits, shown = draw(n)
    slant = rng.uniform(0.3, 0.6) if kind == "near" else 0.0
    gap = {"touching": -int(rng.integers(1, 5)), "near": 4, "print": 12}.get(kind, size // 4)
    width = rng.uniform(0.05, 0.09) if kind == "tight" else rng.uniform(0.07, 0.11)
    line = row([pen(d, int(size * rng.uniform(0.92, 1)), rng, width, slant) for d in digits], gap)
    high, wide = line.shape
    if kind == "tight":
        edge = max(3, size // 10)
        return photo(np.pad(line, edge), rng, paper=255.0, dark=0.0, light=0, noise=0), shown
    if kind == "pattern":
        ink = np.pad(line, size // 4)
        v, u = np.indices(ink.shape) * 60 / size
        waves = np.zeros_like(ink)
        for _ in range(3):
            a, bend = rng.uniform(0, np.pi), rng.uniform(4, 9)
            along, across = u * np.cos(a) + v * np.sin(a), v * np.cos(a) - u * np.sin(a)
            ripple = across + bend * np.sin(along / rng.uniform(12, 25))
            waves = np.maximum(waves, np.cos(ripple * 2 * np.pi / rng.uniform(9, 13)).clip(0) ** 4)
        return photo(ink, rng, paper=190.0, ground=1 - rng.uniform(0.15, 0.25) * waves), shown
    if kind == "print":
        word = "".join(rng.choice(list(LETTERS), int(rng.integers(4, 8))))
        letters = [letter(rng, int(0.8 * size), c, turn=0.0) for c in word]
        used = [np.flatnonzero(each.any(0)) for each in letters]
        text = np.hstack(
            [each[:, on[0] - 2 : on[-1] + 3] for each, on in zip(letters, used, strict=True)]
        )
        shape = (2 * high, text.shape[1] + wide + 3 * size)
        beside = (line, text.shape[1] + 1.3 * size, high / 2)
        ink = at(shape, (text, size / 2, high - 0.6 * size), beside)
        return photo(ink, rng), shown
    ink = at((3 * high, wide + 2 * size), (line, size, high))
    if kind == "side":
        return np.rot90(photo(ink, rng), rng.choice([1, 3])).copy(), shown
    if kind == "table":
        sheet = photo(at((1000, 800), (line[:, :660], 120, rng.uniform(100, 700))), rng, light=0.2)
        tilt = rng.uniform(-3, 3)
        around = rng.uniform(25, 60) * (1 + 0.12 * rng.standard_normal((1150, 950, 1)))
        where = (slice(75, 1075), slice(75, 875))
        seen, cover = np.zeros((1150, 950, 3)), np.zeros((1150, 950, 1))
        seen[where], cover[where] = sheet, 1
        seen, cover = (ndimage.rotate(a, tilt, order=1, reshape=False) for a in (seen, cover))
        v, u = np.indices((1150, 950))
        arm = np.hypot(u - rng.uniform(300, 800), v - rng.uniform(500, 900)) < 180
        shadow = 1 - 0.45 * ndimage.gaussian_filter(arm.astype(float), 45)[..., None]
        return ((seen + around * (1 - cover)) * shadow).clip(0, 255).round().astype(
            np.float32
        ), shown
    return photo(ink, rng), shown


def pages(
    kind: str, n: int, images: Tensor, labels: Tensor, seed: int = 0
) -> Iterator[tuple[np.ndarray, str]]:
    """Render `n` synthetic pages of a kind in `KINDS`, each with what it shows.

    Args:
        kind: of page.
        n: number of pages.
        images: `(N, 1, 28, 28)` uint8, the digits to write on them.
        labels: `(N,)`.
        seed: of everything random; digits are drawn without repetition where there are enough.
    """
    rng = np.random.default_rng((seed, list(KINDS).index(kind)))
    order = rng.permutation(len(labels))
    taken = itertools.count()

    def draw(k: int) -> tuple[list[Tensor], str]:
        ids = [order[next(taken) % len(order)] for _ in range(k)]
        return [images[j] for j in ids], "".join(str(int(labels[j])) for j in ids)

    for i in range(n):
        if list(KINDS).index(kind) >= list(KINDS).index("brush"):
            yield hard_page(kind, rng, draw)
            continue
        odd, size, shown = i % 2 == 1, SIZES[i % 3], ""
        inks: list[np.ndarray] = []
        ways: dict[str, dict[str, Any]] = {
            "digits": {"white_on_black": odd}, "light": {"light": 0.5}, "ruled": {"ruled": True},
            "several": {"ruled": odd}, "blank": {"noise": 4}, "noise": {"noise": 40},
        }  # fmt: skip
        how = ways.get(kind, {})
        if kind in ("blank", "noise"):
            how["light"] = rng.uniform(0, 0.5)
        elif kind == "letters":
            shown = LETTERS[i % len(LETTERS)]
            inks = [letter(rng, size, shown)]
        elif kind == "scribbles":
            inks = [scribble(rng, size)]
        else:
            k = int(rng.integers(2, 7)) if kind == "several" else 1
            size = min(size, 110) if kind == "several" else size
            ids = order[np.arange(i * k, (i + 1) * k) % len(order)]
            inks = [stroke(images[j], size, rng.uniform(-10, 10)) for j in ids]
            shown = "".join(str(int(labels[j])) for j in ids)
        yield page(inks, rng, **how), shown


def measure(
    model: nn.Module, calibration: Calibration, images: Tensor, labels: Tensor, n: int = 1000
) -> pd.DataFrame:
    """Read about `n` synthetic pages of each kind and count the answers, one row for each kind.

    `right`: all digits are answered and right; `wrong`: a digit is answered where there is none or
    another; `confident`: as `wrong`, and with a probability of 90 % or more. All other pages have a
    mark that is not answered, or a wrong number of marks.
    """
    rows = []
    for kind, share in KINDS.items():
        for drawn, shown in pages(kind, round(share * n), images, labels, seed=1):
            readings = read_page(model, find_ink(drawn), calibration).readings
            truth = shown if len(shown) == len(readings) else " " * len(readings)
            off = [
                reading.confidence
                for reading, digit in zip(readings, truth, strict=True)
                if reading.answer.isdigit() and reading.answer != digit
            ]
            right = shown.isdigit() and [reading.answer for reading in readings] == list(shown)
            rows.append((kind, 1, right, bool(off), max(off, default=0) >= 0.9))
    table = pd.DataFrame(rows, columns=["kind", "n", "right", "wrong", "confident"])
    return table.groupby("kind", sort=False).sum().astype(int).reset_index()
