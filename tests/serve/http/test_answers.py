"""The exact shapes of OpenAI's answers."""

from __future__ import annotations

import json
from typing import Any

from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from foreword.engine.request import Chunk, TokenLogprob
from foreword.serve.http.answers import DONE, Answer, Gathered, Usage, event_bytes, token_text

TOKENS = {1: b"caf", 2: b"\xc3", 3: b"\xa9", 4: b"!"}


def answer(**options: Any) -> Answer:
    fields = {"is_chat": True, "has_logprobs": False, "has_usage_event": False, "token_bytes": TOKENS.__getitem__}
    return Answer("triage", **{**fields, **options})


def logprobs(*ids: int) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(token_id=i, logprob=-i / 2, top={i: -i / 2, 4: float("-inf")}) for i in ids)


def parsed(data: bytes) -> dict[str, Any]:
    assert data.startswith(b"data: ") and data.endswith(b"\n\n") and data.count(b"\n") == 2
    found: dict[str, Any] = json.loads(data.removeprefix(b"data: "))
    return found


def test_whole_chat() -> None:
    choice = Gathered()
    choice.add(Chunk(index=0, text="caf", token_ids=(1,)))
    choice.add(Chunk(index=0, text="é", token_ids=(2, 3), finish_reason="stop"))
    data = answer().whole([choice], Usage(4, 3))
    assert data["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "café"}, "logprobs": None, "finish_reason": "stop"}
    ]
    assert data["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert (data["object"], data["model"], data["id"][:9]) == ("chat.completion", "triage", "chatcmpl-")
    ChatCompletion.model_validate(data, strict=True)


def test_whole_completion_with_logprobs() -> None:
    choice = Gathered()
    choice.add(Chunk(index=0, text="café!", token_ids=(1, 2, 3, 4), logprobs=logprobs(1, 2, 3, 4)))
    choice.add(Chunk(index=0, text="", finish_reason="length"))
    data = answer(is_chat=False, has_logprobs=True).whole([choice], Usage(1, 4))
    found = data["choices"][0]["logprobs"]
    assert found["tokens"] == ["caf", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert found["token_logprobs"] == [-0.5, -1.0, -1.5, -2.0]
    assert found["text_offset"] == [0, 3, 4, 4]
    assert found["top_logprobs"][0] == {"caf": -0.5, "!": -9999.0}
    Completion.model_validate(data)


def test_chat_stream_tells_role_content_end_usage() -> None:
    shape = answer(has_usage_event=True)
    events = [*shape.opening(1)]
    events += shape.events(Chunk(index=0, text="caf", token_ids=(1,)))
    assert not [*shape.events(Chunk(index=0, text="", token_ids=(2,)))]
    events += shape.events(Chunk(index=0, text="é", token_ids=(3,), finish_reason="stop"))
    *closing, done = shape.closing(Usage(2, 3))
    assert done == DONE == b"data: [DONE]\n\n"
    data = [parsed(event) for event in (*events, *closing)]
    for found in data:
        ChatCompletionChunk.model_validate(found, strict=True)
    deltas = [choice["delta"] for found in data for choice in found["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "caf"}, {"content": "é"}, {}]
    assert [c["finish_reason"] for found in data for c in found["choices"]] == [None, None, None, "stop"]
    assert [found["usage"] for found in data[:-1]] == [None] * 4
    assert data[-1]["choices"] == [] and data[-1]["usage"]["total_tokens"] == 5
    assert len({found["id"] for found in data}) == 1


def test_completion_stream() -> None:
    shape = answer(is_chat=False, has_logprobs=True)
    assert not [*shape.opening(2)]
    first, last = (
        parsed(event)["choices"][0]
        for chunk in (
            Chunk(index=1, text="caf", token_ids=(1,), logprobs=logprobs(1)),
            Chunk(index=1, text="!", token_ids=(4,), logprobs=logprobs(4), finish_reason="length"),
        )
        for event in shape.events(chunk)
    )
    assert (first["index"], first["text"], first["finish_reason"]) == (1, "caf", None)
    assert (last["text"], last["finish_reason"], last["logprobs"]["text_offset"]) == ("!", "length", [3])
    assert [*shape.closing(Usage(1, 2))] == [DONE]


def test_chat_logprobs_hold_bytes() -> None:
    (event,) = answer(has_logprobs=True).events(Chunk(index=0, text="", token_ids=(2,), logprobs=logprobs(2)))
    (found,) = parsed(event)["choices"][0]["logprobs"]["content"]
    assert (found["token"], found["bytes"], found["logprob"]) == ("bytes:\\xc3", [0xC3], -1.0)
    assert found["top_logprobs"][1] == {"token": "!", "logprob": -9999.0, "bytes": [33]}


def test_events_hold_no_line_separators() -> None:
    assert b"\\u2028" in event_bytes({"text": "a\u2028b\n"})
    assert token_text("é".encode()) == "é"


def test_token_ids_where_they_are_asked_for() -> None:
    choice = Gathered()
    choice.add(Chunk(index=0, text="caf", token_ids=(1,)))
    choice.add(Chunk(index=0, text="é", token_ids=(2, 3), finish_reason="stop"))
    for is_chat in (True, False):
        shape = answer(is_chat=is_chat, has_token_ids=True)
        assert shape.whole([choice], Usage(4, 3))["choices"][0]["token_ids"] == [1, 2, 3]
        held = Chunk(index=0, text="", token_ids=(2,))
        (event,) = map(parsed, shape.events(held))  # told, although its text is held back
        assert event["choices"][0]["token_ids"] == [2]
        assert not list(answer(is_chat=is_chat).events(held))
        assert "token_ids" not in answer(is_chat=is_chat).whole([choice], Usage(4, 3))["choices"][0]
    named = answer(is_chat=True, has_logprobs=True, names_ids=True)
    (event,) = map(parsed, named.events(Chunk(index=0, text="!", token_ids=(4,), logprobs=logprobs(4))))
    entry = event["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"]) == ("token_id:4", list(b"!"))
