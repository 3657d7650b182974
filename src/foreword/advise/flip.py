"""What would change the answer: for each constraint, the nearest value at which another method is recommended.

Found by search: every value that is reported was decided anew, on both sides of the turn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreword.advise.bases.find import KNOWN
from foreword.advise.constraints import Constraints, check_contradictions
from foreword.advise.decide import Decision, decide
from foreword.advise.effects import FEW_ROWS, Effects
from foreword.advise.measured import Measured
from foreword.advise.questions import KINDS, SURFACES, Question, questions
from foreword.advise.rules import MANY_ROWS, NO_TRAINING_ROWS
from foreword.errors import ConfigError

STEPS = 10
"""Doublings, or halvings, that a number is searched in each direction: about a thousandfold."""
SEARCHED = (
    "tasks.count",
    "tasks.rows_per_task",
    "tasks.input_tokens",
    "tasks.output_tokens",
    "tasks.instruction_tokens",
    "tasks.shots",
    "tasks.shared_context_tokens",
    "tasks.num_vectors",
    "tasks.baseline_score",
    "tasks.quality_target",
    "traffic.requests_per_s",
    "traffic.batch",
    "traffic.network_gbit_s",
    "change.review_hours",
)
"""Numbers beside the limits."""
SAME_COSTS = ("limits.", "audit.", "change.surface", "tasks.baseline_score", "tasks.quality_target")
"""What moves no cost, so that costs need not be counted again."""
LADDERS: dict[str, tuple[Any, ...]] = {
    "change.surface": SURFACES,
    "tasks.kind": KINDS,
    "audit.needed": (False, True),
    "change.prefix_cache": (False, True),
}
LIMIT_AMOUNTS: dict[str, Callable[[Any], float]] = {
    "limits.storage_per_task_bytes": lambda effects: effects.storage_bytes / effects.load.num_tasks,
    "limits.storage_total_bytes": lambda effects: effects.storage_bytes,
    "limits.device_memory_bytes": lambda effects: effects.device_bytes,
    "limits.first_token_added_ms": lambda effects: effects.first_token_s * 1e3,
    "limits.per_token_added_ms": lambda effects: effects.per_token_s * 1e3,
    "limits.wire_bytes": lambda effects: effects.wire_bytes,
    "limits.update_deadline_hours": lambda effects: effects.update_hours,
}
"""What each limit is compared with: the amounts at which a method becomes feasible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    """The nearest value of one constraint, in one direction, at which the recommendation changes."""

    key: str
    current: Any
    """The value now; None is no limit."""
    last_same: Any
    """The last value found with the present recommendation."""
    first_other: Any
    """The first value found with another one."""
    recommended: str | None
    """The method recommended there; None where nothing is feasible any more."""
    direction: str
    """below, above, or instead (for a ladder)."""
    distance: float
    """Factors of ten between now and the turn for numbers, steps for ladders; infinite where there is no limit now."""

    @property
    def ratio(self) -> float | None:
        """The turn as a multiple of the present value; None where that has no meaning."""
        if self.direction == "instead" or not self.current or not isinstance(self.first_other, int | float):
            return None
        return float(self.first_other) / float(self.current)


def find_flips(decision: Decision) -> tuple[Flip, ...]:
    """Return the nearest flips of every constraint, nearest first; ladders after numbers of the same distance."""
    effects = {standing.name: standing.effects for standing in decision.standings}
    search = _Search(decision.constraints, decision.measured, decision.recommended, effects)
    found: list[Flip] = []
    for question in questions():
        path = question.path
        if path in LADDERS:
            found += search.ladder(path, LADDERS[path])
        elif question.table == "limits" or path in SEARCHED:
            found += search.number(question, _amounts(decision, path))
    found += search.bases()
    return tuple(sorted(found, key=lambda flip: (flip.distance, flip.key, flip.direction)))


def _amounts(decision: Decision, path: str) -> list[float]:
    """Return the values at which methods cross a limit, or rules change."""
    if path == "limits.context_tokens":
        tasks = decision.constraints.tasks
        text = tasks.input_tokens + tasks.output_tokens
        return [standing.effects.context_tokens + text for standing in decision.standings]
    if path == "tasks.rows_per_task":
        return [NO_TRAINING_ROWS, FEW_ROWS, MANY_ROWS + 1]
    amount = LIMIT_AMOUNTS.get(path)
    return [amount(standing.effects) for standing in decision.standings] if amount else []


