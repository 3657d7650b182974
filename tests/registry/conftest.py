"""Registries on each kind of database and blob store, artefacts of a few hundred bytes, and child processes."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from foreword.core.artefact import ArtefactHeader, save_artefact
from foreword.core.block import Block
from foreword.core.compiled import save_compiled
from foreword.core.prompt import KVPrefix
from foreword.core.spec import Fingerprint, LayerSpec, ModelSpec
from foreword.registry.access_records import Limits, ShadowPair, Usage
from foreword.registry.store import Registry, Version

from .postgres import postgres_url
from .s3 import bucket_url

BASE = Fingerprint(
    model_type="llama",
    shapes_sha256="1" * 64,
    quantisation="",
    weights_sha256="2" * 64,
    tokenizer_sha256="3" * 64,
    chat_template_sha256="4" * 64,
)
LAYER = LayerSpec(num_kv_heads=2, head_dim=4, value_dim=4)
SPEC = ModelSpec(
    model_type="llama",
    hidden_size=8,
    embed_size=8,
    vocab_size=97,
    max_positions=256,
    num_parameters=1234,
    layers=(LAYER, LAYER),
)
_seeds = itertools.count()


class Factory:
    """Writes artefacts; each call gives another one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, task: str = "triage", *, num_vectors: int = 2, **fields: Any) -> Path:
        """Return the path of a new artefact; `fields` go to the header."""
        seed = next(_seeds)
        block = Block.of([[1], num_vectors])
        defaults: dict[str, Any] = {"method": "prompt", "base": BASE, "spec": SPEC}
        header = ArtefactHeader(task=task, block=block, **{**defaults, **fields})
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in header.tensor_shapes().items()}
        path = self.folder / f"{task}-{seed}.safetensors"
        save_artefact(path, header, tensors)
        return path


@dataclass(frozen=True)
class Place:
    """Where a registry lies."""

    home: Path
    database_url: str | None = None
    blob_url: str | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that lead a child process there."""
        urls = {"FOREWORD_DATABASE_URL": self.database_url or "", "FOREWORD_BLOB_URL": self.blob_url or ""}
        return {"FOREWORD_HOME": str(self.home), **urls}

    def open(self) -> Registry:
        return Registry.open(self.home, database_url=self.database_url, blob_url=self.blob_url)

    def of(self, machine: str) -> Place:
        """The same registry as another machine sees it."""
        return replace(self, home=self.home.parent / machine)


def _place(kind: str) -> Any:
    marks = {"postgres": pytest.mark.postgres, "sqlite-s3": pytest.mark.slow}
    return pytest.param(kind, marks=[mark for name, mark in marks.items() if kind.startswith(name)])


ON_EACH_DATABASE = [_place("sqlite-folder"), _place("postgres-folder")]
"""For tests that are about the database alone."""
EVERYWHERE = [*ON_EACH_DATABASE, _place("sqlite-s3"), _place("postgres-s3")]
ON_POSTGRES = [_place("postgres-folder")]
ON_S3 = [_place("sqlite-s3")]


@pytest.fixture(params=EVERYWHERE)
def place(request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A fresh place on each database with each blob store; `indirect` parameters name some of them."""
    database, blobs = request.param.split("-")
    with ExitStack() as stack:
        database_url = stack.enter_context(postgres_url()) if database == "postgres" else None
        blob_url = stack.enter_context(bucket_url(monkeypatch)) if blobs == "s3" else None
        yield Place(home, database_url, blob_url)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("FOREWORD_HOME", "FOREWORD_DATABASE_URL", "FOREWORD_BLOB_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


@pytest.fixture
def registry(place: Place) -> Iterator[Registry]:
    with place.open() as registry:
        yield registry


@pytest.fixture
def artefact(tmp_path: Path) -> Factory:
    return Factory(tmp_path / "artefacts")


class Compiled:
    """Writes compiled files of a version; each call gives another one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, version: Version, *, dtype: torch.dtype = torch.float32, base: Fingerprint = BASE) -> Path:
        keys, values = (tuple(torch.randn(2, 3, 4).to(dtype) for _ in SPEC.layers) for _ in "kv")
        prefix = KVPrefix(name=version.task, digest=version.sha256, keys=keys, values=values)
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{version.task}-{next(_seeds)}.safetensors"
        save_compiled(path, prefix, base=base, spec=SPEC)
        return path


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    return Compiled(tmp_path / "compiled")


def fill_access(registry: Registry, task: str = "triage") -> None:
    """Put something into each table of access, for a task with versions 1 and 2."""
    access = registry.access
    access.create_tenant("shop", limits=Limits(requests_per_minute=60, concurrent=4))
    access.create_key("shop", name="ci")
    access.grant("shop", task, "call")
    access.set_route(task, "canary", f"{task}@2", 0.1)
    access.drain("http://replica-1:8000")
    access.sync_usage("gateway-1", {"shop": Usage(requests=1, tokens=20, running=1)})
    access.add_shadow_pair(shadow_pair(task))


def shadow_pair(task: str = "triage", **changes: Any) -> ShadowPair:
    fields: dict[str, Any] = {
        "when": datetime.now(UTC),
        "task": task,
        "number": 1,
        "candidate": 2,
        "request_id": "r-1",
        "input": None,
        "answer": "refunds",
        "candidate_answer": "refunds",
        "agrees": True,
        "seconds": 0.25,
        "candidate_seconds": 0.5,
    }
    return ShadowPair(**{**fields, **changes})


def measured(score: float, low: float, high: float, **changes: Any) -> dict[str, Any]:
    """Return an evaluation as the gate reads it."""
    same = {"metric": "exact_match", "split": "dev", "data_sha256": "d" * 64}
    return same | {"score": score, "interval": [low, high]} | changes


def overwrite(blob: Path, data: bytes) -> None:
    """Change a stored blob, which is read-only."""
    blob.chmod(0o644)
    blob.write_bytes(data)


def numbers(versions: list[Version]) -> list[int]:
    return [version.number for version in versions]


def start(code: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    """Start a Python process on `code`; sys.argv[1:] are the arguments."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def finish(child: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for a child, check its exit status and return what it printed."""
    out, err = child.communicate(timeout=120)
    assert child.returncode == code, err
    return out
