"""The HTTP gateway: OpenAI's endpoints over a `Backend` and a registry. Imports no torch.

    body -> parse -> resolve the model's name -> lease its version -> Backend.submit -> chunks -> JSON or events

The gateway knows names, versions and limits; it renders, tokenises and computes nothing. What a request holds (a lease,
a stream) lives in one `Call`, which gives everything back however the request ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from foreword.errors import ForewordError, NotFound, ServeError
from foreword.registry.records import is_name
from foreword.registry.store import Registry
from foreword.serve.access.admin_api import add_admin
from foreword.serve.access.auth import Guard, Principal
from foreword.serve.access.control import Control
from foreword.serve.access.limits import Limiter
from foreword.serve.backend import Backend
from foreword.serve.call import CLIENT_GONE, Call, EventStream
from foreword.serve.http.edge import Edge
from foreword.serve.http.endpoints import add_endpoints
from foreword.serve.http.exchange import ClientGone, Pending, error_response, read_body, translated
from foreword.serve.http.openai_api import ChatBody, CompletionBody, parse_body
from foreword.serve.http.openai_errors import InvalidPath
from foreword.serve.http.openapi import document
from foreword.serve.versions.names import TTL_S, Names, Target, VersionSource
from foreword.serve.versions.residents import Residents, keep_loaded, keep_swept
from foreword.serve.versions.shadow import Shadows
from foreword.serve.watch.metrics import Metrics
from foreword.serve.watch.record import count_bad_key
from foreword.serve.watch.tracing import Tracing, from_environment

if TYPE_CHECKING:
    from fastapi.telemetry import TelemetryConfig

NAMES_TTL_S = 30.0
"""How long an answer of the registry is used where each change is told at once."""
MAX_BODY_BYTES = 4 * 2**20
"""128 k tokens as ids take about 1 MB of JSON."""
NO_TELEMETRY: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}
"""FastAPI's own would send bodies and the texts of errors to wherever the environment says."""
MAX_PENDING_BODIES = 64
"""Bodies of the largest size that may be read at once."""

log = logging.getLogger("foreword.serve")


class Gateway:
    """What the endpoints share."""

    def __init__(
        self,
        backend: Backend,
        names: Names,
        residents: Residents,
        guard: Guard,
        *,
        max_body_bytes: int = MAX_BODY_BYTES,
        allows_special_tokens: bool = False,
    ) -> None:
        self.backend = backend
        self.names = names
        self.residents = residents
        self.guard = guard
        self.control = guard.control
        self.limiter = Limiter()
        self.max_body_bytes = max_body_bytes
        self.allows_special_tokens = allows_special_tokens
        self.metrics = Metrics(backend, residents)
        self.metrics.gauges.control = self.control
        self.metrics.gauges.limiter = self.limiter
        self.tracing: Tracing | None = None
        self.shadows: Shadows | None = None
        if self.control.source is not None:
            keep = self.control.source.add_shadow_pair
            self.shadows = self.metrics.gauges.shadows = Shadows(backend, names, residents, self.metrics, keep)
        self.pending = Pending(MAX_PENDING_BODIES * max_body_bytes)
        self.calls: set[Call] = set()
        """Requests under way."""
        self.is_loaded = False
        """The app has started: what it preloads is loaded."""
        self.is_draining = False
        """No new requests are wanted; those under way end."""

    async def answer(self, request: Request, kind: type[CompletionBody] | type[ChatBody]) -> Response:
        """Answer a completion or a chat; every error becomes OpenAI's error JSON."""
        call = Call(self, request)
        try:
            call.admit()
            body = parse_body(kind, await read_body(request, self.max_body_bytes, self.pending))
            call.watch()
            with call.halt:
                await call.start(body)
                answer = None if body.stream else await call.whole()
            if answer is None:
                return EventStream(call)
            await call.close(200)
            return JSONResponse(answer, headers=call.headers)
        except ClientGone:
            await call.close(CLIENT_GONE)
            return Response(status_code=CLIENT_GONE)
        except Exception as error:
            known = translated(error)
            await call.close(known.status, known)
            return error_response(known, call.headers)
        except BaseException:  # cancelled: the server's time to drain is up
            await call.close(CLIENT_GONE)
            raise

    async def resolve(self, principal: Principal, name: str) -> Target:
        """Return what a model's name stands for. Raises NotFound where that is nothing that `principal` may call."""
        self.guard.check(principal, name)
        try:
            target = await self.names.resolve(name)
        except NotFound as error:
            raise self.guard.unknown(principal, name, error) from None
        self.guard.check_target(principal, target)
        return target

    def not_ready(self) -> list[str]:
        """Return why no requests are wanted here now; nothing where they are."""
        reasons = []
        if self.is_draining:
            reasons.append("the server is about to end")
        if not self.is_loaded:
            reasons.append("versions are being loaded")
        if self.guard.requires_keys and not self.control.is_fresh:
            reasons.append("the registry does not answer")
        try:
            self.backend.check()
        except ForewordError:  # its text may name hosts: it is for the log and the metrics
            reasons.append("the engine cannot answer")
        return reasons

    def tick(self) -> None:
        """End what is allowed no more, charge what was used; called a few times a second."""
        for call in tuple(self.calls):
            call.check()
            call.settle()


