"""A base given as numbers, where there is no configuration file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from foreword.advise.bases.config_shapes import shape_from_config
from foreword.advise.bases.quantisation import ALL_LINEAR
from foreword.advise.bases.shapes import BaseShape
from foreword.errors import ConfigError, did_you_mean

KEYS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_tokens": "max_position_embeddings",
    "window": "sliding_window",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "shared_expert_size": "shared_expert_intermediate_size",
    "latent_dim": "kv_lora_rank",
    "rope_dim": "qk_rope_head_dim",
}
"""Whole numbers, and the configuration's key for each."""
ALIASES: Mapping[str, str] = {
    "layers": "num_layers",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "parameters": "num_parameters",
    "active_parameters": "num_active_parameters",
}
OTHERS = ("name", "num_parameters", "num_active_parameters", "weight_bits", "gated", "tied", "window_layers")
REQUIRED = ("num_layers", "hidden_size", "num_heads")


def shape_from_numbers(numbers: Mapping[str, Any], name: str = "") -> BaseShape:
    """Return the shapes of a base given as numbers; the rest is taken as Llama-like and listed in `assumed`.

    Needed: `num_layers`, `hidden_size`, `num_heads`. Optional: `num_kv_heads` (as many as heads), `head_dim`
    (hidden_size / num_heads), `ffn_size` (4 hidden_size), `gated` (true: three feed-forward maps, false: two),
    `vocab_size` (32,000), `tied`, `context_tokens`, `window` with `window_layers` ("all" or "alternate"),
    `num_experts`, `experts_per_token`, `shared_expert_size`, `latent_dim` and `rope_dim` (MLA), `weight_bits`,
    `num_parameters` and `num_active_parameters` (else counted from the shapes; given ones win).
    Raises ConfigError for an unknown key, a missing or impossible value.
    """
    given = _checked(numbers)
    name = name or str(given.get("name") or "base")
    assumed: list[str] = []
    hidden, heads = given["hidden_size"], given["num_heads"]
    if "head_dim" not in given and hidden % heads:
        raise ConfigError(f"{name}: hidden_size {hidden} is not a multiple of num_heads {heads}", hint="Give head_dim.")
    _fill(given, "num_kv_heads", heads, f"num_kv_heads = {heads}, as many as heads", assumed)
    _fill(given, "head_dim", hidden // heads, f"head_dim = hidden_size / num_heads = {hidden // heads}", assumed)
    _fill(given, "ffn_size", 4 * hidden, f"ffn_size = 4 hidden_size = {4 * hidden}", assumed)
    _fill(given, "vocab_size", 32000, "vocab_size = 32000", assumed)
    _fill(given, "gated", True, "gated = true: three feed-forward maps (gate, up, down) per layer", assumed)
    if heads % given["num_kv_heads"]:
        raise ConfigError(
            f"{name}: num_heads {heads} is not a multiple of num_kv_heads {given['num_kv_heads']}",
            hint="Each key/value head serves the same number of query heads.",
        )
    return _replace_counts(shape_from_config(_config(given), name), given, assumed)


def _config(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a known family with these sizes."""
    model_type = "llama" if given["gated"] else "nemotron"
    if given.get("latent_dim"):
        model_type = "deepseek_v3"
    elif given.get("window"):
        model_type = "mistral" if given["gated"] else "starcoder2"
    config: dict[str, Any] = {key: given[ours] for ours, key in KEYS.items() if ours in given}
    config |= {"model_type": model_type, "tie_word_embeddings": bool(given.get("tied", False))}
    if given.get("latent_dim"):
        config |= {"qk_nope_head_dim": given["head_dim"], "v_head_dim": given["head_dim"]}
    if given.get("window") and given.get("window_layers", "all") == "alternate":
        layers = range(given["num_layers"])
        config["layer_types"] = ["full_attention" if index % 2 else "sliding_attention" for index in layers]
    return config


def _replace_counts(shape: BaseShape, given: Mapping[str, Any], assumed: list[str]) -> BaseShape:
    total = given.get("num_parameters", shape.num_parameters)
    inactive = shape.num_parameters - shape.num_active_parameters
    active = given.get("num_active_parameters", max(0, total - inactive))
    if not 0 < active <= total:
        raise ConfigError(
            f"{shape.name}: num_active_parameters {active:g} is not between 0 and num_parameters {total:g}",
            hint="Give both, or leave both out; the shapes alone count "
            f"{shape.num_parameters:,} parameters, {shape.num_active_parameters:,} of them active.",
        )
    if "num_parameters" not in given:
        assumed.append(f"num_parameters = {total:,}, counted from the shapes")
    bits = given.get("weight_bits", 16)
    return dataclasses.replace(
        shape,
        model_type="numbers",
        num_parameters=round(total),
        num_active_parameters=round(active),
        weight_bits=bits,
        quantised_parts=() if bits == 16 else ALL_LINEAR,
        assumed=(*assumed, *shape.assumed),
    )


def _checked(numbers: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    known = {*KEYS, *OTHERS, *ALIASES}
    for key, value in numbers.items():
        if key not in known:
            raise ConfigError(f"base: unknown key {key!r}", hint=did_you_mean(key, known))
        ours = ALIASES.get(key, key)
        if ours in given:
            raise ConfigError(f"base: {ours} is given twice, as {key!r} too", hint="Leave one of them out.")
        given[ours] = _value(ours, value)
    for key in REQUIRED:
        if key not in given:
            raise ConfigError(f"base: {key} is missing", hint=f"A base as numbers needs {', '.join(REQUIRED)}.")
    if given.get("num_experts") and not given.get("experts_per_token"):
        raise ConfigError(
            f"base: num_experts = {given['num_experts']}, and experts_per_token is missing",
            hint="Give how many experts the router picks per token.",
        )
    return given


def _value(key: str, value: Any) -> Any:
    if key == "name":
        return str(value)
    if key in ("gated", "tied"):
        if not isinstance(value, bool):
            raise ConfigError(f"base.{key} = {value!r} is not true or false")
        return value
    if key == "window_layers":
        if value not in ("all", "alternate"):
            raise ConfigError(f"base.window_layers = {value!r} is neither 'all' nor 'alternate'")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"base.{key} = {value!r} is not a number above 0")
    if key == "weight_bits":
        if value > 32:
            raise ConfigError(f"base.weight_bits = {value!r} is more than 32")
        return value
    if value != int(value):
        raise ConfigError(f"base.{key} = {value!r} is not a whole number")
    return int(value)


def _fill(given: dict[str, Any], key: str, value: Any, text: str, assumed: list[str]) -> None:
    if key not in given:
        given[key] = value
        assumed.append(text)
