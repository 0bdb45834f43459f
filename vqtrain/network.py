"""Interprets rows in PyTorch, with the kinds and names of ``vqref.network``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqref.network import (
    GROUP_EPSILON,
    LEAST_LENGTH,
    NORM_EPSILON,
    bounds_of,
    upsample_factor,
)
from vqref.spec import Layer, plan


class Network(nn.Module):
    """The rows of one network, in order.

    ``state_dict`` has the spec's parameter names. The row ``encoder.block1.conv3`` is the module
    ``block1.conv3`` of the encoder.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.rows: list[Row] = []
        for step in plan(layers):
            row = Row(step.layer)
            row.sources, row.spent = step.sources, step.spent
            self.rows.append(row)
            if step.layer.parameters:
                _place(self, step.layer.name.split(".")[1:], row)

    def forward(self, x: Tensor) -> Tensor:
        values = {0: x}
        for number, row in enumerate(self.rows, 1):
            y = row(*[values[source] for source in row.sources])
            for spent in row.spent:
                del values[spent]
            values[number] = y
        return values[len(self.rows)]


class Row(nn.Module):
    """One row with its weight and bias, uninitialised.

    ``vqref.init_params`` or a file provides their values.

    sources, spent: as in ``vqref.spec.Step``.
    copies: the parameters in another precision. While they are set, they replace the parameters.
    """

    sources: tuple[int, ...] = ()
    spent: tuple[int, ...] = ()
    copies: Sequence[Tensor] = ()

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for name, shape in layer.parameters:
            self.register_parameter(name.rsplit(".", 1)[1], nn.Parameter(torch.empty(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.copies:
            inputs = tuple(x.to(self.copies[0].dtype) for x in inputs)
        weights = self.copies or self._parameters.values()
        y = KINDS[self.layer.kind](self.layer, *inputs, *weights)
        return ACTIVATIONS[self.layer.activation](y)


def _place(parent: nn.Module, path: Sequence[str], row: Row) -> None:
    """Makes ``row`` the module at ``path`` below ``parent``.

    ``add_module`` would refuse names that PyTorch uses, such as "half", which a row may have.
    """
    for name in path[:-1]:
        inner = parent._modules.setdefault(name, nn.Module())
        assert inner is not None
        parent = inner
    parent._modules[path[-1]] = row


def affine(layer: Layer, x: Tensor) -> Tensor:
    return layer.scale * x + layer.shift


def conv(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Pads the image first if its sides need unequal padding, which ``padding=`` cannot do.

    TensorFlow's "same" at stride 2 needs it.
    """
    (top, bottom), (left, right) = layer.pads
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, layer.stride, padding=(top, left))
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, layer.stride)


def conv_transpose(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes strides above 1 in phases.

    The outputs s*m + p of phase p are a convolution of x with the taps that reach them. A single
    convolution computes all phases as channels, and ``Interleave`` puts them in place. On a
    processor, this is several times as fast in bfloat16 as ``conv_transpose2d``, which has no
    kernel for bfloat16. The cropped margin is never computed.
    """
    (top, bottom), (left, right) = layer.pads
    s, (channels, height, width) = layer.stride, layer.out_shape
    whole = layer.kernel[0] % s == layer.kernel[1] % s == 0 and channels >= WIDE
    if (s == 1 or whole) and (top, left) == (bottom, right):
        return F.conv_transpose2d(x, weight, bias, s, padding=(top, left))
    rows = _Phases(layer.kernel[0], s, top, layer.in_shape[1], height)
    columns = _Phases(layer.kernel[1], s, left, layer.in_shape[2], width)
    taps = columns.taps(rows.taps(weight, 2), 4)  # (s columns', s rows', C, O, taps, taps)
    kernel = taps.permute(1, 0, 3, 2, 4, 5).reshape(s * s * channels, len(weight), *taps.shape[4:])
    if rows.before == rows.after >= 0 and columns.before == columns.after >= 0:
        padding = (rows.before, columns.before)
    else:
        x, padding = F.pad(x, (columns.before, columns.after, rows.before, rows.after)), (0, 0)
    parts = F.conv2d(x, kernel, bias.repeat(s * s), padding=padding)
    y: Tensor = Interleave.apply(parts, rows, columns, channels)  # type: ignore[no-untyped-call]
    return y if y.shape[2:] == (height, width) else y[:, :, :height, :width]


WIDE = 32
"""From this many output channels on, PyTorch's transposed convolution is faster than phases, if
all phases have the same number of taps."""


class _Phases:
    """One axis of a transposed convolution, whose output s*m + p belongs to phase p.

    Input m + t reaches this output with tap p + crop - s*t.

    first: the smallest t of each phase. before, after: zeros around the input, so that one window
    of ``size`` taps serves every phase. shift: by how many windows each phase begins after the
    earliest. count: outputs per phase.
    """

    def __init__(self, kernel: int, stride: int, crop: int, inputs: int, outputs: int) -> None:
        self.kernel, self.stride, self.crop = kernel, stride, crop
        self.count = -(-outputs // stride)
        last = [(p + crop) // stride for p in range(stride)]
        self.first = [-((kernel - 1 - p - crop) // stride) for p in range(stride)]
        self.size = max(1, *(b - a + 1 for a, b in zip(self.first, last, strict=True)))
        self.before = -min(self.first)
        self.after = self.count - 1 + max(self.first) + self.size - inputs
        self.shift = [t + self.before for t in self.first]

    def taps(self, weight: Tensor, dim: int) -> Tensor:
        """Returns the taps of axis ``dim`` by phase, (s, ..., size, ...); 0 outside the kernel."""
        zero = torch.zeros_like(weight.select(dim, 0))
        found = []
        for p, first in enumerate(self.first):
            places = [p + self.crop - self.stride * (first + i) for i in range(self.size)]
            row = [weight.select(dim, a) if 0 <= a < self.kernel else zero for a in places]
            found.append(torch.stack(row, dim))
        return torch.stack(found)


class Interleave(torch.autograd.Function):
    """Puts the phases of a transposed convolution in place: (N, s*s*O, H', W') to (N, O, s*H, s*W).

    With channels last, output (s*m + p, s*l + q) is at a fixed stride in each of m, p, l and q. So
    one strided copy is enough, and another one for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, rows: _Phases, columns: _Phases, channels: int) -> Tensor:
        ctx.how, ctx.shape = (rows, columns, channels), parts.shape
        last = parts.permute(0, 2, 3, 1).contiguous()  # (N, H', W', s*s*O)
        placed = _in_place(last, rows, columns, channels).contiguous()
        n, height, s, width, _, _ = placed.shape
        return placed.view(n, height * s, width * s, channels).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns, channels = ctx.how
        n, wide, height, width = ctx.shape
        last = gradients[0].new_zeros(n, height, width, wide)
        placed = _in_place(last, rows, columns, channels)
        placed.copy_(gradients[0].permute(0, 2, 3, 1).reshape(placed.shape))
        return last.permute(0, 3, 1, 2), None, None, None


def _in_place(last: Tensor, rows: _Phases, columns: _Phases, channels: int) -> Tensor:
    """Returns the view (N, H, s, W, s, O) of parts with channels last.

    Phases are shifted evenly: each begins where the one before does, or one window later.
    """
    s = rows.stride
    by_image, by_row, by_column, _ = last.stride()
    down = by_row * (rows.shift[1] - rows.shift[0]) if s > 1 else 0
    right = by_column * (columns.shift[1] - columns.shift[0]) if s > 1 else 0
    shape = (len(last), rows.count, s, columns.count, s, channels)
    strides = (by_image, by_row, down + s * channels, by_column, right + channels, 1)
    start = rows.shift[0] * by_row + columns.shift[0] * by_column
    return last.as_strided(shape, strides, last.storage_offset() + start)


def dense(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def reshape(layer: Layer, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], *layer.out_shape)


def to_vectors(layer: Layer, x: Tensor) -> Tensor:
    size = layer.out_shape[1]
    grid = x.permute(0, 2, 3, 1)  # (N, h, w, g*D)
    return grid.reshape(len(x), -1, size)


def to_grid(layer: Layer, x: Tensor) -> Tensor:
    channels, height, width = layer.out_shape
    return x.reshape(len(x), height, width, channels).permute(0, 3, 1, 2)


def add(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return x + y


def activation(layer: Layer, x: Tensor) -> Tensor:
    return x


def embedding(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.pad(F.embedding(x[:, :-1], weight), (0, 0, 1, 0)) + bias


def layer_norm(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, NORM_EPSILON)


def group_norm(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Subtracts the mean first, which changes neither the exact result nor its gradient.

    PyTorch computes x * scale - mean * scale. This cancels if the deviation is far smaller than the
    mean, as in flat images.
    """
    with torch.no_grad():
        mean = x.mean(dim=(2, 3)).unflatten(1, (layer.groups, -1)).mean(dim=2)  # (N, groups)
        mean = mean.repeat_interleave(x.shape[1] // layer.groups, dim=1)
    return F.group_norm(x - mean[:, :, None, None], layer.groups, weight, bias, GROUP_EPSILON)


def unit_norm(layer: Layer, x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=LEAST_LENGTH)


def bounded(layer: Layer, x: Tensor) -> Tensor:
    """Computes bfloat16 in float32, and returns float32."""
    x = x.float() if x.dtype.itemsize < 4 else x
    shift, scale, middle = (torch.from_numpy(each).to(x) for each in bounds_of(layer))
    return scale * torch.tanh(x + shift) - middle


def upsample(layer: Layer, x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=float(upsample_factor(layer)), mode="nearest")


def attention(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Treats a single query as the one of the last place, which sees all keys."""
    n, places, size = q.shape
    shape = (n, -1, layer.heads, size // layer.heads)
    q, k, v = (each.reshape(shape).transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=layer.causal and places > 1)
    return y.transpose(1, 2).reshape(n, places, size)


class Elu(torch.autograd.Function):
    """ELU that keeps its result instead of its input, so that its gradient needs no exponential.

    PyTorch's own ELU does so only in place, which would copy views.
    """

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


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


KINDS: dict[str, Callable[..., Tensor]] = {
    "affine": affine,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "dense": dense,
    "reshape": reshape,
    "to_vectors": to_vectors,
    "to_grid": to_grid,
    "add": add,
    "activation": activation,
    "embedding": embedding,
    "layer_norm": layer_norm,
    "group_norm": group_norm,
    "unit_norm": unit_norm,
    "bounded": bounded,
    "upsample": upsample,
    "attention": attention,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": linear,
    "elu": elu,
    "relu": relu,
    "silu": silu,
    "gelu": gelu,
}
