"""One forward over rows that start with different prefixes: the way training, probes and notebooks run the base.

Layout of a batch: every row is `[pad … prefix | text … pad]`, so within a row indices differ as positions do and a
plain two-dimensional mask serves sliding windows and ALiBi as well as full attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix


def batch_cache(base: FrozenModel, prefixes: Sequence[KVPrefix | None]) -> tuple[Any, Tensor]:
    """Return a cache holding each row's prefix, right-aligned, and its mask [B, Nmax] (1 at prefix positions)."""
    from transformers import DynamicCache

    groups = [(prefix, len(list(rows))) for prefix, rows in groupby(prefixes, key=lambda prefix: prefix)]
    widths = [prefix.num_positions if prefix is not None else 0 for prefix, _ in groups]
    longest = max(widths, default=0)
    cache = DynamicCache()
    places = torch.arange(longest, device=base.device)
    mask = torch.cat(
        [(places >= longest - width).expand(count, -1) for width, (_, count) in zip(widths, groups, strict=True)]
    )
    if longest:
        for index, layer in enumerate(base.spec.layers):
            shapes = (layer.num_kv_heads, longest, layer.head_dim), (layer.num_kv_heads, longest, layer.value_dim)
            parts: tuple[list[Tensor], list[Tensor]] = ([], [])
            for prefix, count in groups:
                for part, rows, shape in zip(parts, _layer(prefix, index), shapes, strict=True):
                    if rows is None:
                        part.append(torch.zeros(count, *shape, dtype=base.dtype, device=base.device))
                    else:
                        padded = F.pad(rows, (0, 0, longest - rows.shape[1], 0))
                        part.append(padded.expand(count, -1, -1, -1))
            cache.update(torch.cat(parts[0]), torch.cat(parts[1]), index)
    return cache, mask.long()


def _layer(prefix: KVPrefix | None, index: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if prefix is None else (prefix.keys[index], prefix.values[index])


def forward_rows(
    base: FrozenModel,
    rows: Sequence[Sequence[int]],
    prefixes: Sequence[KVPrefix | None],
    *,
    select: Tensor | None = None,
    splices: Sequence[tuple[int, int, Tensor]] = (),
) -> Tensor:
    """Run token rows behind their prefixes; return logits [B, T, V], right-padded, or [len(select), V].

    `select` holds flat indices b·T + t with T the longest row. Each of `splices` (row, offset, vectors [S, D]) writes
    vectors over the embeddings at that place: soft slots behind the text.
    """
    device = base.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    cache, prefix_mask = batch_cache(base, prefixes)
    places = torch.arange(longest, device=device)
    mask = torch.cat([prefix_mask, (places < lengths[:, None]).long()], dim=1)
    starts = prefix_mask.sum(1, keepdim=True)
    positions = starts + torch.minimum(places[None], lengths[:, None] - 1)
    inputs: dict[str, Tensor] = {"ids": ids}
    if splices:
        embeds = base.embed(ids)
        flat = embeds.reshape(-1, embeds.shape[-1])
        index = torch.cat([row * longest + offset + torch.arange(len(v), device=device) for row, offset, v in splices])
        values = torch.cat([vectors for _, _, vectors in splices]).to(embeds.dtype)
        inputs = {"embeds": flat.index_copy(0, index, values).view_as(embeds)}
    return base.run(**inputs, positions=positions, cache=cache, mask=mask, select=select)


def forward(base: FrozenModel, ids: Tensor | Sequence[Sequence[int]], prefix: KVPrefix | None = None) -> Tensor:
    """Return logits [B, T, V] for token `ids` [B, T] (or ragged rows, right-padded) behind one prefix or none."""
    rows = ids.tolist() if isinstance(ids, Tensor) else ids
    with torch.no_grad():
        return forward_rows(base, rows, [prefix] * len(rows))
