"""One forward over rows that start with different prefixes: the way training, probes and notebooks run the base.

Layout of a batch: every row is `[pad … prefix | text … pad]`, so within a row indices differ as positions do and a
plain two-dimensional mask serves sliding windows and ALiBi as well as full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.model import FrozenModel, put_rows
from foreword.core.prompt import KVPrefix


def batch_cache(base: FrozenModel, prefixes: Sequence[KVPrefix | None], *, growing: bool = True) -> tuple[Any, Tensor]:
    """Return a cache holding each row's prefix, right-aligned, and its mask [B, Nmax] (1 at prefix positions).

    Unless `growing`, it stays as it is in a forward pass: a layer can be computed again in the backward pass.
    """
    from transformers import DynamicCache

    unique: dict[int, KVPrefix | None] = {id(prefix): prefix for prefix in prefixes}
    places = {key: place for place, key in enumerate(unique)}
    rows = torch.tensor([places[id(prefix)] for prefix in prefixes], device=base.device)
    widths = torch.tensor([p.num_positions if p is not None else 0 for p in unique.values()], device=base.device)
    longest = int(widths.max())
    mask = torch.arange(longest, device=base.device) >= longest - widths[rows, None]
    made = DynamicCache()
    for index, layer in enumerate(base.spec.layers if longest else ()):
        keys, values = [], []
        for prefix in unique.values():
            if prefix is None:
                shape = layer.num_kv_heads, longest
                keys.append(torch.zeros(*shape, layer.head_dim, dtype=base.dtype, device=base.device))
                values.append(torch.zeros(*shape, layer.value_dim, dtype=base.dtype, device=base.device))
            else:
                pad = (0, 0, longest - prefix.num_positions, 0)
                keys.append(F.pad(prefix.keys[index], pad))
                values.append(F.pad(prefix.values[index], pad))
        made.update(_spread(keys, rows), _spread(values, rows), index)
    if growing:
        return made, mask.long()
    fixed = _fixed_cache()()
    fixed.layers = made.layers
    return fixed, mask.long()


@cache
def _fixed_cache() -> Any:
    """Return a class of caches that keep what they hold; transformers is imported on first use."""
    from transformers import DynamicCache

    return type("FixedCache", (DynamicCache,), {"update": _joined})


def _joined(self: Any, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values with new ones behind them; nothing is kept."""
    if layer >= len(self.layers):
        return keys, values
    front = self.layers[layer]
    return torch.cat([front.keys, keys], dim=-2), torch.cat([front.values, values], dim=-2)


def _spread(tensors: list[Tensor], rows: Tensor) -> Tensor:
    """Return [B, ...] with `tensors[rows[b]]` at b."""
    if len(tensors) == 1:
        return tensors[0].expand(len(rows), *tensors[0].shape)
    return torch.stack(tensors).index_select(0, rows)


def forward_rows(
    base: FrozenModel,
    rows: Sequence[Sequence[int]],
    prefixes: Sequence[KVPrefix | None],
    *,
    select: Tensor | None = None,
    splices: Sequence[tuple[int, int, Tensor]] = (),
    lean: bool = False,
) -> Tensor:
    """Run token rows behind their prefixes; return logits [B, T, V], right-padded, or [len(select), V].

    `select` holds flat indices b·T + t with T the longest row. Each of `splices` (row, offset, vectors [S, D]) writes
    vectors over the embeddings at that place: soft slots behind the text. `lean` leaves out what the last layer
    computes for other places than `select` (without repeats).
    """
    device = base.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    cache, prefix_mask = batch_cache(base, prefixes, growing=False)
    places = torch.arange(longest, device=device)
    mask = torch.cat([prefix_mask, (places < lengths[:, None]).long()], dim=1)
    starts = prefix_mask.sum(1, keepdim=True)
    positions = starts + torch.minimum(places[None], lengths[:, None] - 1)
    inputs: dict[str, Tensor] = {"ids": ids}
    if splices:
        index = torch.cat([row * longest + offset + torch.arange(len(v), device=device) for row, offset, v in splices])
        inputs = {"embeds": put_rows(base.embed(ids), index, torch.cat([vectors for _, _, vectors in splices]))}
    if not lean or select is None:
        return base.run(**inputs, positions=positions, cache=cache, mask=mask, select=select)
    with base.computed_only_at([-1], select):
        return base.run(**inputs, positions=positions, cache=cache, mask=mask, select=select)


def forward(base: FrozenModel, ids: Tensor | Sequence[Sequence[int]], prefix: KVPrefix | None = None) -> Tensor:
    """Return logits [B, T, V] for token `ids` [B, T] (or ragged rows, right-padded) behind one prefix or none."""
    rows = ids.tolist() if isinstance(ids, Tensor) else ids
    with torch.no_grad():
        return forward_rows(base, rows, [prefix] * len(rows))
