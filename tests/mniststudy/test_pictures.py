"""Pictures of one's own: found, brought into MNIST's form, read, or refused by name."""

import json
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mnistlib import DatasetError, load_mnist, load_model, released_checkpoint
from mnistlib.evaluate import predict_logits
from mniststudy.cli import main
from mniststudy.use.answers import as_dict
from mniststudy.use.calibrate import load_calibration
from mniststudy.use.mnist_form import centre, laid_out_as_mnist, to_mnist
from mniststudy.use.pictures import FORMATS, find_ink, find_sheet, read_picture
from mniststudy.use.rendered import KINDS, measure, page, pages, stroke
from mniststudy.use.segment import Calibration, read_page


def drawn(size=(28, 28), ink=0, ground=255, mode="L"):
    """A slanted stroke with a foot, away from the middle."""
    picture = Image.new(mode, size, ground)
    draw, (w, h) = ImageDraw.Draw(picture), size
    draw.line((0.6 * w, 0.1 * h, 0.5 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    draw.line((0.5 * w, 0.6 * h, 0.7 * w, 0.6 * h), fill=ink, width=max(2, w // 12))
    return picture


CAREFUL = load_model(released_checkpoint("careful"))
CALIBRATION = load_calibration(released_checkpoint("careful"))


def marks(pixels):
    """Return all marks of a picture `(H, W, 3)`, answered or not."""
    return read_page(CAREFUL, find_ink(pixels), CALIBRATION).readings


def read(picture, folder, name="digit.png", **about):
    """Return the only digit on a picture that was saved and read."""
    picture.save(folder / name, **about)
    (mark,) = read_page(CAREFUL, read_picture(folder / name), CALIBRATION).readings
    return mark.image


def rgb(picture):
    return np.asarray(picture.convert("RGB"), np.float32)


@pytest.fixture(scope="module")
def digits():
    """One clearly written digit of each class, `(10, 1, 28, 28)`."""
    found = load_mnist("sample")
    images, labels = found.train_images[:300], found.train_labels[:300]
    chances = load_model(released_checkpoint())(images).softmax(1)
    sure = [int(chances[:, c].mul(labels == c).argmax()) for c in range(10)]
    return images[torch.tensor(sure)]


@pytest.fixture(scope="module")
def answers():
    """Return a function that gives the answers to a picture or an array."""

    def ask(picture):
        found = marks(rgb(picture) if isinstance(picture, Image.Image) else picture)
        return [r.answer for r in found]

    return ask


def written(image, size=160, ground=255, ink=0, margin=50):
    """A digit as ink of one grey level on a ground of another, as a picture."""
    cover = np.pad(stroke(image, size), margin)
    return Image.fromarray((ground + (ink - ground) * cover).astype(np.uint8))


def test_a_digit_of_28x28_is_taken_as_it_is_and_a_dark_one_inverted(tmp_path):
    seven = load_mnist("sample").train_images[0, 0].numpy()
    light, dark = Image.fromarray(seven), Image.fromarray(255 - seven)
    digit = read(light, tmp_path)
    assert digit.shape == (1, 28, 28)
    assert digit.dtype == torch.uint8
    np.testing.assert_array_equal(digit[0], np.asarray(light))
    np.testing.assert_array_equal(read(dark, tmp_path)[0], 255 - np.asarray(dark))


def test_28x28_grey_on_grey_gets_the_contrast_of_mnist(digits, answers):
    for ink, ground in ((95, 125), (150, 110)):
        grey = (ground + (ink - ground) * (digits[3][0].float() / 255)).round().byte()
        picture = Image.fromarray(grey.numpy())
        (mark,) = marks(rgb(picture))
        assert mark.image.max() == 255
        assert answers(picture) == ["3"]


def test_a_drawn_digit_of_any_colours_is_fitted_to_20x20_and_centred_by_mass(tmp_path):
    middle = torch.arange(28, dtype=torch.float64) - 14
    for mode, ink, ground, name in (
        ("L", 0, 255, "dark.png"),
        ("1", 0, 1, "bits.png"),
        ("RGB", (250, 240, 90), (10, 60, 30), "board.jpg"),
        ("RGB", (250, 230, 0), (255, 255, 255), "yellow.png"),
        ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0), "transparent.png"),
        ("RGBA", (255, 255, 255, 255), (255, 255, 255, 0), "white-on-transparency.png"),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0, 0), "print.jpg"),
        ("I;16", 300, 64_000, "sixteen.tif"),
        ("F", 900.0, -20.0, "unusual.tif"),
        ("P", 0, 255, "palette.gif"),
    ):
        picture = drawn((90, 120), ink, ground, mode)
        if mode == "P":
            picture.putpalette([k for k in range(256) for _ in range(3)])
        digit = read(picture, tmp_path, name)[0].double()
        assert digit.max() == 255, name
        strokes = digit > 32
        assert max(int(strokes.any(axis).sum()) for axis in (0, 1)) == 20, name
        for axis in (0, 1):
            assert abs((digit.sum(1 - axis) * middle).sum() / digit.sum()) <= 0.51, name
        assert (digit == 0).double().mean() > 0.5, name  # the ground is dark


