"""Why one method stands above another, and why some do not stand at all."""

from __future__ import annotations

from itertools import pairwise

from foreword.advise.decide import Decision, Standing
from foreword.advise.essay.words import capital, counted, joined, noun
from foreword.advise.methods import METHODS
from foreword.advise.rank import COUNTED, NEGLIGIBLE, Criterion, Points, differences
from foreword.report import Block, Bullets, Section, Table, Text


def infeasible(decision: Decision) -> Section | None:
    """Return the section on the methods that a constraint forbids, with every reason."""
    if not decision.infeasible:
        return None
    items = tuple(
        f"**{METHODS[standing.name].title}**: {' '.join(capital(objection.text) for objection in standing.objections)}"
        for standing in decision.infeasible
    )
    return Section("What does not fit, and which constraint says so", (Bullets(items),))


def ranking(decision: Decision) -> Section | None:
    """Return the section that shows every point of the ranking."""
    ranked = decision.ranking
    if not ranked:
        return None
    criteria = [points.criterion for points in ranked[0].points]
    rows = tuple(_row(decision, place, standing) for place, standing in enumerate(ranked, 1))
    columns = ("", "method", "misses the need by", *criteria, "points")
    blocks: list[Block] = [Text(_how(decision)), Table(columns, rows)]
    if len(ranked) > 1:
        blocks.append(Bullets(tuple(_pair(better, worse) for better, worse in pairwise(ranked))))
    return Section("The ranking, and why", tuple(blocks))


def _how(decision: Decision) -> str:
    missed = "what the tasks call for, by rule"
    if decision.measured is not None:
        missed = "the target, or the best measured score beyond doubt, by so much score on the average of the tasks "
        missed += "(methods that nobody measured are judged by rule and stand behind those that were)"
    factors = joined([f"{NEGLIGIBLE[c][1]} ({c})" for c in NEGLIGIBLE if _counts(decision, c)])
    parts = joined([f"{COUNTED[c]} ({c})" for c in COUNTED if _counts(decision, c)])
    changed = [
        f"`priorities.{c}` = {getattr(decision.constraints.priorities, c):g}"
        for c in (*NEGLIGIBLE, *COUNTED)
        if getattr(decision.constraints.priorities, c) != 1
    ]
    text = (
        f"Methods are put in order twice. First by whether they miss {missed}; a method that misses nothing stands "
        "above one that misses something, whatever it costs. Then by points, fewer first: a point is a factor of ten "
        f"above {factors}, and a point is {parts}. Equal points are parted by bytes."
    )
    return text + (f" Weighted otherwise on request: {joined(changed)}." if changed else "")


def _counts(decision: Decision, criterion: Criterion) -> bool:
    return any(points.criterion == criterion for points in decision.ranking[0].points)


def _row(decision: Decision, place: int, standing: Standing) -> tuple[str | int | float | None, ...]:
    cells = [f"{points.points:.1f}" for points in standing.points]
    if standing.judged_by == "measured":
        missed = f"{standing.shortfall:.3f} in score" if standing.shortfall else "nothing, measured"
    else:
        missed = counted(int(standing.shortfall), "step") if standing.shortfall else "nothing"
    return (place, METHODS[standing.name].title, missed, *cells, f"{standing.total_points:.1f}")


def _pair(better: Standing, worse: Standing) -> str:
    text = f"{capital(noun(worse.name))} stands behind {noun(better.name)} "
    if worse.shortfall > better.shortfall:
        return (
            text + f"because it {worse.shortfall_text}."
            if worse.judged_by == "rule"
            else (text + f"because it loses: {worse.shortfall_text}.")
        )
    if worse.is_unproved and not better.is_unproved:
        return text + "because nobody has measured it."
    gap = worse.total_points - better.total_points
    more = [_difference(*item) for item in differences(better.points, worse.points) if item[0] > 0.05]
    less = [_difference(*item) for item in differences(better.points, worse.points) if item[0] < -0.05]
    text += f"by {gap:.1f} points: " if gap >= 0.05 else "by its bytes alone, the points being equal: "
    text += joined(more) if more else "no criterion differs much"
    return text + (f", against {joined(less)}." if less else ".")


def _difference(gap: float, better: Points, worse: Points) -> str:
    return f"{worse.criterion} {gap:+.1f} ({worse.amount} against {better.amount})"
