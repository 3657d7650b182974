"""Traces of requests: the right spans in the right order, the client's as their parent, and no text in them."""

from __future__ import annotations

import builtins
import http.server
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from foreword.serve.gateway import create_app
from foreword.serve.watch.tracing import Tracing, from_environment, trace_headers
from tests.serve.fakes import FakeBackend, FakeRegistry, served, version

SECRET = "my card number is 4711"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = PARENT[:-2] + "00"


class Traced:
    """A tracing whose spans stay in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracing = Tracing(provider)

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name.removeprefix("foreword."): span for span in self.exporter.get_finished_spans()}


def test_steps_lie_behind_each_other_under_the_request() -> None:
    traced = Traced()
    trace = traced.tracing.begin({}, "/v1/completions")
    trace.step("resolve")
    trace.step("load")
    trace.step("first_token", until=time.monotonic())
    trace.end(200, task="triage", version="1", tenant="", prompt_tokens=5)
    spans = traced.spans()
    assert list(spans) == ["resolve", "load", "first_token", "request"]
    root = spans["request"]
    steps = [spans[name] for name in ("resolve", "load", "first_token")]
    for step in steps:
        assert step.parent is not None and root.context is not None
        assert step.parent.span_id == root.context.span_id
    ends = [root.start_time, *(step.end_time for step in steps)]
    assert [step.start_time for step in steps] == ends[:-1]
    assert ends == sorted(ends) and ends[-1] <= root.end_time  # type: ignore[operator,type-var]
    assert root.attributes == {
        "url.path": "/v1/completions",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "foreword.task": "triage",
        "foreword.version": "1",
        "foreword.prompt_tokens": 5,
    }
    assert root.status.status_code is StatusCode.UNSET


def test_only_the_servers_own_faults_make_a_span_an_error() -> None:
    for code, kind, expected in ((404, "not_found", StatusCode.UNSET), (502, "backend_failed", StatusCode.ERROR)):
        traced = Traced()
        traced.tracing.begin({}, "/v1/completions").end(code, kind)
        span = traced.spans()["request"]
        assert span.status.status_code is expected and span.attributes is not None
        assert span.attributes["error.type"] == kind


def test_the_clients_trace_goes_on_and_is_handed_on() -> None:
    traced = Traced()
    trace = traced.tracing.begin({"traceparent": PARENT, "tracestate": "a=1"}, "/v1/completions")
    trace.end(200)
    context = traced.spans()["request"].context
    assert context is not None and f"{context.trace_id:032x}" == PARENT.split("-")[1]
    assert trace.headers["traceparent"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-01"
    assert trace.headers["tracestate"] == "a=1"


def test_a_trace_that_the_client_does_not_sample_stays_so() -> None:
    traced = Traced()
    trace = traced.tracing.begin({"traceparent": NOT_SAMPLED}, "/v1/completions")
    trace.step("resolve")
    trace.end(200)
    assert traced.spans() == {}
    assert trace.headers["traceparent"].startswith(PARENT[:36]) and trace.headers["traceparent"].endswith("-00")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"traceparent": PARENT}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a=1"}, {"traceparent": PARENT, "tracestate": "a=1"}),
        ({"traceparent": PARENT, "tracestate": "a=\x1b[31m"}, {"traceparent": PARENT}),
        ({"traceparent": PARENT, "tracestate": "a" * 600}, {"traceparent": PARENT}),
        ({"traceparent": PARENT + "\n"}, {}),
        ({"traceparent": PARENT.upper()}, {}),
        ({"traceparent": "x"}, {}),
        ({"tracestate": "a=1"}, {}),
        ({}, {}),
    ],
)
def test_only_well_formed_trace_headers_are_handed_on(given: dict[str, str], expected: dict[str, str]) -> None:
    assert trace_headers(given) == expected


def test_nothing_is_traced_where_no_endpoint_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert from_environment() is None


def test_without_opentelemetry_it_says_so_and_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(builtins, "__import__", missing)
    with caplog.at_level(logging.WARNING):
        assert from_environment() is None
    assert "foreword[tracing] has it" in caplog.text


def test_a_plain_install_serves() -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = sys.modules['opentelemetry.exporter'] = None\n"  # not the API:
        "import foreword.serve.gateway, foreword.serve.watch.tracing as t\n"  # FastAPI itself needs that
        "assert t.from_environment() is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """A server that takes what exporters send; (url, what came)."""
    came: list[tuple[str, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("named", ["", "shop"])
def test_spans_go_to_the_collector_that_the_environment_names(
    named: str, collector: tuple[str, list[tuple[str, bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, came = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
    if named:
        monkeypatch.setenv("OTEL_SERVICE_NAME", named)
    tracing = from_environment()
    assert tracing is not None
    tracing.begin({}, "/v1/completions").end(200, task="triage")
    tracing.close()
    ((path, data),) = came
    assert path == "/v1/traces"
    for expected in (b"foreword.request", b"triage", named.encode() or b"foreword"):
        assert expected in data


def test_a_dead_collector_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch, dead_port: int) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    before = set(threading.enumerate())
    tracing = from_environment()
    assert tracing is not None
    tracing.begin({}, "/v1/completions").end(200)
    started = time.monotonic()
    tracing.close(0.1)
    assert time.monotonic() - started < 1
    for thread in set(threading.enumerate()) - before:  # its last words must not come after the test's own end
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def dead_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_is_traced_from_end_to_end(is_streamed: bool) -> None:
    traced, backend = Traced(), FakeBackend()
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend) as running, running.client(headers={"traceparent": PARENT}) as client:
        app.state.gateway.tracing = traced.tracing
        body = {"model": "triage", "prompt": SECRET, "stream": is_streamed}
        found = client.post("/v1/completions", json=body)
        assert client.post("/v1/completions", json={"model": SECRET, "prompt": "x"}).status_code == 404
    good, bad = (span for span in traced.exporter.get_finished_spans() if span.name == "foreword.request")
    steps = [
        span
        for span in traced.exporter.get_finished_spans()
        if span.parent is not None and good.context is not None and span.parent.span_id == good.context.span_id
    ]
    assert [span.name.removeprefix("foreword.") for span in steps] == ["resolve", "load", "submit", "first_token"]
    assert good.attributes is not None and bad.attributes is not None
    for name, value in {"task": "triage", "version": "1", "prompt_tokens": 5, "completion_tokens": 4}.items():
        assert good.attributes[f"foreword.{name}"] == value
    assert good.attributes["foreword.request_id"] == found.headers["x-request-id"]
    assert (bad.attributes["http.response.status_code"], bad.attributes["error.type"]) == (404, "not_found")
    assert all(SECRET not in span.to_json() for span in traced.exporter.get_finished_spans())
    (caller,) = backend.callers
    assert good.context is not None and caller.request_id == found.headers["x-request-id"]
    assert caller.trace["traceparent"] == f"{PARENT[:35]}-{good.context.span_id:016x}-01"


def test_without_tracing_the_clients_headers_are_handed_on() -> None:
    backend = FakeBackend()
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend) as running, running.client() as client:
        body = {"model": "triage", "prompt": "x"}
        client.post("/v1/completions", json=body, headers={"traceparent": PARENT, "tracestate": "a=1"})
        client.post("/v1/completions", json=body, headers={"traceparent": "nonsense"})
    assert [caller.trace for caller in backend.callers] == [{"traceparent": PARENT, "tracestate": "a=1"}, {}]


def test_fastapis_own_telemetry_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would put bodies and the messages of errors into spans and logs."""
    traced = Traced()
    monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", traced.tracing.provider)
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    backend = FakeBackend()
    app = create_app(backend, FakeRegistry(version("triage", 1)), base_name="base")
    with served(app, backend) as running, running.client() as client:
        assert client.post("/v1/completions", json={"model": "triage", "prompt": SECRET}).status_code == 200
    assert traced.exporter.get_finished_spans() == ()
