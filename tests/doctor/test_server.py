"""Identity and conformance through a running server: the published version passes, anything else is found out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from foreword.core.artefact import load_artefact, read_header, save_artefact
from foreword.core.compile import compile
from foreword.core.conformance import make_probes
from foreword.doctor.finding import Finding
from foreword.doctor.server import ServerUnderTest
from foreword.doctor.server.conformance import check_conformance
from foreword.doctor.server.identity import check_served_version
from foreword.doctor.server.visit import Expected, Visit
from foreword.engine.engine import Engine
from foreword.errors import BackendFailed
from foreword.registry.store import Registry
from foreword.serve.engines.embedded import EmbeddedBackend
from foreword.serve.gateway import create_app
from tests.serve.artefacts import demo_base, write_artefact
from tests.serve.fakes import served

METHODS = ("prompt", "prefix", "kv")


def probed(path: Path) -> Path:
    """Give an artefact its conformance probes."""
    artefact, base = load_artefact(path), demo_base()
    rows = [base.tokenizer(text).input_ids for text in ("Where is my order?", "The invoice is wrong.", "Thank you")]
    header = dataclasses.replace(artefact.header, conformance=make_probes(base, compile(base, artefact), rows))
    save_artefact(path, header, artefact.tensors)
    return path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Registry]]:
    folder = tmp_path_factory.mktemp("doctor")
    with Registry.open(folder / "home") as registry:
        for seed, method in enumerate(METHODS):
            registry.publish(probed(write_artefact(folder, method, method, seed=seed)))
        engine = Engine(demo_base(), kv_memory="32MiB")
        engine.start()
        backend = EmbeddedBackend(engine)
        with served(create_app(backend, registry, base_name="base-3m"), backend) as running:
            yield running.url, registry


def check(url: str, model: str, expected: str, registry: Registry) -> list[Finding]:
    """Return the findings of identity and conformance, with a version that should answer."""
    version = registry.resolve(expected)
    should = Expected(
        reference=version.reference,
        sha256=version.sha256,
        header=registry.header(version),
        path=registry.path(version),
    )
    with ServerUnderTest(f"{url}/v1/") as server:
        visit = Visit(server=server, model=model, version=should, base_name="base-3m", dtype="float32")
        return [check_served_version(visit), check_conformance(visit)]


@pytest.mark.parametrize("method", METHODS)
def test_a_published_version_passes(stage: tuple[str, Registry], method: str) -> None:
    found = check(stage[0], method, method, stage[1])
    assert [finding.ok for finding in found] == [True, True], found
    assert f"{method}@1" in found[0].measured and "3 of 3" in found[1].measured


def test_another_version_is_found_out(stage: tuple[str, Registry]) -> None:
    url, registry = stage
    found = check(url, "kv", "prompt", registry)
    assert [finding.ok for finding in found] == [False, False] and found[0].fault == "stale-version"
    digests = [registry.resolve(name).sha256[:12] for name in ("prompt", "kv")]
    assert all(digest in found[0].measured for digest in digests)
    assert "FAILS" in found[1].measured


def test_the_plain_base_does_not_pass_for_a_version(stage: tuple[str, Registry]) -> None:
    found = check(stage[0], "base-3m", "kv", stage[1])
    assert found[0].skipped and "x-foreword-digest" in found[0].measured, "no header says who answers"
    assert not found[1].ok and found[1].fault == "mask-blind"


def test_an_unknown_name_is_refused(stage: tuple[str, Registry]) -> None:
    url, registry = stage
    version = registry.resolve("kv")
    should = Expected(reference="kv@1", sha256=version.sha256, header=registry.header(version))
    with ServerUnderTest(url) as server:
        found = check_served_version(Visit(server=server, model="nobody", version=should))
    assert not found.ok and "404" in found.measured and "nobody" in found.measured


def test_an_artefact_without_probes_says_so(stage: tuple[str, Registry], tmp_path: Path) -> None:
    header = read_header(write_artefact(tmp_path, "bare"))
    with ServerUnderTest(stage[0]) as server:
        bare = Expected(reference="bare@1", sha256="0" * 64, header=header)
        found = check_conformance(Visit(server=server, model="bare", version=bare))
    assert found.skipped and "needs conformance probes" in found.measured


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "http://[::"])
def test_a_dead_or_wrong_url_is_a_clear_error(url: str) -> None:
    with pytest.raises(BackendFailed, match=r"does not answer|is no URL"):
        with ServerUnderTest(url) as server:
            server.models()
