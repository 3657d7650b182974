"""Questions about a context: given by the user, or written by the model itself from the context's chunks.

Self-study follows Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266): the model, with a chunk in its context, plays
the user. Each question has a *seed type*, which says what the user is up to. Two ways of asking for it:

- `turn`: the user's turn is opened behind the chunk, with a few words that suit the seed type, and the model completes
  it (as Magpie does, Xu et al. 2024, arXiv:2406.08464). Works also for small bases that follow no instructions.
- `instruction`: a user turn asks for a message of the seed type, and the answer is the question, as in Cartridges.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreword.core.template import encode_plain, render_chat
from foreword.distil.context import Context
from foreword.distil.settings import SEED_TYPES
from foreword.engine.engine import Engine
from foreword.engine.request import Request
from foreword.errors import DataError, did_you_mean

Writer = Literal["turn", "instruction"]
LEADS: dict[str, tuple[str, ...]] = {
    "structuring": ("List", "Make a table of", "Arrange"),
    "summarization": ("Summarize", "What are the main points of", "In short,"),
    "question": ("", "", "", "What", "Which", "Who", "When", "Where", "How"),
    "use_case": ("I need", "How would I", "Can I"),
    "creative": ("Write", "Imagine", "Describe"),
}
"""Words that open the user's turn, by seed type."""
INSTRUCTIONS: dict[str, str] = {
    "structuring": "Write a message that asks for some of this information in a structured form, such as a list, a "
    "table or JSON. Name the facts that are wanted. Write the message only.",
    "summarization": "Write a message that asks for a summary of one part of this information. Name the part. Write "
    "the message only.",
    "question": "Write a question that tests whether somebody knows one exact fact of this information: a name, a "
    "number, a date. Write the question only.",
    "use_case": "Think of a task for which somebody needs this information, and write a question that this person "
    "would ask. Write the question only.",
    "creative": "Write a message that asks for something creative which rests on this information. Write the message "
    "only.",
}
ROUNDS = 4
"""Times that lacking questions are asked for again, where the model repeated itself."""
MARK = "\ue0f2"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and about which part of the context."""

    input: str
    """The text; of a conversation its last user message."""
    turns: tuple[tuple[str, str], ...] = ()
    """The conversation up to the question as (role, content); () where it is one user message."""
    chunk: int = 0
    """The chunk that holds the answer."""
    seed_type: str = ""
    """Of a question that the model wrote; "" is a given one."""
    target: str | None = None
    """The right answer, where it is known; the teacher's answer is learned either way."""
    references: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]] | None:
        """The conversation, or None where it is one user message."""
        return [{"role": role, "content": content} for role, content in self.turns] or None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        known = {"input": self.input, "turns": [list(turn) for turn in self.turns], "chunk": self.chunk}
        return known | {"seed_type": self.seed_type, "target": self.target, "references": list(self.references)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Question:
        """Build the question from `to_json`'s dict."""
        turns = tuple((role, content) for role, content in data["turns"])
        return cls(**{**data, "turns": turns, "references": tuple(data["references"])})


def read_questions(path: str | Path) -> list[Question]:
    """Read JSONL of `{"input": ...}` or `{"messages": [...]}`, with `target` and `references` where they are known.

    A conversation ends with its answer, which is the target. Raises DataError naming file, row and field.
    """
    from foreword.eval.read import read_rows

    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"cannot read the questions {path}: {why}", hint="Check the path.") from error
    if any('"target"' not in line and '"messages"' not in line for line in lines if line.strip()):
        return [_bare(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    questions = []
    for row in read_rows(path):
        turns = tuple((turn["role"], turn["content"]) for turn in row.messages or ())
        questions.append(Question(row.input, turns, target=row.target, references=row.references))
    return questions


def _bare(path: Path, number: int, line: str) -> Question:
    """One question of a file in which some have no target."""
    try:
        data = json.loads(line)
        text = data["input"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}, row {number}: no question ({type(error).__name__}: {error})",
            hint='One JSON object per line: {"input": "..."}, with "target" where the answer is known.',
        ) from error
    target = data.get("target")
    if not isinstance(text, str) or not text.strip() or not isinstance(target, str | None):
        raise DataError(f"{path}, row {number}: input is no text, or target is none", hint="Give both as texts.")
    return Question(text, target=target, references=(target,) if target else ())


def self_study(
    engine: Engine,
    chunks: Sequence[Context],
    num: int,
    *,
    chat: bool,
    seed_types: Sequence[str] = SEED_TYPES,
    writer: Writer = "turn",
    temperature: float = 0.8,
    max_tokens: int = 64,
    seed: int = 0,
) -> list[Question]:
    """Let the model write `num` distinct questions, chunks and seed types in turn; the same for the same seed.

    Fewer where it repeats itself; one that is cut at `max_tokens` is left out. Raises DataError for an unknown seed
    type, and where not one question came out.
    """
    for name in seed_types:
        if name not in SEED_TYPES:
            raise DataError(f"unknown seed type {name!r}", hint=did_you_mean(name, SEED_TYPES))
    found: dict[str, Question] = {}
    for attempt in range(ROUNDS):
        lacking = num - len(found)
        if lacking <= 0:
            break
        plans = [_plan(index, chunks, seed_types, f"{seed}/{attempt}/{index}") for index in range(lacking)]
        requests = [
            Request(
                prompt_ids=_opening(engine.base.tokenizer, chunks[plan.chunk], plan, writer, chat),
                max_tokens=max_tokens,
                temperature=temperature,
                seed=plan.seed,
                stop=() if chat else ("\n",),
            )
            for plan in plans
        ]
        for plan, output in zip(plans, engine.generate(requests), strict=True):
            text = f"{plan.lead if writer == 'turn' else ''}{output.text}".strip()
            if output.finish_reason == "stop" and _is_whole(text, plan.lead if writer == "turn" else ""):
                found.setdefault(" ".join(text.lower().split()), _question(text, plan, chat))
    if not found:
        raise DataError(
            f"the model wrote no question about {chunks[0].name!r} in {num * ROUNDS} trials",
            hint="Give questions of your own with --questions.",
        )
    return list(found.values())[:num]


def _is_whole(text: str, lead: str) -> bool:
    """Return whether the text goes on behind its lead, with a new word."""
    return bool(text) and (not lead or (len(text) > len(lead) and not text[len(lead)].isalnum()))


@dataclass(frozen=True, slots=True)
class _Plan:
    chunk: int
    seed_type: str
    lead: str
    seed: int


def _plan(index: int, chunks: Sequence[Context], seed_types: Sequence[str], key: str) -> _Plan:
    seed_type = seed_types[index // len(chunks) % len(seed_types)]
    rng = random.Random(key)
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    return _Plan(index % len(chunks), seed_type, rng.choice(LEADS[seed_type]), number)


def _question(text: str, plan: _Plan, chat: bool) -> Question:
    return Question(text if chat else f"Question: {text}\nAnswer:", chunk=plan.chunk, seed_type=plan.seed_type)


def _opening(tokenizer: Any, chunk: Context, plan: _Plan, writer: Writer, chat: bool) -> list[int]:
    """Return the ids behind which the model writes the question."""
    if not chat:
        ask = "Question: " + plan.lead if writer == "turn" else INSTRUCTIONS[plan.seed_type] + "\nQuestion:"
        return encode_plain(tokenizer, f"{chunk.text}\n{ask}".rstrip(" "))
    if writer == "instruction":
        return chunk.lay(tokenizer, INSTRUCTIONS[plan.seed_type], None, chat)
    turns = [{"role": "user", "content": MARK}]
    if chunk.turns:
        before = [{"role": role, "content": content} for role, content in chunk.turns]
        return encode_plain(tokenizer, render_chat(tokenizer, [*before, *turns]).partition(MARK)[0] + plan.lead)
    if chunk.place == "front":
        return encode_plain(tokenizer, chunk.text + render_chat(tokenizer, turns).partition(MARK)[0] + plan.lead)
    system = [{"role": "system", "content": chunk.text}, *turns]
    return encode_plain(tokenizer, render_chat(tokenizer, system).partition(MARK)[0] + plan.lead)


def count_by_type(questions: Iterable[Question]) -> dict[str, int]:
    """Return how many questions there are of each seed type, given ones under "given"."""
    counts: dict[str, int] = {}
    for question in questions:
        name = question.seed_type or "given"
        counts[name] = counts.get(name, 0) + 1
    return counts
