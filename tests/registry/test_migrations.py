"""The schema: made by migrations, migrated when older, refused when newer, and never left in between."""

from __future__ import annotations

import shutil
import sqlite3
import textwrap
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, inspect, text

from foreword.errors import ConfigError, RegistryError
from foreword.registry.blobs import MARKER
from foreword.registry.database import open_engine
from foreword.registry.migrations import FOLDER, downgrade, ensure_schema, migrating, revise, upgrade
from foreword.registry.store import Registry
from foreword.registry.tables import SCHEMA, Base

from .conftest import ON_EACH_DATABASE, ON_POSTGRES, Compiled, Factory, Place, fill_access
from .postgres import postgres_url

THIRD = """
    import sqlalchemy as sa
    from alembic import op

    revision, down_revision = "0003", "0002"

    def upgrade():
        copying = "always" if op.get_bind().dialect.name == "sqlite" else "never"
        with op.batch_alter_table("versions", recreate=copying) as table:
            table.add_column(sa.Column("colour", sa.Text(), nullable=False, server_default="blue"))
        {more}

    def downgrade():
        copying = "always" if op.get_bind().dialect.name == "sqlite" else "never"
        with op.batch_alter_table("versions", recreate=copying) as table:
            table.drop_column("colour")
"""


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """An engine on an empty database."""
    with ExitStack() as stack:
        url = f"sqlite:///{tmp_path / 'registry.sqlite'}"
        if request.param == "postgres":
            url = stack.enter_context(postgres_url(is_empty=True))
        engine = open_engine(url)
        yield engine
        engine.dispose()


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The migrations, with room for another one."""
    return Path(shutil.copytree(FOLDER, tmp_path / "migrations 100%"))


def add_third(folder: Path, more: str = "") -> None:
    (folder / "versions" / "v0003_colour.py").write_text(textwrap.dedent(THIRD).format(more=more))


def test_models_and_migrations_agree(engine: Engine) -> None:
    assert ensure_schema(engine)
    assert not ensure_schema(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == SCHEMA
    assert ScriptDirectory(str(FOLDER)).get_current_head() == SCHEMA


def test_down_and_up_again(engine: Engine) -> None:
    with migrating(engine) as connection:
        upgrade(connection)
    with migrating(engine) as connection:
        downgrade(connection, "base")
        assert inspect(connection).get_table_names() == ["alembic_version"]
    assert ensure_schema(engine)
    with engine.connect() as connection:
        assert set(Base.metadata.tables) < set(inspect(connection).get_table_names())


FIRST_TABLES = ("tasks", "versions", "aliases", "alias_moves")


def rows_of(connection: Connection, tables: tuple[str, ...]) -> dict[str, list[tuple[object, ...]]]:
    return {table: sorted(map(tuple, connection.execute(text(f"SELECT * FROM {table}"))), key=repr) for table in tables}


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_down_and_up_again_with_rows_in_all_tables(place: Place, artefact: Factory, compiled: Compiled) -> None:
    with place.open() as registry:
        version = registry.publish(artefact(), alias="prod")
        registry.publish(artefact(), alias="canary")
        registry.delete(registry.publish(artefact()).reference)
        registry.add_compiled(compiled(version))
        fill_access(registry)
    engine = open_engine(place.database_url or f"sqlite:///{place.home / 'registry.sqlite'}")
    with engine.connect() as connection:
        before = rows_of(connection, FIRST_TABLES)
        everything = rows_of(connection, tuple(Base.metadata.tables))
    assert all(everything.values()), [table for table, rows in everything.items() if not rows]
    for _ in range(2):
        with migrating(engine) as connection:
            downgrade(connection, "0001")
        with engine.connect() as connection:
            assert set(inspect(connection).get_table_names()) == {*FIRST_TABLES, "alembic_version"}
            assert rows_of(connection, FIRST_TABLES) == before
        assert ensure_schema(engine)
        with engine.connect() as connection:
            assert rows_of(connection, FIRST_TABLES) == before
    engine.dispose()
    (place.home / "blobs" / MARKER).unlink()  # it named the registry that the way down forgot
    with place.open() as registry:
        assert registry.resolve("triage@prod") == version
        assert registry.access.snapshot().revision == 1
        assert registry.publish(artefact()).number == 4
        assert registry.access.revision() == 2


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_an_older_schema_is_migrated_with_its_data(place: Place, artefact: Factory, later: Path) -> None:
    with place.open() as registry:
        version = registry.publish(artefact(), alias="prod")
        registry.publish(artefact())
        registry.delete("triage@2")
    add_third(later)
    engine = open_engine(place.database_url or f"sqlite:///{place.home / 'registry.sqlite'}")
    assert ensure_schema(engine, head="0003", folder=later)
    assert not ensure_schema(engine, head="0003", folder=later)
    with engine.connect() as connection:
        assert connection.execute(text("SELECT colour FROM versions")).scalars().all() == ["blue", "blue"]
        assert len(inspect(connection).get_foreign_keys("aliases")) == 2
        if engine.dialect.name == "sqlite":
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    with pytest.raises(RegistryError, match=r"has schema 0003, this foreword knows 0002\nUpdate foreword") as caught:
        place.open()
    assert place.database_url is None or place.database_url not in str(caught.value)
    with migrating(engine) as connection:
        downgrade(connection, "0002", folder=later)
    engine.dispose()
    with place.open() as registry:
        assert registry.resolve("triage@prod") == version


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("raise RuntimeError('half way')", "half way"),
        ("op.execute('DELETE FROM versions')", "the migration broke 2 references"),
        ("op.execute('SELECT nonsense')", "cannot open the registry at .*no such column"),
    ],
)
def test_a_migration_that_fails_changes_nothing(
    home: Path, artefact: Factory, later: Path, more: str, message: str
) -> None:
    with Registry.open(home) as registry:
        version = registry.publish(artefact(), alias="prod")
    add_third(later, more)
    engine = open_engine(f"sqlite:///{home / 'registry.sqlite'}")
    with pytest.raises((RegistryError, RuntimeError), match=message):
        ensure_schema(engine, head="0003", folder=later)
    with engine.connect() as connection:
        assert "colour" not in {column["name"] for column in inspect(connection).get_columns("versions")}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    engine.dispose()
    with Registry.open(home) as registry:
        assert registry.resolve("triage@prod") == version


def test_revise_writes_the_next_step(later: Path) -> None:
    path = revise("nothing new", folder=later)
    assert path == later / "versions" / "v0003_nothing_new.py"
    assert "pass" in path.read_text()
    path.unlink()
    for step in (later / "versions").glob("v*.py"):
        step.unlink()
    path = revise("all tables", folder=later)
    assert path.name == "v0001_all_tables.py"
    assert "foreword." not in path.read_text()
    engine = open_engine(f"sqlite:///{later / 'registry.sqlite'}")
    assert ensure_schema(engine, head="0001", folder=later)
    engine.dispose()


@pytest.mark.parametrize("place", ON_POSTGRES, indirect=True)
def test_a_migration_that_fails_on_postgresql_changes_nothing(place: Place, later: Path) -> None:
    add_third(later, "op.execute('SELECT nonsense')")
    engine = open_engine(place.database_url or "")
    with pytest.raises(RegistryError, match=r'cannot open the registry at .*column "nonsense" does not exist'):
        ensure_schema(engine, head="0003", folder=later)
    with engine.connect() as connection:
        assert "colour" not in {column["name"] for column in inspect(connection).get_columns("versions")}
    engine.dispose()


def test_foreign_keys_and_checks_hold(home: Path, artefact: Factory) -> None:
    with Registry.open(home) as registry:
        registry.publish(artefact(), alias="prod")
    with Registry.open(home) as registry, registry._database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    with closing(sqlite3.connect(home / "registry.sqlite")) as database:
        database.execute("PRAGMA foreign_keys = ON")
        for statement in (
            "DELETE FROM versions",
            "UPDATE aliases SET number = 2",
            "UPDATE versions SET sha256 = 'abc'",
            "INSERT INTO versions SELECT task, 2, sha256, method, num_vectors, num_bytes, base_model_type, "
            "base_shapes_sha256, base_quantisation, base_weights_sha256, base_tokenizer_sha256, "
            "base_chat_template_sha256, parent, evaluation, who, why, created, deleted, deleted_by, deleted_why "
            "FROM versions",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                database.execute(statement)


def test_a_fresh_file_that_somebody_holds(home: Path) -> None:
    home.mkdir()
    other = sqlite3.connect(home / "registry.sqlite", isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE mine (x)")
    other.execute("BEGIN IMMEDIATE")  # the switch to WAL then fails at once instead of waiting
    timer = threading.Timer(0.4, other.execute, ["COMMIT"])
    timer.start()
    with Registry.open(home) as registry:
        assert registry.tasks() == []
    timer.join()
    other.close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\x13" * 4096])
def test_a_file_that_is_no_database(home: Path, content: bytes) -> None:
    home.mkdir()
    (home / "registry.sqlite").write_bytes(content)
    with pytest.raises(RegistryError, match=r"(?s)cannot open the registry at sqlite.*restore it"):
        Registry.open(home)
    assert (home / "registry.sqlite").read_bytes() == content


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "cannot live in sqlite://"),
        ("mysql://ann:secret@host/db", r"cannot live in mysql://ann:\*\*\*@host/db"),
        ("nonsense", "database URL is malformed"),
        ("oracul://x", "cannot live in"),
        ("postgresql+nodriver://x", "no such kind of database"),
    ],
)
def test_a_database_that_is_none(home: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Registry.open(home, database_url=url)
    assert "secret" not in str(caught.value)


def test_a_database_elsewhere(home: Path, tmp_path: Path, artefact: Factory) -> None:
    url = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    with Registry.open(home, database_url=url) as registry:
        registry.publish(artefact())
    assert (tmp_path / "elsewhere.sqlite").exists()
    assert not (home / "registry.sqlite").exists()
