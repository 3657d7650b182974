"""What Prometheus sees: by task, version and tenant; bounded; under names that follow its conventions."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

import foreword
from foreword.engine.request import Chunk
from foreword.registry.access_records import Route
from foreword.serve.backend import Timings
from foreword.serve.versions.residents import Residents
from foreword.serve.watch import metrics as metrics_module
from foreword.serve.watch.metrics import Metrics
from tests.serve.fakes import FakeBackend

ROUTE = Route(task="triage", kind="shadow", number=3, fraction=1.0, salt="s", keep_inputs=False)


@pytest.fixture
def metrics() -> Metrics:
    return fresh()


def fresh(**bounds: int) -> Metrics:
    backend = FakeBackend()
    return Metrics(backend, Residents(backend, lambda version: Path(version.sha256)), **bounds)


def families(metrics: Metrics) -> dict[str, Metric]:
    return {found.name: found for found in text_string_to_metric_families(generate_latest(metrics.registry).decode())}


def samples(metrics: Metrics, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in families(metrics).values()
        for sample in family.samples
        if sample.name == name
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics, name).get(tuple(sorted(labels.items())), 0.0)


def timings(*, first: float = 0.1, gap: float = 0.02, num: int = 5) -> Timings:
    found = Timings(submitted=100.0, queue_s=0.04)
    for place in range(num):
        found.add(Chunk(index=0, text="x", token_ids=(1,)), 100.0 + first + place * gap)
    return found


def test_requests_errors_and_tokens_are_counted_by_task_version_and_tenant(metrics: Metrics) -> None:
    for tenant in ("a", "a", "b"):
        metrics.count(("triage", "1"), 200, tenant=tenant)
        metrics.observe(("triage", "1"), 7, timings(), tenant=tenant, cached_tokens=3)
    metrics.count(("triage", "2"), 502, kind="backend_failed", tenant="a")
    who = {"task": "triage", "version": "1", "tenant": "a"}
    assert value(metrics, "foreword_requests_total", **who, code="200") == 2
    assert value(metrics, "foreword_requests_total", **{**who, "tenant": "b"}, code="200") == 1
    assert value(metrics, "foreword_errors_total", **{**who, "version": "2"}, kind="backend_failed") == 1
    assert value(metrics, "foreword_prompt_tokens_total", **who) == 14
    assert value(metrics, "foreword_completion_tokens_total", **who) == 10
    assert value(metrics, "foreword_cached_tokens_total", **who) == 6


def test_times_are_histograms_by_task(metrics: Metrics) -> None:
    metrics.observe(("triage", "1"), 7, timings(), tenant="a")
    metrics.observe(("triage", "2"), 7, timings(), tenant="b")
    metrics.observe(("clause", "1"), 7, timings(num=1))
    for name, seconds in (("queue", 0.04), ("first_token", 0.1), ("token", 0.02)):
        assert value(metrics, f"foreword_{name}_seconds_sum", task="triage") == pytest.approx(2 * seconds)
    assert value(metrics, "foreword_first_token_seconds_count", task="clause") == 1
    assert value(metrics, "foreword_token_seconds_count", task="clause") == 0  # one token has no time between


def test_unknown_models_share_one_series_of_a_tenant(metrics: Metrics) -> None:
    for _ in range(3):
        metrics.count(None, 404, kind="not_found", tenant="a")
    assert value(metrics, "foreword_requests_total", task="unknown", version="", tenant="a", code="404") == 3


def test_series_beyond_the_bound_are_counted_together() -> None:
    metrics = fresh(max_labels=3, max_tasks=2)
    for number in range(10):
        metrics.count((f"task{number}", "1"), 200)
        metrics.observe((f"task{number}", "1"), 1, timings())
    assert value(metrics, "foreword_requests_total", task="other", version="", tenant="", code="200") == 7
    assert len(samples(metrics, "foreword_requests_total")) == 4
    assert value(metrics, "foreword_queue_seconds_count", task="other") == 8
    assert len(samples(metrics, "foreword_queue_seconds_count")) == 3
    assert sum(samples(metrics, "foreword_prompt_tokens_total").values()) == 10


def test_series_that_nobody_uses_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    metrics = fresh(max_labels=2, max_tasks=2)
    for name in ("old", "kept"):
        metrics.count((name, "1"), 500, kind="backend_failed")
        metrics.observe((name, "1"), 1, timings())
    clock[0] += metrics_module.IDLE_S - 1
    metrics.count(("kept", "1"), 200)
    metrics.times("kept")
    clock[0] += 2
    metrics.count(("new", "1"), 200)
    metrics.observe(("new", "1"), 1, timings())
    for name in ("requests_total", "errors_total", "prompt_tokens_total", "queue_seconds_count"):
        found = {dict(labels)["task"] for labels in samples(metrics, f"foreword_{name}")}
        assert found == ({"kept"} if name == "errors_total" else {"kept", "new"}), name


def test_canary_shadow_refusals_and_bad_keys(metrics: Metrics) -> None:
    metrics.routed("triage", "canary")
    metrics.shadowed(ROUTE, "differed")
    metrics.shadow_tokens(ROUTE, 5, 4)
    metrics.refused("a", "requests_per_minute")
    metrics.unauthenticated("expired")
    assert value(metrics, "foreword_canary_requests_total", task="triage", route="canary") == 1
    assert value(metrics, "foreword_shadow_requests_total", task="triage", version="3", outcome="differed") == 1
    assert value(metrics, "foreword_shadow_tokens_total", task="triage", version="3", kind="completion") == 4
    assert value(metrics, "foreword_refusals_total", tenant="a", limit="requests_per_minute") == 1
    assert value(metrics, "foreword_auth_failures_total", reason="expired") == 1
    assert not samples(metrics, "foreword_completion_tokens_total")  # a copy's tokens are nobody's


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    metrics.count(("triage", "1"), 500, kind="backend_failed")
    metrics.observe(("triage", "1"), 1, timings())
    found = families(metrics)
    for name, family in found.items():
        assert re.fullmatch(r"foreword(_[a-z]+)+", name), name
        assert family.documentation
        if family.type == "histogram":
            assert name.endswith("_seconds")
        if family.type == "counter":
            assert all(sample.name.endswith(("_total", "_created")) for sample in family.samples)
        assert not {label for sample in family.samples for label in sample.labels} - {
            *(
                "task",
                "version",
                "tenant",
                "code",
                "kind",
                "le",
                "reason",
                "limit",
                "route",
                "outcome",
                "replica",
                "state",
            )
        }
    assert value(metrics, "foreword_build_info", version=foreword.__version__) == 1


def test_a_request_resolves_its_labels_once(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second request of a series looks nothing up in prometheus_client, whose `labels` takes a lock and strings."""
    metrics.count(("triage", "1"), 500, kind="backend_failed", tenant="a")
    metrics.observe(("triage", "1"), 1, timings(), tenant="a")

    def refuse(*_: object) -> None:
        raise AssertionError("labels were resolved again")

    for family in (metrics._requests, metrics._errors, metrics._prompt_tokens, metrics._queue, metrics._first):
        monkeypatch.setattr(family, "labels", refuse)
    metrics.count(("triage", "1"), 500, kind="backend_failed", tenant="a")
    metrics.observe(("triage", "1"), 1, timings(), tenant="a")
