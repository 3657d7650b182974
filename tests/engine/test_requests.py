"""Every field of a request is checked; the message names field and value."""

import math
import re

import pytest
import torch

from foreword.core.compile import compile
from foreword.core.prompt import KVPrefix, SoftPrompt
from foreword.core.template import TaskTemplate
from foreword.engine.engine import Engine
from foreword.engine.render import check_fields
from foreword.engine.request import Request
from foreword.errors import BadRequest, ConfigError, IncompatibleModel, NotFound
from tests.engine.cases import engine_for
from tests.tiny import tiny

WRONG = [
    ({}, "exactly one of prompt, messages and prompt_ids must be given, found none"),
    ({"prompt": "a", "prompt_ids": [1]}, "found prompt and prompt_ids"),
    ({"prompt": 5}, "prompt must be a text, found 5"),
    ({"prompt_ids": []}, "prompt_ids is an empty list"),
    ({"prompt_ids": "12"}, "prompt_ids must be a list of token ids, found str"),
    ({"prompt_ids": [5, 97]}, r"prompt_ids[1] is 97, the base's vocabulary has 97 tokens"),
    ({"prompt_ids": [-1]}, r"prompt_ids[0] is -1"),
    ({"prompt_ids": [5, True]}, r"prompt_ids[1] must be an integer, found True"),
    ({"prompt_ids": [1.0]}, r"prompt_ids[0] must be an integer, found 1.0"),
    ({"prompt_ids": [5], "prefix": 3}, "prefix must be a text, found 3"),
    ({"prompt_ids": [5], "max_tokens": 0}, "max_tokens is 0, it must be at least 1"),
    ({"prompt_ids": [5], "max_tokens": "7"}, "max_tokens must be an integer, found '7'"),
    ({"prompt_ids": [5], "max_tokens": 7.0}, "max_tokens must be an integer, found 7.0"),
    ({"prompt_ids": [5], "temperature": -0.5}, "temperature is -0.5, it must be at least 0"),
    ({"prompt_ids": [5], "temperature": math.nan}, "temperature is nan"),
    ({"prompt_ids": [5], "temperature": math.inf}, "temperature is inf"),
    ({"prompt_ids": [5], "temperature": None}, "temperature must be a number, found None"),
    ({"prompt_ids": [5], "top_p": 0.0}, "top_p is 0.0, it must be above 0 and at most 1"),
    ({"prompt_ids": [5], "top_p": 1.5}, "top_p is 1.5, it must be above 0 and at most 1"),
    ({"prompt_ids": [5], "top_k": -1}, "top_k is -1, it must be at least 0"),
    ({"prompt_ids": [5], "seed": 1.5}, "seed must be an integer, found 1.5"),
    ({"prompt_ids": [5], "seed": 2**64}, "seed is 18446744073709551616"),
    ({"prompt_ids": [5], "repetition_penalty": 0}, "repetition_penalty is 0, it must be above 0"),
    ({"prompt_ids": [5], "presence_penalty": math.inf}, "presence_penalty is inf, it must be finite"),
    ({"prompt_ids": [5], "frequency_penalty": "x"}, "frequency_penalty must be a number, found 'x'"),
    ({"prompt_ids": [5], "n": 0}, "n is 0, it must be at least 1"),
    ({"prompt_ids": [5], "n": 300}, "n is 300, the queue takes 256"),
    ({"prompt_ids": [5], "logprobs": -1}, "logprobs is -1, it must be at least 0 and at most 1000"),
    ({"prompt_ids": [5], "ignore_eos": "no"}, "ignore_eos must be true or false, found 'no'"),
    ({"prompt_ids": [5], "stop": "end"}, "stop must be a list of texts, found 'end'"),
    ({"prompt_ids": [5], "stop": [""]}, "stop holds ''"),
    ({"prompt_ids": [5], "stop": ["x"]}, "stop needs a tokenizer"),
    ({"prompt_ids": [5], "choices": []}, "choices is an empty list"),
    ({"prompt_ids": [5], "choices": ["a", 2]}, "choices holds 2"),
    ({"prompt_ids": [5], "choices": ["a"]}, "choices needs a tokenizer"),
    ({"prompt_ids": [5], "choices": ["a"], "stop": ["b"]}, r"stop is ['b']: it cannot be combined with choices"),
    ({"prompt_ids": [5], "choices": ["a"], "allowed_ids": [3]}, r"allowed_ids is [3]: it cannot be combined"),
    ({"prompt_ids": [5], "choices": ["a"], "ignore_eos": True}, "ignore_eos is True: it cannot be combined"),
    ({"prompt_ids": [5], "allowed_ids": []}, "allowed_ids is an empty list"),
    ({"prompt_ids": [5], "allowed_ids": [3, 97]}, r"allowed_ids[1] is 97"),
    ({"messages": []}, "messages must be a list with at least one message"),
    ({"messages": [{"role": "user"}]}, r"messages[0].content must be a text, found None"),
    ({"messages": ["hello"]}, r"messages[0] must have a role and a content, found 'hello'"),
    ({"messages": [{"role": "user", "content": "a"}]}, "prompt or messages needs a tokenizer"),
    ({"prompt": "hello"}, "prompt or messages needs a tokenizer"),
]


