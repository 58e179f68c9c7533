"""What can a handwritten-digit classifier do on a parameter budget?

The package holds the model and the training loop, and what one run of them needs. Importing it
needs torch and numpy and does nothing else. What many runs show, the figures of the notebooks and
the command line `mnist` are in `mniststudy`, which this package never imports.
"""

from .augment import augment
from .budget import Budget
from .checkpoint import load_checkpoint, load_model, released_checkpoint
from .config import RECIPES, Config, configure
from .data import Digits, load_mnist
from .errors import CheckpointError, ConfigError, DatasetError, MnistlibError, TrainingError
from .evaluate import Evaluation, evaluate, predict
from .model import ReferenceNet, build
from .optim import learning_rates
from .spec import MODELS
from .train import Run, train

__all__ = [
    "MODELS", "RECIPES", "Budget", "CheckpointError", "Config", "ConfigError", "DatasetError",
    "Digits", "Evaluation", "MnistlibError", "ReferenceNet", "Run", "TrainingError", "augment",
    "build", "configure", "evaluate", "learning_rates", "load_checkpoint", "load_mnist",
    "load_model", "predict", "released_checkpoint", "train",
]  # fmt: skip
