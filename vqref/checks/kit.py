"""What every check shares: the implementation, the sizes and amounts in which it is tried, and how
an answer is judged."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.agreement.bounds import array_dtype
from vqref.agreement.parity import check_indices
from vqref.agreement.report import Check
from vqref.agreement.stages import check_ema, check_quantized
from vqref.dialects import Dialect
from vqref.precisions import arithmetic
from vqref.quantizer import EMAState
from vqref.validation import Array

Quantize = Callable[[Array, Array], Any]
Update = Callable[[EMAState, Array, Array, float, float], Any]
Step = Callable[[EMAState, Array, float, float], tuple[Any, Any, Any]]

LATENTS = 4096
"""Latents of each case: enough for distances rounded to 11 bits to flip a certified index."""

WORK = 2**27
"""Latents x codes x elements in one call, unless ``LATENTS`` need more: half a gigabyte of float32,
if an implementation holds all differences at once."""

EDGES = tuple(
    sorted(
        {
            max(1, edge + beside)
            for edge in (*(2**power for power in range(14)), 100, 1000, 5000, 10_000)
            for beside in (-1, 0, 1)
        }
    )
)
"""Sizes of batches: about every power of two and of ten, where blocks begin and end."""

STATES = 1
"""The stream of states, which must not be that of latents."""

MANY = 2**16 + 1
"""Latents in which one that is wrong must be found."""

HUGE = 70_001
"""Codes: more than 16 bits hold, and no block divides it."""

SHAPES: Mapping[str, Callable[[int, int], tuple[int, int]]] = MappingProxyType(
    {
        "one_latent": lambda k, d: (1, 1),
        "S_equals_1": lambda k, d: (37, 1),
        "S_equals_2": lambda k, d: (9, 2),
        "S_equals_D": lambda k, d: (5, d),
        "S_equals_K": lambda k, d: (2, k),
        "N_equals_S": lambda k, d: (11, 11),
        "N_equals_D": lambda k, d: (d, 3),
        "N_equals_K": lambda k, d: (k, 2),
    }
)
"""Batches (N, S) in which axes can be mistaken for each other, by name, of num_codes and
code_size."""


@dataclass(frozen=True)
class Amounts:
    """How much is tried.

    seeds: of each check. latents: of each adversarial case. batches: of 65,537 latents, in which
    one that is wrong must be found. million: of the largest batch.
    calls, steps, training: calls of one kind, updates, training steps in a row.
    codes: numbers of codes, code_sizes: numbers of elements, for implementations of any size.
    """

    seeds: int
    latents: int
    batches: int
    million: int
    calls: int
    steps: int
    training: int
    codes: tuple[int, ...]
    code_sizes: tuple[int, ...]


_CODES = (192, 255, 256, 257, 300, 511, 512, 513, 1000, 1023, 1025, 2049, 4097)
_CODE_SIZES = (63, 64, 65, 96, 100, 127, 128, 129, 255, 257, 384, 512, 1025)

DEFAULT = Amounts(
    seeds=1,
    latents=LATENTS,
    batches=4,
    million=2**20 + 1,
    calls=520,
    steps=520,
    training=130,
    codes=(*range(2, 131), *_CODES),
    code_sizes=(*range(1, 35), *_CODE_SIZES),
)
THOROUGH = Amounts(
    seeds=3,
    latents=4 * LATENTS,
    batches=8,
    million=2**22 + 1,
    calls=2100,
    steps=1100,
    training=1100,
    codes=(*range(2, 300), *_CODES, 8191, 8193, 16385),
    code_sizes=(*range(1, 140), *_CODE_SIZES, 511, 513, 1023, 2049),
)


@dataclass(frozen=True)
class Kit:
    """An implementation, and the sizes and arithmetic in which it is checked."""

    quantize: Quantize
    update: Update | None
    step: Step | None
    precision: str
    form: str
    dialect: Dialect
    num_codes: int
    code_size: int
    any_size: bool
    seed: int
    amounts: Amounts

    @property
    def codes(self) -> tuple[int, int]:
        """The shape of the codebook, (K, D)."""
        return self.num_codes, self.code_size

    @property
    def affordable(self) -> int:
        """Latents in one call at most."""
        return max(LATENTS, WORK // (self.num_codes * self.code_size))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Those of ``SHAPES`` that are affordable."""
        named = {name: shape(*self.codes) for name, shape in SHAPES.items()}
        return {name: (n, s) for name, (n, s) in named.items() if n * s <= self.affordable}

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """Those of the amounts for which the precision has a bound."""
        most = 0.5 / arithmetic(self.precision).unit - 5
        return tuple(d for d in self.amounts.code_sizes if d < most)

    def sized(self, num_codes: int, code_size: int) -> Kit:
        """The same with another codebook."""
        return dataclasses.replace(self, num_codes=num_codes, code_size=code_size)

    def small(self) -> Kit:
        """With a codebook for batches that are large, if the implementation takes any."""
        return self.sized(16, 4) if self.any_size else self

    def rng(self, stream: int = 0) -> np.random.Generator:
        """The same for the same seed and stream."""
        return np.random.default_rng((self.seed, stream))

    def held(self, array: npt.ArrayLike) -> Array:
        """In the dtype of the precision."""
        return np.asarray(array).astype(array_dtype(self.precision))

    def normal(self, rng: np.random.Generator, *shape: int) -> Array:
        return self.held(rng.normal(size=shape))

    def spread(self, most: int) -> npt.NDArray[np.int64]:
        """Codes evenly spread, ``most`` at most, and those about powers of two beside them: the
        first and the last are among them."""
        last = self.num_codes - 1
        edges = [2**power + j for power in range(last.bit_length()) for j in (-1, 0)]
        even = np.linspace(0, last, min(self.num_codes, most)).round().astype(np.int64)
        return np.unique([*even, *(edge for edge in edges if edge <= last)])

    def judge(self, latents: Array, codebook: Array) -> list[Check]:
        """The checks of one call with copies of these."""
        found = self.quantize(latents.copy(), codebook.copy())
        return self.judge_answer(found, latents, codebook)

    def judge_answer(self, found: Any, latents: Array, codebook: Array) -> list[Check]:
        """The checks of what ``quantize`` returned: indices, or indices and quantized."""
        how = {"precision": self.precision, "form": self.form}
        if isinstance(found, tuple):
            indices, quantized = map(np.asarray, found)
            checks = list(check_quantized(indices, quantized, latents, codebook, **how))
        else:
            checks = [check_indices(np.asarray(found), latents, codebook, **how)]
        return _of(latents, codebook, checks)

    def indices(self, latents: Array, codebook: Array) -> Array:
        """The indices of one call with these themselves."""
        return self.arrays(self.quantize(latents, codebook))[0]

    @staticmethod
    def arrays(found: Any) -> tuple[Array, ...]:
        """What ``quantize`` returned, as arrays."""
        return tuple(map(np.asarray, found if isinstance(found, tuple) else (found,)))

    def start(self) -> EMAState:
        """The state from which the dialect starts."""
        rng = self.rng(STATES)
        means = self.normal(rng, *self.codes) if self.dialect.means == "own" else None
        return EMAState.start(self.normal(rng, *self.codes), self.dialect, means)

    def midway(self) -> EMAState:
        """A state as in the middle of a run: counts from nothing to a few, and means that belong to
        them."""
        rng = self.rng(STATES)
        count = self.held(rng.uniform(0, 4, self.num_codes) * rng.integers(0, 3, self.num_codes))
        count[0] = 2.0  # so that a dialect can divide by their sum
        codebook = self.normal(rng, *self.codes)
        return EMAState(codebook, count, self.held(codebook * count[:, None]), steps=7)

    def judge_state(
        self,
        found: Any,
        state: EMAState,
        latents: Array,
        indices: Array,
        decay: float,
        epsilon: float,
    ) -> tuple[list[Check], EMAState]:
        """The checks of the state that an implementation made, and that state; the one before if it
        is wrong."""
        arrays = state_arrays(found)
        checks = check_ema(
            arrays,
            state,
            latents,
            indices,
            precision="float64" if self.precision == "float64" else "float32",
            decay=decay,
            epsilon=epsilon,
            dialect=self.dialect,
        )
        judged, steps = _of(latents, state.codebook, checks), state.steps + 1
        if isinstance(found, EMAState) and self.dialect.debiased:
            judged.append(equal("steps", np.asarray(found.steps), np.asarray(steps)))
        if not all(check.passed for check in judged):
            return judged, state
        return judged, EMAState(*arrays, steps=steps)


