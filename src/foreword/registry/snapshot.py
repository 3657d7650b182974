"""Reading what a gateway must know: one query for each table, whatever the number of rows."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import Row, or_, select
from sqlalchemy.orm import Session

from foreword.registry.access_records import Grant, Key, Limits, Right, Route, RouteKind, Snapshot, Tenant
from foreword.registry.tables import DrainingRow, GrantRow, KeyRow, RegistryRow, RouteRow, TenantRow

ENDED_FOR = timedelta(days=1)
"""How long a snapshot still shows a key that has ended, so that a gateway can say why it refuses it."""


def read_snapshot(session: Session, now: datetime) -> Snapshot:
    """Read all of it in one transaction."""
    since = now - ENDED_FOR
    rows = select(  # columns, not entities: there may be ten thousand
        KeyRow.id,
        KeyRow.tenant,
        KeyRow.name,
        KeyRow.secret_sha256,
        KeyRow.created,
        KeyRow.expires,
        KeyRow.revoked,
    ).where(
        or_(KeyRow.revoked.is_(None), KeyRow.revoked > since), or_(KeyRow.expires.is_(None), KeyRow.expires > since)
    )
    keys = {
        id: Key(
            id=id,
            tenant=tenant,
            name=name,
            secret_sha256=secret_sha256,
            created=created,
            expires=expires,
            revoked=revoked,
        )
        for id, tenant, name, secret_sha256, created, expires, revoked in session.execute(rows)
    }
    grants: dict[str, list[Grant]] = {}
    for row in session.execute(select(GrantRow.tenant, GrantRow.task, GrantRow.right)):
        grant = Grant(tenant=row.tenant, task=row.task, right=cast(Right, row.right))
        grants.setdefault(row.tenant, []).append(grant)
    routes: dict[str, list[Route]] = {}
    for route in map(route_from_row, session.scalars(select(RouteRow).order_by(RouteRow.task, RouteRow.kind))):
        routes.setdefault(route.task, []).append(route)
    return Snapshot(
        revision=session.execute(select(RegistryRow.revision)).scalar_one(),
        now=now,
        tenants={row.name: tenant_from_row(row) for row in session.execute(select(*TenantRow.__table__.columns))},
        keys=keys,
        grants={tenant: tuple(held) for tenant, held in grants.items()},
        routes={task: tuple(both) for task, both in routes.items()},
        draining=frozenset(session.scalars(select(DrainingRow.url))),
    )


def tenant_from_row(row: TenantRow | Row[Any]) -> Tenant:
    """Return the row as a record."""
    limits = Limits(
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        concurrent=row.concurrent,
        max_prompt_tokens=row.max_prompt_tokens,
        max_new_tokens=row.max_new_tokens,
    )
    return Tenant(name=row.name, limits=limits, disabled=row.disabled, created=row.created)


def key_from_row(row: KeyRow) -> Key:
    """Return the row as a record."""
    return Key(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        secret_sha256=row.secret_sha256,
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
    )


def route_from_row(row: RouteRow) -> Route:
    """Return the row as a record."""
    return Route(
        task=row.task,
        kind=cast(RouteKind, row.kind),
        number=row.number,
        fraction=row.fraction,
        salt=row.salt,
        keep_inputs=row.keep_inputs,
    )
