"""Versions inside one transaction: written once, deleted once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from foreword.core.artefact import ArtefactHeader
from foreword.errors import Conflict
from foreword.registry.audit import bump, write_audit
from foreword.registry.blobs import Staged
from foreword.registry.lookup import aliases_of
from foreword.registry.records import finite, version_to_row
from foreword.registry.tables import RouteRow, TaskRow, VersionRow


def insert_version(
    session: Session,
    now: datetime,
    task: str,
    header: ArtefactHeader,
    copy: Staged,
    *,
    who: str,
    why: str,
    evaluation: Mapping[str, Any] | None,
) -> tuple[VersionRow, bool]:
    """Return the task's version of this file, and whether it is new.

    Raises Conflict when there is one with another evaluation than the given one.
    """
    owner = session.get(TaskRow, task)
    if owner is None:
        owner = TaskRow(name=task, last_number=0, created=now)
        session.add(owner)
    same = select(VersionRow).where(VersionRow.task == task, VersionRow.sha256 == copy.sha256)
    if (existing := session.scalars(same.where(VersionRow.deleted.is_(None))).first()) is not None:
        if evaluation is not None and existing.evaluation != finite(evaluation):
            raise Conflict(
                f"{task}@{existing.number} is this file with another evaluation; a version does not change",
                hint="Publish it without an evaluation, or delete that version first.",
            )
        return existing, False
    owner.last_number += 1
    session.flush()
    row = version_to_row(
        header,
        task=task,
        number=owner.last_number,
        sha256=copy.sha256,
        num_bytes=copy.num_bytes,
        who=who,
        why=why,
        created=now,
        evaluation=finite(header.evaluation if evaluation is None else evaluation),
    )
    session.add(row)
    session.flush()
    write_audit(session, now, who, "publish", f"{task}@{row.number}", {"sha256": row.sha256, "why": why})
    bump(session)  # a task without prod answers with its newest version
    return row, True


def delete_version(session: Session, now: datetime, row: VersionRow, *, who: str, why: str) -> None:
    """Mark a version as deleted. Raises Conflict while an alias or a route points at it."""
    pointing = [f"the alias {alias}" for alias, number in aliases_of(session, row.task).items() if number == row.number]
    routes = select(RouteRow.kind).where(RouteRow.task == row.task, RouteRow.number == row.number)
    pointing += [f"the {kind} route" for kind in session.scalars(routes.order_by(RouteRow.kind))]
    reference = f"{row.task}@{row.number}"
    if pointing:
        raise Conflict(f"{reference} is in use by {' and '.join(pointing)}", hint="Move or remove what points at it.")
    row.deleted, row.deleted_by, row.deleted_why = now, who, why
    write_audit(session, now, who, "delete", reference, {"sha256": row.sha256, "why": why})
    bump(session)
