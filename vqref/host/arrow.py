"""The one place from which all modules get pyarrow's parquet."""

from __future__ import annotations

from functools import cache
from typing import Any

from vqref.host.extras import missing

LARGEST_FOOTER = 2**24
"""Limits for the metadata of a parquet file: characters of a text, and entries of a list."""

FOOTER = dict.fromkeys(("thrift_string_size_limit", "thrift_container_size_limit"), LARGEST_FOOTER)
"""Options to open files from outside with. They limit the memory that a footer can take."""


@cache
def parquet() -> tuple[Any, Any]:
    """Returns pyarrow and its parquet module. Raises MachineError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    return pyarrow, pyarrow.parquet
