"""Bodies: what is taken, what is refused and how the refusal reads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foreword.errors import Conflict, ForewordError, NotFound, Overloaded
from foreword.serve.http.openai_api import ENGINE_FIELDS, Body, ChatBody, CompletionBody, parse_body
from foreword.serve.http.openai_errors import InvalidBody, error_headers, error_json

USER = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionBody:
    return parse_body(CompletionBody, json.dumps({"model": "m", "prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatBody:
    return parse_body(ChatBody, json.dumps({"model": "m", "messages": USER, **fields}).encode())


def test_defaults_are_openais() -> None:
    (request,) = completion().requests("p")
    assert (request.prompt, request.prefix, request.temperature, request.max_tokens) == ("x", "p", 1.0, None)
    assert (request.n, request.logprobs, request.stop, request.top_k) == (1, None, (), 0)
    (request,) = chat().requests(None)
    assert (request.messages, request.prefix, request.logprobs) == (USER, None, None)


def test_every_field_reaches_the_engine() -> None:
    shared = {
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 7,
        "seed": 3,
        "n": 2,
        "max_tokens": 9,
        "stop": ["a", "b"],
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "user": "someone",
    }
    for body, count in ((completion(logprobs=4, **shared), 4), (chat(logprobs=True, top_logprobs=4, **shared), 4)):
        (request,) = body.requests("p")
        assert request.stop == ("a", "b") and request.logprobs == count and request.temperature == 0
        for name in shared.keys() - {"stop", "user"}:
            assert getattr(request, name) == shared[name], name
    (request,) = completion(structured_outputs={"choice": ["yes", "no"]}, ignore_eos=True).requests(None)
    assert request.choices == ("yes", "no") and request.ignore_eos
    assert chat(logprobs=True).requests(None)[0].logprobs == 0
    assert chat(max_completion_tokens=5).requests(None)[0].max_tokens == 5
    assert completion(stop="end", top_k=-1).requests(None)[0].stop == ("end",)


def test_null_is_the_default() -> None:
    names = [name for name in CompletionBody.model_fields if name not in ("model", "prompt")]
    assert completion(**dict.fromkeys(names)).requests("p") == completion().requests("p")


def test_prompts() -> None:
    assert [r.prompt for r in completion(prompt=["a", "b"]).requests(None)] == ["a", "b"]
    assert [r.prompt_ids for r in completion(prompt=[1, 2]).requests(None)] == [[1, 2]]
    assert [r.prompt_ids for r in completion(prompt=[[1], [2, 3]]).requests(None)] == [[1], [2, 3]]


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "a\nb"


COMPLETION_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"echo": True}, "echo", "the field 'echo' is refused: the prompt is not part"),
    ({"temprature": 1}, "temprature", "Did you mean temperature"),
    ({"prompt": 5}, "prompt", "a string, a list of strings, a list of token ids"),
    ({"prompt": []}, "prompt", "none empty"),
    ({"prompt": ["a", 1]}, "prompt", "a list of strings"),
    ({"prompt": [1, -1]}, "prompt", "a list of token ids"),
    ({"prompt": [True]}, "prompt", "a list of token ids"),
    ({"temperature": 3}, "temperature", "less than or equal to 2, got 3"),
    ({"temperature": "hot"}, "temperature", "a valid number"),
    ({"n": True}, "n", "a valid integer, got true"),
    ({"n": 0}, "n", "greater than or equal to 1, got 0"),
    ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
    ({"stop": [""]}, "stop[0]", "at least 1 character"),
    ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20, got 21"),
    ({"seed": 2**70}, "seed", "less than"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs.choice", "is missing"),
    ({"structured_outputs": {"choice": ["a"], "regex": "b"}}, "structured_outputs.regex", "is not supported"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1 item"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "is for stream: true"),
    ({"prompt": ["a", "b"], "n": 100}, "prompt", "are 200 answers, a request may ask for 128"),
    ({"max_completion_tokens": 5}, "max_completion_tokens", "not supported"),
]
CHAT_FAULTS: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": []}, "tools", "the field 'tools' is not supported"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got null"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name", "is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "only text"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"top_logprobs": 3}, "top_logprobs", "is for logprobs: true"),
    ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "are one setting"),
    ({"logprobs": 1}, "logprobs", "a valid boolean"),
]


@pytest.mark.parametrize("name", ENGINE_FIELDS)
@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
def test_what_only_the_server_may_tell_an_engine_is_refused_and_why(kind: type[Body], name: str) -> None:
    with pytest.raises(InvalidBody) as caught:
        parse_body(kind, json.dumps({"model": "m", name: {"foreword": 1}}).encode())
    assert caught.value.param == name
    assert caught.value.message == f"the field {name!r} is refused: {ENGINE_FIELDS[name]}"


def test_embeddings_in_a_message_are_refused_and_why() -> None:
    with pytest.raises(InvalidBody, match="prompt_embeds; vectors come from the registry's versions") as caught:
        chat(messages=[{"role": "user", "content": [{"type": "prompt_embeds", "data": "AAAA"}]}])
    assert caught.value.param == "messages[0].content"


@pytest.mark.parametrize(("fields", "param", "text"), COMPLETION_FAULTS)
def test_completion_faults(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidBody) as caught:
        completion(**fields)
    found = error_json(caught.value)["error"]
    assert (found["param"], caught.value.status) == (param, 400)
    assert text in found["message"]


@pytest.mark.parametrize(("fields", "param", "text"), CHAT_FAULTS)
def test_chat_faults(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(InvalidBody) as caught:
        chat(**fields)
    found = error_json(caught.value)["error"]
    assert found["param"] == param
    assert text in found["message"]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"model": "m",\n "prompt": }', "at line 2, column 12 (character 26)"),
        (b"", "not JSON: Expecting value at line 1, column 1"),
        (b"[1]", "a JSON list, an object is needed"),
        (b'{"model": "\xff"}', "not UTF-8: invalid start byte at byte 11"),
        (b'{"model": "m", "prompt": "\\ud800"}', "half of a surrogate pair"),
        (b'{"model": "m", "temperature": NaN}', "NaN, which is no JSON number"),
        (b'{"model": "m", "model": "n"}', "'model' is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"prompt": "x"}', "the field 'model' is missing"),
    ],
)
def test_broken_bodies(data: bytes, text: str) -> None:
    with pytest.raises(InvalidBody) as caught:
        parse_body(CompletionBody, data)
    assert text in str(caught.value)
    assert caught.value.status == 400


def test_surrogate_pairs_are_text() -> None:
    body = parse_body(CompletionBody, b'{"model": "m", "prompt": "\\ud83d\\ude00"}')
    assert body.prompt == ["😀"]


def test_a_refusal_shows_no_text_of_the_request() -> None:
    with pytest.raises(InvalidBody) as caught:
        completion(temperature="my secret", user=5)
    assert "secret" not in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields, "x"})), JSON)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(FIELDS, st.sampled_from([CompletionBody, ChatBody]))
def test_any_json_is_a_request_or_a_refusal(fields: dict[str, Any], kind: type[Body]) -> None:
    document = {"model": "m", "prompt": "x"} if kind is CompletionBody else {"model": "m", "messages": USER}
    try:
        body = parse_body(kind, json.dumps({**document, **fields}).encode())
    except InvalidBody as error:
        json.dumps(error_json(error), allow_nan=False)
    else:
        assert body.requests("p")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary())
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidBody):
        parse_body(ChatBody, data)


def test_errors_in_openais_shape() -> None:
    shown = error_json(NotFound("no task 'triag'", hint="Did you mean triage?"))["error"]
    assert shown == {
        "message": "no task 'triag'. Did you mean triage?",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert error_json(Overloaded("full"))["error"]["type"] == "overloaded_error"
    assert error_json(ForewordError("broken"))["error"]["type"] == "server_error"
    assert error_json(Conflict("moved"))["error"]["code"] == "conflict"
    assert error_headers(Overloaded("full", retry_after_s=1.2)) == {"retry-after": "2"}
    assert error_headers(NotFound("x")) == {}
