"""Is one result better than another? Both judged on the same rows, compared row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from foreword.errors import ConfigError, DataError
from foreword.eval.metrics import get_metric, percentile_interval, resample_weights
from foreword.eval.report import EvalReport
from foreword.eval.run import NUM_RESAMPLES, right_answers

Verdict = Literal["better", "worse", "no difference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedResult:
    """How `a` stands against `b` on the same rows."""

    task: str
    split: str
    metric: str
    num_rows: int
    score_a: float
    score_b: float
    difference: float
    """score_a - score_b."""
    interval: tuple[float, float]
    """95 % of the difference, by the paired bootstrap."""
    only_a: int | None
    """Rows that a alone has right; None where rows are not right or wrong."""
    only_b: int | None
    p_value: float | None
    """McNemar's exact test, two-sided; None where rows are not right or wrong."""
    verdict: Verdict
    """Of a: at 5 %, by McNemar's test where it applies, else by whether the interval holds 0."""
    data_sha256: str
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"interval": list(self.interval)}

    def summary(self) -> str:
        """Return the comparison in two lines of text."""
        low, high = self.interval
        test = "" if self.p_value is None else f", right alone {self.only_a} to {self.only_b}, p {self.p_value:.3g}"
        return (
            f"{self.verdict}: {self.metric} {self.score_a:.4f} against {self.score_b:.4f} on {self.num_rows} rows"
            f" of {self.task} {self.split}\n"
            f"difference {self.difference:+.4f} [{low:+.4f}, {high:+.4f}]{test}"
        )


def compare_reports(a: EvalReport, b: EvalReport, *, seed: int = 0, alpha: float = 0.05) -> PairedResult:
    """Compare two reports over the same rows: is `a` better than `b`?

    The bootstrap draws the same rows for both, so what is hard for both cancels out. Raises DataError with both hashes
    where the rows differ, or where a report came without its rows; ConfigError where the metrics differ.
    """
    if a.data_sha256 != b.data_sha256:
        raise DataError(
            f"{a.task} {a.split} was judged on other rows ({a.num_rows}, sha256 {a.data_sha256})"
            f" than {b.task} {b.split} ({b.num_rows}, sha256 {b.data_sha256})",
            hint="Judge both on the same split with the same limit and seed.",
        )
    if a.metric != b.metric:
        raise ConfigError(f"metric {a.metric!r} against {b.metric!r}", hint="Judge both by the same metric.")
    for report in (a, b):
        if len(report.rows) != report.num_rows:
            raise DataError(
                f"a report of {report.num_rows} rows came with {len(report.rows)}",
                hint="Load it together with its rows file.",
            )
    metric = get_metric(a.metric)
    references = right_answers(a.metric, a.rows)
    counts = [metric.count([row.output for row in report.rows], references) for report in (a, b)]
    weights = resample_weights(a.num_rows, NUM_RESAMPLES, seed)
    drawn = metric.total(weights @ counts[0]) - metric.total(weights @ counts[1])
    interval = percentile_interval(drawn, 1 - alpha)
    difference = a.score - b.score
    only_a = only_b = p_value = None
    significant = interval[0] > 0 or interval[1] < 0
    if metric.is_binary:
        right_a, right_b = (metric.row(count) > 0.5 for count in counts)
        only_a, only_b = int(np.sum(right_a & ~right_b)), int(np.sum(right_b & ~right_a))
        p_value = mcnemar_p(only_a, only_b)
        significant = p_value < alpha
    verdict: Verdict = "no difference"
    if significant:
        verdict = "better" if difference > 0 else "worse"
    return PairedResult(
        task=a.task,
        split=a.split,
        metric=a.metric,
        num_rows=a.num_rows,
        score_a=a.score,
        score_b=b.score,
        difference=difference,
        interval=interval,
        only_a=only_a,
        only_b=only_b,
        p_value=p_value,
        verdict=verdict,
        data_sha256=a.data_sha256,
        seed=seed,
    )


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p: how likely so uneven a split of the rows that one alone has right is by chance.

    Source: McNemar 1947; the binomial form.
    """
    total = only_a + only_b
    tail = ways = 1  # ways to choose 0 rows of them all
    for count in range(min(only_a, only_b)):
        ways = ways * (total - count) // (count + 1)
        tail += ways
    p_value: float = 2 * tail / 2**total
    return min(1.0, p_value)
