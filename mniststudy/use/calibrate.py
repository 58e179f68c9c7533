"""Temperature and threshold of a network's answers: read, and fitted on a twin's held-out images.

The released network was trained on all training images, so nothing is left to calibrate it on. Its
twin was trained by the same recipe on a part, and so were the twin's teachers, if it has any. What
is fitted on the validation images of the twin is used for both.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

import mnistlib
from mnistlib import CheckpointError, Config, ConfigError
from mnistlib.evaluate import predict_logits
from mnistlib.paths import outputs_folder, write_atomically

from .pictures import Calibration, find_marks, read_marks

LOST = 0.002  # share of right answers that the threshold may cost


def load_calibration(checkpoint: str | Path) -> Calibration:
    """Return what `calibration.json` beside a checkpoint says of it, else the defaults.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(checkpoint).with_name("calibration.json")
    if not path.is_file():
        return Calibration()
    try:
        content = json.loads(path.read_bytes())
        if content["checkpoint"] != Path(checkpoint).name:
            return Calibration()
        return Calibration(content["temperature"], content["sure"], content["twin"])
    except (ValueError, KeyError, TypeError) as error:
        remedy = "restore it, or write it again with `make release`"
        raise CheckpointError(f"{path} is damaged ({error!r}); {remedy}") from None


def calibrate_released(
    twin: str | Path, checkpoint: str | Path | None = None, measure: bool = False
) -> Calibration:
    """Fit the calibration of a network on its twin, and write it as `calibration.json` beside it.

    Args:
        twin: checkpoint of the twin, which has validation images.
        checkpoint: that of the network; by default the released one of `best`.
        measure: also count its answers to synthetic pages of test digits, for `pictures.csv`.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        ConfigError: the twin has no validation images here, or its settings are others.
    """
    path = Path(checkpoint or mnistlib.released_checkpoint())
    taught, content = mnistlib.load_checkpoint(twin), mnistlib.load_checkpoint(path)
    digits, model = mnistlib.load_mnist(), mnistlib.load_model(twin)
    config, released = Config(**taught["config"]), Config(**content["config"])
    if taught["source"] != digits.source or config.split == "none":
        fault = f"was trained on {taught['source']!r} with split {config.split!r}"
        raise ConfigError(f"{twin} {fault}: no validation images here; name another twin")
    may_differ = ["split", "seed", "device", "threads"]
    if config.pool and released.pool:
        may_differ.append("pool")  # the twin's teachers have not seen its validation images either
    if replace(config, **{k: getattr(released, k) for k in may_differ}) != released:
        raise ConfigError(f"{twin} is no twin of {path}: their settings differ; train another")
    ids = digits.split(config.split)[1]
    about: dict[str, object] = {"config_hash": config.hash(taught["source"])}
    about |= {"split": config.split, "seed": config.seed, "n": len(ids)}
    if config.pool:
        about["pool"] = config.pool
    fitted = calibrate(model, digits.train_images[ids], digits.train_labels[ids])
    found = replace(fitted, twin=about)
    whose = {"checkpoint": path.name, "config_hash": released.hash(content["source"])}
    text = json.dumps(whose | asdict(found), indent=1) + "\n"
    write_atomically(path.with_name("calibration.json"), text.encode())
    print(f"{path.with_name('calibration.json')}: {found}")
    if measure and digits.test is not None:
        from . import rendered

        counts = rendered.measure(mnistlib.load_model(path), found, *digits.test)
        table = counts.to_csv(index=False).encode()
        write_atomically(outputs_folder() / "results" / "pictures.csv", table)
        print(counts.to_string(index=False))
    return found


def calibrate(model: nn.Module, images: Tensor, labels: Tensor, n: int = 1000) -> Calibration:
    """Fit temperature and threshold of a network on images that it was not trained on.

    The temperature is fitted on the images; `sure` is such that of `n` rendered digits that would
    be right, the share `LOST` is not answered.
    """
    from ..runs.stats import fit_temperature  # here, so that `predict` starts fast
    from . import rendered

    logits = predict_logits(model, images).numpy()
    found = Calibration(round(fit_temperature(logits, labels.numpy()), 4), sure=0.0)
    right = [
        max(reading.probabilities)
        for drawn, truth in rendered.pages("digits", n, images, labels)
        for reading in read_marks(model, find_marks(drawn).marks, found)
        if reading.answer == truth
    ]
    return replace(found, sure=math.floor(100 * float(np.quantile(right, LOST))) / 100)
