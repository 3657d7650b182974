"""What a distillation learns from, as `Material` for `fit`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foreword.core.model import FrozenModel
from foreword.core.template import TaskTemplate
from foreword.distil.lessons import Learn, Lesson, encode
from foreword.errors import DataError
from foreword.train.data import Example, SoftTargets

Objective = Literal["kl", "likelihood"]


@dataclass(frozen=True, slots=True, eq=False)
class Lessons:
    """Lessons to learn from and to stop by, with the teacher's distribution at each learned token.

    `targets` and `dev_targets` are those of the rows that `encode` makes of the lessons, in order; None learns the
    teacher's answers themselves (sequence log-likelihood).
    """

    train: tuple[Lesson, ...]
    dev: tuple[Lesson, ...]
    learn: Learn
    targets: tuple[SoftTargets, ...] | None
    dev_targets: tuple[SoftTargets, ...] | None

    def examples(self, base: FrozenModel, template: TaskTemplate) -> tuple[list[Example], list[Example]]:
        """Return training and dev examples, rendered as serving renders them. Raises DataError."""
        rows = encode(base, template, self.train, self.learn), encode(base, template, self.dev, self.learn)
        return _with(rows[0], self.targets), _with(rows[1], self.dev_targets)

    def sha256(self) -> str:
        """Return the hash of questions, answers and the teacher's numbers."""
        digest = hashlib.sha256(self.learn.encode())
        for lesson in (*self.train, None, *self.dev):
            what = None if lesson is None else [lesson.question.to_json(), lesson.answer_ids]
            digest.update(json.dumps(what).encode())
        for targets in (*(self.targets or ()), *(self.dev_targets or ())):
            digest.update(targets.ids.numpy().tobytes() + targets.log_probs.numpy().tobytes())
        return digest.hexdigest()


def _with(rows: list[Example], targets: Sequence[SoftTargets] | None) -> list[Example]:
    if targets is None:
        return rows
    for place, (row, own) in enumerate(zip(rows, targets, strict=True), start=1):
        if len(row.learned) != len(own.ids):
            raise DataError(
                f"lesson {place}: the teacher has distributions for {len(own.ids)} tokens, the row learns "
                f"{len(row.learned)}",
                hint="Compute the teacher again for this template.",
            )
    return [dataclasses.replace(row, teacher=own) for row, own in zip(rows, targets, strict=True)]
