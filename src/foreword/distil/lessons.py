"""Lessons: questions with the teacher's answers, as token rows that the student sees without the context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.core.template import TaskTemplate, end_id
from foreword.distil.context import Context, check_aligned
from foreword.distil.questions import Question
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.eval.run import answer_freely
from foreword.train.data import Example

Learn = Literal["answers", "all"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """A question and what the teacher answered."""

    question: Question
    answer: str
    answer_ids: tuple[int, ...]
    """The answer's tokens with the token that ends it, which is missing where the answer was cut."""


def requests_for(questions: Sequence[Question], prefixes: Sequence[str], max_tokens: int) -> list[Request]:
    """Return greedy requests, each behind the prefix of that name."""
    return [
        Request(
            prompt=question.input if question.messages is None else None,
            messages=question.messages,
            prefix=prefix,
            max_tokens=max_tokens,
        )
        for question, prefix in zip(questions, prefixes, strict=True)
    ]


def teach(
    engine: Engine, questions: Sequence[Question], teachers: Sequence[KVPrefix], max_new_tokens: int
) -> list[Lesson]:
    """Let the teacher answer: each question behind its own chunk (`teachers[question.chunk]`), greedily.

    Raises BadRequest where a question does not fit the window, BackendFailed where an answer failed.
    """
    names = [f"teacher/{index}" for index in range(len(teachers))]
    for name, prefix in zip(names, teachers, strict=True):
        engine.add_prefix(name, prefix)
    requests = requests_for(questions, [names[question.chunk] for question in questions], max_new_tokens)
    try:
        outputs = engine.generate(requests)
        texts = answer_freely(lambda _: outputs, requests).texts
    finally:
        for name in names:
            engine.remove_prefix(name)
    end = end_id(engine.base.tokenizer, engine.base.stop_ids)
    return [
        Lesson(question, text, (*output.token_ids, *([end] if output.finish_reason == "stop" else [])))
        for question, text, output in zip(questions, texts, outputs, strict=True)
    ]


def encode(
    base: FrozenModel, template: TaskTemplate, lessons: Sequence[Lesson], learn: Learn = "answers"
) -> list[Example]:
    """Return the student's rows: what serving renders behind the block, then the answer.

    Learned are the answers, or "all" tokens behind the row's first, as in Cartridges.
    """
    examples = []
    for lesson in lessons:
        ids = [*_rendered(base, template, lesson.question), *lesson.answer_ids]
        spans = ((1, len(ids)),) if learn == "all" else ()
        examples.append(Example(ids, len(lesson.answer_ids), spans=spans))
    return examples


def check_lessons(
    base: FrozenModel,
    template: TaskTemplate,
    lessons: Sequence[Lesson],
    chunks: Sequence[Context],
    blocks: Sequence[Sequence[int]],
) -> None:
    """Prove that every row has the same tokens behind its chunk as behind the vectors.

    `blocks` are the chunks' whole blocks as token ids. Raises DataError with the first differing position.
    """
    for number, lesson in enumerate(lessons, start=1):
        question = lesson.question
        taught = chunks[question.chunk].lay(base.tokenizer, question.input, question.messages, template.chat)
        block = blocks[question.chunk]
        student = [*block, *_rendered(base, template, question)]
        check_aligned(base, student, taught, len(block), f"question {number} ({question.input[:40]!r})")


def _rendered(base: FrozenModel, template: TaskTemplate, question: Question) -> list[int]:
    if question.messages is None:
        return template.render(base.tokenizer, question.input).ids
    return template.render_messages(base.tokenizer, question.messages).ids
