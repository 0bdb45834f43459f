"""pyarrow's parquet, which whoever reads or writes such files asks for here."""

from __future__ import annotations

from functools import cache
from typing import Any

from vqref.host.extras import missing

LARGEST_FOOTER = 2**24
"""The longest text, and the most entries of a list, in what a parquet file says of itself."""

FOOTER = dict.fromkeys(("thrift_string_size_limit", "thrift_container_size_limit"), LARGEST_FOOTER)
"""How files from outside are opened: with limits on what a footer may ask memory for."""


@cache
def parquet() -> tuple[Any, Any]:
    """pyarrow and its parquet module. Raises MachineError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing(error) or error from None
    return pyarrow, pyarrow.parquet
