"""Training rows as tokens, and the order in which a run sees them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from foreword.core.template import TaskTemplate, encode_target
from foreword.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from foreword.core.model import FrozenModel
    from foreword.eval.tasks import Row, Task

BUCKET_BATCHES = 32
"""Batches whose rows are sorted by length together: little padding, and still a shuffled order."""


@dataclass(frozen=True, slots=True, eq=False)
class SoftTargets:
    """A teacher's distribution at each learned place: its likeliest tokens; all others are one bucket."""

    ids: Tensor
    """Token ids [N, K], int64."""
    log_probs: Tensor
    """Their log-probabilities [N, K] in nats, float32; each row's probabilities sum to 1 at most."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row behind the block: text and answer as token ids, the answer last."""

    ids: list[int]
    num_targets: int
    """Tokens of the last answer, its end token included."""
    slots: tuple[tuple[int, int, int], ...] = ()
    """Soft slots behind the text: (offset in ids, first row of the vectors behind the block, count)."""
    spans: tuple[tuple[int, int], ...] = ()
    """Learned places [first, end) in ids where they are not the last answer alone, such as all answers of a
    conversation; none of them begins at 0, for want of a token that predicts it."""
    teacher: SoftTargets | None = None
    """What is learned at the learned places in place of the tokens that stand there."""

    @property
    def learned(self) -> list[int]:
        """The places in `ids` whose tokens are learned."""
        spans = self.spans or ((len(self.ids) - self.num_targets, len(self.ids)),)
        return [place for first, end in spans for place in range(first, end)]


class Material(Protocol):
    """Examples made elsewhere than from a task's rows, such as a teacher's answers."""

    def examples(self, base: FrozenModel, template: TaskTemplate) -> tuple[list[Example], list[Example]]:
        """Return training and dev examples (dev may be empty). Raises DataError."""
        ...

    def sha256(self) -> str:
        """Return the hash of what the examples are made of."""
        ...


def encode_rows(base: FrozenModel, task: Task, template: TaskTemplate, rows: Sequence[Row]) -> list[Example]:
    """Render and tokenise rows as serving does, inputs cut where the task allows it.

    Raises DataError naming the row and both numbers for an input that does not fit, and for an answer longer than
    `max_new_tokens`.
    """
    tokenizer, longest_answer = base.tokenizer, task.config.max_new_tokens
    limit = task.input_limit(tokenizer, base.spec.max_positions, template)
    examples = []
    for row in rows:
        target = encode_target(tokenizer, row.target, base.stop_ids)
        if len(target) > longest_answer:
            raise DataError(
                f"task {task.name!r}, row {row.line}: the target takes {len(target)} tokens with its end, "
                f"max_new_tokens is {longest_answer}",
                hint="Raise max_new_tokens in [task], or shorten the target.",
            )
        fitted = task.fit(row, tokenizer, limit)
        if fitted.messages is not None:
            rendered = template.render_messages(tokenizer, fitted.messages)
        else:
            rendered = template.render(tokenizer, fitted.input)
        examples.append(Example([*rendered.ids, *target], len(target), rendered.slots))
    return examples


class BatchOrder:
    """The rows of every step: shuffled each epoch, bucketed by length; a function of the seed and the step alone."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, min(batch_size, len(lengths)), seed
        self._per_epoch = len(lengths) // self._batch_size
        self._epoch, self._batches = -1, [[0]]

    def batch(self, index: int) -> list[int]:
        """Return the rows of the `index`-th batch since the start; an epoch's last incomplete batch is left out."""
        epoch, place = divmod(index, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[place]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = random.Random(f"{self._seed}/{epoch}")
        rows = list(range(len(self._lengths)))
        generator.shuffle(rows)
        bucket = self._batch_size * BUCKET_BATCHES
        ordered = [
            row
            for start in range(0, len(rows), bucket)
            for row in sorted(rows[start : start + bucket], key=lambda row: self._lengths[row])
        ]
        batches = [ordered[i * self._batch_size : (i + 1) * self._batch_size] for i in range(self._per_epoch)]
        generator.shuffle(batches)
        return batches
