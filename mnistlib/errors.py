"""The exceptions of the package; each message names the thing, the fault and the remedy."""


class MnistlibError(Exception):
    """Base class of all exceptions of the package."""


class ConfigError(MnistlibError, ValueError):
    """A setting, parameter or option is unknown or out of range."""


class DatasetError(MnistlibError):
    """Digits, or a picture of one, are missing, damaged or of another kind."""


class CheckpointError(MnistlibError):
    """A checkpoint cannot be saved, verified or used."""


class TrainingError(MnistlibError):
    """Training cannot continue."""
