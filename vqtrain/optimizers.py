"""The optimizers of encoder and decoder, by name: Adam, and Muon for their convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adam import adam as step_of_adam

FIRST_MOMENT = 0.9
"""The decay of Adam's mean gradient (beta1). No option changes it."""

MOMENTUM = 0.95
"""The decay of Muon's mean gradient."""

ROUNDS, QUINTIC = 5, (3.4445, -4.7750, 2.0315)
"""Rounds of Newton-Schulz, and the coefficients of x, x^3 and x^5 in each (Jordan et al. 2024).
Five rounds bring singular values from 0.003 to 1 times the norm to about 1 (0.7 to 1.2)."""

ADAMS_SIZE = 0.2
"""The root mean square of an element of Adam's steps at a rate of 1, roughly. Muon's steps are made
as large, so that both take the same learning rates (Liu et al. 2025)."""


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether Muon treats a parameter as a matrix: a convolution between several channels.

    Its rows are the first axis, the outputs of a convolution and the inputs of a transposed one.
    """
    return len(shape) == 4 and min(shape[:2]) > 1


class Muon(torch.optim.Optimizer):
    """Muon for the convolutions, Adam for everything else.

    Muon (Jordan et al. 2024) replaces each matrix's mean gradient by the nearest matrix with
    orthogonal rows, or columns. All directions of a layer then move equally fast.

    lr: a float, or a tensor () on a card. betas, eps: Adam's. capturable: whether a CUDA graph may
    hold a step.
    """

    def __init__(
        self,
        params: Sequence[Parameter],
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        capturable: bool,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "capturable": capturable})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes a step. Parameters without a gradient stay."""
        for group in self.param_groups:
            moved = [(p, p.grad) for p in group["params"] if p.grad is not None]
            for p, gradient in moved:
                if is_matrix(p.shape):
                    self._turn(p, gradient, group["lr"])
            self._adam([each for each in moved if not is_matrix(each[0].shape)], group)

    def _turn(self, p: Tensor, gradient: Tensor, rate: float | Tensor) -> None:
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        mean = state["exp_avg"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(mean, MOMENTUM).flatten(1)
        size = ADAMS_SIZE * max(ahead.shape) ** 0.5
        p.sub_(orthogonal(ahead).view(p.shape) * (rate * size))

    def _adam(self, moved: Sequence[tuple[Tensor, Tensor]], group: Mapping[str, Any]) -> None:
        """Moves parameters by their gradients, as PyTorch's fused Adam does."""
        params, gradients = [p for p, _ in moved], [gradient for _, gradient in moved]
        for p in params:
            if not self.state[p]:
                count = torch.zeros((), device=p.device if group["capturable"] else "cpu")
                zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                self.state[p].update(step=count, **zeros)
        names = ("exp_avg", "exp_avg_sq", "step")
        means, squares, steps = ([self.state[p][name] for p in params] for name in names)
        first, second = group["betas"]
        step_of_adam(
            params,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            capturable=group["capturable"],
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrix: Tensor) -> Tensor:
    """Returns about U V^T of a matrix U S V^T (M, N), by Newton-Schulz.

    Each round applies a polynomial in the matrix's product with itself. So the rounds work on
    products, whose sides are as long as the shorter side of the matrix.
    """
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    square, one = wide @ wide.T, torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    norm = square.trace().clamp(min=torch.finfo(wide.dtype).tiny)
    square, turn = square / norm, one
    a, b, c = QUINTIC
    for i in range(ROUNDS):
        factor = torch.addmm(a * one + b * square, square, square, alpha=c)
        turn = factor if i == 0 else factor @ turn
        if i < ROUNDS - 1:
            square = factor @ square @ factor
    turned = (turn @ wide) / norm.sqrt()
    return turned if wide is matrix else turned.T


def adam(
    params: Sequence[Parameter],
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    capturable: bool,
) -> torch.optim.Optimizer:
    """Returns PyTorch's fused Adam."""
    return torch.optim.Adam(params, lr=lr, betas=betas, eps=eps, fused=True, capturable=capturable)


MAKERS: Mapping[str, Callable[..., torch.optim.Optimizer]] = MappingProxyType(
    {"adam": adam, "muon": Muon}
)
"""Makes each optimizer of ``vqtrain.options.OPTIMIZERS``."""
