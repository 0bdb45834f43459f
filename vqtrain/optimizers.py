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

ROUNDS = (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
"""The coefficients of x, x^3 and x^5 in each round of Newton-Schulz. Each polynomial is the one
that stays nearest to 1 on what the rounds before make of 0.01 to 1 (Amsel et al. 2025). After all
three, singular values from 0.01 to 1 are from 0.73 to 1.27."""

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
            self._turn([each for each in moved if is_matrix(each[0].shape)], group["lr"])
            self._adam([each for each in moved if not is_matrix(each[0].shape)], group)

    def _turn(self, moved: Sequence[tuple[Tensor, Tensor]], rate: float | Tensor) -> None:
        """Moves matrices by about the nearest ones with orthogonal rows, or columns."""
        if not moved:
            return
        for p, _ in moved:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        means, gradients = [self.state[p]["exp_avg"] for p, _ in moved], [g for _, g in moved]
        torch._foreach_lerp_(means, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, means, MOMENTUM)
        wides = [_wide(a, p) for a, (p, _) in zip(ahead, moved, strict=True)]
        for side in {len(wide) for wide in wides}:
            same = [
                (wide, p) for wide, (p, _) in zip(wides, moved, strict=True) if len(wide) == side
            ]
            roots = inverse_roots(torch.stack([wide @ wide.T for wide, _ in same]))
            for root, (wide, p) in zip(roots, same, strict=True):
                size = ADAMS_SIZE * wide.shape[1] ** 0.5
                _wide(p, p).addmm_(root * (-size * rate), wide)

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


def _wide(tensor: Tensor, p: Tensor) -> Tensor:
    """Returns the matrix of a tensor of a parameter's shape, with its longer side as columns.

    The order of a row's elements follows the memory, for the nearest orthogonal matrix does not
    depend on it. The parameter's own matrix is a view.
    """
    rows = tensor if p.is_contiguous() else tensor.permute(0, 2, 3, 1)
    rows = rows.view(len(p), -1) if tensor is p else rows.reshape(len(p), -1)
    return rows if len(rows) <= rows.shape[1] else rows.T


def inverse_roots(squares: Tensor) -> Tensor:
    """Returns about x^-1/2 of each x = A A^T of (B, M, M), by Newton-Schulz.

    Its product with A is about U V^T where A is U S V^T. The norm that starts the rounds is of the
    8th powers of A's singular values: never below the largest of them, and nearer than their own.
    """
    trace = squares.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    trace = trace.clamp(min=torch.finfo(squares.dtype).tiny)
    squares = squares / trace
    bound: Tensor = torch.linalg.matrix_norm(squares @ squares, keepdim=True).sqrt()
    bound = bound.clamp(min=1 / squares.shape[1])
    squares, roots = squares / bound, trace.rsqrt() * bound.rsqrt()
    for i, (a, b, c) in enumerate(ROUNDS):
        factors = torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        factors.diagonal(dim1=1, dim2=2).add_(a)
        roots = factors @ roots if i else factors * roots
        if i < len(ROUNDS) - 1:
            squares = factors @ squares @ factors
    return roots


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
