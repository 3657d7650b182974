"""How many bits a quantised base stores per weight, from its quantization_config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from foreword.advise.bases.shapes import LinearPart

ALL_LINEAR: tuple[LinearPart, ...] = ("attention", "mlp", "expert", "shared_expert", "state", "projection")
"""What quantisation changes in general; embeddings, head, routers and norms stay in 16 bits."""


def read_weight_bits(config: Mapping[str, Any], assume: Callable[[str], None]) -> tuple[float, tuple[LinearPart, ...]]:
    """Return the bits of a quantised weight and which maps are quantised; (16, ()) for a base in 16 bits.

    `assume` is called with each thing that the configuration leaves open. Scales of groups are counted for mxfp4 alone.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        if (config.get("dtype") or config.get("torch_dtype")) in ("float32", "float64"):
            assume("weights are stored in 32 bits; served in 16, as engines do")
        return 16, ()
    method = str(settings.get("quant_method", "unknown"))
    if method == "mxfp4":
        return 4.25, ("expert",)
    bits = _bits(settings, method)
    if bits is None:
        assume(f"quantisation {method!r} names no number of bits: taken as 16")
        return 16, ()
    return bits, ALL_LINEAR


def _bits(settings: Mapping[str, Any], method: str) -> float | None:
    for key in ("bits", "w_bit", "nbits", "num_bits", "weight_bits"):
        if isinstance(value := settings.get(key), int) and not isinstance(value, bool):
            return value
    if settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        return 4
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return 8
    groups = settings.get("config_groups")
    if isinstance(groups, Mapping):
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping) and isinstance(value := weights.get("num_bits"), int):
                return value
    return 8 if "fp8" in method else None
