"""Compiled files beside the versions that they were made from, and names by digest."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from foreword.core.artefact import file_sha256
from foreword.core.compiled import load_compiled
from foreword.errors import ArtefactCorrupt, ArtefactError, Conflict, NotFound
from foreword.registry.store import Registry

from .conftest import BASE, ON_EACH_DATABASE, Compiled, Factory


def test_a_compiled_file_is_found_by_its_source(registry: Registry, artefact: Factory, compiled: Compiled) -> None:
    version = registry.publish(artefact())
    assert registry.compiled(version.sha256, "float32") is None
    path = compiled(version)
    blob = registry.add_compiled(path)
    assert (blob.sha256, blob.source, blob.dtype) == (file_sha256(path), version.sha256, "float32")
    assert (blob.num_positions, blob.num_bytes) == (3, path.stat().st_size)
    assert registry.compiled(version.sha256, "float32") == blob
    header, layers = load_compiled(registry.blobs.fetch(blob.sha256), sha256=blob.sha256)
    assert header.source == version.sha256 and len(layers) == 2
    assert registry.compiled(version.sha256, "bfloat16") is None
    other = registry.add_compiled(compiled(version, dtype=torch.bfloat16))
    assert registry.compiled(version.sha256, "bfloat16") == other
    for source, dtype in [
        ("nonsense", "float32"),
        ("\0" * 64, "float32"),
        (version.sha256, "\0"),
        ("0" * 64, "float32"),
    ]:
        assert registry.compiled(source, dtype) is None


def test_the_first_one_stays(registry: Registry, artefact: Factory, compiled: Compiled) -> None:
    version = registry.publish(artefact())
    first = registry.add_compiled(compiled(version))
    assert registry.add_compiled(compiled(version)) == first
    assert registry.compiled(version.sha256, "float32") == first
    assert registry.gc(0).num_blobs == 0  # the second was not even uploaded


def test_a_lost_one_is_replaced(registry: Registry, artefact: Factory, compiled: Compiled) -> None:
    version = registry.publish(artefact())
    first = registry.add_compiled(compiled(version))
    (lost,) = [blob for blob in registry.blobs.stored() if blob.sha256 == first.sha256]
    registry.blobs.remove(lost)
    second = registry.add_compiled(compiled(version))
    assert second.sha256 != first.sha256
    assert registry.compiled(version.sha256, "float32") == second


def test_a_file_for_another_base_is_not_handed_out(registry: Registry, artefact: Factory, compiled: Compiled) -> None:
    version = registry.publish(artefact())
    other = registry.add_compiled(compiled(version, base=dataclasses.replace(BASE, weights_sha256="9" * 64)))
    assert registry.compiled(version.sha256, "float32") is None
    own = registry.add_compiled(compiled(version))
    assert registry.compiled(version.sha256, "float32") == own != other


def test_the_source_must_be_a_live_version(registry: Registry, artefact: Factory, compiled: Compiled) -> None:
    path = artefact()
    version = registry.publish(path)
    registry.publish(path, task="mail")
    blob = registry.add_compiled(compiled(version))
    registry.delete("triage@1")
    assert registry.compiled(version.sha256, "float32") == blob  # mail has the same artefact
    registry.delete("mail@1")
    assert registry.compiled(version.sha256, "float32") is None
    with pytest.raises(NotFound, match=f"no version has the sha256 {version.sha256} that the file was compiled from"):
        registry.add_compiled(compiled(version))
    assert registry.publish(path).number == 2
    assert registry.compiled(version.sha256, "float32") == blob  # back again


def test_gc_keeps_a_compiled_file_as_long_as_its_source(
    registry: Registry, artefact: Factory, compiled: Compiled
) -> None:
    path = artefact()
    version, other = registry.publish(path), registry.publish(artefact())
    blob, kept = registry.add_compiled(compiled(version)), registry.add_compiled(compiled(other))
    assert registry.gc(0).num_blobs == 0
    registry.delete("triage@1")
    assert registry.gc(0, dry_run=True).num_bytes == version.num_bytes + blob.num_bytes
    assert registry.gc(0).num_bytes == version.num_bytes + blob.num_bytes
    assert not registry.blobs.has(blob.sha256) and registry.blobs.has(kept.sha256)
    assert registry.publish(path).number == 3
    assert registry.compiled(version.sha256, "float32") is None  # its row went with the blob


def test_a_file_that_is_none(registry: Registry, artefact: Factory, compiled: Compiled, tmp_path: Any) -> None:
    version = registry.publish(artefact())
    path = compiled(version)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactCorrupt):
        registry.add_compiled(path)
    with pytest.raises(ArtefactCorrupt):
        registry.add_compiled(artefact())
    with pytest.raises(ArtefactError, match="cannot read"):
        registry.add_compiled(tmp_path / "nowhere")
    odd = compiled(dataclasses.replace(version, sha256="sha256 of nothing"))
    with pytest.raises(ArtefactCorrupt, match="not a sha256"):
        registry.add_compiled(odd)
    assert registry.gc(0).num_blobs == 0


def test_a_compiled_file_collected_in_flight(
    registry: Registry, artefact: Factory, compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, put = registry.publish(artefact()), registry.blobs.put

    def put_and_collect(staged: Any) -> None:
        put(staged)
        registry.gc(0)

    monkeypatch.setattr(registry.blobs, "put", put_and_collect)
    with pytest.raises(Conflict, match="was collected"):
        registry.add_compiled(compiled(version))
    assert registry.compiled(version.sha256, "float32") is None


@pytest.mark.parametrize("place", ON_EACH_DATABASE, indirect=True)
def test_a_version_by_its_digest(registry: Registry, artefact: Factory) -> None:
    path = artefact()
    first = registry.publish(path)
    assert registry.resolve(f"sha256:{first.sha256}") == first
    registry.publish(artefact())
    second = registry.publish(path, task="mail")
    assert registry.resolve(f"sha256:{first.sha256}") == second  # published later
    registry.delete("mail@1")
    assert registry.resolve(f"sha256:{first.sha256}") == first
    registry.delete("triage@1")
    for reference in (f"sha256:{first.sha256}", f"sha256:{'0' * 64}"):
        with pytest.raises(NotFound, match=f"no version has the {reference.replace(':', ' ')}"):
            registry.resolve(reference)
    for reference in ("sha256:", "sha256:abc", f"sha256:{first.sha256.upper()}", f"sha256:{first.sha256}@1"):
        with pytest.raises(NotFound, match="no task"):
            registry.resolve(reference)
