"""The sizes that a Hugging Face configuration gives, under the many names that families have for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.advise.bases.families import Family, Switch
from foreword.errors import ConfigError

NAMES: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "ffn_size": ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "context_tokens": ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx"),
    "num_experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"),
}
"""A size and the keys under which configurations give it, first found wins."""


@dataclass(slots=True)
class Sizes:
    """What is read from one configuration; `assumed` grows as keys turn out to be missing."""

    config: Mapping[str, Any]
    family: Family
    model_type: str
    name: str
    assumed: list[str] = field(default_factory=list)

    def get(self, size: str) -> int | None:
        """Return a size of `NAMES` from the configuration or the family's defaults, None where neither has it."""
        for source in (self.config, self.family.defaults):
            for key in NAMES[size]:
                value = source.get(key)
                if value is None:
                    continue
                if isinstance(value, list) and value and all(one == value[0] for one in value):
                    value = value[0]
                if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                    raise ConfigError(f"{self.name}: {key} = {value!r} is not a whole number of 0 or more")
                if source is not self.config:
                    self.assume(f"{key} = {value}, the default of {self.model_type} configurations")
                return value
        return None

    def need(self, size: str) -> int:
        """Return a size. Raises ConfigError naming its keys where it is missing or 0."""
        value = self.get(size)
        if not value:
            raise ConfigError(
                f"{self.name}: the configuration has no {' or '.join(NAMES[size])}",
                hint="Give the config.json of the model itself, or the base as numbers (num_layers, hidden_size, ...).",
            )
        return value

    def is_on(self, switch: Switch) -> bool:
        """Return a family's constant, or the configuration's value for its key."""
        if isinstance(switch, bool):
            return switch
        found = self.config.get(switch[0])
        return switch[1] if found is None else bool(found)

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number by key, the default where it is absent or null."""
        value = self.config.get(key)
        return default if value is None else int(value)

    def assume(self, text: str) -> None:
        """Note what was filled in, once."""
        if text not in self.assumed:
            self.assumed.append(text)
