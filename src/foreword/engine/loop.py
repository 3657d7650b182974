"""The loop: notes from other threads, one step after another, an end for every row. Imports no torch.

offer / abort / retire ─► notes ─► Scheduler.plan ─► Runner ─► answer.accept ─► on_chunk
     any thread                    └──── one step; whoever holds `step_lock` drives ───┘
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from typing import Literal, Protocol

from foreword.engine.answer import accept, finish, take_chunk
from foreword.engine.kvpool import BlockPool
from foreword.engine.meter import EngineStats, Meter
from foreword.engine.request import Chunk
from foreword.engine.scheduler import Scheduler, StepPlan
from foreword.engine.sequence import PrefixEntry, Sampled, Sequence, Span

logger = logging.getLogger("foreword.engine")

ALARM_AFTER = 3
"""Failed steps in a row after which the log says that the engine, not a request, is at fault."""


class Runs(Protocol):
    """What the loop asks of a runner."""

    def load(self, entry: PrefixEntry) -> None:
        """Write a prefix into its blocks."""

    def copy(self, pairs: Rows[tuple[int, int]]) -> None:
        """Copy slots (source, target)."""

    def prefill(self, spans: Rows[Span]) -> list[Sampled | None]:
        """Compute spans; return the next token of rows that have caught up."""

    def decode(self, rows: Rows[Sequence]) -> list[Sampled]:
        """Compute the one missing position of each row; return its next token."""


class Loop:
    """Owns scheduler and runner. Only the thread that holds `step_lock` touches them."""

    def __init__(self, scheduler: Scheduler, runner: Runs, stop_ids: frozenset[int]) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.stop_ids = stop_ids
        self.meter = Meter()
        self.step_lock = threading.Lock()
        self._news = threading.Condition()
        self._inbox: deque[Sequence] = deque()
        self._aborts: deque[Sequence] = deque()
        self._retired: deque[PrefixEntry] = deque()
        self._is_stopping = False

    @property
    def num_queued(self) -> int:
        """Rows that wait."""
        return len(self._inbox) + len(self.scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._inbox or self._aborts or self._retired)

    def offer(self, rows: Rows[Sequence], max_queue: int) -> bool:
        """Queue rows, all or none; return whether the queue had room."""
        with self._news:
            if self.num_queued + len(rows) > max_queue:
                return False
            self._inbox.extend(rows)
            self._news.notify_all()
        return True

    def abort(self, rows: Iterable[Sequence]) -> None:
        """Have rows ended before the next step."""
        with self._news:
            self._aborts.extend(rows)
            self._news.notify_all()

    def retire(self, entry: PrefixEntry) -> None:
        """Have a prefix taken out of the pool once its last row has gone."""
        with self._news:
            self._retired.append(entry)
            self._news.notify_all()

    def run(self) -> None:
        """Step while there is work and wait while there is none, until `stop`."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._is_stopping or self.has_work)
                if self._is_stopping:
                    return
            self.step()

    def stop(self) -> None:
        """Let `run` return after its step."""
        with self._news:
            self._is_stopping = True
            self._news.notify_all()

    def step(self) -> None:
        """Run one step. Whatever fails, rows get an end and the loop lives on."""
        with self.step_lock:
            try:
                self._take_notes()
                plan = self.scheduler.plan()
                if not plan.is_empty:
                    self._count(self._carry_out(plan))
                elif self.scheduler.waiting:
                    raise RuntimeError("nothing runs, and the first row in the queue does not fit")
                if not self.scheduler.running and not self.scheduler.waiting:
                    self.scheduler.check_balance()
            except Exception:
                logger.exception("the engine's own bookkeeping failed: all rows end, the pool starts afresh")
                self._count(1)
                self._end_all("error")

    def tidy(self) -> None:
        """Read notes now, unless a step is running, whose successor will."""
        if self.step_lock.acquire(blocking=False):
            try:
                self._take_notes()
            finally:
                self.step_lock.release()

    def end_all(self) -> None:
        """Abort every row, queued or running."""
        with self.step_lock:
            self._take_notes()
            self._end_all("abort")

    def stats(self, num_known: int) -> EngineStats:
        """Return what runs and waits now, and totals; `num_known` prefixes can be named."""
        scheduler = self.scheduler
        return self.meter.stats(
            running=len(scheduler.running),
            waiting=self.num_queued,
            blocks_total=scheduler.pool.num_blocks,
            blocks_free=scheduler.pool.num_free,
            prefix_blocks=scheduler.num_resident_blocks(),
            prefixes_resident=len(scheduler.resident),
            prefixes_known=num_known,
        )

    def _count(self, failures: int) -> None:
        self.meter.step(failures)
        if failures and self.meter.failed_in_a_row >= ALARM_AFTER:
            logger.critical("%d steps in a row have failed: the engine needs help", self.meter.failed_in_a_row)

    def _take_notes(self) -> None:
        while self._inbox:
            row = self._inbox.popleft()
            if row.finish_reason is None:
                self.scheduler.add(row)
            else:  # its choices left nothing to decide
                self.meter.row_in(row)
                self._send(row)
        while self._aborts:
            row = self._aborts.popleft()
            if row.finish_reason is None and self.scheduler.holds(row):
                self._end(row, "abort")
        while self._retired:
            self.scheduler.retire(self._retired.popleft())

    def _carry_out(self, plan: StepPlan) -> int:
        """Run a plan; return the number of failures."""
        for admission in plan.admissions:
            self.meter.row_in(admission.sequence)
        failures = self._admit(plan)
        failures += self._advance([Span(row, 1) for row in plan.decode], self._decode)
        failures += self._advance(plan.prefill, self.runner.prefill)
        for row in [*plan.decode, *(span.sequence for span in plan.prefill)]:
            if row.finish_reason is None and row.is_streaming and row.num_answer > row.num_sent:
                self._send(row)
        return failures

    def _admit(self, plan: StepPlan) -> int:
        """Load prefixes and copy tails, in order; a row whose prefix cannot be loaded ends, it never runs without."""
        failures = 0
        copies: list[tuple[int, int]] = []
        for admission in plan.admissions:
            entry = admission.load
            if entry is not None:
                self.runner.copy(copies)
                copies = []
                try:
                    self.runner.load(entry)
                except Exception:
                    failures += 1
                    logger.exception("prefix %r cannot be loaded: its rows end", entry.name)
                    for other in plan.admissions:
                        if other.sequence.prefix is entry and other.sequence.finish_reason is None:
                            self._end(other.sequence, "error")
                    self.scheduler.unload(entry)
            if admission.sequence.finish_reason is None:
                copies += admission.copies
        self.runner.copy(copies)
        return failures

    def _decode(self, spans: Rows[Span]) -> list[Sampled]:
        return self.runner.decode([span.sequence for span in spans])

    def _advance(self, spans: Rows[Span], forward: Callable[[Rows[Span]], Rows[Sampled | None]]) -> int:
        """Run spans and take in what was sampled; a batch that fails is run again row by row to find the culprit."""
        spans = [span for span in spans if span.sequence.finish_reason is None]
        if not spans:
            return 0
        try:
            found = forward(spans)
        except Exception:
            logger.exception("a batch of %d rows failed", len(spans))
            if len(spans) > 1:
                return 1 + sum(self._advance([span], forward) for span in spans)
            self._end(spans[0].sequence, "error")
            return 1
        return sum(self._take_in(span, sampled) for span, sampled in zip(spans, found, strict=True))

    def _take_in(self, span: Span, sampled: Sampled | None) -> int:
        row = span.sequence
        self.scheduler.computed(row, span.num_new)
        if sampled is None:
            return 0
        num_before = row.num_answer
        try:
            accept(row, sampled, self.stop_ids)
        except Exception:
            logger.exception("a token could not be taken in")
            self._end(row, "error")
            return 1
        self.meter.tokens_generated += row.num_answer - num_before
        if row.finish_reason is not None:
            self._leave(row)
        return 0

    def _end(self, row: Sequence, reason: Literal["abort", "error"]) -> None:
        """End a row for a reason that is not its answer's."""
        _finish(row, reason)
        self._leave(row)

    def _leave(self, row: Sequence) -> None:
        self.scheduler.remove(row)
        self._send(row)

    def _send(self, row: Sequence) -> None:
        """Hand a row's news to its owner; one whose `on_chunk` fails gets no more."""
        if row.finish_reason is not None:
            self.meter.row_out(row)
        try:
            row.on_chunk(take_chunk(row))
        except Exception:
            logger.exception("on_chunk failed: the row is aborted")
            row.on_chunk = _ignore
            if row.finish_reason is None:
                self._end(row, "abort")

    def _end_all(self, reason: Literal["abort", "error"]) -> None:
        """End every row and go on with an empty pool."""
        old = self.scheduler
        rows = [*old.running, *old.waiting]
        for entry in [*old.resident, *(row.prefix for row in rows if row.prefix)]:
            entry.start, entry.num_users = None, 0
        pool = BlockPool(old.pool.num_blocks, old.pool.block_size)
        self.scheduler = Scheduler(pool, max_batch=old.max_batch, chunk_tokens=old.chunk_tokens)
        for row in rows:
            if row.finish_reason is None:
                _finish(row, reason)
                self._send(row)


def _finish(row: Sequence, reason: Literal["abort", "error"]) -> None:
    try:
        finish(row, reason)
    except Exception:
        logger.exception("the end of a text is lost")
        row.finish_reason = reason


def _ignore(chunk: Chunk) -> None:
    """Drop a chunk."""
