"""The device of a process: which one, what it may round, and how it keeps memory."""

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
"""glibc refuses a larger one."""


def choose_device(name: str) -> torch.device:
    """The device of ``--device``: auto, cpu or cuda. Raises MachineError for "cuda" without one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--device cuda: PyTorch finds no CUDA device here; use --device cpu or auto"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def choose_precision(device: torch.device) -> str:
    """What ``--precision auto`` means: bfloat16 if the device has instructions for it, else
    float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    found = any(bool(getattr(torch.cpu, name, bool)()) for name in known)
    return "bfloat16" if found else "float32"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Lets PyTorch compute with ``count`` threads; None leaves it its own choice."""
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

    cuDNN cuts factors to TF32 by default: a faster network, but not the one that is judged.

    one_size: every batch has the same size, so that cuDNN may try its algorithms and keep the
    fastest, unless PyTorch is asked to be deterministic.
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
    """Lets this process keep the arrays that it frees, for the next step.

    glibc gives an array of a few megabytes back to the system when it is freed; the next step then
    waits for as many pages to be cleared as it writes. On a processor that is a tenth of a step,
    and several times an activation's own time. Returns whether the C library is one that was asked.
    """
    return _keep(_LARGEST_THRESHOLD, 2**31 - 1)


@contextmanager
def kept_memory() -> Iterator[None]:
    """``keep_freed_memory`` for a while. Afterwards arrays are given back as glibc decides by
    itself once it has seen a large one freed, and what is free by then is given back."""
    asked = keep_freed_memory()
    try:
        yield
    finally:
        if asked:
            _keep(_LARGEST_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            ctypes.CDLL(None).malloc_trim(0)


def _keep(mapped: int, trimmed: int) -> bool:
    """Sets from how many bytes on glibc maps an array of its own, and beyond how many free ones it
    gives them back. Returns whether the C library is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, mapped) and mallopt(_TRIM_THRESHOLD, trimmed))
