"""The decision: every method weighed under the constraints, the feasible ones in order, the rest with their reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from foreword.advise.constraints import Constraints
from foreword.advise.effects import Effects, effects_of
from foreword.advise.measured import Measured
from foreword.advise.methods import METHODS, Method
from foreword.advise.rank import Points, points_of, total
from foreword.advise.rules import Need, Objection, need_of, objections, shortfall


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one method stands."""

    effects: Effects
    objections: tuple[Objection, ...]
    """Every constraint that forbids it; empty where it is feasible."""
    shortfall: float
    """By how much it misses what the tasks need: steps of reach by rule, or score lacking per measured task."""
    shortfall_text: str
    """Why, in words and numbers; empty at 0."""
    judged_by: str
    """`rule` or `measured`."""
    is_unproved: bool
    """Judged by rule where other methods were measured."""
    points: tuple[Points, ...]

    @property
    def method(self) -> Method:
        """The method."""
        return self.effects.method

    @property
    def name(self) -> str:
        """The method's name."""
        return self.effects.method.name

    @property
    def is_feasible(self) -> bool:
        """Whether no constraint forbids it."""
        return not self.objections

    @property
    def total_points(self) -> float:
        """The sum of its points; less is better."""
        return total(self.points)

    @property
    def order(self) -> tuple[float, bool, float, float, str]:
        """What it is sorted by: need missed, guessed where others are measured, points, bytes, name."""
        return (
            round(self.shortfall, 9),
            self.is_unproved,
            round(self.total_points, 9),
            self.effects.storage_bytes,
            self.name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What came out."""

    constraints: Constraints
    need: Need
    standings: tuple[Standing, ...]
    """All methods: feasible ones in order, then infeasible ones by how many constraints forbid them."""
    measured: Measured | None = None

    @property
    def ranking(self) -> tuple[Standing, ...]:
        """The feasible methods, best first."""
        return tuple(standing for standing in self.standings if standing.is_feasible)

    @property
    def infeasible(self) -> tuple[Standing, ...]:
        """The methods that a constraint forbids."""
        return tuple(standing for standing in self.standings if not standing.is_feasible)

    @property
    def best(self) -> Standing | None:
        """The recommended method's standing; None where nothing is feasible."""
        return self.ranking[0] if self.ranking else None

    @property
    def recommended(self) -> str | None:
        """The recommended method's name; None where nothing is feasible."""
        return self.ranking[0].name if self.ranking else None

    def standing(self, method: str) -> Standing:
        """Return how a method stands."""
        return next(standing for standing in self.standings if standing.name == method)


def decide(
    constraints: Constraints, measured: Measured | None = None, *, effects: Mapping[str, Effects] | None = None
) -> Decision:
    """Weigh every method: who is forbidden and by what, who gives the tasks what they need, who costs least.

    `effects` are those of other constraints with the same costs: limits, surface and scores do not move them.
    """
    need = need_of(constraints)
    effects = effects or {name: effects_of(name, constraints) for name in METHODS}
    forbidden = {name: objections(effects[name], constraints) for name in METHODS}
    feasible = tuple(name for name in METHODS if not forbidden[name])
    standings = []
    for name in METHODS:
        missed, why, judged_by = _missed(name, constraints, need, measured, feasible)
        standings.append(
            Standing(
                effects=effects[name],
                objections=forbidden[name],
                shortfall=missed,
                shortfall_text=why,
                judged_by=judged_by,
                is_unproved=measured is not None and judged_by == "rule",
                points=points_of(effects[name], constraints),
            )
        )
    standings.sort(key=lambda standing: (len(standing.objections), standing.order))
    return Decision(constraints=constraints, need=need, standings=tuple(standings), measured=measured)


def _missed(
    name: str, constraints: Constraints, need: Need, measured: Measured | None, feasible: tuple[str, ...]
) -> tuple[float, str, str]:
    """Return what a method misses, why, and by what it was judged.

    A measured method misses what it lacks in score, on the average of its tasks, against the target or the best
    feasible method that beats it beyond doubt; an unmeasured one is judged by rule, which counts in whole steps.
    """
    rows = measured.of(name) if measured else {}
    if measured and rows:
        lost = measured.losses(name, feasible, constraints.tasks.quality_target)
        text = "; ".join(f"{task}: {why}" for task, (_, why) in lost.items())
        return sum(gap for gap, _ in lost.values()) / len(rows), text, "measured"
    steps, why = shortfall(name, constraints, need)
    return float(steps), why, "rule"
