"""How fast answers come: torch, onnxruntime and OpenVINO, one image and a thousand."""

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import Timer
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from mnistlib import Budget, load_mnist, load_model, released_checkpoint
from mnistlib.paths import runs_folder
from mnistlib.runtime import keep_freed_memory

from ..figures.speed import example_networks
from ..runs.ledger import append_rows, commit
from . import formats

# runs where OpenVINO is, which is not in our environment; the hint, as it computes in bfloat16
OPENVINO = """
import sys
from functools import partial
from timeit import Timer
import numpy, openvino
options, compiled = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}, {}
for line in sys.stdin:
    file, batch = line.split()
    if file == "version":
        print(openvino.__version__.split("-")[0])
        continue
    if line not in compiled:
        compiled[line] = openvino.Core().compile_model(file, "CPU", options)
    answer = partial(compiled[line], numpy.load("images.npy")[: int(batch)])
    answer()
    print(*Timer(answer).autorange())
"""
Clock = Callable[[int], tuple[int, float]]  # images at a time -> calls and their seconds together


def latency(
    repetitions: int = 5,
    networks: Mapping[str, nn.Module] | None = None,
    openvino: str | Path | None = None,
) -> Path:
    """Time answers and append rows to `latency.csv` in `runs_folder()`; return its path.

    On one thread, which torch keeps, in rounds that go through all networks and runtimes. A round
    that is interrupted leaves no rows. torch keeps freed memory and has its weights in
    channels_last; without either it takes up to three times as long for a thousand images.

    Args:
        repetitions: the rounds.
        networks: by name; by default `best` and the examples of Keras and PyTorch.
        openvino: Python of an environment with OpenVINO, which is timed in a process of its own.

    Raises:
        LedgerError: `latency.csv` is another table, or cannot be written.
    """
    path, go = runs_folder() / "latency.csv", datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    networks = networks or {"best": load_model(released_checkpoint())} | example_networks()
    images = load_mnist("mnist").train_images
    thousand = images[:1].repeat(1000, 1, 1, 1)
    torch.set_num_threads(1)
    jobs: list[tuple[str, str, int | None, Clock]] = []
    with keep_freed_memory(), TemporaryDirectory() as place, _foreign(openvino, place) as foreign:
        np.save(Path(place, "images.npy"), thousand.numpy())
        for name, network in networks.items():
            plain = formats.to_onnx(network, 1.0)
            fast = network.to(memory_format=torch.channels_last)
            forward = torch.inference_mode()(formats.Answer(fast, 1.0).eval().forward)
            jobs.append((name, "torch", None, partial(_timed, forward, thousand)))
            for kind, file in {"": plain, " int8": formats.to_int8(plain, images)}.items():
                here = partial(_timed, formats.answers_of(file), thousand)
                jobs.append((name, f"onnxruntime{kind}", len(file), here))
                for runtime, ask in foreign.items():
                    Path(place, saved := f"{len(jobs)}.onnx").write_bytes(file)
                    jobs.append((name, f"{runtime}{kind}", len(file), partial(ask, saved)))
        for repetition in range(1, 1 + repetitions):
            rows = []
            for (name, runtime, size, timed), batch in product(jobs, (1, 1000)):
                calls, seconds = timed(batch)
                cost = Budget(networks[name])
                rows.append({
                    "go": go, "network": name, "runtime": runtime, "batch": batch,
                    "repetition": repetition, "calls": calls, "seconds": round(seconds, 5),
                    "threads": 1, "parameters": cost.parameters,
                    "multiply_accumulates": cost.multiply_accumulates, "bytes": size,
                    "device": "cpu", "torch": torch.__version__,
                    "onnxruntime": onnxruntime.__version__, "commit": commit(),
                })  # fmt: skip
                print(f"{name}, {runtime}: {calls} calls in {seconds:.2f} s")
            append_rows(path, list(rows[0]), rows)
    return path


def _timed(answer: Callable[[Tensor], Any], images: Tensor, batch: int) -> tuple[int, float]:
    run = partial(answer, images[:batch])
    run()  # the first call prepares
    return Timer(run).autorange()


@contextmanager
def _foreign(python: str | Path | None, folder: str) -> Iterator[dict[str, Callable[..., Any]]]:
    """Start a process that times OpenVINO; give its name with what asks it for file and batch."""
    if not python:
        yield {}
        return
    command = [str(Path(python).absolute()), "-u", "-c", OPENVINO]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdin=pipe, stdout=pipe, text=True) as process:

        def ask(*words: object) -> list[str]:
            print(*words, file=process.stdin, flush=True)
            return process.stdout.readline().split()  # type: ignore[union-attr]

        def clock(file: str, batch: int) -> tuple[int, float]:
            calls, seconds = ask(file, batch)
            return int(calls), float(seconds)

        yield {f"OpenVINO {ask('version', 0)[0]}": clock}
        process.stdin.close()  # type: ignore[union-attr]
