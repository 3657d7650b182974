"""A database or a bucket that is gone, hangs or is held: errors within a bounded time, and nothing half done."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from foreword.errors import ArtefactCorrupt, Conflict, RegistryError
from foreword.registry import database, remote_blobs
from foreword.registry.access_records import Usage
from foreword.registry.store import Registry, Version

from .conftest import ON_EACH_DATABASE, ON_POSTGRES, ON_S3, Factory, Place, shadow_pair, start
from .postgres import execute, server
from .s3 import client

on_postgres = pytest.mark.parametrize("place", ON_POSTGRES, indirect=True)
on_each_database = pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
on_s3 = pytest.mark.parametrize("place", ON_S3, indirect=True)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls in threads of their own; return their results or exceptions."""
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@on_postgres
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGQUIT])
def test_postgresql_restarted_between_calls(registry: Registry, artefact: Factory, by: signal.Signals) -> None:
    version = registry.publish(artefact(), alias="prod")
    calls: list[Callable[[], Any]] = [
        lambda: registry.resolve("triage"),
        registry.tasks,
        registry.access.snapshot,
        lambda: registry.access.drain("http://replica"),
        lambda: registry.access.sync_usage("a", {"shop": Usage(requests=1, tokens=1, running=1)}),
        lambda: registry.publish(artefact()),
    ]
    at_once(*calls)  # so that the pool holds several connections
    for call in calls:
        server().stop(by=by)
        server().start()
        call()
    assert registry.resolve("triage@1") == version


@on_postgres
def test_postgresql_gone(registry: Registry, artefact: Factory, place: Place) -> None:
    version = registry.publish(artefact())
    server().stop()
    try:
        for call in (registry.tasks, registry.access.snapshot, lambda: registry.publish(artefact()), place.open):
            with within(database.CONNECT_TIMEOUT_S), pytest.raises(RegistryError, match="refused") as caught:
                call()
            assert caught.value.hint == "Nothing was written. Is the database running, and FOREWORD_DATABASE_URL right?"
            assert server().password not in str(caught.value)
    finally:
        server().start()
    assert registry.versions("triage") == [version]


@on_postgres
def test_postgresql_hangs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from foreword.registry.postgres_connection import BoundedConnection

    monkeypatch.setattr(BoundedConnection, "patience_s", 0.5)
    with place.open() as registry:
        registry.tasks()
        sessions = "SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        stopped = [int(str(pid)) for (pid,) in execute(place.database_url or "", sessions)]
        assert server()._process is not None
        stopped.append(server()._process.pid)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            limit = BoundedConnection.patience_s + database.CONNECT_TIMEOUT_S + 1
            with within(limit), pytest.raises(RegistryError, match=r"did not answer within|timeout expired"):
                registry.tasks()
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        assert registry.tasks() == []


@on_postgres
def test_a_writer_that_holds_up_others(place: Place, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "STATEMENT_TIMEOUT_S", 1)
    with place.open() as registry, place.open() as other:
        registry.publish(artefact())
        with other._database.writing() as session:
            other._database.now(session)
            with within(5), pytest.raises(RegistryError, match=r"statement timeout\nNothing was written.*held it"):
                registry.tag("triage@1", "prod")
            assert registry.resolve("triage").number == 1  # readers go on
            registry.access.sync_usage("a", {"shop": Usage(requests=1, tokens=1, running=1)})
            assert registry.access.sync_usage("b", {})["shop"].requests == 1
            registry.access.add_shadow_pair(shadow_pair())
        assert registry.tag("triage@1", "prod").is_new


@on_postgres
def test_a_writer_that_hangs_loses_its_turn(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "IDLE_TIMEOUT_S", 1)
    with place.open() as registry, place.open() as other:
        with pytest.raises(RegistryError, match=r"database failed: .*\nThe connection broke"):
            with other._database.writing() as session:
                other._database.now(session)
                registry.access.create_tenant("shop")  # waits, then goes on
                other._database.now(session)
        assert [tenant.name for tenant in other.access.tenants()] == ["shop"]


