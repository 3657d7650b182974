"""A context to compress: read, laid in front of a question as the teacher sees it, and cut into chunks.

The teacher reads `[left | C | row]`, the student `[left | P vectors | row]`: `left` are the literal tokens that open
every sequence (BOS), C the context's tokens with whatever encloses them, and the row's tokens are the same for both,
which `check_aligned` proves for each row. So teacher, student and every baseline are one thing, a constant block in
front of rows, and one engine judges them all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from foreword.core.model import FrozenModel
from foreword.core.template import PROBES, TaskTemplate, encode_plain, render_chat
from foreword.errors import BadRequest, ConfigError, DataError

Place = Literal["system", "front"]
Message = dict[str, str]
BREAKS = (r"\n\s*\n", r"\n", r"(?<=[.!?;])\s+", r"\s+")
"""Where a chunk may end, best first: paragraph, line, sentence, word."""
LEAST_FILLED = 0.5
"""A chunk ends at the best kind of break behind this part of its room."""


@dataclass(frozen=True, slots=True)
class Context:
    """What the teacher has before the question."""

    name: str
    text: str = ""
    """A text: a handbook, a contract, a system prompt."""
    turns: tuple[tuple[str, str], ...] = ()
    """Or turns of a chat as (role, content): a few-shot block. Exactly one of the two."""
    place: Place = "system"
    """Where a text stands: as a system turn of the chat, or plain in front of the first turn."""

    def sha256(self) -> str:
        """Return the hash of what stands in front of a question."""
        return hashlib.sha256(json.dumps([self.text, self.turns, self.place]).encode()).hexdigest()

    def lay(self, tokenizer: Any, text: str, turns: Sequence[Message] | None, chat: bool) -> list[int]:
        """Return the token ids of context and question, BOS first, as the base's own template renders them."""
        if not chat:
            return encode_plain(tokenizer, f"{self.text}\n{text}")
        own = list(turns) if turns is not None else [{"role": "user", "content": text}]
        if self.turns:
            return encode_plain(tokenizer, render_chat(tokenizer, [*_messages(self.turns), *own]))
        if self.place == "front":
            return encode_plain(tokenizer, self.text + render_chat(tokenizer, own))
        return encode_plain(tokenizer, render_chat(tokenizer, [{"role": "system", "content": self.text}, *own]))


def read_context(path: str | Path, *, name: str | None = None, place: Place = "system") -> Context:
    """Read a context: a text file, or `.json` with `{"messages": [...]}`, turns that stand before the question.

    Raises DataError for a file that cannot be read, is empty, or whose messages are none.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise DataError(f"cannot read the context {path}: {error.strerror}", hint="Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"the context {path} is not UTF-8 ({error})", hint="Save it as UTF-8 text.") from error
    if not text:
        raise DataError(f"the context {path} is empty", hint="Give a text file with something to compress.")
    name = name or path.stem
    if path.suffix != ".json":
        return Context(name, text, place=place)
    try:
        turns = tuple((str(turn["role"]), str(turn["content"])) for turn in json.loads(text)["messages"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the context {path} holds no messages ({type(error).__name__}: {error})",
            hint='Give {"messages": [{"role": "user", "content": "..."}, ...]}, or a text file.',
        ) from error
    if not turns:
        raise DataError(f"the context {path} holds an empty list of messages", hint="Give at least one turn.")
    return Context(name, turns=turns)


def choose_place(base: FrozenModel, context: Context, chat: bool) -> Context:
    """Return the context where it can stand on this base: in front where no system turn is known.

    Raises ConfigError where turns are given to a base without a chat template.
    """
    if context.turns and not chat:
        raise ConfigError(
            f"the context {context.name!r} is turns of a chat, and the base has no chat template",
            hint="Write it as a text file.",
        )
    if context.turns or context.place == "front":
        return context
    try:
        if chat:
            dataclasses.replace(context, text=PROBES[0]).lay(base.tokenizer, PROBES[0], None, chat)
            return context
    except BadRequest:
        pass
    return dataclasses.replace(context, place="front")


def context_ids(base: FrozenModel, context: Context, template: TaskTemplate) -> tuple[int, ...]:
    """Return C: the tokens that the student's vectors stand for, found behind a probe question.

    Raises DataError as `check_aligned` does, where the question's tokens change behind the context.
    """
    left, right = _literals(base, template)
    taught = context.lay(base.tokenizer, PROBES[0], None, template.chat)
    own = [*right, *template.render(base.tokenizer, PROBES[0]).ids]
    end = len(taught) - len(own)
    check_aligned(base, [*left, *taught[len(left) : max(end, 0)], *own], taught, len(left) + max(end - len(left), 0))
    return tuple(taught[len(left) : end])


def check_aligned(
    base: FrozenModel, student: Sequence[int], teacher: Sequence[int], start: int, what: str = ""
) -> None:
    """Raise DataError with the first differing position where two token rows differ; `start` is the question's."""
    for place in range(max(len(student), len(teacher))):
        pair = [row[place] if place < len(row) else None for row in (teacher, student)]
        if pair[0] != pair[1]:
            shown = ["the end" if token is None else f"{token} {_show(base, token)}" for token in pair]
            raise DataError(
                f"{what or 'a question'}: token {place - start} of question and answer is {shown[0]} for the teacher, "
                f"behind the context, and {shown[1]} for the student",
                hint="End the context with a line break, or put it in a system turn (place = system).",
            )


