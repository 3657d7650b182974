import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from foreword.engine.request import Request
from foreword.errors import ConfigError, DataError
from foreword.eval.paired import compare_reports, mcnemar_p
from foreword.eval.report import EvalReport
from foreword.eval.run import evaluate
from tests.eval.fakes import answering, make_task

ROWS = [{"input": str(n), "target": f"the right answer is {n}"} for n in range(60)]


def judged(
    folder: Path, answer: Callable[[int], str], metric: str = "exact_match", limit: int | None = None
) -> EvalReport:
    task = make_task(folder, ROWS, metric=metric)

    def reply(request: Request) -> str:
        return answer(int(request.prompt or ""))

    return evaluate(answering(reply), task, prefix="t", limit=limit)


def right_from(first: int) -> Callable[[int], str]:
    return lambda n: f"the right answer is {n}" if n >= first else "the wrong one"


def test_verdicts(tmp_path: Path) -> None:
    strong, weak, close = (judged(tmp_path, right_from(first)) for first in (10, 25, 11))
    result = compare_reports(strong, weak)
    assert (result.verdict, result.only_a, result.only_b) == ("better", 15, 0)
    assert result.difference == pytest.approx(15 / 60) and 0 < result.interval[0] < 0.25 < result.interval[1]
    assert result.p_value == pytest.approx(2 * 0.5**15)
    assert compare_reports(weak, strong).verdict == "worse"
    assert compare_reports(strong, close).verdict == "no difference" and compare_reports(strong, close).p_value == 1
    assert compare_reports(strong, strong).interval == (0, 0)
    assert "better: exact_match 0.8333 against 0.5833 on 60 rows of t test" in result.summary()
    assert result.to_json()["verdict"] == "better"


@pytest.mark.parametrize("metric", ["token_f1", "rouge_l", "bleu", "f1"])
def test_metrics_without_right_and_wrong_use_the_interval(tmp_path: Path, metric: str) -> None:
    strong, weak = (judged(tmp_path, right_from(first), metric) for first in (10, 35))
    result = compare_reports(strong, weak)
    assert (result.verdict, result.p_value) == ("better", None)
    assert result.interval[0] > 0 and compare_reports(weak, strong).verdict == "worse"
    assert compare_reports(weak, strong).interval == tuple(-end for end in reversed(result.interval))
    assert compare_reports(strong, strong).verdict == "no difference"


def test_comparison_is_seeded(tmp_path: Path) -> None:
    strong, weak = (judged(tmp_path, right_from(first)) for first in (10, 25))
    assert compare_reports(strong, weak, seed=1) == compare_reports(strong, weak, seed=1)
    assert compare_reports(strong, weak, seed=1).interval != compare_reports(strong, weak, seed=2).interval


def test_other_data_is_refused_with_both_hashes(tmp_path: Path) -> None:
    a, b = judged(tmp_path, right_from(10)), judged(tmp_path, right_from(10), limit=20)
    with pytest.raises(DataError) as error:
        compare_reports(a, b)
    assert a.data_sha256 in str(error.value) and b.data_sha256 in str(error.value)


def test_other_metric_and_missing_rows_are_refused(tmp_path: Path) -> None:
    a, b = judged(tmp_path, right_from(10)), judged(tmp_path, right_from(10), "bleu")
    with pytest.raises(ConfigError, match="metric 'exact_match' against 'bleu'"):
        compare_reports(a, b)
    with pytest.raises(DataError, match="a report of 60 rows came with 0"):
        compare_reports(a, EvalReport.from_json(a.to_json()))


def test_interval_of_the_difference_has_the_width_of_theory(tmp_path: Path) -> None:
    a = judged(tmp_path, lambda n: f"the right answer is {n}" if n % 3 else "")
    b = judged(tmp_path, lambda n: f"the right answer is {n}" if n % 4 else "")
    differences = np.array([x.score - y.score for x, y in zip(a.rows, b.rows, strict=True)])
    half = 1.96 * differences.std() / np.sqrt(60)
    low, high = compare_reports(a, b).interval
    assert high - low == pytest.approx(2 * half, rel=0.15)
    assert dataclasses.replace(a, rows=()) != a


@given(st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None)
def test_mcnemar_equals_the_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected, rel=1e-6)


def test_mcnemar_of_many_rows() -> None:
    assert 0 <= mcnemar_p(5000, 1) < 1e-300 and mcnemar_p(5000, 5000) == 1
