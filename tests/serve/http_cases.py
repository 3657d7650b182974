"""What the tests of backends behind HTTP share: the facts of the demo base, compiled files without a registry."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from foreword.core.artefact import file_sha256, read_header
from foreword.engine.request import Chunk, Request
from foreword.registry.records import CompiledBlob
from foreword.serve.backend import ANYONE, Caller
from foreword.serve.engines.base_info import BaseInfo
from foreword.serve.engines.http_backend import HttpBackend
from tests.serve.artefacts import BASE, demo_base


@cache
def demo_info() -> BaseInfo:
    base = demo_base()
    return BaseInfo(
        folder=str(BASE), fingerprint=base.fingerprint, spec=base.spec, stop_ids=base.stop_ids, dtype="float32"
    )


class FakeSource:
    """A compiled source that compiles nothing: names are made from the artefact's."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.num_positions: int | None = None
        """Told instead of the right number."""

    async def get(self, sha256: str, path: Path) -> CompiledBlob:
        self.asked.append(sha256)
        count = self.num_positions or read_header(path).block.num_positions
        name = compiled_name(sha256)
        return CompiledBlob(sha256=name, source=sha256, dtype="float32", num_positions=count, num_bytes=1234)


def compiled_name(sha256: str) -> str:
    return sha256[::-1]


def in_loop(scenario: Callable[[], Coroutine[Any, Any, None]], limit_s: float = 30) -> None:
    """Run a scenario in a loop of its own, for at most `limit_s` seconds."""

    async def main() -> None:
        async with asyncio.timeout(limit_s):
            await scenario()

    asyncio.run(main())


async def load(backend: Any, path: Path) -> str:
    """Load an artefact; return the name that requests use."""
    sha256 = file_sha256(path)
    await backend.load(sha256, path)
    return sha256


async def answer(backend: HttpBackend, *requests: Request, caller: Caller = ANYONE) -> dict[int, list[Chunk]]:
    """Return the chunks of each choice."""
    stream = await backend.submit(requests, caller)
    found: dict[int, list[Chunk]] = {}
    async for chunk in stream:
        found.setdefault(chunk.index, []).append(chunk)
    return found


def text(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def ids(chunks: Sequence[Chunk]) -> tuple[int, ...]:
    return sum((chunk.token_ids for chunk in chunks), ())
