"""Damage elsewhere: what vectors do to prompts that have nothing to do with their context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foreword.config import load_task
from foreword.core.template import TaskTemplate
from foreword.distil.baselines import Contender
from foreword.distil.divergence import mean_divergences
from foreword.distil.ground import Desk, Ground
from foreword.distil.lessons import encode, teach
from foreword.distil.questions import Question, read_questions
from foreword.engine.request import Request
from foreword.errors import DataError
from foreword.eval.baselines import baseline_requests
from foreword.eval.rows import sample_rows
from foreword.eval.run import answer_freely, judge
from foreword.eval.tasks import Task

TOKENS = 16
"""Of the plain base's own continuation, over which distributions are compared."""
ROWS = 64
"""Prompts, and rows of a task, at most."""
PROMPTS = (
    "The ship left the harbour before dawn, and",
    "Which clause of the agreement says when it ends?",
    "the battery lasts two days and the screen is bright",
    "Once upon a time there was a miller who",
    "How do I change the password of my account?",
    "Explain why prices rise when supply falls.",
    "This Agreement shall be governed by the laws of",
    "book a table for four people at seven tonight",
    "What is the capital of France?",
    "Label the sentence: the plot is thin but the actors are charming.",
    "def add(a, b):",
    "Write a short letter to a friend about the weather.",
    "The committee met on Tuesday to discuss the budget.",
    "My order has not arrived yet, can you help me?",
    "Name three animals that live in the sea.",
    "He opened the old book and read the first line:",
    "What does the word quarantine mean?",
    "The mountain was covered with snow, but the road",
    "Translate into plain words: the party of the first part.",
    "set an alarm for six in the morning",
    "A company must report its income every year because",
    "Is the review positive or negative? It broke after a week.",
    "Good morning. How are you today?",
    "List the steps to boil an egg.",
)
"""Unrelated to most contexts; give your own where yours is about such things."""


@dataclass(frozen=True, slots=True)
class Damage:
    """What one contender does elsewhere."""

    name: str
    divergence: float
    """KL(plain base || with it), nats per token of the plain base's continuation."""
    score: float | None
    """Of the task elsewhere, with the hard text in the prompt; None where none was given."""
    interval: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        known = {"name": self.name, "divergence": self.divergence, "score": self.score}
        return known | {"interval": None if self.interval is None else list(self.interval)}


def measure_damage(
    desk: Desk, ground: Ground, contenders: Sequence[Contender], source: str | None = None, seed: int = 0
) -> list[Damage]:
    """Return the damage of each contender, `none` (the plain base) among them.

    `source` is JSONL of prompts, or a task file (TOML), whose score is then measured too. Raises DataError and
    ConfigError for what cannot be read.
    """
    plain = next(contender for contender in contenders if contender.name == "none")
    task, questions = read_elsewhere(source, seed)
    lessons = teach(desk.engine, questions, [plain.prefixes[0]], TOKENS)
    examples = encode(desk.base, ground.template, lessons)
    every = {contender.name: [contender.prefixes[0]] * len(examples) for contender in contenders}
    found = mean_divergences(desk.base, examples, every["none"], every)
    scores = {} if task is None else {c.name: _score(desk, task, c, ground.template, seed) for c in contenders}
    return [Damage(c.name, found[c.name], *scores.get(c.name, (None, None))) for c in contenders]


def read_elsewhere(source: str | None, seed: int = 0) -> tuple[Task | None, list[Question]]:
    """Return the task elsewhere, where it is one, and the prompts. Raises DataError and ConfigError."""
    task = _task(source)
    if task is not None:
        rows = sample_rows(task.rows("test" if task.config.test else "dev"), ROWS, seed)
        return task, [Question(row.input) for row in rows]
    texts = PROMPTS if source is None else [question.input for question in read_questions(source)[:ROWS]]
    return None, [Question(text) for text in texts]


def _task(source: str | None) -> Task | None:
    if source is None or Path(source).suffix != ".toml":
        return None
    config, _ = load_task(source)
    if config.test is None and config.dev is None:
        raise DataError(f"{source} has no test or dev rows to judge by", hint="Set test in [task].")
    return Task(config)


def _score(
    desk: Desk, task: Task, contender: Contender, template: TaskTemplate, seed: int
) -> tuple[float, tuple[float, float]]:
    """Judge a task by its hard text, behind the contender's block."""
    started, split = time.monotonic(), "test" if task.config.test else "dev"
    rows = sample_rows(task.rows("test" if task.config.test else "dev"), ROWS, seed)
    prefix = contender.prefixes[0]
    limit = desk.base.spec.max_positions
    room = None if limit is None else limit - prefix.num_positions
    requests = baseline_requests(task, desk.base.tokenizer, "hard_text", rows, max_positions=room)
    skip = len(template.block(desk.base.tokenizer).left_ids)
    behind = [
        Request(
            prompt_ids=list(request.prompt_ids or ())[skip:],
            max_tokens=request.max_tokens,
            stop=request.stop,
            prefix="elsewhere",
        )
        for request in requests
    ]
    desk.engine.add_prefix("elsewhere", prefix)
    try:
        answers = answer_freely(desk.engine.generate, behind)
    finally:
        desk.engine.remove_prefix("elsewhere")
    report = judge(task, rows, answers, split=split, kind="prefix", prefix=contender.name, seed=seed, started=started)
    return report.score, report.interval
