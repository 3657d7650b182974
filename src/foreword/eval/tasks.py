"""A task's data: its rows checked, its closed set of answers, hashes, and inputs cut to what fits. Imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from foreword.config import CLOSED_METRICS, TaskConfig, load_task
from foreword.core.template import TaskTemplate
from foreword.errors import ConfigError, DataError, did_you_mean
from foreword.eval.read import read_rows
from foreword.eval.rows import Message, Row, rows_sha256, sample_rows

__all__ = ["Message", "Row", "Split", "Task", "cut_text", "read_rows", "rows_sha256", "sample_rows"]

Split = Literal["train", "dev", "test"]

MAX_LABELS = 128
"""A task with more distinct targets is an open one."""
MIN_ROWS_PER_LABEL = 5
"""Targets that recur less often, on average, are no classes."""


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
            rows = read_rows(self.path(split), self.config.columns)
            for row in rows:
                self._check_row(row, self.path(split))
            self._read[split] = rows
        return list(self._read[split])

    def _check_row(self, row: Row, path: Path) -> None:
        if row.messages is not None and not self.config.chat:
            raise DataError(
                f"{row.file or path}, row {row.line}: a conversation, and task {self.name!r} is no chat",
                hint="Set chat = true in [task].",
            )
        labels = self.config.labels
        if labels is not None and row.target not in labels:
            raise DataError(
                f"{row.file or path}, row {row.line}: target {row.target!r} is not one of the {len(labels)} labels",
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
                f"task {self.name!r}, {row.place}: the input has {limit + excess} tokens, the limit is {limit}",
                hint="Shorten it, or set truncate to left or right." if refused else "Shorten the turns before it.",
            )
        text = cut_text(tokenizer, row.input, own - excess, self.config.truncate)
        return dataclasses.replace(row, input=text, messages=_with_last_user(row.messages, text))


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


def _num_tokens(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _with_last_user(messages: tuple[Message, ...] | None, text: str) -> tuple[Message, ...] | None:
    if messages is None:
        return None
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    return (*messages[:last], {"role": "user", "content": text}, *messages[last + 1 :])
