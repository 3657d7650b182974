"""What the admin API takes: strict bodies and queries; unknown fields are refused. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from foreword.registry.access_records import Limits
from foreword.registry.records import is_text
from foreword.serve.http.openai_api import Strict

MAX_GRACE_S = 30 * 24 * 3600
MAX_ID = 2**63 - 1


def _text(value: str) -> str:
    if not is_text(value):
        raise ValueError("holds NUL or half of a surrogate pair")
    return value


Text = Annotated[str, Field(max_length=1000), AfterValidator(_text)]
Limit = Annotated[int, Field(ge=1, le=10**15)]
Number = Annotated[int, Field(ge=0, lt=10**9)]
Reference = Annotated[int, Field(ge=1, lt=10**9)] | Text
"""A version's number, or an alias that points at it."""


class LimitsBody(Strict):
    """A tenant's limits; what is left out or null is no limit."""

    requests_per_minute: Limit | None = None
    tokens_per_minute: Limit | None = None
    concurrent: Limit | None = None
    max_prompt_tokens: Limit | None = None
    max_new_tokens: Limit | None = None

    def limits(self) -> Limits:
        """Return them as the registry takes them."""
        return Limits(**self.model_dump())


class NewTenant(Strict):
    """A tenant to create."""

    name: Text
    limits: LimitsBody = LimitsBody()


class TenantChange(Strict):
    """What to change of a tenant; what is left out stays."""

    limits: LimitsBody | None = None
    """All of them: a limit left out in here is none any more."""
    disabled: bool | None = None


class NewKey(Strict):
    """A key to create."""

    tenant: Text | None
    """null makes an admin key."""
    name: Text = ""
    expires: Annotated[AwareDatetime, Field(strict=False)] | None = None


class Rotation(Strict):
    """A key that gets a successor."""

    grace_s: Annotated[float, Field(ge=0, le=MAX_GRACE_S)] = 0.0
    """How long the old key is good besides."""


class GrantBody(Strict):
    """A right to give."""

    tenant: Text
    task: Text
    """A name, the base's too, or "*"."""
    right: Literal["call", "manage"]


class RouteBody(Strict):
    """Traffic to send to a candidate."""

    task: Text
    kind: Literal["canary", "shadow"]
    version: Reference
    fraction: Annotated[float, Field(gt=0, le=1)]
    keep_inputs: bool = False


class ReplicaBody(Strict):
    """A replica."""

    url: Text


class Promotion(Strict):
    """A gated move of an alias."""

    version: Reference
    alias: Text = "prod"
    why: Text = ""
    force: bool = False


class Rollback(Strict):
    """A step back."""

    alias: Text = "prod"
    why: Text = ""
    expect: Number | None = None
    """The number that the alias must point at now."""


class AliasBody(Strict):
    """A move of an alias without a gate."""

    version: Reference
    why: Text = ""
    expect: Number | None = None
    """The number that the alias must point at now; 0: it must not be set."""


class Query(BaseModel):
    """What a query string may hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class NoQuery(Query):
    """Nothing."""


class KeysQuery(Query):
    """Which keys to list."""

    tenant: Text | None = None


class AuditQuery(Query):
    """Which entries to list, newest first."""

    limit: Annotated[int, Field(ge=1, le=10_000)] = 100
    before: Annotated[int, Field(ge=0, le=MAX_ID)] | None = None
    """Only entries with a lower id."""
    action: Text | None = None
    subject: Text | None = None
