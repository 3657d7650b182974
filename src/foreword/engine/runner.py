"""The only place where lists become tensors: one forward of the base over the rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.engine.kvpool import slot_of
from foreword.engine.sampling import choose
from foreword.engine.sequence import PrefixEntry, Sampled, Sequence, Span
from foreword.engine.storage import PoolCache, Storage, gather_slots, row_mask
from foreword.engine.window import DecodeWindow


class Runner:
    """Runs spans of rows over the pool and samples what follows. One thread at a time."""

    def __init__(
        self, base: FrozenModel, *, num_blocks: int, block_size: int, max_batch: int, window_positions: int
    ) -> None:
        self.base = base
        self.block_size = block_size
        self.storage = Storage(base.spec, (num_blocks + 1) * block_size, block_size, base.dtype, base.device)
        self.window = DecodeWindow(
            self.storage, num_positions=window_positions, max_rows=max_batch, block_size=block_size
        )

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
        gather = gather_slots([span.sequence for span in spans], ends, width, self.block_size)
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
            mask=row_mask(ends, width),
            select=torch.tensor([(place + 1) * longest - 1 for place in last], dtype=torch.long, device=device),
        )
        found: list[Sampled | None] = [None] * len(spans)
        for place, sampled in zip(last, choose(logits, [spans[place].sequence for place in last]), strict=True):
            found[place] = sampled
        return found

    @torch.no_grad()
    def decode(self, rows: Rows[Sequence]) -> list[Sampled]:
        """Compute the one missing position of each row and return its next token."""
        window = self.window
        try:
            if not window.hold(rows):
                return self._decode_from_pool(rows)
            positions, mask = window.begin()
            ids = torch.tensor([row.tokens[-1:] for row in window.rows], device=self.base.device)
            logits = self.base.run(ids=ids, positions=positions, cache=window, mask=mask)[:, -1]
            found = dict(zip(window.rows, choose(logits, window.rows), strict=True))
        except BaseException:
            window.clear()
            raise
        window.end()
        return [found[row] for row in rows]

    def _decode_from_pool(self, rows: Rows[Sequence]) -> list[Sampled]:
        """Decode rows too many or too long for the window: similar lengths together, a layer gathered at a time."""
        limit = self.window.num_positions * self.base.spec.num_layers
        found: dict[Sequence, Sampled] = {}
        for group in _groups(rows, limit):
            sampled = self.prefill([Span(row, 1) for row in group])
            found |= {row: token for row, token in zip(group, sampled, strict=True) if token is not None}
        return [found[row] for row in rows]

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


def _padded_ids(span: Span, longest: int) -> list[int]:
    row = span.sequence
    first = row.num_computed - row.num_prefix
    return [0] * (longest - span.num_new) + row.tokens[first : first + span.num_new]


def _groups(rows: Rows[Sequence], limit: int) -> Iterator[list[Sequence]]:
    """Yield all rows, shortest first, in groups of one row or of at most `limit` positions with padding."""
    group: list[Sequence] = []
    for row in sorted(rows, key=lambda row: row.num_positions):
        if group and (len(group) + 1) * row.num_positions > limit:
            yield group
            group = []
        group.append(row)
    yield group
