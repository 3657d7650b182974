"""Costs against real tensors: vectors of this project, compiled prefixes, LoRA and (IA)³ of PEFT."""

import re
import warnings
from collections import Counter

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from foreword.advise.bases.find import from_config
from foreword.advise.cost.hardware import KNOWN as HARDWARE
from foreword.advise.cost.method_cost import Load, method_cost
from foreword.advise.cost.parameters import lora_width
from foreword.core.compile import compile
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from tests.advise.configs import MORE
from tests.tiny import CONFIGS, NAMES, tiny


def cost(method, base, **load):
    return method_cost(method, base, Load(**load), HARDWARE["h100"])


def bytes_of(vectors, itemsize=2):
    return sum(tensor.numel() for tensor in vectors.tensors().values()) * itemsize


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_real_vectors_and_compiled_prefixes(name):
    frozen, num = tiny(name), 5
    base, spec = from_config(CONFIGS[name]().to_dict(), name), tiny(name).spec
    prompt = SoftPrompt(torch.randn(num, spec.embed_size))
    prefix = SoftPrefix(torch.randn(spec.num_layers, num, spec.hidden_size))
    shapes = [(layer.num_kv_heads, num, layer.head_dim) for layer in spec.layers]
    kv = SoftKV(tuple(torch.randn(shape) for shape in shapes), tuple(torch.randn(shape) for shape in shapes))
    for method, vectors in (("prompt", prompt), ("prefix", prefix), ("kv", kv), ("compiled_prompt", prompt)):
        found = cost(method, base, num_vectors=num, input_tokens=8)
        assert found.value("bytes_per_task") == bytes_of(vectors)
        compiled = compile(frozen, vectors)
        assert cost(method, base, num_vectors=num, bytes_per_element=4).value("kv_bytes_per_sequence") == (
            compiled.num_bytes
        )


def count_trained(config, method_config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that GPT-2's maps are transposed
        wrapped = get_peft_model(model, method_config)
    return Counter({name: p.numel() for name, p in wrapped.named_parameters() if p.requires_grad})


def is_on_experts(name):
    return ".experts." in name or re.search(r"\.mlp\.(gate|router)\.|\.router\.", name) is not None


@pytest.mark.parametrize("name", [*NAMES, "mixtral", "gpt-oss", "opt-projected", "jamba", "granite-moe"])
def test_lora_parameters_are_those_of_peft_outside_experts(name):
    config = (CONFIGS.get(name) or MORE[name])()
    base = from_config(config.to_dict(), name)
    real = count_trained(config, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = sum(count for path, count in real.items() if not is_on_experts(path))
    assert cost("lora", base, lora_rank=4).value("trained_parameters") == expected


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("mamba", ["in_proj", "x_proj", "dt_proj"]),
        ("mamba2", ["in_proj"]),
    ],
)
def test_lora_parameters_are_those_of_peft_on_the_maps_that_it_allows(name, maps):
    config = MORE[name]()
    real = count_trained(config, LoraConfig(r=4, target_modules=maps, task_type="CAUSAL_LM"))
    assert cost("lora", from_config(config.to_dict()), lora_rank=4).value("trained_parameters") == real.total()


def test_lora_on_latent_attention_is_that_of_peft():
    """Attention alone: PEFT 0.21 takes the names of DeepSeek's dense and shared maps for its experts."""
    config = MORE["deepseek-v3"]()
    maps = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    real = count_trained(config, LoraConfig(r=4, target_modules=maps, task_type="CAUSAL_LM"))
    assert 4 * lora_width(from_config(config.to_dict()), ("attention",)) == real.total()


IA3_MAPS = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen3": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gemma2": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "starcoder2": (["k_proj", "v_proj", "c_proj"], ["c_proj"]),
}


@pytest.mark.parametrize("name", IA3_MAPS)
def test_ia3_bytes_are_those_of_peft(name):
    targets, feed_forward = IA3_MAPS[name]
    config = CONFIGS[name]()
    real = count_trained(config, IA3Config(target_modules=targets, feedforward_modules=feed_forward))
    assert cost("ia3", from_config(config.to_dict())).value("trained_parameters") == real.total()


def test_full_tuning_trains_what_the_model_has():
    for name in NAMES:
        found = cost("full", from_config(CONFIGS[name]().to_dict()))
        assert found.value("trained_parameters") == tiny(name).spec.num_parameters
