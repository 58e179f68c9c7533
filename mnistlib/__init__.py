"""What can a handwritten-digit classifier do on a parameter budget?

The package holds the networks, the budget and the training loop; the notebooks tell the story.
Importing it needs torch and numpy and does nothing else; plots and tables import theirs when used.
"""

from .augment import random_distortion
from .budget import Budget, requirements
from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_model,
    published_checkpoint,
    save_checkpoint,
)
from .config import RECIPES, Config, ConfigError, configure
from .data import DatasetError, Digits, load_mnist
from .evaluate import Evaluation, evaluate, predict
from .ledger import quote, read_results, record, runs_of
from .model import MODELS, build
from .optimizers import learning_rates
from .stats import difference_interval, mean_interval, wilson_interval
from .sweep import sweep
from .train import Run, TrainingError, train

__all__ = [
    "MODELS",
    "RECIPES",
    "Budget",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DatasetError",
    "Digits",
    "Evaluation",
    "Run",
    "TrainingError",
    "build",
    "configure",
    "difference_interval",
    "evaluate",
    "learning_rates",
    "load_checkpoint",
    "load_mnist",
    "load_model",
    "mean_interval",
    "predict",
    "published_checkpoint",
    "quote",
    "random_distortion",
    "read_results",
    "record",
    "requirements",
    "runs_of",
    "save_checkpoint",
    "sweep",
    "train",
    "wilson_interval",
]