@dataclass(frozen=True)
class Given:
    """What one move of the averages is given."""

    state: EMAState
    latents: Array
    indices: Array
    decay: float
    epsilon: float

    def copied(self) -> Given:
        return copy.deepcopy(self)


class Move(ABC):
    """A way to move the averages: ``call`` asks the implementation, ``judge`` holds its answer to
    the oracle."""

    name: str

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    @abstractmethod
    def call(self, given: Given) -> Any: ...

    @abstractmethod
    def judge(self, found: Any, given: Given) -> tuple[list[Check], EMAState]:
        """The checks, and the state that the implementation made; the one before if it is wrong."""

    @abstractmethod
    def arrays(self, found: Any) -> tuple[Array, ...]:
        """All arrays of an answer."""

    def moved(self, given: Given) -> tuple[list[Check], EMAState]:
        """One call with copies, judged."""
        return self.judge(self.call(given.copied()), given)


class Updating(Move):
    """By ``update``: the indices are given."""

    name = "ema"

    def call(self, given: Given) -> Any:
        assert self.kit.update is not None
        return self.kit.update(
            given.state, given.latents, given.indices, given.decay, given.epsilon
        )

    def judge(self, found: Any, given: Given) -> tuple[list[Check], EMAState]:
        return self.kit.judge_state(
            found, given.state, given.latents, given.indices, given.decay, given.epsilon
        )

    def arrays(self, found: Any) -> tuple[Array, ...]:
        return state_arrays(found)


