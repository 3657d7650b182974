"""The linear maps of a base from its configuration: attention, feed-forward, experts, state layers."""

from __future__ import annotations

import math
from collections import Counter

from foreword.advise.bases.config_sizes import Sizes
from foreword.advise.bases.families import STATE_MODELS
from foreword.advise.bases.shapes import LayerShape, Linear, LinearPart
from foreword.advise.bases.state_shapes import StateSizes


def read_linears(
    sizes: Sizes, layers: tuple[LayerShape, ...], num_heads: int, hidden: int, state: StateSizes | None
) -> tuple[Linear, ...]:
    """Return the linear maps of all layers, the output head left out."""
    attending = [layer for layer in layers if layer.kind != "state"]
    linears: list[Linear] = []
    if state and (count := len(layers) - len(attending)):
        linears += [
            Linear(name=n, in_size=i, out_size=o, count=count, part="state", bias=b) for n, i, o, b in state.linears
        ]
    if attending and attending[0].kind == "latent":
        linears += _latent_attention(sizes, attending[0], len(attending), num_heads, hidden)
    else:
        for (heads, dim), count in Counter((layer.num_kv_heads, layer.head_dim) for layer in attending).items():
            linears += _attention(sizes, heads, dim, count, num_heads, hidden)
    if sizes.model_type not in STATE_MODELS:
        linears += _feed_forward(sizes, len(layers), hidden, state)
    embed = sizes.number("word_embed_proj_dim", hidden)
    if embed != hidden:
        linears.append(Linear(name="project_in", in_size=embed, out_size=hidden, count=1, part="projection"))
        linears.append(Linear(name="project_out", in_size=hidden, out_size=embed, count=1, part="projection"))
    return tuple(linears)


def _attention(sizes: Sizes, heads: int, dim: int, count: int, num_heads: int, hidden: int) -> list[Linear]:
    *names, output = sizes.family.attention
    query, key = num_heads * dim, heads * dim
    outs = [query + 2 * key] if len(names) == 1 else [query, key, key]
    bias = sizes.is_on(sizes.family.qkv_bias)
    found = [
        Linear(name=name, in_size=hidden, out_size=out, count=count, part="attention", bias=bias)
        for name, out in zip(names, outs, strict=True)
    ]
    bias = sizes.is_on(sizes.family.output_bias)
    return [*found, Linear(name=output, in_size=query, out_size=hidden, count=count, part="attention", bias=bias)]


def _latent_attention(sizes: Sizes, layer: LayerShape, count: int, num_heads: int, hidden: int) -> list[Linear]:
    """Return the maps of multi-head latent attention: queries straight or through a latent, keys and values through
    one."""
    bias = sizes.is_on(sizes.family.qkv_bias)
    query, unfolded = num_heads * layer.head_dim, layer.head_dim - layer.rope_dim + layer.value_dim
    maps = [("kv_a_proj_with_mqa", hidden, layer.latent_dim + layer.rope_dim, bias)]
    maps.append(("kv_b_proj", layer.latent_dim, num_heads * unfolded, False))
    if rank := sizes.number("q_lora_rank"):
        maps += [("q_a_proj", hidden, rank, bias), ("q_b_proj", rank, query, False)]
    else:
        maps.append(("q_proj", hidden, query, False))
    maps.append(("o_proj", num_heads * layer.value_dim, hidden, bias))
    return [Linear(name=n, in_size=i, out_size=o, count=count, part="attention", bias=b) for n, i, o, b in maps]


def _feed_forward(sizes: Sizes, num_layers: int, hidden: int, state: StateSizes | None) -> list[Linear]:
    num_experts = sizes.get("num_experts") or 0
    sparse = sum(_is_sparse(sizes, index) for index in range(num_layers)) if num_experts > 1 else 0
    linears: list[Linear] = []
    if sparse < num_layers:
        linears += _mlp(sizes, hidden, dense_ffn(sizes, hidden, state), num_layers - sparse, "mlp")
    if not sparse:
        return linears
    picked = sizes.need("experts_per_token")
    width = sizes.number("moe_intermediate_size") or dense_ffn(sizes, hidden, state)
    linears += _mlp(sizes, hidden, width, sparse * num_experts, "expert", sparse * picked)
    bias = sizes.family.router_bias
    linears.append(Linear(name="router", in_size=hidden, out_size=num_experts, count=sparse, part="router", bias=bias))
    if shared := sizes.number("n_shared_experts") * width or sizes.number("shared_expert_intermediate_size"):
        linears += _mlp(sizes, hidden, shared, sparse, "shared_expert")
        if sizes.model_type == "qwen2_moe":
            linears.append(Linear(name="shared_expert_gate", in_size=hidden, out_size=1, count=sparse, part="router"))
    return linears


def _mlp(
    sizes: Sizes, hidden: int, width: int, count: int, part: LinearPart, active: int | None = None
) -> list[Linear]:
    family = sizes.family
    names = ("gate_proj", "up_proj", "down_proj") if part == "expert" else family.mlp
    *ups, down = names
    outs = [2 * width] if family.gated and len(ups) == 1 else [width] * len(ups)
    maps = [(name, hidden, out) for name, out in zip(ups, outs, strict=True)] + [(down, width, hidden)]
    bias = sizes.is_on(family.mlp_bias)
    return [Linear(name=n, in_size=i, out_size=o, count=count, part=part, bias=bias, active=active) for n, i, o in maps]


def _is_sparse(sizes: Sizes, index: int) -> bool:
    """Whether the feed-forward of a layer is a mixture of experts, by the keys of the families that mix both."""
    if index < sizes.number("first_k_dense_replace") or index in (sizes.config.get("mlp_only_layers") or ()):
        return False
    if period := sizes.number("expert_layer_period"):
        return index % period == sizes.number("expert_layer_offset")
    if frequency := sizes.number("moe_layer_freq"):
        return index % frequency == 0
    return (index + 1) % max(1, sizes.number("decoder_sparse_step", 1)) == 0


def dense_ffn(sizes: Sizes, hidden: int, state: StateSizes | None) -> int:
    """Return F of the layers that are no mixture of experts."""
    if sizes.model_type in STATE_MODELS and state:
        return state.inner_size
    found = sizes.get("ffn_size")
    if found:
        return found
    factor = sizes.config.get("expansion_ratio") or sizes.family.ffn_factor
    if not factor:
        sizes.assume("feed-forward width = 4 times the hidden size, since the configuration names none")
    return math.floor((factor or 4) * hidden)
