"""Checks of a single score: on rows that were not trained on, by generation, and of a prompt that is not too long."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata

import numpy as np

from foreword.doctor.finding import Finding
from foreword.doctor.probe_training import skipped
from foreword.doctor.subjects import Evaluation
from foreword.eval.metrics import bootstrap, get_metric, percentile_interval
from foreword.eval.run import NUM_RESAMPLES, right_answers
from foreword.eval.tasks import Row

LEAKED_SHARE = 0.05
"""Share of test rows seen in training from which a score counts as touched: a few repeats are in most data."""
OVERFIT_GAP = 0.1
"""How much further training rows must lie above dev at the longest prompt than at the best one."""
OVERFIT_LOSS = 0.02
"""What dev must have lost from its best length to the longest one."""


def check_leakage(evaluation: Evaluation) -> Finding:
    """Take the rows out of the test split that training saw, also those that differ in case and spaces only.

    Hashes of input and target, exact and normalised, of both splits; and those of rows whose input alone was seen.
    Duplicates of a short input with different targets are counted apart, and prove nothing.
    """
    if not evaluation.train or not evaluation.test:
        return skipped("leakage", "the rows of both splits, train and test")
    exact, loose, inputs = (_seen(evaluation, kind) for kind in ("exact", "normalised", "input"))
    share = loose / len(evaluation.test)
    ok = share < LEAKED_SHARE
    measured = f"of {len(evaluation.test)} test rows {exact} stand in training word for word, {loose} but for case, "
    measured += f"accents and punctuation, {inputs} with the same input"
    return Finding(
        check="leakage",
        ok=ok,
        measured=measured,
        expected=f"less than {LEAKED_SHARE:.0%} of the test rows",
        fix="Remove them from the test split, and judge again.",
        fault="" if ok else "teacher-forced-score",
        numbers={"exact": exact, "normalised": loose, "inputs": inputs, "test_rows": len(evaluation.test)},
    )


def check_claimed_score(evaluation: Evaluation) -> Finding:
    """Judge by generation: greedy, whole answers, as served; a score by teacher forcing hides what errors lead to.

    The test rows answered anew and scored, beside the claim: it should lie within what 95 % of resamples of these rows
    reach, widened by a row.
    """
    missing = [name for name in ("generate", "claimed_score", "test") if not _given(getattr(evaluation, name))]
    if missing or evaluation.generate is None or evaluation.claimed_score is None:
        return skipped("claimed score", f"the subject brings no {', '.join(missing)}")
    rows = list(evaluation.test)
    answers = [answer.strip() for answer in evaluation.generate([row.input for row in rows])]
    if len(answers) != len(rows):
        return skipped("claimed score", f"{len(answers)} answers came for {len(rows)} inputs")
    metric = get_metric(evaluation.metric)
    counts = metric.count(answers, right_answers(metric.name, rows))
    score = float(metric.total(counts.sum(axis=0, keepdims=True))[0])
    low, high = percentile_interval(bootstrap(metric, counts, NUM_RESAMPLES, 0))
    claim, room = evaluation.claimed_score, 1.0 / len(rows)
    ok = claim <= high + room
    numbers = {"claimed": claim, "greedy": score, "interval": [low, high], "rows": len(rows)}
    first = _first_words(answers, rows)
    numbers["first_word"] = first
    return Finding(
        check="claimed score",
        ok=ok,
        measured=f"{metric.name} {claim:.4f} is claimed, greedy answers reach {score:.4f} [{low:.4f}, {high:.4f}] on "
        f"{len(rows)} rows; their first word is right in {first:.0%}",
        expected="a claim within the interval of greedy answers, or below it",
        fix="Judge by `foreword eval`, which generates; choose checkpoints by it too.",
        fault="" if ok else "teacher-forced-score",
        numbers=numbers,
    )


def check_sweep(evaluation: Evaluation) -> Finding:
    """Use fewer vectors, or more rows: beyond some length a prompt learns its rows and not the task.

    Scores on training rows and on dev by the number of vectors: where dev falls from its best length to the longest
    one while the gap to the training rows opens, the longest is too long.
    """
    sweep = dict(sorted(evaluation.sweep.items()))
    if len(sweep) < 2:
        return skipped("sweep over P", "scores on training rows and on dev for two or more numbers of vectors")
    best = max(sweep, key=lambda num: (sweep[num][1], -num))
    longest = max(sweep)
    gaps = {num: train - dev for num, (train, dev) in sweep.items()}
    lost = sweep[best][1] - sweep[longest][1]
    opened = gaps[longest] - gaps[best]
    ok = best == longest or lost < OVERFIT_LOSS or opened < OVERFIT_GAP
    return Finding(
        check="sweep over P",
        ok=ok,
        measured=f"P={best}: training {sweep[best][0]:.3f}, dev {sweep[best][1]:.3f}; "
        f"P={longest}: training {sweep[longest][0]:.3f}, dev {sweep[longest][1]:.3f}",
        expected=f"dev within {OVERFIT_LOSS} of its best, or a gap to training that does not open by {OVERFIT_GAP}",
        fix=f"Use P={best}, more rows, or an early stop.",
        fault="" if ok else "overfit",
        numbers={"best": best, "longest": longest, "lost": lost, "gap_opened": opened},
    )


def _given(value: object) -> bool:
    return value is not None and value != () and value != []


def _seen(evaluation: Evaluation, kind: str) -> int:
    train = {_row_hash(row, kind) for row in evaluation.train}
    return sum(_row_hash(row, kind) in train for row in evaluation.test)


def _row_hash(row: Row, kind: str) -> bytes:
    turns = None if row.messages is None else [dict(message) for message in row.messages]
    parts = [row.input, turns] if kind == "input" else [row.input, turns, row.target]
    text = json.dumps(parts, ensure_ascii=False)
    return hashlib.sha256((_normal(text) if kind != "exact" else text).encode()).digest()


def _normal(text: str) -> str:
    """Return a text in lower case, without accents, with words and numbers only."""
    plain = "".join(mark for mark in unicodedata.normalize("NFKD", text) if not unicodedata.combining(mark))
    return " ".join(re.findall(r"\w+", plain.lower()))


def _first_words(answers: list[str], rows: list[Row]) -> float:
    """Share of answers whose first word is that of a right answer."""
    pairs = zip(answers, rows, strict=True)
    right = [
        answer.split()[:1] in [text.split()[:1] for text in (*row.references, row.target)] for answer, row in pairs
    ]
    return float(np.mean(right)) if right else 0.0
