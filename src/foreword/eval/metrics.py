"""Metrics: numbers per row that add up, and one function from their sums to the score.

Every metric turns a row into *counts* [K] such that the score of any set of rows is a function of the rows' summed
counts alone. So a bootstrap resample costs one product of weights and counts, also for corpus metrics such as BLEU and
macro F1, where no mean of per-row scores is the score. Scores are 0 to 1, higher is better.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreword.errors import ConfigError, did_you_mean

Array = NDArray[np.float64]
References = Sequence[Sequence[str]]
"""Per row the answers that count as right, the target first."""

BLEU_ORDER = 4
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A score of outputs against references."""

    name: str
    count: Callable[[Sequence[str], References], Array]
    """Counts [N, K] of N rows."""
    total: Callable[[Array], Array]
    """Scores [B] of B sets of rows from their summed counts [B, K]; NaN where no row is in the set."""
    row: Callable[[Array], Array]
    """Scores [N] of single rows from counts [N, K], for reading; their mean is the score of mean metrics only."""
    is_binary: bool = False
    """A row is right or wrong, so that McNemar's test applies."""

    def score(self, outputs: Sequence[str], references: References) -> float:
        """Return the score of all rows."""
        return float(self.total(self.count(outputs, references).sum(axis=0, keepdims=True))[0])


def get_metric(name: str) -> Metric:
    """Return a metric by name. Raises ConfigError with the nearest names."""
    if name not in METRICS:
        raise ConfigError(f"unknown metric {name!r}", hint=did_you_mean(name, METRICS))
    return METRICS[name]


def fold(text: str) -> str:
    """Return the text as answers are compared: lower case, runs of whitespace as one space, none at the ends."""
    return " ".join(text.lower().split())


def fold_squad(text: str) -> str:
    """Return the text as SQuAD compares answers: lower case, without punctuation, articles and further whitespace."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def resample_weights(num_rows: int, num_resamples: int, seed: int) -> Array:
    """Return how often each row is in each bootstrap resample, [B, N], by seed."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(num_rows, size=num_rows) for _ in range(num_resamples))
    return np.stack([np.bincount(draw, minlength=num_rows) for draw in draws]).astype(np.float64)


def bootstrap(metric: Metric, counts: Array, num_resamples: int, seed: int) -> Array:
    """Return the scores [B] of `num_resamples` bootstrap resamples of the rows."""
    return metric.total(resample_weights(len(counts), num_resamples, seed) @ counts)


