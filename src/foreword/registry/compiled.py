"""Compiled files inside one transaction: which of them belongs to a version, and which belong to none any more."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import delete, exists, select
from sqlalchemy.orm import Session

from foreword.core.compiled import CompiledHeader
from foreword.errors import NotFound
from foreword.registry.blobs import Staged
from foreword.registry.records import CompiledBlob
from foreword.registry.tables import CompiledRow, VersionRow


def find_compiled(session: Session, source: str, dtype: str) -> CompiledBlob | None:
    """Return the file compiled from the artefact `source` on the base that it was trained for, or None."""
    own_base = exists().where(
        VersionRow.sha256 == CompiledRow.source,
        VersionRow.deleted.is_(None),
        VersionRow.base_weights_sha256 == CompiledRow.base_weights_sha256,
    )
    row = session.scalars(
        select(CompiledRow).where(CompiledRow.source == source, CompiledRow.dtype == dtype, own_base)
    ).first()
    return None if row is None else _record(row)


def same_compiled(session: Session, header: CompiledHeader) -> CompiledBlob | None:
    """Return the stored file of the same source, base and dtype, or None.

    Raises NotFound when no live version has the source.
    """
    live = select(VersionRow.number).where(VersionRow.sha256 == header.source, VersionRow.deleted.is_(None)).limit(1)
    if session.scalar(live) is None:
        raise NotFound(
            f"no version has the sha256 {header.source} that the file was compiled from",
            hint="Publish the artefact first; a deleted version has no compiled files.",
        )
    row = session.get(CompiledRow, (header.source, header.dtype, header.base.weights_sha256))
    return None if row is None else _record(row)


def insert_compiled(session: Session, now: datetime, header: CompiledHeader, copy: Staged) -> CompiledBlob:
    """Write a file down, in place of one whose blob was lost."""
    row = CompiledRow(
        source=header.source,
        dtype=header.dtype,
        base_weights_sha256=header.base.weights_sha256,
        sha256=copy.sha256,
        num_positions=header.num_positions,
        num_bytes=copy.num_bytes,
        created=now,
    )
    return _record(session.merge(row))


def forget_orphans(session: Session) -> None:
    """Remove the rows whose source no live version has."""
    live = exists().where(VersionRow.sha256 == CompiledRow.source, VersionRow.deleted.is_(None))
    session.execute(delete(CompiledRow).where(~live))


def compiled_among(session: Session, digests: Collection[str]) -> set[str]:
    """Return those of the digests that are compiled files of a live version's artefact."""
    live = exists().where(VersionRow.sha256 == CompiledRow.source, VersionRow.deleted.is_(None))
    return set(session.scalars(select(CompiledRow.sha256).where(CompiledRow.sha256.in_(digests), live)))


def _record(row: CompiledRow) -> CompiledBlob:
    return CompiledBlob(
        sha256=row.sha256,
        source=row.source,
        dtype=row.dtype,
        num_positions=row.num_positions,
        num_bytes=row.num_bytes,
    )