def block_ids(base: FrozenModel, template: TaskTemplate, inner: Sequence[int]) -> tuple[int, ...]:
    """Return the ids of the block with tokens in the place of the vectors: what a teacher or a baseline starts with."""
    left, right = _literals(base, template)
    return (*left, *inner, *right)


def check_window(base: FrozenModel, context: Context, num_tokens: int, room: int, cure: str) -> None:
    """Raise ConfigError with both numbers where block, longest row and answer exceed the base's window."""
    limit = base.spec.max_positions
    if limit is not None and num_tokens + room > limit:
        raise ConfigError(
            f"context {context.name!r} takes {num_tokens} tokens, with {room} for question and answer "
            f"{num_tokens + room}; the base's window is {limit}",
            hint=cure,
        )


def cut(base: FrozenModel, context: Context, chunk_tokens: int) -> list[Context]:
    """Cut a text into chunks of at most `chunk_tokens` tokens, each led by a line that says which part it is.

    Chunks end at a paragraph, line, sentence or word, and together are the text. A text that fits is one chunk, itself.
    Raises ConfigError where the context is turns, or a chunk is too small for the line that leads it.
    """
    if context.turns:
        raise ConfigError(
            f"the context {context.name!r} is turns of a chat, which are not cut into chunks",
            hint="Write it as a text file.",
        )
    if count_tokens(base, context.text) <= chunk_tokens:
        return [context]
    room = chunk_tokens - count_tokens(base, _line(999, 999, context.name))
    if room < 16:
        raise ConfigError(
            f"chunk_tokens = {chunk_tokens} leaves {room} tokens to a chunk beside the line that leads it",
            hint="Use at least 64.",
        )
    parts, rest = [], context.text
    while rest:
        left = count_tokens(base, rest)
        even = -(-left // -(-left // room))  # chunks of like size
        end = _end_of_chunk(base, rest, min(room, even + even // 8))
        parts.append(rest[:end].strip())
        rest = rest[end:].lstrip()
    return [
        dataclasses.replace(context, name=f"{context.name}/{index}", text=_line(index, len(parts), context.name) + part)
        for index, part in enumerate(parts, start=1)
    ]


def _line(index: int, count: int, name: str) -> str:
    return f"Part {index} of {count} of {name}.\n"


def _end_of_chunk(base: FrozenModel, text: str, room: int) -> int:
    """Return where the first chunk of `text` ends, at most `room` tokens on."""
    offsets = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    if len(offsets) <= room:
        return len(text)
    end = offsets[room - 1][1]
    for pattern in BREAKS:
        found = [match.start() for match in re.finditer(pattern, text[:end])]
        if found and found[-1] >= end * LEAST_FILLED:
            return found[-1]
    return int(end)


def _literals(base: FrozenModel, template: TaskTemplate) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the block's literal tokens left and right of its one run of vectors."""
    segments = template.block(base.tokenizer).segments
    place = next(index for index, segment in enumerate(segments) if isinstance(segment, int))
    left, right = segments[:place], segments[place + 1 :]
    return tuple(t for s in left if isinstance(s, tuple) for t in s), tuple(
        t for s in right if isinstance(s, tuple) for t in s
    )


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]


def _show(base: FrozenModel, token: int) -> str:
    return repr(base.tokenizer.decode([token]))


def count_tokens(base: FrozenModel, text: str) -> int:
    """Return how many tokens a text has by itself."""
    return len(text_ids(base, text))


def text_ids(base: FrozenModel, text: str) -> tuple[int, ...]:
    """Return the tokens of a text by itself; one longer than the window is fine."""
    return tuple(base.tokenizer(text, add_special_tokens=False, verbose=False).input_ids) if text else ()
