"""The one specification of the network, as data.

``ModelSpec`` turns five sizes into a table of layers, and the table into the names, shapes and initial distributions
of every parameter. The NumPy oracle, the PyTorch trainer and the ONNX exporter are three interpreters of this table;
no other file restates a size or a name.

The network is that of Keydana, "Discrete Representation Learning with VQ-VAE and TensorFlow Probability" (2019),
after van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["conv", "conv_transpose", "dense", "reshape"]
Padding = Literal["same", "valid"]
Activation = Literal["elu", "linear"]
Initial = Literal["glorot_uniform", "zeros", "codebook"]

SIZE_LIMIT = 2**24
"""No single size of a ModelSpec may exceed this: it stops a damaged file from asking for the whole memory."""


@dataclass(frozen=True)
class Parameter:
    """One array of the model: its name in every file format, its shape and how it starts.

    ``limit`` is the half-width of the Glorot uniform distribution, sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010,
    equation 16); 0 where ``initial`` is another rule.
    """

    name: str
    shape: tuple[int, ...]
    initial: Initial
    limit: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One row of the table. Shapes are those of one image, without the batch axis.

    kind            in_shape    out_shape   weight
    conv            (C, H, W)   (C', H', W')  (C', C, kh, kw)
    conv_transpose  (C, H, W)   (C', H', W')  (C, C', kh, kw)
    dense           (F,)        (F',)         (F', F)
    reshape         any         same size     none
    """

    name: str
    kind: Kind
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: Padding = "valid"
    activation: Activation = "linear"

    @property
    def pads(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """((top, bottom), (left, right)) in pixels, by TensorFlow's rule.

        "same" pads max((ceil(n / s) - 1) * s + k - n, 0) in all, the smaller half first. A transposed convolution is
        the gradient of the convolution that maps its output to its input, so n is then the output's size and the same
        amounts are cropped from the full result.
        """
        if self.padding == "valid":
            return (0, 0), (0, 0)
        image = self.in_shape if self.kind == "conv" else self.out_shape
        totals = [
            max((math.ceil(n / self.stride) - 1) * self.stride + k - n, 0) for n, k in zip(image[1:], self.kernel, strict=True)
        ]
        (top, bottom), (left, right) = ((total // 2, total - total // 2) for total in totals)
        return (top, bottom), (left, right)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The layer's weight and bias; nothing for a reshape."""
        if self.kind == "reshape":
            return ()
        fan_in, fan_out = self.in_shape[0], self.out_shape[0]
        channels = (fan_in, fan_out) if self.kind == "conv_transpose" else (fan_out, fan_in)
        weight = channels if self.kind == "dense" else channels + self.kernel
        limit = math.sqrt(6.0 / ((fan_in + fan_out) * math.prod(self.kernel)))
        return (
            Parameter(f"{self.name}.weight", weight, "glorot_uniform", limit),
            Parameter(f"{self.name}.bias", (fan_out,), "zeros"),
        )


@dataclass(frozen=True)
class ModelSpec:
    """The sizes from which the whole network follows.

    image_shape: (C, H, W); H and W divisible by 4.
    base_depth: the number b of channels of the outer convolutions; the inner ones have 2b.
    latent_size: the number S of latents, and so of indices, an image.
    num_codes: the number K of rows of the codebook.
    code_size: the number D of elements of a codebook row and of a latent.

    Raises ValueError that names the field, what it was and what it must be.
    """

    image_shape: tuple[int, int, int] = (1, 28, 28)
    base_depth: int = 32
    latent_size: int = 1
    num_codes: int = 64
    code_size: int = 16

    def __post_init__(self) -> None:
        shape = tuple(self.image_shape)
        if len(shape) != 3:
            raise ValueError(f"image_shape is {self.image_shape!r}; it must be (channels, height, width)")
        object.__setattr__(self, "image_shape", shape)
        sizes = {f"image_shape[{i}]": n for i, n in enumerate(shape)} | {
            name: getattr(self, name) for name in ("base_depth", "latent_size", "num_codes", "code_size")
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= SIZE_LIMIT:
                raise ValueError(f"{name} is {size!r}; it must be an integer from 1 to {SIZE_LIMIT}")
        if shape[1] % 4 or shape[2] % 4:
            raise ValueError(f"image_shape is {shape}; height and width must be divisible by 4")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelSpec:
        """The inverse of ``to_dict``. Raises ValueError for a missing or an unknown field."""
        known = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(known - set(fields)):
            raise ValueError(f"the spec lacks {', '.join(missing)}")
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"the spec has unknown fields: {', '.join(unknown)}")
        shape = fields["image_shape"]
        if not isinstance(shape, list | tuple):
            raise ValueError(f"image_shape is {shape!r}; it must be (channels, height, width)")
        return cls(**{**fields, "image_shape": tuple(shape)})

    @classmethod
    def of_parameters(cls, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
        """The spec whose parameters have these shapes. Raises ValueError where none has."""
        try:
            depth, channels = shapes["encoder.conv1.weight"][:2]
            units, _, height, width = shapes["encoder.conv5.weight"]
            num_codes, code_size = shapes[CODEBOOK]
        except (KeyError, ValueError) as error:
            raise ValueError(f"the parameters are not those of a VQ-VAE of this kind: {error}") from None
        spec = cls((channels, 4 * height, 4 * width), depth, units // 4, num_codes, code_size)
        for parameter in spec.parameters:
            found = shapes.get(parameter.name)
            if found is None or tuple(found) != parameter.shape:
                raise ValueError(f"{parameter.name}: shape is {found}, expected {parameter.shape}")
        if unknown := sorted(set(shapes) - {parameter.name for parameter in spec.parameters}):
            raise ValueError(f"unknown parameters: {', '.join(unknown[:4])}")
        return spec

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data for JSON and checkpoints."""
        return {**dataclasses.asdict(self), "image_shape": list(self.image_shape)}

    @property
    def encoder(self) -> tuple[Layer, ...]:
        """The rows that map images (C, H, W) to latents (S, D)."""
        channels, height, width = self.image_shape
        b, s, d = self.base_depth, self.latent_size, self.code_size
        h2, w2, h4, w4 = height // 2, width // 2, height // 4, width // 4
        conv = Stack("encoder", "conv", (channels, height, width))
        conv.add("conv1", (b, height, width), (5, 5))
        conv.add("conv2", (b, h2, w2), (5, 5), stride=2)
        conv.add("conv3", (2 * b, h2, w2), (5, 5))
        conv.add("conv4", (2 * b, h4, w4), (5, 5), stride=2)
        conv.add("conv5", (4 * s, 1, 1), (h4, w4), padding="valid")
        conv.reshape("flatten", (4 * s,))
        conv.add("dense", (s * d,), kind="dense", activation="linear")
        conv.reshape("latents", (s, d))
        return tuple(conv.layers)

    @property
    def decoder(self) -> tuple[Layer, ...]:
        """The rows that map quantized (S, D) to logits (C, H, W)."""
        channels, height, width = self.image_shape
        b, s, d = self.base_depth, self.latent_size, self.code_size
        h2, w2, h4, w4 = height // 2, width // 2, height // 4, width // 4
        deconv = Stack("decoder", "conv_transpose", (s, d))
        deconv.reshape("pixel", (s * d, 1, 1))
        deconv.add("deconv1", (2 * b, h4, w4), (h4, w4), padding="valid")
        deconv.add("deconv2", (2 * b, h4, w4), (5, 5))
        deconv.add("deconv3", (2 * b, h2, w2), (5, 5), stride=2)
        deconv.add("deconv4", (b, h2, w2), (5, 5))
        deconv.add("deconv5", (b, height, width), (5, 5), stride=2)
        deconv.add("deconv6", (b, height, width), (5, 5))
        deconv.add("conv1", (channels, height, width), (5, 5), kind="conv", activation="linear")
        return tuple(deconv.layers)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The whole table: encoder, then decoder."""
        return self.encoder + self.decoder

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every array of the model, in the order of the files: the layers', then the quantizer's three.

        The codebook starts Glorot uniform, ``ema_count`` at 0 and ``ema_means`` as a copy of the codebook.
        """
        k, d = self.num_codes, self.code_size
        of_layers = (parameter for layer in self.layers for parameter in layer.parameters)
        return (
            *of_layers,
            Parameter(CODEBOOK, (k, d), "glorot_uniform", math.sqrt(6.0 / (k + d))),
            Parameter(EMA_COUNT, (k,), "zeros"),
            Parameter(EMA_MEANS, (k, d), "codebook"),
        )


CODEBOOK = "quantizer.codebook"
EMA_COUNT = "quantizer.ema_count"
EMA_MEANS = "quantizer.ema_means"


class Stack:
    """Writes rows one after another: each starts from the shape at which the last one ended."""

    def __init__(self, prefix: str, kind: Kind, in_shape: tuple[int, ...]) -> None:
        self.prefix, self.kind, self.shape = prefix, kind, in_shape
        self.layers: list[Layer] = []

    def add(
        self,
        name: str,
        out_shape: tuple[int, ...],
        kernel: tuple[int, int] = (1, 1),
        *,
        kind: Kind | None = None,
        stride: int = 1,
        padding: Padding = "same",
        activation: Activation = "elu",
    ) -> None:
        kind = kind or self.kind
        name = f"{self.prefix}.{name}"
        self.layers.append(Layer(name, kind, self.shape, out_shape, kernel, stride, padding, activation))
        self.shape = out_shape

    def reshape(self, name: str, out_shape: tuple[int, ...]) -> None:
        self.layers.append(Layer(f"{self.prefix}.{name}", "reshape", self.shape, out_shape))
        self.shape = out_shape
