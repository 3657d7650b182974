"""The registry's schema, step by step (Alembic).

To add a step: change tables.py, then
`python -c "from foreword.registry.migrations import revise; revise('what changes')"` writes the next file in versions/
from the difference; read it, correct it, and set `SCHEMA` in tables.py to its number.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from foreword.errors import RegistryError
from foreword.registry.database import database_error, shown_url, unhurried
from foreword.registry.tables import SCHEMA

if TYPE_CHECKING:
    from alembic.config import Config

FOLDER = Path(__file__).parent
_alembic_is_global = threading.Lock()  # alembic.context is one per process


def ensure_schema(engine: Engine, *, head: str = SCHEMA, folder: Path = FOLDER) -> bool:
    """Bring the database to schema `head`, whatever it is now (empty or older); return whether anything was done.

    All steps are one transaction of the only writer: of two processes that open an empty registry at once, one
    migrates and the other finds it done; a crash leaves the schema as it was.
    Raises RegistryError when the schema is newer than this foreword, or the database cannot be used.
    """
    shown = shown_url(engine.url)
    try:
        with engine.connect() as connection:
            if _is_current(connection, head, shown):
                return False
        with migrating(engine) as connection:
            if _is_current(connection, head, shown):
                return False
            upgrade(connection, head, folder=folder)
            return True
    except DBAPIError as error:
        raise database_error(f"cannot open the registry at {shown}", error) from error


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """Open a transaction of the only writer in which tables may be rebuilt; undone when an exception leaves it.

    Raises RegistryError, and undoes it, when a foreign key is broken at the end.
    """
    with engine.connect().execution_options(writing="alone") as connection:
        if engine.dialect.name != "sqlite":
            with unhurried(connection):
                yield connection
            return
        # SQLite changes a table by copying it, and dropping the old one counts as deleting its rows; so foreign keys
        # are off meanwhile (which a transaction cannot do to itself) and checked as a whole before the commit.
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        driver.execute("PRAGMA foreign_keys = OFF")
        try:
            with connection.begin():
                yield connection
                if broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
                    raise RegistryError(f"the migration broke {len(broken)} references, first {broken[0]}; undone")
        finally:
            driver.execute("PRAGMA foreign_keys = ON")


def upgrade(connection: Connection, revision: str = SCHEMA, *, folder: Path = FOLDER) -> None:
    """Migrate up to `revision` on a connection that `migrating` opened."""
    from alembic import command

    with _alembic_is_global:
        command.upgrade(_config(connection, folder), revision)


def downgrade(connection: Connection, revision: str, *, folder: Path = FOLDER) -> None:
    """Migrate down to `revision` ("base": no tables), likewise; what has no place there is lost."""
    from alembic import command

    with _alembic_is_global:
        command.downgrade(_config(connection, folder), revision)


def revise(message: str, *, folder: Path = FOLDER) -> Path:
    """Write the next migration from the difference between the migrations so far and tables.py; return its path."""
    from alembic import command
    from alembic.script import ScriptDirectory, revision

    engine = create_engine("sqlite://")
    with engine.connect() as connection, _alembic_is_global:
        config = _config(connection, folder)
        command.upgrade(config, "head")
        number = int(ScriptDirectory.from_config(config).get_current_head() or "0") + 1
        script = command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")
    engine.dispose()
    assert isinstance(script, revision.Revision)
    return Path(script.path)


def _is_current(connection: Connection, head: str, shown: str) -> bool:
    found = _revision(connection)
    if found is not None and found > head:
        raise RegistryError(
            f"the registry at {shown} has schema {found}, this foreword knows {head}",
            hint="Update foreword, or give it a home of its own (FOREWORD_HOME).",
        )
    return found == head


def _revision(connection: Connection) -> str | None:
    # What Alembic's own table says, read without importing Alembic: opening an up-to-date registry needs no more.
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def _config(connection: Connection, folder: Path) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("file_template", "v%%(rev)s_%%(slug)s")
    config.attributes["connection"] = connection
    return config
