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
from mnistlib.config import cast, check_allowed
from mnistlib.evaluate import predict_logits
from mnistlib.paths import write_atomically

from .pictures import find_ink
from .segment import Calibration, read_page

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
        found = {}
        for key, allowed in (("temperature", (0.01, 100.0)), ("sure", (0.0, 1.0))):
            found[key] = cast(key, content.get(key), float)
            check_allowed(key, found[key], allowed)
        return Calibration(**found, twin=dict(content.get("twin") or {}) or None)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "restore it, or write it again with `make release`"
        raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from None


def calibrate_released(twin: str | Path, checkpoint: str | Path | None = None) -> Calibration:
    """Fit the calibration of a network on its twin, and write it as `calibration.json` beside it.

    Args:
        twin: checkpoint of the twin, which has validation images.
        checkpoint: that of the network; by default the released one of `best`.

    Raises:
        CheckpointError: a checkpoint is missing or damaged.
        ConfigError: the twin's settings are others, or it has no validation images here.
    """
    path = Path(checkpoint or mnistlib.released_checkpoint())
    taught, content = mnistlib.load_checkpoint(twin), mnistlib.load_checkpoint(path)
    config, released = Config(**taught["config"]), Config(**content["config"])
    digits = mnistlib.load_mnist()
    # teachers of the twin have not seen its validation images either, so their pool is another;
    # nor can it start from a network that has
    other = ("split", "pool", "start", "seed", "device", "threads")
    own = {k: getattr(released, k) for k in other}
    same = replace(config, **own) == released and bool(config.pool) == bool(released.pool)
    if not same or config.split == "none" or taught["source"] != digits.source:
        need = f"the same settings, and images of {digits.source!r} held out"
        raise ConfigError(f"{twin} is no twin of {path}, which needs {need}; name another one")
    ids = digits.split(config.split)[1]
    about: dict[str, object] = {"config_hash": config.hash(digits.source), "split": config.split}
    about |= {"seed": config.seed, "n": len(ids)} | ({"pool": config.pool} if config.pool else {})
    model = mnistlib.load_model(twin)
    fitted = calibrate(model, digits.train_images[ids], digits.train_labels[ids])
    found = replace(fitted, twin=about)
    whose = {"checkpoint": path.name, "config_hash": released.hash(content["source"])}
    text = json.dumps(whose | asdict(found), indent=1) + "\n"
    write_atomically(path.with_name("calibration.json"), text.encode())
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
        reading.confidence
        for drawn, truth in rendered.pages("digits", n, images, labels)
        for reading in read_page(model, find_ink(drawn), found).readings
        if reading.answer == truth
    ]
    return replace(found, sure=math.floor(100 * float(np.quantile(right, LOST))) / 100)
