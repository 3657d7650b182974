"""The registry's database: opened with bounded waits, and the kinds of transaction on it.

Writers are one at a time on every database: `BEGIN IMMEDIATE` on SQLite, one advisory transaction lock on PostgreSQL;
so what a writing transaction has read stays true until it commits. Readers see one moment: WAL on SQLite, repeatable
read on PostgreSQL. Every wait has an end: a database that is gone is an error within seconds.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from foreword.errors import ConfigError, RegistryError

BUSY_TIMEOUT_S = 30.0
"""How long a SQLite transaction waits for another process's: far above what one takes, below a client's patience."""
MAX_THREADS = 64
"""Threads that may use one SQLite registry at once without waiting for a connection; a server's pool has fewer."""
MAX_CONNECTIONS = 10
"""Connections of one process to PostgreSQL, whose default is 100 for all; more threads wait for one."""
CONNECT_TIMEOUT_S = 3
STATEMENT_TIMEOUT_S = 10
"""The longest that PostgreSQL works on a statement, waiting for the writer before it included."""
IDLE_TIMEOUT_S = 60
"""PostgreSQL ends a transaction in which nothing happens for this long: a process that hangs holds up nobody else."""
POOL_TIMEOUT_S = 10
WRITER_LOCK = 0x666F7265776F7264
"""Key of PostgreSQL's advisory lock: "foreword" in ASCII."""

_EXAMPLE = "Give sqlite:///path/to/file or postgresql://user:password@host/database."
_NETWORK = {  # a peer that is gone without a word is noticed after some 11 s
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": STATEMENT_TIMEOUT_S * 1000,
    "application_name": "foreword",
}


class Database:
    """An engine and its kinds of transaction. Each raises RegistryError when the database fails or does not answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._is_postgres = engine.dialect.name == "postgresql"
        self._alone = engine.execution_options(writing="alone")
        self._beside = engine.execution_options(writing="beside")
        self._reader = self._single = engine
        if self._is_postgres:
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            self._single = engine.execution_options(isolation_level="AUTOCOMMIT")

    def reading(self, *, statements: int = 2) -> AbstractContextManager[Session]:
        """Open a transaction that sees one moment; for one statement, without the round trips of a transaction."""
        return _transaction(self._single if statements == 1 else self._reader)

    def writing(self) -> AbstractContextManager[Session]:
        """Open a transaction of the only writer."""
        return _transaction(self._alone)

    def writing_beside(self) -> AbstractContextManager[Session]:
        """Open a transaction that changes rows of this process alone, so that it need not wait for the writer."""
        return _transaction(self._beside)

    def now(self, session: Session) -> datetime:
        """Return the time by the database's clock, which all processes share; on SQLite this machine's."""
        if not self._is_postgres:
            return datetime.now(UTC)
        now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
        return now.astimezone(UTC)

    def close(self) -> None:
        """Close the connections."""
        self.engine.dispose()


@contextmanager
def _transaction(engine: Engine) -> Iterator[Session]:
    try:
        with Session(engine, expire_on_commit=False) as session, session.begin():
            yield session
    except DBAPIError as error:
        raise database_error("the registry's database failed", error) from error
    except PoolTimeout as error:
        raise RegistryError(
            f"no connection to the registry's database became free within {POOL_TIMEOUT_S} s",
            hint=f"All {MAX_CONNECTIONS} of this process are in use; is the database slow?",
        ) from error


@contextmanager
def unhurried(connection: Connection) -> Iterator[None]:
    """Open a transaction on PostgreSQL whose statements may take any time, for migrations."""
    driver: Any = connection.connection.driver_connection
    patience_s, driver.patience_s = driver.patience_s, math.inf
    try:
        with connection.begin():
            connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
            yield
    finally:
        driver.patience_s = patience_s


def database_error(what: str, error: DBAPIError) -> RegistryError:
    """Return a database's error as one for the user."""
    reason = " ".join(str(error.orig).split())
    if error.connection_invalidated:
        hint = "The connection broke. Look whether the change was made before you make it again."
    elif "connect" in reason:
        hint = "Nothing was written. Is the database running, and FOREWORD_DATABASE_URL right?"
    elif "locked" in reason or "busy" in reason:
        hint = f"Another process has held the registry for more than {BUSY_TIMEOUT_S:.0f} s; try again when it is done."
    elif "timeout" in reason:
        hint = f"Nothing was written. The database took more than {STATEMENT_TIMEOUT_S} s, or another process held it."
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

    A connection with the execution option `writing="alone"` opens its transactions as the only writer; "beside" is for
    rows that no other process changes. Raises ConfigError when the URL is malformed, of another database, or its driver
    is not installed.
    """
    try:
        url = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("the registry's database URL is malformed", hint=_EXAMPLE) from None
    shown, dialect = shown_url(url), url.get_backend_name()
    if url.drivername in ("postgres", "postgresql"):
        url, dialect = url.set(drivername="postgresql+psycopg"), "postgresql"
    if dialect not in ("sqlite", "postgresql") or (dialect == "sqlite" and url.database in (None, "", ":memory:")):
        raise ConfigError(f"the registry cannot live in {shown}", hint=_EXAMPLE)
    try:
        engine = _sqlite(url) if dialect == "sqlite" else _postgres(url)
    except (ArgumentError, NoSuchModuleError):
        raise ConfigError(f"no such kind of database: {shown}", hint=_EXAMPLE) from None
    except ImportError as error:
        raise ConfigError(f"no driver for {shown}: {error}", hint="pip install 'psycopg[binary]'") from error
    event.listen(engine, "begin", _begin)
    return engine


def shown_url(url: URL) -> str:
    """Return a database's URL as it may be shown: no password, and no options, which may hold one."""
    return url.set(query={}).render_as_string(hide_password=True)


def _sqlite(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, max_overflow=MAX_THREADS)
    event.listen(engine, "connect", _set_up_sqlite)
    return engine


def _postgres(url: URL) -> Engine:
    engine = create_engine(
        url,
        connect_args={name: value for name, value in _NETWORK.items() if name not in url.query},
        pool_pre_ping=True,  # notices connections that a restart of the server has cut
        pool_size=MAX_CONNECTIONS // 2,
        max_overflow=MAX_CONNECTIONS - MAX_CONNECTIONS // 2,
        pool_timeout=POOL_TIMEOUT_S,
    )
    from foreword.registry.postgres_connection import BoundedConnection

    event.listen(
        engine, "do_connect", lambda dialect, record, args, options: BoundedConnection.connect(*args, **options)
    )
    event.listen(engine, "connect", _set_up_postgres)
    return engine


def _set_up_postgres(connection: Any, record: object) -> None:
    # By SET, not by the start-up option, which connection poolers refuse.
    was, connection.autocommit = connection.autocommit, True
    connection.execute(
        f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'; "
        f"SET idle_in_transaction_session_timeout = '{IDLE_TIMEOUT_S}s'"
    )
    connection.autocommit = was


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
    writing = connection.get_execution_options().get("writing")
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
    elif writing == "alone":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
