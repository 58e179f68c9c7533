"""Pictures of one's own are brought into MNIST's form, or refused by name."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mnistlib import DatasetError
from mnistlib.studies.pictures import read_picture


def drawn(size=(28, 28), ink=0, ground=255, mode="L"):
    """A slanted stroke with a foot, away from the middle."""
    picture = Image.new(mode, size, ground)
    draw, (w, h) = ImageDraw.Draw(picture), size
    draw.line((0.6 * w, 0.1 * h, 0.5 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    draw.line((0.5 * w, 0.6 * h, 0.7 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    return picture


def read(picture, tmp_path, name="digit.png"):
    picture.save(tmp_path / name)
    return read_picture(tmp_path / name)


def test_a_light_digit_of_28x28_is_taken_as_it_is(tmp_path):
    picture = drawn(ink=200, ground=0)
    digit = read(picture, tmp_path)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    np.testing.assert_array_equal(digit[0], np.asarray(picture))


def test_a_dark_digit_of_28x28_is_inverted(tmp_path):
    picture = drawn(ink=30, ground=250)
    np.testing.assert_array_equal(read(picture, tmp_path)[0], 255 - np.asarray(picture))


@pytest.mark.parametrize(
    ("mode", "ink", "ground", "name"),
    [
        ("L", 0, 255, "dark.png"),
        ("L", 255, 0, "light.png"),
        ("1", 0, 1, "bits.png"),
        ("RGB", (20, 30, 120), (235, 230, 210), "photo.jpg"),
        ("RGB", (250, 240, 90), (10, 60, 30), "board.jpg"),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0), "transparent.png"),
        ("P", 0, 255, "palette.gif"),
    ],
)
@pytest.mark.parametrize("size", [(320, 240), (240, 400), (90, 90)])
def test_a_drawn_digit_is_fitted_to_20x20_and_centred_by_mass(
    tmp_path, mode, ink, ground, name, size
):
    picture = drawn(size, ink, ground, mode)
    if mode == "P":
        picture.putpalette([k for k in range(256) for _ in range(3)])
    digit = read(picture, tmp_path, name)[0].double()
    assert digit.shape == (28, 28)
    assert digit.max() > 200
    stroke = digit > 32
    height, width = int(stroke.any(1).sum()), int(stroke.any(0).sum())
    assert max(height, width) == 20
    middle = torch.arange(28, dtype=torch.float64) - 13.5
    for axis in (0, 1):
        assert abs((digit.sum(1 - axis) * middle).sum() / digit.sum()) <= 0.51
    assert (digit == 0).double().mean() > 0.5  # the ground is dark


def test_the_same_digit_is_read_the_same_wherever_it_stands_on_the_paper(tmp_path):
    stroke = drawn((80, 120))
    digits = []
    for corner in ((10, 10), (150, 60)):
        paper = Image.new("L", (300, 250), 255)
        paper.paste(stroke, corner)
        digits.append(read(paper, tmp_path))
    assert torch.equal(*digits)


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("size", [(200, 100), (1, 1), (28, 28)])
def test_a_blank_picture_is_refused_by_name(tmp_path, size, ground):
    with pytest.raises(DatasetError, match=r"blank\.png shows no digit"):
        read(Image.new("L", size, ground), tmp_path, "blank.png")


def png():
    buffer = io.BytesIO()
    drawn((200, 200)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "contents", [b"this is not a picture", b"", png()[:100], png()[:-40], png()[:8]]
)
def test_what_is_no_picture_is_refused_by_name_with_a_remedy(tmp_path, contents):
    path = tmp_path / "digit.png"
    path.write_bytes(contents)
    with pytest.raises(DatasetError, match=r"digit\.png cannot be read .*; give a PNG or JPEG"):
        read_picture(path)


def test_a_missing_picture_is_refused_by_name(tmp_path):
    with pytest.raises(DatasetError, match=r"nowhere\.png cannot be read"):
        read_picture(tmp_path / "nowhere.png")


def test_a_folder_is_refused_by_name(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DatasetError, match=r"folder\.png cannot be read"):
        read_picture(tmp_path / "folder.png")


def test_a_picture_too_large_for_memory_is_refused_by_name(tmp_path):
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    with pytest.raises(DatasetError, match=r"huge\.png has over 50 million pixels"):
        read_picture(tmp_path / "huge.png")


@pytest.mark.parametrize("size", [(320, 240), (28, 28)])
def test_a_photo_that_was_stored_lying_down_is_read_upright(tmp_path, size):
    """Cameras turn the picture by a note in the file, 6: a quarter clockwise, not by its pixels."""
    upright = drawn(size)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.png", exif=exif)
    assert torch.equal(read_picture(tmp_path / "photo.png"), read(upright, tmp_path))


def test_a_line_one_pixel_wide_is_read(tmp_path):
    picture = Image.new("L", (200, 150), 255)
    ImageDraw.Draw(picture).line((20, 75, 180, 75), fill=0)
    digit = read(picture, tmp_path)[0]
    assert int((digit > 32).any(0).sum()) == 20
    assert int((digit > 32).any(1).sum()) == 1
