"""How model families differ in what their configurations say and leave unsaid: biases, norms, names of linear maps.

Each entry is the difference from Llama. Tests build a small model of each family and compare parameters and maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Switch = bool | tuple[str, bool]
"""A constant, or the configuration's key and its value where the key is absent."""

LLAMA_BIAS: Switch = ("attention_bias", False)
SPLIT_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What a model family has beyond the sizes in its configuration."""

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Four names, or two where queries, keys and values are one map."""
    mlp: tuple[str, ...] = SPLIT_MLP
    """Names of the feed-forward maps; with `gated` and two names, gate and up are one map."""
    gated: bool = True
    qkv_bias: Switch = LLAMA_BIAS
    output_bias: Switch = LLAMA_BIAS
    mlp_bias: Switch = ("mlp_bias", False)
    router_bias: bool = False
    head_bias: Switch = False
    norm: Literal["rms", "layer", "layer_without_bias", "none"] = "rms"
    """D numbers per norm, 2·D, D, or 0."""
    norms_per_layer: int = 2
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norms of queries and keys: Dh numbers each, or one per feature."""
    has_sinks: bool = False
    """One learned sink per head and layer."""
    has_embedding_norm: bool = False
    learned_positions: int | None = None
    """Rows of the position table beyond the context length; None has no table."""
    tied: bool = False
    """Whether head and embeddings are one where the configuration does not say."""
    window: Literal["none", "all", "alternate", "pattern", "late", "listed"] = "none"
    """Which layers have `sliding_window` where no layer_types stand: none, all, the even ones, all but every n-th,
    those from max_window_layers on, those called local."""
    window_period: int = 2
    """n of `pattern`."""
    ffn_factor: float | None = None
    """F / D by which the family goes where no F is given; None expects F."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that the family's own configuration class has for keys that files may leave out."""


