"""One row of a task, and how it is made from a record: a JSON object, or the like from another container.

Imports no torch. A record is `{"input": ..., "target": ...}`, with `references` where several answers are right, or
`{"messages": [...]}`, a conversation whose last message is the answer.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreword.config import FIELDS
from foreword.errors import DataError, did_you_mean

Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Row:
    """One example."""

    input: str
    """The text; of a conversation its last user message."""
    target: str
    """The answer to learn."""
    references: tuple[str, ...]
    """Answers that count as right; `(target,)` where the row names none."""
    messages: tuple[Message, ...] | None
    """The turns before the answer; None where they are one user message, which is then `input` alone."""
    index: int
    """Place among the data's rows, from 0."""
    line: int = 0
    """Line of a JSONL file, place in another, from 1: the row number of errors."""
    weightless: tuple[int, ...] = ()
    """Places in `messages` of answers with weight 0, which are not learned."""
    file: str = field(default="", compare=False)
    """The file, where the rows come from several."""

    @property
    def place(self) -> str:
        """Where the row stands, for errors."""
        return f"{self.file}, row {self.line}" if self.file else f"row {self.line}"

    def to_json(self) -> dict[str, Any]:
        """Return what the row teaches, JSON-ready: everything but its place."""
        turns = None if self.messages is None else [dict(message) for message in self.messages]
        data = {"input": self.input, "target": self.target, "references": list(self.references), "messages": turns}
        return {**data, "weightless": list(self.weightless)} if self.weightless else data

    def record(self) -> dict[str, Any]:
        """Return the record that `parse_row` makes this row of again."""
        data: dict[str, Any] = {"input": self.input, "target": self.target}
        if self.messages is not None:
            turns = [dict[str, Any](turn) for turn in self.messages]
            for place in self.weightless:
                turns[place]["weight"] = 0
            data = {"messages": [*turns, {"role": "assistant", "content": self.target}]}
        return data if self.references == (self.target,) else {**data, "references": list(self.references)}


def sample_rows(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Return `limit` rows drawn by `seed` without repetition, or all of them in order where there are no more."""
    if limit is None or limit >= len(rows):
        return list(rows)
    drawn = list(rows)
    random.Random(seed).shuffle(drawn)
    return drawn[:limit]


def rows_sha256(rows: Sequence[Row]) -> str:
    """Return a hash over what the rows teach, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.to_json(), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def parse_row(data: object, columns: Mapping[str, str], index: int, number: int, file: str = "") -> Row:
    """Make a row of a record; `columns` are the record's names of our fields, where they differ.

    Raises DataError naming the field that is missing, of the wrong type, or empty.
    """
    if not isinstance(data, dict):
        raise DataError(f"a JSON {_kind(data)} where an object is needed", hint="Each line is one JSON object.")
    if _holds_messages(data, columns):
        messages, target, weightless = _parse_messages(data, columns.get("messages", "messages"))
        text = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
        single = len(messages) == 1 and messages[0]["role"] == "user"
        turns = None if single else messages
    else:
        text, target = (_text(data, columns.get(field, field)) for field in ("input", "target"))
        turns, weightless = None, ()
    if not target.strip():
        raise DataError("target is empty", hint="Give the answer that is to be learned.")
    references = _parse_references(data, columns.get("references", "references"), target)
    return Row(text, target, references, turns, index, number, weightless, file)


def _holds_messages(data: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    """Return whether a record is read as a conversation. Raises DataError where it may be both.

    Where `columns` names fields of one kind, those of the other kind are left aside.
    """
    if "input" in columns or "target" in columns:
        return False
    if "messages" not in data and "messages" not in columns:
        return False
    if "messages" not in columns and (both := [name for name in ("input", "target") if name in data]):
        raise DataError(f"both messages and {both[0]}", hint="Give messages, or input and target; or set task.columns.")
    return True


def _parse_messages(data: Mapping[str, Any], key: str) -> tuple[tuple[Message, ...], str, tuple[int, ...]]:
    """Return the turns before the answer, the answer, and the places of answers with weight 0."""
    if key not in data:
        raise DataError(f"{key} is missing", hint=missing_hint(key, data))
    value = data[key]
    if not isinstance(value, list):
        raise DataError(f"{key} is a {_kind(value)}", hint='Give a list of {"role": ..., "content": ...}.')
    turns: list[Message] = []
    weightless: list[int] = []
    for place, turn in enumerate(value):
        name = f"{key}[{place}]"
        if not isinstance(turn, dict):
            raise DataError(f"{name} is a {_kind(turn)}", hint='Give {"role": ..., "content": ...}.')
        role, content = _text(turn, "role", name), _text(turn, "content", name)
        if role not in ROLES:
            raise DataError(f"{name}.role is {role!r}", hint=f"Known roles: {', '.join(ROLES)}.")
        weighs = ("weight",) if role == "assistant" else ()
        if foreign := [key for key in turn if key not in ("role", "content", *weighs) and turn[key] is not None]:
            raise DataError(f"{name}.{foreign[0]} is not supported", hint="A message is a role and a text.")
        if (weight := turn.get("weight")) not in (None, 0, 1):
            raise DataError(f"{name}.weight is {weight!r}", hint="1 learns the answer, 0 does not.")
        if weight == 0:
            weightless.append(place)
        turns.append({"role": role, "content": content})
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or roles[-1] != "assistant":
        raise DataError(
            f"{key} has the roles {', '.join(roles) or 'of nobody'}",
            hint="It needs a user's message, and the answer, by the assistant, as the last one.",
        )
    if len(turns) - 1 in weightless:
        raise DataError(f"{key}[{len(turns) - 1}].weight is 0", hint="The last answer is learned: end with it.")
    return tuple(turns[:-1]), turns[-1]["content"], tuple(weightless)


def _parse_references(data: Mapping[str, Any], key: str, target: str) -> tuple[str, ...]:
    value = data.get(key)
    if value is None:
        return (target,)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {_kind(value)}"
        raise DataError(f"{key} is {kind}", hint="Give a list of texts.")
    return tuple(_text({key: item}, key) for item in value)


def _text(data: Mapping[str, Any], key: str, inside: str = "") -> str:
    """Return a text field. Raises DataError where it is missing, no text, or cannot be encoded."""
    name = f"{inside}.{key}" if inside else key
    if key not in data:
        raise DataError(f"{name} is missing", hint=missing_hint(key, data))
    value = data[key]
    if not isinstance(value, str):
        raise DataError(f"{name} is a {_kind(value)}", hint=f"Give {name} as a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half of a surrogate pair", hint="Remove the character.") from error
    return value


def missing_hint(key: str, present: Collection[str]) -> str:
    """Return what to do about a missing field: the nearest name, and how to name another."""
    near = did_you_mean(key, present) if present else ""
    return f"{near} Another name is set by columns in [task]." if near and key in FIELDS else near


def _kind(value: object) -> str:
    kinds: dict[type, str] = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number"}
    kinds |= {float: "number", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
