"""A task's data: JSONL rows read and checked, its closed set of answers, hashes, and inputs cut to what fits.

Imports no torch. A row is `{"input": ..., "target": ...}`, with `references` where several answers are right, or
`{"messages": [...]}`, a conversation whose last message is the answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foreword.config import CLOSED_METRICS, TaskConfig, load_task
from foreword.core.template import TaskTemplate
from foreword.errors import ConfigError, DataError, did_you_mean

Split = Literal["train", "dev", "test"]
Message = Mapping[str, str]

ROLES = ("system", "user", "assistant")
MAX_LABELS = 128
"""A task with more distinct targets is an open one."""
MIN_ROWS_PER_LABEL = 5
"""Targets that recur less often, on average, are no classes."""


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
    """Place among the file's rows, from 0."""
    line: int = 0
    """Line in the file, from 1: the row number of errors."""

    def to_json(self) -> dict[str, Any]:
        """Return what the row teaches, JSON-ready: everything but its place."""
        turns = None if self.messages is None else [dict(message) for message in self.messages]
        return {"input": self.input, "target": self.target, "references": list(self.references), "messages": turns}


@dataclass(frozen=True)
class Task:
    """A task's configuration with its data; files are read at first use and kept."""

    config: TaskConfig
    _read: dict[str, list[Row]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        _ = self.template  # a bad template is an error here, not at the first row

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> Task:
        """Read the `[task]` table of a task file; `overrides` are TaskConfig fields. Raises ConfigError."""
        config, _ = load_task(path)
        known = {f.name for f in dataclasses.fields(config)}
        for key in overrides:
            if key not in known:
                raise ConfigError(f"unknown key task.{key}", hint=did_you_mean(key, known))
        return cls(dataclasses.replace(config, **overrides))

    @property
    def name(self) -> str:
        """The task's name."""
        return self.config.name

    @property
    def template(self) -> TaskTemplate:
        """How a row is rendered."""
        return TaskTemplate(self.config.template, self.config.chat, self.config.system)

    def path(self, split: Split) -> Path:
        """Return the split's file. Raises ConfigError where the task names none."""
        path = {"train": self.config.train, "dev": self.config.dev, "test": self.config.test}[split]
        if path is None:
            raise ConfigError(f"task {self.name!r} has no {split} data", hint=f"Set {split} in [task].")
        return Path(path)

    def rows(self, split: Split) -> list[Row]:
        """Return the rows of a split.

        Raises DataError as `read_rows` does, for a conversation in a task that is no chat, and for a target that is
        not among the configured labels.
        """
        if split not in self._read:
            rows = read_rows(self.path(split))
            for row in rows:
                self._check_row(row, self.path(split))
            self._read[split] = rows
        return list(self._read[split])

    def _check_row(self, row: Row, path: Path) -> None:
        if row.messages is not None and not self.config.chat:
            raise DataError(
                f"{path}, row {row.line}: a conversation, and task {self.name!r} is no chat",
                hint="Set chat = true in [task].",
            )
        labels = self.config.labels
        if labels is not None and row.target not in labels:
            raise DataError(
                f"{path}, row {row.line}: target {row.target!r} is not one of the {len(labels)} labels",
                hint=did_you_mean(row.target, labels),
            )

    def labels(self) -> tuple[str, ...]:
        """Return the closed set of answers, or () where answers are open.

        The configured labels; else the distinct training targets, sorted, where the metric is one for closed sets and
        they are at most 128, each seen 5 times or more on average.
        """
        if self.config.labels is not None:
            return self.config.labels
        if self.config.metric not in CLOSED_METRICS:
            return ()
        targets = [row.target for row in self.rows("train")]
        distinct = sorted(set(targets))
        closed = 2 <= len(distinct) <= MAX_LABELS and len(targets) >= MIN_ROWS_PER_LABEL * len(distinct)
        return tuple(distinct) if closed else ()

    def data_sha256(self, split: Split) -> str:
        """Return the hash of a split's rows; line ends, blank lines and further fields do not change it."""
        return rows_sha256(self.rows(split))

    def input_limit(
        self, tokenizer: Any, max_positions: int | None, template: TaskTemplate | None = None
    ) -> int | None:
        """Return how many tokens an input may have on a base of `max_positions`, or None for any number.

        The least of `max_input_tokens` and what the base leaves beside block, template and answer; `template` stands
        in for the task's own, for example with resized slots. Raises ConfigError where nothing is left.
        """
        limits = [] if self.config.max_input_tokens is None else [self.config.max_input_tokens]
        if max_positions is not None:
            template = template or self.template
            block = template.block(tokenizer).num_positions
            around = len(template.render(tokenizer, "x").ids) + 2  # tokens may split at the input's two ends
            room = max_positions - block - around - self.config.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"block ({block}), template ({around}) and answer ({self.config.max_new_tokens}) leave no token"
                    f" of the base's {max_positions} to the input",
                    hint="Lower max_new_tokens or the slot lengths.",
                )
            limits.append(room)
        return min(limits, default=None)

    def fit(self, row: Row, tokenizer: Any, limit: int | None) -> Row:
        """Return the row with its input cut to `limit` tokens as `truncate` says, or itself where it fits.

        Of a conversation the last user message is cut. Raises DataError naming the row and both numbers where the task
        refuses, or where the other turns alone are over the limit.
        """
        texts = [row.input] if row.messages is None else [message["content"] for message in row.messages]
        if limit is None or sum(len(text.encode()) + 1 for text in texts) <= limit:  # no token without a byte
            return row
        excess = sum(_num_tokens(tokenizer, text) for text in texts) - limit
        if excess <= 0:
            return row
        own = _num_tokens(tokenizer, row.input)
        refused = self.config.truncate == "error"
        if refused or own <= excess:
            raise DataError(
                f"task {self.name!r}, row {row.line}: the input has {limit + excess} tokens, the limit is {limit}",
                hint="Shorten it, or set truncate to left or right." if refused else "Shorten the turns before it.",
            )
        text = cut_text(tokenizer, row.input, own - excess, self.config.truncate)
        return dataclasses.replace(row, input=text, messages=_with_last_user(row.messages, text))


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file of rows; fields that no part of foreword knows are left aside.

    A byte-order mark, CRLF and blank lines are fine. Raises DataError naming file, line and field for a file that is
    missing or empty, JSON that is malformed, a field that is missing or has the wrong type, and an empty target.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", hint="Check the path in [task].") from error
    rows: list[Row] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_parse_row(line, index=len(rows), number=number))
            except DataError as error:
                raise DataError(f"{path}, row {number}: {error.message}", hint=error.hint) from error
    if not rows:
        raise DataError(f"{path} holds no rows", hint='One JSON object per line: {"input": "...", "target": "..."}')
    return rows


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