@dataclass(frozen=True, slots=True)
class _Search:
    """Decides again and again, with one thing changed."""

    constraints: Constraints
    measured: Measured | None
    recommended: str | None
    effects: Mapping[str, Effects]

    def recommend(self, path: str, value: Any) -> str | None:
        """Return what is recommended with one value changed. Raises ConfigError for what contradicts itself."""
        changed = self.constraints.replaced(path, value)
        check_contradictions(changed)
        effects = self.effects if path.startswith(SAME_COSTS) else None
        return decide(changed, self.measured, effects=effects).recommended

    def number(self, question: Question, amounts: Sequence[float]) -> Iterator[Flip]:
        """Yield the nearest flip below and above; from no limit, only downwards."""
        path, current = question.path, self.constraints.value(question.path)
        if current is None and question.table != "limits":
            return
        if question.unit == "score":
            for sign, direction in ((-1, "below"), (1, "above")):
                grid = [round(current + sign * step / 100, 6) for step in range(1, 101)]
                yield from self._towards(question, [v for v in grid if 0 <= v <= 1], direction, current)
            return
        whole = question.unit in ("count", "tokens")
        if current is None:
            room = self.constraints.base.context_tokens if path == "limits.context_tokens" else None
            start = room or 10 * max(amounts, default=0.0)
            if start > 0:
                yield from self._towards(question, self._values(start, amounts, -1, whole), "below", current)
            return
        yield from self._towards(question, self._values(current, amounts, -1, whole), "below", current)
        upwards = [*self._values(current, amounts, 1, whole), *([None] if question.table == "limits" else [])]
        yield from self._towards(question, upwards, "above", current)

    def ladder(self, path: str, rungs: Sequence[Any]) -> Iterator[Flip]:
        """Yield the nearest rung in each direction with another recommendation."""
        current = self.constraints.value(path)
        place = rungs.index(current)
        for direction in (-1, 1):
            last, step = current, place + direction
            while 0 <= step < len(rungs):
                try:
                    method = self.recommend(path, rungs[step])
                except ConfigError:
                    break
                if method != self.recommended:
                    distance = float(abs(step - place))
                    yield _flip(path, current, last, rungs[step], method, "instead", distance)
                    break
                last, step = rungs[step], step + direction

    def bases(self) -> Iterator[Flip]:
        """Yield the nearest known base, by size, smaller and larger, on which another method is recommended."""
        size = self.constraints.base.num_parameters
        for smaller in (True, False):
            known = [base for base in KNOWN.values() if base.num_parameters != size]
            known = [base for base in known if (base.num_parameters < size) == smaller]
            last = self.constraints.base
            for base in sorted(known, key=lambda base: abs(math.log(base.num_parameters / size))):
                changed = dataclasses.replace(self.constraints, base=base)
                try:
                    check_contradictions(changed)
                except ConfigError:
                    continue
                method = decide(changed, self.measured).recommended
                if method != self.recommended:
                    distance = abs(math.log10(base.num_parameters / size))
                    yield _flip("base", self.constraints.base.name, last.name, base.name, method, "instead", distance)
                    break
                last = base

    def _values(self, start: float, amounts: Sequence[float], sign: int, whole: bool) -> list[Any]:
        """Return values to try, from near to far: a grid, and both sides of every amount that a method needs."""
        grid = [start * 2.0 ** (sign * step) for step in range(1, STEPS + 1)]
        if start == 0:
            grid = [2.0**step for step in range(2 * STEPS)] if sign > 0 else []
        edges = [value for amount in amounts for value in (amount, amount * (1 - 1e-6))]
        values = [value for value in (*grid, *edges) if value > 0 and (value - start) * sign > 0]
        if whole:
            values = [value for value in {round(value) for value in values} | {math.ceil(a) for a in amounts}]
            values = [value for value in values if value > 0 and (value - start) * sign > 0]
        return sorted(values, reverse=sign < 0)

    def _towards(self, question: Question, values: Sequence[Any], direction: str, current: Any) -> Iterator[Flip]:
        """Walk outwards to the first value with another recommendation, then close in on the turn."""
        last = current
        for value in values:
            try:
                method = self.recommend(question.path, value)
            except ConfigError:
                break
            if method != self.recommended:
                last, value, method = self._close_in(question, last, value, method)
                distance = math.inf
                if current and value:
                    distance = abs(math.log10(value / current))
                yield _flip(question.path, current, last, value, method, direction, distance)
                return
            last = value

    def _close_in(self, question: Question, same: Any, other: Any, method: str | None) -> tuple[Any, Any, str | None]:
        """Halve the interval until both sides agree to three digits, or are neighbours."""
        if same is None or other is None:
            return same, other, method
        while True:
            middle = math.sqrt(same * other) if same > 0 and other > 0 else (same + other) / 2
            if question.unit in ("count", "tokens"):
                middle = (same + other) // 2
                if abs(same - other) <= 1:
                    return same, other, method
            elif abs(same - other) <= 1e-4 * max(abs(same), abs(other)):
                return same, other, method
            found = self.recommend(question.path, middle)
            if found == self.recommended:
                same = middle
            else:
                other, method = middle, found


def _flip(
    key: str, current: Any, same: Any, other: Any, recommended: str | None, direction: str, distance: float
) -> Flip:
    return Flip(
        key=key,
        current=current,
        last_same=same,
        first_other=other,
        recommended=recommended,
        direction=direction,
        distance=distance,
    )
