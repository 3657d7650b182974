"""Taking vectors out: against the sequence with its position masked, and nothing else moves."""

import pytest
import torch
from transformers import DynamicCache

from foreword.core.block import Block
from foreword.core.compile import compile
from foreword.core.forward import forward_rows
from foreword.core.model import put_rows
from foreword.core.prompt import SoftKV, SoftPrompt
from foreword.explain.ablate import (
    answer_losses,
    count_vectors,
    divergences,
    form_without,
    greedy_answers,
    parts_of,
    run_form,
)
from foreword.explain.examples import Example
from tests.explain.vectors import BLOCK, EXAMPLES, make
from tests.tiny import NAMES, tiny

ARCHITECTURES = ["llama", "qwen3", "gemma3", "gpt2", "bloom", "falcon-alibi", "mistral-window", "opt", "phi3"]
METHODS = ["prompt", "prefix", "kv"]


def all_places(examples):
    longest = max(len(e.ids) for e in examples)
    return torch.tensor([row * longest + t for row, e in enumerate(examples) for t in range(len(e.ids))])


def masked_logits(base, vectors, removed, ids):
    """The whole sequence at once, the removed positions masked as keys: the definition, without any cache."""
    block = vectors.block
    soft = torch.tensor(block.soft_positions())
    row = torch.tensor([[*block.literal_ids(), *ids]])
    mask = torch.ones_like(row)
    mask[0, soft[list(removed)]] = 0
    arguments = {"positions": torch.arange(row.shape[1])[None], "cache": DynamicCache(), "mask": mask}
    embeds = base.embed(row)
    with torch.no_grad():
        if isinstance(vectors, SoftPrompt):
            logits = base.run(embeds=put_rows(embeds, soft, vectors.vectors), **arguments)
        else:
            with base.layer_inputs_replaced(soft, vectors.vectors.unbind()):
                logits = base.run(embeds=embeds, **arguments)
    return logits[0, block.num_positions :]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_what_compile_gives(name, method):
    base = tiny(name)
    vectors = make(base, method)
    form, prefix = form_without(base, vectors), compile(base, vectors)
    for mine, theirs in zip((*form.keys, *form.values), (*prefix.keys, *prefix.values), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    select = all_places(EXAMPLES)
    with torch.no_grad():
        expected = forward_rows(base, [list(e.ids) for e in EXAMPLES], [prefix] * len(EXAMPLES), select=select)
    torch.testing.assert_close(run_form(base, form, EXAMPLES, select), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("removed", [{1}, {3}, {1, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_is_masking_the_position(name, method, removed):
    base = tiny(name)
    vectors = make(base, method)
    found = run_form(base, form_without(base, vectors, removed), EXAMPLES[2:3], all_places(EXAMPLES[2:3]))
    expected = masked_logits(base, vectors, removed, EXAMPLES[2].ids)
    torch.testing.assert_close(found, expected, atol=3e-5, rtol=1e-4)
    whole = run_form(base, form_without(base, vectors), EXAMPLES[2:3], all_places(EXAMPLES[2:3]))
    assert (whole - found).abs().max() > 1e-3, "removing a vector did nothing, the test sees nothing"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_removing_a_key_and_its_value_moves_no_other(name):
    base = tiny(name)
    vectors = make(base, "kv", Block((4,)))
    found = run_form(base, form_without(base, vectors, {2}), EXAMPLES[:1], all_places(EXAMPLES[:1]))
    kept = [0, 1, 3]
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(vectors.keys, vectors.values, strict=True)):
        cache.update(key[None, :, kept], value[None, :, kept], layer)
    ids = torch.tensor([EXAMPLES[0].ids])
    with torch.no_grad():
        expected = base.run(ids=ids, positions=4 + torch.arange(ids.shape[1])[None], cache=cache)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_literal_tokens_behind_a_removed_key_no_longer_see_it():
    base = tiny("llama")
    vectors = make(base, "kv")
    other = SoftKV(tuple(k.clone() for k in vectors.keys), tuple(v.clone() for v in vectors.values), BLOCK)
    for tensor in (*other.keys, *other.values):
        tensor[:, 1] += 1.0
    one, two = form_without(base, vectors, {1}), form_without(base, other, {1})
    for a, b in zip((*one.keys, *one.values), (*two.keys, *two.values), strict=True):
        assert torch.equal(a, b)
    full, changed = form_without(base, vectors), form_without(base, other)
    assert not torch.equal(full.keys[1][:, 5], changed.keys[1][:, 5])


def test_all_removed_from_a_block_of_vectors_is_the_base_alone():
    base = tiny("qwen3")
    vectors = make(base, "prompt", Block((5,)))
    found = run_form(base, form_without(base, vectors, range(5)), EXAMPLES[:1], all_places(EXAMPLES[:1]))
    with torch.no_grad():
        alone = forward_rows(base, [list(EXAMPLES[0].ids)], [None])[0]
    torch.testing.assert_close(found, alone, atol=3e-5, rtol=1e-4)  # rotary embedding: a shift of all changes nothing


def test_vectors_behind_the_text():
    base = tiny("llama")
    vectors = make(base, "prompt", Block(((1,), 2)), after=2)
    assert count_vectors(vectors) == 4
    example = Example((5, 6, 7, 0, 0, 8, 9), 2, ((3, 0, 2),))
    prefix = compile(base, vectors)
    with torch.no_grad():
        expected = forward_rows(base, [list(example.ids)], [prefix], splices=[(0, 3, prefix.after)])[0]
    found = run_form(base, form_without(base, vectors), [example], all_places([example]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    without = form_without(base, vectors, {3})
    assert without.is_open.all() and without.after_open.tolist() == [True, False]
    moved = run_form(base, without, [example], all_places([example]))
    torch.testing.assert_close(moved[:4], found[:4], atol=1e-5, rtol=1e-4)
    assert (moved[5:] - found[5:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_losses_and_divergences_of_a_batch_are_those_of_single_rows(name):
    base = tiny(name)
    form, none = (form_without(base, make(base, "prompt"), removed) for removed in ((), range(4)))
    losses, kl = answer_losses(base, form, EXAMPLES), divergences(base, form, none, EXAMPLES)
    for index, example in enumerate(EXAMPLES):
        logits = run_form(base, form, [example], all_places([example])).double().log_softmax(-1)
        start = len(example.ids) - example.num_answer
        own = -sum(logits[place - 1, example.ids[place]] for place in range(start, len(example.ids)))
        assert float(losses[index]) == pytest.approx(float(own), abs=1e-4)
        bare = run_form(base, none, [example], all_places([example])).double().log_softmax(-1)
        torch.testing.assert_close(kl[index], (logits.exp() * (logits - bare)).sum(-1), atol=1e-5, rtol=1e-3)


def test_greedy_answers_are_the_most_likely_tokens():
    base = tiny("llama")
    form = form_without(base, make(base, "prompt"))
    answers = greedy_answers(base, form, EXAMPLES, 5)
    for example, answer in zip(EXAMPLES, answers, strict=True):
        ids = list(example.ids)
        for token in answer:
            assert int(run_form(base, form, [Example(tuple(ids))], torch.tensor([len(ids) - 1])).argmax()) == token
            ids.append(token)
        assert len(answer) == 5 or answer[-1] in base.stop_ids


def test_parts_hold_every_row_once_and_no_more_than_fits(monkeypatch):
    monkeypatch.setattr("foreword.explain.ablate.TOKENS_AT_ONCE", 20)
    parts = list(parts_of(EXAMPLES, 1))
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3]
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(EXAMPLES[index].ids) for index in part) <= 20
