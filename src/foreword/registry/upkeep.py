"""Freeing the blobs that no version needs."""

from __future__ import annotations

import time

from sqlalchemy import select
from sqlalchemy.orm import Session

from foreword.registry.audit import write_audit
from foreword.registry.blobs import Blobs, StoredBlob
from foreword.registry.compiled import compiled_among, forget_orphans
from foreword.registry.database import Database
from foreword.registry.records import Freed
from foreword.registry.tables import VersionRow

BATCH = 20
"""Blobs removed in one transaction: so long do other writers wait, which is a second where a bucket is far away."""


def collect(database: Database, blobs: Blobs, grace_s: float, who: str | None) -> Freed:
    """Remove what is older than `grace_s` seconds and belongs to no version; return it. Without `who` only count it."""
    now = time.time()
    old = [blob for blob in blobs.stored() if now - blob.modified >= grace_s]  # a bucket's list takes its time
    if who is not None:
        with database.writing() as session:  # before the files: a row must not outlive its blob
            forget_orphans(session)
    sizes: list[int] = []
    for batch in (old[first : first + BATCH] for first in range(0, len(old), BATCH)):
        if who is None:
            with database.reading() as session:
                sizes += [blob.num_bytes for blob in _free(session, batch)]
            continue
        with database.writing() as session:
            freed = [blob.num_bytes for blob in _free(session, batch) if blobs.remove(blob)]
            if freed:
                details = {"blobs": len(freed), "bytes": sum(freed)}
                write_audit(session, database.now(session), who, "gc", "blobs", details)
        sizes += freed
    return Freed(num_blobs=len(sizes), num_bytes=sum(sizes))


def _free(session: Session, found: list[StoredBlob]) -> list[StoredBlob]:
    digests = [blob.sha256 for blob in found if blob.sha256]
    versions = select(VersionRow.sha256).where(VersionRow.sha256.in_(digests), VersionRow.deleted.is_(None))
    used = {*session.scalars(versions), *compiled_among(session, digests)}
    return [blob for blob in found if blob.sha256 not in used]
