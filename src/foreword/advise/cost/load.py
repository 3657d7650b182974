"""What is asked of a method: tasks, lengths, traffic, data, and the sizes that a method is free to choose."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from foreword.errors import ConfigError

AT_LEAST_ZERO = ("input_tokens", "output_tokens", "requests_per_s", "rows", "epochs", "eval_rows", "hard_tokens")
"""Fields that may be 0; all others are above 0."""
MAY_BE_FRACTIONS = ("requests_per_s", "network_bytes_per_s", "bytes_per_element")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load that costs are counted for. Raises ConfigError for a value out of range."""

    num_tasks: int = 1
    num_vectors: int = 20
    """P of prompt, prefix and kv."""
    bytes_per_element: float = 2
    """b of vectors, caches and trained parameters as stored and served."""
    input_tokens: int = 300
    """T of a request, and of a training row with its target."""
    output_tokens: int = 32
    """Tokens of an answer."""
    batch: int = 1
    """Sequences that decode together."""
    requests_per_s: float = 0.0
    rows: int = 2000
    """Training rows of one task."""
    epochs: int = 5
    few_shot_tokens: int = 2000
    """Tokens of the demonstrations of few-shot."""
    hard_tokens: int = 150
    """Tokens of the hard text prompt."""
    cartridge_tokens: int = 1024
    """P of a cartridge."""
    cartridge_context_tokens: int = 4096
    """Tokens of the text that the teacher reads before each training row of a cartridge."""
    lora_rank: int = 16
    adapter_size: int = 64
    """m, the width of a bottleneck adapter."""
    block_tokens: int = 16
    """Tokens per block of the serving engine's cache."""
    eval_rows: int = 500
    """Held-out rows that a tweak is judged on before it ships."""
    eval_batch: int = 32
    """Sequences that decode together in that evaluation."""
    network_bytes_per_s: float = 1.25e9
    """From the registry to a serving machine; 10 Gbit/s."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kind = "number" if field.name in MAY_BE_FRACTIONS else "whole number"
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not is_number or (kind == "whole number" and value != int(value)):
                raise ConfigError(f"load.{field.name} = {value!r} is not a {kind}")
            if value < 0 or (value == 0 and field.name not in AT_LEAST_ZERO):
                bound = "0 or more" if field.name in AT_LEAST_ZERO else "above 0"
                raise ConfigError(f"load.{field.name} = {value!r} is not {bound}")
