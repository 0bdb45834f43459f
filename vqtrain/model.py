"""The trainable model: an encoder, a quantizer and a decoder from one ModelSpec."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from vqref.dialects import POST, Dialect
from vqref.spec import CODEBOOK, ModelSpec
from vqref.validation import Params, check_params
from vqtrain.half import HalfCopies
from vqtrain.nearest import nearest
from vqtrain.network import Network
from vqtrain.quantizer import Quantizer


class Forward(NamedTuple):
    """One pass: latents and quantized (N, S, D), indices (N, S) int64, outputs (N, P, H, W)."""

    latents: Tensor
    indices: Tensor
    quantized: Tensor
    outputs: Tensor


class VQVAE(nn.Module):
    """A model whose ``state_dict`` has the spec's parameter names.

    params: values from ``vqref.init_params`` or a file. dialect: the rule of the codebook's
    averages.

    Raises ValueError for parameters that do not fit the spec.
    """

    def __init__(self, spec: ModelSpec, params: Params, dialect: Dialect = POST) -> None:
        super().__init__()
        check_params(spec, params)
        self.spec = spec
        self.encoder = Network(spec.encoder)
        self.decoder = Network(spec.decoder)
        self.quantizer = Quantizer(spec, dialect)
        self._half: HalfCopies | None = None
        values = {name: torch.from_numpy(np.asarray(array)) for name, array in params.items()}
        self.to(values[CODEBOOK].dtype).load_state_dict(values)

    def forward(
        self, images: Tensor, choose: Callable[[Tensor, Tensor], Tensor] = nearest
    ) -> Forward:
        """Runs one pass; ``choose`` takes latents and codebook and returns the indices.

        The decoder gets ``quantized`` itself, and its gradient goes to ``latents``. This is the
        straight-through estimator latents + stop_gradient(quantized - latents), without its
        rounding. The networks may compute in less precision; distances and losses never do.
        """
        exact = self.quantizer.codebook.dtype
        latents = self.encoder(images).to(exact)
        indices, quantized = self.quantizer(latents, choose)
        straight_through = quantized + (latents - latents.detach())
        return Forward(latents, indices, quantized, self.decoder(straight_through).to(exact))

    def plain(self, images: Tensor) -> Forward:
        """Runs one pass in which the decoder gets the latents themselves, also as ``quantized``.

        The first steps use it, while the codebook has no useful values yet.
        """
        exact = self.quantizer.codebook.dtype
        latents = self.encoder(images).to(exact)
        indices, _ = self.quantizer(latents)
        return Forward(latents, indices, latents, self.decoder(latents).to(exact))

    def in_half(self) -> HalfCopies:
        """Returns bfloat16 copies of the networks' parameters, on the same device."""
        if self._half is None:
            self._half = HalfCopies((self.encoder, self.decoder))
        return self._half

    def params(self) -> dict[str, npt.NDArray[np.floating]]:
        """Returns copies of all parameters as NumPy arrays, by name, in the spec's order."""
        state = self.state_dict()
        names = [parameter.name for parameter in self.spec.parameters]
        return {name: state[name].cpu().numpy().copy() for name in names}
