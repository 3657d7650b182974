"""Small configurations of families beside those of tests/tiny.py, for shapes and costs."""

import transformers as tf

from tests.tiny import COMMON, CONFIGS

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
DEEPSEEK = {**LATENT, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1}
GPT = {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
EIGHT = {**COMMON, "num_hidden_layers": 8}
MORE = {
    "cohere-qk-norm": lambda: tf.CohereConfig(**COMMON, use_qk_norm=True),
    "cohere2": lambda: tf.Cohere2Config(**EIGHT, sliding_window=24),
    "deepseek-v2": lambda: tf.DeepseekV2Config(**COMMON, **DEEPSEEK, n_shared_experts=2, first_k_dense_replace=1),
    "deepseek-v2-lite": lambda: tf.DeepseekV2Config(
        **COMMON, **{**DEEPSEEK, "q_lora_rank": None}, n_shared_experts=2, first_k_dense_replace=1
    ),
    "deepseek-v3": lambda: tf.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4}, **DEEPSEEK, n_shared_experts=1, first_k_dense_replace=1, topk_group=1
    ),
    "ernie4_5": lambda: tf.Ernie4_5Config(**COMMON, head_dim=16),
    "exaone4": lambda: tf.Exaone4Config(**EIGHT, sliding_window=24),
    "falcon-new": lambda: tf.FalconConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon-serial": lambda: tf.FalconConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, parallel_attn=False, bias=True
    ),
    "gemma": lambda: tf.GemmaConfig(**COMMON, head_dim=16),
    "gemma3-eight": lambda: tf.Gemma3TextConfig(**EIGHT, head_dim=16, sliding_window=24),
    "glm": lambda: tf.GlmConfig(**COMMON, head_dim=16),
    "glm4": lambda: tf.Glm4Config(**COMMON, head_dim=16),
    "gpt-bigcode": lambda: tf.GPTBigCodeConfig(**GPT),
    "gpt-neo": lambda: tf.GPTNeoConfig(
        vocab_size=97,
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=24,
        max_position_embeddings=256,
    ),
    "gpt-oss": lambda: tf.GptOssConfig(**COMMON, **EXPERTS, head_dim=16, sliding_window=24),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=8),
    "granite-biased": lambda: tf.GraniteConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "granite-moe": lambda: tf.GraniteMoeConfig(**COMMON, **EXPERTS),
    "jamba": lambda: tf.JambaConfig(**EIGHT, num_experts=4, num_experts_per_tok=2, mamba_d_state=8),
    "llama-tied": lambda: tf.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "mamba": lambda: tf.MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=3, state_size=8),
    "mamba2": lambda: tf.Mamba2Config(
        vocab_size=97, hidden_size=64, num_hidden_layers=3, state_size=8, num_heads=8, head_dim=16, n_groups=1
    ),
    "minimax-m2": lambda: tf.MiniMaxM2Config(**COMMON, **EXPERTS, head_dim=16),
    "ministral3": lambda: tf.Ministral3Config(**COMMON, head_dim=16),
    "mixtral": lambda: tf.MixtralConfig(**COMMON, **EXPERTS),
    "mpt": lambda: tf.MptConfig(vocab_size=97, d_model=64, n_layers=3, n_heads=4),
    "nemotron": lambda: tf.NemotronConfig(**COMMON, head_dim=16),
    "olmo": lambda: tf.OlmoConfig(**COMMON),
    "olmo3": lambda: tf.Olmo3Config(**EIGHT, sliding_window=24),
    "olmoe": lambda: tf.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "opt-projected": lambda: tf.OPTConfig(
        vocab_size=97,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        do_layer_norm_before=False,
        max_position_embeddings=256,
    ),
    "phi": lambda: tf.PhiConfig(**COMMON),
    "phimoe": lambda: tf.PhimoeConfig(**COMMON, **EXPERTS),
    "qwen2-late": lambda: tf.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=24, max_window_layers=1),
    "qwen2-moe": lambda: tf.Qwen2MoeConfig(
        **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48
    ),
    "qwen3-moe-mixed": lambda: tf.Qwen3MoeConfig(
        **EIGHT,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "seed-oss": lambda: tf.SeedOssConfig(**COMMON, head_dim=16),
    "stablelm": lambda: tf.StableLmConfig(**COMMON, use_qkv_bias=True),
}


def llama(**changes):
    return {**CONFIGS["llama"]().to_dict(), **changes}
