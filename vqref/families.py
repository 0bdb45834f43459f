"""The networks that the toolkit knows by name: sizes in, rows out.

A family is a function. Files hold the rows that it wrote, so that they outlive it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from vqref.likelihoods import output_channels
from vqref.spec import CODEBOOK, Layer, ModelSpec, Pads, Shape, require_sizes

LARGEST_POST = 32
"""Height and width up to which ``choose`` takes the post's network."""


def post(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    base_depth: int = 32,
    latent_size: int = 1,
    num_codes: int = 64,
    code_size: int = 16,
    likelihood: str = "bernoulli",
    variance: float = 1.0,
) -> ModelSpec:
    """The network of Keydana, "Discrete Representation Learning with VQ-VAE and TensorFlow
    Probability" (2019): whole images to a few latents.

    image_shape: (C, H, W), H and W divisible by 4.
    base_depth: channels b of the outer convolutions; the inner ones have 2b.
    latent_size, num_codes, code_size: S latents per image, K codes of D elements.
    likelihood, variance: as in ``ModelSpec``.

    Raises ValueError that names the size and what it must be.
    """
    _, height, width = _image(image_shape, 4)
    sizes = {"base_depth": base_depth, "latent_size": latent_size, "code_size": code_size}
    _require_sizes(sizes)
    b, s, d, quarter = base_depth, latent_size, code_size, (height // 4, width // 4)
    encoder = Stack("encoder", image_shape)
    encoder.conv("conv1", b, 5, activation="elu")
    encoder.conv("conv2", b, 5, stride=2, activation="elu")
    encoder.conv("conv3", 2 * b, 5, activation="elu")
    encoder.conv("conv4", 2 * b, 5, stride=2, activation="elu")
    encoder.conv("conv5", 4 * s, quarter, same=False, activation="elu")
    encoder.row("flatten", "reshape", (4 * s,))
    encoder.row("dense", "dense", (s * d,))
    encoder.row("latents", "reshape", (s, d))

    decoder = Stack("decoder", (s, d))
    decoder.row("pixel", "reshape", (s * d, 1, 1))
    decoder.conv_transpose("deconv1", 2 * b, quarter, same=False, activation="elu")
    decoder.conv_transpose("deconv2", 2 * b, 5, activation="elu")
    decoder.conv_transpose("deconv3", 2 * b, 5, stride=2, activation="elu")
    decoder.conv_transpose("deconv4", b, 5, activation="elu")
    decoder.conv_transpose("deconv5", b, 5, stride=2, activation="elu")
    decoder.conv_transpose("deconv6", b, 5, activation="elu")
    decoder.conv("conv1", output_channels(likelihood, image_shape[0]), 5)
    shapes = image_shape, (s,), num_codes, d
    return ModelSpec("post", *shapes, likelihood, encoder.rows, decoder.rows, variance)


def residual(
    image_shape: tuple[int, int, int] = (3, 32, 32),
    hidden: int = 128,
    blocks: int = 2,
    block_hidden: int = 32,
    downsample: int = 4,
    depth: int = 1,
    num_codes: int = 512,
    code_size: int = 64,
    likelihood: str = "gaussian",
    variance: float = 1.0,
) -> ModelSpec:
    """The network of van den Oord et al. (2017), sizes and details as in Sonnet's CIFAR-10 example
    (google-deepmind/sonnet, examples/vqvae_example.ipynb): a grid of latents.

    image_shape: (C, H, W), H and W divisible by ``downsample``.
    hidden, blocks, block_hidden: channels, residual blocks on each side, channels within a block.
    downsample: pixels of an image to a side of a latent, a power of two.
    depth: latents g at each place of the grid; latent_shape is (h, w), or (h, w, g) if g > 1.
    num_codes, code_size, likelihood, variance: as in ``ModelSpec``.

    The networks see images in [-1/2, 1/2].

    Raises ValueError that names the size and what it must be.
    """
    sizes = {"hidden": hidden, "block_hidden": block_hidden, "depth": depth, "code_size": code_size}
    _require_sizes({**sizes, "blocks + 1": blocks + 1, "downsample": downsample})
    halvings = downsample.bit_length() - 1
    if downsample != 2**halvings or not halvings:
        raise ValueError(f"downsample is {downsample}; it must be a power of two above 1")
    if hidden % 2:
        raise ValueError(f"hidden is {hidden}; it must be even")
    _, height, width = _image(image_shape, downsample)
    grid = (height // downsample, width // downsample)
    latents = (math.prod(grid) * depth, code_size)

    encoder = Stack("encoder", image_shape)
    encoder.row("centre", "affine", image_shape, shift=-0.5)
    for i in range(1, halvings + 1):
        narrow = i == 1 and halvings > 1
        encoder.conv(f"down{i}", hidden // 2 if narrow else hidden, 4, stride=2, activation="relu")
    encoder.conv("conv", hidden, 3, activation="relu")
    _blocks(encoder, blocks, block_hidden)
    encoder.conv("to_latents", depth * code_size, 1)
    encoder.row("latents", "to_vectors", latents)

    decoder = Stack("decoder", latents)
    decoder.row("grid", "to_grid", (depth * code_size, *grid))
    decoder.conv("conv", hidden, 3)
    _blocks(decoder, blocks, block_hidden)
    for i in range(1, halvings):
        decoder.conv_transpose(f"up{i}", hidden // 2, 4, stride=2, activation="relu")
    decoder.conv_transpose(
        f"up{halvings}", output_channels(likelihood, image_shape[0]), 4, stride=2
    )
    latent_shape = grid if depth == 1 else (*grid, depth)
    shapes = image_shape, latent_shape, num_codes, code_size
    rows = encoder.rows, decoder.rows
    return ModelSpec("residual", *shapes, likelihood, *rows, variance, (-0.5, 0.5), "fan_in")


def _blocks(stack: Stack, blocks: int, block_hidden: int) -> None:
    """h + conv1(relu(conv3(relu(h)))), ``blocks`` times; the last sum has a relu of its own."""
    for i in range(1, blocks + 1):
        h = stack.rows[-1]
        if h.activation != "relu":
            stack.row(f"block{i}.relu", "activation", h.out_shape, activation="relu")
        stack.conv(f"block{i}.conv3", block_hidden, 3, activation="relu")
        inner = stack.conv(f"block{i}.conv1", h.out_shape[0], 1)
        last = "relu" if i == blocks else "linear"
        sources = (h.name, inner.name)
        stack.row(f"block{i}.sum", "add", h.out_shape, inputs=sources, activation=last)
    if not blocks:
        stack.row("relu", "activation", stack.shape, activation="relu")


FAMILIES: Mapping[str, Callable[..., ModelSpec]] = MappingProxyType(
    {"post": post, "residual": residual}
)
"""By name."""


def choose(image_shape: tuple[int, int, int]) -> str:
    """The family for images that nobody chose one for: the post's for small grey ones."""
    channels, height, width = image_shape
    return "post" if channels == 1 and max(height, width) <= LARGEST_POST else "residual"


def sizes(family: str) -> dict[str, int]:
    """The sizes of a family that a user may set, with their defaults; the image's are not among
    them."""
    parameters = inspect.signature(FAMILIES[family]).parameters
    return {n: p.default for n, p in parameters.items() if isinstance(p.default, int)}


def of_parameters(shapes: Mapping[str, Shape]) -> ModelSpec:
    """The spec of family post whose parameters have these shapes.

    Raises ValueError if there is none: other networks take images of any size, so that the shapes
    of their parameters do not say everything.
    """
    try:
        depth, channels = shapes["encoder.conv1.weight"][:2]
        units, _, height, width = shapes["encoder.conv5.weight"]
        num_codes, code_size = shapes[CODEBOOK]
    except (KeyError, ValueError) as error:
        raise ValueError(f"the parameters are not those of family post: no {error}") from None
    spec = post((channels, 4 * height, 4 * width), depth, units // 4, num_codes, code_size)
    for parameter in spec.parameters:
        found = shapes.get(parameter.name)
        if found is None or tuple(found) != parameter.shape:
            raise ValueError(f"{parameter.name}: shape is {found}, expected {parameter.shape}")
    if unknown := sorted(set(shapes) - {parameter.name for parameter in spec.parameters}):
        raise ValueError(f"unknown parameters: {', '.join(unknown[:4])}")
    return spec


class Stack:
    """Writes the rows of one network: each starts from the shape at which the last one ended."""

    def __init__(self, prefix: str, in_shape: Shape) -> None:
        self.prefix, self.shape = prefix, in_shape
        self.rows: tuple[Layer, ...] = ()

    def row(self, name: str, kind: str, out_shape: Shape, **fields: Any) -> Layer:
        """Adds a row of any kind."""
        row = Layer(f"{self.prefix}.{name}", kind, self.shape, out_shape, **fields)
        self.rows, self.shape = (*self.rows, row), out_shape
        return row

    def conv(
        self,
        name: str,
        channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        same: bool = True,
        activation: str = "linear",
    ) -> Layer:
        """Adds a convolution; ``same`` pads by TensorFlow's rule, to ceil(n / stride) pixels."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = same_pads(self.shape, size, stride) if same else ((0, 0), (0, 0))
        spans = [n + sum(p) - k for n, p, k in zip(self.shape[1:], pads, size, strict=True)]
        out = (channels, *(span // stride + 1 for span in spans))
        how = {"kernel": size, "stride": stride, "pads": pads, "activation": activation}
        return self.row(name, "conv", out, **how)

    def conv_transpose(
        self,
        name: str,
        channels: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        same: bool = True,
        activation: str = "linear",
    ) -> Layer:
        """Adds the gradient of the convolution that would map its result to its input."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        if same:
            out = (channels, *(n * stride for n in self.shape[1:]))
            pads = same_pads(out, size, stride)
        else:
            pads = ((0, 0), (0, 0))
            spans = zip(self.shape[1:], size, strict=True)
            out = (channels, *(stride * (n - 1) + k for n, k in spans))
        how = {"kernel": size, "stride": stride, "pads": pads, "activation": activation}
        return self.row(name, "conv_transpose", out, **how)


def same_pads(image: Shape, kernel: tuple[int, int], stride: int) -> Pads:
    """TensorFlow's "same": max((ceil(n / s) - 1) * s + k - n, 0) pixels in all, the smaller half
    first."""
    pads = []
    for n, k in zip(image[1:], kernel, strict=True):
        total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads[0], pads[1]


def _image(image_shape: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
    """The shape, once it is known that the networks halve it without a rest."""
    if len(tuple(image_shape)) != 3:
        raise ValueError(f"image_shape is {image_shape!r}; it must be (channels, height, width)")
    _require_sizes({f"image_shape[{i}]": n for i, n in enumerate(image_shape)})
    channels, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(
            f"image_shape is {tuple(image_shape)}; height and width must be divisible by {factor}"
        )
    return channels, height, width


def _require_sizes(named: Mapping[str, Any]) -> None:
    for name, size in named.items():
        require_sizes(name, (size,))
