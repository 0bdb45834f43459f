"""Training in bfloat16: casts all parameters of the networks at once, and their gradients back.

Autocast casts each parameter and gradient separately, in about a hundred small operations per step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vqtrain.network import Network, Row


class HalfCopies:
    """bfloat16 copies of networks' parameters, made once and filled at each step."""

    def __init__(self, networks: Iterable[Network]) -> None:
        rows = [row for network in networks for row in network.modules() if isinstance(row, Row)]
        self._rows: list[tuple[Row, list[Tensor]]] = []
        self._full: list[Tensor] = []
        for row in rows:
            own = list(row.parameters(recurse=False))
            copies = [torch.empty_like(p, dtype=torch.bfloat16).requires_grad_() for p in own]
            self._rows.append((row, copies))
            self._full += own
        self._copies = [copy for _, copies in self._rows for copy in copies]
        self._gradients = [torch.empty_like(parameter) for parameter in self._full]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Makes the networks compute with copies of the present parameters."""
        with torch.no_grad():
            torch._foreach_copy_(self._copies, self._full)
        for copy in self._copies:
            copy.grad = None
        for row, copies in self._rows:
            row.copies = copies
        try:
            yield
        finally:
            for row, _ in self._rows:
                row.copies = ()

    def hand_gradients_back(self, *, add: bool = False) -> None:
        """Gives each parameter the gradient of its copy, in its own precision.

        add: whether to add it, in that precision, to the parameter's earlier gradient; else it
        replaces that gradient.
        """
        found = [torch.zeros_like(c) if c.grad is None else c.grad for c in self._copies]
        if add:
            torch._foreach_add_(self._gradients, [each.float() for each in found])
        else:
            torch._foreach_copy_(self._gradients, found)
        for parameter, gradient in zip(self._full, self._gradients, strict=True):
            parameter.grad = gradient
