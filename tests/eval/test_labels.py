import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreword.engine.request import Output, Request, TokenLogprob
from foreword.errors import BackendFailed, ConfigError
from foreword.eval.labels import LabelTrie, build_trie, calibration_error, label_probabilities
from tests.eval.fakes import END, CharTokenizer, next_token_shares, random_model, said

TOKENIZER = CharTokenizer()
PROMPTS = [[50, 51], [52], [53, 54, 55]]
LABELS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=2, max_size=8, unique=True)


def by_hand(prompt: Sequence[int], label: str, labels: Sequence[str]) -> float:
    """The chain over all the label's tokens, end token last, each renormalised over what some label goes on with."""
    sequences = [[*map(ord, each), END] for each in labels]
    mine, probability = [*map(ord, label), END], 1.0
    for depth, token in enumerate(mine):
        children = {row[depth] for row in sequences if row[:depth] == mine[:depth] and len(row) > depth}
        if len(children) > 1:
            probability *= next_token_shares([*prompt, *mine[:depth]], sorted(children))[token]
    return probability


@given(LABELS)
@settings(max_examples=60, deadline=None)
def test_probabilities_are_the_chain_over_branching_nodes(labels: list[str]) -> None:
    trie = build_trie(labels, TOKENIZER)
    scores = label_probabilities(random_model, PROMPTS, labels, trie, min_mass=0.0)
    expected = [[by_hand(prompt, label, labels) for label in labels] for prompt in PROMPTS]
    np.testing.assert_allclose(scores.probabilities, expected, rtol=1e-9)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1)
    assert scores.residual.sum() == 0
    assert scores.best == [labels[int(np.argmax(row))] for row in expected]


@given(LABELS, st.sampled_from([1e-4, 0.05, 0.5]))
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_1_also_where_nodes_are_left_unexpanded(labels: list[str], min_mass: float) -> None:
    trie = build_trie(labels, TOKENIZER)
    exact = label_probabilities(random_model, PROMPTS, labels, trie, min_mass=0.0)
    scores = label_probabilities(random_model, PROMPTS, labels, trie, min_mass=min_mass)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1)
    assert (scores.probabilities >= 0).all()
    wrong = np.abs(scores.probabilities - exact.probabilities).sum(axis=1)
    assert (wrong <= 2 * scores.residual + 1e-9).all()


@given(LABELS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_order_of_labels_does_not_matter(labels: list[str], rng: Any) -> None:
    shuffled = rng.sample(labels, len(labels))
    first = label_probabilities(random_model, PROMPTS, labels, build_trie(labels, TOKENIZER))
    again = label_probabilities(random_model, PROMPTS, shuffled, build_trie(shuffled, TOKENIZER))
    places = [shuffled.index(label) for label in labels]
    np.testing.assert_allclose(first.probabilities, again.probabilities[:, places])


def test_requests_ask_for_branching_nodes_only() -> None:
    rounds: list[list[Request]] = []

    def generate(requests: Sequence[Request]) -> list[Output]:
        rounds.append(list(requests))
        return random_model(requests)

    labels = ["card lost", "card stolen", "card stolen abroad", "fee"]
    label_probabilities(generate, [[50]], labels, build_trie(labels, TOKENIZER), prefix="t@1", min_mass=0.0)
    asked = [[(TOKENIZER.decode(list(request.prompt_ids or [])), request.allowed_ids) for request in r] for r in rounds]
    assert asked == [
        [("2", (ord("c"), ord("f")))],
        [("2card ", (ord("l"), ord("s")))],
        [("2card stolen", (END, ord(" ")))],
    ]
    assert all(request.prefix == "t@1" and request.logprobs == 2 for r in rounds for request in r)


def test_what_an_engine_leaves_out_shares_the_rest() -> None:
    def generate(requests: Sequence[Request]) -> list[Output]:
        step = TokenLogprob(token_id=ord("a"), logprob=math.log(0.7), top={})
        return [said("a", logprobs=(step,)) for _ in requests]

    scores = label_probabilities(generate, [[50]], ["a", "b", "c"], build_trie(["a", "b", "c"], TOKENIZER))
    np.testing.assert_allclose(scores.probabilities, [[0.7, 0.15, 0.15]])


def test_an_engine_without_log_probabilities_is_an_error() -> None:
    def generate(requests: Sequence[Request]) -> list[Output]:
        return [said("a") for _ in requests]

    with pytest.raises(BackendFailed, match="reported no log-probabilities"):
        label_probabilities(generate, [[50]], ["a", "b"], build_trie(["a", "b"], TOKENIZER))


@pytest.mark.parametrize("logprob", [math.nan, -math.inf])
def test_broken_log_probabilities_are_an_error(logprob: float) -> None:
    def generate(requests: Sequence[Request]) -> list[Output]:
        top = {ord("a"): logprob, ord("b"): logprob}
        return [said("a", logprobs=(TokenLogprob(token_id=ord("a"), logprob=logprob, top=top),)) for _ in requests]

    with pytest.raises(BackendFailed, match="2 label tokens sum to"):
        label_probabilities(generate, [[50]], ["a", "b"], build_trie(["a", "b"], TOKENIZER))


def test_trie_closes_only_labels_that_others_go_on_from() -> None:
    trie = build_trie(["ab", "abc", "b"], TOKENIZER, closing_id=9, lead=" ")
    assert trie == LabelTrie(((32, 97, 98, 9), (32, 97, 98, 99), (32, 98)))
    assert trie.branch((0, 1, 2)) == ((32,), {97: (0, 1), 98: (2,)})
    assert trie.branch((0, 1)) == ((32, 97, 98), {9: (0,), 99: (1,)})


def test_labels_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match="label 'a' has the tokens of 'a'"):
        build_trie(["a", "b", "a"], TOKENIZER)
    with pytest.raises(ConfigError, match="label '' has no tokens"):
        build_trie(["a", ""], TOKENIZER)


def test_calibration_error_by_hand() -> None:
    # bin (0.8, 0.9]: confidence 0.85, 1 of 2 right; bin (0.9, 1]: confidence 1, both right
    assert calibration_error([0.85, 0.85, 1.0, 1.0], [True, False, True, True]) == pytest.approx(0.35 / 2)
    assert calibration_error([0.0, 1.0], [False, True]) == 0
    assert calibration_error([1.0, 1.0], [False, False]) == 1


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
@settings(deadline=None)
def test_calibration_error_lies_between_0_and_1(pairs: list[tuple[float, bool]]) -> None:
    assert 0 <= calibration_error([share for share, _ in pairs], [right for _, right in pairs]) <= 1
