"""Initialisers: exact rows, typical norms, determinism; a prefix or kv starts as the prompt of the same text does."""

import copy

import pytest
import torch

from foreword.core import init
from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward
from foreword.core.init import (
    from_labels,
    from_text,
    from_vectors,
    from_vocabulary,
    initial_vectors,
    kv_spreads,
    random_at_norm,
)
from foreword.core.model import FrozenModel
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.errors import ConfigError
from tests.bundled import bundled
from tests.tiny import NAMES, tiny

BLOCK = Block(((1, 7), 4, (9,), 3))
ROW = [5, 6, 7, 31, 8, 9, 11]


@pytest.fixture(scope="module")
def base():
    return bundled("bfloat16")


def ids(base, text):
    return base.tokenizer(text, add_special_tokens=False).input_ids


def rows(base, tokens):
    return base.embedding.weight[torch.tensor(tokens)].float()


def flat(vectors):
    return torch.cat([tensor.flatten() for tensor in vectors.tensors().values()])


def test_text_is_tiled_when_shorter_and_cut_when_longer(base):
    tokens = ids(base, "Route the e-mail")
    assert len(tokens) > 2
    assert torch.equal(from_text(base, "Route the e-mail", 2), rows(base, tokens[:2]))
    tiled = from_text(base, "Route the e-mail", 2 * len(tokens) + 1)
    assert torch.equal(tiled, rows(base, [*tokens, *tokens, tokens[0]]))
    assert tiled.dtype == torch.float32
    assert not set(tokens) & set(base.tokenizer.all_special_ids)


def test_text_without_tokens_or_tokenizer_is_an_error(base):
    with pytest.raises(ConfigError, match="'' has no tokens"):
        from_text(base, "", 3)
    with pytest.raises(ConfigError, match="needs the base's tokenizer"):
        from_text(tiny("llama"), "text", 3)


def test_vocabulary_sample_holds_distinct_plain_tokens(base):
    sample = from_vocabulary(base, 50, seed=1)
    table = base.embedding.weight.float()
    found = [int((table == row).all(dim=1).nonzero()[0]) for row in sample]
    assert len(set(found)) == 50
    assert not set(found) & set(base.tokenizer.all_special_ids)
    first = from_vocabulary(base, 12, seed=1, first=16)  # 6 of the first 16 are special: 10 tokens, then again
    assert torch.equal(first[:2], first[10:])
    assert torch.equal(sample, from_vocabulary(base, 50, seed=1))
    assert not torch.equal(sample, from_vocabulary(base, 50, seed=2))


