"""The registry's tables.

They have natural keys (a task is its name, a version its task and number), so that a row read in a database shell says
what it is.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SCHEMA = "0002"
"""The migration that these models agree with; the newest in migrations/versions."""
_BIG_ID = BigInteger().with_variant(Integer(), "sqlite")  # SQLite counts up only what it calls INTEGER


class UTCDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC, also on databases that forget time zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn an aware datetime into UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the datetime as aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Base(DeclarativeBase):
    """Base of all tables. Constraints have names, so that a later migration can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {str: Text(), datetime: UTCDateTime(), dict[str, Any]: JSON()}  # noqa: RUF012


class TaskRow(Base):
    """A task: a name under which versions are numbered."""

    __tablename__ = "tasks"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    last_number: Mapped[int]
    """The highest number given out; never goes down, so that no number is used twice."""
    created: Mapped[datetime]


class VersionRow(Base):
    """A version. Only the three `deleted` columns ever change, once."""

    __tablename__ = "versions"

    task: Mapped[str] = mapped_column(String(64), ForeignKey("tasks.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    method: Mapped[str] = mapped_column(String(16))
    num_vectors: Mapped[int]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    """Of the whole file."""
    base_model_type: Mapped[str]
    base_shapes_sha256: Mapped[str]
    base_quantisation: Mapped[str]
    base_weights_sha256: Mapped[str]
    base_tokenizer_sha256: Mapped[str]
    base_chat_template_sha256: Mapped[str]
    parent: Mapped[str | None] = mapped_column(String(64))
    """sha256 of the artefact that training started from; it need not be in this registry."""
    evaluation: Mapped[dict[str, Any]]
    who: Mapped[str]
    why: Mapped[str]
    created: Mapped[datetime]
    deleted: Mapped[datetime | None]
    deleted_by: Mapped[str | None]
    deleted_why: Mapped[str | None]

    __table_args__ = (
        CheckConstraint("number >= 1", name="number_from_1"),
        CheckConstraint("length(sha256) = 64", name="sha256_is_hex"),
        Index(
            "uq_versions_live_task_sha256",
            "task",
            "sha256",
            unique=True,
            sqlite_where=text("deleted IS NULL"),
            postgresql_where=text("deleted IS NULL"),
        ),
    )


class AliasRow(Base):
    """Where an alias of a task points now."""

    __tablename__ = "aliases"

    task: Mapped[str] = mapped_column(String(64), ForeignKey("tasks.name"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int]

    __table_args__ = (ForeignKeyConstraint(["task", "number"], ["versions.task", "versions.number"]),)


class MoveRow(Base):
    """One move of an alias; never changed."""

    __tablename__ = "alias_moves"

    id: Mapped[int] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(String(64), ForeignKey("tasks.name"))
    alias: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(16))
    """tag, untag, promote or rollback."""
    from_number: Mapped[int | None]
    to_number: Mapped[int | None]
    who: Mapped[str]
    why: Mapped[str]
    moved: Mapped[datetime]
    evaluation: Mapped[dict[str, Any]]
    """That of the version moved to: what the move rested on."""
    forced: Mapped[bool]
    overruled: Mapped[str]
    """The gate's reason for a refusal that `force` overruled, else empty."""

    __table_args__ = (
        ForeignKeyConstraint(["task", "from_number"], ["versions.task", "versions.number"]),
        ForeignKeyConstraint(["task", "to_number"], ["versions.task", "versions.number"]),
        Index("ix_alias_moves_task_alias", "task", "alias"),
    )


class RegistryRow(Base):
    """The registry itself: one row."""

    __tablename__ = "registry"

    one: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(String(36))
    """A random UUID, given once; the blob store carries it too."""
    revision: Mapped[int] = mapped_column(BigInteger)
    """Goes up in each transaction that changes what a gateway must know."""

    __table_args__ = (CheckConstraint("one = 1", name="one_row"),)


class CompiledRow(Base):
    """A compiled file: a version's keys and values, made for one base in one dtype."""

    __tablename__ = "compiled"

    source: Mapped[str] = mapped_column(String(64), primary_key=True)
    """sha256 of the artefact."""
    dtype: Mapped[str] = mapped_column(String(16), primary_key=True)
    base_weights_sha256: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), index=True)
    num_positions: Mapped[int]
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created: Mapped[datetime]

    __table_args__ = (CheckConstraint("length(sha256) = 64", name="sha256_is_hex"),)


