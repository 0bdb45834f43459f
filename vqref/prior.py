"""Priors over tokens: p(indices) = product over s of p(index_s | indices before s).

A "categorical" prior is a table of log-probabilities per position. For one latent, these are the
frequencies of the training set. An "autoregressive" prior is a causal transformer (Vaswani et al.
2017; pre-norm as in Radford et al. 2019). Its rows are of the same kinds as those of encoder and
decoder.

Samples are a pure function of noise, which is an input. Position by position, a sample takes the
code with the largest log p / temperature + gumbel (Gumbel 1954; Maddison et al. 2014). So equal
noise gives equal tokens on every machine whose log-probabilities are close enough. ``certified``
says where a bound on their error guarantees this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vqref.network import ACTIVATIONS, KINDS, before_activation, run, weights_of
from vqref.network import backward as rows_backward
from vqref.spec import ROW_LIMIT, Layer, Parameter, plan, require_sizes
from vqref.validation import Float64, Int64, Params, as_float64, as_indices, check_params

CATEGORICAL, AUTOREGRESSIVE = "categorical", "autoregressive"

LOGITS = "prior.logits"
"""The table of a categorical prior, (S, K)."""

WEIGHT_SCALE = 0.02
"""The standard deviation of initial weights and positions."""

SMOOTHING = 0.5
"""The number added to each count of a categorical prior (Krichevsky and Trofimov 1981)."""


@dataclass(frozen=True)
class PriorSpec:
    """A prior over S indices of K codes.

    kind: "categorical" or "autoregressive". A categorical prior has no rows. The rows of an
    autoregressive one begin with an embedding and give logits (S, K). Their names begin with
    "prior.".

    Raises ValueError that names the field, what it was and what it must be.
    """

    kind: str
    latent_size: int
    num_codes: int
    rows: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in (CATEGORICAL, AUTOREGRESSIVE):
            found = ascii(self.kind)[:80]
            raise ValueError(f"kind is {found}, expected {CATEGORICAL} or {AUTOREGRESSIVE}")
        require_sizes("latent_size", (self.latent_size,))
        require_sizes("num_codes", (self.num_codes,))
        if self.kind == CATEGORICAL:
            if self.rows:
                raise ValueError(f"a categorical prior has {len(self.rows)} rows, expected none")
            return
        if not 1 <= len(self.rows) <= ROW_LIMIT:
            raise ValueError(f"the prior has {len(self.rows)} rows, expected 1 to {ROW_LIMIT}")
        first, last = self.rows[0], self.rows[-1]
        if (first.kind, first.num_codes) != ("embedding", self.num_codes):
            raise ValueError(
                f"{first.name}: is a {first.kind} of {first.num_codes}, a prior begins with an "
                f"embedding of {self.num_codes}"
            )
        plan(self.rows)
        ends, expected = (first.in_shape, last.out_shape), (self.latent_size, self.num_codes)
        if ends != (expected[:1], expected):
            raise ValueError(f"the prior maps {ends[0]} to {ends[1]}, expected to {expected}")
        for row in self.rows:
            if not row.name.startswith("prior."):
                raise ValueError(f"{row.name}: the name of a row of the prior begins with prior.")
            _require_causal(row, first)
        if len({row.in_shape for row in self.attention}) > 1:
            raise ValueError("the prior's rows of attention have several sizes, expected one")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Every array of the prior in file order, with its initial values."""
        if self.kind == CATEGORICAL:
            return (Parameter(LOGITS, (self.latent_size, self.num_codes), "zeros"),)
        branches = sum(row.kind == "add" for row in self.rows)
        return tuple(
            parameter for row in self.rows for parameter in _initialised(row, self.rows, branches)
        )

    @property
    def attention(self) -> tuple[Layer, ...]:
        """The attention rows, which keep keys and values of earlier positions."""
        return tuple(row for row in self.rows if row.kind == "attention")

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain data for JSON and files."""
        return dataclasses.asdict(self) | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, fields: Any) -> PriorSpec:
        """Inverts ``to_dict``. Raises ValueError for anything else."""
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or set(fields) != known:
            raise ValueError(f"the prior's spec is not a table of {', '.join(sorted(known))}")
        if not isinstance(fields["rows"], list) or len(fields["rows"]) > ROW_LIMIT:
            raise ValueError(f"the prior's rows are not a list of at most {ROW_LIMIT} rows")
        rows = tuple(Layer.from_dict(row) for row in fields["rows"])
        return cls(**{**fields, "rows": rows})


@dataclass(frozen=True)
class Prior:
    """A trained prior.

    spec, params: its spec and parameters.
    model: the digest of the model whose tokens it models.
    training, metrics: its training options and measurements, plain data.

    Raises ValueError for parameters that do not fit the spec.
    """

    spec: PriorSpec
    params: Params
    model: str
    training: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_params(self.spec, self.params)

    def to_plain(self) -> dict[str, Any]:
        """Returns the plain data that go into a model's file."""
        return {
            "spec": self.spec.to_dict(),
            "parameters": dict(self.params),
            "model": self.model,
            "training": dict(self.training),
            "metrics": dict(self.metrics),
        }

    @classmethod
    def from_plain(cls, fields: Any) -> Prior:
        """Inverts ``to_plain``. Raises ValueError for anything else."""
        kinds = {"parameters": dict, "model": str, "training": dict, "metrics": dict}
        if not isinstance(fields, dict) or set(fields) != {"spec", *kinds}:
            raise ValueError(f"the prior is not a table of spec, {', '.join(kinds)}")
        for name, kind in kinds.items():
            if not isinstance(fields[name], kind):
                found = type(fields[name]).__name__
                raise ValueError(f"the prior's {name} is {found}, expected {kind.__name__}")
        return cls(PriorSpec.from_dict(fields["spec"]), *(fields[name] for name in kinds))


