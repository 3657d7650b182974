"""Keys and values that were stored wrong in a known way: which way makes the conformance probes hold again?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from foreword.core.artefact import Artefact
from foreword.core.compile import compile
from foreword.core.conformance import replay
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV
from foreword.doctor.rotation import rotations, turned


@dataclass(frozen=True, slots=True)
class Repair:
    """Another form of the same keys and values, and the fault that it would prove."""

    fault: str
    how: str
    """What the probes hold with, to follow "it holds"."""
    fix: str
    vectors: SoftKV


def find_repair(base: FrozenModel, artefact: Artefact) -> Repair | None:
    """Return the first form of an artefact's keys and values under which its probes hold on `base`, or None."""
    vectors, header = artefact.vectors, artefact.header
    if not isinstance(vectors, SoftKV) or not header.conformance:
        return None
    for repair in _repairs(base, vectors, header.block.soft_positions(), header.block.num_positions):
        if replay(base, compile(base, repair.vectors), header.conformance).ok:
            return repair
    return None


def _repairs(base: FrozenModel, vectors: SoftKV, places: list[int], count: int) -> Iterator[Repair]:
    if (turns := rotations(base)) is not None:
        tries = {
            "with the keys turned to their positions: they were stored without rotation": places,
            "with the keys turned back by their positions: they were stored rotated twice": [-p for p in places],
            "with the keys turned by the block's length": [count] * len(places),
            "with the keys turned back by the block's length": [-count] * len(places),
        }
        fix = "Store keys as they lie in the cache, turned once to their positions."
        for how, steps in tries.items():
            yield Repair("keys-misrotated", how, fix, turned(vectors, turns, steps))
    fix = "Transpose to [Hkv, P, Dh] before writing; a reshape puts numbers of other vectors and heads together."
    orders = {"[P, Hkv, Dh]": (1, 0, 2), "[Hkv, Dh, P]": (0, 2, 1)}
    for name, order in orders.items():
        keys, values = (tuple(_reread(tensor, order) for tensor in kind) for kind in (vectors.keys, vectors.values))
        how = f"with the numbers read as {name}: they were reshaped where they had to be transposed"
        yield Repair("wrong-shape", how, fix, SoftKV(keys, values, vectors.block))


def _reread(tensor: Tensor, order: tuple[int, int, int]) -> Tensor:
    """Return the numbers of a tensor [Hkv, P, Dh] as if they had been written in another order of its axes."""
    sizes = [tensor.shape[axis] for axis in order]
    inverse = [order.index(axis) for axis in range(3)]
    return tensor.contiguous().view(sizes).permute(inverse).contiguous()
