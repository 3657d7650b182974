"""The gateway over a scripted backend: limits, errors, streams, clients that leave, draining. No model, no torch."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import APIError, BadRequestError, InternalServerError, NotFoundError, OpenAI

from foreword.errors import ArtefactCorrupt, Conflict, ForewordError
from foreword.serve.gateway import create_app
from tests.serve.fakes import FakeBackend, FakeRegistry, Served, overloaded, served, version

SECRET = "my card number is 4711"


class Stage:
    """A server over fakes."""

    def __init__(self, running: Served, backend: FakeBackend, registry: FakeRegistry) -> None:
        self.running, self.backend, self.registry = running, backend, registry
        self.http = running.client()
        self.openai = OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)

    def complete(self, model: str = "triage", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": model, "prompt": SECRET, **fields})

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.fixture
def stage() -> Iterator[Stage]:
    backend, registry = FakeBackend(), FakeRegistry(version("triage", 1), version("clause", 1))
    app = create_app(backend, registry, base_name="base", max_body_bytes=2000, resolve_ttl_s=0.02)
    with served(app, backend) as running:
        found = Stage(running, backend, registry)
        yield found
        found.http.close()
        found.openai.close()
    assert backend.num_running == 0 and backend.log[-1] == "close"


def wait_for(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_an_answer_says_which_artefact_gave_it(stage: Stage) -> None:
    answer = stage.complete()
    assert answer.json()["choices"][0]["text"] == "sha-triage-1: one two three"
    assert answer.json()["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}
    assert answer.headers["x-foreword-version"] == "triage@1"
    assert answer.headers["x-foreword-digest"] == "sha-triage-1"
    plain = stage.complete("base")
    assert plain.json()["choices"][0]["text"] == "base: one two three"
    assert "x-foreword-version" not in plain.headers


def test_choices_are_numbered_prompt_by_prompt(stage: Stage) -> None:
    found = stage.openai.completions.create(model="triage", prompt=["a", "b"], n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage is not None and found.usage.prompt_tokens == 10
    assert [request.prompt for request in stage.backend.requests] == ["a", "b"]


def test_streamed(stage: Stage) -> None:
    with stage.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "triage@1",
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-foreword-version"] == "triage@1"
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    data = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    text = "".join(choice["delta"].get("content", "") for found in data for choice in found["choices"])
    assert text == "sha-triage-1: one two three"
    assert data[-1]["usage"]["completion_tokens"] == 4
    assert stage.metric("foreword_completion_tokens_total") == 4


def test_unknown_names(stage: Stage) -> None:
    with pytest.raises(NotFoundError, match="Did you mean triage") as caught:
        stage.openai.completions.create(model="triaeg", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert stage.http.get("/v1/models/nothing").status_code == 404
    assert stage.http.get("/v2/models").json()["error"]["message"] == "GET /v2/models: Not Found"
    assert stage.http.get("/v1/completions").status_code == 405


def test_refusals(stage: Stage) -> None:
    with pytest.raises(BadRequestError, match="'logit_bias' is not supported") as caught:
        stage.openai.completions.create(model="triage", prompt="x", logit_bias={"1": 1})
    assert caught.value.param == "logit_bias"
    broken = stage.http.post("/v1/completions", content=b'{"model": ')
    assert broken.status_code == 400 and "line 1, column 11" in broken.json()["error"]["message"]
    assert stage.backend.requests == []


def test_too_large_bodies_are_refused_with_both_numbers(stage: Stage) -> None:
    declared = stage.complete(prompt="x" * 3000)
    assert declared.status_code == 413
    length = declared.request.headers["content-length"]
    assert declared.json()["error"]["message"] == f"the body has {length} bytes, 2000 are allowed. Send less text."

    def pieces() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 1000

    chunked = stage.http.post("/v1/completions", content=pieces())
    assert chunked.status_code == 413
    assert "bytes or more, 2000 are allowed" in chunked.json()["error"]["message"]
    assert stage.complete().status_code == 200


def test_overloaded_says_when_to_come_back(stage: Stage) -> None:
    stage.backend.submit_error = overloaded()
    with pytest.raises(InternalServerError, match="256 wait, 256 may") as caught:
        stage.openai.chat.completions.create(model="triage", messages=[{"role": "user", "content": "x"}], stream=True)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "3"


def test_a_version_that_cannot_be_loaded_fails_closed_and_is_tried_again(stage: Stage) -> None:
    stage.backend.load_errors = [ArtefactCorrupt("the file is not what was published")]
    found = stage.complete()
    assert found.status_code == 422 and found.headers["x-foreword-version"] == "triage@1"
    assert stage.complete("clause").status_code == 200
    assert stage.backend.requests[0].prefix == "sha-clause-1"
    stage.running.app.state.gateway.residents.retry_s = 0
    wait_for(lambda: stage.complete().status_code == 200)
    assert stage.metric('foreword_load_failures_total{kind="artefact_corrupt"}') == 1


def test_an_error_within_a_stream_is_its_last_event(stage: Stage) -> None:
    stage.backend.fail_after = 2
    seen = []
    with pytest.raises(APIError, match=r"the engine fell over\. Try again\."):
        for chunk in stage.openai.completions.create(model="triage", prompt="x", stream=True):
            seen.append(chunk.choices[0].text)
    assert seen == ["sha-triage-1: ", "one "]
    raw = stage.complete(stream=True).text
    assert "[DONE]" not in raw and '"error"' in raw.splitlines()[-2]
    failed = stage.complete()
    assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
    assert stage.metric('foreword_requests_total{code="500",task="triage",tenant="",version="1"}') == 3


def test_an_unexpected_error_is_answered_and_logged_without_text(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    stage.backend.submit_error = ValueError(f"cannot encode {SECRET}")
    with caplog.at_level(logging.DEBUG):
        found = stage.complete()
    assert found.status_code == 500 and "ValueError" in found.json()["error"]["message"]
    assert "unexpected ValueError" in caplog.text and "fakes.py" in caplog.text
    assert SECRET not in caplog.text and SECRET not in found.text


def test_no_text_of_a_request_is_logged(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        stage.complete()
        stage.complete(stream=True)
        stage.complete(temperature=SECRET)
        stage.complete(SECRET)
    assert "/v1/completions triage@1 200: 5 + 4 tokens" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(stage: Stage, is_streamed: bool) -> None:
    stage.backend.words = ("word ",) * 1000
    stage.backend.delay_s = 0.01
    body = json.dumps({"model": "triage", "prompt": "x", "stream": is_streamed}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    host, _, port = stage.running.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(head + body)
        wait_for(lambda: stage.backend.num_running == 1)
        if is_streamed:
            assert raw.recv(100).startswith(b"HTTP/1.1 200")
    wait_for(lambda: stage.backend.num_aborted == 1)
    assert stage.backend.num_running == 0
    wait_for(lambda: stage.metric('foreword_requests_total{code="499",task="triage",tenant="",version="1"}') == 1)


def test_a_client_that_leaves_while_its_version_loads_holds_nothing(stage: Stage) -> None:
    stage.backend.load_s = 0.3
    with pytest.raises(httpx.ReadTimeout):
        stage.http.post("/v1/completions", json={"model": "triage", "prompt": "x"}, timeout=0.1)
    wait_for(lambda: stage.metric("foreword_resident_prefixes") == 1)
    assert stage.backend.requests == []
    residents = stage.running.app.state.gateway.residents
    assert [entry.leases for entry in residents._entries.values()] == [0]


def test_a_slow_reader_does_not_hold_up_the_others(stage: Stage) -> None:
    stage.backend.words = ("word " * 2000,) * 50
    with stage.http.stream("POST", "/v1/completions", json={"model": "triage", "prompt": "x", "stream": True}) as slow:
        lines = slow.iter_lines()
        next(lines)
        stage.backend.words = ("quick",)
        started = time.monotonic()
        assert stage.complete().status_code == 200
        assert time.monotonic() - started < 2
        assert sum("word" in line for line in lines) == 50


def test_models(stage: Stage) -> None:
    stage.registry.moved["triage@canary"] = 1
    assert [model.id for model in stage.openai.models.list()] == ["base", "clause", "triage", "triage@canary"]
    found = stage.http.get("/v1/models/triage@canary").json()
    assert (found["root"], found["parent"], found["object"]) == ("triage@1", "base", "model")


def test_promotion_and_rollback_while_requests_run(stage: Stage) -> None:
    stage.backend.delay_s = 0.02
    stage.registry.known["triage@2"] = version("triage", 2)
    stage.registry.moved["triage@prod"] = 1
    seen: list[tuple[str, str]] = []
    is_over = threading.Event()

    def ask() -> None:
        with stage.running.client() as client:
            while not is_over.is_set():
                found = client.post("/v1/completions", json={"model": "triage", "prompt": "x"})
                seen.append((found.headers["x-foreword-digest"], found.json()["choices"][0]["text"].split(":")[0]))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    for number in (1, 2, 1):
        stage.registry.moved["triage@prod"] = number
        time.sleep(0.3)
        assert stage.complete().headers["x-foreword-version"] == f"triage@{number}"
    is_over.set()
    for asker in askers:
        asker.join()
    assert all(digest == prefix for digest, prefix in seen)
    digests = [digest for digest, _ in seen]
    assert {"sha-triage-1", "sha-triage-2"} == set(digests) and digests[-1] == "sha-triage-1"


def test_health_is_about_the_process_and_ready_about_the_next_request(stage: Stage) -> None:
    stage.complete()
    healthy = {"status": "ok", "running": 0, "waiting": 1, "open_requests": 0, "resident_versions": 1}
    assert stage.http.get("/health").json() == healthy
    assert stage.http.get("/ready").json() == {"status": "ready", "reasons": []}
    stage.backend.is_dead = True
    assert stage.http.get("/health").status_code == 200
    ready = stage.http.get("/ready")
    assert (ready.status_code, ready.json()["reasons"]) == (503, ["the engine cannot answer"])
    assert stage.metric("foreword_backend_up") == 0


def test_a_draining_server_is_not_ready(stage: Stage) -> None:
    stage.running.app.state.gateway.is_draining = True
    assert stage.http.get("/ready").status_code == 503
    assert stage.http.get("/health").status_code == 200


def test_metrics(stage: Stage) -> None:
    stage.complete()
    stage.complete("nothing")
    stage.complete(SECRET)
    text = stage.http.get("/metrics").text
    for line in (
        'foreword_requests_total{code="200",task="triage",tenant="",version="1"} 1.0',
        'foreword_requests_total{code="404",task="unknown",tenant="",version=""} 2.0',
        'foreword_prompt_tokens_total{task="triage",tenant="",version="1"} 5.0',
        'foreword_completion_tokens_total{task="triage",tenant="",version="1"} 4.0',
        'foreword_queue_seconds_sum{task="triage"} 0.25',
        'foreword_first_token_seconds_count{task="triage"} 1.0',
        'foreword_token_seconds_count{task="triage"} 1.0',
        "foreword_load_seconds_count 1.0",
        "foreword_loads_total 1.0",
        "foreword_resident_prefixes 1.0",
        "foreword_resident_prefix_bytes 1000.0",
        "foreword_running 0.0",
        "foreword_waiting 1.0",
        "foreword_kv_blocks 10.0",
        "foreword_free_kv_blocks 4.0",
    ):
        assert line in text.splitlines(), line


def test_series_are_bounded(stage: Stage) -> None:
    stage.running.app.state.gateway.metrics._series.limit = 2
    for number in range(2, 6):
        stage.registry.known[f"triage@{number}"] = version("triage", number)
        stage.complete(f"triage@{number}")
    assert stage.metric('foreword_requests_total{code="200",task="other",tenant="",version=""}') == 2


def test_running_answers_end_before_the_server_does() -> None:
    backend = FakeBackend(words=("word ",) * 20, delay_s=0.02)
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend) as running, running.client() as client:
        body = {"model": "triage", "prompt": "x", "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.server.should_exit = True
            time.sleep(0.2)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{running.url}/health")
            rest = list(lines)
        assert rest[-2] == "data: [DONE]" and sum("word" in line for line in rest) == 20
        running.stop()
    assert backend.num_aborted == 0


def test_draining_is_bounded() -> None:
    backend = FakeBackend(words=("word ",) * 10_000, delay_s=0.02)
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend, drain_s=0.2) as running, running.client() as client:
        body = {"model": "triage", "prompt": "x", "stream": True}
        with (
            pytest.raises(httpx.RemoteProtocolError),
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                if line:
                    running.server.should_exit = True
        running.thread.join(5)
        assert not running.thread.is_alive()
    assert backend.num_aborted == 1


@pytest.mark.parametrize("name", ["triage", "base"])
def test_preloading_fails_loudly_at_the_start(name: str) -> None:
    async def main() -> None:
        backend = FakeBackend(load_errors=[ArtefactCorrupt("bad file")])
        registry = FakeRegistry(version("triage", 1), version("base", 1))
        base_name = "base" if name == "base" else "other"
        app = create_app(backend, registry, base_name=base_name, preload=["triage"])
        async with app.router.lifespan_context(app):
            raise AssertionError("it started")

    expected: type[ForewordError] = Conflict if name == "base" else ArtefactCorrupt
    with pytest.raises(expected):
        asyncio.run(main())


def test_the_gateway_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['transformers'] = None\n"
        "import foreword.serve.gateway, foreword.serve.run, foreword.serve.watch.metrics, foreword.cli.serve_command\n"
        "from foreword.serve.backend import Backend"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_answer_has_the_requests_id(stage: Stage) -> None:
    for path in ("/health", "/v1/models", "/nothing"):
        assert stage.http.get(path, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    given = stage.http.post("/v1/completions", content=b"{", headers={"x-request-id": "no, thanks"})
    assert given.status_code == 400 and len(given.headers["x-request-id"]) == 32
    stage.complete()
    with stage.http.stream(
        "POST",
        "/v1/completions",
        json={"model": "triage", "prompt": "x", "stream": True},
        headers={"x-request-id": "mine-2"},
    ) as answer:
        assert answer.headers.get_list("x-request-id") == ["mine-2"]
        answer.read()
    assert stage.backend.callers[-1].request_id == "mine-2"


def test_an_error_that_nobody_expected_is_an_answer_without_its_values(
    stage: Stage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(stage.running.app.state.gateway, "not_ready", fail)
    monkeypatch.setattr(stage.running.app.state.gateway.guard, "principal", lambda header: fail())
    for found in (stage.http.get("/ready"), stage.complete()):
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "the server failed (ZeroDivisionError). Its log says where."
    assert "ZeroDivisionError" in caplog.text and SECRET not in caplog.text
