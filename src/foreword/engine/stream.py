"""Token ids to text, piece by piece: whole characters only, and nothing behind a stop string. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of an answer's token ids, without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextStream:
    """Turns token ids into text as they come; the pieces joined equal `decode` of all ids, cut at a stop string.

    Text is held back while its last character is incomplete (a character may take several tokens) and while it may
    be the start of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0  # ids before it are decoded for good
        self._read = 0  # the text of ids[start:read] is out, or held
        self._seen = ""  # that text
        self._held = ""  # whole characters that may begin a stop string
        self.is_stopped = False

    def push(self, ids: Sequence[int]) -> str:
        """Take new ids; return the text that is certain by now."""
        self._ids.extend(ids)
        text = decode(self._tokenizer, self._ids[self._start :])
        if text.endswith(INCOMPLETE):
            return ""
        fresh = text[len(self._seen) :]
        recent = decode(self._tokenizer, self._ids[self._read :])
        if recent:  # a decoder may treat the first piece differently (a leading space), so keep one behind
            self._start, self._seen = self._read, recent
        else:
            self._seen = text
        self._read = len(self._ids)
        return self._release(fresh)

    def flush(self) -> str:
        """Return what is still held back: the answer has ended."""
        if self.is_stopped:
            return ""
        fresh = decode(self._tokenizer, self._ids[self._start :])[len(self._seen) :]
        self._start = self._read = len(self._ids)
        self._seen = ""
        out = self._release(fresh)
        out, self._held = out + self._held, ""
        return out

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a start of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
