"""What is told of a request that has ended: metrics, one line of the log, its trace, its shadow. No torch."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from foreword.errors import ForewordError, RateLimited, Unauthorized
from foreword.serve.http.openai_errors import error_kind
from foreword.serve.watch.logs import fields

if TYPE_CHECKING:
    from foreword.serve.call import Call
    from foreword.serve.watch.metrics import Metrics

log = logging.getLogger("foreword.serve")


def record(call: Call, code: int, error: ForewordError | None) -> None:
    """Tell that a request ended, with its HTTP status and its error."""
    gateway, target, stream = call.gateway, call.target, call.stream
    tenant = call.principal.tenant or ""
    labels = target.labels if target is not None else None
    kind = error_kind(error) if error is not None else ""
    gateway.metrics.count(labels, code, kind=kind, tenant=tenant)
    if isinstance(error, RateLimited):
        gateway.metrics.refused(tenant, error.limit)
    if error is not None:
        count_bad_key(gateway.metrics, error)
    if target is not None and target.route is not None:
        gateway.metrics.routed(target.labels[0], target.route)
    if stream is not None and labels is not None:
        cached = getattr(stream, "num_cached_tokens", None) or 0
        gateway.metrics.observe(labels, call.usage.prompt_tokens, stream.timings, tenant=tenant, cached_tokens=cached)
    if log.isEnabledFor(logging.INFO):
        _log(call, code, kind)
    if call.trace is not None:
        _end_trace(call, code, kind)
    if code == 200 and call.copy is not None and stream is not None and gateway.shadows is not None:
        gateway.shadows.offer(call.copy, stream.timings)


def count_bad_key(metrics: Metrics, error: ForewordError) -> None:
    """Count a key that was not accepted, by why."""
    if isinstance(error, Unauthorized):
        metrics.unauthenticated(error.reason)


def _log(call: Call, code: int, kind: str) -> None:
    target, stream, usage = call.target, call.stream, call.usage
    task, version = target.labels if target is not None else ("", "")
    first = stream.timings.first_token_s() if stream is not None else []
    total_s = time.monotonic() - call.started
    log.log(
        logging.INFO if code < 500 else logging.WARNING,
        "%s %s %d: %d + %d tokens in %.3f s",
        call.path,
        "@".join(filter(None, (task, version))) or "-",
        code,
        usage.prompt_tokens,
        usage.completion_tokens,
        total_s,
        extra=fields(
            path=call.path,
            task=task,
            version=version,
            route=target.route if target is not None else None,
            tenant=call.principal.tenant,
            key=call.principal.key_id,
            code=code,
            error=kind,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            queue_s=_rounded(stream.timings.queue_s if stream is not None else None),
            first_token_s=_rounded(min(first, default=None)),
            total_s=_rounded(total_s),
        ),
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _end_trace(call: Call, code: int, kind: str) -> None:
    assert call.trace is not None
    target, usage = call.target, call.usage
    if call.stream is not None and call.stream.timings.first:
        call.trace.step("first_token", until=min(call.stream.timings.first.values()))
    task, version = target.labels if target is not None else ("", "")
    call.trace.end(
        code,
        kind,
        task=task,
        version=version,
        tenant=call.principal.tenant,
        route=target.route if target is not None else None,
        request_id=call.request_id,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
    )
