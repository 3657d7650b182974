"""Muon: momentum whose update is made orthonormal, so that every direction among the vectors moves alike.

The gradient of a few vectors is dominated by one or two directions, the same for all of them: they learn the same
thing. Orthonormal updates turn the others up. Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; here in
float64 through the small Gram matrix of the vectors instead of Newton-Schulz steps in bfloat16, since a run must give
the same vectors alone and beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

FLOOR = 1e-4
"""Directions whose singular value is below this part of the largest are rounding, not turned up to full size."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthonormal updates; a step moves a coordinate by `lr` in the root mean square.

    A parameter [P, F] is cut into columns of `widths` (a layer's hidden state, a head's key or value), each of which is
    made orthonormal by itself; parameters of another width are taken whole, those of one dimension as one row.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.7,
        weight_decay: float = 0.0,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._widths = list(widths)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; returns what `closure` returns."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["momentum"], group["weight_decay"])
        return loss

    def _move(self, parameter: Tensor, lr: float, momentum: float, decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(momentum).add_(gradient)
        update = gradient.add(state["momentum"], alpha=momentum)
        rows = update if update.ndim == 2 else update.reshape(1, -1)
        parts = self._widths if sum(self._widths) == rows.shape[1] else [rows.shape[1]]
        parameter.mul_(1 - lr * decay)
        parameter.add_(by_parts(rows, parts).view_as(parameter), alpha=-lr)


def by_parts(update: Tensor, widths: Sequence[int]) -> Tensor:
    """Return `update` [P, F] with each of its parts, columns of `widths`, made orthonormal; equal ones at once."""
    if len(set(widths)) > 1:
        return torch.cat([orthonormal(part) for part in torch.split(update, list(widths), dim=1)], dim=1)
    stacked = update.view(len(update), len(widths), widths[0]).transpose(0, 1)
    return orthonormal(stacked).transpose(0, 1).flatten(1)


def orthonormal(update: Tensor) -> Tensor:
    """Return the nearest matrices [..., P, W] to `update` with equal singular values, their root mean square being 1.

    A zero update stays zero.
    """
    is_wide = update.shape[-2] <= update.shape[-1]
    wide = (update if is_wide else update.mT).double()
    values, vectors = torch.linalg.eigh(wide @ wide.mT)
    largest = values[..., -1:]
    factors = (values.clamp_min(0) + largest * FLOOR**2).clamp_min(torch.finfo(torch.float64).tiny).rsqrt()
    turned: Tensor = (vectors * factors[..., None, :]) @ (vectors.mT @ wide) * wide.shape[-1] ** 0.5
    return (turned if is_wide else turned.mT).to(update.dtype)
