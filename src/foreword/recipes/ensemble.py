"""`ensemble`: several versions answer every row in one mixed batch, and vote.

Source: prompt ensembling, Lester et al. 2021, arXiv:2104.08691, section 6.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foreword.config import CLOSED_METRICS, TrainConfig
from foreword.core.artefact import Artefact, load_artefact
from foreword.engine.request import Output, Request
from foreword.errors import ConfigError
from foreword.eval.labels import LabelScores, build_trie, label_probabilities
from foreword.eval.metrics import get_metric
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.run import Answers, Source, answer_freely, answer_scored, fit_rows, judge, labels_for
from foreword.eval.tasks import Row, Split, Task, sample_rows
from foreword.recipes.judging import Decoding, engine_with
from foreword.train.loop import fit
from foreword.train.run import Run

if TYPE_CHECKING:
    from foreword.core.model import FrozenModel
    from foreword.engine.engine import Engine
    from foreword.eval.report import EvalReport
    from foreword.train.loop import Progress

Vote = Literal["majority", "mean", "consensus"]
SMALLEST = 1e-9
"""Probability below which a label is not told apart in a mean of log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ensemble:
    """Members, votes, and whether voting is worth its price."""

    members: Mapping[str, EvalReport] = field(repr=False)
    votes: Mapping[str, EvalReport] = field(repr=False)
    """By the kind of vote."""
    best_member: str
    """By score on these rows, which flatters it: the test against it is on the safe side."""
    paired: Mapping[str, PairedResult]
    """Each vote against the best member."""
    num_requests: float
    """Requests a row costs: one for each member and round of label decoding."""
    member_requests: float
    """Of the best member alone, on average."""
    prefix_bytes: int
    """Of all members' keys and values."""
    seconds: float
    """Answering all rows by all members in mixed batches."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        plain = ("best_member", "num_requests", "member_requests", "prefix_bytes", "seconds")
        return {name: getattr(self, name) for name in plain} | {
            "members": {name: report.to_json() for name, report in self.members.items()},
            "votes": {name: report.to_json() for name, report in self.votes.items()},
            "paired": {name: test.to_json() for name, test in self.paired.items()},
        }


def ensemble(
    base: FrozenModel,
    task: Task,
    members: Mapping[str, Artefact],
    *,
    split: Split = "dev",
    limit: int | None = None,
    decoding: Decoding = "auto",
    seed: int = 0,
) -> Ensemble:
    """Answer a split by all members, mixed in the engine's batches, let them vote, and judge members and votes.

    With label decoding there are two votes: `majority` of the best labels (a tie goes to the label with the higher
    mean log-probability) and `mean`, the label with the highest mean log-probability. Free answers vote by `majority`
    of equal texts where the metric is one for closed sets (a tie goes to the earlier member), else by `consensus`: the
    answer that the metric finds most like the others'. Raises ConfigError for fewer than two members.
    """
    check_members(len(members))
    started = time.monotonic()
    engine = engine_with(base, members)
    counted = _Counted(engine)
    rows = sample_rows(task.rows(split), limit, seed)
    labels = labels_for(task, decoding)
    answers = _answer(counted, engine, task, rows, list(members), labels)
    seconds = time.monotonic() - started
    common: dict[str, Any] = {"split": split, "kind": "prefix", "seed": seed, "started": started}
    reports = {name: judge(task, rows, given, prefix=name, **common) for name, given in answers.items()}
    votes = {
        name: judge(task, rows, given, prefix=f"{name} vote of {len(members)}", **common)
        for name, given in vote(task, list(answers.values())).items()
    }
    best = max(reports, key=lambda name: reports[name].score)
    return Ensemble(
        members=reports,
        votes=votes,
        best_member=best,
        paired={name: compare_reports(report, reports[best]) for name, report in votes.items()},
        num_requests=counted.total / len(rows),
        member_requests=counted.by_prefix[best] / len(rows),
        prefix_bytes=sum(prefix.num_bytes for prefix in engine.prefixes.values()),
        seconds=round(seconds, 3),
    )


def train_members(
    base: FrozenModel,
    task: Task,
    config: TrainConfig,
    num: int,
    *,
    out: str | Path,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Artefact]:
    """Train `num` members by seeds, `config.seed` and those after it, in one joint pass; return them by name.

    Each gets the vectors it would get alone. Raises ConfigError for fewer than two, and as `fit` does.
    """
    check_members(num)
    runs = [
        Run(task, dataclasses.replace(config, seed=seed), f"{task.name}-{config.method}-{seed}")
        for seed in range(config.seed, config.seed + num)
    ]
    results = fit(base, runs, out=out, on_progress=on_progress)
    if broken := [result.error for result in results if result.error]:
        raise broken[0]
    return {result.name: load_artefact(result.artefact) for result in results if result.artefact is not None}


def check_members(num: int) -> None:
    """Raise ConfigError where `num` members are too few to vote."""
    if num < 2:
        raise ConfigError(f"an ensemble of {num} member", hint="Give two versions or seeds; three can outvote.")


def vote(task: Task, answers: Sequence[Answers]) -> dict[str, Answers]:
    """Return what the members' answers to the same rows come to, by each vote that suits them."""
    texts = [list(given) for given in zip(*(one.texts for one in answers), strict=True)]
    scores = [one.scores for one in answers]
    if all(score is not None for score in scores):
        return _label_votes([score for score in scores if score is not None])
    name: Vote = "majority" if task.config.metric in CLOSED_METRICS else "consensus"
    pick = _most_frequent if name == "majority" else _consensus(task.config.metric)
    chosen = [pick(row) for row in texts]
    reasons = [answers[place].finish_reasons[index] for index, place in enumerate(chosen)]
    return {name: Answers([row[place] for row, place in zip(texts, chosen, strict=True)], reasons, "free")}


