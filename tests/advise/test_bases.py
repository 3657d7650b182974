"""Shapes from configurations against real models: parameters, linear maps, keys and values, windows."""

import json
from collections import Counter

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from foreword.advise.bases.find import KNOWN, find_base, from_config, from_folder, from_numbers
from foreword.core.model import FrozenModel
from foreword.errors import ConfigError
from tests.advise.configs import MORE, llama
from tests.tiny import COMMON, CONFIGS, NAMES, tiny

ALL = {**CONFIGS, **MORE}
WITH_KV = [
    "cohere2", "gemma3-eight", "gpt-bigcode", "gpt-oss", "mixtral", "mpt", "olmo3", "opt-projected", "qwen2-late",
]  # fmt: skip


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def linear_maps(model):
    """(name, in, out) of every linear map outside the output head and the routers, with how often it occurs."""
    found = Counter()
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Linear | Conv1D) or name in ("lm_head", "router", "gate", "shared_expert_gate"):
            continue
        sizes = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        found[(name, *sizes)] += 1
    return found


@pytest.mark.parametrize("name", sorted(ALL))
def test_parameters_and_linear_maps_are_those_of_the_real_model(name):
    config = ALL[name]()
    model = on_meta(config)
    for written in (config.to_dict(), json.loads(config.to_json_string())):
        base = from_config(written, name)
        assert base.num_parameters == sum(parameter.numel() for parameter in model.parameters())
        ours = Counter()
        for linear in base.linears:
            if linear.part not in ("expert", "router"):
                ours[(linear.name, linear.in_size, linear.out_size)] += linear.count
        assert ours == linear_maps(model)
        assert not base.assumed or "repeats them" in base.assumed[0]


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3", "granite-moe", "jamba", "olmoe"])
def test_experts_are_counted_and_only_picked_ones_are_active(name):
    config = ALL[name]()
    base, model = from_config(config.to_dict(), name), on_meta(config)
    experts = sum(p.numel() for path, p in model.named_parameters() if ".experts." in path)
    assert sum(linear.num_parameters for linear in base.linears if linear.part == "expert") == experts
    assert base.is_moe
    assert base.num_parameters - base.num_active_parameters == experts // 2  # 2 of 4 are picked


def check_layers(base, spec):
    assert [layer.kind for layer in base.layers] == ["kv"] * spec.num_layers
    assert [(x.num_kv_heads, x.head_dim, x.value_dim, x.window) for x in base.layers] == [
        (x.num_kv_heads, x.head_dim, x.value_dim, x.window) for x in spec.layers
    ]
    assert (base.hidden_size, base.embed_size, base.vocab_size) == (spec.hidden_size, spec.embed_size, spec.vocab_size)
    assert base.kv_bytes_per_token(2) == spec.kv_bytes(1, 2)
    assert base.num_parameters == spec.num_parameters


@pytest.mark.parametrize("name", NAMES)
def test_layers_are_those_of_the_loaded_model(name):
    base, spec = from_config(CONFIGS[name]().to_dict(), name), tiny(name).spec
    check_layers(base, spec)
    assert base.context_tokens == (None if name == "falcon-alibi" else spec.max_positions)


@pytest.mark.parametrize("name", WITH_KV)
def test_layers_are_those_of_a_model_loaded_for_this(name):
    config = MORE[name]()
    check_layers(from_config(config.to_dict(), name), FrozenModel(AutoModelForCausalLM.from_config(config)).spec)


@pytest.mark.parametrize(
    ("name", "key", "windows"),
    [
        ("gemma2", "layer_types", [24, None, 24]),
        ("gemma3-eight", "layer_types", [24] * 5 + [None] + [24] * 2),
        ("cohere2", "layer_types", [24, 24, 24, None] * 2),
        ("olmo3", "layer_types", [24, 24, 24, None] * 2),
        ("gpt-oss", "layer_types", [24, None, 24]),
        ("qwen2-late", "layer_types", [None, 24, 24]),
        ("mistral-window", "layer_types", [24, 24, 24]),
        ("gpt-neo", "attention_layers", [None, 24, None, 24]),
    ],
)
def test_windows_of_older_files_that_name_no_layer_types(name, key, windows):
    config = ALL[name]().to_dict()
    with_types = [layer.window for layer in from_config(config, name).layers]
    config.pop(key, None)
    assert [layer.window for layer in from_config(config, name).layers] == with_types == windows


