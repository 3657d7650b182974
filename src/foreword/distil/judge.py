"""Judging a student: held-out questions answered by generation, and the KL gap that it closes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foreword.config import TaskConfig
from foreword.core.artefact import Artefact
from foreword.core.compile import compile
from foreword.distil.baselines import Contender, baselines
from foreword.distil.divergence import mean_divergences
from foreword.distil.elsewhere import Damage, measure_damage
from foreword.distil.ground import Desk
from foreword.distil.lessons import Lesson, encode, requests_for
from foreword.distil.prepare import Prepared
from foreword.eval.paired import PairedResult, compare_reports
from foreword.eval.report import EvalReport
from foreword.eval.rows import Row
from foreword.eval.run import answer_freely, judge
from foreword.eval.tasks import Task


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """How one contender did on the held-out questions."""

    name: str
    num_tokens: int
    """Positions that it takes."""
    divergence: float
    """KL(full context || it), nats per token of the teacher's answers, over the whole vocabulary."""
    gap_closed: float
    """1 - divergence / divergence of no context."""
    report: EvalReport
    paired: PairedResult | None
    """The student against it, on the same questions; None for the student."""

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "name": self.name,
            "num_tokens": self.num_tokens,
            "divergence": self.divergence,
            "gap_closed": self.gap_closed,
            "score": self.report.score,
            "interval": list(self.report.interval),
            "student_against_it": None if self.paired is None else self.paired.to_json(),
        }


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """What was found out about a student."""

    standings: tuple[Standing, ...]
    """The student first."""
    damage: tuple[Damage, ...]
    held_out: str
    """What the questions are: of the test file, held back, or the learned ones."""
    against: str
    """What counts as right: the given answers, or the teacher's."""

    def __getitem__(self, name: str) -> Standing:
        return next(standing for standing in self.standings if standing.name == name)

    @property
    def retained(self) -> float | None:
        """The student's score as a part of the full context's; None where that is 0."""
        full = self["full"].report.score
        return self["student"].report.score / full if full else None


def judge_student(desk: Desk, prepared: Prepared, artefact: Artefact) -> Judged:
    """Judge an artefact against all baselines on the held-out questions, and its damage elsewhere."""
    config, ground = prepared.job.distil, prepared.ground
    student = Contender("student", (compile(desk.base, artefact, name=config.name),), ground.num_vectors)
    start = prepared.run.start
    assert start is not None
    everyone = [student, *baselines(desk, ground, start, config.max_new_tokens)]
    chunks = [lesson.question.chunk for lesson in prepared.test]
    desk.tell(f"{config.name}: judged on {len(chunks)} questions against {len(everyone) - 1} baselines")
    rows = encode(desk.base, ground.template, prepared.test)
    divergences = mean_divergences(
        desk.base,
        rows,
        [ground.teachers[chunk] for chunk in chunks],
        {contender.name: contender.of(chunks) for contender in everyone},
    )
    against = "given" if all(lesson.question.target for lesson in prepared.test) else "teacher"
    reports = {contender.name: _report(desk, prepared, contender, against) for contender in everyone}
    none = divergences["none"]
    standings = tuple(
        Standing(
            name=contender.name,
            num_tokens=contender.num_tokens,
            divergence=divergences[contender.name],
            gap_closed=1 - divergences[contender.name] / none if none else 0.0,
            report=reports[contender.name],
            paired=None
            if contender is student
            else compare_reports(reports["student"], reports[contender.name], seed=config.seed),
        )
        for contender in everyone
    )
    damage = measure_damage(desk, ground, everyone[:3], config.elsewhere, config.seed)
    held_out = "test" if config.test else "held back" if prepared.dev else "learned"
    return Judged(standings, tuple(damage), held_out, against)


def _report(desk: Desk, prepared: Prepared, contender: Contender, against: str) -> EvalReport:
    config, started = prepared.job.distil, time.monotonic()
    questions = [lesson.question for lesson in prepared.test]
    names = [f"{contender.name}/{index}" for index in range(len(contender.prefixes))]
    for name, prefix in zip(names, contender.prefixes, strict=True):
        desk.engine.add_prefix(name, prefix)
    own = [names[question.chunk if len(names) > 1 else 0] for question in questions]
    try:
        answers = answer_freely(desk.engine.generate, requests_for(questions, own, config.max_new_tokens))
    finally:
        for name in names:
            desk.engine.remove_prefix(name)
    rows = _rows(prepared.test, against)
    task = Task(TaskConfig(name=config.name, train="-", metric=config.metric), {"train": rows})
    split = "test" if config.test else "dev"
    return judge(
        task, rows, answers, split=split, kind="prefix", prefix=contender.name, seed=config.seed, started=started
    )


def _rows(lessons: Sequence[Lesson], against: str) -> list[Row]:
    rows = []
    for index, lesson in enumerate(lessons):
        question = lesson.question
        target = question.target if against == "given" and question.target else lesson.answer
        references = question.references if against == "given" and question.references else (target,)
        rows.append(Row(question.input, target, references, None, index, index + 1))
    return rows
