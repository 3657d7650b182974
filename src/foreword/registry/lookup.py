"""Finding tasks, versions and aliases inside a transaction; what is not there is NotFound, with near names."""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from foreword.errors import NotFound, did_you_mean
from foreword.registry.records import digest_of, is_name, split_reference
from foreword.registry.tables import AliasRow, TaskRow, VersionRow

PROD = "prod"
"""The alias that a task's bare name stands for."""


def find_task(session: Session, name: str) -> TaskRow:
    """Return a task's row, or raise NotFound."""
    row = session.get(TaskRow, name) if is_name(name) else None
    if row is None:
        raise NotFound(f"no task {name[:80]!r}", hint=did_you_mean(name, session.scalars(select(TaskRow.name))))
    return row


def aliases_of(session: Session, task: str) -> dict[str, int]:
    """Return a task's aliases, by name, and the numbers they point at."""
    rows = session.scalars(select(AliasRow).where(AliasRow.task == task).order_by(AliasRow.name))
    return {row.name: row.number for row in rows}


def find(session: Session, reference: str) -> VersionRow:
    """Return the version that a reference names now, in one query, or raise NotFound."""
    named = _named(reference)
    row = None if named is None else session.scalars(named).first()
    return row if row is not None else _explain(session, reference)


def _named(reference: str) -> Select[VersionRow] | None:
    live = select(VersionRow).where(VersionRow.deleted.is_(None))
    if (sha256 := digest_of(reference)) is not None:
        newest_first = (VersionRow.created.desc(), VersionRow.number.desc(), VersionRow.task)
        return live.where(VersionRow.sha256 == sha256).order_by(*newest_first).limit(1)
    task, selector = split_reference(reference)
    if not is_name(task) or (isinstance(selector, str) and not is_name(selector)):
        return None
    if isinstance(selector, int):
        return live.where(VersionRow.task == task, VersionRow.number == selector)
    points_at = select(AliasRow.number).where(AliasRow.task == task, AliasRow.name == (selector or PROD))
    number: Any = points_at.scalar_subquery()
    if selector is None:
        newest = select(func.max(VersionRow.number)).where(VersionRow.task == task, VersionRow.deleted.is_(None))
        number = func.coalesce(number, newest.scalar_subquery())
    return live.where(VersionRow.task == task, VersionRow.number == number)


def _explain(session: Session, reference: str) -> NoReturn:
    if (sha256 := digest_of(reference)) is not None:
        raise NotFound(f"no version has the sha256 {sha256}", hint="It was never published here, or is deleted.")
    task, selector = split_reference(reference)
    find_task(session, task)
    if isinstance(selector, int):
        find_version(session, task, selector)
    elif selector is not None:
        known = aliases_of(session, task)
        raise NotFound(f"{task} has no alias {selector[:80]!r}", hint=did_you_mean(selector, known))
    raise NotFound(f"{task} has no versions", hint="All were deleted; publish one.")


def find_version(session: Session, task: str, number: int) -> VersionRow:
    """Return a version that is not deleted, or raise NotFound."""
    row = session.get(VersionRow, (task, number))
    if row is None:
        newest = find_task(session, task).last_number
        raise NotFound(f"no version {task}@{number}", hint=f"The newest is {task}@{newest}.")
    if row.deleted is not None:
        why = f": {row.deleted_why}" if row.deleted_why else ""
        when = f"{row.deleted:%Y-%m-%d %H:%M:%S} UTC"
        raise NotFound(f"{task}@{number} was deleted by {row.deleted_by} at {when}{why}", hint="Publish it again.")
    return row
