"""What stands before any question: the context in chunks, as token ids and as the teacher's prefixes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foreword.core.model import FrozenModel
from foreword.core.prompt import KVPrefix
from foreword.core.template import TaskTemplate
from foreword.distil.context import (
    Context,
    block_ids,
    check_window,
    choose_place,
    context_ids,
    count_tokens,
    cut,
    read_context,
    text_ids,
)
from foreword.distil.prefixes import literal_prefix
from foreword.distil.settings import RATIO, DistilConfig
from foreword.engine.engine import Engine
from foreword.errors import ConfigError

ROOM = 64
"""Tokens that a question is taken to have before any is known."""
CURE = "Allow chunks: --chunk-tokens 512."


@dataclass(frozen=True, slots=True, eq=False)
class Desk:
    """What the work is done with, and where its files lie."""

    base: FrozenModel
    engine: Engine
    out: Path
    cache: Path | None
    """Folder of the teacher's numbers; None keeps none."""
    tell: Callable[[str], None]
    """Told what is going on, a line at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class Ground:
    """A context as teacher and student have it."""

    context: Context
    chunks: tuple[Context, ...]
    template: TaskTemplate
    """The student's, P vectors in front."""
    blocks: tuple[tuple[int, ...], ...]
    """Each chunk's whole block, BOS first, as token ids."""
    whole: tuple[int, ...]
    """C, the tokens that the vectors stand for; of a context in chunks the tokens of its text."""
    teachers: tuple[KVPrefix, ...]
    """Each chunk's block as keys and values."""

    @property
    def num_vectors(self) -> int:
        """P."""
        return self.template.num_left

    @property
    def is_chunked(self) -> bool:
        """Whether the context is more than one chunk."""
        return len(self.chunks) > 1


def lay_ground(base: FrozenModel, config: DistilConfig) -> Ground:
    """Read the context and compute what the teacher has of it.

    Raises ConfigError with both numbers where it does not fit the window and no chunks are allowed, DataError for a
    file that is no context and where a question's tokens change behind it.
    """
    chat = bool(getattr(base.tokenizer, "chat_template", None)) if config.chat is None else config.chat
    context = choose_place(base, read_context(config.context, name=config.name, place=config.place), chat)
    template = TaskTemplate("{soft:2}{input}", chat)
    room, cure = ROOM + config.max_new_tokens, CURE if config.chunk_tokens is None else "Use smaller chunks."
    chunks = [context] if config.chunk_tokens is None else cut(base, context, config.chunk_tokens)
    for chunk in chunks:  # by their texts: what is far too long is not even laid out
        check_window(base, chunk, count_tokens(base, chunk.text), room, cure)
    inner = [context_ids(base, chunk, template) for chunk in chunks]
    whole = inner[0] if len(chunks) == 1 else text_ids(base, context.text)
    blocks = [block_ids(base, template, part) for part in inner]
    for chunk, ids in zip(chunks, blocks, strict=True):
        check_window(base, chunk, len(ids), room, cure)
    template = template.resized(_num_vectors(base, config, len(whole), room))
    teachers = [
        literal_prefix(base, ids, template, name=chunk.name, max_new_tokens=config.max_new_tokens)
        for ids, chunk in zip(blocks, chunks, strict=True)
    ]
    return Ground(context, tuple(chunks), template, tuple(blocks), whole, tuple(teachers))


def _num_vectors(base: FrozenModel, config: DistilConfig, num_tokens: int, room: int) -> int:
    num = config.vectors or max(2, round(num_tokens / (config.ratio or RATIO)))
    if num >= num_tokens:
        raise ConfigError(
            f"{num} vectors for context {config.name!r} of {num_tokens} tokens compress nothing",
            hint=f"Use fewer than {num_tokens} vectors.",
        )
    limit = base.spec.max_positions
    if limit is not None and num + room > limit:
        raise ConfigError(
            f"{num} vectors for context {config.name!r} of {num_tokens} tokens, with {room} for question and answer "
            f"{num + room}; the base's window is {limit}",
            hint=f"Use fewer vectors: --ratio {-(-num_tokens // (limit - room)) * 4}.",
        )
    base.check_holds(num)
    return num
