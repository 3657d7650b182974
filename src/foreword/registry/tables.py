"""The registry's tables, and how its database is opened.

Tables have natural keys (a task is its name, a version its task and number), so that a row read in a database shell
says what it is. Writers are one at a time on every database: `BEGIN IMMEDIATE` on SQLite, one advisory transaction
lock on PostgreSQL; so what a writing transaction has read stays true until it commits.
"""

from __future__ import annotations

import sqlite3
import time
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Connection,
    DateTime,
    Dialect,
    Engine,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    create_engine,
    event,
    text,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from foreword.errors import ConfigError, RegistryError

SCHEMA = "0001"
"""The migration that these models agree with; the newest in migrations/versions."""
BUSY_TIMEOUT_S = 30.0
"""How long a transaction waits for another process's: far above what one takes, below a client's patience."""
MAX_THREADS = 64
"""Threads that may use one registry at once without waiting for a connection; a server's pool has fewer."""
WRITER_LOCK = 0x666F7265776F7264
"""Key of PostgreSQL's advisory lock: "foreword" in ASCII."""


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


def database_error(what: str, error: DBAPIError) -> RegistryError:
    """Return a database's error as one for the user."""
    reason = str(error.orig)
    if "locked" in reason or "busy" in reason:
        hint = f"Another process has held the registry for more than {BUSY_TIMEOUT_S:.0f} s; try again when it is done."
    elif "full" in reason or "disk I/O" in reason:
        hint = "Free space on the registry's disk; nothing was half written."
    elif "unable to open" in reason or "readonly" in reason:
        hint = "The registry's folder and its files must be writable."
    elif "not a database" in reason or "malformed" in reason:
        hint = "The file is damaged or something else; restore it from a backup or choose another FOREWORD_HOME."
    else:
        hint = "Nothing was written."
    return RegistryError(f"{what}: {reason}", hint=hint)


def open_engine(url: str | URL) -> Engine:
    """Return an engine for a SQLite file or a PostgreSQL database; nothing is read or created yet.

    A connection with the execution option `writing=True` opens its transactions as the only writer.
    Raises ConfigError when the URL is malformed, of another database, or its driver is not installed.
    """
    try:
        url = make_url(url)
        shown = url.render_as_string(hide_password=True)
        dialect = url.get_backend_name()
        if dialect not in ("sqlite", "postgresql") or (dialect == "sqlite" and url.database in (None, "", ":memory:")):
            raise ConfigError(
                f"the registry cannot live in {shown}", hint="Give sqlite:///path/to/file or postgresql+psycopg://…"
            )
        if dialect == "sqlite":
            engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=MAX_THREADS)
            event.listen(engine, "connect", _set_up_sqlite)
        else:
            engine = create_engine(url, pool_pre_ping=True, max_overflow=MAX_THREADS)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(
            f"not a database URL: {error}", hint="Give sqlite:///path or postgresql+psycopg://…"
        ) from None
    except ImportError as error:
        raise ConfigError(f"no driver for {shown}: {error}", hint="pip install 'psycopg[binary]'") from error
    event.listen(engine, "begin", _begin)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, record: object) -> None:
    # The driver's own BEGIN comes too late and is never IMMEDIATE; `_begin` sends it instead.
    connection.isolation_level = None
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")  # a version that publish has returned survives a power cut
        _ensure_wal(connection)
    except sqlite3.Error:
        connection.close()
        raise


def _ensure_wal(connection: sqlite3.Connection) -> None:
    # WAL is a property of the file. The switch needs it alone and does not always wait by itself, so retry.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise sqlite3.OperationalError(f"journal mode {mode} where wal is needed (a network file system?)")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _begin(connection: Connection) -> None:
    is_writing = connection.get_execution_options().get("writing", False)
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")
    elif is_writing:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