@on_postgres
def test_no_connection_left(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(database, "POOL_TIMEOUT_S", 0.2)
    with place.open() as registry, registry._database.reading() as one, registry._database.reading() as two:
        for session in (one, two):
            registry._database.now(session)
        with within(5), pytest.raises(RegistryError, match="no connection to the registry's database became free"):
            registry.tasks()


@on_each_database
def test_two_admins_promote_at_once(place: Place, artefact: Factory) -> None:
    with place.open() as ann, place.open() as bob:
        for _ in range(3):
            ann.publish(artefact())
        ann.tag("triage@1", "prod", who="zoe")
        meet = threading.Barrier(2)

        def gate(candidate: Version, current: Version | None) -> None:
            meet.wait()  # both have seen the same state

        results = at_once(
            lambda: ann.promote("triage@2", who="ann", gate=gate), lambda: bob.promote("triage@3", who="bob", gate=gate)
        )
        (winner,) = [result for result in results if not isinstance(result, Exception)]
        (loser,) = [result for result in results if isinstance(result, Exception)]
        assert isinstance(loser, Conflict), loser
        assert f"triage@prod is at triage@{winner.to_number}, moved by {winner.who} at " in loser.message
        assert ann.resolve("triage").number == bob.resolve("triage").number == winner.to_number
        assert [entry.who for entry in ann.access.audit(subject="triage@prod")] == [winner.who, "zoe"]


@on_each_database
def test_two_admins_roll_back_at_once(place: Place, artefact: Factory) -> None:
    with place.open() as ann, place.open() as bob:
        for _ in range(4):
            ann.tag(ann.publish(artefact()).reference, "prod")
        results = at_once(lambda: ann.rollback("triage", expect=4), lambda: bob.rollback("triage", expect=4))
        assert sorted(type(result).__name__ for result in results) == ["Conflict", "Move"]
        assert ann.resolve("triage").number == 3
        moves = at_once(lambda: ann.rollback("triage"), lambda: bob.rollback("triage"))
        assert {move.to_number for move in moves} == {1, 2}
        assert ann.resolve("triage").number == 1


@on_each_database
def test_a_promotion_and_a_deletion_at_once(place: Place, artefact: Factory) -> None:
    with place.open() as ann, place.open() as bob:
        for turn in range(5):
            task = f"task-{turn}"
            ann.publish(artefact(task))
            at_once(lambda task=task: ann.promote(f"{task}@1"), lambda task=task: bob.delete(f"{task}@1"))
            live, aliases = ann.versions(task), ann.aliases(task)
            assert (bool(live), aliases) in [(True, {"prod": 1}), (False, {})]


@on_s3
def test_s3_gone(place: Place, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.open() as registry:
        version = registry.publish(artefact())
        registry.path(version)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    calls: list[Callable[[Registry], Any]] = [
        lambda registry: registry.publish(artefact()),
        lambda registry: registry.gc(0),
        lambda registry: registry.blobs.has(version.sha256),
        lambda registry: registry.blobs.fetch("0" * 64),
        lambda registry: list(registry.blobs.stored()),
    ]
    with place.open() as registry:
        for call in calls:
            with within(5), pytest.raises(RegistryError, match="Could not connect to the endpoint URL") as caught:
                call(registry)
            assert f"Is the store at {place.blob_url} up" in caught.value.hint
        assert registry.path(version).exists()  # the proved copy on this machine
        assert registry.versions("triage") == [version]
        assert list(registry.blobs.staging.iterdir()) == []


@contextmanager
def s3_that(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that treats each connection as `answer` does; yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@on_s3
def test_s3_hangs(place: Place, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_blobs, "S3_READ_S", 0.2)
    open_connections: list[socket.socket] = []
    with s3_that(open_connections.append) as url, place.open() as registry:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with place.open() as registry, within(10), pytest.raises(RegistryError, match="Read timeout"):
            registry.publish(artefact())
        for connection in open_connections:
            connection.close()
        assert registry.tasks() == []


@on_s3
def test_an_upload_that_is_cut(place: Place, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artefact(num_vectors=20_000)

    def cut(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.close()

    with place.open() as registry:
        registry.publish(artefact("mail"))  # the store is claimed
        put = registry.blobs.put
        with s3_that(cut) as url:
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            with place.open() as cut_off:
                monkeypatch.setattr(registry.blobs, "put", cut_off.blobs.put)
                with within(10), pytest.raises(RegistryError, match="cannot upload to "):
                    registry.publish(path)
        assert [task.name for task in registry.tasks()] == ["mail"]
        monkeypatch.setattr(registry.blobs, "put", put)
        assert registry.publish(path).number == 1


@on_s3
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data[:-1] + b"\0", lambda data: b""])
def test_a_bucket_that_gives_something_else(place: Place, artefact: Factory, change: Callable[[bytes], bytes]) -> None:
    path = artefact()
    with place.open() as registry:
        version = registry.publish(path)
    bucket, _, prefix = (place.blob_url or "").removeprefix("s3://").partition("/")
    key = f"{prefix}/{version.sha256[:2]}/{version.sha256}.safetensors"
    client().put_object(Bucket=bucket, Key=key, Body=change(path.read_bytes()))
    with place.open() as registry:
        with pytest.raises(ArtefactCorrupt, match=f"has sha256 .*, its version says {version.sha256}"):
            registry.path(version)
        assert not (registry.home / "cache" / version.sha256[:2]).exists()
        client().delete_object(Bucket=bucket, Key=key)
        with pytest.raises(RegistryError, match="is gone"):
            registry.path(version)


@on_s3
def test_a_bucket_that_is_not_there(place: Place, artefact: Factory) -> None:
    with Registry.open(place.home, blob_url="s3://no-such-bucket/blobs") as registry:
        with pytest.raises(RegistryError, match="The specified bucket does not exist"):
            registry.publish(artefact())
        assert registry.tasks() == []
    assert "no-such-bucket" not in {bucket["Name"] for bucket in client().list_buckets()["Buckets"]}


@pytest.mark.parametrize("place", [*ON_POSTGRES, *ON_S3], indirect=True)
def test_nothing_is_left_open_at_exit(place: Place, artefact: Factory) -> None:
    code = """
        import sys
        from foreword.registry.store import Registry
        with Registry.open() as registry:
            version = registry.publish(sys.argv[1])
            registry.path(version)
        left_open = Registry.open()
        left_open.blobs.has(version.sha256)
        left_open.close()
    """
    child = start(code, artefact(), **place.environment, PYTHONWARNINGS="error")
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "", "")
