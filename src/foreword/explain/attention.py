"""The prefix mass of a sample in summary: by layer and head, by place in the text, by vector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foreword.core.mass import PrefixMass, prefix_mass, soft_columns
from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.explain.examples import Example

MAX_SHARES = 2**24
"""Shares held at most, over layers, heads, rows and tokens; of a larger sample the first rows are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMass:
    """Shares of one layer's attention over all heads and text tokens."""

    mean: float
    """On the vectors."""
    low: float
    """5 % of (head, token) pairs have less."""
    high: float
    """95 % have less."""
    at_answers: float | None
    """On the vectors where the next token is the answer's; None without answers."""
    literal: float
    """On literal tokens of the block."""
    sink: float
    """On a learned sink."""
    heads: tuple[float, ...]
    """Mean of each head."""
    spreads: tuple[float, ...]
    """Standard deviation of each head over tokens."""
    by_place: tuple[float, ...]
    """Mean at the first text token, the second, ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How much attention falls on the vectors."""

    layers: tuple[LayerMass, ...]
    by_vector: tuple[float, ...]
    """Each vector of the block: mean over layers, heads and tokens."""
    num_rows: int
    num_tokens: int

    @property
    def mean(self) -> float:
        """Over all layers."""
        return sum(layer.mean for layer in self.layers) / len(self.layers)


def measure_attention(base: FrozenModel, prefix: KVPrefix, examples: Sequence[Example]) -> Attention:
    """Return the shares of attention over the examples' tokens. Raises IncompatibleModel as `prefix_mass` does."""
    longest = max(len(example.ids) for example in examples)
    heads = getattr(base.config, "num_attention_heads", 1)
    most = max(1, MAX_SHARES // (base.spec.num_layers * heads * longest))
    chosen = list(examples[:most])
    mass = prefix_mass(base, [e.ids for e in chosen], prefix, [e.slots for e in chosen])
    asking = torch.zeros(len(chosen), max(len(e.ids) for e in chosen), dtype=torch.bool)
    for row, example in enumerate(chosen):
        if example.num_answer:
            asking[row, len(example.ids) - example.num_answer - 1 : len(example.ids) - 1] = True
    is_soft = soft_columns(prefix.block, prefix.num_positions)
    by_vector = torch.stack([shares[:, is_soft].mean(0) for shares in mass.by_position]).mean(0)
    return Attention(
        layers=tuple(_layer(mass, layer, asking) for layer in range(base.spec.num_layers)),
        by_vector=tuple(by_vector.tolist()),
        num_rows=len(chosen),
        num_tokens=sum(mass.num_tokens),
    )


def _layer(mass: PrefixMass, layer: int, asking: Tensor) -> LayerMass:
    soft = mass.soft[layer]
    known = soft[~soft.isnan()]
    real = ~soft[0].isnan()
    by_head = soft[:, real]
    middle = torch.tensor([0.05, 0.95])
    low, high = torch.quantile(known[torch.randperm(len(known), generator=_generator())[: 2**20]], middle).tolist()
    return LayerMass(
        mean=float(known.mean()),
        low=low,
        high=high,
        at_answers=float(soft[:, asking].mean()) if bool(asking.any()) else None,
        literal=float(mass.literal[layer].nanmean()),
        sink=max(0.0, float(mass.sink[layer].nanmean())),
        heads=tuple(by_head.mean(1).tolist()),
        spreads=tuple(by_head.std(1, unbiased=False).tolist()),
        by_place=tuple(soft.nanmean((0, 1)).tolist()),
    )


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
