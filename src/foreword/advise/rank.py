"""The ranking: first who gives the tasks what they need, then who costs least, in factors of ten."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from foreword.advise.constraints import Constraints
from foreword.advise.cost.quantity import Unit, human
from foreword.advise.effects import Effects
from foreword.advise.methods import Method

Criterion = Literal["storage", "latency", "wire", "context", "updates", "operations", "audit"]

NEGLIGIBLE: Mapping[Criterion, tuple[float, str]] = {
    "storage": (1e6, "1 MB for all tasks"),
    "latency": (1e-3, "1 ms added to a whole request"),
    "wire": (1e4, "10 kB sent per request"),
    "context": (0.01, "1 % of the context"),
    "updates": (1.0, "1 hour from a wanted change to its being live"),
}
"""What costs nothing worth counting; every factor of ten above it is one point."""
COUNTED: Mapping[Criterion, str] = {
    "operations": "each part that must be added and kept up, a training run included",
    "audit": "each step away from readable words",
}
"""Criteria that are counted, a point for each."""
AUDIT_STEPS: Mapping[str, tuple[int, str]] = {
    "hard_text": (0, "the words say what they do"),
    "few_shot": (0, "the words say what they do"),
    "prompt": (1, "one tensor before the first layer, started from text"),
    "compiled_prompt": (1, "one tensor before the first layer, started from text"),
    "kv": (2, "tensors in every layer"),
    "prefix": (2, "tensors in every layer"),
    "cartridge": (2, "tensors in every layer"),
    "ia3": (3, "changed computation in every layer"),
    "adapter": (3, "changed computation in every layer"),
    "lora": (3, "changed weights in every layer"),
    "full": (4, "another model for each task"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """What one criterion costs a method."""

    criterion: Criterion
    value: float
    """The number that was judged."""
    unit: str
    """Its unit; for what is counted, the words for it."""
    points: float
    """Factors of ten above the negligible, or parts counted, times the priority."""

    @property
    def amount(self) -> str:
        """The number that was judged, as text."""
        if self.criterion in COUNTED:
            return self.unit
        return human(self.value, cast(Unit, self.unit))


def points_of(effects: Effects, constraints: Constraints) -> tuple[Points, ...]:
    """Return the points of a method in every criterion that counts here; less is better."""
    request = effects.request_s(constraints.tasks.output_tokens)
    room = constraints.limits.context_tokens or constraints.base.context_tokens
    found = [
        _decades("storage", effects.storage_bytes, "bytes", constraints),
        _decades("latency", request, "s", constraints),
        _decades("wire", effects.wire_bytes, "bytes", constraints),
    ]
    if room:
        share = effects.context_tokens / room
        found.append(_decades("context", share, "share", constraints))
    found.append(_decades("updates", effects.update_hours, "hours", constraints))
    parts = len(parts_of(effects.method))
    found.append(_counted("operations", parts, f"{parts} part{'' if parts == 1 else 's'}", constraints))
    if constraints.audit.needed:
        steps, words = AUDIT_STEPS[effects.method.name]
        found.append(_counted("audit", steps, words, constraints))
    return tuple(found)


def parts_of(method: Method) -> tuple[str, ...]:
    """Return what must be added or changed for a method and be kept up; training is one of the parts."""
    return (*method.components, *(("a training run",) if method.trains else ()))


def differences(better: tuple[Points, ...], worse: tuple[Points, ...]) -> list[tuple[float, Points, Points]]:
    """Return criterion by criterion how many points `worse` has more (negative: less), largest first."""
    pairs = [(b.points - a.points, a, b) for a, b in zip(better, worse, strict=True)]
    return sorted(pairs, key=lambda item: -abs(item[0]))


def total(points: tuple[Points, ...]) -> float:
    """Return the sum of points."""
    return sum(item.points for item in points)


def _decades(criterion: Criterion, value: float, unit: Unit, constraints: Constraints) -> Points:
    least = NEGLIGIBLE[criterion][0]
    decades = math.log10(value / least) if value > least else 0.0
    points = decades * getattr(constraints.priorities, criterion)
    return Points(criterion=criterion, value=value, unit=unit, points=points)


def _counted(criterion: Criterion, value: int, words: str, constraints: Constraints) -> Points:
    points = value * getattr(constraints.priorities, criterion)
    return Points(criterion=criterion, value=value, unit=words, points=points)
