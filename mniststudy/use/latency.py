"""How fast answers come, for the README: torch and onnxruntime, one image and a thousand."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from timeit import Timer
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from mnistlib import Budget, load_mnist, load_model, released_checkpoint
from mnistlib.paths import runs_folder

from ..figures.speed import example_networks
from ..runs.ledger import append_rows, commit
from . import formats

COLUMNS = (
    "go", "network", "runtime", "batch", "repetition", "calls", "seconds", "threads", "parameters",
    "multiply_accumulates", "bytes", "device", "torch", "onnxruntime", "commit",
)  # fmt: skip


def latency(
    folder: Path | None = None,
    repetitions: int = 5,
    networks: Mapping[str, nn.Module] | None = None,
) -> Path:
    """Time answers and append rows to `latency.csv`; return its path.

    On one thread, which torch keeps, in rounds that go through all networks and runtimes.

    Args:
        folder: of the ledger; by default `runs_folder()`.
        repetitions: the rounds.
        networks: by name; by default `best` and the examples of Keras and PyTorch.

    Raises:
        LedgerError: `latency.csv` is another table, or cannot be written.
    """
    path = (folder or runs_folder()) / "latency.csv"
    append_rows(path, COLUMNS, [])  # another table is refused before the work
    networks = networks or {"best": load_model(released_checkpoint())} | example_networks()
    images = load_mnist("mnist").train_images
    torch.set_num_threads(1)
    session = {
        "go": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "threads": 1, "device": "cpu",
        "torch": torch.__version__, "onnxruntime": onnxruntime.__version__, "commit": commit(),
    }  # fmt: skip
    jobs: list[tuple[dict[str, Any], Callable[[Tensor], object]]] = []
    for name, network in networks.items():
        cost, plain = Budget(network), formats.to_onnx(network, 1.0)
        about = {key: getattr(cost, key) for key in ("parameters", "multiply_accumulates")}
        about |= session | {"network": name, "runtime": "torch"}
        answer = torch.inference_mode()(formats.Answer(network, 1.0).eval().forward)
        jobs.append((about, answer))
        integers = formats.to_int8(plain, images)
        for runtime, file in (("onnxruntime", plain), ("onnxruntime int8", integers)):
            row = about | {"runtime": runtime, "bytes": len(file)}
            jobs.append((row, formats.answers_of(file)))
    thousand = images[:1].repeat(1000, 1, 1, 1)
    for repetition, (about, answer), batch in product(range(repetitions), jobs, (1, 1000)):
        answer(thousand[:batch])  # the first call prepares
        calls, seconds = Timer(partial(answer, thousand[:batch])).autorange()
        about |= {"batch": batch, "repetition": repetition + 1, "calls": calls}
        append_rows(path, COLUMNS, [about | {"seconds": round(seconds, 5)}])
        print(f"{about['network']}, {about['runtime']}: {calls} calls in {seconds:.2f} s")
    return path
