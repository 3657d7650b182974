"""The events of an engine's answer as chunks: what is asked in one HTTP request, and the bytes that come back.

vLLM's completions, and foreword's completions and chats, are read by the same code. Imports no torch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from foreword.engine.request import Chunk, FinishReason, TokenLogprob
from foreword.errors import BackendFailed
from foreword.serve.backend import Timings

MAX_EVENT_BYTES = 64 * 2**20
LEAST_LOGPROB = -9999.0
"""What engines write for minus infinity."""
FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


@dataclass(slots=True, kw_only=True, eq=False)
class Post:
    """One HTTP request of a stream: a prompt, for `n` answers."""

    path: str
    body: bytes
    """A JSON object without `model`. Emptied with the first token: from then on nothing is sent again."""
    key: str
    """What the replica is chosen by."""
    model: str | None = None
    """None is the name under which the replica serves the base."""
    headers: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    """Index of its first answer in the stream."""
    n: int = 1
    num_prompt_tokens: int | None = None
    """None where only the engine knows."""
    stop_ids: frozenset[int] = frozenset()
    """An answer's last token is not part of it where it is one of these."""
    num_logprobs: int | None = None
    drops_space: bool = False
    """Whether an answer's first space is the engine's, not the base's own decoding's."""


class Reader:
    """Parses the events of one post."""

    def __init__(self, post: Post, timings: Timings) -> None:
        self.post = post
        self.now = 0.0
        self.is_done = False
        self._timings = timings
        self._rest = b""
        self._open = set(range(post.n))
        self._at_start = set(range(post.n)) if post.drops_space else set()

    def events(self, data: bytes) -> Iterator[Mapping[str, Any]]:
        """Yield the JSON objects that `data` completes. Raises BackendFailed where it holds something else."""
        self.now = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise not_understood()
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            if line[5:].strip() == b"[DONE]":
                self.is_done = not self._open
                continue
            event = json_or_none(line[5:])
            if not isinstance(event, dict):
                raise not_understood()
            yield event

    def chunks(self, event: Mapping[str, Any]) -> list[Chunk]:
        """Return the chunks of an event. Raises KeyError and its like where it is none of a completion's."""
        found = []
        for choice in event.get("choices", ()):
            chunk = self._chunk(choice)
            if chunk.text or chunk.token_ids or chunk.finish_reason:
                self._timings.add(chunk, self.now)
                found.append(chunk)
        return found

    def _chunk(self, choice: Mapping[str, Any]) -> Chunk:
        post, index = self.post, choice["index"]
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        ids = choice.get("token_ids") or ()
        logprobs: tuple[TokenLogprob, ...] = ()
        if post.num_logprobs is not None and choice.get("logprobs"):
            logprobs = _logprobs(choice["logprobs"], post.num_logprobs)
        finish = choice.get("finish_reason")
        if finish is not None:
            finish = FINISHED.get(finish)
            if finish is None:
                raise BackendFailed("the engine ended the request before its answer was whole", hint="Try again.")
            self._open.remove(index)
            is_text_stop = isinstance(choice.get("stop_reason"), str)
            if finish == "stop" and ids and ids[-1] in post.stop_ids and not is_text_stop:
                ids, logprobs = ids[:-1], logprobs[: len(ids) - 1]
        if index in self._at_start and text:
            self._at_start.discard(index)
            text = text.removeprefix(" ")
        return Chunk(index=post.first + index, text=text, token_ids=tuple(ids), logprobs=logprobs, finish_reason=finish)


def _logprobs(told: Mapping[str, Any], count: int) -> tuple[TokenLogprob, ...]:
    """Return log-probabilities from a completion's or a chat's object, whose tokens are named `token_id:7`."""
    if "content" in told:
        return tuple(
            _logprob(
                _token_id(entry["token"]),
                entry["logprob"],
                {best["token"]: best["logprob"] for best in entry["top_logprobs"]},
                count,
            )
            for entry in told["content"] or ()
        )
    triples = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    return tuple(_logprob(_token_id(token), value, top or {}, count) for token, value, top in triples)


def _logprob(token: int, value: float, told: Mapping[str, float], count: int) -> TokenLogprob:
    """Return one; of the `count` best tokens and the chosen one, which vLLM tells together, the best."""
    best = sorted(((other, _token_id(name)) for name, other in told.items()), key=lambda pair: -pair[0])
    top = {name: other for other, name in best[:count] if other > LEAST_LOGPROB}
    return TokenLogprob(token_id=token, logprob=value, top=top)


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def json_or_none(data: bytes) -> Any:
    """Return what `data` holds as JSON, None where it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return None


def not_understood() -> BackendFailed:
    """Return the error for an answer that is none."""
    return BackendFailed(
        "the engine's answer is not understood", hint="Is the replica's URL that of a vLLM or foreword server?"
    )
