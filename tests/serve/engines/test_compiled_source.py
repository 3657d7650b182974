"""Where compiled files come from: the registry, else a process that compiles."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from foreword.core.artefact import file_sha256
from foreword.core.compile_file import compile_file
from foreword.core.compiled import load_compiled, read_compiled_header
from foreword.errors import ArtefactCorrupt, BackendFailed
from foreword.registry.records import CompiledBlob
from foreword.registry.store import Registry
from foreword.serve.engines import compiled_source as compiled_source_module
from foreword.serve.engines.compiled_source import CompiledSource
from tests.serve.artefacts import BASE, demo_base, write_artefact
from tests.serve.http_cases import in_loop


class Store:
    """A registry that keeps what it is given in a dict."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], CompiledBlob] = {}
        self.num_added = 0

    def compiled(self, source: str, dtype: str) -> CompiledBlob | None:
        return self.kept.get((source, dtype))

    def add_compiled(self, path: Path) -> CompiledBlob:
        header = read_compiled_header(path)
        blob = CompiledBlob(
            sha256=file_sha256(path),
            source=header.source,
            dtype=header.dtype,
            num_positions=header.num_positions,
            num_bytes=path.stat().st_size,
        )
        self.kept[header.source, header.dtype] = blob
        self.num_added += 1
        return blob


def put_command(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Have `script` run in the place of Python."""
    fake = folder / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


def test_what_the_registry_has_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_artefact(tmp_path, "triage")
    store = Store()
    compile_file(demo_base(), path, tmp_path / "out.safetensors")
    blob = store.add_compiled(tmp_path / "out.safetensors")
    put_command(monkeypatch, tmp_path, "exit 1")

    async def scenario() -> None:
        source = CompiledSource(store, str(BASE), "float32")
        assert await source.get(file_sha256(path), path) == blob
        with pytest.raises(BackendFailed, match="ended with status 1"):
            await CompiledSource(store, str(BASE), "bfloat16").get(file_sha256(path), path)

    in_loop(scenario)


@pytest.mark.slow
def test_what_it_has_not_is_compiled_once_and_kept(tmp_path: Path) -> None:
    path = write_artefact(tmp_path, "triage", "prefix")
    with Registry.open(tmp_path / "home") as registry:
        sha256 = registry.publish(path).sha256

        async def scenario() -> None:
            source = CompiledSource(registry, str(BASE), "float32")
            first, second = await asyncio.gather(source.get(sha256, path), source.get(sha256, path))
            assert first == second == registry.compiled(sha256, "float32")
            header, _ = load_compiled(registry.blobs.fetch(first.sha256), sha256=first.sha256)
            assert (header.source, header.dtype, header.num_positions) == (sha256, "float32", first.num_positions)

        in_loop(scenario, 60)


def test_errors_of_the_process_keep_their_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = '{"error": "ArtefactCorrupt", "message": "cut short", "hint": "Get it again."}'
    put_command(monkeypatch, tmp_path, f"echo loading; echo '{told}'; exit 3")

    async def scenario() -> None:
        with pytest.raises(ArtefactCorrupt, match="cut short"):
            await CompiledSource(Store(), "base", "float32").get("0" * 64, tmp_path / "a")

    in_loop(scenario)


def test_a_process_that_dies_or_hangs_fails_the_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        source = CompiledSource(Store(), "base", "float32")
        put_command(monkeypatch, tmp_path, "echo no memory >&2; kill -9 $$")
        with pytest.raises(BackendFailed, match=f"status {-signal.SIGKILL}"):
            await source.get("0" * 64, tmp_path / "a")
        put_command(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100")
        monkeypatch.setattr(compiled_source_module, "LIMIT_S", 0.2)
        with pytest.raises(BackendFailed, match="takes more than"):
            await source.get("0" * 64, tmp_path / "a")
        check_gone(tmp_path)

    in_loop(scenario)


def test_nobody_waits_any_more_so_it_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_command(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 100")

    async def scenario() -> None:
        task: asyncio.Task[Any] = asyncio.create_task(
            CompiledSource(Store(), "base", "float32").get("0" * 64, tmp_path / "a")
        )
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text().strip():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        check_gone(tmp_path)

    in_loop(scenario)


def check_gone(folder: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
