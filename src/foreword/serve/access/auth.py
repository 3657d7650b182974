"""Who asks, and what they may do: keys and grants against the newest snapshot. Imports no torch.

Every fault of a key gives the same answer, after the same work. A task that a tenant was not granted and one that does
not exist are told apart neither by the answer nor by what is done for it: the registry is asked for neither.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from datetime import datetime

from foreword.errors import Forbidden, NotFound, Unauthorized, did_you_mean
from foreword.registry.access_records import ALL_TASKS, Limits, Right, Snapshot
from foreword.registry.records import split_reference
from foreword.serve.access.control import Control
from foreword.serve.versions.names import Target

ID_LENGTH = len("fw_") + 10
MAX_KEY_LENGTH = 200
DIGEST_REFERENCE = "sha256:"
_NOBODYS_DIGEST = hashlib.sha256(b"foreword/no-such-key").hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who asks. Without keys everybody is ANYBODY."""

    tenant: str | None = None
    """None for a platform admin, and for ANYBODY."""
    key_id: str = ""
    is_admin: bool = False

    @property
    def scope(self) -> str:
        """Whose cached blocks its requests may share."""
        return self.tenant or ""

    @property
    def who(self) -> str:
        """As the audit names it: the key's id, and its tenant."""
        return f"{self.key_id} ({self.tenant})" if self.tenant else self.key_id


ANYBODY = Principal()


def authenticate(snapshot: Snapshot, now: datetime, authorization: str | None) -> Principal:
    """Return whose key an `Authorization` header holds. Raises Unauthorized with one text for whatever is wrong."""
    scheme, _, text = (authorization or "").partition(" ")
    text = text.strip()
    is_missing = scheme.lower() != "bearer" or not text
    key = snapshot.keys.get(text[:ID_LENGTH])
    digest = hashlib.sha256(text[: MAX_KEY_LENGTH + 1].encode(errors="surrogateescape")).hexdigest()
    is_right = hmac.compare_digest(digest, key.secret_sha256 if key is not None else _NOBODYS_DIGEST)
    if is_missing:
        raise Unauthorized("missing")
    if key is None or not is_right or len(text) > MAX_KEY_LENGTH:
        raise Unauthorized("unknown" if key is None else "wrong")
    if reason := ended(snapshot, key.id, now):
        raise Unauthorized(reason)
    return Principal(tenant=key.tenant, key_id=key.id, is_admin=key.tenant is None)


def ended(snapshot: Snapshot, key_id: str, now: datetime) -> str:
    """Return why a key that was good is so no more, or ""."""
    key = snapshot.keys.get(key_id)
    if key is None:
        return "unknown"
    if key.revoked is not None:
        return "revoked"
    if not key.is_live(now):
        return "expired"
    if key.tenant is not None:
        tenant = snapshot.tenants.get(key.tenant)
        if tenant is None or tenant.disabled:
            return "disabled"
    return ""


class Guard:
    """Asks of every request who it is and whether it may; lets everything pass where no keys are required."""

    def __init__(self, control: Control, *, requires_keys: bool) -> None:
        self.control = control
        self.requires_keys = requires_keys
        self._granted: dict[tuple[str, Right], frozenset[str]] = {}
        control.on_change(lambda old, new: self._granted.clear())

    def principal(self, authorization: str | None) -> Principal:
        """Return who asks. Raises Unauthorized, and Unavailable where the snapshot is too old to trust a key."""
        if not self.requires_keys:
            return ANYBODY
        return authenticate(self.control.fresh(), self.control.now(), authorization)

    def admin(self, authorization: str | None) -> Principal:
        """Return who asks for something of the platform's. Raises Forbidden for a tenant's key."""
        principal = self.principal(authorization)
        if self.requires_keys and not principal.is_admin:
            raise Forbidden("this needs an admin key", hint="An admin key is one without a tenant.")
        return principal

    def limits(self, principal: Principal) -> Limits | None:
        """Return the limits of a principal's tenant; None without one."""
        tenant = self.control.snapshot.tenants.get(principal.tenant or "")
        return tenant.limits if tenant is not None else None

    def may(self, principal: Principal, right: Right, task: str) -> bool:
        """Return whether a principal has a right to a task, or to the base by its name."""
        if principal.tenant is None:
            return principal.is_admin or not self.requires_keys
        granted = self.granted(principal.tenant, right)
        return task in granted or ALL_TASKS in granted

    def granted(self, tenant: str, right: Right) -> frozenset[str]:
        """Return the names that a tenant was granted, perhaps "*"."""
        key = (tenant, right)
        if key not in self._granted:
            grants = self.control.snapshot.grants.get(tenant, ())
            self._granted[key] = frozenset(grant.task for grant in grants if grant.right == right)
        return self._granted[key]

    def ended(self, principal: Principal, task: str | None) -> str:
        """Return why an answer under way (of a task, where it is known already) may go on no more, or ""."""
        if not self.requires_keys:
            return ""
        if reason := ended(self.control.snapshot, principal.key_id, self.control.now()):
            return reason
        return "" if task is None or self.may(principal, "call", task) else "withdrawn"

    def check(self, principal: Principal, name: str) -> None:
        """Raise NotFound where a model's name stands for nothing that this principal may call."""
        if name.startswith(DIGEST_REFERENCE):  # says no task: `check_target` does
            return
        if not self.may(principal, "call", split_reference(name)[0]):
            raise self.unknown(principal, name)

    def check_target(self, principal: Principal, target: Target) -> None:
        """Raise NotFound where a principal may not call what a name led to."""
        if not self.may(principal, "call", target.labels[0]):
            raise self.unknown(principal, target.name)

    def unknown(self, principal: Principal, name: str, error: NotFound | None = None) -> NotFound:
        """Return what is said of a name that is unknown (as `error` tells), or not granted; a tenant hears no more.

        The registry's own text may name other tenants' tasks, or who deleted a version.
        """
        if principal.tenant is None and error is not None:
            return error
        known = self.granted(principal.tenant or "", "call") - {ALL_TASKS}
        hint = f"{did_you_mean(name[:80], known)} GET /v1/models lists what this key may call.".strip()
        return NotFound(f"no model {name[:80]!r}", hint=hint)
