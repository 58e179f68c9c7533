"""Teachers: their answers to augmented images, asked for once and kept as a pool."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mnistlib import Config, ConfigError, Digits, load_checkpoint, load_model
from mnistlib.distill import CHECKSUMS, FIRST, SOFT, TEMPERATURE, checksum, pool_folder, view_of
from mnistlib.paths import write_atomically

from ..use.others import draw_others


def build_pool(
    teachers: Sequence[Path], digits: Digits, config: Config, views: int, device: torch.device,
    others: int = 0,
) -> str:  # fmt: skip
    """Ask the teachers about augmented views of all training images; return the pool's name.

    The pool is a folder `pools/NAME` in `runs_folder()` with a file for each view, and at last
    their checksums. Views that are there, and whole, are not made again, so the same call continues
    one that was stopped.

    Args:
        teachers: checkpoints.
        digits: data.
        config: whose augmentation the views get.
        views: how many views of each image.
        device: where to compute.
        others: how many images without a digit it also gets, see `draw_others`.

    Returns:
        Eight hex digits of a SHA-256 over the teachers' weights, the data source, the augmentation,
        the number of views, that of images without a digit if there are any, and the constants of
        the loss if they are no longer the first ones.

    Raises:
        CheckpointError: a teacher is no intact checkpoint.
        ConfigError: the teachers have other digits, or held out different images.
    """
    contents = [load_checkpoint(path) for path in teachers]
    models = [load_model(path).to(device) for path in teachers]
    about = made_of(contents, digits.source, config, views, others)
    name = pool_name(contents, about)
    folder = pool_folder(name)
    write_atomically(folder / "pool.json", json.dumps(about, indent=1).encode())
    paths, noted = [folder / f"{view}.f16" for view in range(views)], folder / CHECKSUMS
    known = noted.read_text("utf-8") if noted.is_file() else ""
    size = 250 if device.type == "cpu" else 5000  # images in one call
    for view, path in enumerate(tqdm(paths, disable=None, desc=f"pool {name}")):
        whole = path.is_file() and path.stat().st_size == 20 * len(digits.train_labels)
        if whole and (not known or checksum(path) in known):
            continue
        found = []
        with torch.inference_mode():
            for images in view_of(digits, config.augmentation, view, device).split(size):
                answers = [(m(images.unsqueeze(1)) / TEMPERATURE).softmax(1) for m in models]
                found.append(torch.stack(answers).mean(0).half().cpu())
        write_atomically(path, torch.cat(found).numpy().tobytes())
    if others:  # not of images that the students are validated on
        ids = digits.split(about["split"])[0]
        pixels = draw_others(others, digits.train_images[ids], digits.train_labels[ids])
        paths.append(folder / "others.u8")
        write_atomically(paths[-1], pixels.numpy().tobytes())
    write_atomically(noted, "".join(map(checksum, paths)).encode())
    return name


def pool_name(teachers: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """Return the name of the pool of these teachers, contents of checkpoints; see `build_pool`."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for content in teachers:
        for value in content["model_state_dict"].values():
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


def made_of(
    teachers: Sequence[dict[str, Any]], source: str, config: Config, views: int, others: int = 0
) -> dict[str, Any]:
    """Return what a pool of these teachers, contents of checkpoints, is made of.

    Raises:
        ConfigError: the teachers have other digits, or held out different images.
    """
    if {content["source"] for content in teachers} != {source}:
        raise ConfigError(f"not all teachers were trained on the source {source!r} of the digits")
    splits = {content["config"]["split"] for content in teachers}
    if len(splits) > 1:
        fault = f"the teachers were trained with different splits ({', '.join(sorted(splits))})"
        raise ConfigError(f"{fault}; a pool takes teachers of one split")
    names = [f"{content['config_hash']}-{content['config']['seed']}" for content in teachers]
    about = {"source": source, "views": views, "augmentation": config.augmentation}
    if others:
        about["others"] = others
    if FIRST != [TEMPERATURE, SOFT]:
        about["loss"] = [TEMPERATURE, SOFT]
    return about | {"split": splits.pop(), "teachers": names}
