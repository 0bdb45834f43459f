"""The PyTorch interpreter of a prior: the same rows and parameter names as ``vqref.prior``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqref.prior import LOGITS, PriorSpec
from vqref.validation import Params, check_params
from vqtrain.network import ACTIVATIONS, KINDS, Network, Row

Cache = dict[str, tuple[Tensor, Tensor]]
"""Keys and values (N, S, F), by the names of the attention rows; written in place."""


class Prior(nn.Module):
    """A prior whose ``state_dict`` has the spec's parameter names.

    params: values from ``vqref.init_params`` or a file. dropout: the share of values that training
    drops from the embedding and from what each branch adds.

    Raises ValueError for parameters that do not fit the spec.
    """

    def __init__(self, spec: PriorSpec, params: Params, dropout: float = 0.0) -> None:
        super().__init__()
        check_params(spec, params)
        self.spec, self.dropout = spec, dropout
        self.prior: nn.Module = Network(spec.rows) if spec.rows else nn.Module()
        if not spec.rows:
            shape = (spec.latent_size, spec.num_codes)
            self.prior.register_parameter(LOGITS.split(".")[1], nn.Parameter(torch.empty(shape)))
        added = {row.inputs[1] for row in spec.rows if row.kind == "add"}
        for row in self.prior.modules():
            if isinstance(row, Row) and (row.layer.name in added or row.layer.kind == "embedding"):
                row.register_forward_hook(self._dropped)
        values = {name: torch.from_numpy(np.asarray(array)) for name, array in params.items()}
        self.to(next(iter(values.values())).dtype).load_state_dict(values)

    def _dropped(self, row: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training)

    def forward(self, indices: Tensor) -> Tensor:
        """Returns log p (N, S, K) of every code at each position, given the indices before it.

        Indices are (N, S). The result has the parameters' precision, whatever the products use.
        """
        exact = next(self.parameters()).dtype
        if not self.spec.rows:
            logits = self.get_parameter(LOGITS).expand(len(indices), -1, -1)
        else:
            logits = self.prior(indices).to(exact)
        return F.log_softmax(logits, dim=-1)

    def nats(self, indices: Tensor) -> Tensor:
        """Returns the cost (N,) of indices (N, S) in nats."""
        log_p: Tensor = self(indices)
        return -log_p.gather(2, indices[..., None]).sum(dim=(1, 2))

    def begin(self, count: int) -> Cache:
        """Returns the cache before the first position, for ``count`` images."""
        like = next(self.parameters())
        return {
            row.name: (like.new_zeros(count, *row.in_shape), like.new_zeros(count, *row.in_shape))
            for row in self.spec.attention
        }

    @torch.no_grad()
    def step(self, previous: Tensor, position: int, cache: Cache) -> Tensor:
        """Returns log p (N, K) at one position, and adds its keys and values to the cache.

        previous: the indices (N,) at the position before; not used at position 0.
        """
        if not self.spec.rows:
            logits = self.get_parameter(LOGITS)[position].expand(len(previous), -1)
            return F.log_softmax(logits, dim=-1)
        assert isinstance(self.prior, Network)
        values: dict[int, Tensor] = {0: previous}
        for number, row in enumerate(self.prior.rows, 1):
            layer, inputs = row.layer, [values[source] for source in row.sources]
            if layer.kind == "embedding":
                weight, bias = row.parameters()
                y = bias[position] + (weight[previous] if position else 0 * weight[previous])
                y = y[:, None]
            elif layer.kind == "attention":
                q, k, v = inputs
                keys, kept = cache[layer.name]
                keys[:, position], kept[:, position] = k[:, 0], v[:, 0]
                seen = slice(position + 1)
                y = KINDS["attention"](layer, q, keys[:, seen], kept[:, seen])
            else:
                y = KINDS[layer.kind](layer, *inputs, *row.parameters())
            values[number] = ACTIVATIONS[layer.activation](y)
        return F.log_softmax(values[len(self.prior.rows)][:, 0], dim=-1)

    def params(self) -> dict[str, npt.NDArray[np.floating]]:
        """Returns copies of all parameters as NumPy arrays, by name, in the spec's order."""
        state = self.state_dict()
        names = [parameter.name for parameter in self.spec.parameters]
        return {name: state[name].cpu().numpy().copy() for name in names}
