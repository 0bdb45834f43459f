"""The device of a process: its choice, its rounding and its memory."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vqref.errors import MachineError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_THRESHOLD = 32 * 2**20
"""glibc refuses a larger threshold."""


def choose_device(name: str) -> torch.device:
    """Returns the device for auto, cpu or cuda. Raises MachineError for "cuda" without a card."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(device: torch.device) -> str:
    """Returns bfloat16 if the device has instructions for it, else float32.

    This is what ``--precision auto`` means.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = any(bool(getattr(torch.cpu, name, bool)()) for name in known)
    return "bfloat16" if found else "float32"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Makes PyTorch use ``count`` threads; None leaves the choice to PyTorch."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def without_variation() -> Iterator[None]:
    """Makes PyTorch refuse operations whose results vary from run to run."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    asked = _CUBLAS in os.environ
    os.environ.setdefault(_CUBLAS, ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        if not asked:
            os.environ.pop(_CUBLAS, None)


@contextmanager
def arithmetic(precision: str, *, one_size: bool = False) -> Iterator[None]:
    """Lets a card convolve in TF32 only if ``precision`` is "tf32".

    cuDNN rounds factors to TF32 by default. That is faster, but is not the network that the oracle
    checks.

    one_size: whether every batch has the same size. If so, cuDNN may try its algorithms and keep
    the fastest, unless PyTorch must be deterministic.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.backends.cudnn.flags(
        enabled=True,
        benchmark=one_size and not deterministic,
        deterministic=deterministic,
        allow_tf32=precision == "tf32",
    ):
        yield


def keep_freed_memory() -> bool:
    """Makes this process keep freed arrays for the next step. Returns whether it could.

    glibc returns an array of a few megabytes to the system when it is freed. The next step then
    waits until the system clears all pages that it writes. On a processor, this takes a tenth of a
    step, and several times as long as an activation itself. Only glibc has settings for this.
    """
    return _keep(_LARGEST_THRESHOLD, 2**31 - 1)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Applies ``keep_freed_memory`` within the context.

    Afterwards returns free memory to the system, and sets the thresholds that glibc itself chooses
    after a large array is freed.
    """
    asked = keep_freed_memory()
    try:
        yield
    finally:
        if asked:
            _keep(_LARGEST_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            ctypes.CDLL(None).malloc_trim(0)


def _keep(mapped: int, trimmed: int) -> bool:
    """Sets two of glibc's thresholds, in bytes. Returns whether the C library is glibc.

    From ``mapped`` bytes on, glibc maps an array separately. Beyond ``trimmed`` free bytes, it
    returns them.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, mapped) and mallopt(_TRIM_THRESHOLD, trimmed))
