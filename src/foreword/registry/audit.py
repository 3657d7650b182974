"""The audit table and the revision: what every admin action writes in its own transaction."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from foreword.errors import ConfigError
from foreword.registry.access_records import AuditEntry
from foreword.registry.folders import user_name
from foreword.registry.records import finite, is_text
from foreword.registry.tables import AuditRow, RegistryRow


def signed(who: str | None, why: str = "") -> tuple[str, str]:
    """Return who acts (by default the user of this process) and why. Raises ConfigError where one is no text."""
    for name, value in (("who", who or ""), ("why", why)):
        if not is_text(value):
            raise ConfigError(f"{name} is {value!r}, which is no text", hint="Leave out NUL and broken characters.")
    return who or user_name(), why


def write_audit(
    session: Session, now: datetime, who: str, action: str, subject: str, details: Mapping[str, Any] | None = None
) -> None:
    """Write an action down."""
    session.add(AuditRow(at=now, who=who, action=action, subject=subject, details=finite(details or {})))


def bump(session: Session) -> None:
    """Raise the revision: this transaction changes what a gateway must know."""
    session.execute(update(RegistryRow).values(revision=RegistryRow.revision + 1))


def read_audit(
    session: Session, *, limit: int, before: int | None = None, action: str | None = None, subject: str | None = None
) -> list[AuditEntry]:
    """Return the newest entries first: at most `limit`, of an id below `before`, of one action, on one subject."""
    entries = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if before is not None:
        entries = entries.where(AuditRow.id < before)
    if action is not None:
        entries = entries.where(AuditRow.action == action)
    if subject is not None:
        entries = entries.where(AuditRow.subject == subject)
    return [
        AuditEntry(id=row.id, when=row.at, who=row.who, action=row.action, subject=row.subject, details=row.details)
        for row in session.scalars(entries)
    ]
