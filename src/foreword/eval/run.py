"""Judging a task: answers from a generate function, a score with its interval, a report.

Greedy decoding, whole answers, no teacher forcing: what is judged is what is served. Works on any function from
requests to outputs; an engine brings its tokenizer and its prefixes' templates along.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

import foreword
from foreword.config import CLOSED_METRICS
from foreword.core.template import TaskTemplate, end_id
from foreword.engine.request import Output, Request
from foreword.errors import BackendFailed, ConfigError, did_you_mean
from foreword.eval.labels import Generate, LabelScores, build_trie, calibration_error, label_probabilities
from foreword.eval.metrics import bootstrap, get_metric, label_table, percentile_interval
from foreword.eval.report import Decoding, EvalReport, EvalRow, Kind
from foreword.eval.tasks import Row, Split, Task, rows_sha256, sample_rows

NUM_RESAMPLES = 1000
"""Bootstrap resamples; the interval's ends move by a few thousandths of its width with more."""
OPEN_METRICS = ("exact_match", "token_f1", "squad_f1", "rouge_l", "bleu")
MIN_PROBABILITY = 1e-6
"""What the log loss takes for less, so that one row with a target outside the labels leaves it finite."""
PACKAGES = ("torch", "transformers", "numpy", "sacrebleu", "rouge-score", "scikit-learn")


class EngineLike(Protocol):
    """What judging needs of an engine."""

    @property
    def base(self) -> Any:
        """The frozen base: `.tokenizer`, `.stop_ids`, `.spec`."""

    @property
    def prefixes(self) -> Mapping[str, Any]:
        """The prefixes by name, each with its `.template`."""

    def generate(self, requests: Sequence[Request]) -> list[Output]:
        """Answer requests, in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where answers come from, and what is known of it."""

    generate: Generate
    tokenizer: Any = None
    prefixes: Mapping[str, Any] | None = None
    stop_ids: frozenset[int] = frozenset()
    max_positions: int | None = None

    @classmethod
    def of(cls, engine: EngineLike | Generate, tokenizer: Any = None) -> Source:
        """Return the source that an engine, or a generate function with a tokenizer, is."""
        if not hasattr(engine, "generate"):
            return cls(generate=engine, tokenizer=tokenizer)
        whole = cast("EngineLike", engine)
        base = whole.base
        return cls(
            generate=whole.generate,
            tokenizer=tokenizer or base.tokenizer,
            prefixes=whole.prefixes,
            stop_ids=base.stop_ids,
            max_positions=base.spec.max_positions,
        )

    @property
    def closing_id(self) -> int | None:
        """The token behind an answer, as in training."""
        return None if self.tokenizer is None else end_id(self.tokenizer, self.stop_ids)


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back for some rows."""

    texts: list[str]
    finish_reasons: list[str]
    decoding: Decoding
    scores: LabelScores | None = None


def evaluate(
    engine: EngineLike | Generate,
    task: Task,
    *,
    prefix: str | None,
    split: Split = "test",
    limit: int | None = None,
    decoding: Literal["free", "labels", "auto"] = "auto",
    seed: int = 0,
    out: str | Path | None = None,
    tokenizer: Any = None,
) -> EvalReport:
    """Judge a prefix on a split of its task, or the base with the task's hard text where `prefix` is None.

    `limit` rows are drawn by `seed`. `auto` decodes to the most probable label where the task has a closed set, else
    free text; a prefix with soft slots behind the input, and a generate function without `tokenizer`, are constrained
    to the labels greedily instead, without probabilities. `out` is where the report is saved (JSON, with a JSONL of
    rows beside it). Raises ConfigError, DataError, and BackendFailed where an answer failed.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} judges no row", hint="Leave it out to judge all rows.")
    if prefix is None:
        from foreword.eval.baselines import evaluate_baseline

        return evaluate_baseline(
            engine, task, "hard_text", split=split, limit=limit, decoding=decoding, seed=seed, out=out,
            tokenizer=tokenizer,
        )  # fmt: skip
    started = time.monotonic()
    source = Source.of(engine, tokenizer)
    template = _template_of(source, task, prefix)
    rows = sample_rows(task.rows(split), limit, seed)
    fitted = fit_rows(task, rows, source, template)
    labels = labels_for(task, decoding)
    if labels:
        answers = _answer_by_label(source, task, fitted, prefix, template, labels)
    else:
        answers = answer_freely(source.generate, [_request(task, row, prefix) for row in fitted])
    report = judge(task, rows, answers, split=split, kind="prefix", prefix=prefix, seed=seed, started=started)
    if out is not None:
        report.save(out)
    return report


def labels_for(task: Task, decoding: Literal["free", "labels", "auto"]) -> tuple[str, ...]:
    """Return the labels to decode to, () for free text. Raises ConfigError where labels are asked for and absent."""
    if decoding not in ("free", "labels", "auto"):
        raise ConfigError(f"unknown decoding {decoding!r}", hint=did_you_mean(decoding, ("free", "labels", "auto")))
    labels = () if decoding == "free" else task.labels()
    if decoding == "labels" and not labels:
        raise ConfigError(f"task {task.name!r} has no closed set of answers", hint="Set labels in [task].")
    return labels


def fit_rows(task: Task, rows: Sequence[Row], source: Source, template: TaskTemplate | None) -> list[Row]:
    """Return the rows with inputs that fit the base and the task's limit, as far as the source lets one count."""
    if source.tokenizer is None:
        return list(rows)
    limit = task.input_limit(source.tokenizer, source.max_positions, template)
    return [task.fit(row, source.tokenizer, limit) for row in rows]


