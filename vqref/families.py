"""The networks that the toolkit knows by name.

A family is a function from sizes to rows. Files hold the rows, so they stay valid if it changes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vqref.likelihoods import output_channels
from vqref.spec import CODEBOOK, Layer, ModelSpec, Pads, Shape, require_sizes

LARGEST_POST = 32
"""The largest height and width for which ``choose`` takes the post's network."""


def post(
    image_shape: tuple[int, int, int] = (1, 28, 28),
    base_depth: int = 32,
    latent_size: int = 1,
    num_codes: int = 64,
    code_size: int = 16,
    likelihood: str = "bernoulli",
    variance: float = 1.0,
) -> ModelSpec:
    """Returns the spec of Keydana's network (2019), which maps a whole image to a few latents.

    It is the one of "Discrete Representation Learning with VQ-VAE and TensorFlow Probability".

    image_shape: (C, H, W). H and W must be divisible by 4.
    base_depth: the number b of channels of the outer convolutions. The inner ones have 2b.
    latent_size, num_codes, code_size: S latents per image, K codes of D elements.
    likelihood, variance: as in ``ModelSpec``.

    Raises ValueError that names the wrong size and says what it must be.
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
    levels: tuple[int, ...] = (),
    normalized: bool = False,
    likelihood: str = "gaussian",
    variance: float = 1.0,
) -> ModelSpec:
    """Returns the spec of the network of van den Oord et al. (2017), with a grid of latents.

    Sizes and details are those of Sonnet's CIFAR-10 example (google-deepmind/sonnet,
    examples/vqvae_example.ipynb).

    image_shape: (C, H, W). H and W must be divisible by ``downsample``.
    hidden: channels. blocks: residual blocks on each side. block_hidden: channels inside a block.
    downsample: how many pixels high and wide a latent is; a power of two.
    depth: the number g of latents at each grid position. latent_shape is (h, w), or (h, w, g) if
        g > 1.
    num_codes, code_size, normalized, likelihood, variance: as in ``ModelSpec``.
    levels: the levels of a grid codebook, one per element of a code. () means a learned codebook.

    The networks see images in [-1/2, 1/2].

    Raises ValueError that names the wrong size and says what it must be.
    """
    sizes = {"hidden": hidden, "block_hidden": block_hidden, "depth": depth, "code_size": code_size}
    _require_sizes({**sizes, "blocks + 1": blocks + 1, "downsample": downsample})
    _require_tuples({"levels": levels})
    if levels and len(levels) != code_size:
        raise ValueError(f"code_size is {code_size}; levels are {levels}, one for each element")
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
    if levels:
        encoder.row("bounded", "bounded", latents, levels=levels)
    if normalized:
        encoder.row("unit", "unit_norm", latents)

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
    rest: Fields = {"value_range": (-0.5, 0.5), "initial": "fan_in", "normalized": normalized}
    return ModelSpec("residual", *shapes, likelihood, *rows, variance, **rest)


def vqgan(
    image_shape: tuple[int, int, int] = (3, 256, 256),
    channels: int = 128,
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
    blocks: int = 2,
    attention: tuple[int, ...] = (16,),
    middle_attention: bool = True,
    groups: int = 32,
    latent_channels: int = 256,
    num_codes: int = 1024,
    code_size: int = 256,
    normalized: bool = False,
    likelihood: str = "gaussian",
    variance: float = 1.0,
) -> ModelSpec:
    """Returns the spec of the VQGAN of Esser, Rombach and Ommer (2021), with a grid of latents.

    It is the network of "Taming Transformers for High-Resolution Image Synthesis", as implemented
    in taming-transformers, diffusers and LlamaGen.

    image_shape: (C, H, W). H and W must be divisible by 2^(number of levels - 1).
    channels, multipliers: level i has channels * multipliers[i - 1] channels. Level 1 is the
        finest; each next level has half the height and width.
    blocks: residual blocks per level of the encoder. A level of the decoder has one more.
    attention: attention follows each block of a level whose longer side is one of these.
    middle_attention: whether encoder and decoder have attention between their two middle blocks.
    groups: the number of channel groups in every norm.
    latent_channels: channels between the 3x3 and the 1x1 convolutions next to the latents.
    num_codes, code_size, normalized, likelihood, variance: as in ``ModelSpec``.

    The networks see images in [-1, 1].

    Raises ValueError that names the wrong size and says what it must be.
    """
    sizes = {"channels": channels, "groups": groups, "latent_channels": latent_channels}
    _require_sizes({**sizes, "blocks": blocks, "code_size": code_size})
    _require_tuples({"multipliers": multipliers, "attention": attention})
    widths = [channels * each for each in multipliers]
    if not 1 <= len(widths) <= MOST_LEVELS:
        raise ValueError(f"multipliers are {multipliers}; there must be 1 to {MOST_LEVELS}")
    if wrong := [width for width in widths if width % groups]:
        raise ValueError(f"groups is {groups}; it must divide the {wrong[0]} channels of a level")
    factor = 2 ** (len(widths) - 1)
    _, height, width = _image(image_shape, factor)
    grid = (height // factor, width // factor)
    latents = (math.prod(grid), code_size)

    how = widths, groups, attention, middle_attention
    encoder = _Levels("encoder", image_shape, *how)
    encoder.row("scale", "affine", image_shape, scale=2.0, shift=-1.0)
    encoder.conv("conv_in", channels, 3)
    for number in range(1, len(widths) + 1):
        encoder.level(number, blocks)
        if number < len(widths):
            encoder.down(f"level{number}")
    encoder.middle()
    encoder.norm("norm_out")
    encoder.conv("conv_out", latent_channels, 3)
    encoder.conv("quant_conv", code_size, 1)
    encoder.row("latents", "to_vectors", latents)
    if normalized:
        encoder.row("unit", "unit_norm", latents)

    decoder = _Levels("decoder", latents, *how)
    decoder.row("grid", "to_grid", (code_size, *grid))
    decoder.conv("post_quant_conv", latent_channels, 1)
    decoder.conv("conv_in", widths[-1], 3)
    decoder.middle()
    for number in range(len(widths), 0, -1):
        decoder.level(number, blocks + 1)
        if number > 1:
            decoder.up(f"level{number}")
    decoder.norm("norm_out")
    decoder.conv("conv_out", output_channels(likelihood, image_shape[0]), 3)
    shapes, rows = (image_shape, grid, num_codes, code_size), (encoder.rows, decoder.rows)
    rest: Fields = {"value_range": (-1.0, 1.0), "initial": "fan_in", "normalized": normalized}
    return ModelSpec("vqgan", *shapes, likelihood, *rows, variance, **rest)


MOST_LEVELS = 10
"""The most levels that a vqgan may have. They reduce 512 pixels to one."""


def _blocks(stack: Stack, blocks: int, block_hidden: int) -> None:
    """Adds ``blocks`` times h + conv1(relu(conv3(relu(h)))), with a relu after the last sum."""
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
    {"post": post, "residual": residual, "vqgan": vqgan}
)
"""The families by name."""


def choose(image_shape: tuple[int, int, int]) -> str:
    """Returns the default family for an image shape: "post" for small grey images."""
    channels, height, width = image_shape
    return "post" if channels == 1 and max(height, width) <= LARGEST_POST else "residual"


Size = int | tuple[int, ...]


def spelt(size: Size) -> int | str:
    """Returns a size as the command line writes it: (1, 2) is "1,2" and () is "none"."""
    return size if isinstance(size, int) else ",".join(map(str, size)) or "none"


OPTIONS = {"channels": "base_channels"}
"""Sizes with another name on the command line, where "channels" means those of pictures."""

NO_SIZES = ("image_shape", "likelihood", "variance")
"""Arguments of families that are not sizes which a run may choose."""


def sizes(family: str) -> dict[str, Size]:
    """Returns the sizes of a family that a user may set: {name of the option: default}."""
    parameters = inspect.signature(FAMILIES[family]).parameters
    return {OPTIONS.get(n, n): p.default for n, p in parameters.items() if n not in NO_SIZES}


def implied(asked: Mapping[str, Size]) -> dict[str, Size]:
    """Returns the sizes asked for, by option name, and the sizes that follow from them.

    A grid's levels determine the number of codes and the number of their elements.
    """
    levels = asked.get("levels")
    if not isinstance(levels, tuple) or not levels:
        return {**asked}
    return {"num_codes": math.prod(levels), "code_size": len(levels), **asked}


def make(
    family: str, image_shape: tuple[int, int, int], sizes: Mapping[str, Size], **fields: Any
) -> ModelSpec:
    """Returns the spec of a family; ``sizes`` go by option name.

    Raises the ValueError of the family.
    """
    arguments = {option: name for name, option in OPTIONS.items()}
    known = {arguments.get(name, name): size for name, size in sizes.items()}
    return FAMILIES[family](image_shape, **known, **fields)


def of_parameters(shapes: Mapping[str, Shape]) -> ModelSpec:
    """Returns the spec of family post whose parameters have these shapes.

    Raises ValueError if there is none. Other families take images of any size, so the shapes of
    their parameters do not determine the spec.
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


