"""Where keys and values lie: the pool's tensors, and a transformers cache over them for one forward of ragged spans.

Letters: B rows, q new positions per row, K positions that a row attends to (padding included), L layers, Hkv key/value
heads, Dh head dimension. Every cache here hands attention `[B, Hkv, K, Dh]` with rows right-aligned: `[pad … row]`, the
new positions last. So within a row indices differ as positions do, and a two-dimensional mask [B, K] is right for
sliding windows, ALiBi and learned positions alike.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from foreword.core.spec import ModelSpec
from foreword.engine.sequence import Sequence


class Storage:
    """The pool's tensors: per layer keys and values [num_slots, Hkv, Dh].

    Only block 0 is cleared; other slots are read after they are written, and memory is touched when it is needed.
    """

    def __init__(self, spec: ModelSpec, num_slots: int, block_size: int, dtype: torch.dtype, device: Any) -> None:
        self.spec = spec
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        for layer in spec.layers:
            for tensors, width in ((self.keys, layer.head_dim), (self.values, layer.value_dim)):
                tensor = torch.empty(num_slots, layer.num_kv_heads, width, dtype=dtype, device=device)
                tensor[:block_size] = 0
                tensors.append(tensor)

    def write(self, slots: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        """Write every layer's keys and values [n, Hkv, Dh] to `slots` [n]."""
        for pool, rows in ((self.keys, keys), (self.values, values)):
            for tensor, new in zip(pool, rows, strict=True):
                tensor.index_copy_(0, slots, new)

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [n] to slots `target` [n] in every layer."""
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, target, tensor.index_select(0, source))


class PoolCache(Cache):  # type: ignore[misc]
    """One forward of ragged spans over the pool: writes the new positions, gathers each row.

    `gather` [B, K] holds the slot of every position, 0 at padding; `real` and `slots` say which of the B·q new
    positions are real and where they go.
    """

    def __init__(self, storage: Storage, gather: Tensor, real: Tensor | None, slots: Tensor, num_new: int) -> None:
        self.gather, self.real, self.slots, self.num_new = gather, real, slots, num_new
        super().__init__(layers=[_PoolLayer(self, *pair) for pair in zip(storage.keys, storage.values, strict=True)])


class KnownLayer(CacheLayerMixin):  # type: ignore[misc]
    """What transformers asks of a layer whose K columns are known before the forward."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (K, 0)."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return K - q: the columns left of the new positions."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        """Return -1: no limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: the same under its older name."""
        return -1


class _PoolLayer(KnownLayer):
    def __init__(self, cache: PoolCache, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.cache, self.pool = cache, (keys, values)

    def get_seq_length(self) -> int:
        return self.cache.gather.shape[1] - self.cache.num_new

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        cache = self.cache
        num_rows, num_columns = cache.gather.shape
        whole = []
        for pool, new in zip(self.pool, (key_states, value_states), strict=True):
            flat = new.transpose(1, 2).flatten(0, 1)  # [B, Hkv, q, Dh] -> [B·q, Hkv, Dh]
            pool.index_copy_(0, cache.slots, flat if cache.real is None else flat.index_select(0, cache.real))
            rows = pool.index_select(0, cache.gather.flatten())
            whole.append(rows.view(num_rows, num_columns, *rows.shape[1:]).transpose(1, 2))
        return whole[0], whole[1]


def gather_slots(rows: Rows[Sequence], ends: Tensor, width: int, block_size: int) -> Tensor:
    """Return slots [B, width] of each row's positions before `ends` [B], right-aligned behind zeros."""
    longest = max(len(row.blocks) for row in rows)
    tables = torch.tensor([row.blocks + [0] * (longest - len(row.blocks)) for row in rows], device=ends.device)
    positions = torch.arange(width, device=ends.device) - (width - ends[:, None])
    inside = positions.clamp(min=0)
    slots = tables.gather(1, inside // block_size) * block_size + inside % block_size
    return slots.masked_fill(positions < 0, 0)


def row_mask(ends: Tensor, width: int) -> Tensor:
    """Return [B, width] with 1 at the last `ends` [B] columns of each row."""
    return (torch.arange(width, device=ends.device) >= width - ends[:, None]).long()
