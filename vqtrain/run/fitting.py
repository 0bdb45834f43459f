"""Checks that a snapshot fits this run: every entry is there, with the right shape and type.

The digest shows only that a snapshot is as written, not who wrote it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqref.errors import InputError
from vqref.host.streams import plain
from vqref.modelfile import require_plain
from vqref.spec import NETWORKS, ModelSpec
from vqtrain.optimizers import MAKERS, is_matrix
from vqtrain.run.metrics import MEASURED, Fidelity, Metrics

DEVICES_OWN = ("lr", "fused", "capturable", "foreach")
"""Entries of an optimizer's group that depend on the device. They are not loaded."""


def require_course(state: Mapping[str, Any]) -> None:
    """Raises InputError unless a snapshot has a course and says whether the run is finished."""
    require_like("course", state.get("course"), {}, known=False)
    require_plain("course", state["course"])
    require_like("finished", state.get("finished"), False)


def require_fitting(state: Mapping[str, Any], spec: ModelSpec, optimizer: str) -> None:
    """Raises InputError that names the first entry of a snapshot that does not fit.

    spec: of the run. optimizer: its name, one of ``vqtrain.options.OPTIMIZERS``.
    """
    entries = {name: value for name, value in state.items() if name not in ("course", "history")}
    expected = _expected(spec, optimizer)
    if entries.get("epoch") == entries.get("step") == 0:
        moved = entries.get("optimizer")
        if isinstance(moved, dict) and moved.get("state") == {}:
            expected["optimizer"]["state"] = {}  # it has taken no step
    require_like("", entries, expected)
    for name in ("order", "choices"):
        _require_generator(name, state[name])
    _require_counts(state, spec)
    _require_history(state.get("history"), state["epoch"], spec)


def _expected(spec: ModelSpec, optimizer: str) -> dict[str, Any]:
    """Returns what a snapshot of ``spec`` has: tensors, here without values, and zeros."""
    learned = [p.shape for p in spec.parameters if p.name.split(".")[0] in NETWORKS]
    moments = {
        i: {"exp_avg": _tensor(shape)}
        if optimizer == "muon" and is_matrix(shape)
        else {"step": _tensor(()), "exp_avg": _tensor(shape), "exp_avg_sq": _tensor(shape)}
        for i, shape in enumerate(learned)
    }
    made = MAKERS[optimizer]([torch.zeros(1)], 1.0, (0.0, 0.0), 1.0, False)
    group = made.state_dict()["param_groups"][0]
    generator = _tensor(torch.Generator().get_state().shape, torch.uint8)
    return {
        "model": {p.name: _tensor(p.shape) for p in spec.parameters},
        "quantizer_steps": _tensor((), torch.int64),
        "optimizer": {
            "state": moments,
            "param_groups": [group | {"params": list(range(len(learned)))}],
        },
        "choices": generator,
        "order": generator,
        "meter": {
            "count": 0,
            "sums": _tensor((4,), torch.float64),
            "hits": _tensor((spec.num_codes,), torch.int64),
        },
        "epoch": 0,
        "step": 0,
        "seconds": 0.0,
        "finished": False,
    }


def _tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def require_like(name: str, found: Any, expected: Any, *, known: bool = True) -> None:
    """Raises InputError unless ``found`` has the types, keys, lengths and shapes of ``expected``.

    known: whether to refuse keys that ``expected`` lacks.
    """
    if isinstance(expected, Tensor):
        _require_tensor(name, found, expected)
        return
    kind = dict if isinstance(found, dict) else type(found)  # a dictionary may be an ordered one
    if kind is not type(expected):
        raise _misfit(name, kind.__name__, type(expected).__name__)
    if isinstance(expected, dict):
        if known and (unknown := [key for key in found if key not in expected]):
            raise InputError(f"its entry {_joined(name, unknown[0])} is not known")
        for key, value in expected.items():
            if key not in found:
                raise InputError(f"its entry {_joined(name, key)} is missing")
            if key not in DEVICES_OWN:
                require_like(_joined(name, key), found[key], value)
    elif isinstance(expected, list | tuple):
        if len(found) != len(expected):
            raise _misfit(name, f"{len(found)} values", f"{len(expected)}")
        for i, value in enumerate(expected):
            require_like(_joined(name, i), found[i], value)