def test_labels_come_first_as_means_then_a_sample(base):
    labels = ["refund", "delivery problem", "other"]
    vectors = from_labels(base, labels, 5, seed=3)
    for row, label in zip(vectors, labels, strict=False):
        assert torch.allclose(row, rows(base, ids(base, label)).mean(0))
    assert torch.equal(vectors[3:], from_vocabulary(base, 2, seed=3))
    assert from_labels(base, labels, 3, seed=3).shape == (3, base.spec.embed_size)
    with pytest.raises(ConfigError, match="3 labels, 2 vectors"):
        from_labels(base, labels, 2, seed=0)
    with pytest.raises(ConfigError, match="needs the task's labels"):
        from_labels(base, [], 2, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_random_rows_have_the_norm_of_real_ones(name):
    base = tiny(name)
    spec = base.spec
    with torch.no_grad():
        typical = base.embed(torch.arange(spec.vocab_size)).norm(dim=-1).median()
    assert float(random_at_norm(base, 64, 0).norm(dim=-1).median()) == pytest.approx(float(typical), rel=0.1)
    real = initial_vectors(base, "prefix", Block((64,)), "vocab")
    drawn = initial_vectors(base, "prefix", Block((64,)), "random")
    assert drawn.vectors.shape == (spec.num_layers, 64, spec.hidden_size)
    for layer in range(spec.num_layers):
        norms = [float(vectors.vectors[layer].norm(dim=-1).median()) for vectors in (real, drawn)]
        assert norms[1] == pytest.approx(norms[0], rel=0.1)
    real, drawn = (initial_vectors(base, "kv", Block((64,)), spec) for spec in ("vocab", "random"))
    for one, other in zip((*real.keys, *real.values), (*drawn.keys, *drawn.values), strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one.norm(dim=-1).median(1).values, other.norm(dim=-1).median(1).values, rtol=0.35)


@pytest.mark.parametrize("name", NAMES)
def test_prefix_and_kv_start_as_the_prompt_does(name):
    base = tiny(name)
    prompt = initial_vectors(base, "prompt", BLOCK, "vocab", seed=5)
    expected = forward(base, [ROW], compile(base, prompt))
    for method in ("prefix", "kv"):
        vectors = initial_vectors(base, method, BLOCK, "vocab", seed=5)
        assert vectors.block == BLOCK
        found = forward(base, [ROW], compile(base, vectors))
        assert (found - expected).abs().max() <= 2e-5 * expected.std()
    assert (forward(base, [ROW]) - expected).abs().max() > 1e-3 * expected.std()


@pytest.mark.parametrize("spec", ["text:Route the e-mail to the right team", "vocab", "labels", "random"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_every_start_is_float32_and_set_by_its_seed(base, method, spec):
    start = [initial_vectors(base, method, BLOCK, spec, labels=["yes", "no"], seed=seed) for seed in (0, 0, 1)]
    for vectors in start:
        assert vectors.method == method
        assert vectors.num_vectors == BLOCK.num_soft
        assert all(tensor.dtype == torch.float32 for tensor in vectors.tensors().values())
        assert not any(tensor.requires_grad for tensor in vectors.tensors().values())
        assert torch.isfinite(flat(vectors)).all()
    assert torch.equal(flat(start[0]), flat(start[1]))
    assert torch.equal(flat(start[0]), flat(start[2])) == spec.startswith("text:")
    compile(base, start[0])


def test_states_are_those_of_the_text_in_its_place(base):
    """Behind the block's left tokens, at the slots' positions: what the layers of a plain run over the text read."""
    text = " ".join(["Route the e-mail to the right team"] * 3)
    left, tokens = [1, 7], ids(base, text)[:6]
    vectors = initial_vectors(base, "prefix", Block(((1, 7), 6)), f"text:{text}")
    with torch.no_grad():
        found = base.model(input_ids=torch.tensor([[*left, *tokens]]), output_hidden_states=True).hidden_states
    for layer in range(base.spec.num_layers):
        assert torch.equal(vectors.vectors[layer], found[layer][0, 2:].float())


def test_after_rows_follow_and_are_for_prompts_only(base):
    vectors = initial_vectors(base, "prompt", BLOCK, "vocab", seed=4, after=2)
    both = from_vocabulary(base, 9, seed=4)
    assert torch.equal(vectors.vectors, both[:7])
    assert torch.equal(vectors.after, both[7:])
    behind_only = initial_vectors(base, "prompt", Block(((1,),)), "vocab", after=2)
    assert behind_only.vectors.shape == (0, base.spec.embed_size)
    for method in ("prefix", "kv"):
        with pytest.raises(ConfigError, match="asks for 2"):
            initial_vectors(base, method, BLOCK, "vocab", after=2)


def test_unknown_and_empty_starts_name_the_known_ones(base):
    with pytest.raises(ConfigError, match=r"'vocabulary' is not known(.|\n)*vocab, labels, random, from:<version>"):
        initial_vectors(base, "prompt", BLOCK, "vocabulary")
    with pytest.raises(ConfigError, match="no vector to train"):
        initial_vectors(base, "prompt", Block(((1, 2),)), "vocab")


@pytest.mark.parametrize("num", [3, 7, 17])
@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_trained_vectors_are_tiled_or_cut(method, num):
    base = tiny("gpt2")
    source = initial_vectors(base, method, BLOCK, "random", seed=2)
    block = Block(((1,), num))
    vectors = from_vectors(source, block)
    assert type(vectors) is type(source)
    assert vectors.block == block
    dim = 0 if method == "prompt" else 1
    for name, tensor in vectors.tensors().items():
        index = torch.tensor([place % 7 for place in range(num)])
        assert torch.equal(tensor, source.tensors()[name].index_select(dim, index))
    compile(base, vectors)


def test_the_same_block_keeps_trained_vectors_exactly():
    base = tiny("llama", "bfloat16")
    for kind, method in ((SoftPrompt, "prompt"), (SoftPrefix, "prefix"), (SoftKV, "kv")):
        source = initial_vectors(base, method, BLOCK, "vocab")
        again = from_vectors(source, BLOCK)
        assert isinstance(again, kind)
        assert torch.equal(flat(again), flat(source))
    prompt = initial_vectors(base, "prompt", BLOCK, "vocab", after=2)
    assert torch.equal(from_vectors(prompt, BLOCK, after=3).after, prompt.after[torch.tensor([0, 1, 0])])
    assert from_vectors(prompt, BLOCK).after is None
    behind = initial_vectors(base, "prompt", Block(((1,),)), "vocab", after=2)
    assert torch.equal(from_vectors(behind, Block((3,))).vectors, behind.after[torch.tensor([0, 1, 0])])
    assert torch.equal(
        from_vectors(initial_vectors(base, "prompt", BLOCK, "vocab"), BLOCK, after=1).after[0], prompt.vectors[0]
    )
    with pytest.raises(ConfigError, match="asks for 1"):
        from_vectors(initial_vectors(base, "kv", BLOCK, "vocab"), BLOCK, after=1)


def test_hooks_are_gone_afterwards():
    base = tiny("llama")
    init.initial_vectors(base, "prefix", BLOCK, "vocab")
    assert not any(layer._forward_pre_hooks for layer in base.layers)


def test_spreads_of_keys_and_values_leave_their_mean_out():
    base = tiny("qwen2")
    moved, longer = (FrozenModel(copy.deepcopy(base.model)) for _ in range(2))
    with torch.no_grad():
        moved.layers[0].self_attn.v_proj.bias += 5.0
        longer.layers[0].self_attn.v_proj.weight *= 3.0
    keys, values, *rest = kv_spreads(base)
    spec = base.spec
    assert keys.shape == values.shape == (spec.layers[0].num_kv_heads, 1) and len(rest) == 2 * (spec.num_layers - 1)
    assert torch.allclose(kv_spreads(moved)[1], values, rtol=1e-4)
    assert torch.allclose(kv_spreads(longer)[1], 3.0 * values, rtol=1e-4)
    assert torch.equal(kv_spreads(longer)[0], keys)
    sample = init.kv_of(base, init._sample_rows(base), Block((64,)))
    whole = torch.cat([(x - x.mean(1, keepdim=True)).flatten(1) for x in sample.values[:1]]).square().mean(1).sqrt()
    assert torch.allclose(values[:, 0], whole)
