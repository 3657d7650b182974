"""Blob stores: the folder and the remote one promise the same."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest

from foreword.core.artefact import file_sha256
from foreword.errors import ArtefactCorrupt, ArtefactError, ConfigError, RegistryError
from foreword.registry.blobs import Blobs, FolderBlobs, open_blobs, staged
from foreword.registry.remote_blobs import RemoteBlobs
from foreword.registry.store import Registry

from .conftest import Factory
from .s3 import bucket_url


@pytest.fixture(params=["folder", "memory", "s3"])
def open_store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Blobs]]:
    """Open the same store as seen from different machines, each with a cache of its own."""
    with ExitStack() as stack:
        url = f"memory://{uuid.uuid4().hex}/blobs" if request.param == "memory" else str(tmp_path / "blobs")
        if request.param == "s3":
            url = stack.enter_context(bucket_url(monkeypatch))
        yield lambda machine: open_blobs(url, tmp_path / machine)
    fsspec.filesystem("memory").store.clear()


def put(store: Blobs, path: Path) -> str:
    with staged(path, store.staging) as copy:
        store.put(copy)
    return file_sha256(path)


def test_put_fetch_list_remove(open_store: Callable[[str], Blobs], tmp_path: Path) -> None:
    store, other = open_store("here"), open_store("there")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    sha256 = file_sha256(path)
    assert not store.has(sha256)
    assert list(store.stored()) == []
    with pytest.raises(RegistryError, match="is gone"):
        store.fetch(sha256)
    assert put(store, path) == sha256
    assert put(other, path) == sha256
    assert other.has(sha256)
    for seen in (store, other, other):
        assert seen.fetch(sha256).read_bytes() == path.read_bytes()
    (blob,) = other.stored()
    assert (blob.sha256, blob.num_bytes) == (sha256, 3_000_000)
    assert other.remove(blob)
    assert not other.remove(blob)
    assert not store.has(sha256)
    assert list(store.stored()) == []
    assert [*store.staging.iterdir(), *other.staging.iterdir()] == []


def test_put_again_renews(open_store: Callable[[str], Blobs], tmp_path: Path) -> None:
    store = open_store("here")
    path = tmp_path / "file"
    path.write_bytes(b"vectors")
    put(store, path)
    (before,) = store.stored()
    while True:  # file systems count time in ticks
        put(store, path)
        (after,) = store.stored()
        if after.modified > before.modified:
            break
    assert not store.remove(before)
    assert store.remove(after)


def test_staging_cleans_up(open_store: Callable[[str], Blobs], tmp_path: Path) -> None:
    store = open_store("here")
    path = tmp_path / "file"
    path.write_bytes(b"vectors")
    with pytest.raises(ZeroDivisionError), staged(path, store.staging) as copy:
        assert copy.path.read_bytes() == b"vectors"
        (seen,) = store.stored()
        assert (seen.sha256, seen.num_bytes) == (None, 7)
        raise ZeroDivisionError
    assert list(store.stored()) == []
    with pytest.raises(ArtefactError, match="cannot read"), staged(tmp_path / "nowhere", store.staging):
        pass
    (left := store.staging / "left.safetensors").write_bytes(b"half")
    (seen,) = store.stored()
    assert store.remove(seen)
    assert not left.exists()


def test_a_remote_blob_that_was_changed(tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    store = open_blobs("memory://changed/blobs", tmp_path / "cache")
    assert isinstance(store, RemoteBlobs)
    path = tmp_path / "file"
    path.write_bytes(b"vectors")
    sha256 = put(store, path)
    cached = store.fetch(sha256)
    key = f"/changed/blobs/{sha256[:2]}/{sha256}.safetensors"
    files.pipe_file(key, b"poison!")
    assert store.fetch(sha256).read_bytes() == b"vectors"  # the proved copy is here
    cached.write_bytes(b"poison!")
    with pytest.raises(ArtefactCorrupt, match=f"changed/blobs/.* has sha256 .*, its version says {sha256}"):
        store.fetch(sha256)
    put(store, path)
    assert store.fetch(sha256).read_bytes() == b"vectors"  # the bad copy was fetched again
    assert list(store.staging.iterdir()) == []


def test_an_upload_that_arrives_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_blobs("memory://short/blobs", tmp_path / "cache")
    assert isinstance(store, RemoteBlobs)
    path = tmp_path / "file"
    path.write_bytes(b"vectors")
    monkeypatch.setattr(store.files, "size", lambda key: 3)
    with pytest.raises(RegistryError, match="has 3 bytes after an upload of 7"):
        put(store, path)

    def refuses(source: str, key: str) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(store.files, "put_file", refuses)
    with pytest.raises(RegistryError, match=r"cannot upload to /short/blobs/.*: AccessDenied"):
        put(store, path)
    assert list(store.staging.iterdir()) == []


def test_a_registry_with_remote_blobs(home: Path, artefact: Factory) -> None:
    url = f"memory://{uuid.uuid4().hex}"
    with Registry.open(home, blob_url=url) as registry:
        one, two = registry.publish(artefact(), alias="prod"), registry.publish(artefact())
        assert registry.path(one) == home / "cache" / one.sha256[:2] / f"{one.sha256}.safetensors"
        assert registry.diff("triage@1", "triage@2").changes == ()
        registry.delete("triage@2")
        assert registry.gc().num_blobs == 0
        assert registry.gc(0).num_bytes == two.num_bytes
        assert not registry.blobs.has(two.sha256)
        assert registry.blobs.has(one.sha256)
    assert not (home / "blobs").exists()


def test_where_blobs_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_blobs(f"file://{tmp_path}/a", tmp_path / "cache")
    assert isinstance(store, FolderBlobs)
    assert store.folder == tmp_path / "a"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the blob folder .* is a file, not a folder"):
        open_blobs(tmp_path / "file", tmp_path / "cache")
    with pytest.raises(ConfigError, match="cannot open blobs at gopher://x"):
        open_blobs("gopher://x", tmp_path / "cache")
