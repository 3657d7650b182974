"""How far the weights of an examined model lie from those of the base it is said to run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEVELS = 256
"""Distinct numbers of weights that were rounded to 8 bits."""
ROWS = 16
"""Rows of a tensor that are looked at for the marks of rounding."""


@dataclass(frozen=True, slots=True)
class WeightDifference:
    """The tensor that differs most."""

    name: str
    error: float
    """Norm of the difference over the norm of the base's tensor."""
    is_rounded: bool
    """Whether the model's numbers look like roundings of the base's: few levels, or a coarser floating point type."""
    num_compared: int
    num_different: int
    num_missing: int
    """Parameters of the base without one of that name and shape: the model holds them in another form, or not."""


def weight_difference(model: nn.Module | None, base: nn.Module) -> WeightDifference | None:
    """Compare every parameter of the base with that of the same name in a model which may wrap it; None if none match.

    Names match at their ends: wrappers put theirs in front, and some put `base_layer` or `original` in between.
    """
    if model is None:
        return None
    theirs: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        theirs[_plain(name)] = tensor.detach()
    worst, compared, different, missing = ("", 0.0, False), 0, 0, 0
    for name, own in base.named_parameters():
        found = _ending_with(theirs, _plain(name))
        if found is None or found.shape != own.shape or not own.is_floating_point() or not found.is_floating_point():
            missing += 1
            continue
        compared += 1
        if found is own or (found.data_ptr() == own.data_ptr() and found.dtype == own.dtype):
            continue
        want, got = own.detach().float(), found.to(own.device).float()
        error = float((got - want).norm() / want.norm().clamp_min(1e-12))
        if error > 0:
            different += 1
        if error > worst[1]:
            worst = name, error, _is_rounding(got, want)
    if not compared:
        return None
    return WeightDifference(worst[0], worst[1], worst[2], compared, different, missing)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original", "module", "_orig_mod"))


def _ending_with(tensors: dict[str, Tensor], name: str) -> Tensor | None:
    if name in tensors:
        return tensors[name]
    ends = [tensor for other, tensor in tensors.items() if other.endswith("." + name) or name.endswith("." + other)]
    return ends[0] if len(ends) == 1 else None


def _is_rounding(found: Tensor, base: Tensor) -> bool:
    """Return whether one tensor is another, rounded: to a coarser float, or row by row to steps of 4 or 8 bits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2):
        if torch.equal(base.to(dtype).float(), found) or torch.equal(found.to(dtype).float(), base):
            return True
    rows = found.reshape(-1, found.shape[-1])[:ROWS]
    return rows.shape[-1] > 1 and (_on_a_grid(rows) or _on_a_grid(rows.flatten()[None]))


def _on_a_grid(rows: Tensor) -> bool:
    """Return whether every row holds few distinct numbers, or multiples of one step of at most 8 bits."""
    if all(torch.unique(row).numel() <= min(LEVELS, row.numel() // 2) for row in rows):
        return True
    for levels in (7, 8, 127, 128):
        steps = rows / (rows.abs().amax(dim=-1, keepdim=True) / levels).clamp_min(1e-30)
        if float((steps - steps.round()).abs().max()) < 1e-2:
            return True
    return False
