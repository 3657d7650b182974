"""What would change the answer: the flips that the search found, as a table and in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from foreword.advise.cost.quantity import human
from foreword.advise.decide import Decision
from foreword.advise.essay.words import amount, hours, noun
from foreword.advise.flip import Flip
from foreword.advise.questions import questions
from foreword.report import Block, Bullets, Section, Table, Text

UNITS = {question.path: question.unit for question in questions()}
NEAREST = 3


def changes(decision: Decision, flips: Sequence[Flip]) -> Section:
    """Return the section on what would change the answer."""
    now = noun(decision.recommended) if decision.recommended else "nothing"
    near = [flip for flip in flips if math.isfinite(flip.distance) and flip.direction != "instead"]
    ladders = [flip for flip in flips if flip.direction == "instead"]
    unset = [flip for flip in flips if not math.isfinite(flip.distance)]
    blocks: list[Block] = [
        Text(
            "Each constraint was moved by itself, everything else held still, and the whole decision was made again "
            "until the answer turned. What stands below was found by that search."
        )
    ]
    if near:
        blocks.append(Text(_in_words(near[:NEAREST], now)))
    if not flips:
        blocks.append(Text(f"No single constraint, moved a thousandfold either way, changes it: it stays {now}."))
    rows = [_row(flip) for flip in (*near, *ladders)]
    if rows:
        blocks.append(Table(("constraint", "now", "turns at", "factor", "then"), tuple(rows)))
    if unset:
        blocks.append(Text("These are 0 or not limited now. Elsewhere the answer would be another:"))
        blocks.append(Bullets(tuple(_limit(flip) for flip in unset)))
    return Section("What would change the answer", tuple(blocks))


def _in_words(flips: Sequence[Flip], now: str) -> str:
    first, rest = flips[0], flips[1:]
    text = (
        f"The nearest turn is `{first.key}`, now {show(first.key, first.current)}: {_turn(first)}{_how_far(first)} the "
        f"answer is {_then(first)} instead of {now}."
    )
    for flip in rest:
        text += f" With `{flip.key}` {_turn(flip)}{_how_far(flip)} it is {_then(flip)}."
    if first.distance > 1:
        text += " None of them is near: the answer does not hang on an estimate being right."
    elif first.distance < 0.15:
        text += " The first is close enough to check that number before acting on it."
    return text


def _how_far(flip: Flip) -> str:
    ratio = flip.ratio
    if ratio is None:
        return ""
    if UNITS.get(flip.key) == "score":
        return f" ({float(flip.first_other) - float(flip.current):+.2f})"
    if 0.5 <= ratio <= 2:
        return f" ({100 * (ratio - 1):+.0f} %)"
    return f" ({_factor(ratio)} of it)" if ratio < 1 else f" ({_factor(ratio)} times as much)"


def _row(flip: Flip) -> tuple[str, ...]:
    factor = "" if flip.ratio is None or UNITS.get(flip.key) == "score" else _factor(flip.ratio)
    if flip.key == "base":
        return ("base", str(flip.current), str(flip.first_other), factor, _then(flip))
    return (f"`{flip.key}`", show(flip.key, flip.current), _turn(flip), factor, _then(flip))


def _limit(flip: Flip) -> str:
    return f"`{flip.key}` {_turn(flip)}: {_then(flip)}."


def _turn(flip: Flip) -> str:
    """Say on which side of which value the answer is another."""
    if flip.direction == "instead":
        return show(flip.key, flip.first_other)
    if flip.first_other is None:
        return "without a limit"
    return f"{flip.direction} {show(flip.key, flip.last_same)}"


def _then(flip: Flip) -> str:
    return noun(flip.recommended) if flip.recommended else "nothing that fits"


def _factor(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.2g}"


def show(key: str, value: Any) -> str:
    """Return a constraint's value as text, in its unit."""
    unit = UNITS.get(key)
    if value is None:
        return "no limit"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if unit == "bytes":
        return amount(value)
    if unit == "hours":
        return hours(value)
    if unit == "ms":
        return human(value / 1e3, "s")
    if unit == "tokens":
        return f"{value:,.0f} tokens"
    if unit == "count":
        return f"{value:,.0f}"
    if unit == "score":
        return f"{value:.2f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