LLAMA = Family()
_QWEN = Family(qkv_bias=True, output_bias=False, mlp_bias=False, window="late")
_QWEN3 = replace(_QWEN, qkv_bias=LLAMA_BIAS, output_bias=LLAMA_BIAS, qk_norm="head", defaults={"head_dim": 128})
_MISTRAL = Family(qkv_bias=False, output_bias=False, mlp_bias=False, window="all")
_GEMMA = Family(mlp_bias=False, tied=True, defaults={"head_dim": 256})
_GEMMA3 = replace(
    _GEMMA,
    norms_per_layer=4,
    qk_norm="head",
    window="pattern",
    window_period=6,
    defaults={
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
)
_OLMO2 = Family(mlp_bias=False, qk_norm="full")
_COHERE = Family(mlp_bias=False, norm="layer_without_bias", norms_per_layer=1, tied=True)
_GPT2 = Family(
    attention=("c_attn", "c_proj"),
    mlp=("c_fc", "c_proj"),
    gated=False,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    norm="layer",
    learned_positions=0,
    tied=True,
    ffn_factor=4,
)
_NEOX = Family(
    attention=("query_key_value", "dense"),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    gated=False,
    qkv_bias=("attention_bias", True),
    output_bias=("attention_bias", True),
    mlp_bias=True,
    norm="layer",
    ffn_factor=4,
)
_DEEPSEEK = Family(qkv_bias=LLAMA_BIAS, mlp_bias=("mlp_bias", False))
_MAMBA = Family(norms_per_layer=1, tied=True)

FAMILIES: Mapping[str, Family] = {
    "llama": LLAMA,
    "smollm3": replace(LLAMA, tied=True),
    "granite": LLAMA,
    "granitemoe": replace(LLAMA, mlp_bias=False),
    "ernie4_5": Family(
        qkv_bias=("use_bias", False), output_bias=("use_bias", False), mlp_bias=("use_bias", False), tied=True
    ),
    "exaone4": Family(
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm="head",
        window="pattern",
        window_period=4,
    ),
    "seed_oss": Family(qkv_bias=("attention_bias", True), output_bias=("attention_out_bias", False)),
    "minimax_m2": Family(qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="full"),
    "ministral3": Family(qkv_bias=False, output_bias=False, mlp_bias=False, window="all"),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "ministral": _MISTRAL,
    "qwen2": _QWEN,
    "qwen2_moe": replace(_QWEN, qkv_bias=("qkv_bias", True)),
    "qwen2_vl": _QWEN,
    "qwen2_vl_text": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen2_5_vl_text": _QWEN,
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, defaults={}),
    "qwen3_vl_text": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms_per_layer=4, window="alternate"),
    "gemma3_text": _GEMMA3,
    "gemma3": _GEMMA3,
    "olmo": Family(mlp_bias=False, norm="none"),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, window="pattern", window_period=4),
    "olmoe": _OLMO2,
    "cohere": _COHERE,
    "cohere2": replace(_COHERE, window="pattern", window_period=4),
    "phi": Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        mlp=("fc1", "fc2"),
        gated=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm="layer",
        norms_per_layer=1,
    ),
    "phi3": Family(
        attention=("qkv_proj", "o_proj"),
        mlp=("gate_up_proj", "down_proj"),
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        window="all",
    ),
    "phimoe": Family(mlp_bias=False, norm="layer", head_bias=("lm_head_bias", False), window="all"),
    "glm": Family(
        mlp=("gate_up_proj", "down_proj"), qkv_bias=("attention_bias", True), output_bias=False, mlp_bias=False
    ),
    "glm4": Family(mlp=("gate_up_proj", "down_proj"), output_bias=False, mlp_bias=False, norms_per_layer=4),
    "stablelm": Family(qkv_bias=("use_qkv_bias", False), output_bias=False, mlp_bias=False, norm="layer"),
    "nemotron": Family(mlp=("up_proj", "down_proj"), gated=False, norm="layer"),
    "starcoder2": Family(
        mlp=("c_fc", "c_proj"),
        gated=False,
        qkv_bias=("use_bias", True),
        output_bias=("use_bias", True),
        mlp_bias=("use_bias", True),
        norm="layer",
        tied=True,
        window="all",
    ),
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        qkv_bias=False,
        window="listed",
    ),
    "gptj": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc_in", "fc_out"),
        gated=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=True,
        head_bias=True,
        norm="layer",
        norms_per_layer=1,
        ffn_factor=4,
    ),
    "gpt_neox": _NEOX,
    "bloom": replace(_NEOX, qkv_bias=True, output_bias=True, has_embedding_norm=True, tied=True),
    "falcon": replace(
        _NEOX, qkv_bias=("bias", False), output_bias=("bias", False), mlp_bias=("bias", False), tied=True
    ),
    "mpt": Family(
        attention=("Wqkv", "out_proj"),
        mlp=("up_proj", "down_proj"),
        gated=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        norm="layer_without_bias",
        tied=True,
        ffn_factor=4,
    ),
    "opt": Family(
        attention=("q_proj", "k_proj", "v_proj", "out_proj"),
        mlp=("fc1", "fc2"),
        gated=False,
        qkv_bias=("enable_bias", True),
        output_bias=("enable_bias", True),
        mlp_bias=("enable_bias", True),
        norm="layer",
        learned_positions=2,
        tied=True,
    ),
    "gpt_oss": Family(
        qkv_bias=("attention_bias", True),
        output_bias=("attention_bias", True),
        mlp_bias=True,
        router_bias=True,
        has_sinks=True,
        window="alternate",
        defaults={"head_dim": 64},
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_k2": _DEEPSEEK,
    "mamba": _MAMBA,
    "falcon_mamba": _MAMBA,
    "mamba2": replace(_MAMBA, tied=False),
    "jamba": Family(qkv_bias=False, output_bias=False, mlp_bias=False, defaults={"num_key_value_heads": 8}),
}
"""By the configuration's model_type."""

STATE_MODELS = ("mamba", "falcon_mamba", "mamba2")
"""Families in which every layer keeps a state and none attends."""

NOT_DECODERS = frozenset(
    """bert roberta xlm-roberta distilbert albert electra deberta deberta-v2 modernbert mpnet camembert ernie
    esm longformer big_bird nystromformer convbert funnel xlnet t5 mt5 umt5 longt5 switch_transformers bart
    mbart pegasus marian m2m_100 led prophetnet blenderbot whisper vit clip siglip dinov2 wav2vec2 hubert
    nomic_bert eurobert""".split()
)
"""Model types with no decoder that reads a prompt left of its text: encoders, and encoders with a decoder."""
