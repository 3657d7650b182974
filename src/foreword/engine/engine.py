"""The embedded engine: one frozen base, any mix of prefixes and plain requests in one continuous batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

import torch

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.engine.collect import Collector
from foreword.engine.intake import Job, check_length, check_prefix, make_rows
from foreword.engine.kvpool import BlockPool, parse_bytes
from foreword.engine.loop import Loop
from foreword.engine.meter import EngineStats
from foreword.engine.render import check_fields, prepare
from foreword.engine.request import Chunk, Output, Request
from foreword.engine.runner import Runner
from foreword.engine.scheduler import Scheduler
from foreword.engine.sequence import PrefixEntry, Sequence
from foreword.errors import BackendFailed, BadRequest, ConfigError, ForewordError, NotFound, Overloaded, did_you_mean

POOL_SHARE = 1 / 2
"""Part of `kv_memory` that the pool gets; the rest is for the decode window, which shares no prefix among rows."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A submitted request; what `abort` takes."""

    num_prompt_tokens: int
    num_prefix_positions: int
    rows: tuple[Sequence, ...]
    """One per completion; the engine's own."""

    @property
    def admitted(self) -> float | None:
        """When the first completion left the queue, by `time.monotonic()`; None while all wait."""
        return min((row.admitted for row in self.rows if row.admitted is not None), default=None)


