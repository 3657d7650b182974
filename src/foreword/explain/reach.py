"""How far into the text vectors can act, by the base's windows, and how far they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from foreword.core.model import FrozenModel
from foreword.core.prompt import Vectors
from foreword.core.spec import ModelSpec
from foreword.explain.ablate import block_of, count_vectors, divergences, form_without
from foreword.explain.examples import Example

MAX_PROBE_TOKENS = 2048
"""The text that a finite reach is measured on is no longer than this."""
BEYOND = 8
"""Tokens measured behind the last one that can be reached."""
PROBE_ROWS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """Text indices count from 0, the first token behind the block."""

    last_index: int | None
    """The last text token that vectors of the block can act on; None where nothing limits it."""
    windows: tuple[int | None, ...]
    """Each layer's attention window in tokens, None for full attention."""
    by_index: tuple[tuple[int, float], ...]
    """Mean KL(with || without) of the next token by text index, in nats."""
    num_rows: int
    made_longer: bool
    """Whether rows were repeated to get text as long as the reach."""
    unmeasured: str = ""
    """Why a finite reach was not measured to its end."""


def last_reached_index(spec: ModelSpec, last_position: int, num_positions: int) -> int | None:
    """Return the last text index that a vector at `last_position` of a block of `num_positions` can act on, or None.

    Each layer carries it W - 1 tokens on: L·(W - 1) - 1 for a vector right in front of the text and L equal windows.
    One layer of full attention ends the limit.
    """
    hops = [layer.window for layer in spec.layers]
    if any(window is None for window in hops):
        return None
    return last_position - num_positions + sum(window - 1 for window in hops if window is not None)


def measure_reach(
    base: FrozenModel, vectors: Vectors, examples: Sequence[Example], kl: Sequence[torch.Tensor]
) -> Reach:
    """Return the computed reach and the measured one.

    `kl` are the examples' divergences, which tell of a base without a limit; for a limited one, texts are made of the
    examples' tokens, repeated until they are longer than the reach, where base and time allow it.
    """
    block = block_of(vectors)
    windows = tuple(layer.window for layer in base.spec.layers)
    soft = block.soft_positions()
    last = last_reached_index(base.spec, soft[-1], block.num_positions) if soft else None
    rows, unmeasured, longer = list(kl), "", False
    if last is not None:
        needed = last + 1 + BEYOND
        room = MAX_PROBE_TOKENS
        if base.spec.max_positions is not None:
            room = min(room, base.spec.max_positions - block.num_positions)
        if needed > room:
            unmeasured = f"{needed:,} tokens are needed, {room:,} is the most that is measured here"
        else:
            made = [Example(_repeated(e.ids, needed)) for e in examples[:PROBE_ROWS] if not e.slots]
            if made:
                full = form_without(base, vectors)
                none = form_without(base, vectors, range(count_vectors(vectors)))
                rows, longer = divergences(base, full, none, made), True
    longest = max(len(row) for row in rows)
    by_index = []
    for index in range(longest):
        found = [float(row[index]) for row in rows if len(row) > index]
        by_index.append((index, sum(found) / len(found)))
    return Reach(
        last_index=last,
        windows=windows,
        by_index=tuple(by_index),
        num_rows=len(rows),
        made_longer=longer,
        unmeasured=unmeasured,
    )


def _repeated(ids: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(ids[place % len(ids)] for place in range(count))
