"""OpenAI's answers: chunks of an engine in, completions and stream events out. Imports no torch."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from foreword.engine.request import Chunk, TokenLogprob

DONE = b"data: [DONE]\n\n"
LEAST_LOGPROB = -9999.0
"""OpenAI's number for "as good as never"; JSON has no minus infinity."""

_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode

TokenBytes = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request cost, in tokens; the prefix's positions are in neither number."""

    prompt_tokens: int
    completion_tokens: int

    def to_json(self) -> dict[str, int]:
        """Return OpenAI's usage object."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


@dataclass(slots=True)
class Gathered:
    """One choice as far as it has come; filled from chunks."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        """Append a chunk."""
        self.texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        self.logprobs.extend(chunk.logprobs)
        self.finish_reason = chunk.finish_reason or self.finish_reason


class Answer:
    """Shapes one HTTP request's answer; all its parts share the id, the time and the model's name as it was asked."""

    def __init__(
        self,
        model: str,
        *,
        is_chat: bool,
        has_logprobs: bool,
        has_usage_event: bool,
        token_bytes: TokenBytes,
        names_ids: bool = False,
        has_token_ids: bool = False,
    ) -> None:
        self.id = ("chatcmpl-" if is_chat else "cmpl-") + secrets.token_hex(16)
        self.created = int(time.time())
        self.model = model
        self.is_chat = is_chat
        self.has_logprobs = has_logprobs
        self.has_usage_event = has_usage_event
        self.token_bytes = token_bytes
        self.names_ids = names_ids
        self.has_token_ids = has_token_ids
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[Gathered], usage: Usage) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        shaped: list[dict[str, Any]] = []
        for index, choice in enumerate(choices):
            text, logprobs = "".join(choice.texts), self._logprobs(index, choice.logprobs)
            body = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            body |= self._ids(choice.token_ids)
            shaped.append({"index": index, **body, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": shaped, "usage": usage.to_json()}

    def opening(self, num_choices: int) -> Iterable[bytes]:
        """Yield the events that a stream begins with: in a chat each choice's role."""
        for index in range(num_choices if self.is_chat else 0):
            yield self._event(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def events(self, chunk: Chunk) -> Iterable[bytes]:
        """Yield the events of a chunk: its text, if there is any to tell, then in a chat the end on its own."""
        logprobs = self._logprobs(chunk.index, chunk.logprobs) if chunk.logprobs else None
        ids = self._ids(chunk.token_ids)
        has_content = bool(chunk.text) or logprobs is not None or bool(ids and chunk.token_ids)
        if self.is_chat:
            if has_content:
                yield self._event(chunk.index, {"delta": {"content": chunk.text}, **ids}, logprobs, None)
            if chunk.finish_reason:
                yield self._event(chunk.index, {"delta": {}}, None, chunk.finish_reason)
        elif has_content or chunk.finish_reason:
            yield self._event(chunk.index, {"text": chunk.text, **ids}, logprobs, chunk.finish_reason)

    def closing(self, usage: Usage) -> Iterable[bytes]:
        """Yield the events that a whole stream ends with."""
        if self.has_usage_event:
            yield event_bytes({**self._head(self._chunk_kind), "choices": [], "usage": usage.to_json()})
        yield DONE

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _event(self, index: int, body: Mapping[str, Any], logprobs: Any, finish_reason: str | None) -> bytes:
        choice = {"index": index, **body, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self.has_usage_event else {}
        return event_bytes({**self._head(self._chunk_kind), "choices": [choice], **usage})

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        if self.is_chat:
            return {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        names, offsets, offset = [], [], self._offsets.get(index, 0)
        for token in tokens:
            data = self.token_bytes(token.token_id)
            names.append(self._name(token.token_id))
            offsets.append(offset)
            offset += sum(byte & 0xC0 != 0x80 for byte in data)  # characters that begin in this token
        self._offsets[index] = offset
        return {
            "tokens": names,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{self._name(top): _finite(value) for top, value in token.top.items()} for token in tokens],
            "text_offset": offsets,
        }

    def _ids(self, token_ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(token_ids)} if self.has_token_ids else {}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.names_ids else token_text(self.token_bytes(token_id))

    def _chat_logprob(self, token: TokenLogprob) -> dict[str, Any]:
        best = [self._one_logprob(top, value) for top, value in token.top.items()]
        return {**self._one_logprob(token.token_id, token.logprob), "top_logprobs": best}

    def _one_logprob(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": _finite(logprob), "bytes": list(data)}


def event_bytes(data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event. ASCII only, since some readers break lines at Unicode's separators too."""
    return b"data: " + _encode(data).encode() + b"\n\n"


def token_text(data: bytes) -> str:
    r"""Return a token's text; one that is a piece of a character as OpenAI writes it, for example `bytes:\xe2\x80`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
