"""What every check shares: the implementation, its sizes, the amounts tried, and the judging."""

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
"""Latents of each case, enough for distances rounded to 11 bits to flip a certified index."""

WORK = 2**27
"""The most latents x codes x elements in one call, unless ``LATENTS`` needs more.

If an implementation holds all differences at once, they take half a gigabyte of float32."""

EDGES = tuple(
    sorted(
        {
            max(1, edge + beside)
            for edge in (*(2**power for power in range(14)), 100, 1000, 5000, 10_000)
            for beside in (-1, 0, 1)
        }
    )
)
"""Sizes of batches near every power of two and of ten, where blocks begin and end."""

STATES = 1
"""The stream of random numbers for states, which must differ from that of latents."""

MANY = 2**16 + 1
"""The number of latents in which a single wrong one must be found."""

HUGE = 70_001
"""A number of codes that exceeds 16 bits and that no block size divides."""

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
"""Batches (N, S) in which axes can be confused, as functions of num_codes and code_size."""


@dataclass(frozen=True)
class Amounts:
    """How much is tried.

    seeds: seeds of each check.
    latents: latents of each adversarial case.
    batches: batches of 65,537 latents, in which a single wrong one must be found.
    million: latents of the largest batch.
    calls, steps, training: calls of one kind, updates, and training steps in a row.
    codes, code_sizes: numbers of codes and of elements, for implementations that take any size.
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
    """An implementation, and the sizes and arithmetic with which it is checked."""

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
        """The most latents in one call."""
        return max(LATENTS, WORK // (self.num_codes * self.code_size))

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The entries of ``SHAPES`` that are affordable."""
        named = {name: shape(*self.codes) for name, shape in SHAPES.items()}
        return {name: (n, s) for name, (n, s) in named.items() if n * s <= self.affordable}

    @property
    def code_sizes(self) -> tuple[int, ...]:
        """The code sizes to try, as far as the precision has a bound for them."""
        most = 0.5 / arithmetic(self.precision).unit - 5
        return tuple(d for d in self.amounts.code_sizes if d < most)

    def sized(self, num_codes: int, code_size: int) -> Kit:
        """Returns the same kit with another size of codebook."""
        return dataclasses.replace(self, num_codes=num_codes, code_size=code_size)

    def small(self) -> Kit:
        """Returns a kit with a small codebook, for large batches, unless sizes are fixed."""
        return self.sized(16, 4) if self.any_size else self

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Returns a generator that depends on nothing but the seed and the stream."""
        return np.random.default_rng((self.seed, stream))

    def held(self, array: npt.ArrayLike) -> Array:
        """Returns the array in the dtype of the precision."""
        return np.asarray(array).astype(array_dtype(self.precision))

    def normal(self, rng: np.random.Generator, *shape: int) -> Array:
        return self.held(rng.normal(size=shape))

    def spread(self, most: int) -> npt.NDArray[np.int64]:
        """Returns at most ``most`` codes evenly spread, and all codes near powers of two.

        The first and the last code are among them.
        """
        last = self.num_codes - 1
        edges = [2**power + j for power in range(last.bit_length()) for j in (-1, 0)]
        even = np.linspace(0, last, min(self.num_codes, most)).round().astype(np.int64)
        return np.unique([*even, *(edge for edge in edges if edge <= last)])

    def judge(self, latents: Array, codebook: Array) -> list[Check]:
        """Returns the checks of one call with copies of these arrays."""
        found = self.quantize(latents.copy(), codebook.copy())
        return self.judge_answer(found, latents, codebook)

    def judge_answer(self, found: Any, latents: Array, codebook: Array) -> list[Check]:
        """Returns the checks of an answer of ``quantize``: indices, or indices and quantized."""
        how = {"precision": self.precision, "form": self.form}
        if isinstance(found, tuple):
            indices, quantized = map(np.asarray, found)
            checks = list(check_quantized(indices, quantized, latents, codebook, **how))
        else:
            checks = [check_indices(np.asarray(found), latents, codebook, **how)]
        return _of(latents, codebook, checks)

    def indices(self, latents: Array, codebook: Array) -> Array:
        """Returns the indices of one call with these very arrays."""
        return self.arrays(self.quantize(latents, codebook))[0]

    @staticmethod
    def arrays(found: Any) -> tuple[Array, ...]:
        """Returns an answer of ``quantize`` as arrays."""
        return tuple(map(np.asarray, found if isinstance(found, tuple) else (found,)))

    def start(self) -> EMAState:
        """Returns the state from which the dialect starts."""
        rng = self.rng(STATES)
        means = self.normal(rng, *self.codes) if self.dialect.means == "own" else None
        return EMAState.start(self.normal(rng, *self.codes), self.dialect, means)

    def midway(self) -> EMAState:
        """Returns a state from the middle of a run.

        Its counts go from 0 to a few, and its means match them.
        """
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
        """Returns the checks of the state that an implementation made, and that state.

        If the new state is wrong, returns the former state instead.
        """
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
    """The inputs of one move of the averages."""

    state: EMAState
    latents: Array
    indices: Array
    decay: float
    epsilon: float

    def copied(self) -> Given:
        return copy.deepcopy(self)


class Move(ABC):
    """A way to move the averages.

    ``call`` asks the implementation. ``judge`` compares its answer with the oracle's.
    """

    name: str

    def __init__(self, kit: Kit) -> None:
        self.kit = kit

    @abstractmethod
    def call(self, given: Given) -> Any: ...

    @abstractmethod
    def judge(self, found: Any, given: Given) -> tuple[list[Check], EMAState]:
        """Returns the checks and the implementation's new state, or the former if that is wrong."""

    @abstractmethod
    def arrays(self, found: Any) -> tuple[Array, ...]:
        """Returns all arrays of an answer."""

    def moved(self, given: Given) -> tuple[list[Check], EMAState]:
        """Judges one call with copies of the inputs."""
        return self.judge(self.call(given.copied()), given)


class Updating(Move):
    """Moves the averages by ``update``, which is given the indices."""

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
    """Moves the averages by ``step``, which finds the indices itself.

    The indices are judged first. If they are right, the averages are judged by them.
    """

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
    """Returns codebook, ema_count and ema_means of an EMAState, or of three arrays."""
    if isinstance(state, EMAState):
        return state.codebook, state.ema_count, state.ema_means
    codebook, count, means = state
    return np.asarray(codebook), np.asarray(count), np.asarray(means)


def _of(latents: Array, codebook: Array, checks: Iterable[Check]) -> list[Check]:
    """Adds the sizes that were judged to the names of the checks."""
    n, s, d = latents.shape
    sizes = f"of {n} x {s} latents, K {len(codebook)}, D {d}"
    return [dataclasses.replace(check, stage=f"{check.stage} {sizes}") for check in checks]


def equal(name: str, found: Array, expected: Array) -> Check:
    """Returns the check of two arrays that must be equal to the last bit."""
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
    """Yields the same values in other memory layouts, each with a name.

    Other values lie between them in memory.
    """
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
