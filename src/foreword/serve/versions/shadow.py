"""Shadow traffic: a copy of a request goes to a candidate behind the answer, and both answers are kept. No torch.

The copy starts when the answer is whole, so it delays nobody; it is dropped, and counted, where the engine has work
waiting or too many copies wait. What it takes counts to no tenant's limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

from foreword.engine.request import Chunk, Request
from foreword.errors import Overloaded
from foreword.registry.access_records import Route, ShadowPair
from foreword.registry.records import Version
from foreword.serve.backend import Backend, Caller, Timings
from foreword.serve.http.openai_errors import error_kind
from foreword.serve.versions.names import Names
from foreword.serve.versions.residents import Residents
from foreword.serve.versions.routes import takes
from foreword.serve.watch.logs import REQUEST_ID, fields
from foreword.serve.watch.metrics import Metrics

MAX_RUNNING = 4
"""Copies in generation at once."""
MAX_WAITING = 64
TIMEOUT_S = 120.0
"""How long one copy may take, its version's load included."""

log = logging.getLogger("foreword.serve")


@dataclass(slots=True)
class Copy:
    """A request whose candidate will answer too, with the answer that was given as far as it has come."""

    route: Route
    version: Version
    """That answers the client."""
    request: Request
    """For one answer; its prefix is that version's."""
    caller: Caller
    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, chunk: Chunk) -> None:
        """Append a chunk of the answer."""
        self.texts.append(chunk.text)


def copy_of(route: Route | None, version: Version | None, requests: Sequence[Request], caller: Caller) -> Copy | None:
    """Return the copy of a request for its task's shadow; None where there is none, or it is not for this request.

    Only requests for one answer are copied, and only where another version than the candidate answers.
    """
    if route is None or version is None or version.number == route.number:
        return None
    if len(requests) != 1 or requests[0].n != 1 or not takes(route, f"request:{caller.request_id}"):
        return None
    return Copy(route, version, requests[0], dataclasses.replace(caller, trace={}))


class Shadows:
    """Runs copies in the background of one event loop. `keep` stores a pair; it may block."""

    def __init__(
        self,
        backend: Backend,
        names: Names,
        residents: Residents,
        metrics: Metrics,
        keep: Callable[[ShadowPair], object],
        *,
        max_running: int = MAX_RUNNING,
        max_waiting: int = MAX_WAITING,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.backend = backend
        self.names = names
        self.residents = residents
        self.metrics = metrics
        self.keep = keep
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.timeout_s = timeout_s
        self._waiting: deque[Copy] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._threads = ThreadPoolExecutor(1, "foreword-shadow")

    def offer(self, copy: Copy, timings: Timings) -> None:
        """Take a copy of a request whose answer is whole, or drop it; returns at once."""
        copy.seconds = _seconds(timings)
        if self._is_closed or len(self._waiting) >= self.max_waiting:
            self.metrics.shadowed(copy.route, "dropped_full")
            return
        self._waiting.append(copy)
        if len(self._workers) < self.max_running:
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    @property
    def num_waiting(self) -> int:
        """Copies that wait."""
        return len(self._waiting)

    async def aclose(self) -> None:
        """Drop what waits, end what runs, give its leases back."""
        self._is_closed = True
        self._waiting.clear()
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while self._waiting:
            copy = self._waiting.popleft()
            REQUEST_ID.set(copy.caller.request_id)
            try:
                async with asyncio.timeout(self.timeout_s):
                    pair = await self._answer(copy)
                    await asyncio.get_running_loop().run_in_executor(self._threads, self.keep, pair)
                self.metrics.shadowed(copy.route, "agreed" if pair.agrees else "differed")
            except Overloaded:
                self.metrics.shadowed(copy.route, "dropped_busy")
            except Exception as error:  # the candidate's, the engine's or the registry's fault: never the client's
                self.metrics.shadowed(copy.route, "failed")
                about = fields(task=copy.route.task, version=copy.route.number, error=error_kind(error))
                log.warning("a shadow of %s@%d failed", copy.route.task, copy.route.number, extra=about)

    async def _answer(self, copy: Copy) -> ShadowPair:
        """Have the candidate answer a copy. Raises Overloaded where others wait for the engine."""
        if queued := self.backend.stats().num_queued:
            raise Overloaded(f"{queued} answers wait for room")
        target = await self.names.resolve(f"{copy.route.task}@{copy.route.number}")
        assert target.version is not None, "a reference with a number is no base"
        lease = await self.residents.acquire(target.version)
        try:
            stream = await self.backend.submit([dataclasses.replace(copy.request, prefix=target.prefix)], copy.caller)
            async with contextlib.aclosing(stream):
                text = "".join([chunk.text async for chunk in stream])
            self.metrics.shadow_tokens(copy.route, stream.num_prompt_tokens, stream.timings.num_completion_tokens)
        finally:
            lease.release()
        answer = "".join(copy.texts)
        return ShadowPair(
            when=datetime.now(UTC),
            task=copy.route.task,
            number=copy.version.number,
            candidate=copy.route.number,
            request_id=copy.caller.request_id,
            input=_input(copy.request) if copy.route.keep_inputs else None,
            answer=answer,
            candidate_answer=text,
            agrees=answer == text,
            seconds=copy.seconds,
            candidate_seconds=_seconds(stream.timings),
        )


def _seconds(timings: Timings) -> float:
    """Return how long the engine took, from submission to the last token."""
    return max(timings.last.values(), default=timings.submitted) - timings.submitted


def _input(request: Request) -> str:
    """Return what the client sent: text as it is, a conversation or token ids as JSON."""
    if request.prompt is not None:
        return request.prompt
    return json.dumps(request.messages if request.messages is not None else request.prompt_ids, ensure_ascii=False)
