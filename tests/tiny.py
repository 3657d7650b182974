"""Random tiny models of every supported architecture, built in code."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from foreword.core.model import FrozenModel

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_pdrop": 0.1,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}

CONFIGS: dict[str, Any] = {
    "llama": lambda: tf.LlamaConfig(**COMMON),
    "llama-head-dim": lambda: tf.LlamaConfig(**COMMON, head_dim=24),
    "qwen2": lambda: tf.Qwen2Config(**COMMON),
    "qwen3": lambda: tf.Qwen3Config(**COMMON, head_dim=32),
    "qwen3-moe": lambda: tf.Qwen3MoeConfig(**COMMON, head_dim=32, **MOE),
    "mistral": lambda: tf.MistralConfig(**COMMON, sliding_window=None),
    "mistral-window": lambda: tf.MistralConfig(**COMMON, sliding_window=24),
    "gemma2": lambda: tf.Gemma2Config(**COMMON, head_dim=16, sliding_window=24),
    "gemma3": lambda: tf.Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=24),
    "phi3": lambda: tf.Phi3Config(**COMMON),
    "olmo2": lambda: tf.Olmo2Config(**COMMON),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    "opt": lambda: tf.OPTConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
        ffn_dim=96,
        word_embed_proj_dim=64,
    ),
    "gpt2": lambda: tf.GPT2Config(**GPT2),
    "bloom": lambda: tf.BloomConfig(vocab_size=97, hidden_size=64, n_layer=3, n_head=4),
    "falcon": lambda: tf.FalconConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")}
    ),
    "falcon-alibi": lambda: tf.FalconConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
        alibi=True,
        multi_query=False,
    ),
    "granite": lambda: tf.GraniteConfig(**COMMON, embedding_multiplier=3.0, logits_scaling=2.0),
    "cohere": lambda: tf.CohereConfig(**COMMON, logit_scale=0.25),
    "starcoder2": lambda: tf.Starcoder2Config(**COMMON, sliding_window=None),
    "smollm3": lambda: tf.SmolLM3Config(**COMMON),
}
NAMES = sorted(CONFIGS)
SIX = ["llama", "qwen3", "gemma3", "gpt2", "bloom", "mistral-window", "qwen3-moe", "opt"]
"""A cross-section for contracts that cost more: RoPE, qk-norm, scaled embeddings, learned positions, ALiBi, windows."""


@cache
def tiny(name: str, dtype: str = "float32", seed: int = 0, vocab_size: int = 97, tokenizer: Any = None) -> FrozenModel:
    """Return a frozen tiny model; the same object for the same arguments."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.vocab_size = vocab_size
    model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
    with torch.no_grad():  # random weights of std 0.02 hardly attend: make differences visible
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return FrozenModel(model, tokenizer)
