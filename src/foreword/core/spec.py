"""What a base model is, in numbers: its shapes (`ModelSpec`) and its identity (`Fingerprint`). Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Method = Literal["prompt", "prefix", "kv"]
"""Prompt tuning, prefix tuning by hidden states, prefix tuning by keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Keys and values of one layer, as they lie in its cache."""

    num_kv_heads: int
    """Hkv, read from the layer's own keys."""
    head_dim: int
    """Dh of the keys."""
    value_dim: int
    """Dh of the values; equal to `head_dim` in most models."""
    window: int | None = None
    """W of a sliding-window layer in tokens (a query sees itself and W-1 tokens before), None for full attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Shapes of a decoder-only base model."""

    model_type: str
    hidden_size: int
    """D, the width of every layer's input."""
    embed_size: int
    """Width of one input embedding row; differs from D only where the model projects embeddings."""
    vocab_size: int
    max_positions: int | None
    """Longest sequence in tokens, prefix included; None where the model names no limit."""
    num_parameters: int
    layers: tuple[LayerSpec, ...]

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def kv_bytes(self, num_positions: int, itemsize: int) -> int:
        """Return the bytes of the keys and values of `num_positions` tokens in all layers."""
        per_token = sum(layer.num_kv_heads * (layer.head_dim + layer.value_dim) for layer in self.layers)
        return num_positions * per_token * itemsize

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_json` is its inverse."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Build the spec from `to_json`'s dict."""
        return cls(**{**data, "layers": tuple(LayerSpec(**layer) for layer in data["layers"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """The identity of a base: vectors trained on one fingerprint are refused on another.

    The weights' hash is over a fixed sample of elements of every tensor, rounded to bfloat16, so that a 60 GB base
    takes seconds and the dtype it was loaded in does not matter; a changed shape, revision, quantisation or merged
    adapter changes it, a change of a few single elements may not.
    """

    model_type: str
    shapes_sha256: str
    quantisation: str
    weights_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str

    def to_json(self) -> dict[str, str]:
        """Return a JSON-ready dict; `Fingerprint(**data)` is its inverse."""
        return dataclasses.asdict(self)

    def first_difference(self, other: Fingerprint) -> tuple[str, str, str] | None:
        """Return (field, own value, other's value) of the first field that differs, or None.

        An empty value means unknown (imported vectors, a base without tokenizer) and is not compared.
        """
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine and theirs and mine != theirs:
                return field.name, mine, theirs
        return None
