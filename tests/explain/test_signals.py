"""Norms, nearest tokens, faithfulness, verdicts, mass in summary: each against what is known of its vectors."""

import numpy as np
import pytest
import torch

from foreword.core.block import Block
from foreword.core.init import states_of
from foreword.core.prompt import SoftKV, SoftPrefix, SoftPrompt
from foreword.explain.ablate import as_prefix, form_without
from foreword.explain.attention import measure_attention
from foreword.explain.effects import (
    Losses,
    OutputEffect,
    effect_on_outputs,
    judge,
    leave_one_out,
    random_like,
    row_losses,
)
from foreword.explain.estimate import Estimate, Resamples
from foreword.explain.norms import measure_norms
from foreword.explain.tokens import measure_faithfulness, read_tokens
from tests.explain.vectors import BLOCK, EXAMPLES, make
from tests.tiny import NAMES, tiny

TOKENS = [33, 71, 12]
PLAIN = Block(((1,), 3))


def spelled(base, block=PLAIN):
    return SoftPrompt(base.embed(torch.tensor(TOKENS)).detach().clone() * 1.7, block)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_that_are_tokens_are_read_as_these(name):
    base = tiny(name)
    reading = read_tokens(base, spelled(base), count=2)
    assert [near[0].token_id for near in reading.near] == TOKENS
    assert all(near[0].cosine == pytest.approx(1.0, abs=1e-5) for near in reading.near)
    assert all(near[0].cosine > near[1].cosine for near in reading.near)
    assert 0.0 < reading.neighbour_cosine < 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_is_read_at_the_entrance_of_layer_0(name):
    base = tiny(name)
    states = states_of(base, base.embed(torch.tensor(TOKENS)).detach(), PLAIN)
    reading = read_tokens(base, SoftPrefix(states, PLAIN))
    assert [near[0].token_id for near in reading.near] == TOKENS
    assert all(near[0].cosine == pytest.approx(1.0, abs=1e-5) for near in reading.near)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_vocabulary_read_in_parts_gives_the_same_tokens(method, monkeypatch):
    base = tiny("gpt2")
    vectors = make(base, method, PLAIN)
    whole = read_tokens(base, vectors)
    monkeypatch.setattr("foreword.explain.norms.VOCABULARY_PART", 10)
    monkeypatch.setattr("foreword.explain.tokens.VOCABULARY_PART", 10)
    parts = read_tokens(base, vectors)
    assert [[t.token_id for t in near] for near in parts.near] == [[t.token_id for t in near] for near in whole.near]
    assert parts.neighbour_cosine == pytest.approx(whole.neighbour_cosine, abs=1e-6)


def test_keys_and_values_have_no_reading():
    assert read_tokens(tiny("llama"), make(tiny("llama"), "kv")) is None


def losses_of(base, vectors, examples):
    draws = Resamples([e.num_answer for e in examples])
    return row_losses(base, vectors, examples), draws


def many(base, vectors, num=12):
    """Rows whose answer the vectors make likely: the most likely token behind each."""
    from foreword.explain.ablate import greedy_answers
    from foreword.explain.examples import Example, with_answers

    rows = [Example(tuple(5 + (7 * i + t) % 80 for t in range(4 + i % 3))) for i in range(num)]
    return with_answers(rows, greedy_answers(base, form_without(base, vectors), rows, 2))


def test_tokens_explain_a_prompt_that_is_made_of_them_and_not_another():
    base = tiny("llama")
    hard = SoftPrompt(base.embed(torch.tensor(TOKENS)).detach().clone(), PLAIN)
    examples = many(base, hard)
    sums, draws = losses_of(base, hard, examples)
    found = measure_faithfulness(base, hard, read_tokens(base, hard), examples, sums, draws)
    assert found.verdict == "faithful"
    assert found.score.value == pytest.approx(1.0, abs=1e-4) and found.random_score.value < 0.8
    soft = make(base, "prompt", PLAIN)
    examples = many(base, soft)
    sums, draws = losses_of(base, soft, examples)
    found = measure_faithfulness(base, soft, read_tokens(base, soft), examples, sums, draws)
    assert found.verdict == "not faithful" and found.score.value < 0.8