@pytest.fixture(scope="module")
def engine():
    return engine_for("llama")


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_field(engine, fields, message):
    with pytest.raises(BadRequest, match=re.escape(message)):
        engine.submit(Request(**fields), print)
    with pytest.raises(BadRequest, match=r"^request 1: .*" + re.escape(message)):
        engine.generate([Request(prompt_ids=[5]), Request(**fields)])
    assert not engine._loop.has_work


def test_extreme_but_right_fields_pass():
    check_fields(
        Request(prompt_ids=(0, 96), top_p=1, temperature=0, seed=-(2**63), max_tokens=10**9, allowed_ids=range(5)), 97
    )


def test_unknown_prefix_names_the_near_ones(engine):
    with pytest.raises(NotFound, match="no prefix 'promt'") as caught:
        engine.generate([Request(prompt_ids=[5], prefix="promt")])
    assert "prompt" in caught.value.hint
    assert "request 0" in caught.value.message
    with pytest.raises(NotFound):
        engine.remove_prefix("promt")


def test_too_long_for_the_base_names_both_numbers(engine):
    with pytest.raises(
        BadRequest, match=r"prefix 7 \+ prompt 200 \+ max_tokens 50 = 257 positions, the base takes 256"
    ):
        engine.submit(Request(prompt_ids=[5] * 200, prefix="prompt", max_tokens=50), print)


def test_too_long_for_the_pool_names_both_numbers():
    engine = Engine(tiny("bloom"), kv_memory=3 * 64 * 1024 * 2, block_size=16)
    blocks = engine.stats().blocks_total
    longest = Request(prompt_ids=[5] * (16 * blocks - 4), max_tokens=4)
    assert engine.generate([longest])[0].token_ids
    with pytest.raises(BadRequest, match=f"need {blocks + 1} blocks of 16, the pool has {blocks}"):
        engine.generate([Request(prompt_ids=[5] * (16 * blocks - 4), max_tokens=5)])
    with pytest.raises(BadRequest, match=f"need {blocks + 1} blocks"):
        engine.generate([Request(prompt_ids=[5] * (16 * blocks - 4), max_tokens=4, n=2)])


def test_default_limits():
    base = tiny("llama")
    engine = Engine(base, kv_memory="2MiB")
    prefix = compile(base, SoftPrompt(torch.randn(3, 64)))
    limited = KVPrefix(prefix.keys, prefix.values, digest="x", max_new_tokens=5)
    engine.add_prefix("limited", limited)
    engine.add_prefix("free", prefix)
    for name, count in ((None, 16), ("free", 16), ("limited", 5)):
        output = engine.generate([Request(prompt_ids=[5, 6], prefix=name, ignore_eos=True)])[0]
        assert len(output.token_ids) == count
    output = engine.generate([Request(prompt_ids=[5, 6], prefix="limited", ignore_eos=True, max_tokens=7)])[0]
    assert len(output.token_ids) == 7


def test_prefixes_that_cannot_be_held():
    base = tiny("llama")
    small = Engine(base, kv_memory=768 * 4 * 3 * 2, block_size=4)
    prefix = compile(base, SoftPrompt(torch.randn(9, 64)))
    with pytest.raises(ConfigError, match="need 4 blocks of 4 positions, the pool has 3"):
        small.add_prefix("big", prefix)
    window = Engine(tiny("mistral-window"), kv_memory="1MiB")
    wide = compile(base, SoftPrompt(torch.randn(30, 64)))
    with pytest.raises(IncompatibleModel, match="sliding window of 24"):
        window.add_prefix("wide", wide)
    short = KVPrefix(prefix.keys[:2], prefix.values[:2], digest="")
    with pytest.raises(IncompatibleModel, match="keys of 2 layers, this base has 3"):
        small.add_prefix("short", short)
    slots = KVPrefix(prefix.keys, prefix.values, digest="", template=TaskTemplate("{soft:9}{input}{soft:2}"))
    with pytest.raises(IncompatibleModel, match="has 0 vectors for slots behind the text, its template has 2"):
        Engine(base, kv_memory="1MiB").add_prefix("slots", slots)


@pytest.mark.parametrize("name", ["block_size", "max_batch", "chunk_tokens", "max_queue"])
def test_sizes_of_an_engine(name):
    with pytest.raises(ConfigError, match=f"{name} is 0, it must be at least 1"):
        Engine(tiny("llama"), **{name: 0})


def test_too_little_memory():
    with pytest.raises(ConfigError, match="half of kv_memory 1000 bytes holds no block of 16 positions"):
        Engine(tiny("llama"), kv_memory=1000)
