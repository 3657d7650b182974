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

    Raises DataError naming the row and both numbers for an input that does not fit, for an answer longer than
    `max_new_tokens`, and, where all answers of a conversation are learned, for a chat template that does not render
    the turns before an answer as it did when that answer was due.
    """
    tokenizer, window = base.tokenizer, base.spec.max_positions
    limit = task.input_limit(tokenizer, window, template)
    block = template.block(tokenizer).num_positions
    examples = []
    for row in rows:
        target = _encode_answer(base, task, row, row.target, "the target")
        fitted = task.fit(row, tokenizer, limit)
        if fitted.messages is not None:
            rendered = template.render_messages(tokenizer, fitted.messages)
        else:
            rendered = template.render(tokenizer, fitted.input)
        needed = block + len(rendered.ids) + task.config.max_new_tokens
        if window is not None and needed > window:
            raise DataError(
                f"task {task.name!r}, {row.place}: block, conversation and max_new_tokens take {needed} positions, "
                f"the base has {window}",
                hint="Shorten the turns, or lower max_new_tokens.",
            )
        ids = [*rendered.ids, *target]
        spans = _answer_spans(base, task, template, fitted, ids) if task.config.learn == "all" else ()
        if spans:
            spans = (*spans, (len(rendered.ids), len(ids)))
        examples.append(Example(ids, len(target), rendered.slots, spans))
    return examples


def _encode_answer(base: FrozenModel, task: Task, row: Row, text: str, name: str) -> list[int]:
    ids = encode_target(base.tokenizer, text, base.stop_ids)
    if len(ids) > task.config.max_new_tokens:
        raise DataError(
            f"task {task.name!r}, {row.place}: {name} takes {len(ids)} tokens with its end, "
            f"max_new_tokens is {task.config.max_new_tokens}",
            hint="Raise max_new_tokens in [task], or shorten it.",
        )
    return ids


def _answer_spans(
    base: FrozenModel, task: Task, template: TaskTemplate, row: Row, ids: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return where the answers before the last one stand in `ids`, each with its end token.

    An answer is an assistant's turn behind a user's, of weight 1. At each, `ids` must be what serving sees and says
    there: the turns before it rendered by themselves, then the answer's own tokens.
    """
    turns = row.messages or ()
    first_user = next((place for place, turn in enumerate(turns) if turn["role"] == "user"), len(turns))
    spans = []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant" or place < first_user or place in row.weightless:
            continue
        before = template.render_messages(base.tokenizer, turns[:place]).ids
        answer = _encode_answer(base, task, row, turn["content"], f"messages[{place}]")
        served = [*before, *answer]
        end = len(served)
        if served != list(ids[:end]):
            first = next(i for i, token in enumerate(served) if i >= len(ids) or token != ids[i])
            whole, alone = (base.tokenizer.decode(part[first : first + 1]) for part in (ids, served))
            raise DataError(
                f"task {task.name!r}, {row.place}: the answer messages[{place}] stands otherwise in the whole "
                f"conversation than when it is due: token {first} behind the block is {whole!r} there, {alone!r} here",
                hint='The chat template rewrites earlier turns: set learn = "last", or give each answer its own row.',
            )
        spans.append((len(before), end))
    return tuple(spans)


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