POSITIONWISE = frozenset({"affine", "dense", "add", "activation", "layer_norm"})
"""The kinds whose result at a position depends only on their inputs at that position."""


def _require_causal(row: Layer, first: Layer) -> None:
    """Raises ValueError for a row that sees later indices or that ``step`` cannot run."""
    seen = row.kind in POSITIONWISE or (row.kind == "attention" and row.causal) or row is first
    if not seen or len(row.out_shape) != 2:
        causal = " that is not causal" * (row.kind == "attention")
        raise ValueError(f"{row.name}: a prior has no {row.kind}{causal}")


def _initialised(row: Layer, rows: tuple[Layer, ...], branches: int) -> tuple[Parameter, ...]:
    """Returns the parameters of a row. Their deviation is usually ``WEIGHT_SCALE``.

    At the end of a branch, it is divided by the square root of the number of branches that are
    added up (Radford et al. 2019).
    """
    if not row.parameters:
        return ()
    (weight, shape), (bias, bias_shape) = row.parameters
    added = any(row.name in other.inputs[1:] for other in rows if other.kind == "add")
    scale = WEIGHT_SCALE / math.sqrt(max(1, branches) if added else 1)
    kinds = {
        "layer_norm": (Parameter(weight, shape, "ones"), Parameter(bias, bias_shape, "zeros")),
        "embedding": (
            Parameter(weight, shape, "truncated_normal", scale),
            Parameter(bias, bias_shape, "truncated_normal", scale),
        ),
    }
    usual = (
        Parameter(weight, shape, "truncated_normal", scale),
        Parameter(bias, bias_shape, "zeros"),
    )
    return kinds.get(row.kind, usual)