Fields = dict[str, Any]


class Stack:
    """Writes the rows of one network. Each row takes the output shape of the last one."""

    def __init__(self, prefix: str, in_shape: Shape) -> None:
        self.prefix, self.shape = prefix, in_shape
        self.rows: tuple[Layer, ...] = ()

    def row(
        self, name: str, kind: str, out_shape: Shape, *, of: Layer | None = None, **fields: Any
    ) -> Layer:
        """Adds a row of any kind. ``of`` is the row that it takes if not the one before."""
        if of is not None:
            self.shape, fields["inputs"] = of.out_shape, (of.name,)
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
        of: Layer | None = None,
    ) -> Layer:
        """Adds a convolution. ``same`` pads by TensorFlow's rule, to ceil(n / stride) pixels."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        shape = self.shape if of is None else of.out_shape
        pads = same_pads(shape, size, stride) if same else ((0, 0), (0, 0))
        spans = [n + sum(p) - k for n, p, k in zip(shape[1:], pads, size, strict=True)]
        out = (channels, *(span // stride + 1 for span in spans))
        how: Fields = {"kernel": size, "stride": stride, "pads": pads, "activation": activation}
        return self.row(name, "conv", out, of=of, **how)

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
        """Adds a transposed convolution: the gradient of the one that maps its result back."""
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        if same:
            out = (channels, *(n * stride for n in self.shape[1:]))
            pads = same_pads(out, size, stride)
        else:
            pads = ((0, 0), (0, 0))
            spans = zip(self.shape[1:], size, strict=True)
            out = (channels, *(stride * (n - 1) + k for n, k in spans))
        how: Fields = {"kernel": size, "stride": stride, "pads": pads, "activation": activation}
        return self.row(name, "conv_transpose", out, **how)


def same_pads(image: Shape, kernel: tuple[int, int], stride: int) -> Pads:
    """Returns the pads of TensorFlow's "same" rule for an image, a kernel and a stride.

    They are max((ceil(n / s) - 1) * s + k - n, 0) pixels in all, with the smaller half first.
    """
    pads = []
    for n, k in zip(image[1:], kernel, strict=True):
        total = max((math.ceil(n / stride) - 1) * stride + k - n, 0)
        pads.append((total // 2, total - total // 2))
    return pads[0], pads[1]


def _image(image_shape: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
    """Returns the shape if height and width are divisible by ``factor``. Raises ValueError."""
    if len(tuple(image_shape)) != 3:
        raise ValueError(f"image_shape is {image_shape!r}; it must be (channels, height, width)")
    _require_sizes({f"image_shape[{i}]": n for i, n in enumerate(image_shape)})
    channels, height, width = image_shape
    if height % factor or width % factor:
        raise ValueError(
            f"image_shape is {tuple(image_shape)}; height and width must be divisible by {factor}"
        )
    return channels, height, width


def _require_tuples(named: Mapping[str, Any]) -> None:
    for name, sizes in named.items():
        if not isinstance(sizes, tuple):
            raise ValueError(f"{name} is {ascii(sizes)[:80]}, expected a tuple of integers")
        for size in sizes:
            require_sizes(name, (size,))


def _require_sizes(named: Mapping[str, Any]) -> None:
    for name, size in named.items():
        require_sizes(name, (size,))


class _Levels(Stack):
    """Writes the rows of one side of a vqgan. widths: channels per level, the finest first."""

    def __init__(
        self,
        prefix: str,
        in_shape: Shape,
        widths: Sequence[int],
        groups: int,
        attention: Sequence[int],
        middle_attention: bool,
    ) -> None:
        super().__init__(prefix, in_shape)
        self.widths, self.groups = widths, groups
        self.attention, self.middle_attention = attention, middle_attention

    def level(self, number: int, blocks: int) -> None:
        attends = max(self.shape[1:]) in self.attention
        for j in range(1, blocks + 1):
            self.block(f"level{number}.block{j}", self.widths[number - 1])
            if attends:
                self.attend(f"level{number}.attention{j}")

    def middle(self) -> None:
        self.block("middle.block1", self.widths[-1])
        if self.middle_attention:
            self.attend("middle.attention")
        self.block("middle.block2", self.widths[-1])

    def down(self, level: str) -> None:
        """Halves height and width. Pads one row of zeros below and one column on the right."""
        half = (self.shape[0], *(side // 2 for side in self.shape[1:]))
        pads = ((0, 1), (0, 1))
        self.row(f"{level}.down", "conv", half, kernel=(3, 3), stride=2, pads=pads)

    def up(self, level: str) -> None:
        double = (self.shape[0], *(2 * side for side in self.shape[1:]))
        self.row(f"{level}.upsample", "upsample", double)
        self.conv(f"{level}.up", self.shape[0], 3)

    def norm(self, name: str, activation: str = "silu") -> Layer:
        return self.row(name, "group_norm", self.shape, groups=self.groups, activation=activation)

    def block(self, name: str, channels: int) -> None:
        """Adds h + conv2(silu(norm2(conv1(silu(norm1(h)))))).

        If the number of channels changes, the first h goes through a 1x1 convolution.
        """
        h = self.rows[-1]
        self.norm(f"{name}.norm1")
        self.conv(f"{name}.conv1", channels, 3)
        self.norm(f"{name}.norm2")
        inner = self.conv(f"{name}.conv2", channels, 3)
        if h.out_shape[0] != channels:
            h = self.conv(f"{name}.shortcut", channels, 1, of=h)
        self.row(f"{name}.sum", "add", self.shape, inputs=(h.name, inner.name))

    def attend(self, name: str) -> None:
        """Adds h + out(attention(query, key, value of norm(h))), all positions, one head."""
        h = self.rows[-1]
        channels, height, width = h.out_shape
        vectors = (height * width, channels)
        self.norm(f"{name}.norm", "linear")
        x = self.row(f"{name}.vectors", "to_vectors", vectors)
        seen = [self.row(f"{name}.{n}", "dense", vectors, of=x) for n in ("query", "key", "value")]
        self.row(f"{name}.attention", "attention", vectors, inputs=tuple(r.name for r in seen))
        self.row(f"{name}.out", "dense", vectors)
        found = self.row(f"{name}.grid", "to_grid", h.out_shape)
        self.row(f"{name}.sum", "add", h.out_shape, inputs=(h.name, found.name))
