"""A kit that holds anybody's quantizer to the oracle: named checks, each of which runs by itself.

All of them at once, with a ParityError that names what failed:

    vqref.checks.check_quantizer(quantize, update)

Each as a test of its own:

    @pytest.mark.parametrize("check", vqref.checks.quantizer_checks(quantize, update), ids=str)
    def test_quantizer(check):
        check.run().require()

An implementation takes NumPy arrays and returns anything that ``np.asarray`` takes; an adapter is
the caller's to write.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from vqref.agreement.bounds import array_dtype, require_bound
from vqref.agreement.parity import check_indices
from vqref.agreement.report import Check, Report, merge
from vqref.agreement.stages import STATE, check_ema, check_quantized
from vqref.checks.adversary import CASES
from vqref.dialects import POST, Dialect
from vqref.errors import ParityError
from vqref.quantizer import EMAState
from vqref.quantizer import quantize as quantize_exactly
from vqref.validation import Array

Quantize = Callable[[Array, Array], Any]
Update = Callable[[EMAState, Array, Array, float, float], Any]
Step = Callable[[EMAState, Array, float, float], tuple[Any, Any, Any]]

LATENTS = 4096
"""Latents of each case: enough for distances rounded to 11 bits to flip a certified index."""

STEPS = 100
"""How many updates in a row are held to the oracle."""


@dataclass(frozen=True)
class QuantizerCheck:
    """One named check. ``run`` returns what it found; if the implementation raises, that is a
    violation that says so."""

    name: str
    _compare: Callable[[], Iterable[Check]]
    _precision: str

    def run(self) -> Check:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # some cases are meant to overflow
                return merge(self.name, self._precision, tuple(self._compare()))
        except Exception as error:  # whatever somebody's implementation raises
            return Check(
                self.name, self._precision, 1, 1, problem=f"{type(error).__name__}: {error}"
            )

    def __str__(self) -> str:
        return self.name


def check_quantizer(
    quantize: Quantize, update: Update | None = None, step: Step | None = None, **options: Any
) -> Report:
    """Runs every check of ``quantizer_checks``, whose arguments these are.

    Raises ParityError that names the failed checks and carries the report, and ValueError for a
    precision, form or sizes that have no bound.
    """
    report = Report(
        tuple(check.run() for check in quantizer_checks(quantize, update, step, **options))
    )
    if failed := [check.stage for check in report.failures]:
        raise ParityError(f"{', '.join(failed)} failed; the first: {report.failures[0]}", report)
    return report


def quantizer_checks(
    quantize: Quantize,
    update: Update | None = None,
    step: Step | None = None,
    *,
    precision: str = "float32",
    form: str = "direct",
    dialect: Dialect = POST,
    num_codes: int = 64,
    code_size: int = 16,
    seed: int = 0,
) -> list[QuantizerCheck]:
    """The checks of an implementation, with those of ``update`` and ``step`` if they are given.

    quantize: takes latents (N, S, D) and a codebook (K, D), returns indices (N, S) int64, or those
        and quantized (N, S, D).
    update: takes (state, latents, indices, decay, epsilon), returns the EMAState after it, or its
        codebook, ema_count and ema_means.
    step: takes (state, latents, decay, epsilon), returns indices, quantized and the state after:
        all that a training step does in the quantizer.
    precision, form: those in which distances are computed, names of
        ``vqref.precisions.PRECISIONS`` and ``vqref.agreement.bounds.FORMS``.
    dialect: of the moving averages.
    num_codes, code_size: K >= 4 and D of every codebook in the checks, for implementations of fixed
        sizes.
    seed: of everything that is drawn.

    Raises ValueError for a precision, form or sizes that have no bound.
    """
    require_bound(code_size, precision, form)
    if num_codes < 4:
        raise ValueError(f"num_codes is {num_codes}, expected at least 4")
    kit = _Kit(quantize, update, step, precision, form, dialect, num_codes, code_size, seed)
    named: dict[str, Callable[[], Iterable[Check]]] = {
        name: partial(kit.case, name) for name in CASES
    }
    named |= {
        "exact_ties": kit.exact_ties,
        "positions": kit.positions,
        "empty_batch": kit.empty_batch,
        "one_latent": kit.one_latent,
        "fresh_codebook": kit.fresh_codebook,
        "inputs_kept": kit.inputs_kept,
    }
    if update is not None:
        named |= {
            "first_step": kit.first_step,
            "one_step": kit.one_step,
            "never_hit": kit.never_hit,
            "one_takes_all": kit.one_takes_all,
            "foreign_indices": kit.foreign_indices,
            "large_epsilon": kit.large_epsilon,
            "decay_zero": kit.decay_zero,
            "no_latents": kit.no_latents,
            "hundred_steps": kit.hundred_steps,
            "state_kept": kit.state_kept,
        }
        if not dialect.debiased:  # which divides by 1 - decay
            named["decay_one"] = kit.decay_one
    if step is not None:
        named["order"] = kit.order
    return [QuantizerCheck(name, compare, precision) for name, compare in named.items()]


@dataclass(frozen=True)
class _Kit:
    """An implementation, and the sizes and arithmetic in which it is checked. Each check is a
    method."""

    quantize: Quantize
    update: Update | None
    step: Step | None
    precision: str
    form: str
    dialect: Dialect
    num_codes: int
    code_size: int
    seed: int

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def _held(self, array: npt.ArrayLike) -> Array:
        return np.asarray(array).astype(array_dtype(self.precision))

    def _judge(self, latents: Array, codebook: Array) -> Iterable[Check]:
        found = self.quantize(latents.copy(), codebook.copy())
        if isinstance(found, tuple):
            indices, quantized = map(np.asarray, found)
            return check_quantized(
                indices, quantized, latents, codebook, precision=self.precision, form=self.form
            )
        return [
            check_indices(
                np.asarray(found), latents, codebook, precision=self.precision, form=self.form
            )
        ]

    def case(self, name: str) -> Iterable[Check]:
        """A case of ``vqref.checks.adversary``."""
        return self._judge(
            *CASES[name](self._rng(), LATENTS, self.num_codes, self.code_size, self.precision)
        )

    def exact_ties(self) -> Iterable[Check]:
        """Numbers with which every operation is exact in any precision and form: the lowest index
        must win a tie."""
        rng = self._rng()
        rows = self._held(rng.integers(-1, 2, (self.num_codes // 2, self.code_size)))
        codebook = rows[np.arange(self.num_codes) % len(rows)]
        latents = self._held(rng.integers(-1, 2, (LATENTS, 1, self.code_size)))
        return [
            _equal(
                "indices",
                self._indices(latents, codebook),
                quantize_exactly(latents, codebook).indices,
            )
        ]

    def positions(self) -> Iterable[Check]:
        """Several latents per image, N and S different: (N, S, D) in, (N, S) out."""
        rng = self._rng()
        shape = (7, 5, self.code_size)
        return self._judge(
            self._held(rng.normal(size=shape)),
            self._held(rng.normal(size=(self.num_codes, self.code_size))),
        )

    def empty_batch(self) -> Iterable[Check]:
        """No latents in, no indices out."""
        return self._judge(
            self._held(np.zeros((0, 3, self.code_size))),
            self._held(self._rng().normal(size=self._codes)),
        )

    def one_latent(self) -> Iterable[Check]:
        """A batch of one."""
        rng = self._rng()
        return self._judge(
            self._held(rng.normal(size=(1, 1, self.code_size))),
            self._held(rng.normal(size=self._codes)),
        )

    def fresh_codebook(self) -> Iterable[Check]:
        """Two codebooks, one after the other: nothing of the first may be remembered."""
        rng = self._rng()
        latents, first, second = (
            self._held(rng.normal(size=size))
            for size in ((99, 1, self.code_size), *2 * [self._codes])
        )
        return [*self._judge(latents, first), *self._judge(latents, second)]

    def inputs_kept(self) -> Iterable[Check]:
        """Latents and codebook must stay as they were, and the same call must give the same
        again."""
        rng = self._rng()
        latents, codebook = (
            self._held(rng.normal(size=(99, 1, self.code_size))),
            self._held(rng.normal(size=self._codes)),
        )
        given = latents.copy(), codebook.copy()
        first = self._indices(*given, keep=True)
        yield _equal("latents", given[0], latents)
        yield _equal("codebook", given[1], codebook)
        yield _equal("indices", self._indices(latents, codebook), first)

    @property
    def _codes(self) -> tuple[int, int]:
        return self.num_codes, self.code_size

    def _indices(self, latents: Array, codebook: Array, *, keep: bool = False) -> Array:
        given = (latents, codebook) if keep else (latents.copy(), codebook.copy())
        found = self.quantize(*given)
        return np.asarray(found[0] if isinstance(found, tuple) else found)

    def _start(self) -> EMAState:
        rng = self._rng()
        means = self._held(rng.normal(size=self._codes)) if self.dialect.means == "own" else None
        return EMAState.start(self._held(rng.normal(size=self._codes)), self.dialect, means)

    def _midway(self) -> EMAState:
        """A state as in the middle of a run: counts from nothing to a few, and means that belong to
        them."""
        rng = self._rng()
        count = self._held(rng.uniform(0, 4, self.num_codes) * rng.integers(0, 3, self.num_codes))
        codebook = self._held(rng.normal(size=self._codes))
        return EMAState(codebook, count, self._held(codebook * count[:, None]), steps=7)

    def _updated(
        self,
        state: EMAState,
        latents: Array,
        indices: Array,
        decay: float | None = None,
        epsilon: float | None = None,
    ) -> tuple[list[Check], EMAState]:
        """The checks of one update of the implementation, and the state that it made."""
        assert self.update is not None
        decay = self.dialect.decay if decay is None else decay
        epsilon = self.dialect.epsilon if epsilon is None else epsilon
        found = _arrays(
            self.update(copy.deepcopy(state), latents.copy(), indices.copy(), decay, epsilon)
        )
        return self._judge_state(found, state, latents, indices, decay, epsilon)

    def _judge_state(
        self,
        found: tuple[Array, Array, Array],
        state: EMAState,
        latents: Array,
        indices: Array,
        decay: float,
        epsilon: float,
    ) -> tuple[list[Check], EMAState]:
        precision = "float64" if self.precision == "float64" else "float32"
        checks = check_ema(
            found,
            state,
            latents,
            indices,
            precision=precision,
            decay=decay,
            epsilon=epsilon,
            dialect=self.dialect,
        )
        return list(checks), EMAState(*found, steps=state.steps + 1)

    def _batch(self, rng: np.random.Generator, codes: Sequence[int] | Array) -> tuple[Array, Array]:
        """Latents (33, 3, D), and indices (33, 3) of ``codes`` that are not the nearest ones."""
        return self._held(rng.normal(size=(33, 3, self.code_size))), rng.choice(
            np.asarray(codes), (33, 3)
        )

    def first_step(self) -> Iterable[Check]:
        """One update of the state from which the dialect starts."""
        return self._updated(self._start(), *self._batch(self._rng(), range(self.num_codes)))[0]

    def one_step(self) -> Iterable[Check]:
        """One update of a state in the middle of a run."""
        return self._updated(self._midway(), *self._batch(self._rng(), range(self.num_codes)))[0]

    def never_hit(self) -> Iterable[Check]:
        """Half of the codes are never hit in the first three steps."""
        return self._several(self._start(), 3, np.arange(self.num_codes // 2))

    def one_takes_all(self) -> Iterable[Check]:
        """Every latent hits the same code: hits must be summed, not set."""
        return self._updated(self._midway(), *self._batch(self._rng(), [self.num_codes - 1]))[0]

    def foreign_indices(self) -> Iterable[Check]:
        """The indices given decide, not the nearest codes."""
        state = self._midway()
        latents = np.resize(state.codebook, (self.num_codes, 1, self.code_size))
        indices = np.roll(np.arange(self.num_codes), 1)[:, None]
        return self._updated(state, self._held(latents), indices)[0]

    def large_epsilon(self) -> Iterable[Check]:
        """An epsilon large enough to show."""
        return self._updated(
            self._midway(), *self._batch(self._rng(), range(self.num_codes)), epsilon=0.5
        )[0]

    def decay_zero(self) -> Iterable[Check]:
        """Only this step counts."""
        return self._updated(
            self._midway(), *self._batch(self._rng(), range(self.num_codes)), decay=0.0
        )[0]

    def decay_one(self) -> Iterable[Check]:
        """This step does not count."""
        return self._updated(
            self._midway(), *self._batch(self._rng(), range(self.num_codes)), decay=1.0
        )[0]

    def no_latents(self) -> Iterable[Check]:
        """An empty batch only decays the averages."""
        return self._updated(
            self._midway(), self._held(np.zeros((0, 3, self.code_size))), np.zeros((0, 3), np.int64)
        )[0]

    def hundred_steps(self) -> Iterable[Check]:
        """A hundred updates, each judged from the implementation's own state, so that only one
        step's rounding is allowed however long the run."""
        return self._several(self._start(), STEPS, np.arange(self.num_codes))

    def _several(self, state: EMAState, steps: int, codes: Array) -> Iterable[Check]:
        rng = self._rng()
        for _ in range(steps):
            checks, state = self._updated(state, *self._batch(rng, codes))
            yield from checks

    def state_kept(self) -> Iterable[Check]:
        """State, latents and indices must stay as they were."""
        assert self.update is not None
        state, (latents, indices) = self._midway(), self._batch(self._rng(), range(self.num_codes))
        given, held, chosen = copy.deepcopy(state), latents.copy(), indices.copy()
        self.update(given, held, chosen, self.dialect.decay, self.dialect.epsilon)
        for name in STATE:
            yield _equal(name, getattr(given, name), getattr(state, name))
        yield _equal("latents", held, latents)
        yield _equal("indices", chosen, indices)

    def order(self) -> Iterable[Check]:
        """A step must take indices and quantized from the codebook before the update, and update
        with the latents."""
        assert self.step is not None
        state, decay, epsilon = self._midway(), 0.5, self.dialect.epsilon
        latents = self._held(self._rng().normal(size=(33, 3, self.code_size)))
        indices, quantized, after = self.step(copy.deepcopy(state), latents.copy(), decay, epsilon)
        indices, codebook = np.asarray(indices), self._held(state.codebook)
        judged = list(
            check_quantized(
                indices,
                np.asarray(quantized),
                latents,
                codebook,
                precision=self.precision,
                form=self.form,
            )
        )
        yield from judged
        if judged[0].passed:
            yield from self._judge_state(_arrays(after), state, latents, indices, decay, epsilon)[0]


def _arrays(state: Any) -> tuple[Array, Array, Array]:
    """codebook, ema_count and ema_means of an EMAState, or of three arrays."""
    if isinstance(state, EMAState):
        return state.codebook, state.ema_count, state.ema_means
    codebook, count, means = state
    return np.asarray(codebook), np.asarray(count), np.asarray(means)


def _equal(name: str, found: Array, expected: Array) -> Check:
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
