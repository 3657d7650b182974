"""Sampling against plain formulas: penalties, constraints, log-probabilities, top-k, top-p, seeds."""

from collections import Counter

import pytest
import torch

from foreword.core.forward import forward
from foreword.engine.request import Request
from foreword.engine.sampling import HEAD_SIZE, choose, draw, uniform
from foreword.engine.sequence import Sequence
from tests.engine.cases import engine_for, ids, mixed, tokens


def row(index=0, prompt=(1, 2), answer=(), seed=0, node=None, **fields):
    request = Request(prompt_ids=list(prompt), **fields)
    return Sequence(
        request=request,
        index=index,
        tokens=[*prompt, *answer],
        num_prompt=len(prompt),
        max_tokens=99,
        seed=seed,
        node=node,
        seen={*prompt, *answer},
        counts=Counter(answer),
    )


def logits_of(vocab_size, count=1, seed=0):
    return torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def test_rows_of_all_kinds_share_a_batch():
    logits = logits_of(50, 4)
    rows = [row(), row(temperature=1.0), row(logprobs=2), row(allowed_ids=[7, 9])]
    found = choose(logits, rows)
    alone = [choose(logits[place : place + 1], [one])[0] for place, one in enumerate(rows)]
    assert found == alone
    assert found[0].token == logits[0].argmax().item()
    assert found[2].token == logits[2].argmax().item()
    assert found[3].token == max((7, 9), key=lambda token: logits[3, token].item())
    assert logits.equal(logits_of(50, 4)), "logits are not written to"


def test_penalties():
    logits = logits_of(20)
    both = row(
        prompt=(3, 4),
        answer=(5, 5, 6),
        logprobs=20,
        repetition_penalty=1.5,
        presence_penalty=0.3,
        frequency_penalty=0.7,
    )
    expected = logits[0].clone()
    for token in (3, 4, 5, 6):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    for token, count in ((5, 2), (6, 1)):
        expected[token] -= 0.3 + 0.7 * count
    (found,) = choose(logits, [both])
    right = expected.log_softmax(-1)
    assert found.token == expected.argmax().item()
    assert found.logprob.top == pytest.approx({token: right[token].item() for token in range(20)}, abs=1e-5)


def test_logprobs_are_over_allowed_tokens_and_before_temperature():
    logits = logits_of(20)
    (found,) = choose(logits, [row(allowed_ids=[2, 5, 8], temperature=0.1, logprobs=10, seed=4)])
    right = logits[0, [2, 5, 8]].log_softmax(-1).tolist()
    assert found.logprob.top == pytest.approx(dict(zip([2, 5, 8], right, strict=True)), abs=1e-5)
    assert list(found.logprob.top.values()) == sorted(right, reverse=True)
    assert found.logprob.logprob == pytest.approx(found.logprob.top[found.token], abs=1e-6)


def test_logprobs_zero_reports_the_chosen_token_alone():
    (found,) = choose(logits_of(20), [row(logprobs=0)])
    assert found.logprob.token_id == found.token
    assert found.logprob.top == {}


def draws(logits, count, **fields):
    rows = [row(index=index, **fields) for index in range(count)]
    return Counter(draw(logits.expand(count, -1), rows).tolist())


def test_draws_follow_the_distribution():
    logits = logits_of(12)
    count = 20_000
    found = draws(logits, count, temperature=2.0)
    for token, share in enumerate(torch.softmax(logits[0] / 2, -1).tolist()):
        assert abs(found[token] / count - share) < 5 * (share / count) ** 0.5 + 1e-4


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.6), (5, 0.8), (1000, 0.001), (0, 0.9999999)])
@pytest.mark.parametrize("vocab_size", [40, 3 * HEAD_SIZE])
def test_top_k_and_top_p_keep_what_they_should(vocab_size, top_k, top_p):
    logits = logits_of(vocab_size) / 3
    kept = torch.ones(vocab_size, dtype=torch.bool)
    order = logits[0].argsort(descending=True)
    if top_k:
        kept[order[top_k:]] = False
    probabilities = torch.softmax(logits[0].double().masked_fill(~kept, -torch.inf), -1)
    before = probabilities[order].cumsum(0) - probabilities[order]
    kept[order[before >= top_p]] = False
    found = draws(logits, 3000, temperature=1.0, top_k=top_k, top_p=top_p)
    assert all(kept[token] for token in found)
    if kept.sum() < 40:
        shares = torch.softmax(logits[0].masked_fill(~kept, -torch.inf), -1)
        for token in kept.nonzero()[:, 0].tolist():
            assert abs(found[token] / 3000 - shares[token].item()) < 0.06