def transformer(
    latent_size: int, num_codes: int, *, width: int = 128, depth: int = 4, heads: int = 4
) -> PriorSpec:
    """Returns the spec of a causal transformer over S >= 2 indices.

    It has ``depth`` blocks. Each has attention in ``heads`` and a dense row four times as wide as
    ``width``. Raises ValueError for sizes that do not fit.
    """
    require_sizes("width", (width,))
    require_sizes("depth", (depth,))
    require_sizes("heads", (heads,))
    if latent_size < 2:
        raise ValueError(f"latent_size is {latent_size}, a transformer takes 2 or more")
    if width % heads:
        raise ValueError(f"width is {width}, not a multiple of {heads} heads")
    shape, wide = (latent_size, width), (latent_size, 4 * width)
    rows = [Layer("prior.tokens", "embedding", (latent_size,), shape, num_codes=num_codes)]

    def row(name: str, kind: str, *inputs: str, into: tuple[int, int] = shape, **more: Any) -> str:
        before = next((r.out_shape for r in rows if inputs and r.name == inputs[0]), shape)
        rows.append(Layer(name, kind, before, into, inputs, **more))
        return name

    x = rows[0].name
    for number in range(1, depth + 1):
        block = f"prior.block{number}"
        norm = row(f"{block}.norm1", "layer_norm", x)
        q, k, v = (row(f"{block}.{each}", "dense", norm) for each in ("query", "key", "value"))
        seen = row(f"{block}.attention", "attention", q, k, v, heads=heads, causal=True)
        x = row(f"{block}.add1", "add", x, row(f"{block}.joined", "dense", seen))
        norm = row(f"{block}.norm2", "layer_norm", x)
        hidden = row(f"{block}.hidden", "dense", norm, into=wide, activation="gelu")
        x = row(f"{block}.add2", "add", x, row(f"{block}.narrow", "dense", hidden))
    norm = row("prior.norm", "layer_norm", x)
    row("prior.logits", "dense", norm, into=(latent_size, num_codes))
    return PriorSpec(AUTOREGRESSIVE, latent_size, num_codes, tuple(rows))


def categorical(
    indices: npt.ArrayLike, num_codes: int
) -> tuple[PriorSpec, dict[str, npt.NDArray[np.float32]]]:
    """Returns the prior that has the frequencies of indices (N, S) in each position.

    They are smoothed by ``SMOOTHING``. Raises ValueError if there are no indices, or if some are
    not from 0 to num_codes - 1.
    """
    rows = as_indices(indices, ("N", "S"), num_codes)
    if not rows.size:
        raise ValueError(f"indices: shape is {rows.shape}, expected at least one")
    counts = np.stack([np.bincount(column, minlength=num_codes) for column in rows.T])
    smooth = counts + SMOOTHING
    logits = np.log(smooth / smooth.sum(axis=1, keepdims=True)).astype(np.float32)
    return PriorSpec(CATEGORICAL, rows.shape[1], num_codes), {LOGITS: logits}


def log_probabilities(spec: PriorSpec, params: Params, indices: npt.ArrayLike) -> Float64:
    """Returns log p (N, S, K) of every code at each position, given the indices (N, S) before it.

    Raises ValueError for indices or parameters that do not fit.
    """
    return log_softmax(_logits(spec, params, _checked(spec, params, indices)))


def nats(spec: PriorSpec, params: Params, indices: npt.ArrayLike) -> Float64:
    """Returns the cost of indices (N, S) in nats per image, (N,).

    Raises ValueError as ``log_probabilities`` does.
    """
    rows = _checked(spec, params, indices)
    cost: Float64 = -_taken(log_softmax(_logits(spec, params, rows)), rows).sum(axis=1)
    return cost


def gradients(
    spec: PriorSpec, params: Params, indices: npt.ArrayLike
) -> tuple[float, dict[str, Float64]]:
    """Returns the mean of ``nats`` over images, and its gradient by every parameter.

    Raises ValueError as ``log_probabilities`` does.
    """
    rows = _checked(spec, params, indices)
    logits = _logits(spec, params, rows)
    found = log_softmax(logits)
    g = np.exp(found)
    np.put_along_axis(g, rows[..., None], np.take_along_axis(g, rows[..., None], 2) - 1, 2)
    g /= max(1, len(rows))
    loss = -float(_taken(found, rows).sum()) / max(1, len(rows))
    if spec.kind == CATEGORICAL:
        return loss, {LOGITS: g.sum(axis=0)}
    return loss, rows_backward(spec.rows, params, rows, g)[1]


