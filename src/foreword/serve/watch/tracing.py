"""OpenTelemetry traces of requests, where they are asked for; else headers are handed on as they came. No torch.

    foreword.request > foreword.resolve, foreword.load, foreword.submit, foreword.first_token

Spans carry names, numbers and times, never text. The client's W3C traceparent is the parent; the backend is told the
request's own span in `Caller.trace`. The standard OTEL_* variables say how spans are sampled and where they go
(OTLP over HTTP); nothing is traced unless OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_S = 5.0
"""How long the end of the server waits for its last spans to be sent."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[ -~]*)?")
_TRACESTATE = re.compile(r"[ -~]{1,512}")

log = logging.getLogger("foreword.serve")


def trace_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the W3C trace headers of a request where they are well formed, else none."""
    parent, state = headers.get("traceparent", ""), headers.get("tracestate", "")
    if not _TRACEPARENT.fullmatch(parent):
        return {}
    return {"traceparent": parent} | ({"tracestate": state} if _TRACESTATE.fullmatch(state) else {})


def from_environment() -> Tracing | None:
    """Return what the OTEL_* variables ask for; None where no endpoint is set, or OpenTelemetry is not installed."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces: %s is set, but %s is not installed: foreword[tracing] has it", ENDPOINTS[0], error.name)
        return None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    resource = Resource.create({} if named else {SERVICE_NAME: "foreword"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """Makes the traces of requests."""

    def __init__(self, provider: TracerProvider) -> None:
        self.provider = provider
        self._tracer: Tracer = provider.get_tracer("foreword")

    def begin(self, headers: Mapping[str, str], path: str) -> Trace:
        """Begin the span of a request; `headers` are the client's."""
        return Trace(self._tracer, headers, path)

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """Send the last spans; blocks for at most `timeout_s`, also where nobody takes them."""
        last = threading.Thread(target=self.provider.shutdown, daemon=True)
        last.start()
        last.join(timeout_s)


class Trace:
    """The spans of one request: its own, and one for each step behind the other."""

    def __init__(self, tracer: Tracer, headers: Mapping[str, str], path: str) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        propagator = TraceContextTextMapPropagator()
        self._tracer = tracer
        self._clock = time.time_ns() - time.monotonic_ns()
        self._since = self._now()
        parent = propagator.extract(trace_headers(headers))
        attributes = {"url.path": path, "http.request.method": "POST"}
        self._span = tracer.start_span(
            "foreword.request", parent, kind=SpanKind.SERVER, start_time=self._since, attributes=attributes
        )
        self._context: Context = set_span_in_context(self._span, parent)
        self.headers: dict[str, str] = {}
        """For whoever works for this request."""
        propagator.inject(self.headers, self._context)

    def step(self, name: str, until: float | None = None) -> None:
        """Note that a step ended, now or at `until` (`time.monotonic()`); it began where the one before it ended."""
        end = self._now() if until is None else self._clock + int(until * 1e9)
        if self._span.is_recording():
            self._tracer.start_span(f"foreword.{name}", self._context, start_time=self._since).end(end)
        self._since = end

    def end(self, code: int, error: str = "", **attributes: Any) -> None:
        """End the request's span with its HTTP status and its error's kind; attributes that are empty are left out."""
        from opentelemetry.trace import StatusCode

        given = {f"foreword.{name}": value for name, value in attributes.items() if value is not None and value != ""}
        self._span.set_attributes({"http.response.status_code": code, **given})
        if error:
            self._span.set_attribute("error.type", error)
        if code >= 500:  # a client's own fault is no error of the server's span
            self._span.set_status(StatusCode.ERROR)
        self._span.end(self._now())

    def _now(self) -> int:
        return self._clock + time.monotonic_ns()
