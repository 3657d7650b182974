"""From a context to a run of `fit`: questions, the teacher's answers and numbers, the student's start."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.config import TaskConfig
from foreword.core.artefact import write_atomically
from foreword.core.template import encode_target
from foreword.distil.context import check_window
from foreword.distil.elsewhere import read_elsewhere
from foreword.distil.ground import CURE, Desk, Ground, lay_ground
from foreword.distil.lessons import Lesson, check_lessons, encode, teach
from foreword.distil.material import Lessons
from foreword.distil.questions import Question, read_questions, self_study
from foreword.distil.settings import DistilConfig, Job
from foreword.distil.start import Start, check_match, choose_start, start_vectors
from foreword.distil.teacher import teacher_targets
from foreword.errors import ConfigError, DataError
from foreword.eval.tasks import Task
from foreword.train.data import Example, SoftTargets
from foreword.train.loss import mean_losses
from foreword.train.run import Run

DEV_SHARE = 0.1
"""Part of the questions that are held back to choose the step by, and to judge where no test is given."""
LEAST_FOR_DEV = 40
"""Below so many questions none is held back."""


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything about one context that training and judging need."""

    job: Job
    ground: Ground
    train: tuple[Lesson, ...]
    dev: tuple[Lesson, ...]
    test: tuple[Lesson, ...]
    """Held-out questions with the teacher's answers: of the test file, else `dev`, else those that were learned."""
    run: Run


def prepare(desk: Desk, job: Job) -> Prepared:
    """Prepare one context; its rows and answers are written into the desk's folder, so that a second call goes on.

    Raises ConfigError, DataError and IncompatibleModel, before anything long is computed where that can be known.
    """
    config = job.distil
    given = read_questions(config.questions) if config.questions else []
    asked = read_questions(config.test) if config.test else []
    read_elsewhere(config.elsewhere)  # a file that is missing is told before training
    if not given and not config.num_written:
        raise ConfigError(
            f"{config.name}: there are no questions to learn from", hint="Give --questions, or --self-study 256."
        )
    ground = lay_ground(desk.base, config)
    how = _start(desk, ground, job)
    given, asked = (_with_chunks(desk, ground, questions) for questions in (given, asked))
    questions = [*given, *_written(desk, ground, config)]
    desk.tell(f"{config.name}: the teacher answers {len(questions) + len(asked)} questions")
    lessons = _answered(desk, ground, config, questions, "answers")
    test = _answered(desk, ground, config, asked, "test-answers")
    _check(desk, ground, [*lessons, *test], config.max_new_tokens)
    train, dev = _split(lessons, config.seed)
    run = _run(desk, ground, job, how, train, dev)
    return Prepared(job, ground, tuple(train), tuple(dev), tuple(test or dev or train), run)


def encode_with_teacher(desk: Desk, ground: Ground, lessons: Sequence[Lesson], config: DistilConfig) -> list[Example]:
    """Return lessons as rows with the teacher's numbers, each computed behind its own chunk."""
    rows = encode(desk.base, ground.template, lessons, config.learn)
    found = list(rows)
    for chunk, teacher in enumerate(ground.teachers):
        places = [place for place, lesson in enumerate(lessons) if lesson.question.chunk == chunk]

        def show(done: int, count: int, name: str = teacher.name) -> None:
            desk.tell(f"{name}: the teacher's distributions, part {done} of {count}")

        own = teacher_targets(desk.base, teacher, [rows[place] for place in places], config.top_k, desk.cache, show)
        for place, targets in zip(places, own, strict=True):
            found[place] = dataclasses.replace(rows[place], teacher=targets)
    return found


def _written(desk: Desk, ground: Ground, config: DistilConfig) -> list[Question]:
    """Return the model's own questions; those of an earlier, killed call with the same settings are taken up."""
    if not config.num_written:
        return []
    chat = ground.template.chat

    def write() -> list[dict[str, Any]]:
        desk.tell(f"{config.name}: the model writes {config.num_written} questions")
        found = self_study(
            desk.engine, ground.chunks, config.num_written, chat=chat, seed_types=config.seed_types,
            writer=config.writer, seed=config.seed,
        )  # fmt: skip
        return [question.to_json() for question in found]

    key = [*_base_key(desk), [chunk.sha256() for chunk in ground.chunks], chat]
    key += [config.num_written, list(config.seed_types), config.writer, config.seed]
    return [Question.from_json(data) for data in _kept(desk.out / f"{config.name}.self-study.json", key, write)]


def _answered(
    desk: Desk, ground: Ground, config: DistilConfig, questions: Sequence[Question], what: str
) -> list[Lesson]:
    """Return the questions with the teacher's answers; those of an earlier call are taken up."""
    if not questions:
        return []

    def answer() -> list[Any]:
        lessons = teach(desk.engine, questions, ground.teachers, config.max_new_tokens)
        return [[lesson.answer, list(lesson.answer_ids)] for lesson in lessons]

    key = [*_base_key(desk), [question.to_json() for question in questions], config.max_new_tokens, ground.blocks]
    kept = _kept(desk.out / f"{config.name}.{what}.json", key, answer)
    return [Lesson(question, text, tuple(ids)) for question, (text, ids) in zip(questions, kept, strict=True)]


