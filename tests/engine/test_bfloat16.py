"""Contracts 2 and 3 in bfloat16: the same distributions in any mix, cut or cached, up to 8 bits of rounding.

Tokens may differ at near ties there, so rows are compared step by step for as long as their tokens agree: every step's
best log-probabilities within a part of their spread.
"""

import dataclasses

import pytest

from foreword.engine.engine import Engine
from tests.engine.cases import mixed, prefixes
from tests.tiny import SIX, tiny

TOP = 12
WITHIN = 0.15
"""Of the spread between the best and the TOP-th log-probability."""


def made(name, **options):
    base = tiny(name, "bfloat16")
    engine = Engine(base, **{"kv_memory": "6MiB", "block_size": 4, "chunk_tokens": 24, **options})
    for key, prefix in prefixes(base).items():
        engine.add_prefix(key, prefix)
    return engine


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        steps = list(zip(one.completions[0].logprobs, other.completions[0].logprobs, strict=True))
        assert steps
        for a, b in steps:
            best, spread = max(b.top.values()), max(b.top.values()) - min(b.top.values())
            shared = a.top.keys() & b.top.keys()
            assert shared and all(abs(a.top[token] - b.top[token]) <= WITHIN * spread for token in shared)
            if a.token_id != b.token_id:  # only ever at a near tie
                assert best - b.top[a.token_id] <= WITHIN * spread
                break


@pytest.mark.parametrize("name", SIX)
def test_batch_single_cut_and_cached_agree(name):
    requests = [dataclasses.replace(request, logprobs=TOP) for request in mixed(ignore_eos=True)]
    engine = made(name)
    alone = [engine.generate([request])[0] for request in requests]
    assert_same(engine.generate(requests), alone)
    assert_same(engine.generate(requests[::-1])[::-1], alone)
    assert_same(made(name, chunk_tokens=5).generate(requests), alone)
