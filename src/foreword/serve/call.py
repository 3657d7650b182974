"""One request on its way: who asks, what it named, what it holds, what it has cost. Imports no torch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from foreword.errors import ForewordError, NotFound, Unauthorized
from foreword.serve.access.auth import ANYBODY, Principal
from foreword.serve.access.limits import Slot, check_new_tokens, check_prompt_tokens, estimated_tokens
from foreword.serve.backend import Caller, Stream
from foreword.serve.http.answers import Answer, Gathered, Usage, event_bytes
from foreword.serve.http.exchange import ClientGone, Halt, error_response, translated, watch
from foreword.serve.http.openai_api import Body, ChatBody
from foreword.serve.http.openai_errors import error_json
from foreword.serve.versions.names import Target
from foreword.serve.versions.residents import Lease
from foreword.serve.versions.routes import of_kind, user_key
from foreword.serve.versions.shadow import Copy, copy_of
from foreword.serve.versions.steering import lease, steer
from foreword.serve.watch.logs import REQUEST_ID
from foreword.serve.watch.record import record
from foreword.serve.watch.tracing import trace_headers

if TYPE_CHECKING:
    from foreword.serve.gateway import Gateway

CLIENT_GONE = 499
"""What is counted for a client that went away before its answer was whole (nginx's number)."""
LAST_WORD_S = 1.0
"""How long the error event of a stream that was ended may take to be sent."""


class Call:
    """A request between its first byte and the moment when it has given everything back."""

    def __init__(self, gateway: Gateway, request: Request) -> None:
        self.gateway = gateway
        self.request = request
        self.path = request.url.path
        self.request_id = REQUEST_ID.get()
        self.started = time.monotonic()
        self.principal: Principal = ANYBODY
        self.halt = Halt()
        self.slot: Slot | None = None
        self.target: Target | None = None
        self.lease: Lease | None = None
        self.stream: Stream | None = None
        self.shape: Answer | None = None
        self.num_choices = 0
        self.copy: Copy | None = None
        """For the task's shadow."""
        self.trace = None if gateway.tracing is None else gateway.tracing.begin(request.headers, self.path)
        self._watcher: asyncio.Task[None] | None = None
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

    def admit(self) -> None:
        """Find out who asks, and take a place within its limits.

        Raises Unauthorized, Unavailable, RateLimited. Nothing of the body has been read yet.
        """
        gateway = self.gateway
        self.principal = gateway.guard.principal(self.request.headers.get("authorization"))
        gateway.calls.add(self)
        if self.principal.tenant is not None and (limits := gateway.guard.limits(self.principal)) is not None:
            self.slot = gateway.limiter.admit(self.principal.tenant, limits)

    def watch(self) -> None:
        """From now on end the work when the client goes away; the body has been read."""
        self._watcher = asyncio.create_task(watch(self.request, self.halt))

    async def start(self, body: Body) -> None:
        """Resolve the model, have its version loaded, and submit."""
        gateway = self.gateway
        limits = gateway.guard.limits(self.principal)
        stable = await gateway.resolve(self.principal, body.model)
        routes = gateway.control.snapshot.routes.get(body.model, ())
        canary = of_kind(routes, "canary")
        self.target = await steer(gateway.names, stable, canary, self._user(body))
        self._step("resolve")
        if limits is not None:
            check_new_tokens(body.max_new_tokens, limits)
        self.target, self.lease = await lease(gateway.residents, self.target, stable, canary)
        self._step("load")
        requests = body.requests(
            self.target.prefix,
            default_limit=None if limits is None else limits.max_new_tokens,
            allow_special=gateway.allows_special_tokens,
        )
        self.num_choices = sum(request.n for request in requests)
        self.shape = Answer(
            body.model,
            is_chat=isinstance(body, ChatBody),
            has_logprobs=body.num_logprobs is not None,
            has_usage_event=body.has_usage_event,
            token_bytes=gateway.backend.token_bytes,
            names_ids=bool(body.return_tokens_as_token_ids),
            has_token_ids=bool(body.return_token_ids),
        )
        if self.slot is not None:
            self.slot.settle(estimated_tokens(requests), 0)
        trace = self.trace.headers if self.trace is not None else trace_headers(self.request.headers)
        caller = Caller(scope=self.principal.scope, request_id=self.request_id, trace=trace)
        self.copy = copy_of(of_kind(routes, "shadow"), self.target.version, requests, caller)
        self.stream = await gateway.backend.submit(requests, caller)
        self._step("submit")
        self.settle()
        if limits is not None:
            check_prompt_tokens(self.stream.num_prompt_tokens, limits)

    async def whole(self) -> dict[str, Any]:
        """Gather the answer that is not streamed."""
        assert self.stream is not None and self.shape is not None
        choices = [Gathered() for _ in range(self.num_choices)]
        async for chunk in self.stream:
            choices[chunk.index].add(chunk)
            if self.copy is not None:
                self.copy.add(chunk)
        return self.shape.whole(choices, self.usage)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the answer as server-sent events; an error on the way is the last of them."""
        assert self.stream is not None and self.shape is not None
        try:
            if opening := b"".join(self.shape.opening(self.num_choices)):
                yield opening
            async for chunk in self.stream:
                if self.copy is not None:
                    self.copy.add(chunk)
                if events := b"".join(self.shape.events(chunk)):
                    yield events
            await self.close(200)
            yield b"".join(self.shape.closing(self.usage))
        except Exception as error:
            known = translated(error)
            await self.close(known.status, known)
            yield event_bytes(error_json(known))

    def settle(self) -> None:
        """Charge the tenant what the request has cost so far; before the backend tells, the estimate stays."""
        if self.slot is not None and self.stream is not None and self.stream.num_prompt_tokens:
            self.slot.settle(self.stream.num_prompt_tokens, self.stream.timings.num_completion_tokens)

    def check(self) -> None:
        """Halt where the key, its tenant or its grant is good no more."""
        task = self.target.labels[0] if self.target is not None else None
        if reason := self.gateway.guard.ended(self.principal, task):
            is_withdrawn = reason == "withdrawn"
            self.halt(NotFound("the model is granted to this key no more") if is_withdrawn else Unauthorized(reason))

    def _user(self, body: Body) -> str:
        principal = self.principal
        return user_key(user=body.user, tenant=principal.tenant, key=principal.key_id, request_id=self.request_id)

    def _step(self, name: str) -> None:
        if self.trace is not None:
            self.trace.step(name)

    async def close(self, code: int, error: ForewordError | None = None) -> None:
        """Give everything back and tell how the request ended; only the first call does."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            if self._watcher is not None:
                self._watcher.cancel()
            if self.stream is not None:
                await self.stream.aclose()
        finally:
            self.gateway.calls.discard(self)
            if self.slot is not None:
                if self.stream is None:  # nothing was done for it
                    self.slot.settle(0, 0)
                self.settle()
                self.slot.release()
            if self.lease is not None:
                self.lease.release()
            record(self, code, error)


class EventStream(Response):
    """A streamed answer. The call is closed however sending ends, also when it never began."""

    media_type = "text/event-stream"

    def __init__(self, call: Call) -> None:
        self.status_code = 200
        self.background = None
        self.call = call
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **call.headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; an answer that is ended from outside gets an error event as its last."""
        call, has_begun = self.call, False
        open_streams = call.gateway.metrics.open_streams
        open_streams.inc()
        try:
            with call.halt:
                has_begun = True
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async with contextlib.aclosing(call.events()) as events:
                    async for data in events:
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            pass
        except ForewordError as error:
            await call.close(error.status, error)
            if not has_begun:
                return await error_response(error, call.headers)(scope, receive, send)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await send({"type": "http.response.body", "body": event_bytes(error_json(error))})
        finally:
            open_streams.dec()
            await call.close(CLIENT_GONE)
