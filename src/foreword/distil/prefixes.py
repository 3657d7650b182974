"""Constant blocks of tokens as KV prefixes: the teacher's context, no context, a truncated one, a summary.

A block of literal tokens is compiled like one with vectors, so whatever stands in front of the rows is served, judged
and measured by the same code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foreword.core.block import Block
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix, tensors_digest
from foreword.core.template import TaskTemplate


def literal_prefix(
    base: FrozenModel, ids: Sequence[int], template: TaskTemplate, *, name: str, max_new_tokens: int
) -> KVPrefix:
    """Return the keys and values of literal tokens at positions 0, 1, ... as a prefix that `template` renders behind.

    Raises IncompatibleModel where the base's window cannot hold them.
    """
    from transformers import DynamicCache

    base.check_holds(len(ids))
    cache = DynamicCache()
    positions = torch.arange(len(ids), device=base.device)[None]
    with torch.no_grad():
        embeds = base.embed(torch.tensor([list(ids)], device=base.device))
        base.run_decoder(embeds, positions=positions, cache=cache, mask=torch.ones_like(positions))
    keys = tuple(layer.keys[0].detach().contiguous() for layer in cache.layers)
    values = tuple(layer.values[0].detach().contiguous() for layer in cache.layers)
    return KVPrefix(
        keys=keys,
        values=values,
        digest=_digest(keys, values),
        name=name,
        method="literal",
        block=Block((tuple(ids),)),
        template=template,
        max_new_tokens=max_new_tokens,
    )


def _digest(keys: Sequence[Tensor], values: Sequence[Tensor]) -> str:
    named = {f"key.{index}": key for index, key in enumerate(keys)}
    return tensors_digest(named | {f"value.{index}": value for index, value in enumerate(values)})