def _base_key(desk: Desk) -> list[Any]:
    return [desk.base.fingerprint.to_json(), str(desk.base.dtype)]


def _kept(path: Path, key: list[Any], make: Callable[[], list[Any]]) -> list[Any]:
    """Return what `path` keeps for `key`, else make it and write it there."""
    plain = json.loads(json.dumps(key))
    try:
        data = json.loads(path.read_bytes())
        if data["key"] == plain:
            return list(data["made"])
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or not whole
        pass
    made = make()
    write_atomically(path, json.dumps({"key": plain, "made": made}).encode())
    return made


def _with_chunks(desk: Desk, ground: Ground, questions: Sequence[Question]) -> list[Question]:
    """Return given questions with the chunk that answers them: that behind which the right answer is likeliest.

    Raises DataError for a question without an answer where there is more than one chunk.
    """
    if not ground.is_chunked:
        return list(questions)
    found, base = [], desk.base
    for number, question in enumerate(questions, start=1):
        if question.target is None:
            raise DataError(
                f"question {number} has no target, which says in which of {len(ground.chunks)} chunks its answer "
                "stands",
                hint="Give its target, or let the model write questions (--self-study).",
            )
        ids = encode_target(base.tokenizer, question.target, base.stop_ids)
        row = encode(base, ground.template, [Lesson(question, question.target, tuple(ids))])[0]
        losses = mean_losses(base, [(teacher, [row]) for teacher in ground.teachers])
        found.append(dataclasses.replace(question, chunk=min(range(len(losses)), key=losses.__getitem__)))
    return found


def _check(desk: Desk, ground: Ground, lessons: Sequence[Lesson], max_new_tokens: int) -> None:
    """Refuse rows whose tokens change behind the context, and a context that leaves no room to the longest."""
    check_lessons(desk.base, ground.template, lessons, ground.chunks, ground.blocks)
    rows = encode(desk.base, ground.template, lessons)
    longest = max(len(row.ids) - row.num_targets for row in rows)
    check_window(desk.base, ground.context, max(map(len, ground.blocks)), longest + max_new_tokens, CURE)


def _split(lessons: Sequence[Lesson], seed: int) -> tuple[list[Lesson], list[Lesson]]:
    if len(lessons) < LEAST_FOR_DEV:
        return list(lessons), []
    order = list(range(len(lessons)))
    random.Random(f"dev/{seed}").shuffle(order)
    held = set(order[: round(len(lessons) * DEV_SHARE)])
    return (
        [lesson for place, lesson in enumerate(lessons) if place not in held],
        [lesson for place, lesson in enumerate(lessons) if place in held],
    )


def _run(desk: Desk, ground: Ground, job: Job, how: Start, train: Sequence[Lesson], dev: Sequence[Lesson]) -> Run:
    config, base, template = job.distil, desk.base, ground.template
    if config.objective == "kl":
        rows, dev_rows = (encode_with_teacher(desk, ground, lessons, config) for lessons in (train, dev))
    else:
        rows, dev_rows = (encode(base, template, lessons, config.learn) for lessons in (train, dev))
    block = template.block(base.tokenizer)
    desk.tell(f"{config.name}: {ground.num_vectors} vectors for {len(ground.whole)} tokens, start {how}")
    start = start_vectors(base, job.train.method, block, ground.whole, how, rows)
    task = TaskConfig(
        name=config.name,
        train=str(_write_rows(desk.out / f"{config.name}.train.jsonl", train)),
        dev=str(_write_rows(desk.out / f"{config.name}.dev.jsonl", dev)) if dev else None,
        test=config.test,
        template=template.text,
        chat=template.chat,
        metric=config.metric,
        max_new_tokens=config.max_new_tokens,
    )
    material = Lessons(tuple(train), tuple(dev), config.learn, _targets(rows), _targets(dev_rows))
    return Run(Task(task), job.train, config.name, material=material, start=start)


def _start(desk: Desk, ground: Ground, job: Job) -> Start:
    init = job.distil.init
    if init == "auto":
        return choose_start(desk.base, job.train.method, ground.is_chunked)
    if init == "match" and ground.is_chunked:
        raise ConfigError(
            f"init = match needs the context {ground.context.name!r} in one window, it is cut into "
            f"{len(ground.chunks)} chunks",
            hint="Use init = first or spread.",
        )
    if init == "match":
        check_match(desk.base, job.train.method)
    return init


def _targets(rows: Sequence[Example]) -> tuple[SoftTargets, ...] | None:
    targets = tuple(row.teacher for row in rows if row.teacher is not None)
    return targets if len(targets) == len(rows) else None


def _write_rows(path: Path, lessons: Sequence[Lesson]) -> Path:
    """Write lessons as rows of a task: the question, and the teacher's answer as its target."""
    lines = []
    for lesson in lessons:
        answer, turns = lesson.answer or "-", lesson.question.messages
        row: dict[str, Any] = {"input": lesson.question.input, "target": answer}
        if turns is not None:
            row = {"messages": [*turns, {"role": "assistant", "content": answer}]}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())
    return path