def create_app(
    backend: Backend,
    registry: VersionSource,
    *,
    base_name: str,
    control: Control | None = None,
    require_keys: bool = False,
    allow_special_tokens: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_resident_versions: int = 256,
    max_resident_bytes: int | None = None,
    idle_s: float = 900.0,
    resolve_ttl_s: float | None = None,
    preload: Sequence[str] = (),
) -> FastAPI:
    """Return the app that serves a base under `base_name`, and every task of the registry.

    Versions are loaded on first use; those that the names in `preload` stand for are loaded at the start and at every
    promotion, and stay. Others are unloaded when idle for `idle_s` seconds, or when the bounds on resident versions
    ask for it. Start-up raises ForewordError where one of `preload` cannot be loaded. The backend stays the caller's
    to close.

    `control` (made of a `Registry` where it is not given) says who may call what; with `require_keys` nobody is
    answered without a key. Where it tells of each change, a name is asked for again after `NAMES_TTL_S` only. Raises
    ServeError where keys are required and it has no source.
    """
    if control is None:
        control = Control(registry.access if isinstance(registry, Registry) else None)
    if require_keys and control.source is None:
        raise ServeError("keys are required, and this registry has none", hint="Serve with a Registry.")
    ttl_s = resolve_ttl_s or (TTL_S if control.source is None else NAMES_TTL_S)
    names = Names(registry, base_name, ttl_s=ttl_s)
    residents = Residents(
        backend, registry.path, max_versions=max_resident_versions, max_bytes=max_resident_bytes, idle_s=idle_s
    )
    guard = Guard(control, requires_keys=require_keys)
    gateway = Gateway(
        backend,
        names,
        residents,
        guard,
        max_body_bytes=max_body_bytes,
        allows_special_tokens=allow_special_tokens,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(keep_swept(residents, min(idle_s / 4, 30.0)))]
        gateway.tracing = from_environment()
        try:
            if control.source is not None:
                await control.refresh()
                control.on_change(lambda old, new: names.forget())
                control.on_tick(gateway.tick)
                tasks.append(asyncio.create_task(control.keep_fresh()))
            if require_keys:
                tasks.append(asyncio.create_task(gateway.limiter.keep_synced(control)))
                if not is_name(base_name):
                    log.warning("no grant can name the base %s: only tenants with * may call it", base_name)
            await names.resolve(base_name)  # raises Conflict where a task has this name
            for name in preload:
                if (version := (await names.resolve(name)).version) is not None:
                    lease = await residents.acquire(version)
                    tasks.append(asyncio.create_task(keep_loaded(lease, name, names, residents, min(ttl_s, TTL_S))))
            gateway.is_loaded = True
            yield
        finally:
            gateway.is_loaded = False
            for task in tasks:
                task.cancel()
            if gateway.shadows is not None:
                await gateway.shadows.aclose()
            if gateway.tracing is not None:
                await asyncio.to_thread(gateway.tracing.close)
            control.close()

    app = FastAPI(title="foreword", lifespan=lifespan, docs_url=None, redoc_url=None, telemetry=NO_TELEMETRY)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    app.state.gateway = gateway
    app.add_middleware(Edge)
    add_endpoints(app, gateway)
    if isinstance(registry, Registry):
        add_admin(app, gateway, registry)
    _add_error_handlers(app, gateway)
    return app


def _add_error_handlers(app: FastAPI, gateway: Gateway) -> None:
    async def on_foreword_error(request: Request, error: Exception) -> Response:
        known = translated(error)
        count_bad_key(gateway.metrics, known)
        return error_response(known, is_about_model=not request.url.path.startswith("/admin/"))

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, headers = request.url.path[:200], dict(error.headers or {})
        if error.status_code == 405:  # the router names the methods of the first route of this path only
            matching = (route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE)
            headers["Allow"] = ", ".join(sorted({name for route in matching for name in getattr(route, "methods", ())}))
        known = InvalidPath(f"{request.method} {path}: {error.detail}", status=error.status_code)
        return error_response(known, headers)

    app.add_exception_handler(ForewordError, on_foreword_error)
    app.add_exception_handler(HTTPException, on_http_exception)
