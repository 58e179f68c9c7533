"""Which checkpoint a run goes on from, and whether it is one of this very run."""

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .checkpoint import CheckpointError, load_checkpoint
from .config import Config
from .state import TrainingState

SAVING = 600  # seconds after which a temporary file cannot be of a save that is still at work


def checkpoints(folder: Path) -> list[tuple[int, Path, dict[str, Any]]]:
    """Return step, path and content of each whole checkpoint in a folder, most steps last.

    Steps are compared as numbers and read from the files: names sort as text, and a clock that is
    set back would put an older one last. A damaged one is named on standard error and left out.
    What killed saves left behind is removed.
    """
    for orphan in folder.glob(".saving-*.pth"):
        if time.time() - orphan.stat().st_mtime > SAVING:
            orphan.unlink(missing_ok=True)
    found = []
    for path in sorted(folder.glob("mnist_model_*.pth")):
        try:
            content = load_checkpoint(path)
            found.append((int(content["training"]["step"]), path, content))
        except (CheckpointError, TypeError, ValueError) as error:
            print(f"WARNING: not used: {error}", file=sys.stderr)
    return sorted(found, key=lambda f: f[0])


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint itself, or of a run's folder the latest that is whole.

    Raises:
        CheckpointError: the folder has none.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    if found := checkpoints(path):
        return found[-1][1]
    raise CheckpointError(f"{path} has no checkpoint to go on from; begin the run anew")


def take_up(t: TrainingState, path: Path, source: str) -> list[Path]:
    """Bring a fresh state to where a checkpoint of the same run was; return the run's checkpoints.

    These are the ones in its folder that it grew out of, itself last.

    Raises:
        CheckpointError: it is damaged, of other settings or data, or no state that a run can have.
    """
    content = load_checkpoint(path)
    saved, config = Config(**content["config"]), t.config
    if saved.hash(content["source"]) != config.hash(source):
        wanted = asdict(config) | {"data source": source}
        there = asdict(saved) | {"data source": content["source"]}
        differ = [f"{k} {there[k]!r} there, {wanted[k]!r} here" for k in wanted]
        differ = [d for d, k in zip(differ, wanted, strict=True) if there[k] != wanted[k]]
        raise CheckpointError(
            f"{path} is of another run ({'; '.join(differ)}); resume with the same settings"
        )
    state = content["training"]
    try:
        if not (type(state["step"]) is int and 0 <= state["step"] <= t.total_steps):
            raise ValueError(f"step {state['step']!r} of {t.total_steps}")
        if {len(state["loss"]), len(state["correct"])} != {state["step"]}:
            raise ValueError("as many losses as steps are needed")
        if len(state["history"]) != state["step"] // t.steps_per_epoch:
            raise ValueError("as many rows of history as finished epochs are needed")
        if not all(v.isfinite().all() for v in _tensors(state) if v.is_floating_point()):
            raise ValueError("a value is not finite")
        t.restore(state)
    except Exception as error:  # a forged state can fail in any way
        why = " ".join(str(error).split())  # torch's run over many lines
        raise CheckpointError(
            f"{path} has a training state that cannot be ({why}); use another checkpoint"
        ) from None
    hashed = config.hash(source)
    return [
        other
        for step, other, c in checkpoints(path.parent)
        if (step, other == path) <= (t.step, True)
        and Config(**c["config"]).hash(c["source"]) == hashed
    ]


def retire(saved: list[Path], folder: Path, finished: bool) -> None:
    """Remove the older checkpoints of a run from its folder.

    Of an unfinished one two stay: should the latest be damaged, there is the one before it.
    """
    while len(saved) > (1 if finished else 2):
        if (old := saved.pop(0)).parent == folder:
            old.unlink(missing_ok=True)


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """Go through the tensors of nested dicts and lists, without the losses of unseen images."""
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, dict | list):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key != "last_loss":
                yield from _tensors(value)
