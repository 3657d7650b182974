import json
import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score

from foreword.config import CLOSED_METRICS, TaskConfig
from foreword.errors import ConfigError
from foreword.eval.metrics import (
    METRICS,
    bootstrap,
    get_metric,
    label_table,
    percentile_interval,
    resample_weights,
)

WORDS = st.lists(st.sampled_from(["a", "the", "cat", "sat", "Mat", "on", "it.", ""]), max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, st.lists(WORDS.filter(str.strip), min_size=1, max_size=3)), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("name", "output", "references", "score"),
    [
        ("exact_match", " Yes\n", ["yes"], 1.0),
        ("exact_match", "wrong  exchange\trate", ["Wrong exchange rate"], 1.0),
        ("exact_match", "yes.", ["yes"], 0.0),
        ("exact_match", "b", ["a", "b"], 1.0),
        ("accuracy", "b", ["a", "b"], 0.0),
        ("accuracy", "A", ["a", "b"], 1.0),
        ("token_f1", "the cat sat", ["the cat sat on it"], 2 * 3 / (3 + 5)),
        ("token_f1", "cat cat", ["cat"], 2 * 1 / (2 + 1)),
        ("token_f1", "a cat", ["the dog", "A  Cat"], 1.0),
        ("token_f1", "cat.", ["cat"], 0.0),
        ("token_f1", "", ["cat"], 0.0),
        ("squad_f1", "The cat.", ["cat"], 1.0),
        ("squad_f1", "the", ["a", "cat"], 1.0),
        ("squad_f1", "cat sat", ["the cat"], 2 * 1 / (2 + 1)),
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 0.75),
        ("rouge_l", "the cat", ["a dog", "cat"], 2 * 0.5 * 1 / 1.5),
        ("bleu", "the cat sat on the mat", ["the cat sat on the mat"], 1.0),
        ("bleu", "", ["the cat"], 0.0),
        ("bleu", "a b c d", ["x", "a b c d e"], math.exp(1 - 5 / 4)),
        ("f1", "a", ["a"], 1.0),
        ("f1", "x", ["a"], 0.0),
    ],
)
def test_hand_computed(name: str, output: str, references: list[str], score: float) -> None:
    assert get_metric(name).score([output], [references]) == pytest.approx(score)


def test_macro_f1_by_hand() -> None:
    outputs, targets = ["a", "a", "b", "??", "A"], [["a"], ["b"], ["b"], ["b"], ["c"]]
    # a: precision 1/3, recall 1; b: precision 1, recall 1/3; c: 0
    assert get_metric("f1").score(outputs, targets) == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean rouge_l"):
        get_metric("rougel")


def test_config_knows_the_same_metrics() -> None:
    for name in METRICS:
        assert TaskConfig(name="t", train="x", metric=name).metric == name  # type: ignore[arg-type]
    assert set(CLOSED_METRICS) <= METRICS.keys()
    assert all(metric.name == name for name, metric in METRICS.items())


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_scores_lie_between_0_and_1_and_ignore_the_order(pairs: list[tuple[str, list[str]]]) -> None:
    outputs, references = [output for output, _ in pairs], [answers for _, answers in pairs]
    for metric in METRICS.values():
        score = metric.score(outputs, references)
        assert 0 <= score <= 1
        assert metric.score(outputs[::-1], references[::-1]) == pytest.approx(score)
        rows = metric.row(metric.count(outputs, references))
        assert rows.shape == (len(pairs),) and (rows >= 0).all() and (rows <= 1).all()
        if metric.name not in ("rouge_l", "bleu"):  # these see no words in "" and "it.", or need four
            assert metric.score([answers[0] for answers in references], references) == pytest.approx(1)


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_equal_to_the_libraries(pairs: list[tuple[str, list[str]]]) -> None:
    outputs, references = [output for output, _ in pairs], [answers for _, answers in pairs]
    longest = max(map(len, references))
    columns = [[answers[min(place, len(answers) - 1)] for answers in references] for place in range(longest)]
    expected = sacrebleu.corpus_bleu(outputs, columns).score / 100
    assert get_metric("bleu").score(outputs, references) == pytest.approx(min(expected, 1.0))
    scorer = RougeScorer(["rougeL"])
    rouge = [
        max(scorer.score(answer, output)["rougeL"].fmeasure for answer in answers)
        for output, answers in zip(outputs, references, strict=True)
    ]
    assert get_metric("rouge_l").score(outputs, references) == pytest.approx(np.mean(rouge))


@given(st.lists(st.tuples(st.sampled_from("abcdx"), st.sampled_from("abcd")), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_macro_f1_and_table_equal_to_sklearn(pairs: list[tuple[str, str]]) -> None:
    outputs, targets = [output for output, _ in pairs], [target for _, target in pairs]
    labels = sorted(set(targets))
    expected = f1_score(targets, outputs, labels=labels, average="macro", zero_division=0)
    assert get_metric("f1").score(outputs, [(target,) for target in targets]) == pytest.approx(expected)
    table = label_table(outputs, targets, "abcd")
    assert np.mean([line["f1"] for line in table if line["label"] in labels]) == pytest.approx(expected)
    assert sum(line["support"] for line in table) == len(pairs)
    assert {line["label"] for line in table} == {*labels, *outputs} - {"x"}


def test_bootstrap_is_seeded_and_equals_recomputing() -> None:
    outputs = ["a b c d", "b b c e", "c", "a b c d e f", "d e"]
    references = [["a b c d"], ["b c d e"], ["c"], ["a b c d x f"], ["d f"]]
    weights = resample_weights(5, 20, seed=7)
    assert (weights.sum(axis=1) == 5).all()
    for metric in METRICS.values():
        counts = metric.count(outputs, references)
        scores = bootstrap(metric, counts, 20, seed=7)
        assert np.array_equal(scores, bootstrap(metric, counts, 20, seed=7))
        assert not np.array_equal(scores, bootstrap(metric, counts, 20, seed=8))
        for score, weight in zip(scores, weights, strict=True):
            drawn = [row for row, times in enumerate(weight) for _ in range(int(times))]
            again = metric.score([outputs[row] for row in drawn], [references[row] for row in drawn])
            assert score == pytest.approx(again)


def test_interval_has_the_width_of_the_binomial() -> None:
    metric = get_metric("exact_match")
    counts = metric.count(["a"] * 80 + ["b"] * 20, [["a"]] * 100)
    low, high = percentile_interval(bootstrap(metric, counts, 4000, seed=0))
    half = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert low == pytest.approx(0.8 - half, abs=0.015) and high == pytest.approx(0.8 + half, abs=0.015)


@pytest.mark.skipif(not Path("../shared/tasks").is_dir(), reason="../shared/tasks is absent")
def test_bleu_of_real_references_equals_sacrebleu() -> None:
    lines = Path("../shared/tasks/e2e_nlg/test.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    references = [json.loads(line)["references"] for line in lines]
    outputs = [answers[-1].replace("is", "was") for answers in references]
    longest = max(map(len, references))
    columns = [[answers[min(place, len(answers) - 1)] for answers in references] for place in range(longest)]
    expected = sacrebleu.corpus_bleu(outputs, columns).score / 100
    assert get_metric("bleu").score(outputs, references) == pytest.approx(expected, abs=1e-12)