def cut_text(tokenizer: Any, text: str, num_tokens: int, side: str) -> str:
    """Return `text` with tokens cut from the `left` or `right` side so that `num_tokens` of them are left.

    The cut is in the text, at a token's edge, so that training and serving see the same input.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    kept = offsets[-num_tokens:] if side == "left" else offsets[:num_tokens]
    shorter = text[kept[0][0] :] if side == "left" else text[: kept[-1][1]]
    while shorter and _num_tokens(tokenizer, shorter) > num_tokens:  # the cut end may tokenise anew
        shorter = shorter[1:] if side == "left" else shorter[:-1]
    return shorter


def _parse_row(line: bytes, index: int, number: int) -> Row:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error})", hint="Save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"malformed JSON: {error}", hint="Each line is one JSON object.") from error
    if not isinstance(data, dict):
        raise DataError(f"a JSON {_kind(data)} where an object is needed", hint="Each line is one JSON object.")
    if "messages" in data:
        if both := [name for name in ("input", "target") if name in data]:
            raise DataError(f"both messages and {both[0]}", hint="Give messages, or input and target.")
        messages, target = _parse_messages(data["messages"])
        text = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), "")
        single = len(messages) == 1 and messages[0]["role"] == "user"
        turns = None if single else messages
    else:
        text, target, turns = _text(data, "input"), _text(data, "target"), None
    if not target.strip():
        raise DataError("target is empty", hint="Give the answer that is to be learned.")
    return Row(text, target, _parse_references(data, target), turns, index, number)


def _parse_messages(value: object) -> tuple[tuple[Message, ...], str]:
    """Return the turns before the answer, and the answer."""
    if not isinstance(value, list):
        raise DataError(f"messages is a {_kind(value)}", hint='Give a list of {"role": ..., "content": ...}.')
    turns: list[Message] = []
    for place, turn in enumerate(value):
        name = f"messages[{place}]"
        if not isinstance(turn, dict):
            raise DataError(f"{name} is a {_kind(turn)}", hint='Give {"role": ..., "content": ...}.')
        role, content = _text(turn, "role", name), _text(turn, "content", name)
        if role not in ROLES:
            raise DataError(f"{name}.role is {role!r}", hint=f"Known roles: {', '.join(ROLES)}.")
        if foreign := [key for key in turn if key not in ("role", "content") and turn[key] is not None]:
            raise DataError(f"{name}.{foreign[0]} is not supported", hint="A message is a role and a text.")
        turns.append({"role": role, "content": content})
    roles = [turn["role"] for turn in turns]
    if "user" not in roles or roles[-1] != "assistant":
        raise DataError(
            f"messages has the roles {', '.join(roles) or 'of nobody'}",
            hint="It needs a user's message, and the answer, by the assistant, as the last one.",
        )
    return tuple(turns[:-1]), turns[-1]["content"]


def _parse_references(data: Mapping[str, Any], target: str) -> tuple[str, ...]:
    value = data.get("references")
    if value is None:
        return (target,)
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else f"a {_kind(value)}"
        raise DataError(f"references is {kind}", hint="Give a list of texts.")
    return tuple(_text({"references": item}, "references") for item in value)


def _text(data: Mapping[str, Any], key: str, inside: str = "") -> str:
    """Return a text field. Raises DataError where it is missing, no text, or cannot be encoded."""
    name = f"{inside}.{key}" if inside else key
    if key not in data:
        near = did_you_mean(key, data) if data else ""
        raise DataError(f"{name} is missing", hint=near)
    value = data[key]
    if not isinstance(value, str):
        raise DataError(f"{name} is a {_kind(value)}", hint=f"Give {name} as a text, in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half of a surrogate pair", hint="Remove the character.") from error
    return value


def _kind(value: object) -> str:
    kinds = {dict: "object", list: "list", str: "text", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _with_last_user(messages: tuple[Message, ...] | None, text: str) -> tuple[Message, ...] | None:
    if messages is None:
        return None
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    return (*messages[:last], {"role": "user", "content": text}, *messages[last + 1 :])
