"""Finding tasks, versions and aliases inside a transaction; what is not there is NotFound, with near names."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from foreword.errors import NotFound, did_you_mean
from foreword.registry.records import is_name, split_reference
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
    """Return the version that a reference names now, or raise NotFound."""
    task, selector = split_reference(reference)
    find_task(session, task)
    if isinstance(selector, int):
        return find_version(session, task, selector)
    aliases = aliases_of(session, task)
    if (name := PROD if selector is None else selector) in aliases:
        return find_version(session, task, aliases[name])
    if selector is not None:
        raise NotFound(f"{task} has no alias {selector[:80]!r}", hint=did_you_mean(selector, aliases))
    live = select(func.max(VersionRow.number)).where(VersionRow.task == task, VersionRow.deleted.is_(None))
    newest = session.scalar(live)
    if newest is None:
        raise NotFound(f"{task} has no versions", hint="All were deleted; publish one.")
    return find_version(session, task, newest)


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
