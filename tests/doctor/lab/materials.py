"""What plants are made of: private copies of tiny bases, vectors for them, batches, and the exact reference."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.core.forward import forward_rows
from foreword.core.init import initial_vectors
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.doctor.subjects import Implementation
from tests.doctor.lab.handmade import HandKV, Handmade, HandPrefix, HandPrompt
from tests.tiny import tiny

P = 5
LONGEST = 11


@cache
def vectors_for(architecture: str, method: str, num: int = P, seed: int = 3, dtype: str = "float32") -> Vectors:
    """Return random vectors at the norm that the base's layers see: they steer it clearly."""
    return initial_vectors(tiny(architecture, dtype), method, Block((num,)), "random", seed=seed)  # type: ignore[arg-type]


def private(base: FrozenModel) -> Any:
    """Return a copy of the base's model, which may be hooked and changed."""
    return copy.deepcopy(base.model)


def ragged(vocab_size: int = 97, seed: int = 5, longest: int = LONGEST, side: str = "right") -> tuple[Tensor, Tensor]:
    """Return ids and mask [3, longest] of rows of three lengths, padded at `side` ("none": of one length)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab_size, (3, longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, short in enumerate((0, 3, longest // 2)):
        if short and side != "none":
            mask[row, longest - short :] = 0
    if side == "left":
        mask = mask.flip(1)
    return ids * mask, mask


def reference(base: FrozenModel, vectors: Vectors, ids: Tensor, mask: Tensor) -> Tensor:
    """Return foreword's own logits [B, T, V]; zero at padding."""
    rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
    prefix = compile(base, vectors)
    with torch.no_grad():
        logits = forward_rows(base, rows, [prefix] * len(rows))
    found = logits.new_zeros(*ids.shape, logits.shape[-1])
    for place, row in enumerate(rows):
        found[place][mask[place].bool()] = logits[place, : len(row)]
    return found


def greedy_reference(base: FrozenModel, vectors: Vectors, row: list[int], num_new: int) -> list[int]:
    """Return foreword's greedy tokens behind a row, computed again from the start for each."""
    prefix, found = compile(base, vectors), []
    for _ in range(num_new):
        with torch.no_grad():
            found.append(int(forward_rows(base, [row + found], [prefix])[0, len(row) + len(found) - 1].argmax()))
    return found


def probes_for(base: FrozenModel, vectors: Vectors, num: int = 12, seed: int = 9) -> Any:
    """Return conformance probes as an artefact would carry them."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(3, base.spec.vocab_size, (4 + index % 7,), generator=generator).tolist() for index in range(num)
    ]
    return make_probes(base, compile(base, vectors), rows)


def hand(model: Any, vectors: Vectors, **switches: Any) -> Handmade:
    """Return the handmade implementation of the vectors' method."""
    if isinstance(vectors, SoftPrompt):
        return HandPrompt(model, vectors.vectors, **switches)
    if isinstance(vectors, SoftPrefix):
        return HandPrefix(model, vectors.vectors, **switches)
    assert isinstance(vectors, SoftKV)
    return HandKV(model, vectors.keys, vectors.values, **switches)


def subject(
    base: FrozenModel, trained: Vectors, made: Handmade, *, black_box: bool = False, bare: bool = False, **more: Any
) -> Implementation:
    """Hand an implementation over: whole, as a `black_box` (no module), or `bare` (its vectors not told)."""
    given: dict[str, Any] = {
        "declared": trained.method,
        "num_vectors": made.num,
        "base": base,
        "forward": made.forward,
        "model": None if black_box else made.model,
        "vectors": None if bare else trained,
        "generate": made.generate,
        "turns": made.turns,
    }
    return Implementation(**{**given, **more})


def worst(subject_: Implementation, base: FrozenModel, vectors: Vectors, side: str) -> float:
    """Return the largest logit difference from the reference over real tokens of a ragged batch."""
    ids, mask = ragged(base.spec.vocab_size, side=side)
    expected = reference(base, vectors, ids, mask)
    with torch.no_grad():
        found = subject_.forward(ids, mask)
    if found.shape[:2] != expected.shape[:2]:
        return float("inf")
    real = mask.bool()
    difference = (found[real].float() - expected[real].float()).abs().max()
    return float(difference.nan_to_num(float("inf")))


ROUNDING = 1e-5
"""Of logits in float32: what two right implementations may differ by."""
CLEAR = 0.05
"""Of logits: a difference that no rounding makes."""


def differs(
    architecture: str, method: str, side: str = "left", bound: float = CLEAR, num: int = P
) -> Callable[[Any], tuple[float, float]]:
    """Proof: the implementation's logits differ from the reference by more than `bound`."""

    def proof(made: Any) -> tuple[float, float]:
        return worst(made, tiny(architecture), vectors_for(architecture, method, num), side), bound

    return proof
