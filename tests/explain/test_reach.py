"""How far vectors act: the formula against what is measured, and where no layer limits it."""

import pytest

from foreword.core.block import Block
from foreword.explain.ablate import divergences, form_without
from foreword.explain.examples import Example
from foreword.explain.reach import last_reached_index, measure_reach
from tests.explain.vectors import make
from tests.tiny import NAMES, tiny

TEXT = [Example(tuple(5 + i % 80 for i in range(30)))]


def measured(base, vectors):
    kl = divergences(
        base, form_without(base, vectors), form_without(base, vectors, range(vectors.block.num_soft)), TEXT
    )
    return measure_reach(base, vectors, TEXT, kl)


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
@pytest.mark.parametrize("segments", [(4,), ((1,), 4), ((1,), 4, (9, 8, 7))])
def test_a_window_ends_the_reach_exactly_where_it_is_computed(method, segments):
    base = tiny("mistral-window")  # 3 layers of 24 tokens
    reach = measured(base, make(base, method, Block(segments)))
    behind = 3 if len(segments) == 3 else 0
    assert reach.last_index == 3 * 23 - 1 - behind
    by_index = dict(reach.by_index)
    assert reach.made_longer and not reach.unmeasured and max(by_index) == reach.last_index + 8
    assert by_index[reach.last_index] > 0.0
    assert all(kl == 0.0 for index, kl in by_index.items() if index > reach.last_index)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_full_attention_ends_the_limit(name):
    base = tiny(name)
    reach = measured(base, make(base, "prompt", Block((4,))))
    limited = name == "mistral-window" or all(layer.window for layer in base.spec.layers)
    assert (reach.last_index is not None) == limited
    if not limited:
        assert max(index for index, _ in reach.by_index) == 29 and reach.by_index[-1][1] > 0.0
    assert len(reach.windows) == base.spec.num_layers


def test_a_reach_too_long_to_measure_is_said(monkeypatch):
    base = tiny("mistral-window")
    monkeypatch.setattr("foreword.explain.reach.MAX_PROBE_TOKENS", 40)
    reach = measured(base, make(base, "kv", Block((4,))))
    assert reach.unmeasured == "77 tokens are needed, 40 is the most that is measured here"
    assert reach.last_index == 68 and not reach.made_longer and len(reach.by_index) == 30


def test_the_known_lengths():
    spec = tiny("mistral-window").spec
    assert last_reached_index(spec, 3, 4) == 68
    assert last_reached_index(tiny("llama").spec, 3, 4) is None
