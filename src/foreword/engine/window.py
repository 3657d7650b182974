"""A contiguous copy of what the decode batch attends to, so that a step writes one column instead of gathering all.

            columns 0 ............ num_columns | room to grow
    row 0   [ pad | prefix, prompt, answer     |                ]   all rows end in the same column:
    row 1   [ pad ...... | prompt, answer      |                ]   the view [:, :K] is right-aligned at every step

A row that ends is replaced by the last one, a row that joins is gathered alone. All rows are gathered again, newly
aligned, when the columns are used up, or a joining row is longer than they are. The pool stays complete: every step
writes there as well.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from foreword.engine.kvpool import slot_of
from foreword.engine.sequence import Sequence
from foreword.engine.storage import KnownLayer, Storage, gather_slots, row_mask

HEADROOM = 32
"""Columns that a window can grow by before it is gathered again."""


class DecodeWindow(Cache):  # type: ignore[misc]
    """A transformers cache over the rows of a decode batch; `rows` is their order."""

    def __init__(self, storage: Storage, *, num_positions: int, max_rows: int, block_size: int) -> None:
        super().__init__(
            layers=[
                _WindowLayer(self, (keys, values), num_positions)
                for keys, values in zip(storage.keys, storage.values, strict=True)
            ]
        )
        self.rows: list[Sequence] = []
        self.num_columns = 0
        """Columns that every row has filled, at its end; during a step those of the step included."""
        self.num_positions = num_positions
        """Room for rows times columns."""
        self.max_rows = max_rows
        self.block_size = block_size
        self.device = storage.keys[0].device
        self.slots = torch.zeros(0, dtype=torch.long, device=self.device)
        """[B] where the step's positions go in the pool."""
        self._capacity = 0  # columns
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=self.device)  # [max_rows, capacity]
        self._next_computed: list[int] = []

    def hold(self, rows: Rows[Sequence]) -> bool:
        """Make the window hold exactly `rows`, in an order of its own; return False where they do not fit."""
        kept = {row: n for row, n in zip(self.rows, self._next_computed, strict=True) if row.num_computed == n}
        wanted = set(rows)
        staying = [place for place, row in enumerate(self.rows) if row in kept and row in wanted]
        joining = [row for row in rows if row not in kept]
        longest = max(row.num_computed for row in rows)
        if (
            not staying
            or self.num_columns == self._capacity
            or longest > self.num_columns
            or self.num_columns > 2 * longest + HEADROOM
            or len(rows) * self._capacity > self.num_positions
        ):
            return self._gather_all(rows, longest)
        self._keep(staying)
        if joining:
            self._join(joining)
        return True

    def begin(self) -> tuple[Tensor, Tensor]:
        """Open a column for the rows' next positions; return positions [B, 1] and mask [B, K]."""
        self.num_columns += 1
        self.slots = torch.tensor(
            [slot_of(row.blocks, row.num_computed, self.block_size) for row in self.rows], device=self.device
        )
        positions = torch.tensor([[row.num_computed] for row in self.rows], device=self.device)
        return positions, self._mask[: len(self.rows), : self.num_columns]

    def end(self) -> None:
        """Note that the step has succeeded."""
        self._next_computed = [row.num_computed + 1 for row in self.rows]

    def clear(self) -> None:
        """Forget all rows: a step has failed."""
        self.rows, self._next_computed = [], []

    def _gather_all(self, rows: Rows[Sequence], longest: int) -> bool:
        self.clear()
        self._capacity, self.num_columns = longest + HEADROOM, longest
        if len(rows) * self._capacity > self.num_positions:
            return False
        for layer in self.layers:
            layer.reshape(min(self.max_rows, self.num_positions // self._capacity), self._capacity)
        self._mask = torch.ones(self.max_rows, self._capacity, dtype=torch.long, device=self.device)
        self._join(list(rows))
        return True

    def _keep(self, staying: list[int]) -> None:
        """Drop all rows but those at `staying`; the last ones fill the holes."""
        count = len(staying)
        if count == len(self.rows):
            return
        free = sorted(set(range(count)) - set(staying))
        moved = [place for place in staying if place >= count]
        for target, source in zip(free, moved, strict=True):
            self.rows[target], self._next_computed[target] = self.rows[source], self._next_computed[source]
        del self.rows[count:], self._next_computed[count:]
        if moved:
            to, index = (torch.tensor(places, device=self.device) for places in (free, moved))
            self._mask.index_copy_(0, to, self._mask.index_select(0, index))
            for layer in self.layers:
                layer.move(index, to, self.num_columns)

    def _join(self, rows: list[Sequence]) -> None:
        first, width = len(self.rows), self.num_columns
        ends = torch.tensor([row.num_computed for row in rows], device=self.device)
        slots = gather_slots(rows, ends, width, self.block_size)
        self._mask[first : first + len(rows), :width] = row_mask(ends, width)
        for layer in self.layers:
            layer.join(first, slots)
        self.rows += rows
        self._next_computed += [row.num_computed for row in rows]


class _WindowLayer(KnownLayer):
    """One layer's keys and values [rows, capacity, Hkv, Dh], views of memory that is taken once."""

    def __init__(self, window: DecodeWindow, pool: tuple[Tensor, Tensor], num_positions: int) -> None:
        super().__init__()
        self.window, self.pool = window, pool
        self._memory = [tensor.new_empty(num_positions, *tensor.shape[1:]) for tensor in pool]
        self._views = self._memory

    def reshape(self, num_rows: int, num_columns: int) -> None:
        """Cut the memory into rows and columns; what was in it is lost."""
        count = num_rows * num_columns
        self._views = [memory[:count].view(num_rows, num_columns, *memory.shape[1:]) for memory in self._memory]

    def join(self, first: int, slots: Tensor) -> None:
        """Fill the rows from `first` on with the pool's `slots` [n, columns]."""
        num_rows, width = slots.shape
        for pool, view in zip(self.pool, self._views, strict=True):
            rows = pool.index_select(0, slots.flatten()).view(num_rows, width, *pool.shape[1:])
            view[first : first + num_rows, :width] = rows

    def move(self, source: Tensor, target: Tensor, num_columns: int) -> None:
        """Copy rows `source` to rows `target`."""
        for view in self._views:
            filled = view[:, :num_columns]
            filled.index_copy_(0, target, filled.index_select(0, source))

    def get_seq_length(self) -> int:
        """Return the columns left of the step's own."""
        return self.window.num_columns - 1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the step's column [B, Hkv, 1, Dh], here and in the pool; return all columns [B, Hkv, K, Dh]."""
        num_rows, _, _, _ = key_states.shape
        num_columns, slots = self.window.num_columns, self.window.slots
        whole = []
        for pool, view, new in zip(self.pool, self._views, (key_states, value_states), strict=True):
            column = new[:, :, 0]
            pool.index_copy_(0, slots, column)
            view[:num_rows, num_columns - 1] = column
            whole.append(view[:num_rows, :num_columns].transpose(1, 2))
        return whole[0], whole[1]