def _require_tensor(name: str, found: Any, expected: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise _misfit(name, type(found).__name__, "a tensor")
    if found.shape != expected.shape:
        raise _misfit(name, f"shape {tuple(found.shape)}", f"{tuple(expected.shape)}")
    if found.dtype != expected.dtype:
        raise _misfit(name, f"{found.dtype}", f"{expected.dtype}")
    if found.layout != torch.strided or found.is_meta:
        raise InputError(f"its entry {name} is a tensor without values of its own")


def _require_generator(name: str, state: Tensor) -> None:
    """Raises InputError for bytes that are not the state of a generator."""
    try:
        torch.Generator().set_state(state.cpu())
    except RuntimeError:
        raise InputError(f"its entry {name} is not the state of a generator") from None


def _require_counts(state: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raises InputError for impossible counts, and for counts that contradict each other."""
    meter = state["meter"]
    steps, count, hits = state["step"], meter["count"], meter["hits"]
    for name, value in (("epoch", state["epoch"]), ("step", steps), ("meter.count", count)):
        if not 0 <= value < 2**63:
            raise InputError(f"its entry {name} is {value}, expected a count")
    if not (math.isfinite(state["seconds"]) and state["seconds"] >= 0):
        raise InputError(f"its entry seconds is {state['seconds']}, expected a time")
    if state["quantizer_steps"] < 0:
        raise InputError(
            f"its entry quantizer_steps is {state['quantizer_steps']}, expected a count"
        )
    if bool(steps) != bool(count) or (steps and count % steps):
        raise InputError(f"its entry meter.count is {count} after {steps} steps")
    if hits.min() < 0 or int(hits.sum()) != count * spec.latent_size:
        raise InputError(
            f"its entry meter.hits adds up to {int(hits.sum())}, expected "
            f"{count} x {spec.latent_size}"
        )


def _require_history(history: Any, epochs: int, spec: ModelSpec) -> None:
    """Raises InputError unless each epoch has a line with every measure."""
    if type(history) is not list:
        raise _misfit("history", type(history).__name__, "list")
    if len(history) != epochs:
        raise _misfit("history", f"{len(history)} lines", f"{epochs}")
    require_plain("history", history)
    measures = Metrics(0.0, 0.0, 0.0, 0.0, np.ones(1, np.int64)).to_dict(spec)
    faithful = [*measures, *(field.name for field in dataclasses.fields(Fidelity))]
    for i, line in enumerate(history):
        name = f"history.{i}"
        _require_numbers(name, line, [*measures, "epoch", "images_per_second"])
        if line["epoch"] != i + 1:
            raise InputError(f"its entry {name}.epoch is {line['epoch']}, expected {i + 1}")
        for key in MEASURED:
            if key in line:
                _require_numbers(f"{name}.{key}", line[key], faithful)


def _require_numbers(name: str, found: Any, keys: list[str]) -> None:
    """Raises InputError unless ``found`` is a dictionary with a number under each of ``keys``."""
    if not isinstance(found, dict):
        raise _misfit(name, type(found).__name__, "dict")
    for key in keys:
        if type(found.get(key)) not in (int, float):
            raise InputError(f"its entry {name}.{key} is missing or not a number")


def _misfit(name: str, found: str, expected: str) -> InputError:
    return InputError(f"its entry {name} has {found}, expected {expected}")


def _joined(name: str, key: Any) -> str:
    return f"{name}.{plain(str(key))[:60]}".lstrip(".")
