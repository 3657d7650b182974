"""Intervals: what they cover, and when there is none."""

import numpy as np
import pytest

from foreword.explain.estimate import Estimate, Resamples


def test_means_are_per_token_and_differences_paired():
    draws = Resamples([1, 2, 3, 2, 2])
    assert draws.mean([1.0, 4.0, 9.0, 4.0, 4.0]).value == pytest.approx(2.2)
    same = draws.difference([1.0, 4.0, 9.0, 4.0, 4.0], [0.0, 2.0, 6.0, 2.0, 2.0])
    assert same.value == pytest.approx(1.0) and same.low == pytest.approx(1.0) and same.high == pytest.approx(1.0)
    assert same.is_above_zero and not same.is_below_zero
    assert Estimate(-1.0, -2.0, -0.5).is_below_zero


def test_too_few_rows_have_no_interval():
    draws = Resamples([1, 1, 1, 1])
    found = draws.mean([1.0, 2.0, 3.0, 4.0])
    assert found == Estimate(2.5) and not found.is_above_zero and not found.is_below_zero
    assert draws.num_errors([1.0] * 4, [0.0] * 4) is None
    assert str(found) == "2.5" and str(Estimate(1.0, 0.5, 1.5)) == "1 [0.5, 1.5]"


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = Resamples([1] * 40).mean(rng.normal(1.0, 1.0, 40))
        covered += found.low <= 1.0 <= found.high
    assert 175 <= covered <= 199  # 95 % of 200 is 190, and the bootstrap of 40 rows is a little narrow


def test_errors_count_standard_errors_with_their_sign():
    rng = np.random.default_rng(1)
    one = rng.normal(0.5, 1.0, 100)
    expected = one.mean() / (one.std() / 10)
    draws = Resamples([1] * 100)
    assert draws.num_errors(one, np.zeros(100)) == pytest.approx(expected, rel=0.1)
    assert draws.num_errors(np.zeros(100), one) == pytest.approx(-expected, rel=0.1)
    assert draws.num_errors([1.0] * 100, [0.0] * 100) > 1e6
    assert draws.num_errors([1.0] * 100, [1.0] * 100) == 0.0


def test_a_ratio_has_the_interval_of_the_ratio():
    without, discrete, trained = np.full(50, 4.0), np.full(50, 3.0), np.full(50, 2.0)
    score = Resamples([1] * 50).estimate(lambda w, d, t: (w - d) / (w - t), without, discrete, trained)
    assert (score.value, score.low, score.high) == pytest.approx((0.5, 0.5, 0.5))
