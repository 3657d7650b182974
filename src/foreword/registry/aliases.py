"""Aliases inside one transaction: where they point, moving them, the way back, and the gate in front of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from foreword.errors import Conflict
from foreword.registry.audit import bump, write_audit
from foreword.registry.records import Move, Version, move_from_row
from foreword.registry.tables import AliasRow, MoveRow, VersionRow

Gate = Callable[[Version, Version | None], str | None]
"""(candidate, the version that the alias points at now) -> the reason for a refusal, or None."""

_SAME_MEASUREMENT = ("metric", "split", "data_sha256")


def move_alias(
    session: Session,
    now: datetime,
    task: str,
    alias: str,
    target: VersionRow | None,
    *,
    action: str,
    who: str,
    why: str,
    expect: int | None = None,
    forced: bool = False,
    overruled: str = "",
) -> Move:
    """Point an alias at `target` (None removes it) and write that down; return the move.

    Where it points there already, nothing is written and its last move is returned, with `is_new` False.
    Raises Conflict when `expect` is given and the alias points elsewhere (0 expects it unset).
    """
    row = session.get(AliasRow, (task, alias))
    current, to_number = row.number if row else None, target.number if target else None
    last = session.scalars(_moves(task, alias).order_by(MoveRow.id.desc()).limit(1)).first()
    if expect is not None and expect != (current or 0):
        raise _moved(task, alias, expect, current, last)
    if current == to_number and last is not None:
        return move_from_row(last)
    if row is None:
        if to_number is not None:
            session.add(AliasRow(task=task, name=alias, number=to_number))
    elif to_number is None:
        session.delete(row)
    else:
        row.number = to_number
    move = MoveRow(
        task=task,
        alias=alias,
        action=action,
        from_number=current,
        to_number=to_number,
        who=who,
        why=why,
        moved=now,
        evaluation=target.evaluation if target else {},
        forced=forced,
        overruled=overruled,
    )
    session.add(move)
    details = {"from": current, "to": to_number, "why": why, "forced": forced, "overruled": overruled}
    write_audit(session, now, who, action, f"{task}@{alias}", details)
    bump(session)
    session.flush()
    return replace(move_from_row(move), is_new=True)


def rollback_number(session: Session, task: str, alias: str) -> int | None:
    """Return the number that a rollback of the alias goes to, or None where nothing is left to go back to."""
    moves = session.execute(
        select(MoveRow.action, MoveRow.to_number)
        .where(MoveRow.task == task, MoveRow.alias == alias)
        .order_by(MoveRow.id)
    )
    live = session.scalars(select(VersionRow.number).where(VersionRow.task == task, VersionRow.deleted.is_(None)))
    return step_back(((action, to) for action, to in moves), set(live))


def step_back(moves: Iterable[tuple[str, int | None]], live: set[int]) -> int | None:
    """Return where one step back leads, given an alias's moves as (action, to), oldest first.

    Every move but a rollback puts its target on a stack, a rollback takes off what it went back over; so a second
    rollback goes further back, not to and fro. Versions deleted since, and times without a target, are skipped.
    """
    stack: list[int | None] = []
    for action, to in moves:
        if action != "rollback":
            stack.append(to)
            continue
        while stack[-1] != to:
            stack.pop()
    current = stack.pop() if stack else None
    return next((number for number in reversed(stack) if number in live and number != current), None)


def evaluation_refusal(candidate: Version, current: Version | None) -> str | None:
    """Judge by the evaluations stored with two versions: return why the candidate loses, or None.

    Evaluations are read as `EvalReport.to_json` writes them. The candidate loses when it lost a paired test against
    this very version that is stored with it (`paired`, as recipes write it), or when both were measured alike
    (`metric`, `split`, `data_sha256` and `decoding` agree) and its whole `interval` lies below the current `score`;
    more is better in every metric. What was not measured alike, or not at all, cannot be judged here and passes.
    """
    if current is None or candidate.sha256 == current.sha256:
        return None
    ours, theirs = candidate.evaluation, current.evaluation
    if lost := _lost_tests(ours.get("paired"), current.sha256):
        return f"{candidate.reference} lost to {current.reference} row by row: {'; '.join(lost)}"
    for key in _SAME_MEASUREMENT:
        if not ours.get(key) or ours.get(key) != theirs.get(key):
            return None
    if ours.get("decoding") != theirs.get("decoding"):
        return None
    high, score = _number(_upper(ours)), _number(theirs.get("score"))
    if high is None or score is None or high >= score:
        return None
    return (
        f"{candidate.reference} is worse than {current.reference} on {ours['metric']} ({ours['split']}): "
        f"its interval ends at {high:.4g}, below {score:.4g}"
    )


def _lost_tests(paired: Any, against: str) -> list[str]:
    """Return the paired tests against an artefact that were lost, in words."""
    tests = paired.get("tests") if isinstance(paired, Mapping) and paired.get("against") == against else None
    lost = []
    for name, test in tests.items() if isinstance(tests, Mapping) else ():
        if isinstance(test, Mapping) and test.get("verdict") == "worse":
            lost.append(f"{test.get('metric')} {test.get('score_a')} against {test.get('score_b')} on {name}")
    return lost


def _upper(evaluation: Mapping[str, Any]) -> Any:
    interval = evaluation.get("interval")
    return interval[1] if isinstance(interval, list | tuple) and len(interval) == 2 else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _moves(task: str, alias: str) -> Select[MoveRow]:
    return select(MoveRow).where(MoveRow.task == task, MoveRow.alias == alias)


def _moved(task: str, alias: str, expect: int, current: int | None, last: MoveRow | None) -> Conflict:
    is_at = f"is at {task}@{current}" if current else "is not set"
    since = f", moved by {last.who} at {last.moved:%Y-%m-%d %H:%M:%S} UTC" if last else ""
    expected = f"{task}@{expect}" if expect else "no version"
    return Conflict(
        f"the alias {task}@{alias} {is_at}{since}; {expected} was expected",
        hint="Look at what it points at now, then decide again.",
    )
