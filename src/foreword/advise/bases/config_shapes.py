"""From a Hugging Face configuration to shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foreword.advise.bases.config_sizes import Sizes
from foreword.advise.bases.families import FAMILIES, LLAMA, NOT_DECODERS, STATE_MODELS
from foreword.advise.bases.layer_shapes import read_layers
from foreword.advise.bases.linear_shapes import dense_ffn, read_linears
from foreword.advise.bases.quantisation import read_weight_bits
from foreword.advise.bases.shapes import BaseShape, LayerShape
from foreword.advise.bases.state_shapes import StateSizes, state_sizes
from foreword.errors import ConfigError

TEXT_KEYS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where configurations of multimodal models keep that of the text decoder."""


def shape_from_config(config: Mapping[str, Any], name: str = "") -> BaseShape:
    """Return the shapes that a Hugging Face configuration describes.

    Exact for the families of `FAMILIES`; another decoder is taken as Llama-like, and `assumed` says so. Multimodal
    configurations: the text decoder. Raises ConfigError for encoders, encoders with a decoder, and missing sizes.
    """
    name = name or str(config.get("_name_or_path") or config.get("model_type") or "base")
    config = _text_config(config, name)
    model_type = str(config.get("model_type") or "")
    _check_is_decoder(config, model_type, name)
    sizes = Sizes(config, FAMILIES.get(model_type, LLAMA), model_type or "unknown", name)
    if model_type not in FAMILIES:
        sizes.assume(
            f"model_type {model_type!r} is not among the families whose parts are known: taken as Llama-like (gated "
            "feed-forward, two RMS norms per layer, no biases), so the parameter count is an estimate"
        )
    return _shape(sizes)


def _text_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    for key in TEXT_KEYS:
        inner = config.get(key)
        if isinstance(inner, Mapping) and inner:
            merged = dict(inner)
            for outer in ("quantization_config", "tie_word_embeddings", "torch_dtype", "dtype"):
                if merged.get(outer) is None and config.get(outer) is not None:
                    merged[outer] = config[outer]
            return _text_config(merged, name)
    return config


def _check_is_decoder(config: Mapping[str, Any], model_type: str, name: str) -> None:
    why = ""
    if config.get("is_encoder_decoder"):
        why = "an encoder with a decoder (is_encoder_decoder = true)"
    elif model_type in NOT_DECODERS and not config.get("is_decoder"):
        why = f"not a decoder (model_type = {model_type!r})"
    elif model_type not in FAMILIES and any("ForMaskedLM" in str(a) for a in config.get("architectures") or ()):
        why = "an encoder (architectures name a masked language model)"
    if why:
        raise ConfigError(
            f"{name} is {why}; advice is for decoder-only language models",
            hint="A prompt left of the text attends to the text in an encoder, so it neither compiles nor is cached. "
            "Give the configuration of a causal language model.",
        )


def _shape(sizes: Sizes) -> BaseShape:
    num_layers, hidden = sizes.need("num_layers"), sizes.need("hidden_size")
    state = state_sizes(sizes.config, sizes.model_type, hidden)
    num_heads = 0 if sizes.model_type in STATE_MODELS else sizes.need("num_heads")
    layers = read_layers(sizes, num_layers, num_heads, hidden, state)
    linears = read_linears(sizes, layers, num_heads, hidden, state)
    vocab, embed = sizes.need("vocab_size"), sizes.number("word_embed_proj_dim", hidden)
    rest = _other_parameters(sizes, layers, num_heads, hidden, vocab, embed, state)
    total = rest + sum(linear.num_parameters for linear in linears)
    active = rest + sum(linear.num_active_parameters for linear in linears)
    bits, parts = read_weight_bits(sizes.config, sizes.assume)
    experts = [linear for linear in linears if linear.part == "expert"]
    return BaseShape(
        name=sizes.name,
        model_type=sizes.model_type,
        num_layers=num_layers,
        hidden_size=hidden,
        embed_size=embed,
        num_heads=num_heads,
        ffn_size=dense_ffn(sizes, hidden, state) if not experts else experts[-1].in_size,
        vocab_size=vocab,
        num_parameters=total,
        num_active_parameters=active,
        context_tokens=None if sizes.config.get("alibi") else sizes.get("context_tokens"),
        weight_bits=bits,
        quantised_parts=parts,
        layers=layers,
        linears=linears,
        assumed=tuple(sizes.assumed),
    )


def _other_parameters(
    sizes: Sizes,
    layers: tuple[LayerShape, ...],
    num_heads: int,
    hidden: int,
    vocab: int,
    embed: int,
    state: StateSizes | None,
) -> int:
    """Return embeddings, head, position table, norms, sinks and the loose tensors of state layers."""
    family, config = sizes.family, sizes.config
    tied = config.get("tie_word_embeddings")
    total = vocab * embed * (1 if (family.tied if tied is None else tied) else 2)
    total += vocab * sizes.is_on(family.head_bias)
    if family.learned_positions is not None:
        total += (sizes.need("context_tokens") + family.learned_positions) * hidden
    norm = {"rms": hidden, "layer": 2 * hidden, "layer_without_bias": hidden, "none": 0}[family.norm]
    total += norm * (_norms_per_layer(sizes) * len(layers) + int(family.has_embedding_norm))
    total += norm * _has_final_norm(sizes, embed, hidden)
    for layer in layers:
        if layer.kind == "state":
            total += state.other_elements if state else 0
            continue
        total += num_heads if family.has_sinks else 0
        total += _inner_norms(sizes, layer, num_heads)
    return total


def _inner_norms(sizes: Sizes, layer: LayerShape, num_heads: int) -> int:
    """Return the numbers of norms within one attention."""
    if layer.kind == "latent":
        return layer.latent_dim + sizes.number("q_lora_rank")
    if sizes.config.get("use_qk_norm") and sizes.model_type == "cohere":
        return (num_heads + layer.num_kv_heads) * layer.head_dim
    full = (num_heads + layer.num_kv_heads) * layer.head_dim
    return {"none": 0, "head": 2 * layer.head_dim, "full": full}[sizes.family.qk_norm]


def _norms_per_layer(sizes: Sizes) -> int:
    config = sizes.config
    if sizes.model_type == "falcon":
        if config.get("new_decoder_architecture"):
            return sizes.number("num_ln_in_parallel_attn", 2)
        parallel = config.get("parallel_attn")
        return 1 if parallel is None or parallel else 2
    if sizes.model_type == "stablelm" and config.get("use_parallel_residual"):
        return 1
    return sizes.family.norms_per_layer


def _has_final_norm(sizes: Sizes, embed: int, hidden: int) -> bool:
    if sizes.model_type != "opt":
        return True
    return sizes.config.get("do_layer_norm_before") is not False and not sizes.config.get("_remove_final_layer_norm")
