"""What is refused, an exception per kind; messages name the thing, the fault and the remedy."""


class MnistlibError(Exception):
    """Everything that the package refuses: the base class of the others."""


class ConfigError(MnistlibError, ValueError):
    """A setting, parameter or option is unknown or out of range."""


class DatasetError(MnistlibError):
    """Digits, or a picture of one, are missing, damaged or something else."""


class CheckpointError(MnistlibError):
    """A checkpoint cannot be saved, trusted or used."""


class TrainingError(MnistlibError):
    """Training cannot go on."""


class LedgerError(MnistlibError):
    """A table or a record of runs is missing, or is not one."""
