"""Packages that import their names at first use.

So a command line can answer, and be interrupted, before numpy or PyTorch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec


def lazy(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Returns the functions ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    homes: maps each public name to its place in the package, "module.attribute". Other names may be
    those of modules.
    """

    def attribute(name: str) -> object:
        module, _, named = homes.get(name, "").rpartition(".")
        if named:
            found: object = getattr(import_module(f"{package}.{module}"), named)
        elif not name.startswith("_") and find_spec(f"{package}.{name}"):
            found = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(import_module(package), name, found)  # the next time, Python finds it by itself
        return found

    def names() -> list[str]:
        return sorted({*vars(import_module(package)), *homes})

    return attribute, names