def test_latents_are_what_mla_layers_keep():
    base = from_config(MORE["deepseek-v3"]().to_dict())
    layer = base.layers[0]
    assert (layer.kind, layer.latent_dim, layer.rope_dim) == ("latent", 16, 8)
    assert (layer.num_kv_heads, layer.head_dim, layer.value_dim) == (4, 24, 12)
    assert base.kv_bytes_per_token(2) == 3 * (16 + 8) * 2
    assert base.first_layer_without_kv() == 0


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_states_are_as_large_as_in_a_real_cache(name):
    config = MORE[name]()
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).cache_params
    states = [held for layer in cache.layers for held in (layer.conv_states, layer.recurrent_states)]
    kept = sum(tensor.numel() for held in states for tensor in held.values())
    base = from_config(config.to_dict())
    assert base.state_bytes(1) == kept
    assert base.kv_bytes_per_token() == 0 and base.num_heads == 0


def test_a_hybrid_has_states_and_keys_and_values():
    base = from_config(MORE["jamba"]().to_dict())
    assert [layer.kind for layer in base.layers] == ["state"] * 4 + ["kv"] + ["state"] * 3
    assert base.first_layer_without_kv() == 0 and len(base.kv_layers) == 1


def test_layers_that_borrow_keys_and_values_hold_none():
    base = from_config({**CONFIGS["llama"]().to_dict(), "num_kv_shared_layers": 1})
    assert [layer.kind for layer in base.layers] == ["kv", "kv", "shared"]
    assert base.kv_bytes_per_token(2) == 2 * 2 * 2 * 16 * 2
    assert any("num_kv_shared_layers" in text for text in base.assumed)


def test_layers_may_differ_in_heads_and_borrow():
    """Gemma 4: full layers have a wider head, the last ones read keys and values of earlier ones."""
    config = tf.Gemma4TextConfig(
        **{**COMMON, "num_hidden_layers": 12}, head_dim=16, global_head_dim=32, sliding_window=24,
        num_kv_shared_layers=6, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values
    real = [tuple(layer.keys.shape[1::2]) for layer in cache.layers if layer.keys is not None]
    older = {**config.to_dict(), "global_head_dim": 32}
    older.pop("per_layer_config")
    for written in (config.to_dict(), older):
        base = from_config(written)
        assert [(layer.num_kv_heads, layer.head_dim) for layer in base.layers if layer.kind == "kv"] == real
        assert [layer.kind for layer in base.layers] == ["kv"] * 6 + ["shared"] * 6
        assert "estimate" in base.assumed[0]


def test_states_of_unknown_kinds_are_found_or_said():
    known = from_config(llama(model_type="new", layer_types=["conv", "full_attention", "mamba"]))
    assert [layer.kind for layer in known.layers] == ["state", "kv", "state"]
    unknown = from_config(llama(model_type="new", mamba_d_state=16))
    assert any("mamba_d_state" in text and "counted" in text for text in unknown.assumed)


def test_lists_of_one_size_are_that_size():
    assert from_config(llama(intermediate_size=[96, 96, 96])).ffn_size == 96
    with pytest.raises(ConfigError, match="intermediate_size"):
        from_config(llama(intermediate_size=[96, 32, 96]))


PUBLISHED = {
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen3-0.6b": 596_049_920,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_bases_have_their_published_parameters(name):
    assert KNOWN[name].num_parameters == PUBLISHED[name] == KNOWN[name].num_active_parameters
    assert not KNOWN[name].assumed


def test_opt_30b_is_near_its_nominal_size():
    assert KNOWN["opt-30b"].num_parameters == pytest.approx(30e9, rel=2e-3)


GPT_OSS_120B = {
    "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "num_attention_heads": 64,
    "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880, "num_local_experts": 128,
    "num_experts_per_tok": 4, "vocab_size": 201088, "sliding_window": 128, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip


def test_quantised_experts_shrink_the_base_and_not_its_count():
    base = from_config(GPT_OSS_120B)
    assert base.num_parameters == 116_829_156_672
    assert base.weight_bits == 4.25 and base.quantised_parts == ("expert",)
    assert base.weight_bytes == pytest.approx(65.2e9, rel=1e-3)  # the published checkpoint is 65.2 GB


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "fp8", "fmt": "e4m3"}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, 8),
    ],
)
def test_weight_bits_of_quantised_bases(settings, bits):
    base, plain = from_config(llama(quantization_config=settings)), from_config(llama())
    assert base.weight_bits == bits
    linear = sum(x.num_parameters for x in base.linears)
    assert base.weight_bytes == plain.weight_bytes - linear * (16 - bits) / 8
    assert base.num_parameters == plain.num_parameters


