"""Keys and values in front of a sequence, handed to each layer by a hook.

Nothing is kept, so that a layer can be computed again in the backward pass; and no layer asks by its number, so that
all are compiled once.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LayerFront:
    """One layer's keys and values in front of a sequence, where a layer expects a whole cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return all keys and values [B, Hkv, S + T, Dh]; nothing is kept."""
        return torch.cat([self.keys, keys], dim=-2), torch.cat([self.values, values], dim=-2)


@contextmanager
def fronts_given(layers: Sequence[nn.Module], fronts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While active, layer l finds keys and values `fronts[l]` [B, Hkv, S, Dh] in front of what it computes.

    No fronts at all change nothing. Raises TypeError in a forward of a family whose layers take no cache.
    """
    handles = [
        layer.register_forward_pre_hook(_giving(LayerFront(*front)), with_kwargs=True)
        for layer, front in zip(layers, fronts, strict=bool(fronts))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _giving(front: LayerFront) -> Any:
    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        takes = list(inspect.signature(type(module).forward).parameters)[1:]
        name = next((name for name in ("past_key_values", "layer_past") if name in takes), None)
        if name is None:
            raise TypeError(f"{type(module).__name__} takes no keys and values")
        if name in kwargs:
            return args, kwargs | {name: front}
        return (*args[: (place := takes.index(name))], front, *args[place + 1 :]), kwargs

    return give