def test_without_a_gain_there_is_nothing_to_explain():
    base = tiny("llama")
    vectors = spelled(base)
    sums = {name: np.full(4, 2.0) for name in ("trained", "without", "control")}
    draws = Resamples([e.num_answer for e in EXAMPLES] * 2)
    eight = {name: np.concatenate([each, each]) for name, each in sums.items()}
    found = measure_faithfulness(base, vectors, read_tokens(base, vectors), EXAMPLES * 2, eight, draws)
    assert found.verdict == "nothing to explain" and found.score is None


def test_leave_one_out_finds_the_vector_that_matters_and_the_one_that_harms():
    base = tiny("llama")
    helper, spoiler = make(base, "kv", Block((1,)), seed=4), make(base, "kv", Block((1,)), seed=9)
    examples = many(base, helper, num=40)
    quiet = tuple(torch.zeros_like(key) for key in helper.keys)  # any value under a key that draws no attention

    def joined(one, two, three):
        return tuple(torch.cat(each, dim=1) for each in zip(one, two, three, strict=True))

    vectors = SoftKV(
        joined(helper.keys, quiet, spoiler.keys),
        joined(helper.values, tuple(value * 0.01 for value in helper.values), spoiler.values),
        Block((3,)),
    )
    sums, draws = losses_of(base, vectors, examples)
    found = leave_one_out(base, vectors, examples, sums["trained"], draws)
    verdicts = [effect.verdict for effect in found.effects]
    assert verdicts[0] == "helps" and verdicts[2] == "harms" and 2 in found.pruned
    changes = [effect.loss_change.value for effect in found.effects]
    assert changes[0] > 0 > changes[2] and abs(changes[1]) < min(changes[0], -changes[2])
    assert found.pruned_loss_change.value < 0
    assert [effect.position for effect in found.effects] == [0, 1, 2]


@pytest.mark.parametrize("method", ["prompt", "prefix", "kv"])
def test_random_vectors_have_the_norms_of_those_they_stand_for(method):
    vectors = make(tiny("gemma3"), method, after=2 if method == "prompt" else 0)
    control, again = random_like(vectors, 0), random_like(vectors, 0)
    for name, tensor in vectors.tensors().items():
        other = control.tensors()[name]
        torch.testing.assert_close(other.norm(dim=-1), tensor.norm(dim=-1))
        assert torch.equal(other, again.tensors()[name])
        assert (other - tensor).abs().max() > 0.1 * tensor.abs().max()
    assert control.block == vectors.block


def test_norms_stand_where_they_should():
    base = tiny("llama")
    vocabulary = base.embedding.weight.norm(dim=-1)
    long = SoftPrompt(torch.nn.functional.normalize(torch.randn(3, 64), dim=-1) * vocabulary.max() * 2, PLAIN)
    norms = measure_norms(base, long, form_without(base, long), EXAMPLES)
    (own,) = [each for each in norms.comparisons if each.kind == "embedding"]
    assert own.percentile == 100.0 and own.ratio == pytest.approx(2 * float(vocabulary.max() / vocabulary.median()))
    assert [percentile for _, percentile in norms.vectors] == [100.0] * 3
    assert {each.kind for each in norms.comparisons} == {"embedding", "key", "value"}
    kv = make(base, "kv", PLAIN)
    ten = SoftKV(tuple(10 * key for key in kv.keys), kv.values, PLAIN)
    one, other = (measure_norms(base, each, form_without(base, each), EXAMPLES) for each in (kv, ten))
    for a, b in zip(one.comparisons, other.comparisons, strict=True):
        assert b.median == pytest.approx((10 if a.kind == "key" else 1) * a.median, rel=1e-5)
    prefix = make(base, "prefix", PLAIN)
    kinds = [each.kind for each in measure_norms(base, prefix, form_without(base, prefix), EXAMPLES).comparisons]
    assert kinds.count("layer input") == 3


def test_text_has_the_norms_of_text():
    base = tiny("qwen3")
    block = Block((14,))
    rows = base.embed(torch.tensor(EXAMPLES[2].ids)).detach()
    vectors = SoftPrompt(rows, block)
    norms = measure_norms(base, vectors, form_without(base, vectors), EXAMPLES[2:3])
    for each in norms.comparisons:
        if each.layer == 0:
            assert each.ratio == pytest.approx(1.0, rel=1e-4) and each.kind in ("key", "value")


