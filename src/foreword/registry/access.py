"""Who may call what: tenants, keys, grants; where traffic goes besides: routes and draining replicas; what was done.

Each change is one transaction that also raises the revision, by which gateways notice it, and writes an audit row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from types import EllipsisType

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from foreword.errors import ConfigError, Conflict, NotFound, did_you_mean
from foreword.registry.access_checks import (
    check_fraction,
    check_grant,
    check_kind,
    check_label,
    check_limits,
    check_num_rows,
    check_url,
)
from foreword.registry.access_records import (
    AuditEntry,
    Grant,
    Key,
    Limits,
    Right,
    Route,
    RouteKind,
    ShadowPair,
    ShadowReport,
    Snapshot,
    Tenant,
    Usage,
)
from foreword.registry.audit import bump, read_audit, signed, write_audit
from foreword.registry.database import Database
from foreword.registry.lookup import find, find_task
from foreword.registry.records import check_name, is_name, is_text
from foreword.registry.snapshot import key_from_row, read_snapshot, route_from_row, tenant_from_row
from foreword.registry.tables import DrainingRow, GrantRow, KeyRow, RegistryRow, RouteRow, TenantRow
from foreword.registry.usage import MAX_PAIRS, add_pair, forget_pairs, read_pairs, report_pairs, write_usage

_KEY_ID = re.compile(r"fw_[a-z2-7]{10}")
_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


def secret_digest(plaintext: str) -> str:
    """Return what is stored of a key: the sha256 of the whole of it, as hex.

    A fast hash is right here: the secret is 256 random bits, so there is nothing to guess; slow hashes are for
    passwords that people choose, and would cost every request their time.
    """
    return hashlib.sha256(plaintext.encode()).hexdigest()


class Access:
    """Tenants, keys, grants, routes and draining replicas of a registry. May be shared by threads.

    `who` is the user of this process where it is not given. Every method raises RegistryError when the database fails.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def revision(self) -> int:
        """Return the number that goes up with every change that a gateway must know."""
        with self._database.reading(statements=1) as session:
            return session.execute(select(RegistryRow.revision)).scalar_one()

    def snapshot(self) -> Snapshot:
        """Return all that a gateway must know, as it stood at one moment."""
        with self._database.reading() as session:
            return read_snapshot(session, self._database.now(session))

    def create_tenant(self, name: str, *, limits: Limits = Limits(), who: str | None = None) -> Tenant:  # noqa: B008
        """Create a tenant, which may do nothing yet. Raises ConfigError on a bad name or limit, Conflict if it is."""
        check_name(name, "tenant")
        check_limits(limits)
        who, _ = signed(who)
        with self._database.writing() as session:
            if session.get(TenantRow, name) is not None:
                raise Conflict(f"the tenant {name} exists", hint="Change its limits, or choose another name.")
            now = self._database.now(session)
            row = TenantRow(name=name, disabled=False, created=now, **limits.to_json())
            session.add(row)
            _done(session, now, who, "tenant.create", name, {"limits": _set_limits(limits)})
            return tenant_from_row(row)

    def set_limits(self, name: str, limits: Limits, *, who: str | None = None) -> Tenant:
        """Replace a tenant's limits. Raises NotFound, ConfigError on a bad limit."""
        check_limits(limits)
        who, _ = signed(who)
        with self._database.writing() as session:
            row = _tenant(session, name)
            if (old := tenant_from_row(row).limits) != limits:
                for field, value in limits.to_json().items():
                    setattr(row, field, value)
                details = {"from": _set_limits(old), "to": _set_limits(limits)}
                _done(session, self._database.now(session), who, "tenant.limits", name, details)
            return tenant_from_row(row)

    def set_disabled(self, name: str, disabled: bool, *, who: str | None = None) -> Tenant:
        """Refuse a tenant's keys, or take them again. Raises NotFound."""
        who, _ = signed(who)
        with self._database.writing() as session:
            row = _tenant(session, name)
            if row.disabled != disabled:
                row.disabled = disabled
                action = "tenant.disable" if disabled else "tenant.enable"
                _done(session, self._database.now(session), who, action, name)
            return tenant_from_row(row)

    def delete_tenant(self, name: str, *, who: str | None = None) -> None:
        """Delete a tenant with its grants and revoke its keys, for good: a new tenant of that name has none of them.

        Raises NotFound.
        """
        who, _ = signed(who)
        with self._database.writing() as session:
            row = _tenant(session, name)
            now = self._database.now(session)
            mine = update(KeyRow).where(KeyRow.tenant == name, KeyRow.revoked.is_(None)).values(revoked=now)
            revoked = session.scalars(mine.returning(KeyRow.id)).all()
            session.execute(delete(GrantRow).where(GrantRow.tenant == name))
            session.delete(row)
            _done(session, now, who, "tenant.delete", name, {"revoked": sorted(revoked)})

    def tenants(self) -> list[Tenant]:
        """Return all tenants by name."""
        with self._database.reading(statements=1) as session:
            return [tenant_from_row(row) for row in session.scalars(select(TenantRow).order_by(TenantRow.name))]

    def create_key(
        self, tenant: str | None, *, name: str = "", expires: datetime | None = None, who: str | None = None
    ) -> tuple[Key, str]:
        """Create a key of a tenant (None: a platform admin's); return it and the whole key, which is kept nowhere.

        Raises NotFound, ConfigError when `name` is no text or `expires` not in the future.
        """
        who, _ = signed(who)
        check_label(name, "the key's name")
        with self._database.writing() as session:
            if tenant is not None:
                _tenant(session, tenant)
            now = self._database.now(session)
            if expires is not None and (expires.tzinfo is None or expires <= now):
                raise ConfigError(
                    f"the key would expire at {expires.isoformat()}, and it is {now.isoformat()} now",
                    hint="Give a time in the future, with its time zone.",
                )
            key, plaintext = _new_key(session, tenant, name, now, expires)
            details = {"tenant": tenant, "name": name, "expires": expires and expires.isoformat()}
            _done(session, now, who, "key.create", key.id, details)
            return key, plaintext

    def rotate_key(self, id: str, *, grace_s: float = 0.0, who: str | None = None) -> tuple[Key, str]:
        """Create a successor of a key: same tenant, name and time to live; the old one expires after `grace_s` seconds.

        Raises NotFound, Conflict when the key has ended already, ConfigError when `grace_s` is below 0 or no number.
        """
        who, _ = signed(who)
        if not 0 <= grace_s < 10**9:
            raise ConfigError(f"a grace period of {grace_s} s", hint="Give 0 or more seconds.")
        with self._database.writing() as session:
            old, now = _key(session, id), self._database.now(session)
            if not key_from_row(old).is_live(now):
                raise Conflict(f"the key {id} has ended already", hint="Create a new one.")
            expires = None if old.expires is None else now + (old.expires - old.created)
            key, plaintext = _new_key(session, old.tenant, old.name, now, expires)
            ends = now + timedelta(seconds=grace_s)
            old.expires = ends if old.expires is None else min(old.expires, ends)
            details = {"tenant": old.tenant, "new": key.id, "old_expires": old.expires.isoformat()}
            _done(session, now, who, "key.rotate", id, details)
            return key, plaintext

    def revoke_key(self, id: str, *, who: str | None = None) -> Key:
        """End a key now, for good. Raises NotFound."""
        who, _ = signed(who)
        with self._database.writing() as session:
            row = _key(session, id)
            if row.revoked is None:
                row.revoked = self._database.now(session)
                _done(session, row.revoked, who, "key.revoke", id, {"tenant": row.tenant, "name": row.name})
            return key_from_row(row)

    def keys(self, tenant: str | EllipsisType | None = ...) -> list[Key]:
        """Return all keys, ended ones too, by time; or those of a tenant (None: the platform admins').

        Raises NotFound.
        """
        with self._database.reading() as session:
            rows = select(KeyRow).order_by(KeyRow.created, KeyRow.id)
            if isinstance(tenant, str):
                rows = rows.where(KeyRow.tenant == _tenant(session, tenant).name)
            elif tenant is None:
                rows = rows.where(KeyRow.tenant.is_(None))
            return [key_from_row(row) for row in session.scalars(rows)]

    def grant(self, tenant: str, task: str, right: Right, *, who: str | None = None) -> Grant:
        """Let a tenant call or manage a task ("*": all), which need not be published yet.

        Raises NotFound, ConfigError on a bad task name or right.
        """
        check_grant(task, right)
        who, _ = signed(who)
        with self._database.writing() as session:
            _tenant(session, tenant)
            if session.get(GrantRow, (tenant, task, right)) is None:
                session.add(GrantRow(tenant=tenant, task=task, right=right))
                _done(session, self._database.now(session), who, "grant", tenant, {"task": task, "right": right})
            return Grant(tenant=tenant, task=task, right=right)

    def withdraw(self, tenant: str, task: str, right: Right, *, who: str | None = None) -> None:
        """Take a grant back. Raises NotFound where there is none, ConfigError as `grant`."""
        check_grant(task, right)
        who, _ = signed(who)
        with self._database.writing() as session:
            _tenant(session, tenant)
            if (row := session.get(GrantRow, (tenant, task, right))) is None:
                held = session.execute(select(GrantRow.task, GrantRow.right).where(GrantRow.tenant == tenant))
                names = ", ".join(f"{right} {task}" for task, right in held)
                raise NotFound(f"{tenant} may not {right} {task}", hint=f"It may {names}." if names else "")
            session.delete(row)
            _done(session, self._database.now(session), who, "withdraw", tenant, {"task": task, "right": right})

    def set_route(
        self,
        task: str,
        kind: RouteKind,
        reference: str,
        fraction: float,
        *,
        keep_inputs: bool = False,
        who: str | None = None,
    ) -> Route:
        """Send a fraction of a task's traffic to the version that `reference` names now.

        One canary and one shadow at most for a task; a second call replaces the first, and users stay on the side that
        they are on while the candidate stays. Raises NotFound, ConfigError when the version is another task's, the
        fraction not in (0, 1], or a canary is to keep inputs.
        """
        check_kind(kind)
        check_fraction(fraction)
        if keep_inputs and kind != "shadow":
            raise ConfigError("only a shadow keeps inputs", hint="Leave keep_inputs out.")
        who, _ = signed(who)
        with self._database.writing() as session:
            find_task(session, task)
            version = find(session, reference)
            if version.task != task:
                raise ConfigError(f"{reference} is no version of {task}", hint=f"Name one: {task}@1, for example.")
            row = session.get(RouteRow, (task, kind))
            route = Route(
                task=task,
                kind=kind,
                number=version.number,
                fraction=float(fraction),
                salt=row.salt if row is not None and row.number == version.number else secrets.token_hex(8),
                keep_inputs=keep_inputs,
            )
            if row is None or route_from_row(row) != route:
                session.merge(RouteRow(**dataclasses.asdict(route)))
                _done(session, self._database.now(session), who, f"{kind}.set", task, route.to_json())
            return route

    def clear_route(self, task: str, kind: RouteKind, *, who: str | None = None) -> None:
        """Send no traffic besides any more. Raises NotFound where none was sent."""
        check_kind(kind)
        who, _ = signed(who)
        with self._database.writing() as session:
            find_task(session, task)
            if (row := session.get(RouteRow, (task, kind))) is None:
                raise NotFound(f"{task} has no {kind}")
            session.delete(row)
            _done(session, self._database.now(session), who, f"{kind}.clear", task, {"number": row.number})

    def drain(self, url: str, *, who: str | None = None) -> None:
        """Give a replica no new requests. Raises ConfigError when `url` is none."""
        url = check_url(url)
        who, _ = signed(who)
        with self._database.writing() as session:
            if session.get(DrainingRow, url) is None:
                now = self._database.now(session)
                session.add(DrainingRow(url=url, since=now))
                _done(session, now, who, "drain", url)

    def undrain(self, url: str, *, who: str | None = None) -> None:
        """Give a replica requests again. Raises NotFound when it is not draining."""
        url = check_url(url)
        who, _ = signed(who)
        with self._database.writing() as session:
            if (row := session.get(DrainingRow, url)) is None:
                draining = session.scalars(select(DrainingRow.url))
                raise NotFound(f"{url} is not draining", hint=did_you_mean(url, draining))
            session.delete(row)
            _done(session, self._database.now(session), who, "undrain", url)

    def audit(
        self, *, limit: int = 100, before: int | None = None, action: str | None = None, subject: str | None = None
    ) -> list[AuditEntry]:
        """Return what was done, newest first: `before` an entry's id, of one action, on one subject."""
        check_num_rows(limit)
        if not all(is_text(text) for text in (action, subject) if text is not None):
            return []
        with self._database.reading(statements=1) as session:
            return read_audit(session, limit=limit, before=before, action=action, subject=subject)

    def sync_usage(self, gateway: str, used: Mapping[str, Usage]) -> Mapping[str, Usage]:
        """Write down what a gateway let each tenant use in the present minute; return the sum of all other gateways'.

        `used` is the whole: a tenant left out uses nothing there. A gateway not heard of for 5 s counts no more.
        Minutes are the database's.
        """
        check_label(gateway, "the gateway's name", at_least=1)
        with self._database.writing_beside() as session:
            return write_usage(session, self._database.now(session), gateway, used)

    def add_shadow_pair(self, pair: ShadowPair) -> None:
        """Keep a pair of answers; the oldest of the task go when there are more than `MAX_PAIRS`."""
        with self._database.writing_beside() as session:
            add_pair(session, pair)

    def shadow_pairs(self, task: str, *, limit: int = 100) -> list[ShadowPair]:
        """Return a task's pairs of answers, newest first. Raises NotFound."""
        check_num_rows(limit)
        with self._database.reading() as session:
            return read_pairs(session, find_task(session, task).name, limit)

    def shadow_report(self, task: str, *, limit: int = 10) -> ShadowReport | None:
        """Return how often and where the candidate last shadowed disagrees, with at most `limit` disagreements.

        None where no pairs are kept. Raises NotFound.
        """
        check_num_rows(limit)
        with self._database.reading() as session:
            return report_pairs(read_pairs(session, find_task(session, task).name, MAX_PAIRS), limit)

    def forget_shadow_pairs(self, task: str, *, who: str | None = None) -> int:
        """Remove a task's pairs of answers, with what inputs were kept; return how many. Raises NotFound."""
        who, _ = signed(who)
        with self._database.writing() as session:
            num_pairs = forget_pairs(session, find_task(session, task).name)
            if num_pairs:
                write_audit(session, self._database.now(session), who, "shadow.forget", task, {"pairs": num_pairs})
            return num_pairs