class TenantRow(Base):
    """A tenant and its limits; None is no limit."""

    __tablename__ = "tenants"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    requests_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    concurrent: Mapped[int | None] = mapped_column(BigInteger)
    max_prompt_tokens: Mapped[int | None] = mapped_column(BigInteger)
    max_new_tokens: Mapped[int | None] = mapped_column(BigInteger)
    disabled: Mapped[bool]
    created: Mapped[datetime]


class KeyRow(Base):
    """An API key. Its tenant may be gone; the key is revoked then."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    tenant: Mapped[str | None] = mapped_column(String(64), index=True)
    """None: a platform admin's."""
    name: Mapped[str]
    secret_sha256: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime]
    expires: Mapped[datetime | None]
    revoked: Mapped[datetime | None]


class GrantRow(Base):
    """What a tenant may do with a task, or with all ("*")."""

    __tablename__ = "grants"

    tenant: Mapped[str] = mapped_column(String(64), ForeignKey("tenants.name"), primary_key=True)
    task: Mapped[str] = mapped_column(String(64), primary_key=True)
    right: Mapped[str] = mapped_column(String(16), primary_key=True)
    """call or manage."""


class RouteRow(Base):
    """Where a part of a task's traffic goes besides."""

    __tablename__ = "routes"

    task: Mapped[str] = mapped_column(String(64), ForeignKey("tasks.name"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16), primary_key=True)
    """canary or shadow."""
    number: Mapped[int]
    fraction: Mapped[float] = mapped_column(Float(53))
    salt: Mapped[str]
    keep_inputs: Mapped[bool]

    __table_args__ = (ForeignKeyConstraint(["task", "number"], ["versions.task", "versions.number"]),)


class DrainingRow(Base):
    """A replica that gets no new requests."""

    __tablename__ = "draining"

    url: Mapped[str] = mapped_column(primary_key=True)
    since: Mapped[datetime]


class AuditRow(Base):
    """One admin action; never changed, never removed."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True)
    at: Mapped[datetime]
    who: Mapped[str]
    action: Mapped[str] = mapped_column(String(32))
    subject: Mapped[str]
    details: Mapped[dict[str, Any]]

    __table_args__ = (Index("ix_audit_action_id", "action", "id"), Index("ix_audit_subject_id", "subject", "id"))


class UsageRow(Base):
    """What a gateway let a tenant use in one minute, and how many of its requests run there."""

    __tablename__ = "usage"

    gateway: Mapped[str] = mapped_column(String(200), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    minute: Mapped[int] = mapped_column(BigInteger)
    """Minutes since the epoch, by the database's clock."""
    requests: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    running: Mapped[int] = mapped_column(BigInteger)
    seen: Mapped[datetime]


class ShadowPairRow(Base):
    """An answer that was given, and the candidate's to the same request."""

    __tablename__ = "shadow_pairs"

    id: Mapped[int] = mapped_column(_BIG_ID, primary_key=True)
    at: Mapped[datetime]
    task: Mapped[str] = mapped_column(String(64))
    number: Mapped[int]
    candidate: Mapped[int]
    request_id: Mapped[str]
    input: Mapped[str | None]
    answer: Mapped[str]
    candidate_answer: Mapped[str]
    agrees: Mapped[bool]
    seconds: Mapped[float] = mapped_column(Float(53))
    candidate_seconds: Mapped[float] = mapped_column(Float(53))

    __table_args__ = (Index("ix_shadow_pairs_task_id", "task", "id"),)