def percentile_interval(scores: Array, level: float = 0.95) -> tuple[float, float]:
    """Return the middle `level` of bootstrap scores, as (low, high)."""
    low, high = np.quantile(scores, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# Mean metrics: counts are (score, 1) ----------------------------------------------------------------------------------


def _mean_metric(name: str, score: Callable[[str, Sequence[str]], float], is_binary: bool = False) -> Metric:
    def count(outputs: Sequence[str], references: References) -> Array:
        values = [score(output, answers) for output, answers in zip(outputs, references, strict=True)]
        return np.column_stack([np.array(values, dtype=np.float64), np.ones(len(values))])

    def total(sums: Array) -> Array:
        return _ratio(sums[:, 0], sums[:, 1], empty=np.nan)

    return Metric(name=name, count=count, total=total, row=lambda counts: counts[:, 0], is_binary=is_binary)


def _exact_match(output: str, references: Sequence[str]) -> float:
    return float(fold(output) in {fold(reference) for reference in references})


def _accuracy(output: str, references: Sequence[str]) -> float:
    return float(fold(output) == fold(references[0]))


def _bag_f1(output: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words; two empty bags agree."""
    if not output or not reference:
        return float(not output and not reference)
    return 2 * sum((Counter(output) & Counter(reference)).values()) / (len(output) + len(reference))


def _token_f1(output: str, references: Sequence[str]) -> float:
    words = fold(output).split()
    return max(_bag_f1(words, fold(reference).split()) for reference in references)


def _squad_f1(output: str, references: Sequence[str]) -> float:
    words = fold_squad(output).split()
    return max(_bag_f1(words, fold_squad(reference).split()) for reference in references)


def _rouge_l(output: str, references: Sequence[str]) -> float:
    return float(_rouge_scorer().score_multi(list(references), output)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


# Macro F1: counts are, for each label that occurs as a target, (both, output, target) ---------------------------------


def _f1_count(outputs: Sequence[str], references: References) -> Array:
    targets = [fold(answers[0]) for answers in references]
    place = {label: index for index, label in enumerate(sorted(set(targets)))}
    counts = np.zeros((len(targets), 3, len(place)))
    for row, (output, target) in enumerate(zip(outputs, targets, strict=True)):
        said, meant = place.get(fold(output)), place[target]
        counts[row, 2, meant] = 1
        if said is not None:  # an output outside the set is a miss of its target's label, not a class of its own
            counts[row, 1, said] = 1
            counts[row, 0, said] = said == meant
    return counts.reshape(len(targets), -1)


def _f1_total(sums: Array) -> Array:
    both, said, meant = sums.reshape(len(sums), 3, -1).transpose(1, 0, 2)
    f1 = _ratio(2 * both, said + meant, empty=0.0)
    return _ratio(np.where(meant > 0, f1, 0.0).sum(axis=1), (meant > 0).sum(axis=1), empty=np.nan)


def _f1_row(counts: Array) -> Array:
    right: Array = counts.reshape(len(counts), 3, -1)[:, 0].sum(axis=1)
    return right


# BLEU: counts are (output length, reference length, n-gram matches 1-4, n-grams 1-4) ----------------------------------


def _bleu_count(outputs: Sequence[str], references: References) -> Array:
    from sacrebleu.metrics import BLEU

    scorer = BLEU(effective_order=True)
    counts = np.zeros((len(outputs), 2 + 2 * BLEU_ORDER))
    for row, (output, answers) in enumerate(zip(outputs, references, strict=True)):
        score = scorer.sentence_score(output, list(answers))
        counts[row] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
    return counts


def _bleu(sums: Array, effective_order: bool = False) -> Array:
    from sacrebleu.metrics import BLEU

    def score(output_len: int, reference_len: int, *ngrams: int) -> float:
        if not output_len:
            return 0.0
        matches, totals = list(ngrams[:BLEU_ORDER]), list(ngrams[BLEU_ORDER:])
        bleu = BLEU.compute_bleu(matches, totals, output_len, reference_len, "exp", effective_order=effective_order)
        return min(float(bleu.score) / 100, 1.0)  # a perfect score is 100.00000000000004

    return np.array([score(*row) for row in np.rint(sums).astype(int).tolist()])


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            _mean_metric("exact_match", _exact_match, is_binary=True),
            _mean_metric("accuracy", _accuracy, is_binary=True),
            Metric(name="f1", count=_f1_count, total=_f1_total, row=_f1_row),
            _mean_metric("token_f1", _token_f1),
            _mean_metric("squad_f1", _squad_f1),
            _mean_metric("rouge_l", _rouge_l),
            Metric(name="bleu", count=_bleu_count, total=_bleu, row=partial(_bleu, effective_order=True)),
        )
    }
)
"""
- `exact_match`: the folded output is one of the folded references.
- `accuracy`: the folded output is the folded target; further references do not count.
- `f1`: macro F1 over the labels that occur as targets, as scikit-learn computes it.
- `token_f1`: F1 of the bags of folded words (Rajpurkar et al. 2016, arXiv:1606.05250), best of the references; articles
  and punctuation are kept, as exact match keeps them.
- `squad_f1`: the same after SQuAD's own normalisation, for figures next to published ones.
- `rouge_l`: F measure of the longest common subsequence (Lin 2004), by rouge-score without stemming, best of the
  references; its tokens are a-z and 0-9, so that it is 0 for other scripts.
- `bleu`: corpus BLEU by sacrebleu (Post 2018, arXiv:1804.08771; 13a tokens, mixed case, exponential smoothing), several
  references per row; a row's own score is sentence BLEU with effective order.
"""

LABEL_FIELDS = ("label", "precision", "recall", "f1", "support")


def label_table(outputs: Sequence[str], targets: Sequence[str], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return precision, recall, F1 and support of the labels that were said or meant, by scikit-learn."""
    from sklearn.metrics import precision_recall_fscore_support

    place = {fold(label): index for index, label in enumerate(labels)}
    said = [place.get(fold(output), -1) for output in outputs]
    meant = [place.get(fold(target), -1) for target in targets]
    columns = precision_recall_fscore_support(meant, said, labels=list(range(len(labels))), zero_division=0)
    table = [
        dict(zip(LABEL_FIELDS, (label, *map(float, numbers)), strict=True))
        for label, *numbers in zip(labels, *columns, strict=True)
    ]
    used = {*said, *meant}
    return [line | {"support": int(line["support"])} for index, line in enumerate(table) if index in used]


def _ratio(top: Array, bottom: Array, empty: float) -> Array:
    """Divide, with `empty` where the bottom is 0."""
    result = np.full(np.broadcast(top, bottom).shape, empty)
    np.divide(top, bottom, out=result, where=np.asarray(bottom) > 0)
    return result
