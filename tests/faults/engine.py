"""A stand-in for a vLLM server with the plug-in, in a process of its own, so that it can be killed and stopped.

It answers a completion with `max_tokens` words, `w0 w1 …`, the first of which names the compiled file that it was asked
for; it keeps what it was sent, and counts the answers that it was told to give up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

NOTHING = "0" * 64
"""The version that there is not, by which a gateway finds out that the plug-in is there."""


@dataclass
class Engine:
    """Its settings, and what it has seen."""

    first_s: float = 0.0
    """Until the first word."""
    interval_s: float = 0.005
    """Between words."""
    running: int = 0
    finished: int = 0
    aborted: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def models(self, request: web.Request) -> web.Response:
        card = {"id": "base", "object": "model", "parent": None, "max_model_len": 4096}
        return web.json_response({"object": "list", "data": [card]})

    async def stub(self, request: web.Request) -> web.Response:
        """Take new settings, where there are any; tell what happened."""
        if request.can_read_body:
            for name, value in (await request.json()).items():
                setattr(self, name, value)
        return web.json_response(vars(self))

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        wanted = (body.get("kv_transfer_params") or {}).get("foreword") or {}
        sha256 = wanted.get("sha256", "base")
        if sha256 == NOTHING:
            return web.json_response({"error": {"message": "no such version", "code": 500}}, status=500)
        self.seen.append({"headers": {name.lower(): value for name, value in request.headers.items()}, "body": body})
        self.running += 1
        try:
            response = await self.stream(request, body, sha256)
            self.finished += 1
            return response
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise
        finally:
            self.running -= 1

    async def stream(self, request: web.Request, body: dict[str, Any], sha256: str) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count, n = body["max_tokens"], body.get("n") or 1
        for place in range(count):
            await asyncio.sleep(self.interval_s if place else self.first_s)
            for index in range(n):
                choice = {
                    "index": index,
                    "text": f" w{place}" if place else sha256[:12],
                    "token_ids": [100 + place % 100],
                    "logprobs": None,
                    "finish_reason": "length" if place == count - 1 else None,
                    "stop_reason": None,
                }
                await self.event(response, {"choices": [choice]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count * n}
        await self.event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def event(self, response: web.StreamResponse, data: dict[str, Any]) -> None:
        head = {"id": "cmpl-0", "object": "text_completion", "created": 1, "model": "base"}
        await response.write(b"data: " + json.dumps(head | data).encode() + b"\n\n")


def words(count: int, sha256: str = "base") -> str:
    """Return the answer of `count` tokens."""
    return sha256[:12] + "".join(f" w{place}" for place in range(1, count))


async def serve(port: int, settings: dict[str, Any]) -> None:
    """Serve until killed; prints the port when ready."""
    engine = Engine(**settings)
    app = web.Application(client_max_size=64 * 2**20)
    app.router.add_get("/health", engine.health)
    app.router.add_get("/v1/models", engine.models)
    app.router.add_post("/v1/completions", engine.complete)
    app.router.add_route("*", "/stub", engine.stub)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=4096)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--settings", type=json.loads, default={})
    given = parser.parse_args()
    asyncio.run(serve(given.port, given.settings))
