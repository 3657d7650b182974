"""What the base does without training: with the hard text alone, and with examples in its prompt.

Stands beside every trained result, judged on the same rows by the same metric; for a closed set also constrained to the
labels, so that a trained task does not win by merely knowing what an answer looks like.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from foreword.core.template import encode_plain, render_chat
from foreword.engine.request import Request
from foreword.errors import ConfigError, DataError, did_you_mean
from foreword.eval.labels import Generate, build_trie, label_probabilities
from foreword.eval.report import EvalReport
from foreword.eval.run import EngineLike, Source, answer_freely, answer_scored, judge, labels_for
from foreword.eval.tasks import Row, Split, Task, sample_rows

BaselineKind = Literal["hard_text", "few_shot"]
KINDS = ("hard_text", "few_shot")
NUM_SHOTS = 8
"""Examples at most; more rarely help a small base and each costs its tokens in every request."""
ANSWER = "\nAnswer:"
BREAK = "\n\n"
"""Between blocks of plain text."""


@dataclass(frozen=True, slots=True)
class Phrasing:
    """The hard text of a task, laid around its inputs."""

    once: str
    """In front of the first input only: the instruction."""
    before: str
    """In front of every input."""
    after: str
    """Behind every input."""
    system: str | None
    chat: bool

    @classmethod
    def of(cls, task: Task) -> Phrasing:
        """Return the phrasing by `hard_text`, or where that is empty by the template's own hard text."""
        hard, config = task.template.hard(), task.config
        before, _, after = (part.replace("{{", "{").replace("}}", "}") for part in hard.text.partition("{input}"))
        once = ""
        if config.hard_text:
            once, before, after = config.hard_text + "\n", "", ""
        if not config.chat and not after.strip():
            after = ANSWER
        return cls(once, before, after, (hard.system or "").strip() or None, config.chat)

    @property
    def lead(self) -> str:
        """What stands between the prompt and a plain-text answer, tokenised with the answer."""
        return "" if self.chat or self.after[-1:].isspace() else " "

    def encode(self, tokenizer: Any, row: Row, shots: Sequence[Row]) -> list[int]:
        """Return the prompt's token ids, BOS included: the examples, then the row's input."""
        if not self.chat:
            blocks = [self.before + shot.input + self.after + self.lead + shot.target + BREAK for shot in shots]
            return encode_plain(tokenizer, self.once + "".join(blocks) + self.before + row.input + self.after)
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        for shot in shots:
            turns.append({"role": "user", "content": self.before + shot.input + self.after})
            turns.append({"role": "assistant", "content": shot.target})
        own = [dict(turn) for turn in row.messages] if row.messages else [{"role": "user", "content": row.input}]
        first = next(turn for turn in own if turn["role"] == "user")
        first["content"] = self.before + first["content"] + self.after
        turns += own
        first = next(turn for turn in turns if turn["role"] == "user")
        first["content"] = self.once + first["content"]
        return encode_plain(tokenizer, render_chat(tokenizer, turns))


def baseline_requests(
    task: Task,
    tokenizer: Any,
    kind: BaselineKind,
    rows: Sequence[Row],
    *,
    num_shots: int = NUM_SHOTS,
    max_positions: int | None = None,
    seed: int = 0,
) -> list[Request]:
    """Return greedy requests to the plain base for rows, as token ids.

    `few_shot` puts up to `num_shots` training examples in front, drawn by `seed`, balanced over a closed set's labels,
    as many as fit `max_positions` beside the row. Raises DataError where an input alone does not fit.
    """
    prompts, _ = _prompts(task, tokenizer, kind, rows, num_shots, max_positions, seed)
    return _requests(task, prompts)


def evaluate_baseline(
    engine: EngineLike | Generate,
    task: Task,
    kind: BaselineKind,
    *,
    split: Split = "test",
    limit: int | None = None,
    decoding: Literal["free", "labels", "auto"] = "auto",
    num_shots: int = NUM_SHOTS,
    seed: int = 0,
    out: str | Path | None = None,
    tokenizer: Any = None,
) -> EvalReport:
    """Judge the untrained base on a split of the task, as `evaluate` judges a prefix: same rows, same metric."""
    started = time.monotonic()
    source = Source.of(engine, tokenizer)
    if source.tokenizer is None:
        raise ConfigError("a baseline's prompt needs the base's tokenizer", hint="Pass an engine, or tokenizer=...")
    rows = sample_rows(task.rows(split), limit, seed)
    labels = labels_for(task, decoding)
    prompts, shots = _prompts(task, source.tokenizer, kind, rows, num_shots, source.max_positions, seed)
    if labels:
        phrasing = Phrasing.of(task)
        closing_id = source.closing_id if phrasing.chat else _first_id(source.tokenizer, BREAK)
        trie = build_trie(labels, source.tokenizer, closing_id=closing_id, lead=phrasing.lead)
        answers = answer_scored(label_probabilities(source.generate, prompts, labels, trie))
    else:
        answers = answer_freely(source.generate, _requests(task, prompts))
    report = judge(
        task, rows, answers, split=split, kind=kind, seed=seed, started=started, num_shots=sum(shots) / len(shots)
    )
    if out is not None:
        report.save(out)
    return report


