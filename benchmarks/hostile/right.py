"""Right quantizers and averages in many forms, none of which may be refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

import vqref
from benchmarks.hostile.mutants import Plain, Single, exact, expanded
from vqref.checks import QuantizerCheck, quantizer_checks
from vqref.dialects import DIALECTS, POST, Dialect
from vqref.quantizer import EMAState
from vqref.validation import Array
from vqtrain import nearest as search
from vqtrain import quantizer as trained


def by_elements(latents: Array, codebook: Array, *, backwards: bool = False) -> Array:
    """Adds squares one after the other."""
    total = np.zeros((*latents.shape[:2], len(codebook)), latents.dtype)
    for j in range(codebook.shape[1])[:: -1 if backwards else 1]:
        total += np.square(latents[:, :, None, j] - codebook[:, j])
    return total


def by_product_of_differences(latents: Array, codebook: Array) -> Array:
    apart = latents[:, :, None] - codebook
    return np.asarray(np.einsum("nskd,nskd->nsk", apart, apart))


def in_blocks(latents: Array, codebook: Array) -> Array:
    """Takes 1,000 latents and 37 codes at a time."""
    rows = latents.reshape(-1, 1, latents.shape[-1])
    best = np.full(len(rows), np.inf, latents.dtype)
    found = np.zeros(len(rows), np.int64)
    for start, first in itertools.product(range(0, len(rows), 1000), range(0, len(codebook), 37)):
        part = slice(start, start + 1000)
        distances = exact(rows[part], codebook[first : first + 37])[:, 0]
        better = distances.min(-1) < best[part]
        found[part] = np.where(better, first + distances.argmin(-1), found[part])
        best[part] = np.where(better, distances.min(-1), best[part])
    return found.reshape(latents.shape[:2])


def with_rows(nearest: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    def quantize(latents: Array, codebook: Array) -> Any:
        indices = nearest(latents, codebook)
        return indices, codebook[indices]

    return quantize


def chosen(distances: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    return with_rows(lambda latents, codebook: distances(latents, codebook).argmin(-1))


def in_torch(nearest: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    return with_rows(
        lambda latents, codebook: nearest(
            torch.from_numpy(np.ascontiguousarray(latents)),
            torch.from_numpy(np.ascontiguousarray(codebook)),
        ).numpy()
    )


def by_products(latents: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    rows = latents.reshape(-1, latents.shape[-1])
    return search.by_products(rows, codebook).reshape(latents.shape[:2])


def oracle(latents: Array, codebook: Array) -> Any:
    found = vqref.quantize(latents, codebook)
    return found.indices, found.quantized.astype(latents.dtype)


Right = Mapping[str, tuple[Callable[[Array, Array], Any], str, str]]


def right_quantizers() -> Right:
    """Returns right quantizers by name, with their precision and form."""
    from benchmarks.agreement import computed

    def arithmetic(precision: str, form: str) -> Callable[[Array, Array], Any]:
        def nearest(latents: Array, codebook: Array) -> Array:
            rows = np.ascontiguousarray(latents.reshape(-1, 1, latents.shape[-1]))
            distances = computed(rows, np.ascontiguousarray(codebook), precision, form)
            return np.asarray(distances.argmin(-1).numpy()).reshape(latents.shape[:2])

        return with_rows(nearest)

    single = {
        "all at once": chosen(exact),
        "element after element": chosen(by_elements),
        "the last element first": chosen(lambda x, c: by_elements(x, c, backwards=True)),
        "a product of differences": chosen(by_product_of_differences),
        "in blocks": with_rows(in_blocks),
        "in float64": chosen(lambda x, c: exact(x.astype(float), c.astype(float))),
        "the trainer's": in_torch(search.nearest),
        "the trainer's, by products": in_torch(by_products),
        "the oracle": oracle,
    }
    return {
        **{name: (quantize, "float32", "direct") for name, quantize in single.items()},
        "the oracle in float64": (oracle, "float64", "direct"),
        "a matrix product": (chosen(expanded), "float32", "expanded"),
        **{
            f"{precision}, {form}": (arithmetic(precision, form), precision, form)
            for precision, form in itertools.product(
                ("float64", "float32", "tf32", "bfloat16", "float16"),
                ("direct", "direct root", "expanded", "expanded root"),
            )
        },
    }


class OneHot(Plain):
    """Sums by a product with a one-hot matrix."""

    def sums(self, latents: Array, indices: Array, k: int) -> Array:
        rows = latents.reshape(-1, latents.shape[-1])
        parts = [slice(start, start + 4096) for start in range(0, len(rows), 4096)]
        ones = (
            np.equal.outer(np.arange(k), indices.ravel()[part]).astype(Single) for part in parts
        )
        products = [one @ rows[part] for one, part in zip(ones, parts, strict=True)]
        return sum(products, np.zeros((k, latents.shape[-1]), Single))


class Sorted(Plain):
    """Sorts by code, and sums each run in pairs."""

    def sums(self, latents: Array, indices: Array, k: int) -> Array:
        order = np.argsort(indices.ravel(), kind="stable")
        rows = latents.reshape(-1, latents.shape[-1])[order]
        ends = np.searchsorted(indices.ravel()[order], np.arange(k + 1))
        parts = itertools.pairwise(ends)
        return np.stack([np.sum(rows[a:b], axis=0, dtype=Single) for a, b in parts])


def right_averages(dialect: Dialect) -> Mapping[str, Callable[..., Any]]:
    def in_float64(state: EMAState, latents: Array, indices: Array, *options: Any) -> EMAState:
        decay, epsilon = options
        return vqref.update_ema(state, latents, indices, decay, epsilon, dialect)

    def the_oracle(*given: Any) -> Any:
        after = in_float64(*given)
        return tuple(a.astype(Single) for a in (after.codebook, after.ema_count, after.ema_means))

    def the_trainers(state: EMAState, latents: Array, indices: Array, *options: Any) -> Any:
        held = state.codebook, state.ema_count, state.ema_means
        single = (np.float32(array) for array in held)
        given = (*single, np.ascontiguousarray(latents), np.ascontiguousarray(indices))
        tensors = map(torch.from_numpy, given)
        arguments: list[Any] = [*tensors, *options, dialect, state.steps]
        found = trained.update_ema(*arguments)
        return tuple(tensor.numpy() for tensor in found)

    plain = {"one by one": Plain, "one-hot": OneHot, "sorted": Sorted}
    return {
        **{name: type(name, (of,), {"dialect": dialect})().update for name, of in plain.items()},
        "the oracle": the_oracle,
        "the trainer's": the_trainers,
        "in float64": in_float64,
    }


def stepping(quantize: Callable[[Array, Array], Any], update: Callable[..., Any]) -> Any:
    def step(state: EMAState, latents: Array, decay: float, epsilon: float) -> Any:
        indices, quantized = quantize(latents, state.codebook.astype(latents.dtype))
        return indices, quantized, update(state, latents, indices, decay, epsilon)

    return step


SIZES = ((64, 16), (9, 3), (61, 7), (100, 1), (256, 8), (16, 33))


def right(seed: int, **sizes: Any) -> Iterator[tuple[str, list[QuantizerCheck]]]:
    """Runs the checks of every right quantizer, and of averages and steps of every right update.

    Updates are tried in every dialect; sizes take turns.

    sizes: of all codebooks instead, as ``quantizer_checks`` takes them.
    """
    turns = itertools.cycle({"num_codes": k, "code_size": d} for k, d in SIZES)
    quantizers = right_quantizers()
    for name, (quantize, precision, form) in quantizers.items():
        options = {**next(turns), **sizes, "precision": precision, "form": form, "seed": seed}
        checks = quantizer_checks(quantize, **options)
        yield f"{name}, K {options['num_codes']}, D {options['code_size']}", checks
    for dialect, name in itertools.product(DIALECTS.values(), right_averages(POST)):
        kind = "the oracle in float64" if name == "in float64" else "all at once"
        quantize, precision, _ = quantizers[kind]
        options = {**next(turns), **sizes, "precision": precision, "seed": seed}
        update = right_averages(dialect)[name]
        step = stepping(quantize, update)
        done = len(quantizer_checks(quantize, **options))
        checks = quantizer_checks(quantize, update, step, dialect=dialect, **options)
        title = f"averages {name}, {dialect.name}, K {options['num_codes']}"
        yield title, checks[done:]