def _label_votes(scores: Sequence[LabelScores]) -> dict[str, Answers]:
    labels = scores[0].labels
    logs = np.mean([np.log(np.maximum(score.probabilities, SMALLEST)) for score in scores], axis=0)
    shares = np.exp(logs - logs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    residual = np.mean([score.residual for score in scores], axis=0)
    mean = answer_scored(LabelScores(labels, shares, residual))
    ballots = np.stack([score.probabilities.argmax(axis=1) for score in scores])
    counts = np.stack([(ballots == place).sum(axis=0) for place in range(len(labels))], axis=1)
    elected = np.where(counts == counts.max(axis=1, keepdims=True), shares, -1.0).argmax(axis=1)
    majority = Answers([labels[place] for place in elected], ["stop"] * len(elected), "labels")
    return {"majority": majority, "mean": mean}


def _most_frequent(texts: list[str]) -> int:
    counts = Counter(texts)
    return max(range(len(texts)), key=lambda place: (counts[texts[place]], -place))


def _consensus(metric_name: str) -> Callable[[list[str]], int]:
    """Return a choice by minimum Bayes risk: the answer with the highest mean metric against the others."""
    metric = get_metric(metric_name)

    def choose(texts: list[str]) -> int:
        def likeness(place: int) -> float:
            others = [(text,) for other, text in enumerate(texts) if other != place]
            return float(metric.row(metric.count([texts[place]] * len(others), others)).mean())

        return max(range(len(texts)), key=lambda place: (likeness(place), -place))

    return choose


class _Counted:
    """An engine's generate, its requests counted by prefix."""

    def __init__(self, engine: Engine) -> None:
        self._generate = engine.generate
        self.by_prefix: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_prefix.values())

    def __call__(self, requests: Sequence[Request]) -> list[Output]:
        self.by_prefix.update(str(request.prefix) for request in requests)
        return self._generate(requests)


def _answer(
    generate: _Counted, engine: Engine, task: Task, rows: Sequence[Row], names: list[str], labels: tuple[str, ...]
) -> dict[str, Answers]:
    """Return each member's answers; the requests of all stand in one list, so that the engine's batches are mixed."""
    source = Source.of(engine)
    templates = {name: engine.prefixes[name].template or task.template for name in names}
    fitted = {name: fit_rows(task, rows, source, templates[name]) for name in names}
    owners = [name for name in names for _ in rows]
    parts = [slice(place * len(rows), (place + 1) * len(rows)) for place in range(len(names))]
    if labels and not any(template.num_after for template in templates.values()):
        prompts = [
            (templates[name].render(source.tokenizer, row.input) if row.messages is None
             else templates[name].render_messages(source.tokenizer, row.messages)).ids
            for name in names for row in fitted[name]
        ]  # fmt: skip
        trie = build_trie(labels, source.tokenizer, closing_id=source.closing_id)
        found = label_probabilities(generate, prompts, labels, trie, prefix=owners)
        return {
            name: answer_scored(LabelScores(labels, found.probabilities[part], found.residual[part]))
            for name, part in zip(names, parts, strict=True)
        }
    requests = [
        Request(
            prompt=row.input if row.messages is None else None,
            messages=row.messages,
            prefix=name,
            max_tokens=None if labels else task.config.max_new_tokens,
            choices=labels or None,
        )
        for name in names
        for row in fitted[name]
    ]
    given = answer_freely(generate, requests, "choices" if labels else "free")
    return {
        name: Answers(given.texts[part], given.finish_reasons[part], given.decoding)
        for name, part in zip(names, parts, strict=True)
    }
