"""The two marks that a report's text may hold: `code` and **strong**."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

Mark = Literal["plain", "code", "strong"]
_MARKED = re.compile(r"`([^`\n]+)`|\*\*([^*\n]+)\*\*")


def spans(text: str) -> Iterator[tuple[Mark, str]]:
    """Yield a text's parts in order, each with its mark; nothing inside a mark is marked again."""
    place = 0
    for found in _MARKED.finditer(text):
        if found.start() > place:
            yield "plain", text[place : found.start()]
        yield ("strong", found[2]) if found[1] is None else ("code", found[1])
        place = found.end()
    if place < len(text):
        yield "plain", text[place:]


def without_marks(text: str) -> str:
    """Return the text with its marks taken off."""
    return "".join(part for _, part in spans(text))
