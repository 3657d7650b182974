"""What a base is: shapes read from its layers, what is refused, and that freezing is complete."""

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM

from foreword.core import model as core_model
from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.core.model import FrozenModel, load_base
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.core.spec import ModelSpec
from foreword.errors import ConfigError, IncompatibleModel
from tests.bundled import BASE
from tests.tiny import COMMON, NAMES, tiny

MLA = {
    **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


def built(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_and_shapes_are_those_of_the_cache(name):
    base = tiny(name)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    cache = compile(base, SoftPrompt(torch.zeros(4, base.spec.embed_size))).cache()
    for layer, spec in zip(cache.layers, base.spec.layers, strict=True):
        assert layer.keys.shape == (1, spec.num_kv_heads, 4, spec.head_dim)
        assert layer.values.shape == (1, spec.num_kv_heads, 4, spec.value_dim)
    assert ModelSpec.from_json(base.spec.to_json()) == base.spec
    assert base.spec.kv_bytes(3, 4) == sum(
        3 * 4 * s.num_kv_heads * (s.head_dim + s.value_dim) for s in base.spec.layers
    )


def test_head_size_and_heads_come_from_the_layer():
    assert {(s.num_kv_heads, s.head_dim) for s in tiny("llama-head-dim").spec.layers} == {(2, 24)}
    assert {(s.num_kv_heads, s.head_dim) for s in tiny("falcon").spec.layers} == {(1, 16)}
    assert {(s.num_kv_heads, s.head_dim) for s in tiny("qwen3").spec.layers} == {(2, 32)}


def test_windows_are_known_by_layer():
    assert [layer.window for layer in tiny("mistral-window").spec.layers] == [24] * 3
    assert {layer.window for layer in tiny("gemma2").spec.layers} == {24, None}
    assert {layer.window for layer in tiny("mistral").spec.layers} == {None}


@pytest.mark.parametrize("kind", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gemma3"])
def test_a_window_that_cannot_hold_the_prefix_is_refused_naming_the_layer(name, kind):
    base = tiny(name)
    spec = base.spec
    first = next(index for index, layer in enumerate(spec.layers) if layer.window)
    made = {
        "prompt": lambda num: SoftPrompt(torch.zeros(num, spec.embed_size)),
        "prefix": lambda num: SoftPrefix(torch.zeros(spec.num_layers, num, spec.hidden_size)),
        "kv": lambda num: SoftKV(
            tuple(torch.zeros(layer.num_kv_heads, num, layer.head_dim) for layer in spec.layers),
            tuple(torch.zeros(layer.num_kv_heads, num, layer.value_dim) for layer in spec.layers),
        ),
    }[kind]
    with pytest.raises(IncompatibleModel, match=rf"layer {first} attends to a sliding window of 24 .* takes 24"):
        compile(base, made(24))
    assert compile(base, made(23)).num_positions == 23


def test_more_positions_than_the_base_has_are_refused():
    with pytest.raises(IncompatibleModel, match="takes 256 positions"):
        compile(tiny("gpt2"), SoftPrompt(torch.zeros(256, 64)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: tf.DeepseekV3Config(**MLA), r"layer 0 of deepseek_v3 caches an MLA latent of 16"),
        (lambda: tf.MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2), r"layer 0 of mamba"),
        (
            lambda: tf.JambaConfig(
                **COMMON, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
            ),
            r"layer 0 of jamba",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_layers_without_plain_keys_and_values_are_refused_by_name(config, message):
    with pytest.raises(IncompatibleModel, match=message):
        FrozenModel(built(config()))


def test_vectors_of_a_wrong_shape_are_refused_with_both_shapes():
    base = tiny("llama")
    with pytest.raises(IncompatibleModel, match=r"\[\[4, 63\]\], this base needs \[\[4, 64\]\]"):
        compile(base, SoftPrompt(torch.zeros(4, 63)))
    with pytest.raises(IncompatibleModel, match=r"\[\[2, 4, 64\]\], this base needs \[\[3, 4, 64\]\]"):
        compile(base, SoftPrefix(torch.zeros(2, 4, 64)))


def test_what_cannot_be_loaded_says_so(tmp_path):
    with pytest.raises(ConfigError, match="no base model can be loaded from folder '"):
        load_base(str(tmp_path))
    with pytest.raises(ConfigError, match="is not one of auto"):
        load_base(str(BASE), dtype="int3")


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_static_cache_gives_the_dynamic_caches_logits(name):
    base = tiny(name)
    prefix = compile(base, SoftPrompt(torch.randn(6, base.spec.embed_size)))
    ids = torch.tensor([[5, 8, 13, 21]])
    positions = torch.arange(6, 10)[None]
    dynamic = base.run(ids=ids, positions=positions, cache=prefix.cache(), mask=torch.ones(1, 10, dtype=torch.long))
    static = prefix.cache(kind="static", max_len=16, config=base.config)
    mask = torch.cat([torch.ones(1, 10, dtype=torch.long), torch.zeros(1, 6, dtype=torch.long)], dim=1)
    found = base.run(ids=ids, positions=positions, cache=static, mask=mask)
    torch.testing.assert_close(found, dynamic, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dynamic, forward(base, ids, prefix), rtol=1e-4, atol=1e-4)


def test_forward_takes_ragged_rows_and_no_prefix():
    base = tiny("qwen3")
    rows = [[3, 4, 5], [7], [9, 8]]
    together = forward(base, rows)
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index, : len(row)], forward(base, [row])[0], rtol=1e-4, atol=1e-4)


def test_auto_is_float32_where_the_cpu_has_no_16_bit_products(monkeypatch):
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(core_model, "has_fast_products", lambda dtype, fast=fast: fast or dtype == torch.float32)
        for dtype in ("auto", "checkpoint", "bfloat16", "float32"):
            found[fast, dtype] = load_base(str(BASE), dtype=dtype).dtype
    assert found[True, "auto"] == found[True, "checkpoint"] == found[False, "checkpoint"] == torch.bfloat16
    assert found[False, "bfloat16"] == torch.bfloat16
    assert found[False, "auto"] == found[True, "float32"] == torch.float32