class Stepping(Move):
    """By ``step``, which finds the indices: the averages are judged by those that it found, once
    they are right."""

    name = "step"

    def call(self, given: Given) -> Any:
        assert self.kit.step is not None
        return self.kit.step(given.state, given.latents, given.decay, given.epsilon)

    def judge(self, found: Any, given: Given) -> tuple[list[Check], EMAState]:
        indices, quantized, after = found
        codebook = self.kit.held(given.state.codebook)
        judged = self.kit.judge_answer((indices, quantized), given.latents, codebook)
        if not judged[0].passed:
            return judged, given.state
        checks, state = self.kit.judge_state(
            after, given.state, given.latents, np.asarray(indices), given.decay, given.epsilon
        )
        return [*judged, *checks], state

    def arrays(self, found: Any) -> tuple[Array, ...]:
        indices, quantized, after = found
        return np.asarray(indices), np.asarray(quantized), *state_arrays(after)


def state_arrays(state: Any) -> tuple[Array, Array, Array]:
    """codebook, ema_count and ema_means of an EMAState, or of three arrays."""
    if isinstance(state, EMAState):
        return state.codebook, state.ema_count, state.ema_means
    codebook, count, means = state
    return np.asarray(codebook), np.asarray(count), np.asarray(means)


def _of(latents: Array, codebook: Array, checks: Iterable[Check]) -> list[Check]:
    """The checks, named with the sizes that were judged."""
    n, s, d = latents.shape
    sizes = f"of {n} x {s} latents, K {len(codebook)}, D {d}"
    return [dataclasses.replace(check, stage=f"{check.stage} {sizes}") for check in checks]


def equal(name: str, found: Array, expected: Array) -> Check:
    """The check of arrays that must be the same to the last bit."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        problem = f"{name}: {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        return Check(
            name, str(expected.dtype), expected.size, max(1, expected.size), problem=problem
        )
    wrong = np.argwhere(found != expected)
    if not len(wrong):
        return Check(name, str(expected.dtype), expected.size, 0)
    at = tuple(int(i) for i in wrong[0])
    problem = f"{name}: {found[at]} at {at}, expected {expected[at]}"
    return Check(name, str(expected.dtype), expected.size, len(wrong), problem=problem)


def layouts(array: Array) -> Iterator[tuple[str, Array]]:
    """The same values (any shape) in other orders of memory, each with a name. What lies between
    them in memory is something else."""
    yield "Fortran order", np.asfortranarray(array)
    for axis in range(array.ndim):
        yield f"axis {axis} reversed", np.flip(np.flip(array, axis).copy(), axis)
        wide = np.repeat(np.flip(array), 2, axis)
        every = (*[slice(None)] * axis, slice(None, None, 2))
        wide[every] = array
        yield f"every second of axis {axis}", wide[every]
        swapped = np.moveaxis(array, axis, 0)
        yield f"axis {axis} first in memory", np.moveaxis(swapped.copy(), 0, axis)
    fixed = array.copy()
    fixed.flags.writeable = False
    yield "read-only", fixed


Named = dict[str, Callable[[Kit], Iterable[Check]]]
"""Checks by name."""
