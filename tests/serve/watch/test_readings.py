"""Rates and quantiles from two pages of metrics."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from foreword.engine.request import Chunk
from foreword.errors import ServeError
from foreword.registry.access_records import Limits, Route, Usage
from foreword.serve.access.control import Control
from foreword.serve.access.limits import Limiter
from foreword.serve.backend import Timings
from foreword.serve.engines.replicas import ReplicaState
from foreword.serve.versions.residents import Residents
from foreword.serve.watch.gauges import Gauges
from foreword.serve.watch.metrics import SECONDS, Metrics
from foreword.serve.watch.readings import Page, Window, parse_page, quantile, view
from tests.serve.fakes import FakeBackend
from tests.serve.fakes_access import FakeAccess

SHADOW = Route(task="triage", kind="shadow", number=9, fraction=1.0, salt="s", keep_inputs=False)


class Stage:
    """Metrics that a test moves, read as a page at a time that it says."""

    def __init__(self) -> None:
        self.backend = FakeBackend()
        self.metrics = Metrics(self.backend, Residents(self.backend, lambda version: Path(version.sha256)))

    @property
    def gauges(self) -> Gauges:
        return self.metrics.gauges

    def page(self, when: float) -> Page:
        return parse_page(generate_latest(self.metrics.registry).decode(), when)

    def request(self, task: str, version: str, *, tenant: str = "", kind: str = "", first: float = 0.03) -> None:
        self.metrics.count((task, version), 502 if kind else 200, kind=kind, tenant=tenant)
        timings = Timings(submitted=0.0, queue_s=0.004)
        for place in range(5):
            timings.add(Chunk(index=0, text="x", token_ids=(1,)), first + 0.02 * place)
        self.metrics.observe((task, version), 10, timings, tenant=tenant)


def test_rates_are_per_second_and_sorted_by_traffic() -> None:
    stage = Stage()
    for _ in range(100):
        stage.request("clause", "1")
    old = stage.page(10.0)
    for _ in range(4):
        stage.request("triage", "7", tenant="a")
    for _ in range(8):
        stage.request("triage", "8", tenant="b")
    stage.request("clause", "1", kind="backend_failed")
    seen = view(old, stage.page(14.0))
    assert seen.seconds == 4.0 and seen.requests == 13 / 4
    assert seen.errors == {"backend_failed": 0.25}
    assert (seen.prompt_tokens, seen.completion_tokens) == (130 / 4, 65 / 4)
    assert [task.task for task in seen.tasks] == ["triage", "clause"]
    assert [(found.version, found.requests) for found in seen.tasks[0].versions] == [("8", 2.0), ("7", 1.0)]
    assert seen.tasks[1].versions[0].errors == 0.25
    assert [(found.tenant, found.tokens) for found in seen.tenants] == [("b", 30.0), ("a", 15.0)]
    json.dumps(seen.to_json(), allow_nan=False)


def test_quantiles_are_those_of_the_time_between_the_pages() -> None:
    stage = Stage()
    for _ in range(1000):
        stage.request("triage", "7", first=7.0)
    old = stage.page(0.0)
    for _ in range(10):
        stage.request("triage", "7", first=0.03)
        stage.request("clause", "1", first=0.2)
    seen = view(old, stage.page(1.0))
    by_task = {task.task: task.first_token for task in seen.tasks}
    assert by_task["triage"].p50 is not None and 0.025 < by_task["triage"].p50 <= 0.05
    assert by_task["clause"].p95 is not None and 0.1 < by_task["clause"].p95 <= 0.25
    assert seen.first_token.p95 == by_task["clause"].p95 or 0.1 < (seen.first_token.p95 or 0) <= 0.25
    assert seen.token.p50 is not None and 0.01 < seen.token.p50 <= 0.025
    idle = view(stage.page(1.0), stage.page(2.0))
    assert idle.first_token.p50 is None and idle.tasks[0].token.p95 is None


def test_a_gateway_that_began_anew_counts_from_nothing() -> None:
    before, after = Stage(), Stage()
    for _ in range(100):
        before.request("triage", "7")
    for _ in range(3):
        after.request("triage", "7")
    assert view(before.page(0.0), after.page(1.0)).requests == 3


@given(st.lists(st.floats(0.0, 59.0), min_size=1, max_size=50), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    bounds = (*SECONDS, math.inf)
    buckets = {bound: float(sum(value <= bound for value in values)) for bound in bounds}
    found = quantile(buckets, q)
    true = sorted(values)[math.ceil(q * len(values) - 1e-9) - 1]
    place = bisect_left(bounds, true)
    lower = bounds[place - 1] if place else 0.0
    assert found is not None and lower - 1e-9 <= found <= bounds[place] + 1e-9


def test_quantiles_at_the_edges() -> None:
    assert quantile({}, 0.5) is None and quantile({1.0: 0.0, math.inf: 0.0}, 0.5) is None
    assert quantile({1.0: 0.0, math.inf: 4.0}, 0.5) == 1.0


def test_routes_replicas_tenants_and_versions() -> None:
    stage = Stage()
    access = FakeAccess()
    access.add_tenant("a", requests_per_minute=60, concurrent=2)
    control = stage.gauges.control = Control(access)
    control.snapshot = access.snapshot()
    limiter = stage.gauges.limiter = Limiter()
    limiter.admit("a", Limits())
    assert limiter.usage() == {"a": Usage(requests=1, tokens=0, running=1)}

    class Pool:
        def states(self) -> list[ReplicaState]:
            return [
                ReplicaState(
                    url=name, is_up=is_up, is_draining=drains, breaker=breaker, inflight=3, failures=0, retries=0
                )
                for name, is_up, drains, breaker in (
                    ("a", True, False, "closed"),
                    ("b", False, True, "closed"),
                    ("c", True, True, "open"),
                    ("d", True, False, "open"),
                    ("e", True, False, "half-open"),
                )
            ]

    stage.backend.pool = Pool()  # type: ignore[attr-defined]
    old = stage.page(0.0)
    for route, count in (("canary", 2), ("stable", 7), ("failed", 1)):
        for _ in range(count):
            stage.metrics.routed("triage", route)  # type: ignore[arg-type]
    for outcome in ("agreed", "agreed", "differed", "failed", "dropped_busy", "dropped_full"):
        stage.metrics.shadowed(SHADOW, outcome)  # type: ignore[arg-type]
    seen = view(old, stage.page(1.0))
    (canary,), (shadow,) = seen.canaries, seen.shadows
    assert (canary.canary, canary.stable, canary.failed) == (2, 7, 1)
    assert (shadow.version, shadow.agreed, shadow.differed, shadow.failed, shadow.dropped) == ("9", 2, 1, 1, 2)
    assert {found.replica: found.state for found in seen.replicas} == {
        "a": "up",
        "b": "down",
        "c": "draining",
        "d": "resting",
        "e": "trying",
    }
    (tenant,) = seen.tenants
    assert tenant.limits == {"requests_per_minute": 60, "concurrent": 2}
    assert tenant.use == {"requests_per_minute": 1, "tokens_per_minute": 0, "concurrent": 1}


def test_a_window_keeps_what_it_needs() -> None:
    window, stage = Window(10.0), Stage()
    window.add(stage.page(0.0))
    assert window.view() is None
    for second in range(1, 31):
        stage.request("triage", "7")
        window.add(stage.page(float(second)))
    seen = window.view()
    assert seen is not None and seen.seconds == 10.0 and seen.requests == 1.0
    assert len(window._pages) == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!doctype html><html><body>hello</body></html>", "no Prometheus text|no metrics of foreword"),
        ('x{a="b', "no Prometheus text"),
        ("vllm_num_requests_running 3.0\n", "no metrics of foreword"),
        ("", "no metrics of foreword"),
    ],
)
def test_another_page_is_told_apart(text: str, message: str) -> None:
    with pytest.raises(ServeError, match=message):
        parse_page(text, 0.0)
