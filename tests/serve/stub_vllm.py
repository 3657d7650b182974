"""A server that speaks as vLLM 0.32 with the plug-in does, and fails in whatever way it is told.

It answers `w<k> ` for the k-th token, counted from 100; ids and shapes are those of vLLM's own streams.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from foreword.serve.vllm.wire import parse_params

END = 2
"""The id that ends an answer."""


@dataclass
class StubVLLM:
    """One server. Every field may be changed while it runs."""

    num_tokens: int = 3
    """Tokens of an answer, unless `max_tokens` is less."""
    delay_s: float = 0.0
    """Before each token."""
    model: str = "base"
    max_model_len: int | None = 512
    has_plugin: bool = True
    takes_embeddings: bool = False
    key: str = ""
    statuses: list[int] = field(default_factory=list)
    """Statuses of the next completions, one each."""
    refusal: dict[str, Any] = field(default_factory=dict)
    """The error object of those."""
    hangs: str = ""
    """Where it stops for ever: head (no status), token (none comes), middle (after the first)."""
    dies_after: int | None = None
    """Tokens after which the connection breaks; 0 breaks it behind the head, -1 before."""
    fails_after: int | None = None
    """Tokens after which the engine reports that the request failed."""
    health: str = "ok"
    """ok, bad, hang."""
    lost: set[str] = field(default_factory=set)
    """sha256 of compiled files that cannot be loaded."""
    has_end: bool = True
    """Whether a stream ends with [DONE]."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    num_aborted: int = 0
    num_running: int = 0
    num_calls: Counter[str] = field(default_factory=Counter)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> StubVLLM:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self, port: int = 0) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        """Close the port and break all connections, as a kill does."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def until(self, holds: Any) -> None:
        """Wait until something about this server holds."""
        async with asyncio.timeout(10):
            while not holds():
                self.changed.clear()
                await self.changed.wait()

    def _note(self, what: str) -> None:
        self.num_calls[what] += 1
        self.changed.set()

    async def _health(self, request: web.Request) -> web.Response:
        self._note("health")
        if self.health == "hang":
            await asyncio.Event().wait()
        return web.Response(status=200 if self.health == "ok" else 503)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=f"vllm:num_requests_running {self.num_running}\n")

    async def _models(self, request: web.Request) -> web.Response:
        self._note("models")
        if self._is_foreign(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        card = {"id": self.model, "object": "model", "root": "/models/base", "parent": None}
        card |= {"owned_by": "vllm", "max_model_len": self.max_model_len}
        adapter = {"id": "an-adapter", "object": "model", "parent": self.model, "max_model_len": None}
        return web.json_response({"object": "list", "data": [adapter, card]})

    def _is_foreign(self, request: web.Request) -> bool:
        return bool(self.key) and request.headers.get("authorization") != f"Bearer {self.key}"

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        is_check = body.get("max_tokens") == 1 and not body.get("stream")
        if self._is_foreign(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        if not is_check:
            self.bodies.append(body)
            self.headers.append({name.lower(): value for name, value in request.headers.items()})
            self._note("completions")
        if self.hangs == "head":
            await asyncio.Event().wait()
        if self.dies_after == -1 and request.transport is not None:
            request.transport.abort()
        if not is_check and self.statuses:
            return _error(self.statuses.pop(0), self.refusal)
        if body["model"] != self.model:
            return _error(404, {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError"})
        if "prompt_embeds" in body:
            if not self.takes_embeddings:
                return _error(400, {"message": "You must set `--enable-prompt-embeds`", "param": "prompt_embeds"})
            base64.b64decode(body["prompt_embeds"], validate=True)
        has_failed = not self._loads(body)
        if not body.get("stream"):
            return _error(500, {"message": "Internal server error"}) if has_failed else web.json_response({})
        self.num_running += 1
        self.changed.set()
        try:
            return await self._stream(request, body, has_failed)
        except (asyncio.CancelledError, ConnectionError):
            self.num_aborted += 1
            raise
        finally:
            self.num_running -= 1
            self.changed.set()

    def _loads(self, body: dict[str, Any]) -> bool:
        """Whether the plug-in finds what the request wants; without one nobody asks."""
        if body.get("kv_transfer_params") is None or not self.has_plugin:
            return True
        wanted = parse_params(body["kv_transfer_params"])
        is_whole = len(body["prompt"]) > wanted.num_positions
        return body.get("cache_salt") == wanted.salt and is_whole and wanted.sha256 not in self.lost

    async def _stream(self, request: web.Request, body: dict[str, Any], has_failed: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for place, events in enumerate(_answer(body, self.num_tokens)):
            if self.hangs == "token" or (self.hangs == "middle" and place):
                await asyncio.Event().wait()
            await asyncio.sleep(self.delay_s)
            if self.dies_after == place and request.transport is not None:
                request.transport.abort()
                raise ConnectionError
            if has_failed or self.fails_after == place:
                told = {"message": "Internal server error", "type": "InternalServerError", "code": 500, "param": None}
                await response.write(event({"error": told}) + b"data: [DONE]\n\n")
                return response
            await response.write(b"".join(event(data) for data in events))
        num_prompt = len(body.get("prompt") or ())
        usage = {"prompt_tokens": num_prompt, "completion_tokens": self.num_tokens, "total_tokens": 0}
        usage["prompt_tokens_details"] = {"cached_tokens": num_prompt // 2}
        await response.write(event({"id": "cmpl-1", "choices": [], "usage": usage}))
        if self.has_end:
            await response.write(b"data: [DONE]\n\n")
        return response


def _answer(body: dict[str, Any], num_tokens: int) -> list[list[dict[str, Any]]]:
    """Return the events of each step: one for each of `n` choices, as vLLM writes them."""
    stop_ids, count = body.get("stop_token_ids") or [], min(num_tokens, body["max_tokens"])
    ends_itself = count == num_tokens and END in stop_ids and count < body["max_tokens"]
    steps = []
    for place in range(count + ends_itself):
        token = END if place == count else 100 + place
        is_last = place == count - 1 + ends_itself
        finish = None if not is_last else "stop" if ends_itself else "length"
        steps.append([_choice(index, token, finish, body, place) for index in range(body["n"])])
    return steps


def _choice(index: int, token: int, finish: str | None, body: dict[str, Any], place: int) -> dict[str, Any]:
    name = f"token_id:{token}" if body.get("return_tokens_as_token_ids") else f"w{token} "
    logprobs = None
    if body.get("logprobs") is not None:
        best = {name: -0.25, "token_id:7": -1.5, "token_id:8": -9999.0}
        chosen = dict(list(best.items())[: body["logprobs"] + 1])
        logprobs = {"text_offset": [0], "token_logprobs": [-0.25], "tokens": [name], "top_logprobs": [chosen]}
    choice = {
        "index": index,
        "text": "" if token == END else f"w{place} ",
        "logprobs": logprobs,
        "finish_reason": finish,
        "stop_reason": END if token == END else None,
        "prompt_token_ids": body.get("prompt") if place == 0 else None,
        "token_ids": [token],
    }
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": [choice]}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


def _error(status: int, told: dict[str, Any]) -> web.Response:
    error = {"message": "no", "type": "BadRequestError", "param": None, "code": status} | told
    return web.json_response({"error": error}, status=status, headers={"retry-after": "7"} if status == 503 else None)


@contextlib.asynccontextmanager
async def stubs(count: int, **fields: Any) -> AsyncIterator[Sequence[StubVLLM]]:
    """Start several."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(StubVLLM(**fields)) for _ in range(count)]
