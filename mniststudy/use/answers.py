"""What was read from pictures, as a line of text, as JSON, as a sheet and as a picture."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnistlib import DatasetError
from mnistlib.paths import write_atomically

from .segment import Answer, Calibration, Reading

COLUMNS = ("picture", "answer", "confidence", "notes")


def as_dict(path: Path, answer: Answer, scale: float, calibration: Calibration) -> dict[str, Any]:
    """Return all that is known of a picture, with boxes in its own pixels, upright."""
    about: dict[str, Any] = {"picture": str(path), "answer": answer.text}
    about |= {"confidence": round(answer.confidence, 6), "notes": list(answer.notes)}
    about |= {"reason": answer.reason or None, "sure": calibration.sure}
    about["readings"] = [_mark(reading, scale) for reading in answer.readings]
    about["left_out"] = [_mark(reading, scale) for reading in answer.left_out]
    return about


def _mark(reading: Reading, scale: float) -> dict[str, Any]:
    """Return everything of a mark but its pixels."""
    chances = [round(p, 6) for p in reading.probabilities]
    digit = int(reading.answer) if reading.answer.isdigit() else None
    about: dict[str, Any] = {"answer": reading.answer, "digit": digit}
    about |= {"confidence": round(reading.confidence, 6), "probabilities": chances}
    about |= {"reason": reading.reason or None}
    about["alternatives"] = [k for k in reading.ranking[1:] if chances[k] >= 0.05]
    about["box"] = [round(scale * side) for side in reading.box]
    return about


def as_text(answer: Answer, scale: float, calibration: Calibration) -> str:
    """Say in one line what is read, how sure it is, and where it is not."""
    if not answer.readings:
        return "; ".join([f"no digit ({answer.reason})", *answer.notes])
    said = ", ".join(map(repr, answer.readings))
    if len(answer.readings) == 1:
        return "; ".join([said, *answer.notes])
    parts = [f"{len(answer.readings)} marks: {said}", f"all right {100 * answer.confidence:.1f} %"]
    if answer.confidence < calibration.sure:
        least = min(answer.readings, key=lambda reading: reading.confidence)
        place = ", ".join(str(round(scale * side)) for side in least.box[:2])
        parts.append(f"not sure: least of {least!r} at {place}")
    return "; ".join([*parts, *answer.notes])


def write_sheet(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Write one row for each picture as CSV; a mark that is not answered is a `?`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for about in found:
        why = [about["error"]] if "error" in about else [*about["notes"], about["reason"]]
        notes = "; ".join(filter(None, why))
        row = [about["picture"], about.get("answer", ""), about.get("confidence", ""), notes]
        writer.writerow(row)
    write_atomically(path, text.getvalue().encode())


def save_readings(path: str | Path, readings: Sequence[Reading]) -> Path:
    """Draw what the network saw and answered beside a picture, as `NAME-read.png`; return its path.

    Raises:
        DatasetError: a file of that name is not by this function, or the folder is read-only.
    """
    from matplotlib.figure import Figure  # slow to import

    path = Path(path)
    shown, source = path.with_name(f"{path.stem}-read.png"), f"mnist predict --show {path.name!a}"
    wide = min(len(readings), 10)
    high = -(-len(readings) // wide)
    figure = Figure((1.5 * wide, 1.75 * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, reading in zip(axes, readings, strict=False):
        ax.imshow(reading.image[0], cmap="gray_r")
        ax.set_title(str(reading), fontsize=9)
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Source": source})
    try:
        if shown.exists() and source.encode() not in shown.read_bytes():
            raise DatasetError(f"{shown} was not written for {path.name}; move it, then try again")
        write_atomically(shown, buffer.getvalue())
    except OSError as error:
        raise DatasetError(f"{shown} cannot be written ({error.strerror})") from None
    return shown
