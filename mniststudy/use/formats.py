"""The formats that `export` writes: ONNX, int8, safetensors and the page to draw on."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxruntime import quantization
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from safetensors.torch import save
from torch import Tensor, nn

from mnistlib import Digits, ReferenceNet
from mnistlib.spec import MEAN, STD

from ..runs.stats import calibration_error


class Answer(nn.Module):
    """A network followed by its temperature: what the ONNX files compute."""

    def __init__(self, network: nn.Module, temperature: float) -> None:
        super().__init__()
        self.network, self.temperature = network, temperature

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and probabilities `(N, 10)` of uint8 pixels `(N, 1, 28, 28)`."""
        logits = self.network(pixels)
        return logits, (logits / self.temperature).softmax(1)


def to_onnx(network: nn.Module, temperature: float) -> bytes:
    """Return a network as ONNX, see `Answer`: input `pixels`, any number of images.

    Of opset 18 and without an attribute that no shape here needs, as onnx2torch 1.5.15 and
    sclblonnx 0.3 read neither opset 20 nor `allowzero`.
    """
    program = torch.onnx.export(
        Answer(network, temperature).eval(),
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8),),
        dynamo=True, opset_version=18, verbose=False, input_names=["pixels"],
        output_names=["logits", "probabilities"], dynamic_shapes=({0: torch.export.Dim("N")},),
    )  # fmt: skip
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # the exporter writes stack traces there
    for node in program.model.graph:
        node.attributes.pop("allowzero", None)
    return program.model_proto.SerializeToString(deterministic=True)


def to_int8(file: bytes, images: Tensor) -> bytes:
    """Return an ONNX file with weights and activations of its convolutions as 8-bit integers.

    Args:
        file: from `to_onnx`.
        images: `(N, 1, 28, 28)` uint8; the ranges of the activations are measured on a thousand.
    """
    model = onnx.load_from_string(file)
    add_pre_process_metadata(model)  # else it warns; torch's exporter has done that work
    chosen = images[:: max(1, len(images) // 1000)]
    feed = ({"pixels": batch.numpy()} for batch in chosen.split(100))
    with TemporaryDirectory() as folder:
        # Weights of seven bits: with eight, 16-bit sums saturate on processors without VNNI, and
        # 8 of 2,000 answers depended on the processor. As QDQ, unsigned and of these operators, for
        # OpenVINO, TVM, OpenCV 5 and generators of C refuse or misread QLinearConv. Never Softmax,
        # one everywhere in tract, or Gemm, which OpenCV 4.13 gets right for the first image only
        quantization.quantize_static(
            model, path := Path(folder, "int8.onnx"),
            SimpleNamespace(get_next=lambda: next(feed, None)),
            quant_format=quantization.QuantFormat.QDQ, per_channel=True, reduce_range=True,
            op_types_to_quantize=["Conv", "Add", "MaxPool", "Relu"],
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return path.read_bytes()


def with_metadata(file: bytes, about: Mapping[str, Any]) -> bytes:
    """Return an ONNX file with texts that say what it is."""
    model = onnx.load_from_string(file)
    onnx.helper.set_model_props(model, {k: str(v) for k, v in about.items()})
    return model.SerializeToString(deterministic=True)


def answers_of(file: bytes) -> Callable[[Tensor], list[np.ndarray]]:
    """Return what gives an ONNX file's logits and probabilities `(N, 10)`, on one thread.

    It takes uint8 images `(N, 1, 28, 28)`.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"pixels": images.numpy()})


def measure(file: bytes, images: Tensor, labels: Tensor, expected: np.ndarray) -> dict[str, Any]:
    """Compare the answers of an ONNX file with labels and with torch's probabilities `(N, 10)`.

    Returns:
        `n`, `correct`, `changed` (other digits than torch's), `largest_difference` of a
        probability, `loss` in nats, and `calibration_error` in points.
    """
    answer = answers_of(file)
    seen = np.concatenate([answer(batch)[1] for batch in images.split(1000)])
    targets, chosen = labels.numpy(), seen.argmax(1)
    loss = -np.log(seen[np.arange(len(targets)), targets].clip(1e-12)).mean()
    return {
        "n": len(targets),
        "correct": int((chosen == targets).sum()),
        "changed": int((chosen != expected.argmax(1)).sum()),
        "largest_difference": f"{abs(seen - expected).max():.1e}",
        "loss": f"{loss:.4f}",
        "calibration_error": f"{calibration_error(seen, targets):.2f}",
    }


def to_safetensors(network: nn.Module, about: Mapping[str, Any]) -> bytes:
    """Return the weights of a network as safetensors, with texts that say what they are."""
    # copies, because the format has no tensors that share memory, as shared convolutions do
    raw = save({name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()})
    start = 8 + int.from_bytes(raw[:8], "little")
    # the library would write the texts in a random order, and the file would never be the same
    header = {"__metadata__": {k: str(v) for k, v in about.items()}} | json.loads(raw[8:start])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[start:]


def to_page(network: ReferenceNet, about: Mapping[str, Any], digits: Digits) -> str:
    """Return the page to draw on, `page.html` with the network and an example of each digit."""
    firsts = ((digits.train_labels == c).nonzero()[0] for c in range(10))  # (1,) each
    keys = ("name", "parameters", "bytes", "smallest", "temperature", "sure")
    model = {key: about[key] for key in keys}
    model |= {"mean": MEAN, "std": STD, "eps": network.bn1.eps}
    pictures = [_base64(digits.train_images[i].numpy()) for i in firsts]
    model["examples"] = [{"label": c, "pixels": pixels} for c, pixels in enumerate(pictures)]
    model["weights"] = {
        name: {"shape": list(tensor.shape), "data": _base64(tensor.numpy().astype("<f4"))}
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("/*MODEL*/null", json.dumps(model).replace("</", "<\\/"))


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
