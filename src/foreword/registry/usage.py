"""What gateways tell each other through the database: use of the present minute; and pairs of shadow answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import case, delete, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from foreword.registry.access_records import ShadowPair, ShadowReport, Usage
from foreword.registry.tables import ShadowPairRow, UsageRow

SILENT = timedelta(seconds=5)
"""A gateway not heard of for so long counts no more."""
KEPT = timedelta(minutes=2)
"""Rows not renewed for so long are removed by whoever comes by."""
MAX_PAIRS = 1000
"""Pairs of shadow answers kept for a task."""


def write_usage(session: Session, now: datetime, gateway: str, used: Mapping[str, Usage]) -> dict[str, Usage]:
    """Replace the gateway's rows; return the sums over the others' by tenant.

    Needs no lock: a gateway changes rows of its own, in one order; what is old is removed only where nobody else holds
    it. READ COMMITTED is enough, since a sum that misses a row of this very moment is right a moment later.
    """
    minute = int(now.timestamp()) // 60
    if session.get_bind().dialect.name == "postgresql":
        # A crash of the server may lose the last use of a minute, and no request waits for its disk.
        session.connection().exec_driver_sql("SET LOCAL synchronous_commit = off")
    rows = [
        {
            "gateway": gateway,
            "tenant": tenant,
            "minute": minute,
            "requests": use.requests,
            "tokens": use.tokens,
            "running": use.running,
            "seen": now,
        }
        for tenant, use in sorted(used.items())
    ]
    if rows:
        session.execute(_upsert(session), rows)
    # All rows of a call carry the same time, so that older ones of this gateway are of tenants left out.
    gone = (UsageRow.gateway == gateway) & (UsageRow.seen < now) | (UsageRow.seen < now - KEPT)
    key = tuple_(UsageRow.gateway, UsageRow.tenant)
    free = select(UsageRow.gateway, UsageRow.tenant).where(gone).with_for_update(skip_locked=True)
    session.execute(delete(UsageRow).where(key.in_(free)))
    present = UsageRow.minute == minute
    sums = (
        select(
            UsageRow.tenant,
            func.sum(case((present, UsageRow.requests), else_=0)),
            func.sum(case((present, UsageRow.tokens), else_=0)),
            func.sum(UsageRow.running),
        )
        .where(UsageRow.gateway != gateway, UsageRow.seen >= now - SILENT)
        .group_by(UsageRow.tenant)
    )
    return {
        tenant: Usage(requests=int(requests), tokens=int(tokens), running=int(running))
        for tenant, requests, tokens, running in session.execute(sums)
    }


def _upsert(session: Session) -> Any:
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    insert = dialect.insert(UsageRow)
    changed = {name: insert.excluded[name] for name in ("minute", "requests", "tokens", "running", "seen")}
    return insert.on_conflict_do_update(index_elements=["gateway", "tenant"], set_=changed)


def add_pair(session: Session, pair: ShadowPair) -> None:
    """Keep a pair, and only the newest `MAX_PAIRS` of its task."""
    row = ShadowPairRow(
        at=pair.when,
        task=pair.task,
        number=pair.number,
        candidate=pair.candidate,
        request_id=_storable(pair.request_id),
        input=None if pair.input is None else _storable(pair.input),
        answer=_storable(pair.answer),
        candidate_answer=_storable(pair.candidate_answer),
        agrees=pair.agrees,
        seconds=pair.seconds,
        candidate_seconds=pair.candidate_seconds,
    )
    session.add(row)
    session.flush()
    ids = select(ShadowPairRow.id).where(ShadowPairRow.task == pair.task)
    old = ids.order_by(ShadowPairRow.id.desc()).offset(MAX_PAIRS).with_for_update(skip_locked=True)
    session.execute(delete(ShadowPairRow).where(ShadowPairRow.id.in_(old)))


def read_pairs(session: Session, task: str, limit: int) -> list[ShadowPair]:
    """Return a task's newest pairs, newest first."""
    rows = select(ShadowPairRow).where(ShadowPairRow.task == task).order_by(ShadowPairRow.id.desc()).limit(limit)
    return [
        ShadowPair(
            id=row.id,
            when=row.at,
            task=row.task,
            number=row.number,
            candidate=row.candidate,
            request_id=row.request_id,
            input=row.input,
            answer=row.answer,
            candidate_answer=row.candidate_answer,
            agrees=row.agrees,
            seconds=row.seconds,
            candidate_seconds=row.candidate_seconds,
        )
        for row in session.scalars(rows)
    ]


def report_pairs(pairs: Sequence[ShadowPair], num_shown: int) -> ShadowReport | None:
    """Return what the pairs, newest first, say of the newest one's candidate; None where there are none."""
    mine = [pair for pair in pairs if pair.candidate == pairs[0].candidate]
    if not mine:
        return None
    return ShadowReport(
        task=mine[0].task,
        candidate=mine[0].candidate,
        num_pairs=len(mine),
        num_agreeing=sum(pair.agrees for pair in mine),
        median_s=median(pair.seconds for pair in mine),
        candidate_median_s=median(pair.candidate_seconds for pair in mine),
        disagreements=tuple(pair for pair in mine if not pair.agrees)[:num_shown],
    )


def forget_pairs(session: Session, task: str) -> int:
    """Remove all pairs of a task; return how many there were."""
    gone = delete(ShadowPairRow).where(ShadowPairRow.task == task).returning(ShadowPairRow.id)
    return len(session.scalars(gone).all())


def _storable(text: str) -> str:
    """Return a text as PostgreSQL takes it: NUL and halves of surrogate pairs become U+FFFD."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "surrogatepass").decode("utf-8", "replace")