def test_each_digit_of_mnist_cut_out_is_put_back_where_it_was():
    for image in load_mnist("sample").train_images[:, 0].numpy():
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in (1, 0))
        cut = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        np.testing.assert_array_equal(centre(cut), image)
        np.testing.assert_array_equal(centre(np.pad(cut, ((0, 3), (5, 0)))), image)


def test_ink_that_is_heavy_on_one_side_stays_within_the_image():
    ink = np.ones((20, 20), np.uint8)
    ink[:, -1] = 255
    assert np.flatnonzero(centre(ink).any(0)).tolist() == list(range(20))


def test_both_edges_of_the_shorter_side_are_equally_grey_as_in_mnist():
    for side, width in ((100, 24), (100, 46), (101, 59), (101, 75), (300, 282)):
        for crop in (np.ones((side, width)), np.ones((width, side))):
            image = to_mnist(crop)
            across = image[image.any(1)][:, image.any(0)].astype(int)
            assert [length % 2 for length in across.shape] == [0, 0]
            assert abs(across - across[::-1, ::-1]).max() <= 1
            assert across.sum() / 255 == pytest.approx(400 * width / side, rel=0.03)


def test_the_strokes_of_mnist_are_as_bright_and_as_wide_after_the_way_through_a_page(digits):
    """Enlarged fivefold and brought back, a digit differs little from the original."""
    for image in digits:
        (mark,) = marks(rgb(written(image)))
        before, after = image.float(), mark.image.float()
        assert abs(after.mean() / before.mean() - 1) < 0.3
        shifted = [torch.roll(after, (a, b), (1, 2)) for a in (-1, 0, 1) for b in (-1, 0, 1)]
        assert min(float((before - s).abs().mean()) for s in shifted) < 12


def test_a_hairline_is_thickened_to_a_stroke_and_read(answers):
    picture = Image.new("L", (400, 400), 255)
    corners = [(120, 80), (280, 80), (190, 180), (270, 220), (260, 300), (130, 320)]
    ImageDraw.Draw(picture).line(corners, 0, 1)
    (mark,) = marks(rgb(picture))
    assert int((mark.image > 127).sum()) > 60
    assert answers(picture) == ["3"]


def test_a_photo_that_was_stored_lying_down_is_read_upright(tmp_path, digits):
    """Cameras turn the picture by a note in the file, 6: a quarter clockwise, not by its pixels."""
    for size, mode in ((160, "L"), (50, "RGBA")):
        upright = written(digits[4], size, margin=20).convert(mode)
        lying = upright.transpose(Image.Transpose.ROTATE_90)
        exif = lying.getexif()
        exif[0x0112] = 6
        seen = read(lying, tmp_path, exif=exif)
        assert torch.equal(seen, read(upright, tmp_path))
        assert not torch.equal(seen, read(lying, tmp_path))


def test_light_that_falls_off_by_half_and_ruled_lines_change_no_answer(digits, answers):
    rng = np.random.default_rng(1)
    for k, image in enumerate(digits):
        for paper in ({"light": 0.5}, {"ruled": True}):
            assert answers(page([stroke(image, 110)], rng, **paper)) == [str(k)], paper
    assert not any(m.answer.isdigit() for m in marks(page([], rng, ruled=True)))


