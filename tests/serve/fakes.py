"""Stand-ins that need no model: a registry in memory, a backend that answers from a script, a server in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from foreword.core.spec import Fingerprint
from foreword.engine.request import Chunk, FinishReason, Request, TokenLogprob
from foreword.errors import BackendFailed, ForewordError, NotFound, Overloaded, did_you_mean
from foreword.registry.records import Task, Version, split_reference
from foreword.serve.backend import ANYONE, BackendStats, Caller, Timings
from foreword.serve.run import Server, bind, run

FINGERPRINT = Fingerprint(
    model_type="fake",
    shapes_sha256="s",
    quantisation="none",
    weights_sha256="w",
    tokenizer_sha256="t",
    chat_template_sha256="c",
)
OTHER_BASE = Fingerprint(**{**FINGERPRINT.to_json(), "weights_sha256": "other"})


def version(task: str, number: int, *, sha256: str = "", base: Fingerprint = FINGERPRINT) -> Version:
    return Version(
        task=task,
        number=number,
        sha256=sha256 or f"sha-{task}-{number}",
        method="prompt",
        num_vectors=4,
        num_bytes=100,
        base=base,
        parent=None,
        evaluation={},
        who="me",
        why="",
        created=datetime.now(UTC),
    )


class FakeRegistry:
    """Versions in a dict; aliases move by assignment."""

    def __init__(self, *versions: Version) -> None:
        self.known = {found.reference: found for found in versions}
        self.moved: dict[str, int] = {}
        self.num_queries = 0
        self.failure: ForewordError | None = None
        self.lost: set[str] = set()

    def resolve(self, reference: str) -> Version:
        self.num_queries += 1
        if self.failure:
            raise self.failure
        task, selector = split_reference(reference)
        numbers = [found.number for found in self.known.values() if found.task == task]
        if not numbers:
            raise NotFound(f"no task {task!r}", hint=did_you_mean(task, {v.task for v in self.known.values()}))
        if selector is None:
            selector = self.moved.get(f"{task}@prod", max(numbers))
        elif isinstance(selector, str):
            selector = self.moved.get(f"{task}@{selector}", 0)
        if (found := self.known.get(f"{task}@{selector}")) is None:
            raise NotFound(f"no version {reference}", hint="Look at the list.")
        return found

    def path(self, version: Version) -> Path:
        if version.sha256 in self.lost:
            raise ForewordError(f"the blob of {version.reference} is gone", hint="Publish it again.")
        return Path(version.sha256)

    def tasks(self) -> list[Task]:
        names = sorted({found.task for found in self.known.values()})
        return [
            Task(
                name=name,
                num_versions=1,
                newest=1,
                aliases={key.split("@")[1]: n for key, n in self.moved.items() if key.startswith(f"{name}@")},
                created=datetime.now(UTC),
            )
            for name in names
        ]


@dataclass
class FakeBackend:
    """Answers `words` (token ids count from 100), waiting for `gate` before each; says who answers first."""

    words: tuple[str, ...] = ("one ", "two ", "three")
    fingerprint: Fingerprint = FINGERPRINT
    delay_s: float = 0.0
    """Before each word."""
    load_s: float = 0.0
    num_bytes: int = 1000
    load_errors: list[Exception] = field(default_factory=list)
    """Raised by the next loads, one each."""
    submit_error: Exception | None = None
    fail_after: int | None = None
    """Words of the first choice after which the engine fails."""
    finish_reason: FinishReason = "stop"
    loaded: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Words by prefix, for those that answer something of their own."""
    callers: list[Caller] = field(default_factory=list)
    num_queued: int = 0
    num_running: int = 0
    num_aborted: int = 0
    is_dead: bool = False

    async def start(self) -> None:
        self.log.append("start")

    async def load(self, sha256: str, path: Path) -> int:
        self.log.append(f"load {sha256}")
        await asyncio.sleep(self.load_s)
        if self.load_errors:
            raise self.load_errors.pop(0)
        assert sha256 not in self.loaded
        self.loaded.append(sha256)
        return self.num_bytes

    async def unload(self, sha256: str) -> None:
        self.log.append(f"unload {sha256}")
        await asyncio.sleep(self.load_s)
        self.loaded.remove(sha256)

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> FakeStream:
        if self.submit_error:
            raise self.submit_error
        for request in requests:
            assert request.prefix is None or request.prefix in self.loaded
        self.requests += requests
        self.callers.append(caller)
        return FakeStream(self, requests)

    def token_bytes(self, token_id: int) -> bytes:
        return f"w{token_id}".encode() if token_id < 200 else b"\xe2\x80"

    def stats(self) -> BackendStats:
        if self.is_dead:
            raise ForewordError("the engine is dead")
        return BackendStats(
            num_running=self.num_running,
            num_waiting=1,
            num_queued=self.num_queued,
            num_kv_blocks=10,
            num_free_kv_blocks=4,
        )

    def check(self) -> None:
        if self.is_dead:
            raise BackendFailed("the engine is dead")

    async def aclose(self) -> None:
        self.log.append("close")


class FakeStream:
    def __init__(self, backend: FakeBackend, requests: Sequence[Request]) -> None:
        self.backend = backend
        self.requests = requests
        self.num_prompt_tokens = 5 * len(requests)
        self.timings = Timings(queue_s=0.25)
        self.is_open = True
        backend.num_running += 1

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        index = 0
        for request in self.requests:
            own = self.backend.answers.get(request.prefix or "")
            words = own or (f"{request.prefix or 'base'}: ", *self.backend.words)
            for _ in range(request.n):
                for place, word in enumerate(words):
                    await asyncio.sleep(self.backend.delay_s)
                    if request.prefix is not None and request.prefix not in self.backend.loaded:
                        raise ForewordError(f"{request.prefix} was unloaded under a request")
                    if place == self.backend.fail_after:
                        raise ForewordError("the engine fell over", hint="Try again.")
                    chunk = _chunk(index, 100 + place, word, request)
                    self.timings.add(chunk, time.monotonic())
                    yield chunk
                yield Chunk(index=index, text="", finish_reason=self.backend.finish_reason)
                index += 1
        self._end()

    def _end(self) -> None:
        self.backend.num_running -= self.is_open
        self.is_open = False

    async def aclose(self) -> None:
        self.backend.num_aborted += self.is_open
        self._end()


def _chunk(index: int, token: int, text: str, request: Request) -> Chunk:
    top = {token: -0.5, 200: float("-inf")} if request.logprobs else {}
    logprobs = () if request.logprobs is None else (TokenLogprob(token_id=token, logprob=-0.5, top=top),)
    return Chunk(index=index, text=text, token_ids=(token,), logprobs=logprobs)


def overloaded() -> Overloaded:
    return Overloaded("the queue is full: 256 wait, 256 may", hint="Try again.", retry_after_s=2.5)


@dataclass
class Served:
    """A server that runs."""

    url: str
    server: Server
    thread: threading.Thread
    app: FastAPI

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def stop(self) -> None:
        """Tell it to drain, and wait for its end."""
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def served(app: FastAPI, backend: Any, *, drain_s: float = 5.0) -> Iterator[Served]:
    """Serve an app on a free port from a thread."""
    ready = threading.Event()
    urls: list[str] = []

    def tell(url: str) -> None:
        urls.append(url)
        ready.set()

    server = Server(app, drain_s=drain_s, on_ready=tell)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=run, args=(server, listener, backend), daemon=True)
    thread.start()
    assert ready.wait(30)
    running = Served(urls[0], server, thread, app)
    try:
        yield running
    finally:
        running.stop()
        listener.close()
