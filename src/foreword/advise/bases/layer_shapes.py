"""What each layer keeps: its kind, key/value heads, head dimension and sliding window, from a configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foreword.advise.bases.config_sizes import Sizes
from foreword.advise.bases.families import FAMILIES, STATE_MODELS
from foreword.advise.bases.shapes import LayerKind, LayerShape
from foreword.advise.bases.state_shapes import StateSizes
from foreword.errors import ConfigError

STATE_WORDS = ("linear", "mamba", "conv", "recurrent", "ssm")
"""What layer types are called that keep a state of fixed size."""
STATE_KEYS = ("mamba_", "ssm_", "conv_L_cache", "linear_conv")
"""How keys begin that only bases with such layers have."""


def read_layers(
    sizes: Sizes, num_layers: int, num_heads: int, hidden: int, state: StateSizes | None
) -> tuple[LayerShape, ...]:
    """Return the layers of a configuration, in order. Raises ConfigError where layer_types is too long or short."""
    kinds, windows = _kinds(sizes, num_layers), _windows(sizes, num_layers)
    latent, rope = sizes.number("kv_lora_rank"), sizes.number("qk_rope_head_dim")
    layers = []
    for index, (kind, window) in enumerate(zip(kinds, windows, strict=True)):
        heads, dim = _heads_of(sizes, index, num_layers, num_heads, hidden)
        if kind == "state":
            elements = state.state_elements if state else _linear_attention_state(sizes)
            layer = LayerShape(kind="state", state_elements=elements)
        elif latent:
            layer = LayerShape(
                kind="latent",
                num_kv_heads=num_heads,
                head_dim=sizes.number("qk_nope_head_dim") + rope,
                value_dim=sizes.number("v_head_dim", dim),
                window=window,
                latent_dim=latent,
                rope_dim=rope,
            )
        else:
            layer = LayerShape(kind=kind, num_kv_heads=heads, head_dim=dim, value_dim=dim, window=window)
        layers.append(layer)
    return tuple(layers)


def _heads_of(sizes: Sizes, index: int, num_layers: int, num_heads: int, hidden: int) -> tuple[int, int]:
    """Return (Hkv, Dh) of a layer: the model's, or what the configuration says for this layer or its kind."""
    heads, dim = _kv_heads(sizes, num_heads), _head_dim(sizes, num_heads, hidden)
    types = _layer_types(sizes, num_layers)
    if types and types[index] == "full_attention":
        dim = sizes.number("global_head_dim", dim)
        if sizes.config.get("attention_k_eq_v"):
            heads = sizes.number("num_global_key_value_heads", heads)
    for place, own in (sizes.config.get("per_layer_config") or {}).items():
        if int(place) == index:
            heads, dim = own.get("num_key_value_heads") or heads, own.get("head_dim") or dim
    return heads, dim


def _kinds(sizes: Sizes, num_layers: int) -> list[LayerKind]:
    if sizes.model_type in STATE_MODELS:
        return ["state"] * num_layers
    if period := sizes.number("attn_layer_period"):
        offset = sizes.number("attn_layer_offset")
        return ["kv" if index % period == offset else "state" for index in range(num_layers)]
    kinds: list[LayerKind] = ["kv"] * num_layers
    for index, kind in enumerate(_layer_types(sizes, num_layers)):
        if any(word in kind for word in STATE_WORDS):
            kinds[index] = "state"
    if "state" not in kinds and (odd := [key for key in sizes.config if key.startswith(STATE_KEYS)]):
        sizes.assume(
            f"every layer is counted as keeping keys and values, although {odd[0]} says that some keep a state: which "
            "ones the configuration does not tell in a known way"
        )
    if shared := sizes.number("num_kv_shared_layers"):
        kinds[num_layers - shared :] = ["shared"] * shared
        sizes.assume(f"the last {shared} layers read keys and values of earlier ones (num_kv_shared_layers)")
    return kinds


def _layer_types(sizes: Sizes, num_layers: int) -> list[str]:
    types = sizes.config.get("layer_types")
    if not isinstance(types, Sequence) or isinstance(types, str) or not types:
        return []
    if len(types) != num_layers:
        raise ConfigError(f"{sizes.name}: layer_types names {len(types)} layers, the model has {num_layers}")
    return [str(kind) for kind in types]


def _windows(sizes: Sizes, num_layers: int) -> list[int | None]:
    """Return W of each layer, None for full attention."""
    config, family = sizes.config, sizes.family
    window = config.get("sliding_window") or config.get("attention_chunk_size") or config.get("window_size")
    window = window or family.defaults.get("sliding_window")
    none: list[int | None] = [None] * num_layers
    if not isinstance(window, int) or config.get("use_sliding_window") is False:
        return none
    if types := _layer_types(sizes, num_layers):
        return [window if "sliding" in kind or "chunked" in kind else None for kind in types]
    if sizes.model_type not in FAMILIES:
        sizes.assume(f"sliding_window = {window} is taken to hold in every layer, since no layer_types stand beside it")
        return [window] * num_layers
    period = sizes.number("sliding_window_pattern", sizes.number("_sliding_window_pattern", family.window_period))
    late = sizes.number("max_window_layers", num_layers) if config.get("use_sliding_window") else num_layers
    local = [kind == "local" for kind in _attention_kinds(config, num_layers)]
    has_window = {
        "none": [False] * num_layers,
        "all": [True] * num_layers,
        "alternate": [index % 2 == 0 for index in range(num_layers)],
        "pattern": [(index + 1) % period != 0 for index in range(num_layers)],
        "late": [index >= late for index in range(num_layers)],
        "listed": local,
    }[family.window]
    return [window if has else None for has in has_window]


def _attention_kinds(config: Mapping[str, Any], num_layers: int) -> list[str]:
    """Return GPT-Neo's kinds of layers: as listed, or unrolled from [[kinds, times], ...]."""
    listed = config.get("attention_layers") or [
        kind for kinds, times in config.get("attention_types") or () for kind in list(kinds) * times
    ]
    return [str(kind) for kind in listed] if len(listed) == num_layers else ["global"] * num_layers


def _kv_heads(sizes: Sizes, num_heads: int) -> int:
    if sizes.model_type in ("falcon", "gpt_bigcode") and not sizes.config.get("new_decoder_architecture"):
        multi_query = sizes.config.get("multi_query")
        return 1 if multi_query is None or multi_query else num_heads
    found = sizes.get("num_kv_heads") or num_heads
    if sizes.model_type == "falcon" and found != num_heads:
        sizes.assume(
            f"{found} key/value heads, as engines that group queries keep them; the transformers library repeats them "
            f"to {num_heads} in its cache"
        )
    return found


def _head_dim(sizes: Sizes, num_heads: int, hidden: int) -> int:
    for source in (sizes.config, sizes.family.defaults):
        if value := source.get("head_dim"):
            if source is not sizes.config:
                sizes.assume(f"head_dim = {value}, the default of {sizes.model_type} configurations")
            return int(value)
    return hidden // num_heads if num_heads else 0


def _linear_attention_state(sizes: Sizes) -> int:
    heads, key = sizes.number("linear_num_value_heads"), sizes.number("linear_key_head_dim")
    return heads * key * sizes.number("linear_value_head_dim")
