"""What the browser's tests share: Chromium, the page, and a hand that draws the ten digits.

`python tests/browser/drawing.py` draws a number and writes outputs/figures/draw_page.png anew.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from math import cos, pi, sin
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "outputs" / "checkpoints" / "best" / "draw.html"
PICTURES = ROOT / "outputs" / "runs" / "browser"
# the last five keep the browser itself from calling home
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-quic"]


def arc(x, y, width, height, start, end):
    """Return points on an ellipse; angles in turns, clockwise from the right."""
    turns = [start + (end - start) * i / 24 for i in range(25)]
    return [(x + width * cos(2 * pi * t), y + height * sin(2 * pi * t)) for t in turns]


# Each digit's strokes: points in heights of the drawing area, from its upper left corner
STROKES = {
    0: [arc(0.5, 0.5, 0.2, 0.32, -0.25, 0.75)],
    1: [[(0.52, 0.18), (0.48, 0.82)]],
    2: [[*arc(0.5, 0.34, 0.2, 0.17, -0.47, 0.1), (0.3, 0.8), (0.74, 0.8)]],
    3: [[*arc(0.48, 0.33, 0.19, 0.16, -0.42, 0.25), *arc(0.48, 0.65, 0.22, 0.17, -0.25, 0.4)]],
    4: [[(0.36, 0.18), (0.3, 0.52), (0.72, 0.52)], [(0.64, 0.2), (0.6, 0.84)]],
    5: [[(0.68, 0.2), (0.38, 0.2), (0.36, 0.46), *arc(0.48, 0.62, 0.22, 0.19, -0.3, 0.4)]],
    6: [[(0.6, 0.16), (0.42, 0.4), *arc(0.5, 0.64, 0.18, 0.19, -0.55, 0.5)]],
    7: [[(0.28, 0.2), (0.72, 0.2), (0.46, 0.84)]],
    8: [[*arc(0.5, 0.34, 0.15, 0.16, 0.25, -0.75), *arc(0.5, 0.66, 0.19, 0.16, -0.25, 0.75)]],
    9: [[*arc(0.5, 0.36, 0.17, 0.17, 0, -1), (0.66, 0.4), (0.6, 0.84)]],
}


@contextmanager
def chromium() -> Iterator:
    """Start the Chromium or Chrome that `MNISTLIB_CHROMIUM` names, else an installed one."""
    from playwright.sync_api import sync_playwright  # `make test` collects this without it

    names = ("chromium", "chromium-browser", "google-chrome")
    found = os.environ.get("MNISTLIB_CHROMIUM") or next(filter(None, map(shutil.which, names)), "")
    assert found, "there is no Chromium; install one, or name it by MNISTLIB_CHROMIUM"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=found, args=FLAGS)


def moved(strokes, x, y, size):
    """Return strokes of another size, their upper left corner at `x` and `y`."""
    return [[(x + size * a, y + size * b) for a, b in stroke] for stroke in strokes]


def number(digits: str):
    """Return the strokes of each digit of a number that fills the drawing area, at most four."""
    return [moved(STROKES[int(d)], 0.45 * i - 0.15, 0.1, 0.8) for i, d in enumerate(digits)]


def places(page, stroke):
    """Return the points of a stroke in pixels of the window."""
    page.locator("#paper").scroll_into_view_if_needed()
    box = page.locator("#paper").bounding_box()
    return [(box["x"] + x * box["height"], box["y"] + y * box["height"]) for x, y in stroke]


def draw(page, strokes) -> list[float]:
    """Draw strokes with the mouse; return the milliseconds until each movement was answered."""
    waits = []
    for stroke in strokes:
        (x, y), *rest = places(page, stroke)
        page.mouse.move(x, y)
        page.mouse.down()
        for x, y in rest:
            page.mouse.move(x, y, steps=1 if len(rest) > 8 else 12)
            waits.append(page.evaluate("mnist.lastMs"))
        page.mouse.up()
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done)))")
    return waits


def changed(folder: Path, **fields) -> Path:
    """Write the page with other thresholds or settings of the model; return its path."""
    start, rest = PAGE.read_text(encoding="utf-8").split("const MODEL = ")
    model, end = json.JSONDecoder().raw_decode(rest)
    path = folder / "changed.html"
    path.write_text(f"{start}const MODEL = {json.dumps(model | fields)}{rest[end:]}", "utf-8")
    return path


def main() -> None:
    """Write the picture of the page that notebook 10 and the README show."""
    path = ROOT / "outputs" / "figures" / "draw_page.png"
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1900}, color_scheme="light")
        page.goto(PAGE.as_uri())
        for strokes in number("5047"):
            draw(page, strokes)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)  # until the bars stand still
        below = page.locator("section", has=page.locator("#layers-title")).bounding_box()
        size = {"width": 1400, "height": below["y"] + below["height"] + 20}
        page.screenshot(path=path, clip={"x": 0, "y": 0, **size}, full_page=True)
    few = Image.open(path).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    few.save(path, optimize=True)
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