def log_softmax(logits: Float64) -> Float64:
    """Returns the log-softmax along the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Float64 = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _checked(spec: PriorSpec, params: Params, indices: npt.ArrayLike) -> Int64:
    check_params(spec, params)
    return as_indices(indices, ("N", spec.latent_size), spec.num_codes)


def _logits(spec: PriorSpec, params: Params, indices: Int64) -> Float64:
    if spec.kind == CATEGORICAL:
        return np.repeat(np.asarray(params[LOGITS], np.float64)[None], len(indices), axis=0)
    return run(spec.rows, params, indices)


def _taken(log_p: Float64, indices: Int64) -> Float64:
    """Returns log p (N, S) of the indices."""
    return np.take_along_axis(log_p, indices[..., None], axis=2)[..., 0]


class Kept(NamedTuple):
    """Keys and values (N, S, F) of one attention row. They are 0 from the next position on."""

    keys: Float64
    values: Float64


Cache = Mapping[str, Kept]
"""Keys and values by the names of the attention rows."""


def begin(spec: PriorSpec, count: int) -> dict[str, Kept]:
    """Returns the cache of ``count`` images before the first position."""
    return {
        row.name: Kept(np.zeros((count, *row.in_shape)), np.zeros((count, *row.in_shape)))
        for row in spec.attention
    }


def step(
    spec: PriorSpec, params: Params, previous: npt.ArrayLike, position: int, cache: Cache
) -> tuple[Float64, dict[str, Kept]]:
    """Returns log p (N, K) of every code at one position, and the cache with that position added.

    previous: (N,), the indices one position before. They have no meaning at position 0.
    cache: that of the earlier positions.
    Raises ValueError for indices, a position or parameters that do not fit.
    """
    check_params(spec, params)
    before = as_indices(previous, ("N",), spec.num_codes)
    if not 0 <= position < spec.latent_size:
        raise ValueError(f"position is {position}, expected 0 to {spec.latent_size - 1}")
    if spec.kind == CATEGORICAL:
        row = np.asarray(params[LOGITS], np.float64)[position]
        return log_softmax(np.repeat(row[None], len(before), axis=0)), {}
    weights, kept = weights_of(spec.rows, params), dict(cache)
    values: dict[int, Any] = {0: before}
    for number, each in enumerate(plan(spec.rows), 1):
        layer = each.layer
        if layer.kind == "embedding":
            vectors, places = weights[layer.name]
            y = places[position] + (vectors[before] if position else 0 * vectors[before])
            y = y[:, None]
        elif layer.kind == "attention":
            q, k, v = (values[i] for i in each.sources)
            keys, those = (array.copy() for array in kept[layer.name])
            keys[:, position], those[:, position] = k[:, 0], v[:, 0]
            kept[layer.name] = Kept(keys, those)
            seen = dataclasses.replace(layer, causal=False)  # there are no later keys yet
            y = KINDS["attention"].value(seen, q, keys[:, : position + 1], those[:, : position + 1])
        else:
            y = before_activation(each, values, weights)
        values[number] = ACTIVATIONS[layer.activation].value(y)
    return log_softmax(values[len(spec.rows)][:, 0]), kept


def gumbel(seed: int, spec: PriorSpec, count: int, first: int = 0) -> Float64:
    """Returns the noise (count, S, K) for images ``first``, ``first`` + 1, ....

    It depends only on the seed and on the image's number. It comes from Philox 4x64 (Salmon et al.
    2011), with the seed as key. Image i begins at counter i * 2^192. The upper 52 bits of each
    64-bit word give u = (bits + 1/2) / 2^52, and the noise is -log(-log(u)). Raises ValueError for
    a seed that is not from 0 to 2^128 - 1.
    """
    if not 0 <= seed < 2**128:
        raise ValueError(f"seed is {seed!r:.80}, expected 0 to 2^128 - 1")
    shape = (spec.latent_size, spec.num_codes)
    noise = np.empty((count, *shape))
    for i in range(count):
        words = np.random.Philox(key=seed, counter=(first + i) << 192).random_raw(math.prod(shape))
        u = ((words >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
        noise[i] = -np.log(-np.log(u)).reshape(shape)
    return noise


def choose(
    log_p: npt.ArrayLike, noise: npt.ArrayLike, temperature: float = 1.0, top_k: int | None = None
) -> Int64:
    """Returns the code (N,) with the largest log p / temperature + noise; the first on a tie.

    log_p, noise: (N, K). top_k: choose only among the top_k most probable codes, and codes as
    probable as the last of these. Raises ValueError for a temperature or a top_k that is not
    positive.
    """
    found: Int64 = _scores(log_p, noise, temperature, top_k)[0].argmax(axis=1)
    return found


def certified(
    log_p: npt.ArrayLike,
    noise: npt.ArrayLike,
    error: npt.ArrayLike,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> npt.NDArray[np.bool_]:
    """Returns whether ``choose`` takes the same code for all log-probabilities near these, (N,).

    Near means within ``error``, a number or (N, 1). True requires two things. The winner is among
    the top_k whatever the error. Every code that may be among the top_k lies further behind than
    twice the error can move it.
    """
    bound = np.asarray(error, np.float64)
    scores, ranked = _scores(log_p, noise, temperature, top_k, 2 * bound)
    best = scores.argmax(axis=1)[:, None]
    rest = scores.copy()
    np.put_along_axis(rest, best, -np.inf, axis=1)
    margin = np.take_along_axis(scores, best, 1) - rest.max(axis=1, keepdims=True)
    size = np.abs(np.where(np.isfinite(scores), scores, 0.0)).max(axis=1, keepdims=True)
    clear = margin > 2 * bound / temperature + ROUNDING * size
    sure: npt.NDArray[np.bool_] = clear & (np.take_along_axis(ranked, best, 1) > 2 * bound)
    return sure[:, 0]


ROUNDING = 2.0**-48
"""A bound on the float64 error of a score, relative to the largest score.

