"""Where the student starts: real keys and values of the context, turned right; values fitted to real queries."""

import pytest
import torch

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.core.prompt import KVPrefix, SoftKV
from foreword.distil.matching import watched_attention
from foreword.distil.start import choose_start, chosen_places, context_kv, is_shift_invariant, kv_at, start_vectors
from foreword.errors import ConfigError
from foreword.train.data import Example
from tests.tiny import tiny

CONTEXT = [7, 19, 31, 43, 55, 67, 79, 91, 12, 24, 36, 48]
TEXT = [5, 8, 13, 21, 34, 55, 2]
ROWS = [Example([4, 9 + index, 17, 40 + index, 60, 2], 2) for index in range(8)]
ROTARY = ["llama", "qwen3", "gemma3", "phi3", "gpt-neox", "mistral", "olmo2"]


def whole(base, ids):
    return forward(base, [ids])[0]


@pytest.mark.parametrize("name", ROTARY)
def test_all_of_the_context_is_the_context(name):
    base = tiny(name)
    block = Block(((1,), len(CONTEXT)))
    made = compile(base, kv_at(base, block, CONTEXT, range(len(CONTEXT))))
    expected = whole(base, [1, *CONTEXT, *TEXT])[1 + len(CONTEXT) :]
    assert torch.allclose(forward(base, [TEXT], made)[0], expected, atol=1e-4)


@pytest.mark.parametrize("name", ROTARY)
def test_kept_tokens_stand_at_their_old_distance_from_the_text(name):
    """Without an opening, the turned context before a text that starts at P is the context before it at C."""
    base, num = tiny(name), 5
    keys, values = context_kv(base, Block((num,)), CONTEXT)
    kept = KVPrefix(tuple(keys), tuple(values), "")
    cache = kept.cache()
    positions = torch.arange(num, num + len(TEXT))[None]
    mask = torch.ones(1, len(CONTEXT) + len(TEXT), dtype=torch.long)
    logits = base.run(ids=torch.tensor([TEXT]), positions=positions, cache=cache, mask=mask)[0].detach()
    assert torch.allclose(logits, whole(base, [*CONTEXT, *TEXT])[len(CONTEXT) :], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "turns", "expected"),
    [
        ("llama", True, True),
        ("qwen3", True, True),
        ("gemma2", True, False),
        ("gpt2", False, False),
        ("opt", False, False),
    ],
)
def test_who_turns_keys_and_who_matches(name, turns, expected):
    assert is_shift_invariant(tiny(name)) is turns
    assert choose_start(tiny(name), "kv", False) == ("match" if expected else "first")
    assert choose_start(tiny(name), "prompt", False) == "first"


@pytest.mark.parametrize("name", ["gpt2", "bloom"])
@pytest.mark.parametrize("how", ["first", "spread"])
def test_other_bases_start_from_a_text_of_the_chosen_tokens(name, how):
    base, block = tiny(name), Block(((1,), 4))
    kept = [CONTEXT[place] for place in chosen_places(len(CONTEXT), 4, how)]
    made = compile(base, start_vectors(base, "kv", block, CONTEXT, how))
    expected = whole(base, [1, *kept, *TEXT])[5:]
    assert torch.allclose(forward(base, [TEXT], made)[0], expected, atol=1e-4)


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_the_first_tokens_and_the_last(method):
    base, block = tiny("qwen3"), Block(((1,), 4))
    made = compile(base, start_vectors(base, method, block, CONTEXT, "first"))
    expected = whole(base, [1, *CONTEXT[:3], CONTEXT[-1], *TEXT])[5:]
    assert torch.allclose(forward(base, [TEXT], made)[0], expected, atol=1e-4)


def test_places():
    assert chosen_places(10, 4, "first") == [0, 1, 2, 9]
    assert chosen_places(10, 4, "spread") == [0, 3, 6, 9]
    assert chosen_places(10, 1, "spread") == [0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt-neox"])
def test_attention_is_watched_and_left_as_it_was(name):
    base = tiny(name)
    before, expected = base.config._attn_implementation, whole(base, TEXT)
    with watched_attention(base) as seen:
        assert torch.allclose(whole(base, TEXT), expected, atol=1e-5)
    assert len(seen) == base.spec.num_layers
    assert base.config._attn_implementation == before
    assert seen[0].queries.shape == (4, len(TEXT), base.spec.layers[0].head_dim)


def test_matching_with_all_tokens_but_one_changes_little_and_keeps_keys():
    """One token less: every kept key is the context's own, and the first token stays."""
    base, block = tiny("qwen3"), Block(((1,), len(CONTEXT) - 1))
    made = start_vectors(base, "kv", block, CONTEXT, "match", ROWS)
    keys, _ = context_kv(base, block, CONTEXT)
    assert isinstance(made, SoftKV)
    for own, real in zip(made.keys, keys, strict=True):
        for head in range(own.shape[0]):
            distances = torch.cdist(own[head], real[head])
            assert distances.min(dim=1).values.max() < 1e-4
            assert distances[0].argmin() == 0


def test_fitted_values_answer_the_queries_better_than_kept_ones():
    base, block = tiny("qwen3"), Block(((1,), 4))
    fitted = start_vectors(base, "kv", block, CONTEXT, "match", ROWS)
    keys, values = context_kv(base, block, CONTEXT)
    own = []
    for layer, key in enumerate(keys):
        places = [torch.cdist(fitted.keys[layer][h], key[h]).argmin(1) for h in range(len(key))]
        own.append(torch.stack([values[layer][h][place] for h, place in enumerate(places)]))
    kept = SoftKV(fitted.keys, tuple(own), block)

    def error(vectors):
        prefix = compile(base, vectors)
        pairs = ((forward(base, [row.ids], prefix)[0], whole(base, [1, *CONTEXT, *row.ids])[13:]) for row in ROWS)
        return sum(float((got - wanted).square().mean()) for got, wanted in pairs)

    assert error(fitted) < 0.7 * error(kept)


def test_what_match_cannot_serve_is_refused():
    block = Block(((1,), 4))
    with pytest.raises(ConfigError, match="for method kv, not prefix"):
        start_vectors(tiny("qwen3"), "prefix", block, CONTEXT, "match", ROWS)
    with pytest.raises(ConfigError, match="rotary positions, gpt2"):
        start_vectors(tiny("gpt2"), "kv", block, CONTEXT, "match", ROWS)
    with pytest.raises(ConfigError, match="needs questions"):
        start_vectors(tiny("qwen3"), "kv", block, CONTEXT, "match")
    with pytest.raises(ConfigError, match="12 vectors for a context of 12"):
        start_vectors(tiny("qwen3"), "kv", Block((12,)), CONTEXT, "first")
    with pytest.raises(ConfigError, match="cannot follow gemma2: a softcap"):
        start_vectors(tiny("gemma2"), "kv", block, CONTEXT, "match", ROWS)
