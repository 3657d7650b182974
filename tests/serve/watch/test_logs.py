"""Logs: one line per record in both styles, never a prompt, an answer or a key, and nothing that a client can forge."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foreword.errors import ArtefactCorrupt, ConfigError
from foreword.serve.access.control import Control
from foreword.serve.gateway import create_app
from foreword.serve.watch import logs
from foreword.serve.watch.logs import REQUEST_ID, JsonFormatter, TextFormatter, fields, places, request_id
from tests.serve.fakes import FakeBackend, FakeRegistry, overloaded, served, version
from tests.serve.fakes_access import FakeAccess

SECRET = "my card number is 4711"
ANSWER = "the secret answer"
NASTY = "x\n2030-01-01T00:00:00Z ERROR foreword: forged\x1b[31m\u2028\x00"


@contextmanager
def captured(style: logs.Format, level: int = logging.DEBUG) -> Iterator[io.StringIO]:
    """Everything that any logger says, as it is set up for serving."""
    root, ours = logging.getLogger(), logging.getLogger("foreword")
    before = root.handlers[:], root.level, ours.level
    out = io.StringIO()
    try:
        logs.configure(style, level)
        (handler,) = root.handlers
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(out)
        root.setLevel(level)
        handler.addFilter(lambda record: not record.name.startswith(("httpx", "httpcore")))  # the tests' own client
        yield out
    finally:
        logging.captureWarnings(False)
        root.handlers[:], level_before, ours_before = before
        root.setLevel(level_before)
        ours.setLevel(ours_before)


def record(message: str, *arguments: object, **values: object) -> logging.LogRecord:
    made = logging.LogRecord("foreword.serve", logging.INFO, "x.py", 1, message, arguments, None)
    made.__dict__.update(fields(**values))
    return made


def test_a_json_record() -> None:
    token = REQUEST_ID.set("request-1")
    try:
        line = JsonFormatter().format(record("answered %s", "triage@1", task="triage", tenant=None, error="", code=200))
    finally:
        REQUEST_ID.reset(token)
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "info",
        "logger": "foreword.serve",
        "message": "answered triage@1",
        "request_id": "request-1",
        "task": "triage",
        "code": 200,
    }


def test_a_text_record() -> None:
    line = TextFormatter().format(record("answered %s", "triage@1", task="triage", tenant="team-a", places="a > b"))
    assert line.partition(" ")[2] == 'INFO foreword.serve: answered triage@1 tenant=team-a places="a > b"'


@given(st.text())
def test_no_value_can_begin_a_line(value: str) -> None:
    for formatter in (TextFormatter(), JsonFormatter()):
        line = formatter.format(record("asked for %s", value, model=value))
        assert line.isprintable() and len(line.splitlines()) == 1
    assert json.loads(JsonFormatter().format(record("asked for %s", value, model=value)))["message"] == (
        f"asked for {value}"
    )


@pytest.mark.parametrize("given", ["abc-1", "A" * 128, "00:1/2.3+4=5_6", "0af7651916cd43dd8448eb211c80319c"])
def test_a_plain_request_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, "", "A" * 129, "a b", "a\nb", "a\x1b[31m", "é", '"', "-a", "a\n"])
def test_another_request_id_is_replaced(given: str | None) -> None:
    found = request_id(given)
    assert re.fullmatch("[0-9a-f]{32}", found) and found != request_id(given)


def failing() -> None:
    raise ValueError(SECRET)


@pytest.mark.parametrize("style", ["text", "json"])
def test_exceptions_are_told_by_class_and_place(style: logs.Format) -> None:
    with captured(style) as out:
        try:
            failing()
        except ValueError as error:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\n")
            assert places(error).endswith(" failing")
    assert "ValueError" in out.getvalue() and "watch/test_logs.py" in out.getvalue()
    assert SECRET not in out.getvalue() and out.getvalue().count("\n") == 1


def test_what_asyncio_says_of_a_lost_exception_holds_no_value() -> None:
    async def main() -> None:
        async def lost() -> None:
            failing()

        task = asyncio.create_task(lost())
        await asyncio.sleep(0)
        del task
        gc.collect()

    with captured("text", logging.WARNING) as out:
        asyncio.run(main())
    assert "Task exception was never retrieved" in out.getvalue() and "ValueError" in out.getvalue()
    assert SECRET not in out.getvalue() and out.getvalue().count("\n") == 1


def test_warnings_are_records() -> None:
    with captured("json") as out, warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("something is old", DeprecationWarning, stacklevel=1)
    assert "something is old" in json.loads(out.getvalue())["message"]


def test_styles_are_known() -> None:
    with pytest.raises(ConfigError, match="'xml'"):
        logs.configure("xml")  # type: ignore[arg-type]


def test_nothing_is_formatted_where_the_level_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from foreword.serve.watch import record as recording

    def refuse(*_: object) -> None:
        raise AssertionError("a line was made that nobody reads")

    monkeypatch.setattr(recording, "_log", refuse)
    backend = FakeBackend()
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with captured("text", logging.ERROR), served(app, backend) as running, running.client() as client:
        assert client.post("/v1/completions", json={"model": "triage", "prompt": "x"}).status_code == 200


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_session_tells_neither_prompts_nor_answers_nor_keys(style: logs.Format) -> None:
    backend, access = FakeBackend(), FakeAccess()
    backend.answers["sha-triage-1"] = (ANSWER,)
    access.add_tenant("team-a", "triage", requests_per_minute=40)
    key = access.add_key("team-a")
    registry = FakeRegistry(version("triage", 1), version("clause", 1))
    app = create_app(backend, registry, base_name="base", control=Control(access, poll_s=0.01), require_keys=True)
    with captured(style) as out, served(app, backend) as running:
        with running.client(headers={"authorization": f"Bearer {key}"}) as client:
            everything(client, backend)
        with running.client(headers={"authorization": f"Bearer {key[:-1]}y"}) as client:
            assert client.post("/v1/completions", json={"model": "triage", "prompt": SECRET}).status_code == 401
    told = out.getvalue()
    for hidden in (SECRET, SECRET[-8:], ANSWER, key, key[14:], "Bearer"):
        assert hidden not in told
    lines = told.splitlines()
    assert len(lines) == told.count("\n") and all(line.isprintable() for line in lines)
    assert not any(line.startswith("2030-") for line in lines)
    for expected in ("triage", "team-a", key[:13], "client-1", "backend_failed", "unauthorized", "not_found"):
        assert expected in told, expected
    if style == "json":
        records = [json.loads(line) for line in lines]
        answered = next(found for found in records if found.get("request_id") == "client-1" and "code" in found)
        assert (answered["task"], answered["version"], answered["code"]) == ("triage", "1", 200)
        assert (answered["tenant"], answered["key"]) == ("team-a", key[:13])
        assert (answered["prompt_tokens"], answered["completion_tokens"], answered["queue_s"]) == (5, 1, 0.25)
        assert answered["total_s"] >= answered["first_token_s"] >= 0
        failed = next(found for found in records if found.get("error") == "overloaded")
        assert (failed["code"], failed["level"]) == (503, "warning")


def everything(client: httpx.Client, backend: FakeBackend) -> None:
    """Send what a gateway may meet: good, wrong and failing requests."""
    from foreword.errors import BackendFailed

    def ask(model: str = "triage", path: str = "/v1/completions", **more: object) -> httpx.Response:
        return client.post(path, json={"model": model, "prompt": SECRET, **more})

    assert client.post(
        "/v1/completions", json={"model": "triage", "prompt": SECRET}, headers={"x-request-id": "client-1"}
    ).text.count(ANSWER)
    assert ANSWER in ask(stream=True).text
    chat = {"model": "triage", "messages": [{"role": "user", "content": SECRET}], "user": SECRET}
    assert client.post("/v1/chat/completions", json=chat).status_code == 200
    assert ask(SECRET).status_code == 404
    assert ask(NASTY).status_code == 404
    assert ask("clause").status_code == 404
    assert ask(temperature=SECRET).status_code == 400
    assert ask(**{SECRET: 1}).status_code == 400
    assert client.post("/v1/completions", content=SECRET.encode()).status_code == 400
    assert ask(path=f"/v1/{SECRET}").status_code == 404
    for error in (ValueError(SECRET), overloaded(), BackendFailed("the engine is gone")):
        backend.submit_error = error
        assert ask().status_code >= 500
    backend.submit_error, backend.fail_after = None, 0
    assert ask().status_code == 500
    assert "error" in ask(stream=True).text
    backend.fail_after = None
    backend.load_errors = [ArtefactCorrupt("bad file")]
    ask("triage@1")
