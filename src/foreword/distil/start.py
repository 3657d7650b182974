"""Where the student starts: from the context's own keys and values, layer inputs or embeddings.

Three ways to choose P of the context's C tokens:

- `first`: its first P - 1 tokens and its last, which closes the turn (Cartridges, arXiv:2506.06266).
- `spread`: its first token, its last, and P - 2 evenly between.
- `match` (kv only): per layer and head the tokens that questions attend to most, with values fitted to them
  (distil/matching.py).

`spread` and `match` take keys as the whole context left them, turned to the positions where their distance to the
question is what it was, C - P less for all. Rotary embedding depends on differences alone, so the kept tokens are seen
as behind the whole context. A base whose keys hold absolute positions, and a context longer than the window, run the
chosen tokens as a text of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.init import kv_of, states_of
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt, Vectors
from foreword.core.spec import Method
from foreword.distil.matching import can_watch, matched
from foreword.errors import ConfigError
from foreword.train.data import Example

Start = Literal["first", "spread", "match"]
TOLERANCE = 1e-3
"""Relative difference of values up to which a base counts as blind to where a text begins."""
QUERY_ROWS = 64
"""Rows whose queries `match` looks at, at most."""


def start_vectors(
    base: FrozenModel,
    method: Method,
    block: Block,
    context: Sequence[int],
    how: Start,
    rows: Sequence[Example] = (),
) -> Vectors:
    """Return the vectors that the student starts from, for the slots of `block`.

    `context` are C's token ids, `rows` the questions whose attention `match` follows. Raises ConfigError where there
    are no fewer tokens than vectors, or `match` is asked of another method or base than it can serve.
    """
    num = block.num_soft
    if num >= len(context):
        raise ConfigError(
            f"{num} vectors for a context of {len(context)} tokens compress nothing",
            hint=f"Use fewer than {len(context)}, or --ratio 4.",
        )
    if how == "match":
        check_match(base, method)
        if not rows:
            raise ConfigError("init = match needs questions to follow", hint="Use init = first or spread.")
        return matched(base, block, context, context_kv(base, block, context), _spread(rows))
    places = chosen_places(len(context), num, how)
    limit = base.spec.max_positions
    fits = limit is None or len(block.left_ids) + len(context) <= limit
    if method == "kv" and how == "spread" and fits and is_shift_invariant(base):
        return kv_at(base, block, context, places)
    embeds = _embed(base, [context[place] for place in places])
    if method == "prompt":
        return SoftPrompt(embeds, block)
    if method == "prefix":
        return SoftPrefix(states_of(base, embeds, block), block)
    return kv_of(base, embeds, block)


def check_match(base: FrozenModel, method: Method) -> None:
    """Raise ConfigError where `match` cannot be the start."""
    if method != "kv":
        raise ConfigError(f"init = match is for method kv, not {method}", hint="Use init = first or spread.")
    if not is_shift_invariant(base):
        raise ConfigError(
            f"init = match needs rotary positions, {base.spec.model_type} has others", hint="Use init = spread."
        )
    if not can_watch(base):
        raise ConfigError(
            f"init = match cannot follow {base.spec.model_type}: a softcap, a sink, or attention code of its own",
            hint="Use init = spread.",
        )


def choose_start(base: FrozenModel, method: Method, is_chunked: bool) -> Start:
    """Return the start that measures best where it can be made: `match`, else `first`."""
    can_match = method == "kv" and not is_chunked and is_shift_invariant(base) and can_watch(base)
    return "match" if can_match else "first"


def chosen_places(count: int, num: int, how: Start) -> list[int]:
    """Return the `num` of `count` places that are kept, in order."""
    if num == 1:
        return [0]
    if how == "first":
        return [*range(num - 1), count - 1]
    return [round(index * (count - 1) / (num - 1)) for index in range(num)]


def kv_at(base: FrozenModel, block: Block, context: Sequence[int], places: Sequence[int]) -> SoftKV:
    """Return keys and values of some places of a context as the whole left them, turned to stand before the text."""
    keys, values = context_kv(base, block, context)
    index = torch.tensor(places)
    new_keys, new_values = (tuple(part.index_select(1, index) for part in kind) for kind in (keys, values))
    return SoftKV(new_keys, new_values, block)


def context_kv(base: FrozenModel, block: Block, context: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Return keys and values [Hkv, C, Dh] of a context behind the block's opening, float32 on the CPU.

    Positions are such that the context ends where the vectors end; its first ones may be negative.
    """
    from transformers import DynamicCache

    left, num = len(block.left_ids), block.num_soft
    ids = [*block.left_ids, *context]
    cache = DynamicCache()
    positions = torch.arange(len(ids), device=base.device)[None] - (len(context) - num)
    with torch.no_grad():
        embeds = base.embed(torch.tensor([ids], device=base.device))
        base.run_decoder(embeds, positions=positions, cache=cache, mask=torch.ones_like(positions))
    keys = [layer.keys[0, :, left:].float().cpu() for layer in cache.layers]
    return keys, [layer.values[0, :, left:].float().cpu() for layer in cache.layers]


def is_shift_invariant(base: FrozenModel) -> bool:
    """Return whether values do not depend on the position where a text begins: true of rotary bases, measured."""
    from transformers import DynamicCache

    found = []
    for start in (0, -7):
        cache = DynamicCache()
        embeds = base.embed(torch.arange(2, device=base.device)[None] + 1)
        positions = torch.arange(start, start + 2, device=base.device)[None]
        try:
            with torch.no_grad():
                base.run_decoder(embeds, positions=positions, cache=cache, mask=torch.ones_like(positions))
        except (IndexError, RuntimeError):  # a table of positions has no negative ones
            return False
        found.append(cache.layers[-1])
    scale = found[0].values.float().abs().max()
    keys_turn = not torch.equal(found[0].keys, found[1].keys)
    return keys_turn and bool((found[0].values - found[1].values).float().abs().max() <= TOLERANCE * scale)


def _spread(rows: Sequence[Example]) -> Sequence[Example]:
    """Return QUERY_ROWS rows at most, evenly spread."""
    return [rows[place * len(rows) // QUERY_ROWS] for place in range(QUERY_ROWS)] if len(rows) > QUERY_ROWS else rows


def _embed(base: FrozenModel, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return base.embed(torch.tensor(list(ids), device=base.device)).float().cpu()
