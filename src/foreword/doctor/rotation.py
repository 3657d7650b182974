"""How a base rotates its keys by position, measured, whatever its family; and keys turned to other positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.core.prompt import SoftKV

NUM_ROWS = 256
"""Single-token sequences, from which a rotation of at most a few hundred dimensions is found."""
FITS = 0.02
"""Relative error within which keys at one position are a rotation of those at another; bfloat16 stays below."""


def rotations(base: FrozenModel) -> list[Tensor] | None:
    """Return each layer's rotation by one position, A [Dh, Dh] in float64: keys at p + 1 are keys at p times A.

    A sequence of a single token attends to itself alone, so what enters any layer does not depend on the token's
    position: its keys at two positions differ by the rotation only, found by orthogonal Procrustes over many tokens.
    None where keys do not turn with the position (ALiBi, learned positions).
    """
    from transformers import DynamicCache

    count = min(NUM_ROWS, base.spec.vocab_size)
    ids = torch.linspace(0, base.spec.vocab_size - 1, count, dtype=torch.float64).long().to(base.device)[:, None]
    keys: list[list[Tensor]] = []
    for position in (0, 1):
        cache = DynamicCache()
        positions = torch.full_like(ids, position)
        with torch.no_grad():
            base.run_decoder(base.embed(ids), positions=positions, cache=cache, mask=torch.ones_like(ids))
        keys.append([layer.keys[:, :, 0].double().cpu().flatten(0, 1) for layer in cache.layers])
    found = []
    turns = False
    for before, after in zip(*keys, strict=True):
        left, _, right = torch.linalg.svd(before.T @ after)
        turn = left @ right
        if float((before @ turn - after).norm()) > FITS * float(after.norm()):
            return None
        turns = turns or float((before - after).norm()) > 2 * FITS * float(after.norm())
        found.append(turn)
    return found if turns else None


def turned(vectors: SoftKV, rotations: list[Tensor], steps: list[int]) -> SoftKV:
    """Return the same vectors with the key of row p turned by `steps[p]` positions, backwards where negative."""
    from foreword.core.prompt import SoftKV

    keys = []
    for key, turn in zip(vectors.keys, rotations, strict=True):
        powers = [torch.linalg.matrix_power(turn if step >= 0 else turn.T, abs(step)) for step in steps]
        rows = [key[:, row].double().cpu() @ power for row, power in enumerate(powers)]
        keys.append(torch.stack(rows, dim=1).to(key))
    return SoftKV(tuple(keys), vectors.values, vectors.block)
