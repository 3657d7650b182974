"""What a decision is made from: the tables of a constraints file, each key with its unit, default and question."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from foreword.advise.methods import Surface

SURFACES: tuple[Surface, ...] = ("text", "input_embeddings", "kv_import", "lora", "layer_code", "weights")
"""What may change for a task, from least to most; each allows all before it."""
SURFACE_MEANS: Mapping[Surface, str] = {
    "text": "the words of the request",
    "input_embeddings": "the vectors in front of the first layer",
    "kv_import": "keys and values handed to the engine's cache",
    "lora": "low-rank weights that the engine adds per request",
    "layer_code": "code inside the layers",
    "weights": "the weights of the base, one copy per task",
}

Kind = Literal["classification", "extraction", "tagging", "generation", "new_skill", "new_knowledge"]
KINDS: tuple[Kind, ...] = ("classification", "extraction", "tagging", "generation", "new_skill", "new_knowledge")
"""`generation` is text in another style or form than the base writes by itself; the last two are not in the base."""

Unit = Literal["count", "tokens", "bytes", "hours", "ms", "score", "rate", "flag", "name"]
UNIT_MEANS: Mapping[Unit, str] = {
    "count": "a whole number",
    "tokens": "a whole number of tokens",
    "bytes": 'a size such as "20 MB", or bytes',
    "hours": 'a duration such as "1 day", or hours',
    "ms": 'a duration such as "5 ms", or milliseconds',
    "score": "a score from 0 to 1",
    "rate": "a number",
    "flag": "true or false",
    "name": "a name",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One key of a constraints file."""

    table: str
    name: str
    unit: Unit
    default: Any
    text: str
    least: float | None
    choices: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The key as errors and `--set` name it: `limits.storage_total_bytes`."""
        return f"{self.table}.{self.name}"


def _key(default: Any, unit: Unit, text: str, *, least: float | None = 0, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"unit": unit, "text": text, "least": least, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """The tasks that share the base."""

    count: int = _key(1, "count", "How many tasks share the base?", least=1)
    kind: Kind = _key("classification", "name", "What kind are they, the hardest one counting?", choices=KINDS)  # noqa: RUF009 (a dataclass field)
    rows_per_task: int = _key(1000, "count", "Labelled rows per task?")
    input_tokens: int = _key(300, "tokens", "Tokens of an input, on average?", least=1)
    output_tokens: int = _key(16, "tokens", "Tokens of an answer, on average?", least=1)
    instruction_tokens: int = _key(60, "tokens", "Tokens of the instruction in words?", least=1)
    shots: int = _key(8, "count", "Solved examples that a few-shot prompt would show?", least=1)
    shared_context_tokens: int = _key(
        0, "tokens", "Tokens of long, stable text that every request of a task would carry (0: none)?"
    )
    num_vectors: int | None = _key(None, "count", "Vectors of a prompt or prefix, if you have decided?", least=1)
    related: bool = _key(False, "flag", "Are the tasks related, so that one can start from another?")
    baseline_score: float | None = _key(None, "score", "Score of the hard text prompt alone, if known?")
    quality_target: float | None = _key(None, "score", "Score that the tasks must reach, if there is one?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What must not be exceeded; None is no limit."""

    storage_per_task_bytes: float | None = _key(None, "bytes", "Storage for one task at most?")
    storage_total_bytes: float | None = _key(None, "bytes", "Storage for all tasks at most?")
    device_memory_bytes: float | None = _key(None, "bytes", "Accelerator memory for what all tasks add at most?")
    first_token_added_ms: float | None = _key(None, "ms", "Time added before the first token at most?")
    per_token_added_ms: float | None = _key(None, "ms", "Time added to each further token at most?")
    context_tokens: int | None = _key(None, "tokens", "Tokens that one request may hold in all?", least=1)
    wire_bytes: float | None = _key(None, "bytes", "Bytes that one request may send at most?")
    update_deadline_hours: float | None = _key(None, "hours", "Time from a wanted change to its being live, at most?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What may be changed, and what the engine does by itself."""

    surface: Surface = _key("kv_import", "name", "What may change for a task?", choices=SURFACES)  # noqa: RUF009 (a dataclass field)
    prefix_cache: bool = _key(True, "flag", "Does the engine keep the blocks of a common beginning?")
    block_tokens: int = _key(16, "tokens", "Tokens in a block of the engine's cache?", least=1)
    review_hours: float = _key(2.0, "hours", "Time to judge, approve and roll out one changed task?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """How the tasks are used."""

    requests_per_s: float = _key(1.0, "rate", "Requests per second, all tasks together?")
    batch: int = _key(16, "count", "Requests that are decoded together?", least=1)
    network_gbit_s: float = _key(10.0, "rate", "Speed of the network to the engine, in Gbit/s?", least=0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """Whether somebody must be able to say what a task's change does."""

    needed: bool = _key(False, "flag", "Must a task's change be explainable to an auditor?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """What a factor of ten weighs in each criterion of the ranking; 1 is neutral, 0 leaves the criterion out."""

    storage: float = _key(1.0, "rate", "Weight of storage?")
    latency: float = _key(1.0, "rate", "Weight of latency?")
    wire: float = _key(1.0, "rate", "Weight of bytes per request?")
    context: float = _key(1.0, "rate", "Weight of context used up?")
    updates: float = _key(1.0, "rate", "Weight of the time that a change takes?")
    operations: float = _key(1.0, "rate", "Weight of parts that must change?")
    audit: float = _key(1.0, "rate", "Weight of auditability, where it is needed?")


TABLES: Mapping[str, type] = {
    "tasks": Tasks,
    "limits": Limits,
    "change": Change,
    "traffic": Traffic,
    "audit": Audit,
    "priorities": Priorities,
}


def questions() -> tuple[Question, ...]:
    """Return every key of every table but [base] and [hardware], in the order in which they are asked."""
    found = []
    for table, kind in TABLES.items():
        for item in dataclasses.fields(kind):
            found.append(Question(table, item.name, default=item.default, **item.metadata))
    return tuple(found)
