"""Blobs that were changed or lost, and gc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from foreword.core.artefact import read_header
from foreword.errors import ArtefactCorrupt, ConfigError, Conflict, RegistryError
from foreword.registry.store import Registry

from .conftest import ON_EACH_DATABASE, Factory, Place, overwrite


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_a_changed_blob_is_found(registry: Registry, artefact: Factory) -> None:
    path = artefact()
    version = registry.publish(path)
    blob = registry.path(version)
    whole = blob.read_bytes()
    assert blob.stat().st_mode & 0o222 == 0  # nobody writes to it by accident
    overwrite(blob, whole[:-1] + bytes([whole[-1] ^ 1]))  # one bit of one weight: a well-formed file still
    assert read_header(blob).task == "triage"
    with pytest.raises(ArtefactCorrupt, match=f"has sha256 [0-9a-f]{{64}}, its version says {version.sha256}"):
        registry.path(version)
    with pytest.raises(ArtefactCorrupt):
        registry.diff("triage@1", "triage@1")
    assert not registry.publish(path).is_new  # heals it
    assert registry.path(version).read_bytes() == whole
    blob.unlink()
    with pytest.raises(RegistryError, match="is gone"):
        registry.path(version)
    registry.publish(path)
    assert registry.path(version).read_bytes() == whole


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_another_versions_file_in_its_place_is_found(registry: Registry, artefact: Factory) -> None:
    one, two = registry.publish(artefact()), registry.publish(artefact())
    overwrite(registry.path(one), registry.path(two).read_bytes())
    with pytest.raises(ArtefactCorrupt, match=two.sha256):
        registry.path(one)


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_a_blob_folder_that_breaks(registry: Registry, artefact: Factory, home: Path) -> None:
    registry.publish(artefact())
    (home / "blobs" / ".staging").rmdir()
    (home / "blobs" / ".staging").write_text("in the way")
    with pytest.raises(RegistryError, match=r"cannot copy .* into .*\.staging: File exists"):
        registry.publish(artefact())
    assert len(registry.versions("triage")) == 1


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_gc_in_a_folder(registry: Registry, artefact: Factory, home: Path) -> None:
    one, two = registry.publish(artefact(), alias="prod"), registry.publish(artefact())
    shared = registry.publish(registry.path(two), task="mail")
    stray = registry.blobs.staging / "left.safetensors"
    stray.write_bytes(b"half")
    (home / "blobs" / "README").write_text("mine")
    (home / "blobs" / "ab").mkdir(exist_ok=True)
    (home / "blobs" / "ab" / "notes.safetensors").write_text("mine")
    assert registry.gc().num_blobs == 0  # young
    registry.delete("triage@2")
    assert registry.gc(0, dry_run=True).num_bytes == 4
    assert stray.exists()
    freed = registry.gc(0)
    assert (freed.num_blobs, freed.num_bytes) == (1, 4)  # the other task's version still has the blob
    registry.delete("mail@1")
    assert registry.gc(3600).num_blobs == 0
    path = registry.path(two)
    os.utime(path, (0, 0))
    assert registry.gc(3600).num_bytes == shared.num_bytes
    assert not path.exists()
    assert registry.path(one).exists()
    assert (home / "blobs" / "README").exists()
    assert (home / "blobs" / "ab" / "notes.safetensors").exists()
    os.utime(registry.path(one), (0, 0))
    assert registry.gc(0).num_blobs == 0


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_gc_leaves_what_is_published_again_meanwhile(registry: Registry, artefact: Factory) -> None:
    path = artefact()
    version = registry.publish(path)
    registry.delete(version.reference)
    os.utime(registry.path(version), (0, 0))
    stored = list(registry.blobs.stored())
    registry.publish(path)
    assert [registry.blobs.remove(blob) for blob in stored] == [False]
    assert registry.path(registry.resolve("triage")).exists()


def test_gc(registry: Registry, artefact: Factory) -> None:
    one, two = registry.publish(artefact(), alias="prod"), registry.publish(artefact())
    shared = registry.publish(registry.path(two), task="mail")
    for reference in ("triage@2", "mail@1"):
        assert registry.gc(0).num_blobs == 0
        registry.delete(reference)
    assert registry.gc().num_blobs == 0  # young
    assert registry.gc(0, dry_run=True).num_bytes == shared.num_bytes
    assert registry.blobs.has(two.sha256)
    assert registry.gc(0, who="ann").num_bytes == shared.num_bytes
    assert not registry.blobs.has(two.sha256)
    with pytest.raises(RegistryError, match="is gone"):
        registry.path(two)
    assert registry.header(one).task == "triage"
    for grace_s in (-1, float("nan")):
        with pytest.raises(ConfigError, match="grace period"):
            registry.gc(grace_s)
    (entry,) = registry.access.audit(action="gc")
    assert (entry.who, entry.details) == ("ann", {"blobs": 1, "bytes": two.num_bytes})


def test_gc_of_many(registry: Registry, artefact: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreword.registry.upkeep.BATCH", 2)
    kept = registry.publish(artefact(), alias="prod")
    for _ in range(5):
        registry.delete(registry.publish(artefact()).reference)
    assert registry.gc(0).num_blobs == 5
    assert [entry.details["blobs"] for entry in registry.access.audit(action="gc")] in ([1, 2, 2], [2, 2, 1], [2, 1, 2])
    assert registry.header(kept).task == "triage"


def test_two_registries_cannot_share_a_blob_store(place: Place, home: Path, artefact: Factory) -> None:
    with place.open() as mine:
        kept = mine.publish(artefact())
        where = mine.blobs.url
    with Registry.open(home.parent / "other", blob_url=where) as other:
        for call in (lambda: other.publish(artefact()), lambda: other.gc(0)):
            with pytest.raises(Conflict, match=r"belong to the registry .*\nGive each registry a place"):
                call()
        assert other.tasks() == []
    with place.open() as mine, place.of("elsewhere").open() as also_mine:
        assert mine.gc(0).num_blobs == 0
        if place.blob_url is not None and place.database_url is not None:
            assert also_mine.header(kept).task == "triage"
            assert also_mine.publish(artefact()).number == 2


def test_a_publish_that_loses_its_blob_leaves_no_version(
    registry: Registry, artefact: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = registry.blobs.put

    def put_and_collect(staged: Any) -> None:
        put(staged)
        registry.gc(0)

    monkeypatch.setattr(registry.blobs, "put", put_and_collect)
    path = artefact()
    with pytest.raises(Conflict, match="was collected before its version was written"):
        registry.publish(path)
    assert registry.tasks() == []
    monkeypatch.undo()
    assert registry.publish(path).number == 1
