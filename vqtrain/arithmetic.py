"""The arithmetic of a step and of a check: what PyTorch may round more coarsely than float32, and what not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def arithmetic(precision: str, *, one_size: bool = False) -> Iterator[None]:
    """Convolutions on a card in TF32 where ``precision`` is "tf32", and in float32 elsewhere: cuDNN cuts their factors to TF32
    by default, which is a faster network, not the one that is judged.

    one_size: every batch has the same size, so that cuDNN may try its algorithms and keep the fastest. Where PyTorch is asked
    to be deterministic, it may not.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=one_size and not deterministic, deterministic=deterministic, allow_tf32=precision == "tf32"
    ):
        yield