def test_tiny_temperature_is_greedy_and_a_huge_one_is_flat():
    logits = logits_of(30)
    assert choose(logits, [row(temperature=1e-30)])[0].token == logits.argmax().item()
    assert len(draws(logits, 2000, temperature=1e30)) == 30
    spread = torch.tensor([[0.0, 1e5, -1e5]])
    assert draws(spread, 100, temperature=1e-4) == {1: 100}


def test_numbers_depend_on_seed_completion_and_place_alone():
    numbers = {uniform(seed, index, place) for seed in (-1, 0, 7) for index in range(10) for place in range(10)}
    assert len(numbers) == 300
    assert all(0 < number < 1 for number in numbers)
    assert abs(sum(uniform(3, 0, place) for place in range(5000)) / 5000 - 0.5) < 0.02


def test_seeds():
    engine = engine_for("llama")
    options = {"prompt_ids": ids(5, 1), "prefix": "kv", "max_tokens": 12, "temperature": 1.2, "ignore_eos": True}
    same = tokens(engine.generate([Request(seed=4, **options), Request(seed=4, **options), Request(seed=5, **options)]))
    assert same[0] == same[1] != same[2]
    fresh = tokens(engine.generate([Request(**options), Request(**options)]))
    assert fresh[0] != fresh[1]


def test_allowed_ids_hold_at_every_step():
    engine = engine_for("gpt2")
    request = Request(prompt_ids=ids(5, 1), max_tokens=12, allowed_ids=[8, 30, 41], logprobs=3, temperature=1.0, seed=1)
    completion = engine.generate([request])[0].completions[0]
    assert set(completion.token_ids) <= {8, 30, 41}
    assert all(sorted(entry.top) == [8, 30, 41] for entry in completion.logprobs)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logprobs_equal_those_of_core_forward(name):
    engine = engine_for(name)
    requests = mixed(ignore_eos=True, logprobs=3)
    for request, output in zip(requests, engine.generate(requests), strict=True):
        prefix = engine.prefixes[request.prefix] if request.prefix else None
        logits = forward(engine.base, [[*request.prompt_ids, *output.token_ids]], prefix)[0]
        right = logits[len(request.prompt_ids) - 1 : -1].log_softmax(-1)
        found = output.completions[0].logprobs
        assert [entry.token_id for entry in found] == list(output.token_ids)
        for entry, expected in zip(found, right, strict=True):
            assert entry.logprob == pytest.approx(expected[entry.token_id].item(), abs=2e-4)
            assert entry.top == pytest.approx(
                {i: expected[i].item() for i in expected.topk(3).indices.tolist()}, abs=2e-4
            )


def test_repetition_penalty_sees_the_prompt_but_not_the_prefix():
    engine = engine_for("llama")
    request = Request(
        prompt_ids=ids(5, 1), prefix="blocked", max_tokens=8, repetition_penalty=1.8, ignore_eos=True, logprobs=0
    )
    output = engine.generate([request])[0]
    row_ids = list(request.prompt_ids)
    for token in output.token_ids:
        logits = forward(engine.base, [row_ids], engine.prefixes["blocked"])[0, -1].clone()
        seen = torch.tensor(sorted(set(row_ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.8, logits[seen] * 1.8)
        assert token == logits.argmax().item()
        row_ids.append(token)