It covers noise from another logarithm, a quotient and a sum."""


def _scores(
    log_p: npt.ArrayLike,
    noise: npt.ArrayLike,
    temperature: float,
    top_k: int | None,
    slack: Float64 | float = 0.0,
) -> tuple[Float64, Float64]:
    """Returns the scores log p / temperature + noise, and each log p's lead.

    The score is -inf for codes more than ``slack`` below the top_k. The lead is over the best log p
    that is not among the top_k. It is infinite if there is none.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature!r}, expected a positive number")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k!r}, expected at least 1")
    log_p = as_float64("log_probabilities", log_p, ("N", "K"))
    scores = log_p / temperature + as_float64("noise", noise, log_p.shape)
    if top_k is None or top_k >= log_p.shape[1]:
        return scores, np.full_like(log_p, np.inf)
    ordered = np.sort(log_p, axis=1)[:, ::-1]
    last, after = ordered[:, top_k - 1 : top_k], ordered[:, top_k : top_k + 1]
    return np.where(log_p >= last - slack, scores, -np.inf), log_p - after


def sample(
    spec: PriorSpec,
    params: Params,
    noise: npt.ArrayLike,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Int64:
    """Samples indices (N, S), position by position, from noise (N, S, K).

    See ``gumbel`` and ``choose``. Raises ValueError for arguments that do not fit.
    """
    drawn = as_float64("noise", noise, ("N", spec.latent_size, spec.num_codes))
    indices = np.zeros(drawn.shape[:2], np.int64)
    cache: Cache = begin(spec, len(drawn))
    for s in range(spec.latent_size):
        before = indices[:, s - 1] if s else indices[:, 0]
        log_p, cache = step(spec, params, before, s, cache)
        indices[:, s] = choose(log_p, drawn[:, s], temperature, top_k)
    return indices
