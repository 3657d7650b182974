"""What backends behind HTTP share: a base that runs elsewhere, its replicas, rendering in this process.

Importing this file imports no torch; the tokenizer that it is given may have.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from foreword.core.artefact import ArtefactHeader, file_sha256, read_header
from foreword.core.spec import Fingerprint
from foreword.core.template import TaskTemplate
from foreword.engine.render import Prepared, check_fields, prepare
from foreword.engine.request import Request
from foreword.engine.stream import decode
from foreword.errors import (
    ArtefactCorrupt,
    BackendFailed,
    BadRequest,
    ForewordError,
    NotFound,
    Overloaded,
)
from foreword.serve.backend import ANYONE, BackendStats, Caller
from foreword.serve.engines.base_info import BaseInfo
from foreword.serve.engines.http_events import Post
from foreword.serve.engines.http_stream import HttpClient, HttpStream
from foreword.serve.engines.replicas import Facts, Pool, Replica, ReplicaState, Timeouts
from foreword.serve.engines.token_bytes import token_bytes

SHORT = 1000
"""Characters or ids that are rendered in place: handing them to a thread would take longer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A version that requests can name: how its text is rendered, and what the engine is told of it."""

    sha256: str
    """What the engine knows it by; its requests' replica is chosen by it."""
    num_positions: int
    """N, of the block."""
    template: TaskTemplate | None
    max_new_tokens: int | None
    num_after: int
    """Soft slots behind the text."""
    payload: Any = None
    """The backend's own."""

    @classmethod
    def of(cls, header: ArtefactHeader, sha256: str, payload: Any = None) -> Loaded:
        """Build it from an artefact's header."""
        return cls(
            sha256=sha256,
            num_positions=header.block.num_positions,
            template=TaskTemplate.from_json(header.template) if header.template else None,
            max_new_tokens=header.max_new_tokens,
            num_after=header.soft_after,
            payload=payload,
        )


@dataclass(frozen=True, slots=True)
class _Renders:
    tokenizer: Any
    stop_ids: frozenset[int]


