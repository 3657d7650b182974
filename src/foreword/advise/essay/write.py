"""A decision as an essay that can be forwarded: what to do, how it works, what it costs, what would change it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from foreword.advise.decide import Decision, Standing
from foreword.advise.effects import as_json
from foreword.advise.essay.changes import changes
from foreword.advise.essay.composition import layer_input, where_vectors_live
from foreword.advise.essay.grounds import assumptions, tensions
from foreword.advise.essay.numbers import numbers
from foreword.advise.essay.ranking import infeasible, ranking
from foreword.advise.essay.recommendation import given_up, recommendation
from foreword.advise.essay.steps import plan_section
from foreword.advise.essay.tradeoffs import trade_offs
from foreword.advise.essay.views import views
from foreword.advise.essay.words import counted
from foreword.advise.flip import Flip, find_flips
from foreword.advise.plan import Plan, make_plan
from foreword.advise.rules import REACH
from foreword.report import Report


def write_essay(decision: Decision) -> Report:
    """Return the report of a decision; `data` holds its numbers: constraints, standings, flips, plan."""
    flips, plan = find_flips(decision), make_plan(decision)
    tasks, base = decision.constraints.tasks, decision.constraints.base
    sections = [
        recommendation(decision),
        where_vectors_live(decision),
        layer_input(decision),
        trade_offs(decision),
        infeasible(decision),
        ranking(decision),
        given_up(decision),
        changes(decision, flips),
        plan_section(decision, plan) if plan else None,
        numbers(decision),
        views(decision),
        assumptions(decision.constraints),
    ]
    return Report(
        title=f"{base.name}, {counted(tasks.count, _kind(tasks.kind) + ' task')}: which method, and why",
        sections=tuple(section for section in sections if section is not None),
        data=_data(decision, flips, plan),
    )


def _kind(kind: str) -> str:
    return kind.replace("_", " ")


def _data(decision: Decision, flips: tuple[Flip, ...], plan: Plan | None) -> dict[str, Any]:
    return {
        "recommended": decision.recommended,
        "need": dataclasses.asdict(decision.need),
        "ranking": [standing.name for standing in decision.ranking],
        "methods": {standing.name: _standing(standing) for standing in decision.standings},
        "flips": [_flip(flip) for flip in flips],
        "plan": dataclasses.asdict(plan) if plan else None,
        "tensions": list(tensions(decision.constraints)),
        "constraints": decision.constraints.to_json(),
    }


def _standing(standing: Standing) -> dict[str, Any]:
    return {
        "feasible": standing.is_feasible,
        "objections": [dataclasses.asdict(objection) for objection in standing.objections],
        "reach": REACH[standing.name],
        "misses": standing.shortfall,
        "misses_because": standing.shortfall_text,
        "judged_by": standing.judged_by,
        "points": {points.criterion: points.points for points in standing.points},
        "total_points": standing.total_points,
        "effects": dict(as_json(standing.effects)),
        "cost": standing.effects.cost.to_json(),
    }


def _flip(flip: Flip) -> dict[str, Any]:
    found = {field.name: getattr(flip, field.name) for field in dataclasses.fields(flip)}
    return found | {"ratio": flip.ratio, "distance": flip.distance if math.isfinite(flip.distance) else None}
