"""Several processes on one registry, and processes that die or run out of disk while they publish."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest

from foreword.errors import Conflict
from foreword.registry.store import Registry

from .conftest import ON_EACH_DATABASE, Factory, Place, finish, start
from .postgres import execute, postgres_url

PUBLISH = """
    import json, sys
    from foreword.registry.store import Registry
    paths = sys.argv[1:]
    with Registry.open() as registry:
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps([registry.publish(path).number for path in paths]))
"""


def check_whole(place: Place) -> list[int]:
    """Check that the database is sound and every version has its blob; return the numbers of triage."""
    if place.database_url is None:
        database = sqlite3.connect(place.home / "registry.sqlite")
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        database.close()
    with place.open() as registry:
        found = [version for task in registry.tasks() for version in registry.versions(task.name)]
        for version in found:
            assert registry.header(version).task == "triage"
        return [version.number for version in found]


def test_concurrent_publishing_leaves_no_gap(place: Place, artefact: Factory) -> None:
    place.open().close()
    shared = artefact()
    children = [start(PUBLISH, *[artefact() for _ in range(8)], shared, **place.environment) for _ in range(3)]
    for child in children:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    with place.open() as registry:
        while any(child.poll() is None for child in children):
            assert registry.gc(60).num_blobs == 0
    given = [json.loads(finish(child)) for child in children]
    *_, same = zip(*given, strict=True)
    assert len(set(same)) == 1  # the file that all of them have is one version
    assert sorted({number for mine in given for number in mine}) == list(range(1, 26))
    assert sum(len(set(mine)) for mine in given) == 27
    assert check_whole(place) == list(range(1, 26))


def test_many_open_a_fresh_home_at_once(home: Path) -> None:
    code = """
        import sys, time
        import alembic.command
        from foreword.registry.store import Registry
        at, *homes = sys.argv[1:]
        for turn, home in enumerate(homes):
            time.sleep(max(0, float(at) + turn * 0.25 - time.time()))
            with Registry.open(home) as registry:
                print(registry.tasks())
    """
    homes = [home / str(turn) for turn in range(4)]
    children = [start(code, time.time() + 2, *homes) for _ in range(4)]
    assert [finish(child) for child in children] == ["[]\n" * 4] * 4
    for each in homes:
        check_whole(Place(each))


@pytest.mark.postgres
def test_many_open_an_empty_database_at_once(home: Path) -> None:
    code = """
        import sys
        import alembic.command
        from foreword.registry.store import Registry
        print("ready", flush=True)
        sys.stdin.readline()
        with Registry.open() as registry:
            print(registry.access.revision())
    """
    with postgres_url(is_empty=True) as url:
        children = [start(code, **Place(home / str(number), url).environment) for number in range(4)]
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        assert [finish(child) for child in children] == ["1\n"] * 4
        assert len(execute(url, "SELECT id FROM registry")) == 1


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_concurrent_promotion_loses_no_move(place: Place, artefact: Factory) -> None:
    with place.open() as registry:
        for _ in range(4):
            registry.publish(artefact())
    code = """
        import sys
        from foreword.errors import Conflict
        from foreword.registry.store import Registry
        name = sys.argv[1]
        raced = 0
        with Registry.open() as registry:
            for turn in range(20):
                try:
                    registry.promote(f"triage@{(int(name) + turn) % 4 + 1}", who=name)
                except Conflict as error:
                    assert "triage@prod is at triage@" in error.message and "moved by " in error.message, error
                    raced += 1
        print(raced)
    """
    children = [start(code, name, **place.environment) for name in range(3)]
    raced = sum(int(finish(child)) for child in children)
    with place.open() as registry:
        history = registry.history("triage", "prod")
        assert registry.aliases("triage") == {"prod": history[-1].to_number}
    assert 0 < len(history) <= 60 - raced
    current = None
    for move in history:  # each began where the one before it ended: none was lost or overwritten
        assert move.from_number == current
        assert move.to_number != current
        current = move.to_number


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_two_tags_with_the_same_expectation(place: Place, artefact: Factory) -> None:
    with place.open() as one, place.open() as two:
        for _ in range(3):
            one.publish(artefact())
        one.tag("triage@1", "prod")
        one.tag("triage@2", "prod", expect=1)
        with pytest.raises(Conflict):
            two.tag("triage@3", "prod", expect=1)


@pytest.mark.parametrize(
    ("dies_in", "num_left"),
    [
        ("foreword.registry.blobs.os.fsync", 1),  # the copy is written, its name temporary
        ("foreword.registry.store.insert_version", 1),  # the blob has its name, no row has
        ("foreword.registry.store.move_alias", 1),  # the row is written, not committed
        ("foreword.registry.store.replace", 1),  # the alias too
    ],
)
def test_a_publisher_killed_at_the_worst_moment(place: Place, artefact: Factory, dies_in: str, num_left: int) -> None:
    with place.open() as registry:
        registry.publish(artefact(), alias="prod")
    path = artefact()
    code = """
        import os, signal, sys, unittest.mock
        from foreword.registry.store import Registry
        path, dies_in = sys.argv[1:]
        with Registry.open() as registry, unittest.mock.patch(dies_in) as point:
            point.side_effect = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
            registry.publish(path, alias="prod")
    """
    finish(start(code, path, dies_in, **place.environment), -signal.SIGKILL)
    assert check_whole(place) == [1]
    with place.open() as registry:
        assert registry.gc().num_blobs == 0
        assert registry.gc(0).num_blobs == num_left
        assert registry.resolve("triage@prod").number == 1
        assert registry.publish(path, alias="prod").number == 2
    assert check_whole(place) == [1, 2]


def test_publishers_killed_at_random(place: Place, artefact: Factory) -> None:
    paths = [artefact(num_vectors=50) for _ in range(48)]
    place.open().close()
    source = random.Random(5)
    returned = 0
    for turn in range(4):
        code = """
            import sys
            from foreword.registry.store import Registry
            with Registry.open() as registry:
                for path in sys.argv[1:]:
                    print(registry.publish(path, alias="prod").number, flush=True)
        """
        child = start(code, *paths[turn * 12 : turn * 12 + 12], **place.environment)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(source.uniform(0, 0.1))
        child.kill()
        rest, _ = child.communicate()
        found = check_whole(place)
        assert found == list(range(1, len(found) + 1))
        assert len(found) > returned + len(rest.splitlines())  # what publish returned is there
        returned = len(found)
        with place.open() as registry:
            assert registry.resolve("triage@prod").number == len(found)
    with place.open() as registry:
        registry.gc(0)
        stored = {blob.sha256 for blob in registry.blobs.stored()}
        assert stored == {version.sha256 for version in registry.versions("triage")}


LIMITED = """
    import resource, sys
    from foreword.errors import RegistryError
    from foreword.registry.store import Registry
    home, limit, *paths = sys.argv[1:]
    with Registry.open(home) as registry:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
        for path in paths:
            try:
                print(registry.publish(path, alias="prod").number)
            except RegistryError as error:
                print(error)
