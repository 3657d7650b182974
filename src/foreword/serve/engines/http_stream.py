"""Requests to replicas, tried again until the first token has come, and the chunks of their answers as one stream.

Each HTTP request has one task, which reads, parses and queues; there is none per chunk. Imports no torch.
"""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp

from foreword.engine.request import Chunk
from foreword.errors import BackendFailed, ForewordError, Overloaded
from foreword.serve.backend import Timings
from foreword.serve.engines.http_events import Post, Reader, json_or_none, not_understood
from foreword.serve.engines.replicas import Attempt, Busy, Facts, Lost, Pool, Replica

MAX_TRIES = 3
"""Replicas that one request is sent to at most."""
LARGE_BYTES = 2**20
END_S = 5.0
"""How long the end of a message may take after the answer is whole."""
KEEP_ALIVE_S = 4.0
"""Below the idle time after which vLLM's server closes a connection itself."""
STATUSES = {"invalid_request_error": 400, "rate_limit_error": 429, "overloaded_error": 503}
"""What foreword's own types of error stand for, in the middle of a stream."""

Explain = Callable[[int, Mapping[str, Any]], ForewordError]
"""From an engine's refusal (HTTP status, its error object) to the error for the client."""


class HttpClient:
    """Connections to replicas. Made inside the running loop, at the first use.

    `health_paths` are asked in turn how a replica is, until one is there.
    """

    def __init__(
        self, *, key: str | None = None, connect_s: float = 2.0, health_paths: Sequence[str] = ("/health",)
    ) -> None:
        self.connect_s = connect_s
        self.health_paths = health_paths
        self._headers = {"accept-encoding": "identity", "content-type": "application/json"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The one session: as many connections as the pool of replicas lets through, no cookies, no time limits."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self.connect_s),
                headers=self._headers,
                auto_decompress=False,
                skip_auto_headers=("accept", "user-agent"),
            )
        return self._session

    async def probe(self, replica: Replica) -> Facts:
        """Return what a replica says of itself, asked anew after it was down. Raises Lost where it is not well."""
        for path in self.health_paths:
            async with self.session.get(replica.url + path) as response:
                status = response.status
            if status != 404:
                break
        if status != 200:
            raise Lost(f"{path} says {status}")
        if replica.is_up and replica.facts is not None:
            return replica.facts
        status, models = await self.get(replica, "/v1/models")
        try:
            card = next(card for card in models["data"] if card.get("parent") is None)
            limit = card.get("max_model_len")
            return Facts(model=card["id"], max_model_len=limit if isinstance(limit, int) else None)
        except (KeyError, TypeError, AttributeError, StopIteration):
            raise Lost(f"/v1/models says {status} and names no base; is its key right?") from None

    async def get(self, replica: Replica, path: str) -> tuple[int, Any]:
        """Return the status and the JSON of a GET, None where it is none. Raises aiohttp's errors."""
        async with self.session.get(f"{replica.url}{path}") as response:
            return response.status, json_or_none(await response.read())

    def post(self, replica: Replica, post: Post) -> Any:
        """Return the context of a POST."""
        assert replica.facts is not None, "a replica that is up has told its facts"
        model = json.dumps(post.model or replica.facts.model).encode()
        data = b'{"model":' + model + b"," + post.body[1:]
        content = data if len(data) < LARGE_BYTES else io.BytesIO(data)  # in pieces: others have their turn between
        headers = {"x-session-id": post.key, **post.headers}  # a router in between keeps a version on one engine by it
        return self.session.post(replica.url + post.path, data=content, headers=headers)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


