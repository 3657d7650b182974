"""Who may do what, and where a task's traffic goes: immutable records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Right = Literal["call", "manage"]
RouteKind = Literal["canary", "shadow"]
ALL_TASKS = "*"
"""In a grant: every task, those of later too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a tenant may use; None is no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None
    """Requests at once, on all gateways together."""
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None

    def to_json(self) -> dict[str, int | None]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One team, or whoever else gets keys of its own."""

    name: str
    limits: Limits
    disabled: bool
    """Its keys are refused."""
    created: datetime

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "name": self.name,
            "limits": self.limits.to_json(),
            "disabled": self.disabled,
            "created": self.created.isoformat(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key, without its secret."""

    id: str
    """`fw_` and 10 characters of base32: what is shown, and what the key begins with."""
    tenant: str | None
    """None: a platform admin's."""
    name: str
    secret_sha256: str = field(repr=False)
    """Of the whole key."""
    created: datetime
    expires: datetime | None
    revoked: datetime | None

    def is_live(self, now: datetime) -> bool:
        """Return whether the key is good at `now`: not revoked, not expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict, without the secret's digest."""
        return {
            "id": self.id,
            "tenant": self.tenant,
            "name": self.name,
            "created": self.created.isoformat(),
            "expires": self.expires and self.expires.isoformat(),
            "revoked": self.revoked and self.revoked.isoformat(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A tenant's right to a task."""

    tenant: str
    task: str
    """Its name, which need not be published yet, or "*" for all."""
    right: Right

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A part of a task's traffic that goes to a candidate: instead of prod (canary), or as a copy besides (shadow)."""

    task: str
    kind: RouteKind
    number: int
    """The candidate's."""
    fraction: float
    """Above 0, at most 1."""
    salt: str
    """Decides with the user which requests they are; stays while the candidate does."""
    keep_inputs: bool
    """A shadow's inputs are kept beside the answers."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        data = dataclasses.asdict(self)
        del data["salt"]
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a gateway must know, at one moment."""

    revision: int
    now: datetime
    """By the database's clock."""
    tenants: Mapping[str, Tenant]
    keys: Mapping[str, Key]
    """By id; those that ended more than a day ago are left out."""
    grants: Mapping[str, tuple[Grant, ...]]
    """By tenant."""
    routes: Mapping[str, tuple[Route, ...]]
    """By task."""
    draining: frozenset[str]
    """URLs of replicas, without a slash at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One admin action."""

    id: int
    """Goes up with time."""
    when: datetime
    who: str
    action: str
    """As "key.revoke" or "promote"."""
    subject: str
    """What was acted on: a tenant, a key's id, a task, triage@prod, a URL."""
    details: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "id": self.id,
            "when": self.when.isoformat(),
            "who": self.who,
            "action": self.action,
            "subject": self.subject,
            "details": dict(self.details),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a tenant has used in the present minute, and how many of its requests run."""

    requests: int
    tokens: int
    running: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowPair:
    """An answer that was given, and the candidate's to the same request."""

    id: int = 0
    """Given by the registry."""
    when: datetime
    task: str
    number: int
    """The version that answered."""
    candidate: int
    request_id: str
    input: str | None
    """None where the route does not keep inputs."""
    answer: str
    candidate_answer: str
    agrees: bool
    seconds: float
    candidate_seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {**dataclasses.asdict(self), "when": self.when.isoformat()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowReport:
    """What the pairs of the candidate that was last shadowed say."""

    task: str
    candidate: int
    num_pairs: int
    """Those kept, at most `usage.MAX_PAIRS` of the task."""
    num_agreeing: int
    median_s: float
    candidate_median_s: float
    disagreements: tuple[ShadowPair, ...]
    """The last ones, newest first."""

    @property
    def agreement(self) -> float:
        """The fraction of pairs that agree."""
        return self.num_agreeing / self.num_pairs

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "task": self.task,
            "candidate": self.candidate,
            "num_pairs": self.num_pairs,
            "num_agreeing": self.num_agreeing,
            "agreement": self.agreement,
            "median_s": self.median_s,
            "candidate_median_s": self.candidate_median_s,
            "disagreements": [pair.to_json() for pair in self.disagreements],
        }
