"""What can a handwritten-digit classifier do on a parameter budget?

The package holds the networks, the budget and the training loop; the notebooks tell the story.
Importing it needs torch and numpy and does nothing else; plots and tables import theirs when used.
"""

from .ablations import ablations
from .audit import Audit, audit
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
from .stats import (
    Comparison,
    best_epoch_inflation,
    bootstrap_interval,
    compare,
    compare_paired,
    detection_power,
    difference_interval,
    mcnemar,
    mean_interval,
    predicted_spread,
    seeds_needed,
    smallest_gain,
    wilson_interval,
)
from .sweep import sweep
from .train import Run, TrainingError, train

__all__ = [
    "MODELS",
    "RECIPES",
    "Audit",
    "Budget",
    "CheckpointError",
    "Comparison",
    "Config",
    "ConfigError",
    "DatasetError",
    "Digits",
    "Evaluation",
    "Run",
    "TrainingError",
    "ablations",
    "audit",
    "best_epoch_inflation",
    "bootstrap_interval",
    "build",
    "compare",
    "compare_paired",
    "configure",
    "detection_power",
    "difference_interval",
    "evaluate",
    "learning_rates",
    "load_checkpoint",
    "load_mnist",
    "load_model",
    "mcnemar",
    "mean_interval",
    "predict",
    "predicted_spread",
    "published_checkpoint",
    "quote",
    "random_distortion",
    "read_results",
    "record",
    "requirements",
    "runs_of",
    "save_checkpoint",
    "seeds_needed",
    "smallest_gain",
    "sweep",
    "train",
    "wilson_interval",
]
