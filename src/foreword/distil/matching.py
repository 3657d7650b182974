"""Attention matching: a start in closed form that answers reference queries as the whole context does.

Per layer and key/value head, the P context tokens with the most attention from the queries of real questions keep their
keys; their values are fitted by least squares, so that the head's output at those queries is what it was behind the
whole context. Source: Attention Matching, arXiv:2602.16284. Its bias per kept token, which gives the kept ones the
weight of all, is not taken over: an engine that reads keys and values alone has no place for it. The fit counts the
mass that is lost that way and makes it up in the values as far as they can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foreword.core.block import Block
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV
from foreword.errors import ConfigError
from foreword.train.data import Example

RIDGE = 1e-2
"""Weight of staying with the kept tokens' own values, relative to the mean square of a kept token's attention."""
WATCH = "foreword_watch"
"""Name under which transformers finds the attention that is watched."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one row's attention in one layer worked with: queries [H, T, Dh], keys and values [Hkv, N, Dh]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


def matched(
    base: FrozenModel,
    block: Block,
    context: Sequence[int],
    kv: tuple[Sequence[Tensor], Sequence[Tensor]],
    rows: Sequence[Example],
) -> SoftKV:
    """Return keys and values for the slots of `block` in place of the context, fitted to the queries of `rows`.

    `kv` are the context's keys and values [Hkv, C, Dh] by layer, turned to end where the vectors end. Opening and own
    tokens of a row take part in every softmax, as they do in the model. The base is one of which
    `can_watch` is true.
    """
    left = len(block.left_ids)
    opening = _run(base, block.left_ids, 0, None) if left else None
    calls = _watch_rows(base, block, kv, opening, rows)
    keys, values = [], []
    for layer, seen in enumerate(calls):
        heads = [
            _match_head(seen, head, left, kv[0][layer][head], kv[1][layer][head], block.num_soft)
            for head in range(kv[0][layer].shape[0])
        ]
        keys.append(torch.stack([key for key, _ in heads]))
        values.append(torch.stack([value for _, value in heads]))
    return SoftKV(tuple(keys), tuple(values), block)


def can_watch(base: FrozenModel) -> bool:
    """Return whether every layer's attention shows its queries, and does no more to the scores than scale them."""
    try:
        with watched_attention(base) as seen:
            _run(base, [0, 1], 0, None)
    except ConfigError:
        return False
    return len(seen) == base.spec.num_layers


def _match_head(
    seen: Sequence[Seen], head: int, left: int, keys: Tensor, values: Tensor, num: int
) -> tuple[Tensor, Tensor]:
    """Return keys and values [P, Dh] of one head; `keys` and `values` [C, Dh] are the context's."""
    count = len(keys)
    scores, outs, others, other_values = [], [], [], []
    for row in seen:
        group = row.queries.shape[0] // row.keys.shape[0]
        queries = row.queries[head * group : (head + 1) * group]
        own = left + count
        raw = queries @ row.keys[head].T * row.scaling  # [G, T, N]
        future = torch.ones(raw.shape[1], raw.shape[2] - own).triu(1 + raw.shape[2] - own - raw.shape[1]).bool()
        raw[:, :, own:].masked_fill_(future, -torch.inf)
        raw = raw.flatten(0, 1)
        outs.append(raw.softmax(-1) @ row.values[head])
        scores.append(raw)
        others.append(torch.cat([raw[:, :left], raw[:, own:]], dim=1))
        other_values.append(torch.cat([row.values[head][:left], row.values[head][own:]]))
    mass = sum(raw.softmax(-1)[:, left : left + count].sum(0) for raw in scores)
    assert isinstance(mass, Tensor)
    mass[0] = torch.inf  # the first token stays: it is the one that is frozen by default
    kept = mass.topk(num).indices.sort().values
    weights, wanted = [], []
    for raw, out, other, other_value in zip(scores, outs, others, other_values, strict=True):
        shares = torch.cat([raw[:, left + kept], other], dim=1).softmax(-1)
        weights.append(shares[:, :num])
        wanted.append(out - shares[:, num:] @ other_value)
    return keys[kept], _fit_values(torch.cat(weights), torch.cat(wanted), values[kept])


def _fit_values(weights: Tensor, wanted: Tensor, near: Tensor) -> Tensor:
    """Return V [P, Dh] that makes weights [Q, P] @ V come to `wanted` [Q, Dh], by ridge regression around `near`."""
    weights, wanted = weights.double(), wanted.double()
    gram = weights.T @ weights
    ridge = RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    change: Tensor = torch.linalg.solve(gram + ridge, weights.T @ (wanted - weights @ near.double()))
    return near + change.float()


def _watch_rows(
    base: FrozenModel,
    block: Block,
    kv: tuple[Sequence[Tensor], Sequence[Tensor]],
    opening: Any,
    rows: Sequence[Example],
) -> list[list[Seen]]:
    """Return by layer what each row's attention saw behind opening and context."""
    from transformers import DynamicCache

    start = len(block.left_ids) + block.num_soft
    right = [token for segment in block.segments[-1:] if isinstance(segment, tuple) for token in segment]
    right = [] if isinstance(block.segments[-1], int) else right
    by_layer: list[list[Seen]] = [[] for _ in kv[0]]
    for row in rows:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(*kv, strict=True)):
            pair = [part[None].to(base.device, base.dtype) for part in (key, value)]
            if opening is not None:
                known = opening.layers[layer]
                pair = [torch.cat([known.keys, pair[0]], 2), torch.cat([known.values, pair[1]], 2)]
            cache.update(pair[0], pair[1], layer)
        with watched_attention(base) as seen:
            _run(base, [*right, *row.ids], start, cache)
        for calls, call in zip(by_layer, seen, strict=True):
            calls.append(call)
    return by_layer


def _run(base: FrozenModel, ids: Sequence[int], start: int, cache: Any) -> Any:
    """Run tokens at positions from `start` on behind what the cache holds; return the cache."""
    from transformers import DynamicCache

    cache = cache or DynamicCache()
    before = cache.get_seq_length()
    positions = torch.arange(start, start + len(ids), device=base.device)[None]
    mask = torch.ones(1, before + len(ids), dtype=torch.long, device=base.device)
    with torch.no_grad():
        embeds = base.embed(torch.tensor([list(ids)], device=base.device))
        base.run_decoder(embeds, positions=positions, cache=cache, mask=mask)
    return cache


@contextmanager
def watched_attention(base: FrozenModel) -> Iterator[list[Seen]]:
    """While active, the list fills with what each attention call works with, one row at a time.

    Goes through transformers' interface for attention functions; models with attention code of their own add nothing.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    seen: list[Seen] = []

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            raise ConfigError("init = match cannot follow a softcap or a learned sink", hint="Use init = spread.")
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        seen.append(Seen(query[0].float().cpu(), key[0].float().cpu(), value[0].float().cpu(), scaling))
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None

    function: Callable[..., Any] = watch
    AttentionInterface.register(WATCH, function)
    AttentionMaskInterface.register(WATCH, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    config = base.model.config.get_text_config()
    before = config._attn_implementation
    try:
        config._attn_implementation = WATCH
        yield seen
    finally:
        config._attn_implementation = before
