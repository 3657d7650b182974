"""Contracts 2 and 3: however rows are mixed, cut and cached, each gets the tokens that it gets alone."""

import pytest
import torch

from foreword.core.compile import compile
from foreword.core.prompt import SoftPrompt
from foreword.engine.request import Request
from tests.engine.cases import engine_for, expected_greedy, ids, mixed, prefixes, tokens
from tests.tiny import NAMES, SIX, tiny

SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 11}


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_the_argmax_of_core_forward(name):
    engine = engine_for(name)
    requests = mixed(ignore_eos=True)
    for request, output in zip(requests, engine.generate(requests), strict=True):
        assert len(output.token_ids) == request.max_tokens
        assert list(output.token_ids) == expected_greedy(engine, request, output.token_ids)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SIX)
def test_batch_equals_single(name, options):
    engine = engine_for(name)
    requests = mixed(**options)
    together = tokens(engine.generate(requests))
    backwards = tokens(engine.generate(requests[::-1]))[::-1]
    alone = [tokens(engine.generate([request]))[0] for request in requests]
    assert together == alone
    assert backwards == alone


@pytest.mark.parametrize("name", SIX)
def test_cut_prompts_equal_whole_ones(name):
    requests = mixed(ignore_eos=True)
    whole = tokens(engine_for(name, chunk_tokens=512).generate(requests))
    for chunk_tokens in (1, 5, 16):
        assert tokens(engine_for(name, chunk_tokens=chunk_tokens).generate(requests)) == whole


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_size_does_not_matter(block_size):
    requests = mixed(ignore_eos=True)
    engine = engine_for("qwen3", block_size=block_size)
    assert tokens(engine.generate(requests)) == tokens(engine_for("qwen3").generate(requests))


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_resident_prefix_equals_one_loaded_again(name):
    requests = mixed(ignore_eos=True)
    engine = engine_for(name)
    first = tokens(engine.generate(requests))
    assert engine.stats().prefixes_resident == 4
    assert tokens(engine.generate(requests)) == first  # from resident blocks
    for key, prefix in prefixes(engine.base).items():
        engine.add_prefix(key, prefix)
    assert engine.stats().prefixes_resident == 0
    assert tokens(engine.generate(requests)) == first


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom"])
def test_decode_window_equals_gathering_each_step(name):
    requests = mixed(ignore_eos=True)
    expected = tokens(engine_for(name).generate(requests))
    for num_positions in (0, 30, 90):  # none fit, few fit, and only some of the time
        engine = engine_for(name)
        engine._loop.runner.window.num_positions = num_positions
        assert tokens(engine.generate(requests)) == expected


@pytest.mark.parametrize("name", ["llama", "mistral-window", "opt"])
def test_window_is_gathered_anew_when_its_columns_are_used_up(name):
    engine = engine_for(name)
    requests = [
        Request(prompt_ids=ids(4 + i, i), prefix=["kv", None, "prompt"][i], max_tokens=90 - 25 * i, ignore_eos=True)
        for i in range(3)
    ]
    for request, output in zip(requests, engine.generate(requests), strict=True):
        assert list(output.token_ids) == expected_greedy(engine, request, output.token_ids)


@pytest.mark.parametrize("name", SIX)
def test_second_turn_equals_one_long_turn(name):
    engine = engine_for(name)
    for prefix in (None, "prompt", "kv"):
        first = engine.generate([Request(prompt_ids=ids(6, 1), prefix=prefix, max_tokens=5, ignore_eos=True)])[0]
        history = [*ids(6, 1), *first.token_ids, *ids(4, 2)]
        second = Request(prompt_ids=history, prefix=prefix, max_tokens=5, ignore_eos=True)
        answer = engine.generate([second])[0].token_ids
        assert list(answer) == expected_greedy(engine, second, answer)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("name", SIX)
def test_transformers_generate_on_the_prefix_cache_gives_the_same_tokens(name, kind):
    engine = engine_for(name)
    base = engine.base
    prompt = ids(6, 3)
    for key in ("prompt", "prefix"):
        prefix = engine.prefixes[key]
        output = engine.generate([Request(prompt_ids=prompt, prefix=key, max_tokens=8, ignore_eos=True)])[0]
        num = prefix.num_positions
        cache = prefix.cache(kind=kind, config=base.model.config, max_len=num + len(prompt) + 8)
        whole = torch.tensor([[0] * num + prompt])
        found = base.model.generate(
            whole,
            attention_mask=torch.ones_like(whole),
            past_key_values=cache,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tuple(found[0, whole.shape[1] :].tolist()) == output.token_ids


def test_completions_of_one_request_share_the_prompt_and_draw_apart():
    engine = engine_for("llama", max_batch=4)
    request = Request(prompt_ids=ids(19, 4), prefix="blocked", max_tokens=9, n=6, temperature=1.0, seed=3)
    several = engine.generate([request])[0]
    assert len(set(several.completions)) == 6
    one = engine.generate([Request(prompt_ids=ids(19, 4), prefix="blocked", max_tokens=9, temperature=1.0, seed=3)])
    assert one[0].completions == several.completions[:1]
    apart = engine_for("llama", chunk_tokens=7).generate([request])[0]
    assert apart == several


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes_run(dtype):
    base = tiny("llama", dtype)
    engine = engine_for(base)
    requests = mixed(ignore_eos=True)
    outputs = engine.generate(requests)
    if dtype == "float64":
        for request, output in zip(requests, outputs, strict=True):
            assert list(output.token_ids) == expected_greedy(engine, request, output.token_ids)


def test_base_is_untouched():
    base = tiny("llama")
    before = base.checksum()
    engine_for(base).generate(mixed(**SAMPLED))
    assert base.checksum() == before


def test_prefix_on_a_base_of_another_shape_is_refused():
    engine = engine_for("llama")
    other = tiny("llama-head-dim")
    prefix = compile(other, SoftPrompt(torch.randn(4, 64)))
    with pytest.raises(Exception, match=r"keys of shape \(2, 4, 24\) in layer 0, this base needs \(2, 4, 16\)"):
        engine.add_prefix("other", prefix)