def test_an_unknown_quantisation_is_taken_as_16_bits_and_said():
    base = from_config(llama(quantization_config={"quant_method": "odd"}))
    assert base.weight_bits == 16 and any("odd" in text for text in base.assumed)


def test_multimodal_configurations_give_their_text_decoder():
    inner = {**CONFIGS["gemma3"]().to_dict(), "vocab_size": 97}
    base = from_config({"model_type": "gemma3", "vision_config": {"hidden_size": 8}, "text_config": inner})
    assert base == from_config(inner, "gemma3")


def test_defaults_of_a_family_are_used_and_listed():
    config = {"model_type": "gemma3", "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    }}  # fmt: skip
    base = from_config(config)
    real = tf.Gemma3TextConfig(**{k: v for k, v in config["text_config"].items() if k != "model_type"})
    check = (base.num_heads, base.num_kv_heads, base.head_dim, base.vocab_size, base.context_tokens)
    assert check == (
        real.num_attention_heads, real.num_key_value_heads, real.head_dim, real.vocab_size,
        real.max_position_embeddings,
    )  # fmt: skip
    assert [layer.window for layer in base.layers].count(None) == real.layer_types.count("full_attention") == 5
    assert any("head_dim = 256" in text for text in base.assumed)


@pytest.mark.parametrize(
    ("name", "config", "key"),
    [("qwen3", tf.Qwen3Config, "head_dim"), ("gemma2", tf.Gemma2Config, "head_dim"),
     ("gpt_oss", tf.GptOssConfig, "head_dim"), ("jamba", tf.JambaConfig, "num_key_value_heads")],
)  # fmt: skip
def test_the_defaults_are_those_of_the_library(name, config, key):
    from foreword.advise.bases.families import FAMILIES

    assert FAMILIES[name].defaults[key] == getattr(config(), key)


def test_an_unknown_model_type_is_llama_like_and_says_so():
    base = from_config(llama(model_type="brand_new"))
    assert base.num_parameters == from_config(llama()).num_parameters
    assert "brand_new" in base.assumed[0] and "estimate" in base.assumed[0]
    windowed = from_config(llama(model_type="brand_new", sliding_window=24))
    assert windowed.window == 24 and any("sliding_window" in text for text in windowed.assumed)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "hidden_size": 64},
        {"model_type": "t5", "is_encoder_decoder": True, "d_model": 64},
        {"model_type": "new_bart", "is_encoder_decoder": True},
        {"model_type": "new_bert", "architectures": ["NewBertForMaskedLM"]},
    ],
)
def test_what_is_no_decoder_is_refused(config):
    with pytest.raises(ConfigError, match="decoder") as caught:
        from_config(config, "it")
    assert "causal language model" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": "four"}, "'four'"),
        ({"layer_types": ["full_attention"]}, "names 1 layers, the model has 3"),
    ],
)
def test_broken_configurations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_config(llama(**changes))


def test_a_folder_needs_its_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(llama()))
    base = from_folder(tmp_path)
    assert base.name == tmp_path.name and base.num_parameters == from_config(llama()).num_parameters
    assert find_base(str(tmp_path)) == base == from_folder(tmp_path / "config.json")