"""


def test_no_room_for_the_blob(home: Path, artefact: Factory) -> None:
    with Registry.open(home) as registry:
        registry.publish(artefact(), alias="prod")
    big = artefact(num_vectors=20_000)
    assert big.stat().st_size > 500_000
    out = finish(start(LIMITED, home, 300_000, big))
    assert f"cannot copy {big} into {home / 'blobs' / '.staging'}: File too large" in out
    assert "Free space" in out
    assert check_whole(Place(home)) == [1]
    with Registry.open(home) as registry:
        assert registry.gc(0).num_blobs == 0
        assert registry.publish(big).number == 2


def test_no_room_in_the_database(home: Path, artefact: Factory) -> None:
    with Registry.open(home) as registry:
        registry.publish(artefact(), alias="prod")
    paths = [artefact() for _ in range(12)]
    first, *later = finish(start(LIMITED, home, 120_000, *paths)).splitlines()
    assert first == "2"
    assert any(line.startswith("the registry's database failed: ") for line in later)
    done = [int(line) for line in [first, *later] if line.isdigit()]
    found = check_whole(Place(home))
    assert found == list(range(1, len(found) + 1)) == [1, *done]
    assert len(found) < 13
    with Registry.open(home) as registry:
        assert registry.resolve("triage@prod").number == found[-1]
        assert registry.gc(0).num_blobs == 13 - len(found)
        assert [registry.publish(path).number for path in paths] == list(range(2, 14))


def test_a_registry_that_somebody_else_holds(home: Path, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    from foreword.errors import RegistryError
    from foreword.registry import database

    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    with Registry.open(home) as registry:
        registry.publish(artefact())
        other = sqlite3.connect(home / "registry.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryError, match="database is locked\nAnother process has held the registry"):
            registry.publish(artefact())
        assert registry.resolve("triage").number == 1  # readers go on
        other.execute("COMMIT")
        other.close()
        assert registry.publish(artefact()).number == 2
