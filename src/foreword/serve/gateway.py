"""The HTTP gateway: OpenAI's endpoints over a `Backend` and a registry. Imports no torch.

    body -> parse -> resolve the model's name -> lease its version -> Backend.submit -> chunks -> JSON or events

The gateway knows names, versions and limits; it renders, tokenises and computes nothing. What a request holds (a lease,
a stream) lives in one `Call`, which gives everything back however the request ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client.exposition import choose_encoder
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from foreword.errors import ForewordError
from foreword.serve.answers import Answer, Gathered, Usage, event_bytes
from foreword.serve.backend import Backend, Stream
from foreword.serve.metrics import Metrics
from foreword.serve.names import TTL_S, Names, Target, VersionSource
from foreword.serve.openai_api import (
    Body,
    ChatBody,
    CompletionBody,
    InvalidBody,
    error_headers,
    error_json,
    parse_body,
)
from foreword.serve.residents import Lease, Residents, keep_loaded, keep_swept

MAX_BODY_BYTES = 4 * 2**20
"""128 k tokens as ids take about 1 MB of JSON."""
CLIENT_GONE = 499
"""What is counted for a client that went away before its answer was whole (nginx's number)."""

T = TypeVar("T")

log = logging.getLogger("foreword.serve")


class _ClientGone(Exception):
    """The client went away."""


class Gateway:
    """What the endpoints share."""

    def __init__(self, backend: Backend, names: Names, residents: Residents, max_body_bytes: int) -> None:
        self.backend = backend
        self.names = names
        self.residents = residents
        self.max_body_bytes = max_body_bytes
        self.metrics = Metrics(backend, residents)

    async def answer(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        """Answer a completion or a chat; every error becomes OpenAI's error JSON."""
        call = Call(self, request.url.path)
        try:
            body = parse_body(kind, await read_body(request, self.max_body_bytes))
            await _unless_gone(request, call.start(body))
            if body.stream:
                return _EventStream(call)
            answer = await _unless_gone(request, call.whole())
            await call.close(200)
            return JSONResponse(answer, headers=call.headers)
        except (_ClientGone, ClientDisconnect):
            await call.close(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            known = translated(error)
            await call.close(known.status)
            return error_response(known, call.headers)
        except BaseException:  # cancelled: the server's time to drain is up
            await call.close(CLIENT_GONE)
            raise


class Call:
    """One request on its way: what it named, what it holds, what it has cost."""

    def __init__(self, gateway: Gateway, path: str) -> None:
        self.gateway = gateway
        self.path = path
        self.started = time.monotonic()
        self.target: Target | None = None
        self.lease: Lease | None = None
        self.stream: Stream | None = None
        self.shape: Answer | None = None
        self.num_choices = 0
        self._is_closed = False

    @property
    def headers(self) -> dict[str, str]:
        """The answer's headers, as far as it is known who answers."""
        return self.target.headers if self.target else {}

    @property
    def usage(self) -> Usage:
        """What the request has cost so far."""
        if self.stream is None:
            return Usage(0, 0)
        return Usage(self.stream.num_prompt_tokens, self.stream.timings.num_completion_tokens)

    async def start(self, body: Body) -> None:
        """Resolve the model, have its version loaded, and submit."""
        gateway = self.gateway
        self.target = await gateway.names.resolve(body.model)
        if self.target.version is not None:
            self.lease = await gateway.residents.acquire(self.target.version)
        requests = body.requests(self.target.prefix)
        self.num_choices = sum(request.n for request in requests)
        self.shape = Answer(
            body.model,
            is_chat=isinstance(body, ChatBody),
            has_logprobs=body.num_logprobs is not None,
            has_usage_event=body.has_usage_event,
            token_bytes=gateway.backend.token_bytes,
        )
        self.stream = await gateway.backend.submit(requests)

    async def whole(self) -> dict[str, Any]:
        """Gather the answer that is not streamed."""
        assert self.stream is not None and self.shape is not None
        choices = [Gathered() for _ in range(self.num_choices)]
        async for chunk in self.stream:
            choices[chunk.index].add(chunk)
        return self.shape.whole(choices, self.usage)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as server-sent events; an error on the way is the last of them."""
        assert self.stream is not None and self.shape is not None
        try:
            if opening := b"".join(self.shape.opening(self.num_choices)):
                yield opening
            async for chunk in self.stream:
                if events := b"".join(self.shape.events(chunk)):
                    yield events
            await self.close(200)
            yield b"".join(self.shape.closing(self.usage))
        except Exception as error:
            known = translated(error)
            await self.close(known.status)
            yield event_bytes(error_json(known))

    async def close(self, code: int) -> None:
        """Give everything back and count the request; only the first call does."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self.stream is not None:
                await self.stream.aclose()
        finally:
            if self.lease is not None:
                self.lease.release()
            labels = self.target.labels if self.target else None
            self.gateway.metrics.count(labels, code)
            if self.stream is not None and labels is not None:
                self.gateway.metrics.observe(labels, self.usage.prompt_tokens, self.stream.timings)
            self._log(code)

    def _log(self, code: int) -> None:
        name = "-" if self.target is None else "@".join(filter(None, self.target.labels))
        tokens = self.usage
        log.info(
            "%s %s %d: %d + %d tokens in %.3f s",
            self.path,
            name,
            code,
            tokens.prompt_tokens,
            tokens.completion_tokens,
            time.monotonic() - self.started,
        )


class _EventStream(StreamingResponse):
    """A streamed answer. The call is closed however sending ends, also when it never began."""

    def __init__(self, call: Call) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **call.headers}
        super().__init__(call.events(), headers=headers, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.call.close(CLIENT_GONE)


def create_app(
    backend: Backend,
    registry: VersionSource,
    *,
    base_name: str,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_resident_versions: int = 256,
    max_resident_bytes: int | None = None,
    idle_s: float = 900.0,
    resolve_ttl_s: float = TTL_S,
    preload: Sequence[str] = (),
) -> FastAPI:
    """Return the app that serves a base under `base_name`, and every task of the registry.

    Versions are loaded on first use; those that the names in `preload` stand for are loaded at the start and at every
    promotion, and stay. Others are unloaded when idle for `idle_s` seconds, or when the bounds on resident versions
    ask for it. Start-up raises ForewordError where one of `preload` cannot be loaded. The backend stays the caller's
    to close.
    """
    names = Names(registry, base_name, ttl_s=resolve_ttl_s)
    residents = Residents(
        backend, registry.path, max_versions=max_resident_versions, max_bytes=max_resident_bytes, idle_s=idle_s
    )
    gateway = Gateway(backend, names, residents, max_body_bytes)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(keep_swept(residents, min(idle_s / 4, 30.0)))]
        try:
            await names.resolve(base_name)  # raises Conflict where a task has this name
            for name in preload:
                if (version := (await names.resolve(name)).version) is not None:
                    lease = await residents.acquire(version)
                    tasks.append(asyncio.create_task(keep_loaded(lease, name, names, residents, resolve_ttl_s)))
            yield
        finally:
            for task in tasks:
                task.cancel()

    app = FastAPI(title="foreword", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.gateway = gateway
    _add_endpoints(app, gateway)
    _add_error_handlers(app)
    return app


def _add_endpoints(app: FastAPI, gateway: Gateway) -> None:
    started = int(time.time())

    def card(target: Target) -> dict[str, Any]:
        version = target.version
        created = int(version.created.timestamp()) if version else started
        data = {"id": target.name, "object": "model", "created": created, "owned_by": "foreword"}
        return data | ({"root": version.reference, "parent": gateway.names.base_name} if version else {})

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gateway.answer(request, CompletionBody)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await gateway.answer(request, ChatBody)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        targets = await gateway.names.listed(gateway.backend.fingerprint)
        return {"object": "list", "data": [card(target) for target in targets]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return card(await gateway.names.resolve(name))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        stats = gateway.backend.stats()
        return {
            "status": "ok",
            "base": gateway.names.base_name,
            "running": stats.num_running,
            "waiting": stats.num_waiting,
            "resident_versions": gateway.residents.num_resident,
        }

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(gateway.metrics.registry), media_type=content_type)


def _add_error_handlers(app: FastAPI) -> None:
    async def on_foreword_error(request: Request, error: Exception) -> Response:
        return error_response(translated(error))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        known = InvalidBody(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        return error_response(known, dict(error.headers or {}))

    app.add_exception_handler(ForewordError, on_foreword_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def translated(error: Exception) -> ForewordError:
    """Return the error for the user; an unexpected one is logged by class and place, never with values."""
    if isinstance(error, ForewordError):
        return error
    kind = type(error).__name__
    log.error("unexpected %s at\n%s", kind, "".join(traceback.format_tb(error.__traceback__)))
    return ForewordError(f"the server failed ({kind})", hint="Its log says where.")


def error_response(error: ForewordError, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error in OpenAI's shape."""
    return JSONResponse(error_json(error), error.status, {**(headers or {}), **error_headers(error)})


async def read_body(request: Request, limit: int) -> bytes:
    """Read a body of at most `limit` bytes. Raises InvalidBody (413) as soon as it is known to have more."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large(f"{declared} bytes", limit)
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > limit:
            raise _too_large(f"{len(data)} bytes or more", limit)
    return bytes(data)


def _too_large(found: str, limit: int) -> InvalidBody:
    return InvalidBody(f"the body has {found}, {limit} are allowed", hint="Send less text.", status=413)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it and raise _ClientGone when the client goes away first. The body has been read."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _ClientGone
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
