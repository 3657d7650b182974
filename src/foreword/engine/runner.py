"""The only place where lists become tensors: one forward of the base over the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.engine.kvpool import slot_of
from foreword.engine.sampling import choose
from foreword.engine.sequence import PrefixEntry, Sampled, Sequence, Span
from foreword.engine.storage import DecodeWindow, PoolCache, Storage

HEADROOM = 32
"""Columns that a decode window can grow by before it is gathered again."""


class Runner:
    """Runs spans of rows over the pool and samples what follows. One thread at a time."""

    def __init__(self, base: FrozenModel, *, num_blocks: int, block_size: int, window_bytes: int) -> None:
        self.base = base
        self.block_size = block_size
        self.window_bytes = window_bytes
        self.storage = Storage(base.spec, (num_blocks + 1) * block_size, block_size, base.dtype, base.device)
        self._window: _Window | None = None

    @torch.no_grad()
    def load(self, entry: PrefixEntry) -> None:
        """Write a prefix into the blocks that it was given."""
        prefix: KVPrefix = entry.payload
        assert entry.start is not None
        slots = self._slots(entry.start.blocks, prefix.num_positions)
        device, dtype = self.base.device, self.base.dtype
        keys, values = (
            [tensor.transpose(0, 1).to(device, dtype) for tensor in tensors] for tensors in (prefix.keys, prefix.values)
        )
        self.storage.write(slots, keys, values)

    @torch.no_grad()
    def copy(self, pairs: Rows[tuple[int, int]]) -> None:
        """Copy slots (source, target); all sources are read before any target is written."""
        if pairs:
            source, target = torch.tensor(pairs, device=self.base.device).unbind(1)
            self.storage.copy(source, target)

    @torch.no_grad()
    def prefill(self, spans: Rows[Span]) -> list[Sampled | None]:
        """Compute each span; return the next token of those rows that have caught up, None for the others.

        Layout: every row is `[pad … past | new]`, right-aligned; a shorter span's queries are left-padded with
        queries whose results nobody reads.
        """
        device = self.base.device
        num_new = torch.tensor([span.num_new for span in spans], device=device)
        ends = torch.tensor([span.sequence.num_computed + span.num_new for span in spans], device=device)
        longest, width = max(span.num_new for span in spans), int(ends.max())
        gather = self._gather([span.sequence for span in spans], ends, width)
        offsets = torch.arange(longest, device=device) - longest  # of the new positions, from each row's end
        real = None
        if any(span.num_new < longest for span in spans):
            real = (offsets >= -num_new[:, None]).flatten().nonzero()[:, 0]
        slots = gather[:, width - longest :].flatten()
        cache = PoolCache(self.storage, gather, real, slots if real is None else slots[real], longest)
        ids = torch.tensor([_padded_ids(span, longest) for span in spans], device=device)
        last = [place for place, span in enumerate(spans) if span.is_last]
        logits = self.base.run(
            **self._inputs(spans, ids),
            positions=(ends[:, None] + offsets).clamp(min=0),
            cache=cache,
            mask=_mask(ends, width),
            select=torch.tensor([(place + 1) * longest - 1 for place in last], dtype=torch.long, device=device),
        )
        found: list[Sampled | None] = [None] * len(spans)
        for place, sampled in zip(last, choose(logits, [spans[place].sequence for place in last]), strict=True):
            found[place] = sampled
        return found

    @torch.no_grad()
    def decode(self, rows: Rows[Sequence]) -> list[Sampled]:
        """Compute the one missing position of each row and return its next token."""
        window, self._window = self._window, None  # a step that fails leaves none behind
        if window is None or not window.can_go_on(rows):
            window = self._new_window(rows)
        if window is None:
            return [sampled for sampled in self.prefill([Span(row, 1) for row in rows]) if sampled is not None]
        device, size = self.base.device, self.block_size
        cache = window.cache
        cache.num_columns += 1
        cache.slots = torch.tensor([slot_of(row.blocks, row.num_computed, size) for row in rows], device=device)
        positions = torch.tensor([[row.num_computed] for row in rows], device=device)
        ids = torch.tensor([row.tokens[-1:] for row in rows], device=device)
        mask = window.mask[:, : cache.num_columns]
        logits = self.base.run(ids=ids, positions=positions, cache=cache, mask=mask)[:, -1]
        found = choose(logits, rows)
        window.next_computed = [row.num_computed + 1 for row in rows]
        self._window = window
        return found

    def _new_window(self, rows: Rows[Sequence]) -> _Window | None:
        """Gather the computed positions of `rows` with room to grow, or return None where that takes too much."""
        lengths = [row.num_computed for row in rows]
        width, room = max(lengths), max(1, min(HEADROOM, max(row.max_positions - row.num_computed for row in rows)))
        itemsize = self.storage.keys[0].element_size()
        if self.base.spec.kv_bytes(len(rows) * (width + room), itemsize) > self.window_bytes:
            return None
        ends = torch.tensor(lengths, device=self.base.device)
        gather = self._gather(rows, ends, width)
        gather = torch.cat([gather, gather.new_zeros(len(rows), room)], dim=1)
        mask = torch.cat([_mask(ends, width), gather.new_ones(len(rows), room)], dim=1)
        return _Window(DecodeWindow(self.storage, gather, width), list(rows), lengths, mask)

    def _gather(self, rows: Rows[Sequence], ends: Tensor, width: int) -> Tensor:
        """Return slots [B, width] of each row's positions before `ends`, right-aligned behind zeros."""
        device, size = self.base.device, self.block_size
        longest = max(len(row.blocks) for row in rows)
        tables = torch.tensor([row.blocks + [0] * (longest - len(row.blocks)) for row in rows], device=device)
        positions = torch.arange(width, device=device) - (width - ends[:, None])
        inside = positions.clamp(min=0)
        slots = tables.gather(1, inside // size) * size + inside % size
        return slots.masked_fill(positions < 0, 0)

    def _slots(self, blocks: list[int], num_positions: int) -> Tensor:
        size = self.block_size
        places = [slot_of(blocks, position, size) for position in range(num_positions)]
        return torch.tensor(places, device=self.base.device)

    def _inputs(self, spans: Rows[Span], ids: Tensor) -> dict[str, Tensor]:
        """Return ids, or embeddings where a soft slot lies in a span."""
        index: list[int] = []
        vectors: list[Tensor] = []
        for place, span in enumerate(spans):
            row = span.sequence
            first = row.num_computed - row.num_prefix  # index into the row's tokens
            shift = (place + 1) * ids.shape[1] - span.num_new - first
            for offset, source, count in row.slots:
                start, stop = max(offset, first), min(offset + count, first + span.num_new)
                if start < stop and row.prefix is not None:
                    index.extend(range(start + shift, stop + shift))
                    vectors.append(row.prefix.payload.after[source + start - offset : source + stop - offset])
        if not index:
            return {"ids": ids}
        embeds = self.base.embed(ids)
        places, rows = torch.tensor(index, device=ids.device), torch.cat(vectors).to(embeds)
        return {"embeds": embeds.flatten(0, 1).index_copy(0, places, rows).view_as(embeds)}


class _Window:
    """A decode window and the rows it holds."""

    def __init__(self, cache: DecodeWindow, rows: list[Sequence], next_computed: list[int], mask: Tensor) -> None:
        self.cache = cache
        self.rows = rows
        self.next_computed = next_computed
        self.mask = mask
        """[B, capacity], ones where a row is or will be."""

    def can_go_on(self, rows: Rows[Sequence]) -> bool:
        """Return whether `rows` are those held, each exactly where the window left it, and a column is free."""
        return (
            self.cache.num_columns < self.cache.capacity
            and self.rows == rows
            and self.next_computed == [row.num_computed for row in rows]
        )


def _mask(ends: Tensor, width: int) -> Tensor:
    """Return [B, width] with 1 at the last `ends` columns of each row."""
    return (torch.arange(width, device=ends.device) >= width - ends[:, None]).long()


def _padded_ids(span: Span, longest: int) -> list[int]:
    row = span.sequence
    first = row.num_computed - row.num_prefix
    return [0] * (longest - span.num_new) + row.tokens[first : first + span.num_new]
