"""A stand-in for a vLLM server: says what reached it, streams slowly where asked to, fails where asked to."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


def free_port() -> int:
    """Return a port of the loopback interface that nobody has just now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Stub:
    """One server on a free port of the loopback interface; `seen` is what it was sent, oldest first."""

    name: str
    seen: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers (lower case) and bodies."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    """A client went away before its answer was whole."""
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> Stub:
        app = web.Application(client_max_size=64 * 2**20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/chat/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return self

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "base", "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.append(({key.lower(): value for key, value in request.headers.items()}, body))
        self.arrived.set()
        if body.get("prompt") == "fail":
            error = {"message": "the prefix cannot be loaded", "type": "InternalServerError", "code": 500}
            return web.json_response({"error": error}, status=500, headers={"x-served-by": self.name})
        if body.get("prompt") == "wait":
            return await self._wait()
        if not body.get("stream"):
            return web.json_response({"id": self.name, "choices": []}, headers={"x-served-by": self.name})
        return await self._stream(request, num_events=int(body.get("max_tokens", 3)))

    async def _wait(self) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return web.Response(status=504)

    async def _stream(self, request: web.Request, num_events: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream", "x-served-by": self.name})
        try:
            await response.prepare(request)
            for index in range(num_events):
                await response.write(b"data: " + json.dumps({"id": self.name, "index": index}).encode() + b"\n\n")
                await asyncio.sleep(0.02)
            await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionResetError):
            self.cancelled.set()
            raise
        return response
