"""Fault 8: SIGKILL of whoever writes. What is stored is whole: the registry opens, versions prove by their digest."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreword.core.artefact import file_sha256, load_artefact
from tests.faults.stage import Stage, database_url, staged
from tests.registry.s3 import bucket_url

pytestmark = pytest.mark.slow

PUBLISH = """
import os, signal, sys
from unittest import mock
from foreword.registry import store
dies_in, *paths = sys.argv[1:]
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
with store.Registry.open() as registry:
    for place, path in enumerate(paths):
        if dies_in and place == 1:
            mock.patch.object(registry.blobs if dies_in == "put" else store, dies_in, die).start()
        print(registry.publish(path, alias="prod").number, flush=True)
"""
WORST = ["put", "insert_version", "move_alias", "version_from_row"]
"""Copied, not stored; stored, without a row; with a row, without its alias; all done, not committed."""
FETCH = """
import os, signal, sys
from foreword.registry.store import Registry
with Registry.open() as registry:
    files = registry.blobs.files
    get_file = files.get_file
    def die_half_way(key, name):
        get_file(key, name)
        os.truncate(name, os.stat(name).st_size // 2)
        print("half", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    files.get_file = die_half_way
    registry.path(registry.resolve(sys.argv[1]))
"""


@pytest.fixture(params=["folder", pytest.param("team", marks=pytest.mark.postgres)])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """SQLite and a folder; or PostgreSQL and S3."""
    if request.param == "folder":
        with staged(tmp_path) as stage:
            yield stage
        return
    with (
        database_url("postgresql") as database,
        bucket_url(monkeypatch) as blobs,
        staged(tmp_path, database_url=database, blob_url=blobs) as stage,
    ):
        yield stage


def test_a_publisher_killed_at_any_time(stage: Stage) -> None:
    """Proves that the blob is stored whole before its row, and the row with its alias in one transaction.

    At the four worst moments, and a few times by chance.
    """
    source, num_before = random.Random(3), 0
    for dies_in in (*WORST, "", "", ""):
        publisher = stage.python(PUBLISH, dies_in, *(stage.artefact("triage") for _ in range(4)))
        if dies_in:
            assert publisher.wait() == -signal.SIGKILL
        else:
            time.sleep(source.uniform(0, 0.1))
            publisher.popen.kill()
        rest, _ = publisher.popen.communicate()
        with stage.open() as registry:
            versions = registry.versions("triage")
            assert [version.number for version in versions] == list(range(1, len(versions) + 1))
            assert len(versions) >= num_before + 1 + len(rest.splitlines())  # what publish has returned is there
            for version in versions[num_before:]:
                assert load_artefact(registry.path(version)).sha256 == version.sha256
            assert registry.resolve("triage").number == registry.aliases("triage")["prod"] == len(versions)
            num_before = len(versions)
    with stage.open() as registry:
        registry.gc(0)
        named = {version.sha256 for version in registry.versions("triage")}
        assert {blob.sha256 for blob in registry.blobs.stored()} == named


@pytest.mark.postgres
@pytest.mark.parametrize("stage", ["team"], indirect=True)
def test_a_reader_killed_half_way_through_a_download(stage: Stage) -> None:
    """Proves that a download gets its name when it is whole and proved: nobody ever finds half a file under it."""
    version = stage.publish(compiled=False)
    cached = stage.home / "cache" / version.sha256[:2] / f"{version.sha256}.safetensors"
    reader = stage.python(FETCH, version.reference)
    assert (reader.line, reader.wait()) == ("half", -signal.SIGKILL)
    assert not cached.exists()
    assert load_artefact(stage.registry.path(version)).sha256 == version.sha256 == file_sha256(cached)
