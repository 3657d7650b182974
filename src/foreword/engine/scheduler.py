"""What runs next. Plain Python over `BlockPool`: imports no torch.

There is no prefill phase and no decode phase: every row has `num_computed` positions and catches up with its tokens.
A step is at most one batch of rows that lack exactly one token (decode) and one batch of longer spans (prefill), kept
apart so that a decode row is never padded to the length of a prompt.

Admission is first come, first served, and reserves every block that a row can ever need: its copy of the prefix's
unaligned tail, the prompt, and `max_tokens`. So a row that has started always finishes and nothing is ever preempted;
the price is room reserved for answers that end early. Prefixes become resident when their first row is admitted and
stay until room is needed; a request that fits an empty pool is therefore admitted sooner or later.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from foreword.engine.kvpool import BlockPool, count_blocks, slot_of
from foreword.engine.sequence import PrefixEntry, Sequence, Siblings, Span, Start

MAX_PADDING = 4 / 3
"""A prefill batch computes at most this many positions per real one."""


@dataclass(frozen=True, slots=True)
class Admission:
    """A row that starts to run in this step, and what the pool needs before."""

    sequence: Sequence
    load: PrefixEntry | None = None
    """Write this prefix into its blocks first."""
    copies: tuple[tuple[int, int], ...] = ()
    """Then copy these slots (source, target): the unaligned tail of what the row starts with.

    Admissions are carried out in order: a later one may load into blocks that an earlier one copies from."""


@dataclass(slots=True)
class StepPlan:
    """One step: everything the runner is to do, in this order."""

    admissions: list[Admission] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    """Rows that lack one token."""
    prefill: list[Span] = field(default_factory=list)
    """Longer spans of similar length, at most `chunk_tokens` positions with padding."""

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.admissions or self.decode or self.prefill)


class Scheduler:
    """Rows that wait, rows that run, and prefixes in the pool. Not thread-safe: one loop owns it."""

    def __init__(self, pool: BlockPool, *, max_batch: int, chunk_tokens: int) -> None:
        self.pool = pool
        self.max_batch = max_batch
        self.chunk_tokens = chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.resident: dict[PrefixEntry, None] = {}
        """Prefixes in the pool, least recently used first."""

    def add(self, sequence: Sequence) -> None:
        """Put a row at the end of the queue."""
        if sequence.prefix is not None:
            sequence.prefix.num_users += 1
        self.waiting.append(sequence)

    def holds(self, sequence: Sequence) -> bool:
        """Return whether a row runs or waits here."""
        return sequence in self.running or sequence in self.waiting

    def plan(self) -> StepPlan:
        """Admit what fits and return the next step; `num_computed` of its rows is for the caller to advance."""
        plan = StepPlan()
        while self.waiting and len(self.running) < self.max_batch:
            admission = self._admit(self.waiting[0], {a.sequence.prefix for a in plan.admissions})
            if admission is None:
                break
            self.running.append(self.waiting.popleft())
            plan.admissions.append(admission)
        plan.decode = [sequence for sequence in self.running if sequence.is_decodable]
        plan.prefill = self._pick_prefill()
        return plan

    def computed(self, sequence: Sequence, num_new: int) -> None:
        """Note that a row's next `num_new` positions are in the pool; a prompt is then there for its siblings."""
        sequence.num_computed += num_new
        siblings = sequence.siblings
        if siblings is None or siblings.leader is not sequence:
            return
        shareable = sequence.num_prefix + sequence.num_prompt - 1
        if sequence.num_computed > shareable:
            siblings.leader = None
            if siblings.num_waiting and shareable:
                blocks = sequence.blocks[: count_blocks(shareable, self.pool.block_size)]
                self.pool.share(blocks)
                siblings.start = Start(blocks, shareable)

    def remove(self, sequence: Sequence) -> None:
        """Take a row out, running or waiting, and give its blocks back."""
        siblings = sequence.siblings
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence.blocks)
            if siblings is not None and siblings.leader is sequence:
                siblings.leader = None  # the next sibling computes the prompt
        else:
            self.waiting.remove(sequence)
            if siblings is not None:
                self._leave_queue(siblings)
        sequence.blocks = []
        entry = sequence.prefix
        if entry is not None:
            entry.num_users -= 1
            if entry.is_retired:
                self.retire(entry)

    def retire(self, entry: PrefixEntry) -> None:
        """Note that no new rows will come for a prefix; its blocks are given back with its last row."""
        entry.is_retired = True
        if not entry.num_users:
            self.unload(entry)

    def unload(self, entry: PrefixEntry) -> None:
        """Take a prefix out of the pool; rows that share its blocks keep them."""
        if entry.start is not None:
            self.pool.release(entry.start.blocks)
            entry.start = None
            del self.resident[entry]

    def num_resident_blocks(self) -> int:
        """Return the blocks that resident prefixes own."""
        starts = [entry.start for entry in list(self.resident)]
        return sum(len(start.blocks) for start in starts if start)

    def check_balance(self) -> None:
        """Raise AssertionError unless, with no row left, free + resident prefixes = total."""
        free, resident, total = self.pool.num_free, self.num_resident_blocks(), self.pool.num_blocks
        assert free + resident == total, f"{free} blocks free + {resident} of prefixes != {total}"

    def check_integrity(self) -> None:
        """Raise AssertionError unless free + held = total, with every block's owners accounted for."""
        pinned = {id(s.siblings): s.siblings.start for s in self.waiting if s.siblings and s.siblings.start}
        starts = [*(entry.start for entry in self.resident), *pinned.values()]
        self.pool.check_integrity(
            [*(start.blocks for start in starts if start), *(sequence.blocks for sequence in self.running)]
        )

    def _admit(self, sequence: Sequence, needed: set[PrefixEntry | None]) -> Admission | None:
        """Give a row its blocks, or return None where they are not to be had yet.

        Prefixes in `needed` stay: earlier rows of the same step are yet to read them.
        """
        siblings, entry, size = sequence.siblings, sequence.prefix, self.pool.block_size
        if siblings is not None and siblings.leader is not None:
            return None  # a sibling is about to have computed the prompt
        start = siblings.start if siblings and siblings.start else entry.start if entry else None
        is_loading = start is None and entry is not None
        num_cached = start.num_positions if start else sequence.num_prefix
        num_own = count_blocks(sequence.max_positions, size) - num_cached // size
        num_entry = count_blocks(sequence.num_prefix, size) if is_loading else 0
        if not self._make_room(num_own + num_entry, keep={entry, *needed}):
            return None
        if is_loading and entry is not None:
            start = entry.start = Start(self.pool.allocate(num_entry), entry.num_positions)
        if entry is not None and entry.start is not None:
            self.resident.pop(entry, None)
            self.resident[entry] = None  # now the most recently used
        shared = start.blocks[: num_cached // size] if start else []
        self.pool.share(shared)
        sequence.blocks = shared + self.pool.allocate(num_own)
        sequence.num_computed = num_cached
        copies = tuple(
            (slot_of(start.blocks, position, size), slot_of(sequence.blocks, position, size))
            for position in range(num_cached - num_cached % size, num_cached)
            if start
        )
        if siblings is not None:
            if siblings.start is None:
                siblings.leader = sequence
            self._leave_queue(siblings)
        return Admission(sequence, entry if is_loading else None, copies)

    def _leave_queue(self, siblings: Siblings) -> None:
        siblings.num_waiting -= 1
        if not siblings.num_waiting and siblings.start is not None:
            self.pool.release(siblings.start.blocks)
            siblings.start = None

    def _make_room(self, num_blocks: int, keep: set[PrefixEntry | None]) -> bool:
        """Have `num_blocks` free, if need be by taking out prefixes whose blocks no row shares, oldest use first."""
        if self.pool.num_free >= num_blocks:
            return True
        unshared = [entry for entry in self.resident if entry not in keep and self._is_unshared(entry)]
        if self.pool.num_free + sum(len(e.start.blocks) for e in unshared if e.start) < num_blocks:
            return False
        for entry in unshared:
            if self.pool.num_free < num_blocks:
                self.unload(entry)
        return True

    def _is_unshared(self, entry: PrefixEntry) -> bool:
        return entry.start is not None and all(self.pool.num_owners(block) == 1 for block in entry.start.blocks)

    def _pick_prefill(self) -> list[Span]:
        """Return spans of similar length, the longest-running row's first."""
        spans: list[Span] = []
        longest = total = 0
        for sequence in self.running:
            if sequence.is_decodable or len(spans) == self.max_batch:
                continue
            num_new = min(sequence.num_uncomputed, self.chunk_tokens)
            padded = max(longest, num_new) * (len(spans) + 1)
            if not spans or (padded <= self.chunk_tokens and padded <= MAX_PADDING * (total + num_new)):
                spans.append(Span(sequence, num_new))
                longest, total = max(longest, num_new), total + num_new
        return spans
