"""What a network costs, counted before training, and the requirements it must meet."""

import contextlib
import copy
import html
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One layer of a network, as one image passes through it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    """of the output, without the batch"""
    parameters: int
    multiply_accumulates: int
    activation_bytes: int
    """of the output, float32"""
    receptive_field: int
    """side in input pixels of the square that one output value can see"""


class Budget:
    """Parameters, multiply-accumulates, activation memory and receptive field, layer by layer.

    Parameters are summed from the tensors. A multiply-accumulate is one product added to a sum, as
    convolutions and linear layers do; what BatchNorm, ReLU and pooling do is not counted.
    The receptive field follows the layers in the order in which they run: after a layer with
    kernel k it has grown by (k - 1) x the product of all strides before (V. Dumoulin and F. Visin,
    arXiv 1603.07285). A shortcut that keeps the size sees less than what it goes around and changes
    nothing; one with a stride of its own would be counted twice, so the figure is an upper bound.

    Args:
        model: any network of images `(N, channels, image_size, image_size)`.
        image_size: side of the input in pixels.
        channels: input channels.
    """

    def __init__(self, model: nn.Module, image_size: int = 28, channels: int = 1) -> None:
        self.tensors = {name: p.numel() for name, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.parameters = sum(self.tensors.values())
        self.layers = _trace(model, torch.zeros(1, channels, image_size, image_size))
        self.multiply_accumulates = sum(layer.multiply_accumulates for layer in self.layers)
        self.activation_bytes = sum(layer.activation_bytes for layer in self.layers)
        self.receptive_field = max(layer.receptive_field for layer in self.layers)

    def parameter_list(self) -> str:
        """Return the reference's first table: a line per tensor, then the total."""
        lines = [f"{name}: {count:,} parameters" for name, count in self.tensors.items()]
        return "\n".join([*lines, "", f"Total Trainable Parameters: {self.parameters:,}"])

    def layer_summary(self) -> str:
        """Return the reference's second table: a line per layer with the shape of its weight."""
        rule = "-" * 80
        lines = [rule, f"{'Layer':<42}{'Output Shape':<21}{'Param #':<11}".rstrip(), rule]
        for name, shape in self.shapes.items():
            if name.endswith(".weight"):
                layer = name.removesuffix(".weight")
                count = sum(n for t, n in self.tensors.items() if t.rpartition(".")[0] == layer)
                lines.append(f"{layer:<42}{shape!s:<21}{count:,}")
        return "\n".join([*lines, rule, f"Total trainable parameters: {self.parameters:,}"])

    def _rows(self) -> list[tuple[str, ...]]:
        rows = [("layer", "kind", "output", "parameters", "share", "MACs", "memory", "sees")]
        for layer in self.layers:
            field, side = layer.receptive_field, "x".join(map(str, layer.shape))
            share = f"{100 * layer.parameters / self.parameters:.1f} %" if layer.parameters else ""
            rows.append(
                (
                    layer.name,
                    layer.kind,
                    side,
                    f"{layer.parameters:,}" if layer.parameters else "",
                    share,
                    f"{layer.multiply_accumulates:,}" if layer.multiply_accumulates else "",
                    f"{layer.activation_bytes / 1024:.1f} kB",
                    f"{field}x{field}",
                )
            )
        field = self.receptive_field
        total = f"{self.parameters:,}", "100.0 %", f"{self.multiply_accumulates:,}"
        memory = f"{self.activation_bytes / 1024:.1f} kB"
        rows.append(("total", "", "", *total, memory, f"{field}x{field}"))
        return rows

    def __repr__(self) -> str:
        """Draw the table as text."""
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = []
        for row in rows:
            pairs = enumerate(zip(row, widths, strict=True))
            cells = [c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in pairs]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Draw the table for a notebook."""
        head, *body = self._rows()
        parts = ["<table><thead>", _html_row(head, "th"), "</thead><tbody>"]
        parts += [_html_row(row, "td") for row in body]
        return "\n".join([*parts, "</tbody></table>"])


def _html_row(row: tuple[str, ...], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value, value)


def _trace(model: nn.Module, image: Tensor) -> list[Layer]:
    """Run one image through a copy of the network and write down each layer as it is called."""
    model = copy.deepcopy(model).cpu().float().eval()
    layers: list[Layer] = []
    field, stride = [1, 1], [1, 1]  # rows, columns: in input pixels

    counted: set[nn.Module] = set()  # a layer that is called twice has its parameters once

    def note(name: str, layer: nn.Module, seen: Tensor, out: Tensor) -> None:
        macs = 0
        if isinstance(layer, nn.Conv2d):
            per_output = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
            macs = out.numel() * per_output
        elif isinstance(layer, nn.Linear):
            macs = out.numel() * layer.in_features
            field[:] = [max(f, side) for f, side in zip(field, image.shape[2:], strict=True)]
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            for i in range(2):
                reach = (_pair(layer.kernel_size)[i] - 1) * _pair(getattr(layer, "dilation", 1))[i]
                field[i] += reach * stride[i]
                stride[i] *= _pair(layer.stride)[i]
        elif isinstance(layer, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            for i in range(2):
                into, outof = seen.shape[2 + i], out.shape[2 + i]
                field[i] += (into - (outof - 1) * (into // outof) - 1) * stride[i]
                stride[i] *= into // outof
        own = 0 if layer in counted else sum(p.numel() for p in layer.parameters())
        counted.add(layer)
        shape = tuple(out.shape[1:])
        kind = type(layer).__name__.lstrip("_")
        layers.append(Layer(name, kind, shape, own, macs, 4 * out.numel(), max(field)))

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda m, x, out, name=name: note(name, m, x[0], out))
    with torch.no_grad():
        model(image)
    return layers


def requirements(model: nn.Module, limit: int = 20_000) -> dict[str, bool]:
    """Check the reference's requirements of a network by what it does, not by what it contains.

    Fewer than `limit` parameters; images `(N, 1, 28, 28)` in and `(N, 10)` logits out; BatchNorm
    in use (a training pass moves its running statistics); Dropout in use (two training passes of
    the same images differ). The network stays as it was, and so does torch's random state.
    """
    model = copy.deepcopy(model).cpu().float().train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.running_mean.clone() for m in norms if m.running_mean is not None]
    first = second = torch.empty(0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        # a network that wants other images fails all that needs a pass
        with contextlib.suppress(RuntimeError, ValueError):
            first, second = model(images), model(images)
    after = [m.running_mean for m in norms if m.running_mean is not None]
    return {
        f"fewer than {limit:,} parameters": sum(p.numel() for p in model.parameters()) < limit,
        "BatchNorm in use": any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)),
        "Dropout in use": not torch.equal(first, second),
        "28x28 in, 10 out": tuple(first.shape) == (4, 10),
    }
