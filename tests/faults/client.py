"""Clients of a gateway: many requests at once, and raw sockets for those that do not behave."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from tests.faults.stage import Gateway, bearer

T = TypeVar("T")


@dataclass
class Answer:
    """What came of one request; `error` is the error object, of a status or of a stream's event."""

    status: int = 0
    text: str = ""
    tokens: int = 0
    """Events with text."""
    usage: dict[str, int] | None = None
    error: dict[str, Any] | None = None
    is_whole: bool = False
    """A whole body, or a stream that ended with [DONE]."""
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    broken: str = ""
    """How the connection failed."""
    has_text: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def version(self) -> str:
        return self.headers.get("x-foreword-version", "")


class Asker:
    """Sends completions to a gateway, inside one event loop."""

    def __init__(self, gateway: Gateway | str, key: str, session: aiohttp.ClientSession) -> None:
        self.url = gateway if isinstance(gateway, str) else gateway.url
        self.key = key
        self.session = session

    async def ask(self, answer: Answer | None = None, **body: Any) -> Answer:
        """Ask, and read the answer to its end, however it ends."""
        answer = answer or Answer()
        started = time.monotonic()
        body = {"model": "triage", "prompt": "hello", "max_tokens": 5, **body}
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        try:
            async with self.session.post(f"{self.url}/v1/completions", json=body, headers=bearer(self.key)) as response:
                answer.status = response.status
                answer.headers = {name.lower(): value for name, value in response.headers.items()}
                if body.get("stream") and response.status == 200:
                    await self._events(response, answer)
                else:
                    self._take(json.loads(await response.read()), answer)
                    answer.is_whole = True
        except (aiohttp.ClientError, OSError) as error:
            answer.broken = f"{type(error).__name__}: {error}"
        answer.seconds = time.monotonic() - started
        return answer

    def begin(self, **body: Any) -> tuple[Answer, asyncio.Task[Answer]]:
        """Ask in the background."""
        answer = Answer()
        return answer, asyncio.create_task(self.ask(answer, **body))

    async def streams(self, count: int, **body: Any) -> list[tuple[Answer, asyncio.Task[Answer]]]:
        """Begin streams, and wait until each has its first text."""
        begun = [self.begin(stream=True, **body) for _ in range(count)]
        async with asyncio.timeout(20):
            await asyncio.gather(*(answer.has_text.wait() for answer, _ in begun))
        return begun

    async def _events(self, response: aiohttp.ClientResponse, answer: Answer) -> None:
        async for line in response.content:
            if line.strip() == b"data: [DONE]":
                answer.is_whole = True
            elif line.startswith(b"data: "):
                self._take(json.loads(line[6:]), answer)

    def _take(self, told: dict[str, Any], answer: Answer) -> None:
        answer.error = told.get("error") or answer.error
        answer.usage = told.get("usage") or answer.usage
        for choice in told.get("choices", ()):
            answer.text += choice["text"]
            answer.tokens += bool(choice["text"])
            answer.has_text.set()


def together(gateway: Gateway | str, key: str, work: Callable[[Asker], Awaitable[T]]) -> T:
    """Run `work(asker)` in an event loop of its own."""

    async def inside() -> T:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            return await work(Asker(gateway, key, session))

    return asyncio.run(inside())


async def until(holds: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait until `holds()`, which may block, is true."""
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.02)


def request_bytes(key: str, body: dict[str, Any], *headers: str) -> bytes:
    """Return a POST for a completion as it goes over the wire."""
    data = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: x", f"authorization: Bearer {key}", *headers]
    lines.append(f"content-length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def connect(gateway: Gateway, *, receive_bytes: int | None = None, seconds: float = 20.0) -> socket.socket:
    """Return a connected socket; `receive_bytes` is its receive buffer, small for a reader that does not read."""
    made = socket.socket()
    if receive_bytes is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.settimeout(seconds)
    made.connect(("127.0.0.1", gateway.port))
    return made


def read_response(made: socket.socket) -> tuple[int, bytes]:
    """Return the status and the body of the next answer."""
    response = http.client.HTTPResponse(made)
    response.begin()
    return response.status, response.read()


def read_all(made: socket.socket) -> bytes:
    """Return everything until the other side closes; a reset ends it too."""
    data = b""
    try:
        while piece := made.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data