def test_folders_without_a_readable_config_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read") as caught:
        from_folder(tmp_path)
    assert "config.json is enough" in caught.value.hint
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list"):
        from_folder(tmp_path)


def test_names_are_known_or_refused_with_the_cure():
    assert find_base("Qwen/Qwen3-32B") is KNOWN["qwen3-32b"]
    with pytest.raises(ConfigError, match="not downloaded") as caught:
        find_base("qwen3-23b")
    assert "qwen3-32b" in caught.value.hint and "as numbers" in caught.value.hint


QWEN_NUMBERS = {
    "name": "qwen", "num_layers": 64, "hidden_size": 5120, "num_heads": 64, "num_kv_heads": 8, "head_dim": 128,
    "ffn_size": 25600, "vocab_size": 151936,
}  # fmt: skip


def test_numbers_give_the_shapes_of_the_configuration():
    base, real = from_numbers(QWEN_NUMBERS), KNOWN["qwen3-32b"]
    assert find_base(QWEN_NUMBERS) == base
    assert base.layers == real.layers
    assert [(x.in_size, x.out_size, x.count) for x in base.linears] == [
        (x.in_size, x.out_size, x.count) for x in real.linears
    ]
    assert base.num_parameters == real.num_parameters - 64 * 2 * 128  # without the norms of queries and keys
    assert any("gated" in text for text in base.assumed)
    assert from_numbers({**QWEN_NUMBERS, "parameters": 32.8e9}).num_parameters == 32_800_000_000


def test_numbers_may_say_experts_latents_windows_and_bits():
    moe = from_numbers({**QWEN_NUMBERS, "num_experts": 8, "experts_per_token": 2})
    assert moe.num_parameters - moe.num_active_parameters == 6 * 64 * 3 * 5120 * 25600
    latent = from_numbers({**QWEN_NUMBERS, "num_kv_heads": 64, "latent_dim": 512, "rope_dim": 64})
    assert latent.kv_bytes_per_token(2) == 64 * 576 * 2
    windows = from_numbers({**QWEN_NUMBERS, "window": 1024, "window_layers": "alternate"})
    assert [layer.window for layer in windows.layers[:3]] == [1024, None, 1024]
    assert from_numbers({**QWEN_NUMBERS, "window": 1024}).num_full_layers == 0
    small = from_numbers({**QWEN_NUMBERS, "weight_bits": 4})
    assert small.weight_bytes < from_numbers(QWEN_NUMBERS).weight_bytes / 3
    plain = from_numbers({**QWEN_NUMBERS, "gated": False})
    assert from_numbers(QWEN_NUMBERS).num_parameters - plain.num_parameters == 64 * 5120 * 25600 - (2 * 64 + 1) * 5120


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"hiden_size": 1}, "unknown key 'hiden_size'", "hidden_size"),
        ({"num_layers": 0}, "num_layers = 0", ""),
        ({"num_layers": 1.5}, "1.5 is not a whole number", ""),
        ({"num_heads": None}, "num_heads = None", ""),
        ({"layers": 3}, "num_layers is given twice", "Leave one"),
        ({"num_kv_heads": 7}, "64 is not a multiple of num_kv_heads 7", "query heads"),
        ({"num_experts": 8}, "experts_per_token is missing", "router"),
        ({"parameters": 1e9, "active_parameters": 2e9}, "is not between", "Give both"),
        ({"weight_bits": 64}, "more than 32", ""),
        ({"window_layers": "odd"}, "neither 'all' nor 'alternate'", ""),
        ({"gated": "yes"}, "not true or false", ""),
    ],
)
def test_wrong_numbers_are_refused(changes, message, hint):
    with pytest.raises(ConfigError, match=message) as caught:
        from_numbers({**QWEN_NUMBERS, **changes})
    assert hint in caught.value.hint


def test_needed_numbers_are_named():
    with pytest.raises(ConfigError, match="num_heads is missing"):
        from_numbers({"num_layers": 2, "hidden_size": 8})
    with pytest.raises(ConfigError, match="not a multiple of num_heads 3"):
        from_numbers({"num_layers": 2, "hidden_size": 8, "num_heads": 3})