def evaluate_baselines(engine: EngineLike | Generate, task: Task, **options: Any) -> list[EvalReport]:
    """Judge both baselines, free and, of a closed set, by label; `options` are those of `evaluate_baseline`."""
    decodings: tuple[Literal["free", "labels"], ...] = ("free", "labels") if task.labels() else ("free",)
    kinds: tuple[BaselineKind, ...] = ("hard_text", "few_shot")
    return [
        evaluate_baseline(engine, task, kind, **options, decoding=decoding) for kind in kinds for decoding in decodings
    ]


def choose_shots(task: Task, num_shots: int, seed: int) -> list[Row]:
    """Return training examples drawn by `seed`, round the labels of a closed set; conversations are left out.

    Raises DataError where there is no example.
    """
    rows = [row for row in task.rows("train") if row.messages is None]
    if not rows:
        raise DataError(f"task {task.name!r} has no training rows of one turn to show as examples")
    rng = random.Random(seed)
    rng.shuffle(rows)
    if not (labels := list(task.labels())):
        return rows[:num_shots]
    rng.shuffle(labels)
    return list(_round_robin([[row for row in rows if row.target == label] for label in labels]))[:num_shots]


def _round_robin(groups: Sequence[Sequence[Row]]) -> Iterator[Row]:
    for place in range(max(map(len, groups))):
        for group in groups:
            if place < len(group):
                yield group[place]


def _prompts(
    task: Task,
    tokenizer: Any,
    kind: BaselineKind,
    rows: Sequence[Row],
    num_shots: int,
    max_positions: int | None,
    seed: int,
) -> tuple[list[list[int]], list[int]]:
    """Return each row's prompt and how many examples it holds."""
    if kind not in KINDS:
        raise ConfigError(f"unknown baseline {kind!r}", hint=did_you_mean(kind, KINDS))
    phrasing = Phrasing.of(task)
    shots = choose_shots(task, num_shots + 1, seed) if kind == "few_shot" else []
    room = None if max_positions is None else max_positions - task.config.max_new_tokens
    limit = _input_limit(task, phrasing, tokenizer, room)
    prompts, counts = [], []
    for row in rows:
        others = [shot for shot in shots if shot.input != row.input][:num_shots]
        encode = partial(phrasing.encode, tokenizer, task.fit(row, tokenizer, limit))
        while True:
            ids = encode(others)
            if not others or room is None or len(ids) <= room:
                break
            others.pop()
        prompts.append(ids)
        counts.append(len(others))
    return prompts, counts


def _input_limit(task: Task, phrasing: Phrasing, tokenizer: Any, room: int | None) -> int | None:
    """Return how many tokens an input may have beside the hard text."""
    own = task.config.max_input_tokens
    if room is None:
        return own
    blank = Row("x", "x", ("x",), None, 0)
    around = len(phrasing.encode(tokenizer, blank, [])) + 2  # tokens may split at the input's two ends
    if room <= around:
        raise ConfigError(
            f"hard text ({around}) and answer ({task.config.max_new_tokens}) leave no token of the base's"
            f" {room + task.config.max_new_tokens} to the input",
            hint="Shorten hard_text, or lower max_new_tokens.",
        )
    return room - around if own is None else min(own, room - around)


def _requests(task: Task, prompts: Sequence[Sequence[int]]) -> list[Request]:
    """Requests for free text; plain text ends with the line, as the base goes on with further blocks otherwise."""
    stop: tuple[str, ...] = ()
    if not task.config.chat:
        has_lines = any("\n" in row.target for row in task.rows("train"))
        stop = (BREAK,) if has_lines else ("\n",)
    return [Request(prompt_ids=ids, max_tokens=task.config.max_new_tokens, stop=stop) for ids in prompts]


def _first_id(tokenizer: Any, text: str) -> int:
    return int(tokenizer(text, add_special_tokens=False).input_ids[0])
