"""The committed ONNX files of `best` in foreign runtimes, for `make runtimes`.

    python tests/foreign/runtimes.py expect build/digits.npz
    python tests/foreign/runtimes.py check build/digits.npz [NAME ...] [--table FILE]

The first writes the 10,000 test images (without MNIST, the sample's training images) and torch's
answers. The second needs numpy and the runtimes alone, and tries those named, or all that are
installed. It fails if the float file gives another digit than torch, or the int8 file loses more
than 0.05 points. With `--table` it keeps what it found; the model card shows the table
outputs/results/runtimes.csv.
"""

import csv
import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("BEST", ROOT / "outputs" / "checkpoints" / "best"))
COLUMNS = ("runtime", "n", "float_changed", "int8_changed", "int8_correct", "how")
LOST = 0.05  # points that the int8 file may lose, in any runtime
Answer = Callable[[np.ndarray], np.ndarray]  # pixels (N, 1, 28, 28) uint8 -> probabilities (N, 10)


def expect(path: Path) -> None:
    """Write digits, their labels and torch's probabilities."""
    import mnistlib

    digits, network = mnistlib.load_mnist(), mnistlib.load_model("best")
    images, labels = digits.test or (digits.train_images, digits.train_labels)
    answers = mnistlib.predict(network, images).argmax(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, pixels=images.numpy(), labels=labels.numpy(), expected=answers.numpy())


def onnx_runtime(file: Path) -> Answer:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda pixels: session.run(["probabilities"], {"pixels": pixels})[0]


def opencv(file: Path) -> Answer:
    import cv2

    network = cv2.dnn.readNetFromONNX(str(file))

    def answer(pixels: np.ndarray) -> np.ndarray:
        network.setInput(pixels)
        return network.forward("probabilities")

    return answer


def openvino(file: Path) -> Answer:
    import openvino

    hint = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(file, "CPU", hint)
    return lambda pixels: compiled(pixels)["probabilities"]


def tinygrad(file: Path) -> Answer:
    os.environ.setdefault("DEV", "CPU")
    from tinygrad import Tensor
    from tinygrad.nn.onnx import OnnxRunner

    run = OnnxRunner(file)
    return lambda pixels: run({"pixels": Tensor(pixels)})["probabilities"].numpy()


def tract(file: Path) -> Answer:
    import tract

    run = tract.onnx().load(file).into_model().into_runnable()
    return lambda pixels: run.run([pixels])[1].to_numpy()


def tvm(file: Path) -> Answer:
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    module = from_onnx(onnx.load(file), {"pixels": [500, 1, 28, 28]}, keep_params_in_input=False)
    built = relax.build(relax.get_pipeline("zero")(module), "llvm")
    machine = relax.VirtualMachine(built, tvm.cpu())

    def answer(pixels: np.ndarray) -> np.ndarray:
        return machine["main"](tvm.runtime.tensor(pixels))[1].numpy()

    return answer


def iree(file: Path) -> Answer:
    import iree.compiler
    import iree.runtime

    text = Path(mkdtemp(), "best.mlir")
    subprocess.run(
        [sys.executable, "-m", "iree.compiler.tools.import_onnx", file, "-o", text], check=True
    )
    code = iree.compiler.compile_file(
        str(text), input_type="onnx", target_backends=["llvm-cpu"],
        extra_args=["--iree-llvmcpu-target-cpu=host"],
    )  # fmt: skip
    module = iree.runtime.load_vm_flatbuffer(code, driver="local-sync")
    names = module.vm_module.function_names
    name = next(key for key in names if key.isidentifier() and not key.startswith("__"))
    return lambda pixels: module[name](pixels)[1].to_host()


def emx(file: Path) -> Answer:
    source, library = (Path(mkdtemp(), name) for name in ("best.c", "best.so"))
    generator = Path(sys.executable).with_name("emx-onnx-cgen")
    subprocess.run([generator, "compile", file, source], check=True, stdout=subprocess.DEVNULL)
    flags = ["-O2", "-fPIC", "-shared", "-lm"]
    subprocess.run(["cc", source, "-o", library, *flags], check=True)
    function = ctypes.CDLL(str(library)).model

    def answer(pixels: np.ndarray) -> np.ndarray:
        found = [np.empty((len(pixels), 10), np.float32) for _ in range(2)]
        arrays = (np.ascontiguousarray(pixels), *found)
        function(len(pixels), *(ctypes.c_void_p(array.ctypes.data) for array in arrays))
        return found[1]

    return answer


