"""The one specification of a model, as data.

A network is a table of rows. ``ModelSpec`` holds the rows of the encoder and of the decoder. They
determine the name, shape and initial values of every parameter. The NumPy oracle, the PyTorch
trainer and the ONNX exporter all interpret the same rows; no other file repeats a size or a name.
``vqref.families`` writes the rows of known networks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vqref.likelihoods import output_channels

SIZE_LIMIT = 2**24
"""The largest size that a spec may state. It keeps a damaged file from asking for all memory."""

ROW_LIMIT = 4096
"""The most rows that a network may have."""

NAME = re.compile(r"[A-Za-z]\w{0,99}(\.\w{1,99}){0,9}", re.ASCII)
"""Names of rows and families: words separated by dots, safe in files and messages."""

CODEBOOK = "quantizer.codebook"
EMA_COUNT = "quantizer.ema_count"
EMA_MEANS = "quantizer.ema_means"

Shape = tuple[int, ...]
Pads = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Parameter:
    """One array of the model: its name in every file format, its shape and its initial values.

    initial: "uniform" in ±``scale``; "truncated_normal" with standard deviation ``scale``, cut off
        at two deviations; "zeros"; "ones"; "unit_rows" of length 1 in random directions; "grid",
        the rows of ``vqref.quantizer.grid``; or "codebook", a copy of the codebook.
    """

    name: str
    shape: Shape
    initial: str
    scale: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One row of a network. Shapes are per image, without the batch axis.

    name, kind: a unique name, and one of ``KINDS``.
    in_shape, out_shape: the shapes of the first input and of the result.
    inputs: names of earlier rows of the same network. () means the previous row or, for the first
        row, the network's input.
    activation: one of ``ACTIVATIONS``, applied to the result.
    kernel, stride, pads: for conv and conv_transpose, in pixels. pads is ((top, bottom), (left,
        right)). A conv adds that many zeros around its input; a conv_transpose crops that many
        pixels from its output.
    scale, shift: for affine, which computes scale * x + shift.
    num_codes: for embedding, K.
    heads, causal: for attention. If causal, a position sees only itself and earlier positions.
    groups: for group_norm, the number of groups. Adjacent channels of a group share mean and
        variance.
    levels: for bounded, the number of values, 3 or more, that each element is rounded to later.

    Raises ValueError that names the row and says what is wrong with it.
    """

    name: str
    kind: str
    in_shape: Shape
    out_shape: Shape
    inputs: tuple[str, ...] = ()
    activation: str = "linear"
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pads: Pads = ((0, 0), (0, 0))
    scale: float = 1.0
    shift: float = 0.0
    num_codes: int = 1
    heads: int = 1
    causal: bool = False
    groups: int = 1
    levels: Shape = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"a row is named {ascii(self.name)[:80]}, expected words and dots")
        given = {n: value for n, value in vars(self).items() if value is not _DEFAULTS.get(n, self)}
        _require_types(given, f"{self.name}: ")
        if self.kind not in KINDS:
            raise ValueError(
                f"{self.name}: kind is {self.kind[:40]!a}, expected {', '.join(KINDS)}"
            )
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"{self.name}: activation is {self.activation[:40]!a}, expected {known}"
            )
        for what, shape in (("in_shape", self.in_shape), ("out_shape", self.out_shape)):
            require_sizes(f"{self.name}: {what}", shape)
        expected = KINDS[self.kind].out_shape(self)
        if expected != self.out_shape:
            raise ValueError(
                f"{self.name}: out_shape is {self.out_shape}, a {self.kind} of these sizes gives "
                f"{expected or 'nothing'}"
            )

    @property
    def parameters(self) -> tuple[tuple[str, Shape], ...]:
        """Names and shapes of the row's weight and bias, or () if its kind has none."""
        shapes = zip(("weight", "bias"), KINDS[self.kind].parameters(self), strict=False)
        return tuple((f"{self.name}.{name}", shape) for name, shape in shapes)

    @property
    def fan_in(self) -> int:
        """The largest number of inputs that an output adds up."""
        return self._width(self.in_shape) * math.prod(self.kernel)

    @property
    def fan_out(self) -> int:
        """The largest number of outputs that an input reaches."""
        return self._width(self.out_shape) * math.prod(self.kernel)

    def _width(self, shape: Shape) -> int:
        """The channels of (C, H, W), or the elements F of a vector (F,) or (S, F)."""
        return shape[0] if len(shape) == 3 else shape[-1]

    @property
    def products(self) -> int:
        """The number of multiplications per image; 0 if the kind has no sums of products."""
        return KINDS[self.kind].products(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the row as plain data, without the fields that have their default values."""
        fields = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        return {
            name: _listed(value) for name, (value, default) in fields.items() if value != default
        }

    @classmethod
    def from_dict(cls, data: Any) -> Layer:
        """Inverts ``to_dict``. Raises ValueError for anything else."""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise ValueError(f"a row is {ascii(data)[:80]}, expected a table with a name")
        name = ascii(data["name"])[1:-1]
        if unknown := sorted(
            ascii(key).strip("'") for key in data if key not in cls.__dataclass_fields__
        ):
            raise ValueError(f"{name}: unknown fields: {', '.join(unknown)[:80]}")
        if missing := [n for n in ("kind", "in_shape", "out_shape") if n not in data]:
            raise ValueError(f"{name}: lacks {', '.join(missing)}")
        return cls(**{name: _tupled(value) for name, value in data.items()})


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Layer)}


@dataclass(frozen=True)
class Kind:
    """The rules of one kind of row.

    out_shape: the shape of the result, () if none fits.
    parameters: the shapes of weight and bias, () if there are none.
    products: how many products the row adds up.
    inputs: how many inputs the row takes.
    """

    out_shape: Callable[[Layer], Shape]
    parameters: Callable[[Layer], tuple[Shape, ...]] = lambda row: ()
    products: Callable[[Layer], int] = lambda row: 0
    inputs: int = 1


def _conv(row: Layer) -> Shape:
    if len(row.in_shape) != 3:
        return ()
    spans = [n + sum(p) - k for n, p, k in zip(row.in_shape[1:], row.pads, row.kernel, strict=True)]
    return (row.out_shape[0], *(span // row.stride + 1 for span in spans if span >= 0))


def _conv_transpose(row: Layer) -> Shape:
    if len(row.in_shape) != 3 or row.stride > 2:
        return ()
    pairs = zip(row.in_shape[1:], row.pads, row.kernel, strict=True)
    return (row.out_shape[0], *(row.stride * (n - 1) + k - sum(p) for n, p, k in pairs))


def _reshape(row: Layer) -> Shape:
    return row.out_shape if math.prod(row.in_shape) == math.prod(row.out_shape) else ()


def _to_vectors(row: Layer) -> Shape:
    fits = len(row.in_shape) == 3 and len(row.out_shape) == 2
    return _reshape(row) if fits and row.in_shape[0] % row.out_shape[1] == 0 else ()


def _to_grid(row: Layer) -> Shape:
    fits = len(row.in_shape) == 2 and len(row.out_shape) == 3
    return _reshape(row) if fits and row.out_shape[0] % row.in_shape[1] == 0 else ()


def _dense(row: Layer) -> Shape:
    return (*row.in_shape[:-1], row.out_shape[-1]) if len(row.in_shape) in (1, 2) else ()


def _embedding(row: Layer) -> Shape:
    fits = len(row.out_shape) == 2 and row.in_shape == row.out_shape[:1] and row.in_shape[0] > 1
    return row.out_shape if fits else ()


def _layer_norm(row: Layer) -> Shape:
    return row.in_shape if len(row.in_shape) == 2 else ()


def _group_norm(row: Layer) -> Shape:
    return row.in_shape if len(row.in_shape) == 3 and row.in_shape[0] % row.groups == 0 else ()


def _unit_norm(row: Layer) -> Shape:
    return row.in_shape if len(row.in_shape) == 2 else ()


def _bounded(row: Layer) -> Shape:
    fits = len(row.in_shape) == 2 and len(row.levels) == row.in_shape[1] and min(row.levels) > 2
    return row.in_shape if fits else ()


def _upsample(row: Layer) -> Shape:
    if not len(row.in_shape) == len(row.out_shape) == 3:
        return ()
    factor = row.out_shape[1] // row.in_shape[1]
    return (row.in_shape[0], *(factor * side for side in row.in_shape[1:])) if factor else ()


def _attention(row: Layer) -> Shape:
    fits = len(row.in_shape) == 2 and row.heads > 0 and row.in_shape[1] % row.heads == 0
    return row.in_shape if fits else ()


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "affine": Kind(lambda row: row.in_shape),
        "conv": Kind(
            _conv,
            lambda row: ((row.out_shape[0], row.in_shape[0], *row.kernel), row.out_shape[:1]),
            lambda row: row.fan_in * math.prod(row.out_shape),
        ),
        "conv_transpose": Kind(
            _conv_transpose,
            lambda row: ((row.in_shape[0], row.out_shape[0], *row.kernel), row.out_shape[:1]),
            lambda row: row.fan_out * math.prod(row.in_shape),
        ),
        "dense": Kind(
            _dense,
            lambda row: ((row.out_shape[-1], row.in_shape[-1]), row.out_shape[-1:]),
            lambda row: row.fan_in * math.prod(row.out_shape),
        ),
        "reshape": Kind(_reshape),
        "to_vectors": Kind(_to_vectors),
        "to_grid": Kind(_to_grid),
        "add": Kind(lambda row: row.in_shape, inputs=2),
        "activation": Kind(lambda row: row.in_shape),
        "embedding": Kind(
            _embedding, lambda row: ((row.num_codes, row.out_shape[1]), row.out_shape)
        ),
        "layer_norm": Kind(_layer_norm, lambda row: (row.in_shape[1:], row.in_shape[1:])),
        "group_norm": Kind(_group_norm, lambda row: (row.in_shape[:1], row.in_shape[:1])),
        "unit_norm": Kind(_unit_norm),
        "bounded": Kind(_bounded),
        "upsample": Kind(_upsample),
        "attention": Kind(
            _attention, products=lambda row: 2 * row.in_shape[0] * math.prod(row.in_shape), inputs=3
        ),
    }
)
"""The kinds of rows by name:

affine          scale * x + shift, with constant scale and shift
conv            convolution; weight (C', C, kh, kw) as in ``torch.nn.Conv2d``
conv_transpose  the gradient of such a convolution; weight (C, C', kh, kw); stride 1 or 2
dense           matrix product with a vector, or with each vector of (S, F); weight (F', F)
reshape         the same elements in row-major order under another shape
to_vectors      (g*D, h, w) to (S, D): position (i, j) of group m is vector (i*w + j)*g + m
to_grid         the inverse of to_vectors
add             the sum of two rows
activation      an activation alone
embedding       indices (S,) to (S, F): at each position, the row of weight (K, F) for the index
                before it, plus bias (S, F)
layer_norm      subtracts the mean of each vector of (S, F) and divides by its deviation; weight and
                bias (F,)
group_norm      subtracts the mean of each group of channels of (C, H, W) and divides by its
                deviation; weight and bias (C,)
unit_norm       divides each vector of (S, D) by its length
bounded         maps each element of (S, D) by a tanh into the range of its ``levels``
upsample        (C, H, W) to (C, f*H, f*W): repeats each pixel f x f times
attention       attention over queries, keys and values, each (S, F), in heads
"""

NORMS = frozenset({"layer_norm", "group_norm"})
"""The kinds whose weights start at 1."""

ACTIVATIONS = ("linear", "elu", "relu", "silu", "gelu")


@dataclass(frozen=True)
class Step:
    """A row, the values that it takes, and the values that can be freed after it.

    Values are numbered: 0 is the network's input and i + 1 is the result of row i. sources: the
    values that the row takes. spent: those of them that no later row needs.
    """

    layer: Layer
    sources: tuple[int, ...]
    spent: tuple[int, ...]


def plan(layers: Sequence[Layer]) -> tuple[Step, ...]:
    """Returns the rows with their sources. Raises ValueError if names or shapes do not chain."""
    places = {layer.name: place for place, layer in enumerate(layers, 1)}
    if len(places) != len(layers):
        raise ValueError("two rows have one name")
    for name in places:  # the weight of a row "a" is "a.weight": no row may be named so
        if any(name[:end] in places for end, letter in enumerate(name) if letter == "."):
            raise ValueError(f"{name}: lies within the name of another row")
    shapes = [layers[0].in_shape, *(layer.out_shape for layer in layers)]
    taken = []
    for place, layer in enumerate(layers, 1):
        sources = tuple(places.get(name, place) for name in layer.inputs) or (place - 1,)
        if any(source >= place for source in sources):
            raise ValueError(
                f"{layer.name}: takes {', '.join(layer.inputs)}, expected earlier rows"
            )
        if len(sources) != KINDS[layer.kind].inputs:
            raise ValueError(
                f"{layer.name}: takes {len(sources)} inputs, expected "
                f"{KINDS[layer.kind].inputs} for kind {layer.kind}"
            )
        if wrong := [shapes[source] for source in sources if shapes[source] != layer.in_shape]:
            raise ValueError(f"{layer.name}: in_shape is {layer.in_shape}, its input is {wrong[0]}")
        taken.append(sources)
    last = {value: row for row, sources in enumerate(taken) for value in sources}
    steps = []
    for row, (layer, sources) in enumerate(zip(layers, taken, strict=True)):
        spent = tuple(sorted({value for value in sources if last[value] == row}))
        steps.append(Step(layer, sources, spent))
    return tuple(steps)


@dataclass(frozen=True)
class ModelSpec:
    """Everything that the interpreters need to know about a model, except its parameters.

    family: the name of the function that wrote the rows, for human readers.
    image_shape: (C, H, W).
    latent_shape: (S,), (h, w) or (h, w, g); position (i, j, m) of a grid is latent (i*w + j)*g + m.
    num_codes, code_size: the codebook is (K, D).
    likelihood: a name of ``vqref.likelihoods.LIKELIHOODS``.
    encoder: the rows that map images (C, H, W) to latents (S, D).
    decoder: the rows that map codes (S, D) to outputs (P, H, W), the likelihood's parameters.
    variance: σ² of a gaussian likelihood, the variance of the training images' values in [0, 1].
    value_range: the values that the networks see for 0 and 1 of an image. Outputs have this range.
    normalized: whether codes are unit vectors. The encoder must then end in a unit_norm, so that
        latents are unit vectors too. Rows of the codebook must have length 1, as training leaves
        them; nothing normalizes them again.
    initial: how weights and codebook start. "glorot_uniform" is Glorot and Bengio 2010, equation
        16. "fan_in" is Sonnet's: weights normal with variance 1 / fan-in, cut off at two
        deviations, and a codebook uniform in ±sqrt(3 / D).

    If the encoder's last row is bounded, the codebook is a grid that is never trained: its rows
    are ``vqref.quantizer.grid`` of that row's levels.

    Raises ValueError that names the field, what it was and what it must be.
    """

    family: str
    image_shape: tuple[int, int, int]
    latent_shape: Shape
    num_codes: int
    code_size: int
    likelihood: str
    encoder: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    variance: float = 1.0
    value_range: tuple[float, float] = (0.0, 1.0)
    initial: str = "glorot_uniform"
    normalized: bool = False

    def __post_init__(self) -> None:
        _require_types({name: value for name, value in vars(self).items() if name not in NETWORKS})
        if len(self.image_shape) != 3:
            raise ValueError(
                f"image_shape is {self.image_shape}, expected (channels, height, width)"
            )
        if len(self.latent_shape) not in (1, 2, 3):
            raise ValueError(
                f"latent_shape is {self.latent_shape}, expected (S,), (h, w) or (h, w, g)"
            )
        require_sizes("image_shape", self.image_shape)
        require_sizes("latent_shape", self.latent_shape)
        require_sizes("num_codes", (self.num_codes,))
        require_sizes("code_size", (self.code_size,))
        if self.initial not in ("glorot_uniform", "fan_in"):
            raise ValueError(f"initial is {self.initial[:40]!a}, expected glorot_uniform or fan_in")
        if not self.variance > 0:
            raise ValueError(f"variance is {self.variance!r}, expected a positive number")
        low, high = self.value_range
        if not low < high:
            raise ValueError(f"value_range is {self.value_range}, expected (low, high)")
        if self.normalized and self.encoder and self.encoder[-1].kind != "unit_norm":
            last = self.encoder[-1]
            raise ValueError(
                f"{last.name}: is a {last.kind}; an encoder of a normalized model must end in a "
                "unit_norm"
            )
        if self.levels and math.prod(self.levels) != self.num_codes:
            product = math.prod(self.levels)
            raise ValueError(
                f"num_codes is {self.num_codes}; a grid of levels {self.levels} has {product} codes"
            )
        vectors = (self.latent_size, self.code_size)
        outputs = (output_channels(self.likelihood, self.image_shape[0]), *self.image_shape[1:])
        self._require_chain("encoder", self.encoder, self.image_shape, vectors)
        self._require_chain("decoder", self.decoder, vectors, outputs)

    def _require_chain(self, name: str, rows: tuple[Layer, ...], first: Shape, last: Shape) -> None:
        if not 1 <= len(rows) <= ROW_LIMIT:
            raise ValueError(f"the {name} has {len(rows)} rows, expected 1 to {ROW_LIMIT}")
        if taken := [row.name for row in rows if row.kind == "embedding"]:
            raise ValueError(f"{taken[0]}: takes indices; it belongs to a prior")
        plan(rows)
        ends = rows[0].in_shape, rows[-1].out_shape
        if ends != (first, last):
            raise ValueError(f"the {name} maps {ends[0]} to {ends[1]}, expected {first} to {last}")
        if foreign := [row.name for row in rows if not row.name.startswith(f"{name}.")]:
            raise ValueError(f"{foreign[0]}: the name of a row of the {name} begins with {name}.")

    @property
    def latent_size(self) -> int:
        """The number S of latents per image. It is also the number of indices."""
        return math.prod(self.latent_shape)

    @property
    def levels(self) -> Shape:
        """The number of values of each element of a code, (D,); () if the codebook is no grid."""
        last = self.encoder[-1:]
        return last[0].levels if last and last[0].kind == "bounded" else ()

    @property
    def output_shape(self) -> Shape:
        """The shape (P, H, W) of the decoder's outputs."""
        return self.decoder[-1].out_shape

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All rows: the encoder's, then the decoder's."""
        return self.encoder + self.decoder

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every array of the model in file order: first the rows', then the quantizer's.

        ``ema_count`` starts at 0 and ``ema_means`` as a copy of the codebook.
        """
        k, d = self.num_codes, self.code_size
        width = math.sqrt(6.0 / (k + d) if self.initial == "glorot_uniform" else 3.0 / d)
        start = "grid" if self.levels else "unit_rows" if self.normalized else "uniform"
        return (
            *(parameter for layer in self.layers for parameter in self._initialised(layer)),
            Parameter(CODEBOOK, (k, d), start, width),
            Parameter(EMA_COUNT, (k,), "zeros"),
            Parameter(EMA_MEANS, (k, d), "codebook"),
        )

    def _initialised(self, layer: Layer) -> tuple[Parameter, ...]:
        if not layer.parameters:
            return ()
        (weight, weight_shape), (bias, bias_shape) = layer.parameters
        how: tuple[str, float]
        if layer.kind in NORMS:
            how = "ones", 0.0
        elif self.initial == "glorot_uniform":
            how = "uniform", math.sqrt(6.0 / (layer.fan_in + layer.fan_out))
        else:
            how = "truncated_normal", 1.0 / math.sqrt(layer.fan_in)
        return Parameter(weight, weight_shape, *how), Parameter(bias, bias_shape, "zeros")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data for JSON and files."""
        plain = {f.name: _listed(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name in LATER:
            if plain[name] == getattr(type(self), name):
                del plain[name]
        return plain | {name: [row.to_dict() for row in getattr(self, name)] for name in NETWORKS}

    @classmethod
    def from_dict(cls, fields: Any) -> ModelSpec:
        """Inverts ``to_dict``. Raises ValueError for a missing, unknown or malformed field."""
        if not isinstance(fields, dict):
            raise ValueError("the spec is not a table")
        known = {field.name for field in dataclasses.fields(cls)}
        if missing := sorted(known - LATER - set(fields)):
            raise ValueError(f"the spec lacks {', '.join(missing)}")
        if unknown := sorted(ascii(name).strip("'") for name in fields if name not in known):
            raise ValueError(f"the spec has unknown fields: {', '.join(unknown)[:80]}")
        values = {name: _tupled(value) for name, value in fields.items() if name not in NETWORKS}
        for name in NETWORKS:
            if not isinstance(fields[name], list) or len(fields[name]) > ROW_LIMIT:
                raise ValueError(f"the {name} is not a list of at most {ROW_LIMIT} rows")
            values[name] = tuple(Layer.from_dict(row) for row in fields[name])
        return cls(**values)


NETWORKS = ("encoder", "decoder")

LATER = frozenset({"normalized"})
"""Fields that were added after the format. Files omit them if they have their defaults."""


def require_sizes(name: str, sizes: Shape) -> None:
    """Raises ValueError unless each size is an integer from 1 to SIZE_LIMIT."""
    for size in sizes or (None,):
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= SIZE_LIMIT:
            raise ValueError(
                f"{name} is {size!r:.80}; it must be an integer from 1 to {SIZE_LIMIT}"
            )


_PAIRS = {"kernel", "value_range"}
_NUMBERS = {"scale", "shift", "variance"}
_NAMES = {"name", "kind", "activation", "family", "likelihood", "initial"}
_TRUTHS = {"causal", "normalized"}
_TUPLES = {
    "in_shape",
    "out_shape",
    "inputs",
    "image_shape",
    "latent_shape",
    "pads",
    "levels",
    *_PAIRS,
}
_WANTED: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(_NAMES, (str,)),
    **dict.fromkeys(_NUMBERS, (int, float)),
    **dict.fromkeys(_TUPLES, (tuple,)),
    **dict.fromkeys(_TRUTHS, (bool,)),
}
"""The types of fields; the others are integers."""


def _require_types(values: Mapping[str, Any], whose: str = "") -> None:
    """Raises ValueError unless fields have their types and keep their bounds.

    So a file cannot surprise.
    """
    for name, value in values.items():
        wanted = _WANTED.get(name, (int,))
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted == (bool,)):
            found = ascii(value)[:80]
            raise ValueError(f"{whose}{name} is {found}, expected {wanted[-1].__name__}")
        if name in _NUMBERS:
            _require_number(whose + name, value)
    for name in _PAIRS & values.keys():
        if len(values[name]) != 2:
            raise ValueError(f"{whose}{name} is {values[name]!r}, expected two numbers")
        for value in values[name]:
            _require_number(whose + name, value)
    names = (*values.get("inputs", ()), values.get("family", "x"))
    if wrong := [n for n in names if not isinstance(n, str) or not NAME.fullmatch(n)]:
        raise ValueError(f"{whose}{ascii(wrong[0])[:80]} is not a name, expected words and dots")
    for name in {"kernel", "stride", "num_codes", "heads", "groups", "levels"} & values.keys():
        size = values[name]
        require_sizes(whose + name, size if isinstance(size, tuple) else (size,))
    pads = values.get("pads")
    if pads is None:
        return
    flat = [n for pair in pads if isinstance(pair, tuple) for n in pair]
    if len(pads) != 2 or len(flat) != 4 or not all(type(n) is int and 0 <= n <= 1024 for n in flat):
        raise ValueError(f"{whose}pads is {pads!r}, expected two pairs of pixels")


def _require_number(name: str, value: Any) -> None:
    fits = isinstance(value, (int, float)) and abs(value) <= SIZE_LIMIT  # NaN does not
    if not fits or isinstance(value, bool):
        limit = f"it must be a number within ±{SIZE_LIMIT}"
        raise ValueError(f"{name} is {ascii(value)[:80]}; {limit}")


def _listed(value: Any) -> Any:
    return [_listed(part) for part in value] if isinstance(value, tuple) else value


def _tupled(value: Any, depth: int = 2) -> Any:
    """Turns lists into tuples, as deep as any field nests them."""
    if not depth or not isinstance(value, list):
        return value
    return tuple(_tupled(part, depth - 1) for part in value)