class HttpStream:
    """The answers to several requests, as they come; a slow reader holds up no replica."""

    def __init__(self, client: HttpClient, pool: Pool, posts: Sequence[Post], explain: Explain) -> None:
        self.timings = Timings()
        self.num_prompt_tokens = sum(post.num_prompt_tokens or 0 for post in posts)
        self.num_cached_tokens: int | None = None
        """Positions that were found in the engine's cache, prefixes included; None where it does not tell."""
        self._client = client
        self._pool = pool
        self._posts = posts
        self._explain = explain
        self._num_open = len(posts)
        self._chunks: deque[Chunk] = deque()
        self._error: Exception | None = None
        self._begun: asyncio.Future[None] | None = None
        self._news: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Send everything, and wait until the engine has taken it and the first token has come.

        Raises what a request meets before; none runs then. So whoever asks gets a status, not a stream that ends.
        """
        heads, self._begun = [], asyncio.get_running_loop().create_future()
        for post in self._posts:
            head = asyncio.get_running_loop().create_future()
            head.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._tasks.add(asyncio.create_task(self._carry_out(post, head)))
            heads.append(head)
        try:
            done, _ = await asyncio.wait(heads, return_when=asyncio.FIRST_EXCEPTION)
            for head in done:
                head.result()
            await self._begun
            if self._error is not None and not self._chunks:
                raise self._error
        except BaseException:
            await self.aclose()
            raise

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until every choice has had its last."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._error is not None:
                await self.aclose()
                raise self._error
            if not self._num_open:
                return
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    async def aclose(self) -> None:
        """End what still runs: its connection is closed, which tells the engine."""
        running = list(self._tasks)
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    def _wake(self) -> None:
        for waiter in (self._begun, self._news):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    async def _carry_out(self, post: Post, head: asyncio.Future[None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await self._try_replicas(post, head)
        except Exception as error:
            if head.done():
                self._error = self._error or error
            else:
                head.set_exception(error)
        finally:
            head.cancel()
            self._tasks.discard(task)
            self._wake()

    async def _try_replicas(self, post: Post, head: asyncio.Future[None]) -> None:
        tried: list[Replica] = []
        loss = Lost("")
        for number in range(MAX_TRIES):
            if len(tried) >= len(self._pool.replicas):
                await asyncio.sleep(0.05 * 2**number * random.random())
            attempt = self._pool.attempt(post.key, tried)
            try:
                with attempt:
                    return await self._send(attempt, post, head)
            except Lost as error:
                loss = error
                tried.append(attempt.replica)
            if attempt.has_token:
                raise BackendFailed("the engine was lost in the middle of the answer", hint="Ask again.")
        if isinstance(loss, Busy):
            raise Overloaded("every engine is full", hint="Try again later.", retry_after_s=loss.retry_after_s)
        raise BackendFailed(f"{len(tried)} engines were lost before the first token came", hint="Ask again.")

    async def _send(self, attempt: Attempt, post: Post, head: asyncio.Future[None]) -> None:
        reader = Reader(post, self.timings)
        try:
            async with self._client.post(attempt.replica, post) as response:
                if response.status != 200:
                    await self._refuse(response, attempt)
                attempt.head()
                if not head.done():
                    head.set_result(None)
                while data := await response.content.readany():
                    for event in reader.events(data):
                        if "error" in event:
                            await self._fail(event["error"], attempt)
                        self._take(event, reader, attempt)
                    if reader.is_done:
                        self._end(attempt)
                    if self._chunks or reader.is_done:
                        self._wake()
        except (aiohttp.ClientError, OSError) as error:
            if not reader.is_done:
                raise Lost(type(error).__name__) from None
        if not reader.is_done:
            raise Lost("the answer has no end")

    def _take(self, event: Mapping[str, Any], reader: Reader, attempt: Attempt) -> None:
        try:
            chunks = reader.chunks(event)
            self._note_usage(event.get("usage"), reader.post)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise not_understood() from error
        if chunks:
            reader.post.body = b""
            attempt.token(reader.now)
            self._chunks.extend(chunks)

    def _note_usage(self, usage: Mapping[str, Any] | None, post: Post) -> None:
        if not usage:
            return
        if post.num_prompt_tokens is None:
            self.num_prompt_tokens += int(usage["prompt_tokens"])
        if details := usage.get("prompt_tokens_details"):
            self.num_cached_tokens = (self.num_cached_tokens or 0) + int(details.get("cached_tokens") or 0)

    def _end(self, attempt: Attempt) -> None:
        """Note that a request's answers are whole; its task ends by itself, so that the connection is used again."""
        if attempt.task in self._tasks:
            self._tasks.discard(attempt.task)
            self._num_open -= 1
            attempt.end_within(END_S)

    async def _refuse(self, response: aiohttp.ClientResponse, attempt: Attempt) -> None:
        told = json_or_none(await response.read())
        error = told.get("error") if isinstance(told, dict) else None
        if response.status in (429, 503):
            retry_after = response.headers.get("retry-after", "")
            raise Busy(f"it says {response.status}", float(retry_after) if retry_after.isdecimal() else 1.0)
        if response.status in (502, 504):
            raise Lost(f"it says {response.status}")
        await self._fail(error if isinstance(error, dict) else {}, attempt, response.status)

    async def _fail(self, error: Any, attempt: Attempt, status: int = 500) -> None:
        """Raise the error that an engine tells; where it is the engine's own, it is asked whether it lives."""
        told: Mapping[str, Any] = error if isinstance(error, dict) else {}
        if isinstance(code := told.get("code"), int):
            status = code
        status = STATUSES.get(str(told.get("type")), status)
        if status in (429, 503):
            raise Busy(f"it says {status}")
        if status >= 500 and not await self._pool.is_well(attempt.replica):
            raise Lost(f"it says {status}, and is not well")
        raise self._explain(status, told)