def test_attention_in_summary_is_the_mean_of_the_mass():
    from foreword.core.mass import prefix_mass

    base = tiny("qwen3")
    vectors = make(base, "prompt")
    prefix = as_prefix(form_without(base, vectors), BLOCK)
    found = measure_attention(base, prefix, EXAMPLES)
    mass = prefix_mass(base, [e.ids for e in EXAMPLES], prefix)
    for layer, soft in zip(found.layers, mass.soft, strict=True):
        assert layer.mean == pytest.approx(float(soft.nanmean()), rel=1e-5)
        assert layer.low <= layer.mean <= layer.high
        assert layer.by_place[0] == pytest.approx(float(soft[:, :, 0].mean()), rel=1e-5)
        assert len(layer.heads) == 4
        spans = [slice(len(e.ids) - e.num_answer - 1, len(e.ids) - 1) for e in EXAMPLES]
        asked = torch.cat([soft[:, row, span] for row, span in enumerate(spans)], dim=1)
        assert layer.at_answers == pytest.approx(float(asked.mean()), rel=1e-5)
    assert sum(found.by_vector) == pytest.approx(found.mean, rel=1e-4)


def outputs(kl):
    return OutputEffect(mean=Estimate(kl, kl * 0.9, kl * 1.1), by_position=())


def losses(gain, over_control):
    near = 0.05
    return Losses(
        trained=Estimate(1.0),
        without=Estimate(1.0 + gain),
        control=Estimate(1.0 + over_control),
        gain=Estimate(gain, gain - near, gain + near),
        gain_over_control=Estimate(over_control, over_control - near, over_control + near),
    )


@pytest.mark.parametrize(
    ("kl", "measured", "state", "words"),
    [
        (3e-7, losses(0.0, 0.0), "dead", r"dead: the vectors do nothing \(KL 3e-07"),
        (0.5, losses(0.4, 0.4), "alive", "alive: the vectors make the answers likelier"),
        (0.5, losses(0.4, 0.01), "idle", "random vectors of the same norms do as well"),
        (0.5, losses(0.01, 0.4), "idle", "change the answers but do not help"),
        (0.5, losses(-0.4, 0.1), "harmful", "worse with the vectors than without"),
        (0.5, None, "acting", "only targets can tell"),
    ],
)
def test_verdicts(kl, measured, state, words):
    import re

    found = judge("float32", outputs(kl), measured)
    assert found.state == state and re.search(words, found.sentence)


def test_output_positions_are_those_that_predict_the_answer():
    kl = [torch.arange(len(e.ids), dtype=torch.float64) for e in EXAMPLES]  # at each place, its index
    found = effect_on_outputs(kl, EXAMPLES)
    starts = [len(e.ids) - e.num_answer - 1 for e in EXAMPLES]  # 3, 1, 9, 1
    assert found.by_position[0][0].value == pytest.approx(sum(starts) / 4) and found.by_position[0][1] == 4
    assert found.by_position[3][0].value == pytest.approx(9 + 3) and found.by_position[3][1] == 1
    assert len(found.by_position) == 4
    assert found.mean.value == pytest.approx((3 + 4 + 1 + 9 + 10 + 11 + 12 + 1 + 2) / 9)


def test_so_few_rows_give_no_verdict_on_use():
    few = Losses(**{name: Estimate(1.0) for name in ("trained", "without", "control", "gain", "gain_over_control")})
    assert judge("float32", outputs(0.5), few).state == "acting"
    assert "so few rows cannot tell" in judge("float32", outputs(0.5), few).sentence
    base = tiny("llama")
    vectors = spelled(base)
    sums, draws = losses_of(base, vectors, EXAMPLES)
    found = measure_faithfulness(base, vectors, read_tokens(base, vectors), EXAMPLES, sums, draws)
    assert found.verdict == "too few rows" and found.score is None


def test_rounding_of_a_coarse_base_is_no_sign_of_life():
    assert judge("bfloat16", outputs(3e-3), None).state == "dead"
    assert "rounding to bfloat16" in judge("bfloat16", outputs(3e-3), None).sentence
    assert judge("float32", outputs(3e-3), None).state == "acting"
