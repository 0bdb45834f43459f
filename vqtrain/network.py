"""The PyTorch interpreter of the layer table: the same kinds under the same names as ``vqref.network``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    """At stride 2 each of the four phases of the output (even or odd row, even or odd column) is a convolution of x with the
    taps that meet it: one convolution to four times the channels, whose parts are then put in their places. Several times as
    fast in bfloat16 on a processor as ``conv_transpose2d``, which has no kernel for it, and without the output's cropped
    margin. With the channels last, phases of columns lie in their places already, and rows are copied whole."""
    (top, _), (left, _) = layer.pads
    if layer.stride == 1:
        return F.conv_transpose2d(x, weight, bias, padding=(top, left))
    channels, height, width = layer.out_shape
    taps = _phases(_phases(weight, 2, top), 4, left)  # (2 columns', 2 rows', C, O, 3, 3)
    kernel = taps.permute(1, 0, 3, 2, 4, 5).reshape(4 * channels, layer.in_shape[0], 3, 3)
    parts = F.conv2d(x, kernel, bias.repeat(4), padding=1).permute(0, 2, 3, 1)  # (N, H/2, W/2, 2 rows', 2 columns', O)
    rows: Tensor = parts.unflatten(3, (2, 2 * channels)).transpose(2, 3)
    return rows.reshape(x.shape[0], height, width, channels).permute(0, 3, 1, 2)


def _phases(weight: Tensor, dim: int, crop: int) -> Tensor:
    """The taps of ``dim`` by phase: (2, ..., 3, ...). Output 2m + p lies crop further in the full one, to which input m + t
    gives weight[p + crop - 2t]; t is -1, 0 or 1, and a tap outside of the kernel is zero."""
    zero = torch.zeros_like(weight.select(dim, 0))
    taps = [[p + crop - 2 * t for t in (-1, 0, 1)] for p in (0, 1)]
    return torch.stack(
        [torch.stack([weight.select(dim, a) if 0 <= a < weight.shape[dim] else zero for a in row], dim) for row in taps]
    )


def dense(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def reshape(layer: Layer, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *layer.out_shape)


class Elu(torch.autograd.Function):
    """ELU that keeps its result for the gradient, not its input: no exponential on the way back. (PyTorch's own does so in
    place alone, where a view, such as a transposed convolution gives, costs copies.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.elu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        gradient: Tensor = torch.ops.aten.elu_backward(gradients[0], 1.0, 1.0, 1.0, True, y)
        return gradient


def elu(x: Tensor) -> Tensor:
    y: Tensor = Elu.apply(x)  # type: ignore[no-untyped-call]
    return y


def linear(x: Tensor) -> Tensor:
    return x


KINDS: dict[str, Callable[..., Tensor]] = {
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"elu": elu, "linear": linear}
