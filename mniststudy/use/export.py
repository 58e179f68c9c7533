"""The command `export`: a checkpoint in other formats, with a model card."""

from pathlib import Path

from mnistlib import (
    CheckpointError,
    Config,
    Digits,
    ReferenceNet,
    load_checkpoint,
    load_model,
    released_checkpoint,
)
from mnistlib.evaluate import predict_logits
from mnistlib.paths import write_atomically

from . import formats
from .calibrate import load_calibration
from .card import model_card

LARGEST_DIFFERENCE = 1e-5  # of a probability, between torch and the float ONNX file


def export(checkpoint: Path, digits: Digits, folder: Path | None = None) -> list[Path]:
    """Write a checkpoint in other formats, with a model card and a page; return the files.

    Temperature and threshold are those of `calibration.json` beside the checkpoint. The page is
    written for `ReferenceNet` only. Nothing is written if the ONNX file does not answer as torch.

    Args:
        checkpoint: file of a finished run.
        digits: digits to calibrate the integers on, and to measure the files on: the test images,
            or of the sample the training images.
        folder: by default that of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or a file differs from it or cannot be written.
    """
    content, network = load_checkpoint(checkpoint), load_model(checkpoint)
    calibration, config = load_calibration(checkpoint), Config(**content["config"])
    folder, temperature = folder or checkpoint.parent, calibration.temperature
    about = {
        "name": config.recipe, "model": config.model,
        "parameters": sum(p.numel() for p in network.parameters()),
        "seed": config.seed, "config_hash": content["config_hash"], "temperature": temperature,
        "threshold": calibration.sure, "labels": "0 1 2 3 4 5 6 7 8 9", "licence": "MIT",
        "input": "bytes from 0, the background, to 255, ink",
    }  # fmt: skip
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    expected = (predict_logits(network, images) / temperature).softmax(1).numpy()
    where = f"{len(images):,} {'test' if digits.test else 'training'} images"
    plain = formats.to_onnx(network, temperature)
    files = {f"{config.recipe}.safetensors": formats.to_safetensors(network, about)}
    for file, part in {
        f"{config.recipe}.onnx": plain,
        f"{config.recipe}-int8.onnx": formats.to_int8(plain, digits.train_images),
    }.items():
        measured = {"measured_on": where} | formats.measure(part, images, labels, expected)
        files[file] = formats.with_metadata(part, about | measured)
        print(f"{file}: {measured}")
        if part is plain and float(measured["largest_difference"]) > LARGEST_DIFFERENCE:
            fault = f"as ONNX answers otherwise than torch ({measured}), so nothing was written"
            raise CheckpointError(f"{checkpoint} {fault}; use the releases of requirements.lock")
    if isinstance(network, ReferenceNet):
        sizes = {
            "bytes": len(files[f"{config.recipe}.safetensors"]),
            "smallest": released_checkpoint("tiny").with_name("tiny.tiny").stat().st_size,
        }
        page = formats.to_page(network, about | {"sure": calibration.sure} | sizes, digits)
        files["draw.html"] = page.encode()
    try:
        for file, raw in files.items():
            write_atomically(folder / file, raw)
        write_atomically(folder / "MODEL_CARD.md", model_card(checkpoint, folder).encode())
    except OSError as error:
        fault = f"{folder} cannot be written to ({error.strerror}); name another folder"
        raise CheckpointError(fault) from None
    return [folder / file for file in (*files, "MODEL_CARD.md")]
