"""Synthetic pages for notebook 10 and calibration: rendered, then read, then counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from torch import Tensor, nn

from .pictures import Calibration, find_marks, read_marks

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneral",
         "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")  # fmt: skip
# kinds of pages, with the share of all pages of a kind that are read
KINDS = {"digits": 1.0, "light": 0.5, "ruled": 0.5, "several": 0.3,
         "blank": 0.25, "noise": 0.25, "letters": 0.52, "scribbles": 0.25}  # fmt: skip
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
    rng: np.random.Generator, size: int, character: str, fonts: Sequence[str] = FONTS
) -> np.ndarray:
    """Render a letter in one of some fonts of matplotlib as ink `(size, size)`."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    font = ImageFont.truetype(folder / f"{rng.choice(fonts)}.ttf", 0.75 * size)
    picture = Image.new("L", (size, size))
    ImageDraw.Draw(picture).text((size / 2, size / 2), character, 255, font, anchor="mm")
    picture = picture.rotate(rng.uniform(-10, 10), BICUBIC)
    return np.asarray(picture, np.float32) / 255


def scribble(rng: np.random.Generator, size: int = 110) -> np.ndarray:
    """Draw one to four smooth random strokes as ink `(size, size)`."""
    picture = Image.new("L", (size, size))
    for _ in range(rng.integers(1, 5)):
        points = rng.uniform(0.1 * size, 0.9 * size, (rng.integers(3, 8), 2))
        smooth = ndimage.zoom(points, (12, 1), order=3).clip(0.08 * size, 0.92 * size)
        ImageDraw.Draw(picture).line([tuple(p) for p in smooth], 255, max(2, size // 15), "curve")
    return np.asarray(picture, np.float32) / 255


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
    for i in range(n):
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
            readings = read_marks(model, find_marks(drawn).marks, calibration)
            truth = shown if len(shown) == len(readings) else " " * len(readings)
            off = [
                max(reading.probabilities)
                for reading, digit in zip(readings, truth, strict=True)
                if reading.answer.isdigit() and reading.answer != digit
            ]
            right = bool(shown) and [reading.answer for reading in readings] == list(shown)
            rows.append((kind, 1, right, bool(off), max(off, default=0) >= 0.9))
    table = pd.DataFrame(rows, columns=["kind", "n", "right", "wrong", "confident"])
    return table.groupby("kind", sort=False).sum().astype(int).reset_index()
