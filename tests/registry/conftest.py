"""A registry in a temporary home, artefacts of a few hundred bytes, and child processes that run code."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foreword.core.artefact import ArtefactHeader, save_artefact
from foreword.core.block import Block
from foreword.core.spec import Fingerprint, LayerSpec, ModelSpec
from foreword.registry.store import Registry, Version

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


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def registry(home: Path) -> Iterator[Registry]:
    with Registry.open(home) as registry:
        yield registry


@pytest.fixture
def artefact(tmp_path: Path) -> Factory:
    return Factory(tmp_path / "artefacts")


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
