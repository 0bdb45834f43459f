"""The PyTorch interpreter of the layer table: the same kinds under the same names as ``vqref.network``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqref.spec import Layer


class Network(nn.Module):
    """Rows of the table in order. Child modules carry the rows' names, so ``state_dict`` has the spec's parameter names."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        for layer in layers:
            self.add_module(layer.name.rsplit(".", 1)[1], Row(layer))

    def forward(self, x: Tensor) -> Tensor:
        for row in self.children():
            x = row(x)
        return x


class Row(nn.Module):
    """One row of the table with its weight and bias, uninitialised: values come from ``vqref.init_params`` or a file."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for parameter in layer.parameters:
            self.register_parameter(parameter.name.rsplit(".", 1)[1], nn.Parameter(torch.empty(parameter.shape)))

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.named_parameters(recurse=False))
        return ACTIVATIONS[self.layer.activation](KINDS[self.layer.kind](self.layer, x, **parameters))


def conv(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """TensorFlow's "same" pads by unequal amounts at stride 2, which ``padding=`` cannot say: those are padded first."""
    (top, bottom), (left, right) = layer.pads
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, layer.stride, padding=(top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, layer.stride)


def conv_transpose(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``padding=`` crops both ends by the smaller amount; what "same" crops beyond it at the end is sliced off."""
    (top, _), (left, _) = layer.pads
    _, height, width = layer.out_shape
    return F.conv_transpose2d(x, weight, bias, layer.stride, padding=(top, left))[:, :, :height, :width]


def dense(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def reshape(layer: Layer, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *layer.out_shape)


def linear(x: Tensor) -> Tensor:
    return x


KINDS: dict[str, Callable[..., Tensor]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "linear": linear}