def onnx2torch(file: Path) -> Answer:
    import torch
    from onnx2torch import convert

    network = convert(file).eval()
    return lambda pixels: network(torch.tensor(pixels))[1].detach().numpy()


# distribution, what opens a file, images at a time, what a user has to do
RUNTIMES: dict[str, tuple[str, Callable[[Path], Answer], int, str]] = {
    "onnxruntime": ("onnxruntime", onnx_runtime, 1000, "nothing"),
    "OpenCV": (
        "opencv-python-headless", opencv, 500,
        'ask by name, `forward("probabilities")`: without one, 4 gives these and 5 the logits; '
        "pass bytes, as 5 takes no floats",
    ),
    "OpenVINO": (
        "openvino", openvino, 500, "compile with `INFERENCE_PRECISION_HINT` set to `f32`",
    ),
    "tinygrad": ("tinygrad", tinygrad, 500, "pass as many images in each call"),
    "tract": ("tract", tract, 500, "nothing"),
    "TVM": ("apache-tvm", tvm, 500, "name the number of images in `from_onnx`"),
    "IREE": ("iree-base-runtime", iree, 500, "nothing"),
    "emx-onnx-cgen": ("emx-onnx-cgen", emx, 500, "compile the C file"),
    "onnx2torch": ("onnx2torch", onnx2torch, 500, "take the float file"),
}  # fmt: skip


def row_of(name: str, pixels: np.ndarray, labels: np.ndarray, expected: np.ndarray) -> dict:
    """Return what a runtime answers; an empty field: it does not read the file."""
    distribution, opened, size, how = RUNTIMES[name]
    row = {"runtime": f"{name} {version(distribution)}", "n": len(labels), "how": how}
    for kind in ("float", "int8"):
        file = FOLDER / {"float": "best.onnx", "int8": "best-int8.onnx"}[kind]
        try:
            answer = opened(file)
            batches = np.split(pixels, range(size, len(pixels), size))
            found = np.concatenate([answer(batch) for batch in batches]).argmax(1)
        except Exception as error:  # each fails in its own way
            print(f"{name}: {file.name}: {error!r:.300}", file=sys.stderr)
            continue
        row[f"{kind}_changed"] = int((found != expected).sum())
        row[f"{kind}_correct"] = int((found == labels).sum())
    return row


def check(path: Path, names: list[str], table: Path | None) -> int:
    """Try runtimes; return how many are not as they should be."""
    with np.load(path) as digits:
        pixels, labels, expected = (digits[key] for key in ("pixels", "labels", "expected"))
    bad = 0
    for name in names or RUNTIMES:
        try:
            row = row_of(name, pixels, labels, expected)
        except PackageNotFoundError:
            if names:
                raise
            continue
        least = (expected == labels).sum() - LOST / 100 * len(labels)
        good = row.get("float_changed") == 0 and row.get("int8_correct", 0) >= least
        bad += not good
        print("ok " if good else "BAD", {k: v for k, v in row.items() if k != "how"}, flush=True)
        if table:
            write(table, row)
    return bad


def write(table: Path, row: dict) -> None:
    """Write a row into a table, in the place of that of the same runtime."""
    rows = list(csv.DictReader(table.open(encoding="utf-8"))) if table.exists() else []
    rows = [*(r for r in rows if r["runtime"] != row["runtime"]), row]
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: r["runtime"].lower()))


if __name__ == "__main__":
    task, place, *rest = sys.argv[1:]
    where = Path(rest.pop(rest.index("--table") + 1)) if "--table" in rest else None
    rest = [name for name in rest if name != "--table"]
    sys.exit(expect(Path(place)) if task == "expect" else check(Path(place), rest, where))