def answer_freely(generate: Generate, requests: Sequence[Request], decoding: Decoding = "free") -> Answers:
    """Return the answers to requests. Raises BackendFailed where one failed or is missing."""
    outputs = generate(requests)
    if len(outputs) != len(requests):
        raise BackendFailed(f"{len(outputs)} outputs for {len(requests)} requests")
    for place, output in enumerate(outputs):
        if output.finish_reason in ("error", "abort"):
            raise BackendFailed(
                f"request {place + 1} of {len(requests)} ended with {output.finish_reason}",
                hint="A failed answer is not judged as a wrong one; see the engine's log.",
            )
    return Answers([output.text.strip() for output in outputs], [output.finish_reason for output in outputs], decoding)


def answer_scored(scores: LabelScores) -> Answers:
    """Return the most probable labels as answers."""
    best = scores.best
    return Answers(best, ["stop"] * len(best), "labels", scores)


def judge(
    task: Task,
    rows: Sequence[Row],
    answers: Answers,
    *,
    split: str,
    kind: Kind,
    seed: int,
    started: float,
    prefix: str | None = None,
    num_shots: float = 0.0,
) -> EvalReport:
    """Score answers to rows and report them; `started` is the monotonic clock when answering began."""
    metric = get_metric(task.config.metric)
    counts = metric.count(answers.texts, right_answers(metric.name, rows))
    labels = task.labels()
    named = (name for name in (CLOSED_METRICS if labels else OPEN_METRICS) if name != metric.name)
    targets = [row.target for row in rows]
    return EvalReport(
        task=task.name,
        split=split,
        metric=metric.name,
        score=float(metric.total(counts.sum(axis=0, keepdims=True))[0]),
        interval=percentile_interval(bootstrap(metric, counts, NUM_RESAMPLES, seed)),
        num_rows=len(rows),
        kind=kind,
        prefix=prefix,
        decoding=answers.decoding,
        others={name: get_metric(name).score(answers.texts, right_answers(name, rows)) for name in named},
        per_label=tuple(label_table(answers.texts, targets, labels)) if labels else (),
        calibration=None if answers.scores is None else _calibration(answers.scores, targets),
        num_cut=sum(reason == "length" for reason in answers.finish_reasons) if answers.decoding == "free" else 0,
        num_shots=num_shots,
        data_sha256=rows_sha256(rows),
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        seconds=round(time.monotonic() - started, 3),
        rows=_rows(rows, answers, metric.row(counts).tolist()),
    )


def right_answers(metric: str, rows: Sequence[Row] | Sequence[EvalRow]) -> list[tuple[str, ...]]:
    """Return the answers that a metric compares with: the target alone where it counts classes, else all references."""
    return [(row.target,) if metric in ("accuracy", "f1") else row.references for row in rows]


def versions() -> dict[str, str]:
    """Return the versions of what a number depends on, of the packages that are installed."""
    found = {"foreword": foreword.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _template_of(source: Source, task: Task, prefix: str) -> TaskTemplate | None:
    """The prefix's own template; None for a prefix that has none. Raises ConfigError for an unknown name."""
    if source.prefixes is None:
        return task.template
    if prefix not in source.prefixes:
        raise ConfigError(f"the engine has no prefix {prefix!r}", hint=did_you_mean(prefix, source.prefixes))
    template: TaskTemplate | None = source.prefixes[prefix].template
    return template


def _request(task: Task, row: Row, prefix: str, choices: Sequence[str] | None = None) -> Request:
    return Request(
        prompt=row.input if row.messages is None else None,
        messages=row.messages,
        prefix=prefix,
        max_tokens=task.config.max_new_tokens if choices is None else None,
        choices=choices,
    )


def _answer_by_label(
    source: Source, task: Task, rows: Sequence[Row], prefix: str, template: TaskTemplate | None, labels: tuple[str, ...]
) -> Answers:
    tokenizer = source.tokenizer
    if tokenizer is None or template is None or template.num_after:
        return answer_freely(source.generate, [_request(task, row, prefix, labels) for row in rows], "choices")
    prompts = [
        template.render(tokenizer, row.input).ids
        if row.messages is None
        else template.render_messages(tokenizer, row.messages).ids
        for row in rows
    ]
    trie = build_trie(labels, tokenizer, closing_id=source.closing_id)
    return answer_scored(label_probabilities(source.generate, prompts, labels, trie, prefix=prefix))


def _rows(rows: Sequence[Row], answers: Answers, scores: Sequence[float]) -> tuple[EvalRow, ...]:
    judged = []
    for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
        found = answers.scores
        judged.append(
            EvalRow(
                index=row.index,
                input=row.input,
                target=row.target,
                references=row.references,
                output=answers.texts[place],
                score=score,
                finish_reason=answers.finish_reasons[place],
                probabilities=None
                if found is None
                else dict(zip(found.labels, found.probabilities[place].tolist(), strict=True)),
                residual=0.0 if found is None else float(found.residual[place]),
            )
        )
    return tuple(judged)


def _calibration(scores: LabelScores, targets: Sequence[str]) -> dict[str, float]:
    confidences = scores.probabilities.max(axis=1)
    correct = [best == target for best, target in zip(scores.best, targets, strict=True)]
    place = {label: index for index, label in enumerate(scores.labels)}
    of_targets = [
        scores.probabilities[row, place[target]] if target in place else 0.0 for row, target in enumerate(targets)
    ]
    return {
        "ece": calibration_error(confidences.tolist(), correct),
        "confidence": float(confidences.mean()),
        "log_loss": float(-np.log(np.maximum(of_targets, MIN_PROBABILITY)).mean()),
        "max_residual": float(scores.residual.max()),
    }
