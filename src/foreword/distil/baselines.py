"""What a compressed context is measured against, each a constant block in front of the same rows.

- `full`: the context itself; of one in chunks, the chunk that holds the answer (which no server would know).
- `none`: nothing but the base's opening.
- `truncated`: as much of the text's beginning as takes P tokens, its turn closed.
- `summary`: what the model itself writes when asked for a summary, of P tokens at most.
- `untrained`: keys and values of the context's first P - 1 tokens and its last, as they are.
- `start`: what training started from, where that is another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from foreword.core.compile import compile
from foreword.core.prompt import KVPrefix, Vectors
from foreword.distil.context import block_ids, context_ids, count_tokens
from foreword.distil.ground import Desk, Ground
from foreword.distil.prefixes import literal_prefix
from foreword.distil.start import start_vectors
from foreword.engine.request import Request
from foreword.eval.tasks import cut_text

SUMMARIZE = "Summarize this in at most {words} words. Keep names and numbers."
WORDS_PER_TOKEN = 0.7


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """Something that stands in front of the questions."""

    name: str
    prefixes: tuple[KVPrefix, ...]
    """One for every question, or one for each chunk."""
    num_tokens: int
    """Positions that it takes in place of the context."""

    def of(self, chunks: Sequence[int]) -> list[KVPrefix]:
        """Return the prefix of each question, given its chunk."""
        return [self.prefixes[chunk if len(self.prefixes) > 1 else 0] for chunk in chunks]


def baselines(desk: Desk, ground: Ground, start: Vectors, max_new_tokens: int) -> list[Contender]:
    """Return the contenders beside the student, `full` and `none` first; start is what it was trained from."""
    num, template = ground.num_vectors, ground.template

    def literal(name: str, inner: Sequence[int]) -> Contender:
        ids = block_ids(desk.base, template, inner)
        prefix = literal_prefix(desk.base, ids, template, name=name, max_new_tokens=max_new_tokens)
        return Contender(name, (prefix,), len(inner))

    def soft(name: str, vectors: Vectors) -> Contender:
        made = compile(desk.base, vectors, name=name)
        return Contender(name, (dataclasses.replace(made, template=template, max_new_tokens=max_new_tokens),), num)

    longest = max(map(len, ground.blocks)) - len(block_ids(desk.base, template, ()))
    found = [
        Contender("full", ground.teachers, longest),
        literal("none", ()),
        literal("truncated", _within(desk, ground, ground.context.text, num) or ground.whole[:num]),
        literal("summary", _within(desk, ground, summary(desk, ground), num) or ()),
    ]
    first = start_vectors(desk.base, start.method, template.block(desk.base.tokenizer), ground.whole, "first")
    found.append(soft("untrained", first))
    return found if _same(first, start) else [*found, soft("start", start)]


def summary(desk: Desk, ground: Ground) -> str:
    """Return the model's own summary of the context, written greedily chunk by chunk within P tokens."""
    tokenizer, chat = desk.base.tokenizer, ground.template.chat
    around = 0 if ground.is_chunked else len(ground.whole) - count_tokens(desk.base, ground.context.text)
    room = (ground.num_vectors - max(around, 0)) // len(ground.chunks)
    if room < 1:
        return ""
    ask = SUMMARIZE.format(words=max(1, round(room * WORDS_PER_TOKEN)))
    requests = [
        Request(prompt_ids=chunk.lay(tokenizer, ask if chat else f"{ask}\nSummary:", None, chat), max_tokens=room)
        for chunk in ground.chunks
    ]
    return "\n".join(output.text.strip() for output in desk.engine.generate(requests))


def _within(desk: Desk, ground: Ground, text: str, num: int) -> tuple[int, ...] | None:
    """Return the tokens of a context whose text is cut until they are `num` at most; None where nothing is left."""
    room = min(num, count_tokens(desk.base, text))
    while room > 0:
        shorter = cut_text(desk.base.tokenizer, text, room, "right").strip()
        if not shorter:
            break
        inner = context_ids(desk.base, dataclasses.replace(ground.context, text=shorter, turns=()), ground.template)
        if len(inner) <= num:
            return inner
        room -= max(1, len(inner) - num)
    return None


def _same(one: Vectors, other: Vectors) -> bool:
    pairs = zip(one.tensors().values(), other.tensors().values(), strict=True)
    return all(a.shape == b.shape and bool((a == b).all()) for a, b in pairs)
