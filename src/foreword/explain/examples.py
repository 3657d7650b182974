"""What an explanation is measured on: token rows behind the block, from a task, a file, texts or stored probes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreword.core.template import TaskTemplate, encode_target
from foreword.errors import ConfigError, DataError
from foreword.eval.tasks import Row, Split, Task, read_rows, sample_rows

if TYPE_CHECKING:
    from foreword.core.artefact import ArtefactHeader
    from foreword.core.model import FrozenModel

NUM_ROWS = 50
"""Rows by default: intervals of a few hundredths of a nat on short answers, in seconds on a small base."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row behind the block: text and answer as token ids, the answer last."""

    ids: tuple[int, ...]
    num_answer: int = 0
    """Tokens of the answer, its end token included."""
    slots: tuple[tuple[int, int, int], ...] = ()
    """Soft slots behind the text: (offset in ids, first row of the vectors behind the block, count)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The rows of one explanation."""

    examples: tuple[Example, ...]
    source: str
    """Where they come from, in words."""
    has_targets: bool
    """Whether the answers are the data's; without, nothing that is a loss can be measured."""


def gather(
    base: FrozenModel,
    header: ArtefactHeader,
    *,
    task: Task | None = None,
    rows: str | Path | None = None,
    texts: Sequence[str] = (),
    split: Split = "dev",
    limit: int | None = NUM_ROWS,
    seed: int = 0,
) -> Sample:
    """Return the sample for an artefact: the rows of a task or of a JSONL file, texts, or else its stored probes.

    At most `limit` rows are taken, drawn by `seed`. Raises ConfigError where several sources are given, or none and
    the artefact has no probes; DataError for rows that do not fit the base.
    """
    given = [name for name, value in (("a task", task), ("rows", rows), ("texts", texts)) if value]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were given", hint="Give one of them.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit = {limit} measures no row", hint="Leave it out to take 50 rows.")
    template = TaskTemplate.from_json(header.template) if header.template else None
    if texts:
        return Sample(examples=_from_texts(base, template, texts), source=f"{len(texts)} texts", has_targets=False)
    if task is not None or rows is not None:
        name, found = _read(task, rows, split)
        drawn = sample_rows(found, limit, seed)
        if task is not None:
            longest = task.input_limit(base.tokenizer, base.spec.max_positions, template)
            drawn = [task.fit(row, base.tokenizer, longest) for row in drawn]
        examples = tuple(_from_row(base, template, row) for row in drawn)
        _check_fits(base, header, examples, drawn)
        return Sample(examples=examples, source=f"{len(drawn)} of {len(found)} rows of {name}", has_targets=True)
    if not header.conformance:
        raise ConfigError(
            "there is nothing to measure on: no rows were given, and the artefact holds no conformance probes",
            hint="Give --task, --rows or --text.",
        )
    return from_probes(base, header)


def from_probes(base: FrozenModel, header: ArtefactHeader) -> Sample:
    """Return the artefact's conformance probes as a sample without targets."""
    from foreword.core.conformance import check_probe

    examples = tuple(Example(tuple(check_probe(probe, base.spec.vocab_size))) for probe in header.conformance)
    return Sample(examples=examples, source=f"the artefact's {len(examples)} conformance probes", has_targets=False)


def with_answers(examples: Sequence[Example], answers: Sequence[Sequence[int]]) -> list[Example]:
    """Return the examples with these answers behind them."""
    return [
        dataclasses.replace(example, ids=(*example.ids, *answer), num_answer=len(answer))
        for example, answer in zip(examples, answers, strict=True)
    ]


def _read(task: Task | None, rows: str | Path | None, split: Split) -> tuple[str, list[Row]]:
    if task is None:
        assert rows is not None
        return Path(rows).name, read_rows(rows)
    return f"{task.name} {split}", task.rows(split)


def _from_row(base: FrozenModel, template: TaskTemplate | None, row: Row) -> Example:
    target = encode_target(base.tokenizer, row.target, base.stop_ids)
    if row.messages is None:
        return dataclasses.replace(
            with_answers([_from_text(base, template, row.input)], [target])[0], num_answer=len(target)
        )
    if template is None:
        raise DataError(
            f"row {row.line} is a conversation, and the artefact has no template to render it", hint="Give texts."
        )
    rendered = template.render_messages(base.tokenizer, row.messages)
    return Example((*rendered.ids, *target), len(target), rendered.slots)


def _from_texts(base: FrozenModel, template: TaskTemplate | None, texts: Sequence[str]) -> tuple[Example, ...]:
    examples = tuple(_from_text(base, template, text) for text in texts)
    for text, example in zip(texts, examples, strict=True):
        if not example.ids:
            raise DataError(f"text {text!r} has no tokens", hint="Give some text.")
    return examples


def _from_text(base: FrozenModel, template: TaskTemplate | None, text: str) -> Example:
    tokenizer: Any = base.tokenizer
    if tokenizer is None:
        raise ConfigError("the base has no tokenizer, texts cannot be read", hint="Load it with its tokenizer.")
    if template is None:  # vectors made elsewhere: the tokenizer's own special tokens, as the engine feeds them
        return Example(tuple(tokenizer(text).input_ids))
    rendered = template.render(tokenizer, text)
    return Example(tuple(rendered.ids), 0, rendered.slots)


def _check_fits(base: FrozenModel, header: ArtefactHeader, examples: Sequence[Example], rows: Sequence[Row]) -> None:
    most = base.spec.max_positions
    for example, row in zip(examples, rows, strict=True):
        needed = header.block.num_positions + len(example.ids)
        if most is not None and needed > most:
            raise DataError(
                f"row {row.line} takes {needed} positions with its block and answer, the base has {most}",
                hint="Shorten it, or give the task, whose truncate setting cuts inputs.",
            )