class HttpBackend:
    """A base on replicas behind HTTP. Not a backend yet: `load` and `posts` are the kind's own.

    `tokenizer` is the base's. `key` is the bearer key that the replicas ask for; `draining` tells the URLs that get
    no new requests; `max_inflight` bounds the requests at one replica.
    """

    health_paths: tuple[str, ...] = ("/health",)

    def __init__(
        self,
        base: BaseInfo,
        tokenizer: Any,
        urls: Sequence[str],
        *,
        key: str | None = None,
        max_inflight: int = 256,
        draining: Callable[[], Collection[str]] = frozenset,
        timeouts: Timeouts | None = None,
        probe_every_s: float = 2.0,
    ) -> None:
        timeouts = timeouts or Timeouts()
        self.base = base
        self.tokenizer = tokenizer
        self.fingerprint: Fingerprint = base.fingerprint
        self.client = HttpClient(key=key, connect_s=timeouts.connect_s, health_paths=self.health_paths)
        self.pool = Pool(
            urls,
            self.probe,
            max_inflight=max_inflight,
            draining=draining,
            timeouts=timeouts,
            probe_every_s=probe_every_s,
        )
        self.loaded: dict[str, Loaded] = {}
        self._renders = _Renders(tokenizer, base.stop_ids)
        self._token_bytes: dict[int, bytes] = {}
        self._num_rendering = 0
        self._renderer = ThreadPoolExecutor(1, "foreword-render")  # one: encoders are not for several threads
        self._files = ThreadPoolExecutor(2, "foreword-load")

    async def start(self) -> None:
        """Begin to watch the replicas; `load` and `submit` do it too."""
        await self.pool.start()

    async def probe(self, replica: Replica) -> Facts:
        """Return what a replica says of itself. Raises Lost where it is not well."""
        return await self.client.probe(replica)

    async def unload(self, sha256: str) -> None:
        """Forget a version; the engine drops what it holds of it when it needs the room."""
        self.loaded.pop(sha256, None)

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> HttpStream:
        """Render, check and send all requests, or none."""
        await self.start()
        if self._num_rendering >= self.pool.max_inflight:
            raise Overloaded(f"{self._num_rendering} requests wait to be tokenised", hint="Try again later.")
        tasks = [self._task(request) for request in requests]
        posts = await self.posts(list(zip(requests, tasks, strict=True)), caller)
        stream = HttpStream(self.client, self.pool, posts, self.explain)
        await stream.start()
        return stream

    async def posts(self, asked: Sequence[tuple[Request, Loaded | None]], caller: Caller) -> list[Post]:
        """Return one HTTP request for each of a client's. Raises BadRequest."""
        raise NotImplementedError

    def explain(self, status: int, error: Mapping[str, Any]) -> ForewordError:
        """Return the error for the client where an engine refused or failed a request."""
        if status in (401, 403):
            return BackendFailed(
                "the engine does not take the gateway's key", hint="Give it in FOREWORD_REPLICA_KEY, and start again."
            )
        if status == 404:
            return BackendFailed(
                "the engine does not know what it was asked for", hint="Is its address that of the right server?"
            )
        return BackendFailed(
            "the engine failed the request", hint="Its log says why; a version that it cannot load fails only its own."
        )

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = token_bytes(self.tokenizer, token_id)
        return self._token_bytes[token_id]

    def stats(self) -> BackendStats:
        """Return the present load, as far as this gateway makes it. Raises BackendFailed as `check` does."""
        self.check()
        num_waiting = self.pool.num_waiting
        return BackendStats(num_running=self.pool.num_inflight - num_waiting, num_waiting=num_waiting)

    def check(self) -> None:
        """Raise BackendFailed where no replica can be asked now."""
        self.pool.check()

    def states(self) -> list[ReplicaState]:
        """Return the state of each replica."""
        return self.pool.states()

    async def aclose(self) -> None:
        """End what is in flight and close all connections."""
        for threads in (self._renderer, self._files):
            threads.shutdown(wait=False, cancel_futures=True)
        await self.pool.aclose()
        await self.client.aclose()

    async def read(self, path: Path, sha256: str) -> ArtefactHeader:
        """Read an artefact's header in a thread. Raises ArtefactCorrupt where the file is another one than `sha256`."""
        return await self.in_thread(lambda: _read(path, sha256))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what reads files, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._files, work)

    async def render(self, asked: Sequence[tuple[Request, Loaded | None]]) -> list[Prepared]:
        """Check requests and render them to token ids; long ones in a thread. Raises BadRequest."""
        if not self._num_rendering and sum(_size(request) for request, _ in asked) <= SHORT:
            return self._render(asked)
        self._num_rendering += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._renderer, self._render, asked)
        finally:
            self._num_rendering -= 1

    def _render(self, asked: Sequence[tuple[Request, Loaded | None]]) -> list[Prepared]:
        found = []
        for request, task in asked:
            check_fields(request, self.base.spec.vocab_size)
            prepared = prepare(request, self._renders, task)
            self._check_length(len(prepared.ids), prepared.max_tokens, task)
            found.append(prepared)
        return found

    def _check_length(self, num_prompt: int, max_tokens: int, task: Loaded | None) -> None:
        num_prefix = task.num_positions if task else 0
        total = num_prefix + num_prompt + max_tokens
        limit = self.pool.max_model_len or self.base.spec.max_positions
        if limit is not None and total > limit:
            raise BadRequest(
                f"prefix {num_prefix} + prompt {num_prompt} + max_tokens {max_tokens} = {total} positions, "
                f"the engine takes {limit}",
                hint="Send less text or lower max_tokens.",
            )

    def _task(self, request: Request) -> Loaded | None:
        if request.prefix is None:
            return None
        if (task := self.loaded.get(request.prefix)) is None:
            raise NotFound(f"no prefix {request.prefix!r}", hint="Load it first.")
        return task


def headers_for(caller: Caller) -> dict[str, str]:
    """Return the headers that tell an engine for whom it works."""
    headers = dict(caller.trace)
    if caller.request_id:
        headers["x-request-id"] = caller.request_id
    return headers


def key_for(task: Loaded | None) -> str:
    """Return what a request's replica is chosen by: its version; for the plain base chance, which no client steers."""
    return task.sha256 if task else secrets.token_hex(8)


def drops_space(tokenizer: Any) -> bool:
    """Return whether the base's decoding of an answer drops a first space, which an engine that decodes it behind
    the prompt keeps (SentencePiece vocabularies)."""
    ids = list(tokenizer("a", add_special_tokens=False).input_ids)
    return decode(tokenizer, ids) == "a" and decode(tokenizer, ids + ids) == "a a"


def load_tokenizer(folder: str | Path) -> Any:
    """Return a base's tokenizer. Imports transformers, and with it torch where that is installed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def _read(path: Path, sha256: str) -> ArtefactHeader:
    if (found := file_sha256(path)) != sha256:
        raise ArtefactCorrupt(
            f"{path} has sha256 {found}, its version says {sha256}",
            hint="Publish the original file again, or restore the blob from a backup.",
        )
    return read_header(path)


def _size(request: Request) -> int:
    if request.messages is not None:
        return sum(len(str(message)) for message in request.messages)
    return len(request.prompt or ()) + len(request.prompt_ids or ())
