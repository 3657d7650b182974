"""A throw-away PostgreSQL server, started once in a test run, and a database of one's own on it."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from foreword.registry.database import open_engine
from foreword.registry.migrations import ensure_schema

USER = "foreword"
TEMPLATE = "foreword_template"
START_S = 30.0
_names = itertools.count()


def programs() -> Path:
    """Return the folder of initdb and postgres: the newest of Debian's, or the one in PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    if (path := shutil.which("initdb")) is not None:
        return Path(path).resolve().parent
    pytest.fail("these tests need a PostgreSQL server: run .ci/install_postgres, or leave out the mark `postgres`")


class Server:
    """A cluster in a temporary folder, on a free port of this machine, reached by password only."""

    def __init__(self) -> None:
        self.programs = programs()
        self.folder = Path(tempfile.mkdtemp(prefix="foreword-postgres-"))
        self.password = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)
        self._initialise()
        self.start()
        self._run(f"CREATE DATABASE {TEMPLATE}")
        engine = open_engine(self.url(TEMPLATE))
        ensure_schema(engine)
        engine.dispose()

    def url(self, database: str) -> str:
        """Return the URL of a database, as FOREWORD_DATABASE_URL takes it."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._as_user(), str(self.programs / "postgres"), "-D", str(self.folder / "data")],
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"PostgreSQL did not start: {error}\n{(self.folder / 'log').read_text()}")
                time.sleep(0.05)

    def stop(self, *, by: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: SIGINT ends all sessions first, SIGQUIT is a crash."""
        assert self._process is not None
        self._process.send_signal(by)
        self._process.wait(START_S)
        self._process = None

    def restart(self) -> None:
        """Stop and start it, as an operator does."""
        self.stop()
        self.start()

    @contextmanager
    def database(self, *, is_empty: bool = False) -> Iterator[str]:
        """Create a database, with the registry's tables or empty; yield its URL, drop it at the end."""
        name = f"test_{next(_names)}"
        self._run(f"CREATE DATABASE {name}" + ("" if is_empty else f" TEMPLATE {TEMPLATE}"))
        if not is_empty:
            self._run("UPDATE registry SET id = gen_random_uuid()", name)
        try:
            yield self.url(name)
        finally:
            self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def remove(self) -> None:
        """Stop the server and remove its files."""
        if self._process is not None:
            self.stop(by=signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, statement: str, database: str = "postgres") -> None:
        execute(self.url(database), statement)

    def _initialise(self) -> None:
        secret = self.folder / "password"
        secret.write_text(self.password)
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            for path in (self.folder, secret):
                shutil.chown(path, "postgres", "postgres")
        options = ["--auth=scram-sha-256", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C", "--no-sync"]
        command = [*self._as_user(), str(self.programs / "initdb"), "-D", str(self.folder / "data"), "-U", USER]
        done = subprocess.run([*command, *options], cwd=self.folder, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"initdb failed: {done.stderr}")
        with (self.folder / "data" / "postgresql.conf").open("a") as settings:
            settings.write(f"listen_addresses = '127.0.0.1'\nport = {self.port}\nunix_socket_directories = ''\n")
            settings.write("fsync = off\nfull_page_writes = off\nshared_buffers = 32MB\n")

    def _as_user(self) -> list[str]:
        # It ends with the process that started it, whatever ends that.
        end = ["--pdeathsig=INT"] if shutil.which("setpriv") else []
        if os.geteuid() == 0:
            return ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", *end, "--"]
        return ["setpriv", *end, "--"] if end else []


def execute(url: str, statement: str) -> list[tuple[object, ...]]:
    """Run one statement on a database of its own connection; return its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


@functools.cache
def server() -> Server:
    """Return the test run's server, started at the first call and removed at the end of the process.

    The first call must come from the main thread: the server ends with the thread that started it.
    """
    return Server()


@contextmanager
def postgres_url(*, is_empty: bool = False) -> Iterator[str]:
    """Yield the URL of a fresh database, with the registry's tables unless `is_empty`; it is dropped at the end."""
    with server().database(is_empty=is_empty) as url:
        yield url


def without_password(url: str) -> str:
    """Return a URL as error messages may show it."""
    return make_url(url).render_as_string(hide_password=True)
