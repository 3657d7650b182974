"""A measured number with its interval: the bootstrap over rows, the same resamples for everything compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from foreword.eval.metrics import percentile_interval

Array = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
MIN_ROWS = 5
"""Fewer rows say nothing about their spread: no interval is given."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its 95 % interval; `low` and `high` are None where there are too few rows."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval lies below zero."""
        return self.high is not None and self.high < 0

    def __str__(self) -> str:
        """Return `0.123 [0.110, 0.140]`."""
        interval = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


class Resamples:
    """The same bootstrap resamples of the rows for every number of one explanation."""

    def __init__(self, num_tokens: Sequence[int], seed: int = 0) -> None:
        self.num_tokens = np.asarray(num_tokens, dtype=np.float64)
        rows = len(self.num_tokens)
        self._weights = _weights(rows, seed) if rows >= MIN_ROWS else None

    def estimate(self, statistic: Callable[..., Array], *sums: Any) -> Estimate:
        """Return statistic(mean of sums[0] per token, mean of sums[1], ...); each of `sums` [rows] is a row's sum."""
        arrays = [np.asarray(each, dtype=np.float64) for each in sums]
        tokens = self.num_tokens.sum()
        value = float(statistic(*(np.array([each.sum() / tokens]) for each in arrays))[0])
        if self._weights is None:
            return Estimate(value)
        counts = self._weights @ self.num_tokens
        return Estimate(value, *percentile_interval(statistic(*((self._weights @ each) / counts for each in arrays))))

    def mean(self, sums: Any) -> Estimate:
        """Return the mean per token."""
        return self.estimate(lambda mean: mean, sums)

    def difference(self, one: Any, other: Any) -> Estimate:
        """Return mean(one) - mean(other), rows paired."""
        return self.mean(np.asarray(one) - np.asarray(other))

    def num_errors(self, one: Any, other: Any) -> float | None:
        """Return how many bootstrap standard errors mean(one) - mean(other) is away from zero, with its sign."""
        if self._weights is None:
            return None
        sums = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
        spread = float(((self._weights @ sums) / (self._weights @ self.num_tokens)).std())
        mean = float(sums.sum() / self.num_tokens.sum())
        return mean / spread if spread > 0 else (0.0 if mean == 0 else float(np.copysign(np.inf, mean)))


@lru_cache(maxsize=8)
def _weights(num_rows: int, seed: int) -> Array:
    """Return how often each row is in each resample [NUM_RESAMPLES, rows]."""
    drawn = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    return drawn.astype(np.float64)