class Engine:
    """Serves one frozen base and any number of prefixes from one batch.

    `kv_memory` bounds keys and values: half is the pool of blocks, half the contiguous copies of the decode batch.
    `max_batch` bounds the rows that run, `max_queue` those that wait; `chunk_tokens` bounds the prompt positions
    computed in a step, so that long prompts do not hold up answers. Use `generate` alone, or `start` (or a `with`
    block) and `submit` from any thread.
    """

    def __init__(
        self,
        base: FrozenModel,
        *,
        kv_memory: str | int = "1GiB",
        block_size: int = 16,
        max_batch: int = 64,
        chunk_tokens: int = 512,
        max_queue: int = 256,
    ) -> None:
        sizes = {"block_size": block_size, "max_batch": max_batch, "chunk_tokens": chunk_tokens, "max_queue": max_queue}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name} is {value}, it must be at least 1")
        budget = parse_bytes(kv_memory)
        block_bytes = base.spec.kv_bytes(block_size, base.embedding.weight.element_size())
        num_blocks = int(budget * POOL_SHARE) // block_bytes
        if not num_blocks:
            raise ConfigError(
                f"half of kv_memory {budget} bytes holds no block of {block_size} positions, "
                f"which takes {block_bytes} bytes",
                hint="Give more memory.",
            )
        self.base = base
        self.max_queue = max_queue
        runner = Runner(
            base,
            num_blocks=num_blocks,
            block_size=block_size,
            max_batch=max_batch,
            window_positions=int(budget * (1 - POOL_SHARE)) // block_bytes * block_size,
        )
        scheduler = Scheduler(BlockPool(num_blocks, block_size), max_batch=max_batch, chunk_tokens=chunk_tokens)
        self._loop = Loop(scheduler, runner, base.stop_ids)
        self._entries: dict[str, PrefixEntry] = {}
        self._prefixes: dict[str, KVPrefix] = {}
        self._lock = threading.Lock()  # the two tables above, and whether the engine is closed
        self._tokenizing = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def prefixes(self) -> Mapping[str, KVPrefix]:
        """The prefixes by name."""
        return MappingProxyType(self._prefixes)

    def add_prefix(self, name: str, prefix: KVPrefix) -> None:
        """Make `prefix` known as `name`; under a known name it replaces the old one, which rows in flight keep.

        Its keys and values go into the pool with the first request. Raises IncompatibleModel where it does not fit
        the base, ConfigError where it does not fit the pool.
        """
        check_prefix(name, prefix, self.base, self._loop.scheduler.pool)
        with self._lock:
            old = self._entries.get(name)
            self._entries[name] = PrefixEntry(name=name, num_positions=prefix.num_positions, payload=prefix)
            self._prefixes[name] = prefix
        if old is not None:
            self._loop.retire(old)
            self._tidy()

    def remove_prefix(self, name: str) -> None:
        """Forget a prefix; rows in flight keep it. Raises NotFound."""
        with self._lock:
            old = self._entries.pop(name, None)
            self._prefixes.pop(name, None)
            known = list(self._entries)
        if old is None:
            raise NotFound(f"no prefix {name!r}", hint=did_you_mean(name, known))
        self._loop.retire(old)
        self._tidy()

    def generate(self, requests: Rows[Request]) -> list[Output]:
        """Answer all requests, in their order; any number, whatever the queue holds.

        Raises BadRequest or NotFound naming the request's index before anything runs. A row that meets an internal
        failure ends with finish_reason "error".
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("generate cannot be called from on_chunk: it would wait for itself")
        collector = Collector([self._prepare_indexed(index, request) for index, request in enumerate(requests)])
        rows: list[Sequence] = []
        try:
            while not collector.is_done:
                self._check_open()
                while rows or (rows := collector.next_rows(self.max_queue - self._loop.num_queued)):
                    if not self._loop.offer(rows, self.max_queue):
                        break
                    rows = []
                if self._thread is None:
                    self._loop.step()
                else:
                    collector.wait()
        except BaseException:
            self._loop.abort(collector.unfinished())
            self._tidy()
            raise
        return collector.outputs()

    def start(self) -> None:
        """Start the loop thread; requests are then served as they are submitted."""
        with self._lock:
            self._check_open()
            if self._thread is None:
                num_threads = torch.get_num_threads()
                self._thread = threading.Thread(
                    target=self._run, args=(num_threads,), name="foreword-engine", daemon=True
                )
                self._thread.start()

    def close(self) -> None:
        """Stop; whatever is in flight ends with finish_reason "abort". A closed engine stays closed."""
        with self._lock:
            self._is_closed = True
        self._loop.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._loop.end_all()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def submit(self, request: Request, on_chunk: Callable[[Chunk], None]) -> Ticket:
        """Queue a request; `on_chunk` is called from the loop thread, lastly with each completion's finish_reason.

        Before `start` it waits in the queue, until that or a `generate`; what `on_chunk` raises aborts its row.
        Raises BadRequest, NotFound or Overloaded at once.
        """
        job = self._prepare(request)
        rows = make_rows(job, on_chunk, is_streaming=True)
        with self._lock:  # so that nothing enters behind the back of `close`
            self._check_open()
            is_taken = self._loop.offer(rows, self.max_queue)
        if not is_taken:
            num_queued = self._loop.num_queued
            raise Overloaded(
                f"{num_queued} completions wait and {len(rows)} more are asked for, the queue takes {self.max_queue}",
                hint="Try again later, or give the engine a longer queue.",
                retry_after_s=self._loop.meter.seconds_for(num_queued),
            )
        return Ticket(len(job.prepared.ids), job.num_prefix, tuple(rows))

    def abort(self, ticket: Ticket) -> None:
        """End a request soon: its open completions get a last chunk with finish_reason "abort"."""
        self._loop.abort(ticket.rows)
        self._tidy()

    def stats(self) -> EngineStats:
        """Return counts for metrics: what runs and waits, the pool, totals since the engine was made."""
        return self._loop.stats(len(self._entries))

    def check(self) -> None:
        """Raise BackendFailed where no request can be answered: the engine is closed, or its thread has died."""
        self._check_open()
        if self._thread is not None and not self._thread.is_alive():
            raise BackendFailed("the engine's thread has died", hint="Start the server again; its log says why.")

    def _run(self, num_threads: int) -> None:
        torch.set_num_threads(num_threads)  # a new thread would start from the machine's default
        self._loop.run()

    def _tidy(self) -> None:
        """Without a thread, notes are read at once; with one, it wakes up and reads them."""
        if self._thread is None:
            self._loop.tidy()

    def _check_open(self) -> None:
        if self._is_closed:
            raise BackendFailed("the engine is closed", hint="Make a new one.")

    def _prepare_indexed(self, index: int, request: Request) -> Job:
        try:
            return self._prepare(request)
        except ForewordError as error:
            raise type(error)(f"request {index}: {error.message}", hint=error.hint) from error

    def _prepare(self, request: Request) -> Job:
        """Check a request against its fields, its prefix, the base and the pool; render its text."""
        check_fields(request, self.base.spec.vocab_size)
        entry = None
        if request.prefix is not None:
            with self._lock:
                entry, known = self._entries.get(request.prefix), list(self._entries)
            if entry is None:
                raise NotFound(f"no prefix {request.prefix!r}", hint=did_you_mean(request.prefix, known))
        with self._tokenizing:  # one text at a time: encoders of fast tokenizers are not for several threads
            prepared = prepare(request, self.base, entry.payload if entry else None)
        job = Job(request, prepared, entry, self.base.tokenizer)
        check_length(job, self.base.spec, self._loop.scheduler.pool)
        if request.n > self.max_queue:
            raise BadRequest(f"n is {request.n}, the queue takes {self.max_queue}", hint="Ask for fewer completions.")
        return job
