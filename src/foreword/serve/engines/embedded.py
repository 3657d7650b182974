"""The backend over the embedded engine, in this process. Importing this file imports no torch.

It is given a running engine, and loads artefacts with what that has imported.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.spec import Fingerprint
from foreword.engine.request import Chunk, Request
from foreword.errors import ArtefactCorrupt, BackendFailed, ConfigError, Overloaded
from foreword.serve.backend import ANYONE, BackendStats, Caller, Timings
from foreword.serve.engines.token_bytes import token_bytes

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.engine.engine import Engine, Ticket


class EmbeddedBackend:
    """The backend over an `Engine` in this process. The engine is started; `aclose` closes it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.fingerprint: Fingerprint = engine.base.fingerprint
        self._token_bytes: dict[int, bytes] = {}
        self._compiler = _twin(engine.base)
        self._loads = ThreadPoolExecutor(1, "foreword-load")  # one at a time: compiling hooks into its model's layers
        self._num_submitting = 0
        self._submits = ThreadPoolExecutor(1, "foreword-submit")  # tokenising a long prompt would hold up the gateway

    async def start(self) -> None:
        """Do nothing: the engine runs already."""

    async def load(self, sha256: str, path: Path) -> int:
        """Load, check and compile an artefact in a thread; return the bytes of its keys and values."""
        return await asyncio.get_running_loop().run_in_executor(self._loads, self._load, sha256, path)

    def _load(self, sha256: str, path: Path) -> int:
        from foreword.core.artefact import load_artefact
        from foreword.core.compile import compile

        artefact = load_artefact(path)
        if artefact.sha256 != sha256:
            raise ArtefactCorrupt(
                f"{path} has sha256 {artefact.sha256}, its version says {sha256}",
                hint="Publish the original file again, or restore the blob from a backup.",
            )
        prefix = compile(self._compiler, artefact)
        try:
            self.engine.add_prefix(sha256, prefix)
        except ConfigError as error:  # the pool is too small for it: not the client's mistake
            raise BackendFailed(error.message, hint=error.hint) from error
        return prefix.num_bytes

    async def unload(self, sha256: str) -> None:
        """Remove a prefix from the engine."""
        await asyncio.get_running_loop().run_in_executor(self._loads, self.engine.remove_prefix, sha256)

    async def submit(self, requests: Sequence[Request], caller: Caller = ANYONE) -> EmbeddedStream:
        """Submit all requests, or none; in a thread, since that tokenises."""
        if self._num_submitting >= self.engine.max_queue:
            raise Overloaded(
                f"{self._num_submitting} requests wait to be tokenised, {self.engine.max_queue} may",
                hint="Try again later, or serve with a longer --max-queue.",
            )
        stream = EmbeddedStream(self.engine, asyncio.get_running_loop(), [request.n for request in requests])
        future = self._submits.submit(stream.submit, requests)
        self._num_submitting += 1
        try:
            await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(lambda _: stream.abort())  # it may still go through
            raise
        finally:
            self._num_submitting -= 1
        return stream

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to the text."""
        if token_id not in self._token_bytes:
            self._token_bytes[token_id] = token_bytes(self.engine.base.tokenizer, token_id)
        return self._token_bytes[token_id]

    def stats(self) -> BackendStats:
        """Return the engine's present load."""
        stats = self.engine.stats()
        return BackendStats(
            num_running=stats.running,
            num_waiting=stats.waiting,
            num_queued=stats.waiting,
            num_kv_blocks=stats.blocks_total,
            num_free_kv_blocks=stats.blocks_free,
        )

    def check(self) -> None:
        """Raise BackendFailed where the engine is closed or its thread has died."""
        self.engine.check()

    async def aclose(self) -> None:
        """Close the engine."""
        for pool in (self._submits, self._loads):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)


class EmbeddedStream:
    """Chunks on their way from the engine's thread to the event loop; a slow reader holds up neither."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, num_choices: Sequence[int]) -> None:
        self.timings = Timings()
        self.num_prompt_tokens = 0
        self._engine = engine
        self._loop = loop
        self._num_choices = num_choices
        self._open = sum(num_choices)
        self._tickets: list[Ticket] = []
        self._chunks: asyncio.Queue[Chunk] = asyncio.Queue()

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit to the engine, all or none; runs in a thread."""
        first = 0
        try:
            for request, count in zip(requests, self._num_choices, strict=True):
                self._tickets.append(self._engine.submit(request, self._receiver(first)))
                first += count
        except BaseException:
            self.abort()
            raise
        self.num_prompt_tokens = sum(ticket.num_prompt_tokens for ticket in self._tickets)

    def _receiver(self, first: int) -> Any:
        def receive(chunk: Chunk) -> None:  # in the engine's thread
            if first:
                chunk = dataclasses.replace(chunk, index=first + chunk.index)
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._arrive, chunk, time.monotonic())

        return receive

    def _arrive(self, chunk: Chunk, when: float) -> None:
        self.timings.add(chunk, when)
        if self.timings.queue_s is None:
            admitted = [ticket.admitted for ticket in self._tickets if ticket.admitted is not None]
            self.timings.queue_s = min(admitted) - self.timings.submitted if admitted else None
        self._chunks.put_nowait(chunk)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        """Yield chunks until every choice has had its last."""
        while self._open:
            chunk = await self._chunks.get()
            if chunk.finish_reason in ("error", "abort"):
                self.abort()
                raise BackendFailed("the engine ended the request before its answer was whole", hint="Try again.")
            self._open -= chunk.finish_reason is not None
            yield chunk

    def abort(self) -> None:
        """Tell the engine that nobody waits any more; may be called twice, in any thread."""
        for ticket in self._tickets:
            self._engine.abort(ticket)

    async def aclose(self) -> None:
        """End what still runs."""
        if self._open:
            self.abort()


def _twin(base: FrozenModel) -> FrozenModel:
    """Return a frozen model with modules of its own and the very same tensors.

    Compiling a prefix hooks into the layers of its model; on the engine's own, the hooks would meet running requests.
    """
    from foreword.core.model import FrozenModel

    shared = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    twin = FrozenModel(copy.deepcopy(base.model, shared), base.tokenizer)
    twin.fingerprint = base.fingerprint
    return twin