def test_what_is_around_or_beside_a_digit_is_left_out(digits, answers):
    for name, shape, about in (
        ("rectangle", (20, 20, 280, 280), {"outline": 0, "width": 5}),  # a box around it
        ("rectangle", (290, 0, 340, 340), {"fill": 70}),  # a desk beside the paper
        ("ellipse", (20, 20, 28, 28), {"fill": 0}),  # a speck
        ("line", (10, 300, 70, 300), {"fill": 0, "width": 8}),  # a dash
    ):
        picture = written(digits[7], margin=90)
        getattr(ImageDraw.Draw(picture), name)(shape, **about)
        assert answers(picture) == ["7"], about


def test_digits_are_read_from_left_to_right_and_row_by_row(digits, answers):
    rows = Image.new("L", (700, 480), 255)
    for i, k in enumerate((3, 1, 4, 1, 5, 9)):
        place = (20 + 220 * (i % 3), 240 * (i // 3) + 10 * (i % 2))
        rows.paste(written(digits[k], margin=20), place)
    assert answers(rows) == ["3", "1", "4", "1", "5", "9"]


def test_a_digit_in_two_pieces_is_one_mark():
    five = Image.new("L", (300, 300), 255)
    draw = ImageDraw.Draw(five)
    draw.line((112, 90, 106, 150), 0, 14)
    draw.arc((80, 140, 190, 250), 240, 150, 0, 14)
    draw.line((132, 88, 200, 84), 0, 14)  # the flag, detached
    assert len(marks(rgb(five))) == 1


def test_a_blank_picture_and_noise_have_no_marks_and_a_reason(tmp_path):
    for size, ground in (((200, 100), 0), ((1, 1), 128), ((28, 28), 255)):
        Image.new("L", size, ground).save(tmp_path / "blank.png")
        found = read_page(CAREFUL, read_picture(tmp_path / "blank.png"), CALIBRATION)
        assert (list(found.readings), found.reason) == ([], "nothing stands out from the paper")
    rng = np.random.default_rng(0)
    salt = np.where(rng.random((200, 300, 1)) < 0.05, 0, np.full(3, 200)).astype(np.float32)
    sample = load_mnist("sample")
    specks, _ = next(pages("noise", 1, sample.train_images, sample.train_labels))
    for pixels in (salt, page([], rng, noise=1), page([], rng, noise=40, light=0.3), specks):
        found = read_page(CAREFUL, find_ink(pixels), CALIBRATION)
        assert not any(mark.answer.isdigit() for mark in found.readings)


def test_ink_must_stand_out_from_paper_and_not_be_much_fainter_than_other_ink():
    """Each number on the one side of a threshold is less than 30 % from that on the other."""

    def bottoms(*inks):
        """Draw a bar for each darkness; return where the ink of each ends."""
        grey = np.full((400, 400), 200.0)
        for k, ink in enumerate(inks):
            grey[120:240, 80 + 60 * k : 100 + 60 * k] -= ink
        found = find_ink(np.repeat(grey[..., None], 3, 2).astype(np.float32))
        ends = [np.flatnonzero(found.mask[:, 90 + 60 * k]) for k in range(len(inks))]
        return found.reason or [round(rows[-1] / 10) for rows in ends if len(rows)]

    none = "nothing stands out from the paper"
    assert (bottoms(5), bottoms(6.5)) == (none, [24])
    assert (bottoms(100, 22), bottoms(100, 28)) == ([24], [24, 24])


def test_the_threshold_turns_an_answer_into_not_sure_and_the_temperature_cools_it(digits):
    found = find_ink(rgb(written(digits[6])))

    def reading(*numbers):
        (only,) = read_page(CAREFUL, found, Calibration(*numbers)).readings
        return only

    assert reading().answer == "6"
    assert repr(reading()) == f"6 ({100 * reading().confidence:.1f} %)"
    assert repr(reading(1.0, 1.1)).startswith("not sure (perhaps 6, ")
    assert reading(1.0, 1.1).reason.startswith("may be 6 or ")
    assert max(reading(0.5).probabilities) > max(reading(2.0).probabilities)
    logits = predict_logits(CAREFUL, reading().image)[0]
    assert reading(2.0).probabilities == pytest.approx((logits / 2).softmax(0).tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", list(KINDS)[list(KINDS).index("brush") :])
def test_pages_as_people_make_them_are_read(kind):
    """Two of three pages or more, all digits of each; the counts are in notebook 10."""
    found = load_mnist("sample")
    n = 1 if kind == "many" else 6
    right = share = 0
    for drawn, shown in pages(kind, n, found.train_images, found.train_labels, seed=5):
        answer = read_page(CAREFUL, find_ink(drawn), CALIBRATION)
        right += answer.text == shown
        share += sum(a == b for a, b in zip(answer.text, shown, strict=False)) / len(shown) / n
    assert right >= (3 * n if kind != "touching" else 2 * n) // 5 or share > 0.95


def test_a_page_of_several_digits_on_its_side_is_turned_and_its_boxes_are_not(digits):
    upright = page([stroke(digits[k], 90) for k in (4, 7, 3, 5)], np.random.default_rng(0))
    lying = np.rot90(upright).copy()
    answer = read_page(CAREFUL, find_ink(lying), CALIBRATION)
    assert answer.text == "4735"
    assert "turned by 270 degrees" in answer.notes[0]
    left, top, right, bottom = answer.readings[0].box
    own = lying[top:bottom, left:right].mean(2)
    assert own.min() < 80
    assert bottom > lying.shape[0] / 2  # the first digit is at the bottom
    assert (right - left, bottom - top) < lying.shape[:2]


def test_the_sheet_is_found_on_a_dark_table_and_a_fat_digit_is_no_sheet(digits):
    table = np.full((300, 260, 3), 35, np.float32)
    table[40:260, 30:220] = 230
    sheet = find_sheet(table)
    assert sheet[60:240, 50:200].all()
    assert not sheet[:30].any()
    fat = Image.fromarray(255 - np.asarray(written(digits[8], margin=2)))
    assert find_sheet(rgb(fat)).all()


def test_28x28_is_laid_out_as_in_mnist_or_not(digits):
    assert all(laid_out_as_mnist(image[0].numpy()) for image in digits)
    assert not laid_out_as_mnist(np.roll(digits[3][0].numpy(), 3, 1))


def test_what_is_removed_cut_or_left_out_is_said(digits):
    found = load_mnist("sample")
    said = [
        " ".join(read_page(CAREFUL, find_ink(drawn), CALIBRATION).notes)
        for kind in ("touching", "print")
        for drawn, _ in pages(kind, 2, found.train_images, found.train_labels, seed=5)
    ]
    assert any("cut from ink" in notes for notes in said[:2])
    assert any("left out as text" in notes for notes in said[2:])


def test_what_is_no_picture_no_file_or_too_large_is_refused_by_name_with_a_remedy(tmp_path):
    drawn((200, 200)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for k, contents in enumerate((b"this is not a picture", b"", whole[:100], whole[:-40])):
        (tmp_path / f"damaged{k}.png").write_bytes(contents)
    (tmp_path / "folder.png").mkdir()
    Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.png")  # to read it would take for ever
    for path in {*tmp_path.iterdir(), tmp_path / "nowhere.png"} - {tmp_path / "whole.png"}:
        fault = f"{path.name} cannot be read .*; give a PNG or JPEG of at most 50 million pixels"
        with pytest.raises(DatasetError, match=fault):
            read_picture(path)


def test_a_picture_is_what_is_in_the_file_and_no_other_program_is_asked_for_it(tmp_path):
    for kind in FORMATS:
        drawn((90, 90)).save(tmp_path / "photo", kind)
        assert read_picture(tmp_path / "photo").mask.any(), kind
    drawn((90, 90)).save(tmp_path / "x.png", "EPS")  # which Pillow hands to Ghostscript
    with pytest.raises(DatasetError, match=r"x\.png cannot be read .*cannot identify image file"):
        read_picture(tmp_path / "x.png")


def test_a_large_photo_is_read_smaller_and_its_boxes_are_in_its_own_pixels(tmp_path, digits):
    photo = Image.new("L", (3000, 2000), 255)
    photo.paste(written(digits[2], 400, margin=0), (1500, 900))
    photo.save(tmp_path / "photo.jpg")
    found = read_picture(tmp_path / "photo.jpg")
    answer = read_page(CAREFUL, found, CALIBRATION)
    (about,) = as_dict(tmp_path, answer, found.scale, CALIBRATION)["readings"]
    left, top, right, bottom = about["box"]
    assert 1500 <= left < right <= 1900
    assert 900 <= top < bottom <= 1300
    assert max(right - left, bottom - top) > 250


@pytest.fixture
def desk(tmp_path, monkeypatch, digits):
    monkeypatch.chdir(tmp_path)
    row = Image.new("L", (500, 240), 255)
    for left, digit in ((10, 4), (250, 2)):
        row.paste(written(digits[digit], margin=20), (left, 10))
    row.save("row.png")
    Image.new("L", (90, 90), 255).save("blank.png")
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    return tmp_path


def test_one_bad_file_does_not_hide_the_good_answers(desk, capsys):
    names = ["text.png", "row.png", "blank.png"]
    assert main(["predict", *names]) == 1
    said = capsys.readouterr()
    row, blank = said.out.splitlines()
    assert re.fullmatch(r"row\.png: 2 marks: 4 \([\d.]+ %\), 2 \([\d.]+ %\); all right .*", row)
    assert blank == "blank.png: no digit (nothing stands out from the paper)"
    assert re.fullmatch(r"error: text\.png cannot be read as a picture .*\n", said.err)
    assert main(["predict", *names, "--json"]) == 1
    text, row, blank = json.loads(capsys.readouterr().out)
    assert [r["digit"] for r in row["readings"]] == [4, 2]
    assert all(abs(sum(r["probabilities"]) - 1) < 1e-4 for r in row["readings"])
    assert text["error"].startswith("text.png cannot be read")
    assert (blank["readings"], blank["reason"]) == ([], "nothing stands out from the paper")


def test_a_folder_is_read_and_a_sheet_of_answers_written(desk, capsys):
    (desk / "text.png").unlink()
    assert main(["predict", ".", "--csv", "answers.csv"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    blank, row = (desk / "answers.csv").read_text().splitlines()[1:]
    assert blank == "blank.png,,0.0,nothing stands out from the paper"
    assert row.startswith("row.png,42,0.9")
    (desk / "empty").mkdir()
    assert main(["predict", "empty"]) == 1
    assert "empty has no picture" in capsys.readouterr().err


def test_show_writes_what_the_network_saw_and_overwrites_only_its_own_file(desk, capsys):
    for _ in range(2):
        assert main(["predict", "row.png", "blank.png", "--show"]) == 0
    assert "; see row-read.png" in capsys.readouterr().out
    with Image.open("row-read.png") as shown:
        assert shown.width == 2 * shown.height * 6 // 7  # two marks
    drawn((60, 60)).save("row-read.png")
    before = (desk / "row-read.png").read_bytes()
    assert main(["predict", "row.png", "--show"]) == 1
    assert "row-read.png was not written for row.png; move it" in capsys.readouterr().err
    assert (desk / "row-read.png").read_bytes() == before


def test_pages_are_the_same_for_the_same_seed_and_show_what_they_say(digits):
    for kind in KINDS:
        first, again, other = (
            next(pages(kind, 1, digits, torch.arange(10), seed)) for seed in (0, 0, 1)
        )
        assert np.array_equal(first[0], again[0])
        assert not np.array_equal(first[0], other[0])
        assert first[1].isdigit() == (kind not in ("blank", "noise", "letters", "scribbles"))


def test_every_page_is_counted_once(digits):
    table = measure(CAREFUL, CALIBRATION, digits, torch.arange(10), 4).set_index("kind")
    assert dict(table["n"]) == {k: round(4 * n) for k, n in KINDS.items() if round(4 * n)}
    assert (table["right"] + table["wrong"] <= table["n"]).all()
    assert (table["confident"] <= table["wrong"]).all()
    assert (table["right"] == table["n"])[["digits", "light", "ruled"]].all()
    assert (table["right"][["blank", "noise", "letters", "scribbles"]] == 0).all()
    assert table["wrong"][["blank", "noise"]].max() == 0


def test_ink_of_any_shape_comes_to_28x28():
    for shape in [(1, 1), (1, 200), (200, 1), (3, 90), (500, 400), (20, 20)]:
        assert to_mnist(np.ones(shape, np.float32)).shape == (28, 28)