def _done(
    session: Session, now: datetime, who: str, action: str, subject: str, details: Mapping[str, object] | None = None
) -> None:
    write_audit(session, now, who, action, subject, details)
    bump(session)


def _tenant(session: Session, name: str) -> TenantRow:
    row = session.get(TenantRow, name) if is_name(name) else None
    if row is None:
        raise NotFound(f"no tenant {name[:80]!r}", hint=did_you_mean(name, session.scalars(select(TenantRow.name))))
    return row


def _key(session: Session, id: str) -> KeyRow:
    row = session.get(KeyRow, id) if _KEY_ID.fullmatch(id) else None
    if row is None:
        raise NotFound(f"no key {id[:13]!r}", hint="A key's id is fw_ and 10 letters or digits; list the keys.")
    return row


def _new_key(
    session: Session, tenant: str | None, name: str, now: datetime, expires: datetime | None
) -> tuple[Key, str]:
    id = "fw_" + "".join(secrets.choice(_ALPHABET) for _ in range(10))
    plaintext = f"{id}_{secrets.token_urlsafe(32)}"
    row = KeyRow(
        id=id,
        tenant=tenant,
        name=name,
        secret_sha256=secret_digest(plaintext),
        created=now,
        expires=expires,
        revoked=None,
    )
    session.add(row)
    session.flush()
    return key_from_row(row), plaintext


def _set_limits(limits: Limits) -> dict[str, int]:
    return {field.name: value for field in dataclasses.fields(limits) if (value := getattr(limits, field.name))}
