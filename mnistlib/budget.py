"""What a network costs, layer by layer, counted before training."""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .errors import ConfigError
from .model import build
from .spec import Upright


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
    """of the output in float32"""
    receptive_field: int
    """side, in pixels, of the square of the image that one output value depends on"""


class Budget:
    """Parameters, multiply-accumulates, activation memory and receptive field, layer by layer.

    Parameters are summed over the tensors. A multiply-accumulate is one product added to a sum.
    Only those of convolutions and linear layers are counted, not BatchNorm, ReLU, pooling and what
    sets a digit upright.
    The receptive field is computed in the order in which the layers run: a layer with kernel k
    adds (k - 1) x the product of all strides before it (V. Dumoulin and F. Visin, arXiv
    1603.07285). A shortcut without a stride has a smaller field than the layers that it skips and
    changes nothing. One with a stride is counted twice, so the result is an upper bound.

    Args:
        model: any network of images `(N, 1, image_size, image_size)`, or its name or spec.
        image_size: side of the input in pixels.

    Raises:
        ConfigError: the network cannot take images of that size, or its name is unknown.
    """

    def __init__(self, model: nn.Module | str, image_size: int = 28) -> None:
        if isinstance(model, str):
            with torch.random.fork_rng(devices=[]):  # counting changes no random numbers
                model = build(model)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.layers = _trace(model, image_size)
        self.multiply_accumulates = sum(layer.multiply_accumulates for layer in self.layers)
        self.activation_bytes = sum(layer.activation_bytes for layer in self.layers)
        self.receptive_field = max(layer.receptive_field for layer in self.layers)

    def _table(self, **form: str) -> str:
        """Return the table as tabulate draws it: header, a row per layer, total."""
        from tabulate import tabulate

        costs = (self.parameters, self.multiply_accumulates, self.activation_bytes)
        rows = [("layer", "kind", "output", "parameters", "share", "MACs", "memory", "field")]
        for layer in [*self.layers, Layer("total", "", (), *costs, self.receptive_field)]:
            own, macs, side = layer.parameters, layer.multiply_accumulates, layer.receptive_field
            share = f"{100 * own / self.parameters:.1f} %" if own else ""
            counts = (f"{own:,}" if own else "", share, f"{macs:,}" if macs else "")
            what = (layer.name, layer.kind, "x".join(map(str, layer.shape)))
            memory = f"{layer.activation_bytes / 1024:.1f} kB"
            rows.append((*what, *counts, memory, f"{side}x{side}"))
        align = ["left"] * 3 + ["right"] * 5
        return tabulate(rows, disable_numparse=True, colalign=align, **form)

    def __repr__(self) -> str:
        """Draw the table as text."""
        return self._table(tablefmt="plain")

    def _repr_html_(self) -> str:
        """Draw the table for a notebook."""
        table = self._table(tablefmt="html", headers="firstrow")
        for cell in ("th", "td"):  # JupyterLab would align them right
            table = table.replace(f"<{cell}>", f'<{cell} style="text-align: left;">')
        # without padding the columns run together outside JupyterLab
        return table.replace('style="', 'style="padding: 2px 10px; ')


def _trace(model: nn.Module, size: int) -> list[Layer]:
    """Run one image through a copy of the network and record each layer as it is called."""
    model = copy.deepcopy(model).cpu().float().eval()
    layers: list[Layer] = []
    field, stride = np.ones(2, int), np.ones(2, int)  # rows, columns: in input pixels
    counted: set[nn.Module] = set()  # a layer that is called twice counts once

    def hook(name: str, layer: nn.Module, seen: Tensor, out: Tensor) -> None:
        macs, reach, step = 0, np.zeros(2, int), np.ones(2, int)
        if isinstance(layer, nn.Conv2d):
            macs = out.numel() * layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.Linear):
            macs = out.numel() * layer.in_features
            np.maximum(field, size, out=field)
        elif isinstance(layer, Upright):
            np.maximum(field, size, out=field)  # where a pixel comes from depends on all of them
        if isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            reach = np.subtract(layer.kernel_size, 1) * np.array(getattr(layer, "dilation", 1))
            step = np.array(layer.stride)
        elif isinstance(layer, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            step = np.floor_divide(seen.shape[2:], out.shape[2:])
            reach = seen.shape[2:] - np.subtract(out.shape[2:], 1) * step - 1
        np.add(field, reach * stride, out=field)
        np.multiply(stride, step, out=stride)
        own = 0 if layer in counted else sum(p.numel() for p in layer.parameters())
        counted.add(layer)
        kind, shape = type(layer).__name__.lstrip("_"), tuple(out.shape[1:])
        layers.append(Layer(name, kind, shape, own, macs, 4 * out.numel(), int(field.max())))

    for name, layer in model.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda m, x, out, name=name: hook(name, m, x[0], out))
    try:
        with torch.no_grad():
            model(torch.zeros(1, 1, size, size))
    except RuntimeError as error:  # the size is negative, too small for the kernels, or too large
        fault = f"image_size is {size}, but the network cannot take such images ({error})"
        raise ConfigError(f"{fault}; choose another size") from None
    return layers
