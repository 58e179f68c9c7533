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


def latency(repetitions: int = 5, networks: Mapping[str, nn.Module] | None = None) -> Path:
    """Time answers and append rows to `latency.csv` in `runs_folder()`; return its path.

    On one thread, which torch keeps, in rounds that go through all networks and runtimes. A round
    that is interrupted leaves no rows.

    Args:
        repetitions: the rounds.
        networks: by name; by default `best` and the examples of Keras and PyTorch.

    Raises:
        LedgerError: `latency.csv` is another table, or cannot be written.
    """
    path, go = runs_folder() / "latency.csv", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    networks = networks or {"best": load_model(released_checkpoint())} | example_networks()
    images = load_mnist("mnist").train_images
    torch.set_num_threads(1)
    jobs: list[tuple[str, str, int | None, Callable[[Tensor], Any]]] = []
    for name, network in networks.items():
        forward = torch.inference_mode()(formats.Answer(network, 1.0).eval().forward)
        jobs.append((name, "torch", None, forward))
        plain = formats.to_onnx(network, 1.0)
        files = {"onnxruntime": plain, "onnxruntime int8": formats.to_int8(plain, images)}
        jobs += [(name, how, len(file), formats.answers_of(file)) for how, file in files.items()]
    thousand = images[:1].repeat(1000, 1, 1, 1)
    for repetition in range(1, 1 + repetitions):
        rows = []
        for (name, runtime, size, answer), batch in product(jobs, (1, 1000)):
            answer(thousand[:batch])  # the first call prepares
            calls, seconds = Timer(partial(answer, thousand[:batch])).autorange()
            cost = Budget(networks[name])
            rows.append({
                "go": go, "network": name, "runtime": runtime, "batch": batch,
                "repetition": repetition, "calls": calls, "seconds": round(seconds, 5),
                "threads": 1, "parameters": cost.parameters,
                "multiply_accumulates": cost.multiply_accumulates, "bytes": size, "device": "cpu",
                "torch": torch.__version__, "onnxruntime": onnxruntime.__version__,
                "commit": commit(),
            })  # fmt: skip
            print(f"{name}, {runtime}: {calls} calls in {seconds:.2f} s")
        append_rows(path, list(rows[0]), rows)
    return path
